"""Whether the rows to score are those of the training's end, and how many were trained on."""

from collections.abc import Callable, Iterator, Sequence

from moc_cli.data.examples import Example, fingerprint, row_hashes, subset
from moc_cli.data.splits import TaskRows
from moc_cli.errors import RunError
from moc_cli.runs import RunFolder


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


def find_changed(
    run: RunFolder,
    tasks: Sequence[TaskRows],
    max_samples: int | None,
    fitting: Callable[[list[Example]], list[Example]],
) -> Iterator[str]:
    """Yield a sentence for each task whose scored rows are not those of the training's end.

    `max_samples` is the recipe's, by which they were drawn; `fitting` leaves out the rows that are
    too long for the model, as training did.
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
        if recorded["sha256"] == fingerprint(fitting(current)):  # asked last: it tokenizes the rows
            continue
        counts = f"{recorded['rows']:,} rows then, {len(current):,} now"
        if recorded["rows"] == len(current):
            counts = f"{len(current):,} rows as then, but other ones"
        yield f"{task.name}: the rows to score are not those of the training: {counts}"
