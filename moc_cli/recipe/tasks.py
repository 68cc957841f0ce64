"""The one table of tasks: what each is, where its rows lie, and what it is measured by.

A task of GLUE's shape is one more line in `_GLUE`; a new suite also needs a reader in `data`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Suite = Literal["commonsense", "glue", "builtin", "custom"]
Format = Literal["instruction", "chat", "text", "classification", "regression"]
ScoringProtocol = Literal["rank", "generate", "classify", "texts"]
TooLong = Literal["refuse", "leave_out"]  # rows to score that the model cannot take
HeadName = Literal["causal", "classification"]  # as adapter folders name it
Frame = Literal["commonsense", "instruction", "chat", "raw"]  # what surrounds a prompt


@dataclass(frozen=True)
class ModelHead:
    """What a model is loaded as: transformers' class, peft's and the hub's names for its tasks, and
    the side on which its rows are padded.
    """

    name: HeadName
    auto_class: str
    task_type: str
    pipeline_tag: str
    side: Literal["left", "right"]


LANGUAGE = ModelHead("causal", "AutoModelForCausalLM", "CAUSAL_LM", "text-generation", "left")
CLASSIFIER = ModelHead(
    "classification",
    "AutoModelForSequenceClassification",
    "SEQ_CLS",
    "text-classification",
    "right",
)
HEADS: dict[HeadName, ModelHead] = {head.name: head for head in (LANGUAGE, CLASSIFIER)}


@dataclass(frozen=True)
class TaskKind:
    """What is said of a kind of task without torch; what it does is in `moc_cli.kinds`.

    `protocols`: how it can be scored, the usual way first; the model writes in those that are
    `generating`. `head`: the model's (None: not known). `prompted`: whether its rows have a prompt
    that need not be learned. `joint`: whether one run can train several such tasks. `frame`: what
    surrounds its prompts, if it has some.
    """

    name: str
    protocols: tuple[ScoringProtocol, ...]
    generating: tuple[ScoringProtocol, ...] = ()
    head: ModelHead | None = LANGUAGE
    prompted: bool = True
    joint: bool = False
    frame: Frame | None = None

    @property
    def classifier(self) -> bool:
        """Whether a fresh head learns it, not a language model; False while it is not known."""
        return self.head not in (None, LANGUAGE)

    def protocol(self, preferred: ScoringProtocol) -> ScoringProtocol:
        """Return how it is scored: as `preferred` where the kind leaves a choice."""
        return preferred if preferred in self.protocols else self.protocols[0]

    def generates(self, preferred: ScoringProtocol) -> bool:
        """Return whether it is scored by texts that the model writes."""
        return self.protocol(preferred) in self.generating


CHOICE = TaskKind("choice", ("rank", "generate"), ("generate",), joint=True, frame="commonsense")
CLASSIFICATION = TaskKind("classification", ("classify",), head=CLASSIFIER, prompted=False)
REGRESSION = replace(CLASSIFICATION, name="regression")
INSTRUCTION = TaskKind("instruction", ("texts",), ("texts",), frame="instruction")
CHAT = TaskKind("chat", ("texts",), frame="chat")
TEXT = TaskKind("text", ("texts",), prompted=False, frame="raw")

BUILTIN_MODELS = ("world-llama",)
CUSTOM_TASK = "custom"  # the name of a custom dataset's task where none is given
PARQUET = "refs/convert/parquet"  # for sets whose main branch is a script, which is run no more


@dataclass(frozen=True)
class HubSplit:
    """Where one split lies on the hub; several configs are read one after another."""

    repo: str
    configs: tuple[str | None, ...]
    split: str
    revision: str | None = None


@dataclass(frozen=True)
class Task:
    """One task of a benchmark, or of a custom dataset in one of its formats.

    `metrics`: the first is the one that tables and model selection use. `hub`: split name ->
    where it lies, for every split that has labels (empty: the rows are inside this package).
    `no_split`: why a usual split is not among them. `scored`: the splits whose scores are reported.
    `columns` and `labels`, the names of the classes, are a classifier's; `answers` are the option
    words that LLM-Adapters looks for in a text.
    """

    kind: TaskKind
    metrics: tuple[str, ...] = ("accuracy",)
    hub: dict[str, HubSplit] = field(default_factory=dict)
    no_split: dict[str, str] = field(default_factory=dict)
    scored: tuple[str, ...] = ("test",)
    columns: tuple[str, ...] = ()
    labels: tuple[str | int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier; 1 for a regression, 0 while its classes are not known."""
        return 1 if self.kind is REGRESSION else len(self.labels)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have labels."""
        return tuple(self.hub) or ("train", "validation", "test")

    @property
    def has_validation(self) -> bool:
        """Whether rows to watch have a split of their own; else training rows are held out."""
        return any(split.startswith("validation") for split in self.splits)


def _choice(
    answers: tuple[str, ...],
    repo: str,
    config: str | None,
    test: str,
    *,
    train_configs: tuple[str, ...] = (),
    revision: str | None = None,
) -> Task:
    hub = {
        "train": HubSplit(repo, train_configs or (config,), "train", revision),
        "test": HubSplit(repo, (config,), test, revision),
    }
    no_split = {"validation": "rows are held out from train instead"}
    return Task(CHOICE, hub=hub, no_split=no_split, answers=answers)


def _pairs(
    *columns: str,
    labels: tuple[str, ...] = (),
    metrics: tuple[str, ...] = ("accuracy",),
    scored: tuple[str, ...] = ("validation",),
    repo: str = "nyu-mll/glue",
    config: str,
) -> Task:
    hub = {split: HubSplit(repo, (config,), split) for split in ("train", *scored)}
    no_split = {"test": "its labels are hidden; validation is scored instead"}
    kind = CLASSIFICATION if labels else REGRESSION
    return Task(kind, metrics, hub, no_split, scored, columns, labels)


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number}" for number in range(1, count + 1))


_ANSWERS = _numbered("answer", 5)
_WINOGRANDE_SIZES = tuple(f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased"))
_COMMONSENSE = {
    "boolq": _choice(("true", "false"), "google/boolq", None, "validation"),
    "piqa": _choice(_numbered("solution", 2), "ybisk/piqa", None, "validation", revision=PARQUET),
    "social_i_qa": _choice(_ANSWERS, "allenai/social_i_qa", None, "validation", revision=PARQUET),
    "hellaswag": _choice(_numbered("ending", 4), "Rowan/hellaswag", None, "validation"),
    "winogrande": _choice(
        _numbered("option", 2),
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        train_configs=_WINOGRANDE_SIZES,
    ),
    "ARC-Easy": _choice(_ANSWERS, "allenai/ai2_arc", "ARC-Easy", "test"),
    "ARC-Challenge": _choice(_ANSWERS, "allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": _choice(_ANSWERS, "allenai/openbookqa", "main", "test"),
}

_TWO = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_GLUE = {
    "cola": _pairs(
        "sentence", config="cola", labels=("unacceptable", "acceptable"), metrics=("matthews",)
    ),
    "sst2": _pairs("sentence", config="sst2", labels=("negative", "positive")),
    "mrpc": _pairs(
        *_TWO, config="mrpc", labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1")
    ),
    "qqp": _pairs(
        "question1",
        "question2",
        config="qqp",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": _pairs(*_TWO, config="stsb", metrics=("pearson", "spearman")),
    "mnli": _pairs(
        "premise",
        "hypothesis",
        config="mnli",
        labels=("entailment", "neutral", "contradiction"),
        scored=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _pairs("question", "sentence", config="qnli", labels=_ENTAILMENT),
    "rte": _pairs(*_TWO, config="rte", labels=_ENTAILMENT),
    "wnli": _pairs(*_TWO, config="wnli", labels=("not_entailment", "entailment")),
}

TASKS: dict[str, dict[str, Task]] = {
    "commonsense": _COMMONSENSE,
    "glue": _GLUE,
    "builtin": {"world": Task(CHOICE)},
    "custom": {},  # a task of a custom dataset has any name
}


# What a custom dataset is in each of its formats, and the columns that it reads then.
FORMATS: dict[Format, Task] = {
    "instruction": Task(INSTRUCTION, ("perplexity",), columns=("instruction", "input", "output")),
    "chat": Task(CHAT, ("perplexity",), columns=("messages",)),
    "text": Task(TEXT, ("perplexity",), columns=("text",)),
    "classification": Task(CLASSIFICATION, columns=("text", "text_pair", "label")),
    "regression": Task(REGRESSION, ("pearson", "spearman"), columns=("text", "text_pair", "label")),
}
# What a custom dataset is before its rows are read: everything is possible.
_ANY: tuple[ScoringProtocol, ...] = ("rank", "generate", "classify", "texts")
UNKNOWN = Task(
    TaskKind("unknown", _ANY, _ANY, head=None),
    ("accuracy", "pearson", "spearman", "perplexity"),
)


def find_task(
    suite: str, name: str, format_name: Format | None, labels: Sequence[str | int] | None = None
) -> Task:
    """Return what a task is: UNKNOWN for a name that the suite lacks, and for a custom dataset
    whose format is not known yet; `labels` are the classes of a custom dataset.
    """
    if suite != "custom":
        return TASKS[suite].get(name, UNKNOWN)
    if format_name is None:
        return UNKNOWN
    return replace(FORMATS[format_name], labels=tuple(labels or ()))


def is_packaged(suite: str) -> bool:
    """Return whether the rows of a suite are inside this package."""
    tasks = TASKS[suite].values()
    return bool(tasks) and not any(task.hub for task in tasks)


def is_benchmark_task(task: str) -> bool:
    """Return whether some benchmark has a task of this name."""
    return any(task in tasks for tasks in TASKS.values())
