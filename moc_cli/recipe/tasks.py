"""The one table of tasks: what each is, where its rows lie, and what it is measured by.

A task of GLUE's shape is one more line in `_GLUE`; a new suite also needs a reader in `data`.
"""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["choice", "classification", "regression", "writing"]
ScoringProtocol = Literal["rank", "generate", "classify", "texts"]
Frame = Literal["commonsense", "instruction", "chat", "raw"]  # what surrounds a prompt

# How tasks of a kind can be scored, the usual way first. The objects are in `moc_cli.kinds`.
PROTOCOLS: dict[Kind, tuple[ScoringProtocol, ...]] = {
    "choice": ("rank", "generate"),
    "classification": ("classify",),
    "regression": ("classify",),
    "writing": ("texts",),
}

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
    """One task of a benchmark.

    `metrics`: the first is the one that tables and model selection use. `hub`: split name ->
    where it lies, for every split that has labels (empty: the rows are inside this package).
    `scored`: the splits whose scores are reported. `columns` and `labels`, the names of the
    classes, are a classifier's; `answers` are the option words that LLM-Adapters looks for in a
    text.
    """

    kind: Kind
    metrics: tuple[str, ...] = ("accuracy",)
    hub: dict[str, HubSplit] = field(default_factory=dict)
    scored: tuple[str, ...] = ("test",)
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier; 1 for a regression."""
        return 1 if self.kind == "regression" else len(self.labels)

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
    return Task("choice", hub=hub, answers=answers)


def _pairs(
    *columns: str,
    labels: tuple[str, ...] = (),
    metrics: tuple[str, ...] = ("accuracy",),
    scored: tuple[str, ...] = ("validation",),
    repo: str = "nyu-mll/glue",
    config: str,
) -> Task:
    hub = {split: HubSplit(repo, (config,), split) for split in ("train", *scored)}
    kind: Kind = "classification" if labels else "regression"
    return Task(kind, metrics, hub, scored, columns, labels)


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
    "builtin": {"world": Task("choice")},
    "custom": {},  # a task of a custom dataset has any name
}


@dataclass(frozen=True)
class Format:
    """A format of a custom dataset: what kind of task it is, its columns, what it is watched by,
    and the frame that its prompts are trained in.
    """

    kind: Kind
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    frame: Frame | None = None


FORMATS: dict[str, Format] = {
    "instruction": Format(
        "writing", ("instruction", "input", "output"), ("perplexity",), "instruction"
    ),
    "chat": Format("writing", ("messages",), ("perplexity",), "chat"),
    "text": Format("writing", ("text",), ("perplexity",), "raw"),
    "classification": Format("classification", ("text", "text_pair", "label"), ("accuracy",)),
    "regression": Format("regression", ("text", "text_pair", "label"), ("pearson", "spearman")),
}


def kind_of(suite: str, task: str, format_name: str | None = None) -> Kind | None:
    """Return what kind of task this is; None for a custom dataset whose format is not known yet."""
    if suite != "custom":
        return TASKS[suite][task].kind
    return None if format_name is None else FORMATS[format_name].kind


def is_classifier(suite: str, task: str, format_name: str | None) -> bool:
    """Return whether a task is learned by a classifier with a fresh head, not a language model."""
    return kind_of(suite, task, format_name) in ("classification", "regression")


def scoring_protocol(
    suite: str, task: str, format_name: str | None, wanted: ScoringProtocol
) -> ScoringProtocol:
    """Return how a task is scored: as `wanted` where its kind leaves a choice."""
    kind = kind_of(suite, task, format_name)
    allowed = PROTOCOLS[kind] if kind else (wanted,)
    return wanted if wanted in allowed else allowed[0]


def generates(protocol: ScoringProtocol, format_name: str | None) -> bool:
    """Return whether a task is scored by texts that the model writes."""
    return protocol == "generate" or format_name == "instruction"


def prompt_frame(suite: str, task: str, format_name: str | None) -> Frame | None:
    """Return the frame that a run's prompts were trained in; None where it generates no text."""
    if suite == "custom":
        return FORMATS[format_name].frame if format_name else None
    return "commonsense" if TASKS[suite][task].kind == "choice" else None


def watched_metrics(suite: str, task: str, format_name: str | None = None) -> tuple[str, ...]:
    """Return what `metric_for_best_model` may be, the main one first; all while it is unknown."""
    if suite != "custom":
        known = TASKS[suite][task].metrics if task in TASKS[suite] else ("accuracy",)
        return (*known, "loss")
    if format_name is None:
        return ("accuracy", "pearson", "spearman", "perplexity", "loss")
    return (*FORMATS[format_name].metrics, "loss")


def is_benchmark_task(task: str) -> bool:
    """Return whether some benchmark has a task of this name."""
    return any(task in tasks for tasks in TASKS.values())
