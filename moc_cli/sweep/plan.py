"""The runs of a sweep: their recipes, their folders, and which of them are done."""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moc_cli.errors import MocError, RunError
from moc_cli.evaluation.options import EvalOptions
from moc_cli.recipe.load import finish_recipe, read_draft
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.sweep import Setting, Sweep, check_keys
from moc_cli.results import LOWER_IS_BETTER
from moc_cli.runs import RunFolder
from moc_cli.training.changes import is_finished, trains_the_same

Cell = tuple[Setting, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep. `recipe` is as the sweep has it, with no `--set` of the command line;
    `trained` is with it.

    `changes` are what `moc train` is called with, but for the run folder; `results` is the folder
    that keeps its small files, the run folder itself where the sweep names no other. `evaluations`
    are those that it needs, by the names of their folders; its scores are those of the first one.
    """

    name: str
    cell: Cell
    candidate: Setting | None
    seed: int
    recipe: Recipe
    trained: Recipe
    changes: tuple[str, ...]
    folder: RunFolder
    results: RunFolder
    evaluations: Mapping[str, EvalOptions]

    def is_finished(self) -> bool:
        """Whether the run is trained and each task of its evaluations is scored.

        Raises RunError where its folder holds another one.
        """
        kept = self.trained if self.results.path == self.folder.path else self.recipe
        return is_finished(kept, self.results) and not self.unscored(self.results)

    def unscored(self, folder: RunFolder) -> list[str]:
        """Return the evaluations of a finished run that a folder does not hold whole."""
        if not self.evaluations:
            return []
        scored, tasks = folder.read_evaluations(), folder.read_results()["tasks"]
        missing = []
        for label, options in self.evaluations.items():
            needed = options.harness or options.tasks or tasks
            if label not in scored or not {*needed} <= scored[label]["tasks"].keys():
                missing.append(label)  # one may have been stopped between two tasks
        return missing

    def validation(self) -> tuple[str, float]:
        """Return the metric that chose the run's step, and its best value during training."""
        validation = self.results.read_results().get("validation")
        if validation is None:
            raise RunError(f"{self.results.path} holds no value of its validation rows")
        return str(validation["metric"]), float(validation["value"])


@dataclass
class SweepPlan:
    """All runs that a sweep may need, and the names of those that are `finished`.

    `failed` says by names of runs why they failed; `choices` grows as searches are done.
    """

    sweep: Sweep
    runs: list[PlannedRun]
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    choices: dict[Cell, Setting] = field(default_factory=dict)

    def find_finished(self) -> None:
        """Look which runs are finished; MocError where folders hold runs of other recipes."""
        wrong = []
        for run in self.runs:
            try:
                if run.is_finished():
                    self.finished.add(run.name)
            except MocError as error:
                wrong.append(error.message)
        if wrong:
            raise MocError("\n".join(wrong), "take another folder: --output-dir OTHER")

    def next_runs(self) -> Iterator[PlannedRun]:
        """Yield the runs that can start now and have not failed, in their order.

        Those of later seeds wait until all candidates of their cell are finished on the seeds of
        the search, and only the chosen one has them.
        """
        for run in self.runs:
            if run.name not in self.finished | self.failed.keys() and self.is_needed(run):
                yield run

    def is_needed(self, run: PlannedRun) -> bool:
        """Whether a run is tried, or has the chosen candidate; not if that is not known yet."""
        if run.candidate is None or run.seed in self.tried_seeds():
            return True
        return self.chosen(run.cell) == run.candidate

    def seeds(self) -> list[int]:
        """Return the seeds of every combination, in their order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def tried_seeds(self) -> list[int]:
        """Return the seeds on which all candidates are tried."""
        return self.seeds()[: self.sweep.choose_seeds]

    def tried(self, cell: Cell) -> dict[Setting, list[PlannedRun]]:
        """Return the runs of a cell's search, finished or not, by candidates."""
        seeds, tried = self.tried_seeds(), dict[Setting, list[PlannedRun]]()
        for run in self.runs:
            if run.cell == cell and run.candidate is not None and run.seed in seeds:
                tried.setdefault(run.candidate, []).append(run)
        return tried

    def chosen(self, cell: Cell) -> Setting | None:
        """Return a cell's best candidate; None until all are finished on all seeds of the search.

        One with a run that has failed cannot be the best: a rate may be too high for a method.
        """
        if cell not in self.choices:
            tried = {
                candidate: runs
                for candidate, runs in self.tried(cell).items()
                if not any(run.name in self.failed for run in runs)
            }
            names = {run.name for runs in tried.values() for run in runs}
            if not tried or not names <= self.finished:
                return None
            self.choices[cell] = best_of(tried)
        return self.choices[cell]

    def counting(self, cell: Cell) -> list[PlannedRun]:
        """Return the finished runs of a cell's chosen candidate, by seed."""
        candidate = self.chosen(cell)
        cell_runs = [run for run in self.runs if run.cell == cell and run.name in self.finished]
        return [run for run in cell_runs if run.candidate == candidate]

    def listed(self) -> list[tuple[str, bool]]:
        """Return every run that is needed, in order, and whether it is finished.

        A run of a later seed whose candidate is not chosen yet has `*` in its place.
        """
        names: dict[str, bool] = {}
        for run in self.runs:
            if self.is_needed(run):
                names[run.name] = run.name in self.finished
            elif self.chosen(run.cell) is None:
                names[f"{self._any_candidate(run)}/seed-{run.seed}"] = False
        return list(names.items())

    def done(self) -> int:
        """How many of the runs that the sweep needs are finished."""
        return sum(finished for _, finished in self.listed())

    def total(self) -> int:
        """How many runs the sweep needs: all candidates on the seeds of the search, and the further
        seeds of one.
        """
        seeds, tried = len(self.seeds()), len(self.tried_seeds())
        return len(self.sweep.cells) * (len(self.sweep.candidates) * tried + seeds - tried)

    def _any_candidate(self, run: PlannedRun) -> str:
        parts = [
            "*" if setting == run.candidate else _part(setting)
            for setting in self.sweep.settings(run.cell, run.candidate)
        ]
        return "/".join(parts)


def best_of(tried: Mapping[Setting, Sequence[PlannedRun]]) -> Setting:
    """Return the candidate whose runs have the best mean value on their validation rows.

    The first one of equals; with one candidate there is nothing to look at.
    """
    candidates = list(tried)
    if len(candidates) == 1:
        return candidates[0]
    values = {candidate: [run.validation() for run in runs] for candidate, runs in tried.items()}
    (metric,) = {metric for found in values.values() for metric, _ in found}
    best = min if metric in LOWER_IS_BETTER else max
    return best(candidates, key=lambda one: statistics.fmean(value for _, value in values[one]))


def make_plan(
    sweep: Sweep, changes: Sequence[str], evaluations: Sequence[EvalOptions] = ()
) -> SweepPlan:
    """Return all runs of a sweep, `changes` being the `--set` of the command line.

    `evaluations` are the options of each `moc eval`.

    A row of the table is trained whole before the next one is begun. Small files are kept apart
    only where the changes are of places and of the use of the machine: those are the sweep's own.
    Raises MocError naming every mistake of every run's recipe, before anything is trained.
    """
    runs: list[PlannedRun] = []
    mistakes: dict[str, str] = {}
    settings = {
        (cell, candidate): sweep.settings(cell, candidate)
        for cell in sweep.cells
        for candidate in sweep.candidates
    }
    for values in sweep.groups.values():
        _check_names(values)
    loaded: dict[Cell, Recipe] = {}
    changed: dict[Cell, Recipe] = {}
    varied = [change for chosen in settings.values() for change in _varied(chosen)]
    if refused := list(check_keys([*sweep.common, *varied, *changes])):
        raise MocError("\n".join(refused))
    draft, common = read_draft(sweep.recipe), [*sweep.common, "output.output_dir=run"]
    for chosen in settings.values():
        try:
            loaded[chosen] = changed[chosen] = finish_recipe(draft, common, _varied(chosen))
            if changes:
                changed[chosen] = finish_recipe(draft, [*common, *_varied(chosen), *changes])
        except MocError as error:
            for line in error.message.splitlines():
                mistakes.setdefault(line, _name(chosen))
    if mistakes:
        lines = [f"{line} (first in {name})" for line, name in mistakes.items()]
        raise MocError("\n".join(lines), "moc train RECIPE --dry-run --set ... shows one run")
    if not all(trains_the_same(loaded[chosen], changed[chosen]) for chosen in loaded):
        sweep = replace(sweep, results_dir=None)
    first = next(iter(loaded.values()))
    if sweep.chosen_group is not None and any(
        recipe.eval.eval_strategy == "no" for recipe in changed.values()
    ):
        raise RunError(
            f"'choose: {sweep.chosen_group}' takes the value with the best validation rows, and "
            "eval.eval_strategy is no",
            "set eval.eval_strategy to epoch or steps",
        )
    for seed in sweep.seeds or (first.seed,):
        for (cell, candidate), chosen in settings.items():
            name = f"{_name(chosen)}/seed-{seed}"
            folder = RunFolder(Path(sweep.output_dir) / name)
            output = {"output_dir": str(folder.path)}
            recipe, trained = (
                made[chosen].changed(output=output).model_copy(update={"seed": seed})
                for made in (loaded, changed)
            )
            runs.append(
                PlannedRun(
                    name=name,
                    cell=cell,
                    candidate=candidate,
                    seed=seed,
                    recipe=recipe,
                    trained=trained,
                    changes=(*sweep.common, *_varied(chosen), *changes, f"seed={seed}"),
                    folder=folder,
                    results=RunFolder(Path(sweep.results_dir or sweep.output_dir) / name),
                    evaluations=_by_label(evaluations, trained),
                )
            )
    rows = list(dict.fromkeys(sweep.row(run.cell) for run in runs))
    return SweepPlan(sweep, sorted(runs, key=lambda run: rows.index(sweep.row(run.cell))))


def _check_names(settings: Iterable[Setting]) -> None:
    """Raise MocError where two values of a group would have one folder."""
    names: dict[str, Setting] = {}
    for setting in settings:
        other = names.setdefault(_part(setting), setting)
        if other is not setting:
            raise MocError(
                f"{setting.group}: '{other.name}' and '{setting.name}' would be trained in one "
                f"folder, {_part(setting)}",
                "give each value once, with names that differ in letters, digits or one of _.+-",
            )


def _by_label(evaluations: Sequence[EvalOptions], recipe: Recipe) -> dict[str, EvalOptions]:
    """Return evaluations of a run by the names of their folders; MocError where two share one."""
    labels: dict[str, EvalOptions] = {}
    protocol = recipe.data.kind.protocol(recipe.eval.protocol)
    for options in evaluations:
        label = options.label(protocol, recipe.data)
        if label in labels:
            raise MocError(
                f"eval: two evaluations would be written to eval/{label}",
                "each needs its own protocol or limit",
            )
        labels[label] = options
    return labels


def _varied(settings: Cell) -> list[str]:
    """Return the changes of the recipe that are a run's own."""
    return [change for setting in settings for change in setting.changes]


def _name(settings: Cell) -> str:
    """Return the path of a run below the sweep's folder, but for its seed."""
    return "/".join(_part(setting) for setting in settings)


def _part(setting: Setting) -> str:
    """Return a folder's name: a value alone says too little, but for a text."""
    key = setting.group.rpartition(".")[2]
    is_number = setting.name[:1] in "0123456789.-["
    text = f"{key}-{setting.name}" if is_number else setting.name
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "-"
