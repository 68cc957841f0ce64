"""Rows through the adapted model, under a recorder of what its gates do."""

from collections.abc import Sequence
from dataclasses import dataclass

from moc_cli.data.encode import Row
from moc_cli.data.splits import TaskRows
from moc_cli.load_run import LoadedRun
from moc_cli.methods.route_counts import Record
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.batch_size import BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.forward import Limits, Progress, evaluating


@dataclass(frozen=True)
class RunRecord:
    """What the gates of one run did on each task, and on all of them together."""

    tasks: dict[str, Record]
    total: Record


def record(
    trained: LoadedRun,
    prompts: Sequence[Row],
    *,
    batch_size: BatchSizeOption,
    on_progress: Progress | None = None,
) -> Record:
    """Record what the gates do on prompts: each row decides once at every site."""
    model = trained.adapted.model
    rows = [row["input_ids"] for row in prompts]
    Limits.of(model).check(rows, "a prompt")
    costs = [RowCost(len(ids), copies=0) for ids in rows]
    recorder = trained.adapted.recorder()
    assert recorder is not None
    with evaluating(model) as device, recorder:

        def work(items: list[int]) -> list[None]:
            trained.kind.forward(trained, [prompts[item] for item in items], device)
            return [None] * len(items)

        run_batches(trained.adapted, costs, work, size=batch_size, on_progress=on_progress)
    return recorder.record()


def record_tasks(
    trained: LoadedRun, tasks: Sequence[TaskRows], *, batch_size: BatchSizeOption
) -> RunRecord:
    """Record what the gates do on the prompts of each task."""
    records: dict[str, Record] = {}
    for task in tasks:
        rows = trained.kind.voters(task.examples, trained.tokenizer, trained.recipe.data.max_length)
        with WorkProgress(f"route {task.name}", len(task.examples)) as bar:
            records[task.name] = record(
                trained, rows, batch_size=batch_size, on_progress=bar.observe
            )
    first, *other_records = records.values()
    return RunRecord(records, sum(other_records, first))
