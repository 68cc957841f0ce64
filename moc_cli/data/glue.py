"""The nine GLUE tasks: columns, labels, metrics and splits, and rows to examples."""

from dataclasses import dataclass

from moc_cli.data.examples import PairExample
from moc_cli.data.source import BadRow, Fields, HubSplit, take

REPO = "nyu-mll/glue"
HIGHEST_SCORE = 5.0  # of a pair in STS-B


@dataclass(frozen=True)
class PairTask:
    """A task: its text columns, its classes (1: a regression), its metrics (the first is the one
    that tables and model selection use) and the splits that are scored.
    """

    columns: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)

    @property
    def regression(self) -> bool:
        """Whether the label is a score."""
        return self.num_labels == 1


TASKS: dict[str, PairTask] = {
    "cola": PairTask(("sentence",), 2, ("matthews",)),
    "sst2": PairTask(("sentence",), 2, ("accuracy",)),
    "mrpc": PairTask(("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "stsb": PairTask(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "qqp": PairTask(("question1", "question2"), 2, ("accuracy", "f1")),
    "mnli": PairTask(
        ("premise", "hypothesis"),
        3,
        ("accuracy",),
        ("validation_matched", "validation_mismatched"),
    ),
    "qnli": PairTask(("question", "sentence"), 2, ("accuracy",)),
    "rte": PairTask(("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": PairTask(("sentence1", "sentence2"), 2, ("accuracy",)),
}


def hub_split(task: str, split: str) -> HubSplit:
    """Where a split of a task lies on the hub."""
    return HubSplit(REPO, (task,), split)


def from_row(task: str, row: Fields) -> PairExample:
    """The example of a row in the hub's columns; raises BadRow."""
    kind = TASKS[task]
    texts = [take(row, column, str) for column in kind.columns]
    second = texts[1] if len(texts) == 2 else None
    return PairExample(task, texts[0], second, _label(kind, row))


def _label(kind: PairTask, row: Fields) -> int | float:
    if kind.regression:
        score = row.get("label")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise BadRow(f"'label' is {score!r}, not a number")
        if not 0 <= score <= HIGHEST_SCORE:
            raise BadRow(f"'label' is {score}, not a score from 0 to 5")
        return float(score)
    label = take(row, "label", int)
    if label == -1:
        raise BadRow("'label' is -1: this split's labels are hidden")
    if not 0 <= label < kind.num_labels:
        raise BadRow(f"'label' is {label}, not one of 0 to {kind.num_labels - 1}")
    return label
