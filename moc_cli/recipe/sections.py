"""The sections of a recipe, closed and frozen, with Hugging Face's key names.

Each is valid by itself; combinations of values that cannot work together are in `rules`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from moc_cli.recipe.launch import LaunchSection
from moc_cli.recipe.methods import MethodSection
from moc_cli.recipe.model import ModelSection
from moc_cli.recipe.names import ColumnsSection, SplitsSection
from moc_cli.recipe.tasks import (
    CUSTOM_TASK,
    Format,
    Frame,
    Suite,
    Task,
    TaskKind,
    TooLong,
    find_task,
)
from moc_cli.recipe.types import (
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    Folder,
    HeldOut,
    Positive,
    RowLength,
    Section,
    Seed,
    Share,
    StepLimit,
    Text,
    Texts,
    one_or_more,
    refuse_bool,
    section,
    word_no,
)

ClassLabel = Text | Annotated[int, BeforeValidator(refuse_bool)]
ChatTurns = Literal["all", "split", "last"]
Quoting = Literal["csv", "none"]
Metric = Literal["loss", "accuracy", "f1", "matthews", "pearson", "spearman", "perplexity"]
When = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(word_no)]
Tracker = Literal["tensorboard", "wandb", "trackio"]


def _tasks_are_optional_for_custom(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what `DataSection` fills in by itself."""
    schema["required"].remove("tasks")
    custom = {"properties": {"suite": {"const": "custom"}}}
    schema["anyOf"] = [custom, {"required": ["tasks"]}]


class DataSection(Section):
    """The data for training and evaluation."""

    model_config = ConfigDict(json_schema_extra=_tasks_are_optional_for_custom)

    suite: Suite = Field(description="a benchmark, or custom for a custom dataset")
    tasks: Texts = Field(
        description="task names; several only for questions with options; for custom, one name "
        "of your choice, by default custom"
    )
    path: Text | None = Field(
        default=None,
        description="folder with <task>/<split>.jsonl.gz; null: the hub. For custom: a file of "
        "rows, a folder of train, validation and test files, a folder that datasets saved, or a "
        "hub id",
    )
    train: Text | None = Field(
        default=None, description="custom: file or folder of the training rows, for path"
    )
    validation: Text | None = Field(
        default=None,
        description="custom: file or folder of the rows to watch; null: what path has",
    )
    test: Text | None = Field(
        default=None,
        description="custom: file or folder of the rows to score; null: what path has",
    )
    config_name: Text | None = Field(
        default=None,
        description="custom: configuration of the hub id, or subfolder of path; null: the only one",
    )
    splits: SplitsSection = section("custom: names of the parts")
    quoting: Quoting | None = Field(
        default=None,
        description="custom: quotation marks in .csv and .tsv enclose fields (csv) or are text "
        "(none); null: found from the rows",
    )
    format: Format | None = Field(
        default=None, description="custom: format of the rows; null: found from their columns"
    )
    columns: ColumnsSection = section("custom: names of the columns")
    labels: Annotated[list[ClassLabel], Field(min_length=2)] | None = Field(
        default=None,
        description="custom: the classes, in the order of the outputs; null: those of the "
        "training rows, sorted",
    )
    template: Text = Field(
        default="alpaca",
        description="custom: prompt of instruction rows; alpaca, chat (the tokenizer's chat "
        "template), plain (instruction and input as lines), or a file with {instruction}, {input} "
        "and {system}",
    )
    chat_template: Text | None = Field(
        default=None,
        description="custom: template of conversations: a file, chatml, or the name of one of the "
        "tokenizer's; null: the tokenizer's own",
    )
    chat_turns: ChatTurns = Field(
        default="all",
        description="custom: learned answers of a conversation; all: every one, or the last where "
        "the template rewrites earlier ones; split: every one, in a row of its own; last: the last",
    )
    merge_system: bool = Field(
        default=False,
        description="custom: write system messages into the first user message, for a template "
        "that refuses them",
    )
    max_length: RowLength = Field(
        default=256, description="maximum tokens per row; longer rows are cut, and counted"
    )
    train_on_inputs: bool = Field(
        default=True,
        description="also compute the loss on the prompt; for custom, false by default",
    )
    max_train_samples: Positive | None = Field(
        default=None, description="maximum number of rows; null: all"
    )
    max_eval_samples: Positive | None = Field(
        default=None, description="maximum rows per task in evaluation during training; null: all"
    )
    held_out: HeldOut = Field(
        default=120,
        description="training rows, or a share of them, held out for validation where the data "
        "has no validation split (commonsense, custom)",
    )
    eval_split: Literal["validation", "held_out"] = Field(
        default="validation",
        description="rows for evaluation during training; validation: the data's own, which are "
        "the scored ones in GLUE; held_out: always training rows (held_out)",
    )

    @property
    def holds_out(self) -> bool:
        """Whether a benchmark's training rows are held out for evaluation during training."""
        tasks = [find_task(self.suite, name, self.format) for name in self.tasks]
        return self.eval_split == "held_out" or not all(task.has_validation for task in tasks)

    @property
    def custom(self) -> bool:
        """Whether the rows are a custom dataset's, not a benchmark's."""
        return self.suite == "custom"

    @property
    def task(self) -> Task:
        """What the first task is, or UNKNOWN; several tasks of one run are of one kind."""
        return find_task(self.suite, self.tasks[0], self.format, self.labels)

    @property
    def kind(self) -> TaskKind:
        """What kind of task the run learns."""
        return self.task.kind

    @property
    def frame(self) -> Frame | None:
        """What surrounds the prompts of a run; None where it generates no text, or not known."""
        frame = self.kind.frame
        return "chat" if frame == "instruction" and self.template == "chat" else frame

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, value: Any) -> Any:
        """Fill in what has another default for a custom dataset."""
        if not isinstance(value, dict) or value.get("suite") != "custom":
            return value
        return {"tasks": [CUSTOM_TASK], "train_on_inputs": False} | value


class TrainSection(Section):
    """The optimization."""

    num_train_epochs: AboveZero = Field(default=3.0, description="passes over the training data")
    max_steps: StepLimit = Field(
        default=-1, description="number of optimizer steps; -1: as many as num_train_epochs gives"
    )
    per_device_train_batch_size: Positive = Field(default=16, description="rows per micro-batch")
    gradient_accumulation_steps: Positive = Field(default=1, description="micro-batches per step")
    optim: Literal["adamw", "adamw_fused", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="adamw_fused: in one kernel, on a GPU; adamw_8bit: moments in 8 bits, by "
        "bitsandbytes; paged_adamw_8bit: and on a GPU, in host memory where the GPU's is short",
    )
    learning_rate: AboveZero = Field(default=3e-4, description="peak learning rate")
    weight_decay: AtLeastZero = Field(default=0.01, description="not for gates, biases and norms")
    adam_beta1: BelowOne = Field(default=0.9, description="decay of the first moment of AdamW")
    adam_beta2: BelowOne = Field(default=0.999, description="decay of the second moment of AdamW")
    adam_epsilon: AboveZero = Field(default=1e-8, description="term in the denominator of AdamW")
    max_grad_norm: AtLeastZero = Field(
        default=1.0, description="clip gradients to this norm; 0: off"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate changes after the warm-up"
    )
    warmup_steps: Count = Field(default=0, description="number of steps of linear warm-up")
    warmup_ratio: Share = Field(default=0.0, description="warm-up as a share of all steps")
    modules: Texts | None = Field(
        default=None,
        description="modules of the model that are trained and saved whole, as a checkpoint's own "
        "classifier; null: those that the checkpoint lacks",
    )
    bf16: bool = Field(default=False, description="base model in bfloat16; the rest stays float32")
    tf32: bool = Field(
        default=True,
        description="on a GPU, products of float32 matrices in TF32: faster, with 10 bits of "
        "mantissa in the factors",
    )
    torch_compile: bool = Field(
        default=False, description="compile the model's layers, which takes minutes at the start"
    )
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = Field(
        default="none",
        description="what the backward pass recomputes; selective: all but matrix products and "
        "attention; full: every layer; offload: as full, with the layers' inputs in host memory; "
        "auto: the fastest that fits",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="if true, another name of activation_checkpointing: full"
    )
    group_by_length: bool | Literal["even"] = Field(
        default=True,
        description="rows of similar length in one batch; even: of all lengths, so that batches "
        "have nearly as many tokens, for packing",
    )
    packing: bool = Field(
        default=False,
        description="lay the rows of a micro-batch end to end instead of padding them; the same "
        "loss and gradients",
    )

    @model_validator(mode="before")
    @classmethod
    def _other_name(cls, value: Any) -> Any:
        """Read `gradient_checkpointing: true` as the key of today, where that is not given too."""
        if isinstance(value, dict) and value.get("gradient_checkpointing") is True:
            return {"activation_checkpointing": "full"} | value
        return value


class EvalSection(Section):
    """When and how the model is scored."""

    per_device_eval_batch_size: Positive | Literal["auto"] = Field(
        default="auto", description="rows per batch; auto: as many as fit in memory"
    )
    eval_strategy: When = Field(default="no", description="when to evaluate during training")
    eval_steps: Positive | None = Field(default=None, description="for eval_strategy: steps")
    metric_for_best_model: Metric | None = Field(
        default=None,
        description="metric that selects the best model; null: the main one of the task",
    )
    early_stopping_patience: Positive | None = Field(
        default=None,
        description="evaluations without improvement before the run stops; null: never",
    )
    protocol: Literal["rank", "generate"] = Field(
        default="rank",
        description="for questions with options: rank the options by likelihood, or generate an "
        "answer",
    )
    too_long: TooLong = Field(
        default="leave_out",
        description="scored rows whose prompt and output have more tokens than the model takes, "
        "leave_out: name and count them, and score the others; refuse: do not begin",
    )
    torch_compile: bool = Field(
        default=False,
        description="compile the generation of answers, which takes minutes at the start",
    )
    before: bool = Field(default=True, description="score the model before training too")
    max_samples: Positive | None = Field(
        default=None, description="maximum rows per task in the final evaluation; null: all"
    )


class OutputSection(Section):
    """What is written, where and when."""

    output_dir: Folder = Field(description="the run folder")
    save_strategy: When = Field(default="steps", description="when to write a checkpoint")
    save_steps: Positive = Field(default=500, description="for save_strategy: steps")
    save_total_limit: Positive | None = Field(
        default=2,
        description="number of checkpoints to keep, the best and the last among them; null: all",
    )
    logging_steps: Positive = Field(default=10, description="steps between lines of metrics")
    report_to: Annotated[
        list[Tracker],
        BeforeValidator(one_or_more, json_schema_input_type=Tracker | list[Tracker]),
    ] = Field(default_factory=list, description="experiment trackers to log to")


class Sections(Section):
    """The sections of a recipe, each valid by itself."""

    seed: Seed = Field(default=42, description="seed of initialization, row order and dropout")
    model: ModelSection = Field(description="the frozen base model")
    method: MethodSection = Field(
        default="moc", validate_default=True, description="what is trained"
    )
    data: DataSection = Field(description="the data for training and evaluation")
    train: TrainSection = section("the optimization")
    eval: EvalSection = section("when and how the model is scored")
    output: OutputSection = Field(description="what is written, where and when")
    launch: LaunchSection = section("the machine, and processes that train together")
