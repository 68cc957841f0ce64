"""Whether the rows to score are those of the training's end, and how many were trained on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from moc_cli import processes
from moc_cli.data.examples import Example, fingerprint, row_hashes, subset
from moc_cli.data.splits import TaskRows
from moc_cli.errors import RunError
from moc_cli.kinds import Kind
from moc_cli.methods import TextModel
from moc_cli.report.output import say
from moc_cli.runs import RunFolder
from moc_cli.scoring.results import ScoringOptions
from moc_cli.training.checks import fitting


def count_trained(run: RunFolder, tasks: Sequence[TaskRows]) -> dict[str, int]:
    """Return how many rows to score the run was trained on, by task, where there are any.

    Empty for older runs, which do not name their training rows.
    """
    trained = run.read_trained_rows()
    counts = {
        task.name: sum(row in trained for row in row_hashes(task.examples)) if trained else 0
        for task in tasks
    }
    return {name: count for name, count in counts.items() if count}


def fit(
    kind: Kind, tasks: Sequence[TaskRows], model: TextModel, options: ScoringOptions
) -> list[TaskRows]:
    """Leave out, and name, the rows that are too long for the model; joint.

    Raises DataError where they are refused, and where nothing is left of a task.
    """
    fitted = []
    with processes.current().together():
        for task in tasks:
            network = model.adapted.model
            numbers, notes = fitting(kind, task.examples, model.tokenizer, network, options)
            for note in notes:
                say(f"{task.name}: {note}")
            rows = [task.rows[number] for number in numbers]
            fitted.append(replace(task, rows=rows) if notes else task)
    return fitted


def find_changed(
    run: RunFolder,
    tasks: Sequence[TaskRows],
    max_samples: int | None,
    left: Callable[[list[Example]], list[Example]],
) -> Iterator[str]:
    """Yield a sentence for each task whose scored rows are not those of the training's end.

    `max_samples` is the recipe's, by which they were drawn; `left` leaves out the rows that are too
    long for the model, as training did.
    """
    try:
        parts = run.read_environment().get("data", {})
    except RunError:
        return
    for task in tasks:
        recorded = parts.get(f"test {task.name}")
        current = subset(task.split, max_samples)
        if recorded is None or recorded["sha256"] == fingerprint(current):
            continue
        if recorded["sha256"] == fingerprint(left(current)):  # asked last: it tokenizes the rows
            continue
        counts = f"{recorded['rows']:,} rows then, {len(current):,} now"
        if recorded["rows"] == len(current):
            counts = f"{len(current):,} rows as then, but other ones"
        yield f"{task.name}: the rows to score are not those of the training: {counts}"
