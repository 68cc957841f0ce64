"""The recipe: everything a run needs, as closed, frozen sections with Hugging Face's key names.

The combinations of values that make no sense together are in `rules`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from moc_cli.recipe.methods import MethodSection
from moc_cli.recipe.tasks import CUSTOM_TASK
from moc_cli.recipe.types import (
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    Positive,
    Section,
    Seed,
    Share,
    StepLimit,
    Text,
    one_or_more,
    refuse_bool,
    section,
    word_no,
)

Suite = Literal["commonsense", "glue", "builtin", "custom"]
Format = Literal["instruction", "chat", "text", "classification", "regression"]
ClassLabel = Text | Annotated[int, BeforeValidator(refuse_bool)]
Metric = Literal["loss", "accuracy", "f1", "matthews", "pearson", "spearman", "perplexity"]
When = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(word_no)]
Tracker = Literal["tensorboard", "wandb", "trackio"]


class ModelSection(Section):
    """The frozen model."""

    model_name_or_path: Text = Field(
        description="hub id, local folder, or builtin:<name> for a model inside this package"
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    tokenizer_name: Text | None = Field(default=None, description="null: the model's own")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="null: what transformers chooses"
    )
    trust_remote_code: bool = Field(default=False, description="run code from the model's folder")


class ColumnsSection(Section):
    """Names of the columns of one's own rows, where they are not the usual ones."""

    text: Text | None = Field(default=None, description="null: text, sentence or sentence1")
    text_pair: Text | None = Field(default=None, description="null: text_pair or sentence2, if any")
    label: Text | None = Field(default=None, description="null: label, labels or score")
    instruction: Text | None = Field(default=None, description="null: instruction or prompt")
    input: Text | None = Field(default=None, description="null: input, if any")
    output: Text | None = Field(default=None, description="null: output, response or completion")
    messages: Text | None = Field(default=None, description="null: messages or conversation")


def _tasks_but_for_custom(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what `DataSection` fills in by itself."""
    schema["required"].remove("tasks")
    custom = {"properties": {"suite": {"const": "custom"}}}
    schema["anyOf"] = [custom, {"required": ["tasks"]}]


class DataSection(Section):
    """What is learned and tested."""

    model_config = ConfigDict(json_schema_extra=_tasks_but_for_custom)

    suite: Suite = Field(description="benchmark; custom: rows of one's own")
    tasks: Annotated[list[Text], BeforeValidator(one_or_more), Field(min_length=1)] = Field(
        description="task names; one for glue; for custom any name, by default 'custom'"
    )
    path: Text | None = Field(
        default=None,
        description="folder of <task>/<split>.jsonl.gz, null: the hub; for custom a .jsonl, .json, "
        ".csv, .tsv or .parquet file, a folder of train, validation and test files, or a hub id",
    )
    format: Format | None = Field(
        default=None, description="custom: what the rows are; null: told by their columns"
    )
    columns: ColumnsSection = section("custom: names of the columns")
    labels: Annotated[list[ClassLabel], Field(min_length=2)] | None = Field(
        default=None,
        description="custom: the classes, in the order of the outputs; null: those of the "
        "training rows, sorted",
    )
    max_length: Annotated[Positive, Field(ge=8)] = Field(
        default=256, description="tokens a row; longer rows are cut and counted"
    )
    train_on_inputs: bool = Field(
        default=True, description="loss on the prompt too; for custom false by default"
    )
    max_train_samples: Positive | None = Field(default=None, description="rows; null: all")
    max_eval_samples: Positive | None = Field(
        default=None, description="rows a task, in evaluation during training; null: all"
    )
    held_out: Count = Field(
        default=120,
        description="commonsense, and custom without a validation file: training rows kept for "
        "validation",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, value: Any) -> Any:
        """Fill in what has another default for one's own rows."""
        if not isinstance(value, dict) or value.get("suite") != "custom":
            return value
        return {"tasks": [CUSTOM_TASK], "train_on_inputs": False} | value


class TrainSection(Section):
    """How the controls are optimised."""

    num_train_epochs: AboveZero = Field(default=3.0, description="passes over the data")
    max_steps: StepLimit = Field(
        default=-1, description="optimizer steps; -1: what num_train_epochs gives"
    )
    per_device_train_batch_size: Positive = Field(default=16, description="rows a micro-batch")
    gradient_accumulation_steps: Positive = Field(default=1, description="micro-batches a step")
    learning_rate: AboveZero = Field(default=3e-4, description="peak rate")
    weight_decay: AtLeastZero = Field(default=0.01, description="none on gates, biases, norms")
    adam_beta1: BelowOne = Field(default=0.9, description="decay of the first moment")
    adam_beta2: BelowOne = Field(default=0.999, description="decay of the second moment")
    adam_epsilon: AboveZero = Field(default=1e-8, description="added to the root")
    max_grad_norm: AtLeastZero = Field(default=1.0, description="clip to this norm; 0: off")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="shape of the rate after the warm-up"
    )
    warmup_steps: Count = Field(default=0, description="steps of linear warm-up")
    warmup_ratio: Share = Field(default=0.0, description="warm-up as a share of all steps")
    bf16: bool = Field(default=False, description="base model in bfloat16; controls stay float32")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations")
    group_by_length: bool = Field(default=True, description="rows of like length together")
    optim: Literal["adamw"] = Field(default="adamw", description="optimizer")


class EvalSection(Section):
    """When and how the model is scored."""

    per_device_eval_batch_size: Positive | Literal["auto"] = Field(
        default="auto", description="rows a batch; auto: what fits in memory"
    )
    eval_strategy: When = Field(default="no", description="when to evaluate during training")
    eval_steps: Positive | None = Field(default=None, description="with eval_strategy: steps")
    metric_for_best_model: Metric | None = Field(
        default=None, description="null: the task's own metric"
    )
    early_stopping_patience: Positive | None = Field(
        default=None, description="evaluations without improvement before the run stops"
    )
    protocol: Literal["rank", "generate"] = Field(
        default="rank",
        description="questions: rank the options by their likelihood, or generate an answer",
    )
    before: bool = Field(default=True, description="score the untrained model first")
    max_samples: Positive | None = Field(
        default=None, description="rows a task in the final score; null: all"
    )


class OutputSection(Section):
    """What is written, where and when."""

    output_dir: Text = Field(description="the run folder")
    save_strategy: When = Field(default="steps", description="when to write a checkpoint")
    save_steps: Positive = Field(default=500, description="with save_strategy: steps")
    save_total_limit: Positive | None = Field(
        default=2, description="checkpoints kept, best and last among them; null: all"
    )
    logging_steps: Positive = Field(default=10, description="steps between lines of metrics")
    report_to: Annotated[list[Tracker], BeforeValidator(one_or_more)] = Field(
        default_factory=list, description="trackers"
    )


def _one_process(value: Any) -> Any:
    if isinstance(value, int) and value > 1:
        raise PydanticCustomError(
            "processes", "found {n}; only 1 process is supported for now", {"n": value}
        )
    return value


class LaunchSection(Section):
    """Where the run takes place."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU if there is one"
    )
    num_threads: Positive | None = Field(
        default=None, description="CPU threads; null: what torch chooses"
    )
    num_processes: Annotated[Positive, BeforeValidator(_one_process), Field(le=1)] = Field(
        default=1, description="only 1 for now"
    )


class Recipe(Section):
    """One run, whole."""

    seed: Seed = Field(default=42, description="seed of initialisation, order and dropout")
    model: ModelSection = Field(description="the frozen model")
    method: MethodSection = Field(
        default="moc", validate_default=True, description="what is trained"
    )
    data: DataSection = Field(description="what is learned and tested")
    train: TrainSection = section("the optimisation")
    eval: EvalSection = section("the scoring")
    output: OutputSection = Field(description="the run folder")
    launch: LaunchSection = section("the machine")

    @model_validator(mode="after")
    def _sensible(self, info: ValidationInfo) -> Self:
        """Refuse impossible combinations, unless the caller gathers them itself."""
        from moc_cli.recipe.rules import broken_rules

        if not (info.context and info.context.get("rules_later")):
            broken = [f"{rule.key}: {rule.message}" for rule in broken_rules(self)]
            if broken:
                raise PydanticCustomError("combination", "{broken}", {"broken": "; ".join(broken)})
        return self
