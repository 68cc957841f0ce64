"""`moc inspect-routing`: from a run folder to routing.json.

options -> checked against the run's files -> rows -> model -> record, compare, ablate -> write

Several processes share the batches; all read the run and the rows, and the first one writes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc_cli.data.splits import TaskRows, read_scored
from moc_cli.errors import MocError, RunError
from moc_cli.inspection import statistics
from moc_cli.inspection.ablation import ablate
from moc_cli.inspection.distances import check_same_sites, compared, task_distances
from moc_cli.inspection.record import RunRecord, record, record_tasks
from moc_cli.inspection.tokens import text_votes
from moc_cli.inspection.warnings import find_warnings
from moc_cli.load_run import LoadedRun, open_run, saved_shapes
from moc_cli.methods.route_counts import Layout
from moc_cli.recipe.methods import MocMethod
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import choices
from moc_cli.report.progress import WorkProgress
from moc_cli.runs import BaseOptions, RunFolder
from moc_cli.scoring.batch_size import BatchSizeOption
from moc_cli.training import build
from moc_cli.training.accelerator import join_launched
from moc_cli.training.checks import fit

FORMAT = 1
KEY = re.compile(r"(controls\.[0-9]{1,9}|gates)\.[a-z]+\.|modules\.")


@dataclass(frozen=True)
class InspectOptions:
    """The options of the command; None: as in the run's recipe, which is that of `run`."""

    run: Path
    recipe: Recipe
    tasks: list[str]
    split: str | None = None
    limit: int | None = 100
    text: str | None = None
    site: str | None = None
    compare: Path | None = None
    compare_recipe: Recipe | None = None
    ablate: bool = False
    batch_size: int | None = None
    device: str | None = None
    base_options: BaseOptions = BaseOptions()

    @property
    def rows_per_batch(self) -> BatchSizeOption:
        """The batch size that was typed, or the recipe's."""
        return self.batch_size or self.recipe.eval.per_device_eval_batch_size

    @property
    def method(self) -> MocMethod:
        """The recipe's method; the command refuses runs of the others."""
        assert isinstance(self.recipe.method, MocMethod)
        return self.recipe.method


def inspect(options: InspectOptions) -> dict[str, Any]:
    """Record the gates of a run, and return what routing.json holds; joint.

    All that can be wrong is found before weights are loaded.
    """
    update = {} if options.device is None else {"device": options.device}
    processes = join_launched(options.recipe.launch.model_copy(update=update))
    with processes.together(), processes.main_first():
        layout = read_layout(options.run, options.method)
        trained_with = history(RunFolder.open(options.run))
        if options.compare is not None:
            other_layout = read_layout(options.compare, options.method)
            check_same_sites(layout, other_layout, str(options.compare))
        tasks = _read_rows(options, layout)

    def load(run: Path, recipe: Recipe | None) -> LoadedRun:
        with processes.together():
            return open_run(run, device=options.device, recipe=recipe, base=options.base_options)

    trained = load(options.run, options.recipe)
    tasks = fit(trained.kind, tasks, trained, build.make_scoring_options(options.recipe))
    records, tokens = _record(options, trained, tasks)
    routing = _describe(options, trained, records) | {"history": trained_with, "tokens": tokens}
    if options.ablate:
        examples = [example for task in tasks for example in task.examples]
        size = options.rows_per_batch
        with WorkProgress("ablate sites", len(layout.names)) as bar:
            losses = ablate(trained, examples, batch_size=size, on_progress=bar.observe)
        routing["ablation"] = losses
    if options.compare is not None:
        other_record, _ = _record(options, load(options.compare, options.compare_recipe), tasks)
        routing["compare"] = compared(str(options.compare), records.total, other_record.total)
    return routing


def _read_rows(options: InspectOptions, layout: Layout) -> list[TaskRows]:
    """Read the rows to route; none where a text is given. Raises MocError for wrong options."""
    if options.site is not None and options.site not in layout.names:
        raise MocError(f"--site: no site '{options.site}'{choices(options.site, layout.names)}")
    data = options.recipe.data
    names = options.tasks or list(data.tasks)
    if len(set(names)) < len(names):
        raise MocError("--tasks: a task is named twice")
    if options.text is None:
        return read_scored(data, names, split=options.split, limit=options.limit)
    if not options.text.strip():
        raise MocError("--text is empty", "give a text, or leave it out to look at rows")
    if options.tasks or options.split or options.ablate:
        raise MocError(
            "--text looks at one text, without an answer: --tasks, --split and --ablate need rows",
            "leave out --text or the others",
        )
    return []


def _record(
    options: InspectOptions, trained: LoadedRun, tasks: Sequence[TaskRows]
) -> tuple[RunRecord, dict[str, Any] | None]:
    """Return what the gates of a run do, and of a text each token's votes."""
    if options.text is None:
        return record_tasks(trained, tasks, batch_size=options.rows_per_batch), None
    prompts, tokens = text_votes(trained, options.text)
    return RunRecord({}, record(trained, prompts, batch_size=1)), tokens


def _describe(options: InspectOptions, trained: LoadedRun, records: RunRecord) -> dict[str, Any]:
    """Return all of routing.json that follows from the records."""
    mixture, method = trained.adapted.mixture, options.method
    assert mixture is not None
    level = "token" if method.routing.level == "token" else "sample"
    on_rows = options.text is None
    routing: dict[str, Any] = {
        "format": FORMAT,
        "run": trained.name,
        "model": trained.adapter_config["base_model_name_or_path"],
        "method": method.model_dump(mode="json"),
        "step": trained.adapter_config.get("step"),
        "split": (options.split or "scored") if on_rows else None,
        "limit": options.limit if on_rows else None,
        "text": options.text,
        "sites": statistics.sites(mixture),
        "level": level,
        **statistics.matrices(records.total),
        "tasks": {name: statistics.matrices(record) for name, record in records.tasks.items()},
        "per_site": statistics.per_site(records.total, level),
        "per_control": statistics.per_control(records.total, mixture, method.scale),
        "summary": statistics.summary(records.total, mixture),
        "history": None,
        "task_distance": task_distances(records.tasks),
        "compare": None,
        "ablation": None,
        "tokens": None,
    }
    return routing | {"warnings": find_warnings(routing, method)}


def history(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the use of controls over training steps; [] where the run did not record it.

    Raises RunError where a line holds something else.
    """
    entries: list[dict[str, Any]] = []
    for line in folder.read_metrics():
        if "routing" in line:
            try:
                use = [float(share) for share in line["routing"]["use"]]
                local = float(line["routing"]["local_share"])
                entries.append({"step": int(line["step"]), "use": use, "local_share": local})
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(f"{folder.metrics}: a line's 'routing' is damaged") from error
    if len({len(entry["use"]) for entry in entries}) > 1:
        raise RunError(f"{folder.metrics}: its lines have different numbers of controls")
    return entries


def read_layout(run: Path, method: MocMethod) -> Layout:
    """Return a run's sites and pools, from its files alone."""
    folder = RunFolder.open(run)
    shapes = saved_shapes(folder)
    odd = [name[:80] for name in shapes if not KEY.match(name)]
    if odd:
        source = folder.checkpoint or folder.controls
        raise RunError(f"{source}: '{odd[0]}' is not a tensor of method moc")
    return layout_of_controls(set(shapes), method.top_k)


def layout_of_controls(keys: set[str], top_k: int) -> Layout:
    """Return the sites and pools that an adapter file's keys name."""
    places = {tuple(key.split(".")[1:3]) for key in keys if key.startswith("controls.")}
    order = sorted(places, key=lambda place: (int(place[0]), place[1]))
    gates = sorted({key.split(".")[1] for key in keys if key.startswith("gates.")})
    pool_of = tuple(gates[0] if len(gates) == 1 else block for _, block in order)
    pools = {
        pool: [i for i, site_pool in enumerate(pool_of) if site_pool == pool] for pool in gates
    }
    return Layout(tuple(".".join(place) for place in order), pool_of, pools, top_k)
