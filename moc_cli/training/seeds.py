"""`moc train --seeds N`: one run for each of N seeds, and what they come to together.

    OUTPUT_DIR/seed-42/   a run folder, as `moc train --set seed=42` would have made it
    OUTPUT_DIR/seed-43/   ...
    OUTPUT_DIR/seeds.json every seed's scores, mean, spread, and which run is the median

Seeds are the recipe's, and the next ones. The model is loaded anew for each. An untrained language
model is the same whatever the seed, so it is scored only once, in the first run.
"""

import gc
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc_cli.errors import RunError
from moc_cli.files import write_json_atomic
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.tasks import is_classifier, kind_of
from moc_cli.runs import Call, RunFolder
from moc_cli.training.interrupt import Interrupted
from moc_cli.training.resume import check_recipe
from moc_cli.training.session import Session

LAST_SEED = 2**32 - 1
SUMMARY = "seeds.json"
LENGTH = ("max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Seeded:
    """The recipe of one seed; its run folder is the recipe's output.output_dir."""

    seed: int
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.recipe.output.output_dir)


def plan(recipe: Recipe, count: int) -> list[Seeded]:
    """Return the recipes of `count` seeds from the recipe's own on; RunError past the last seed."""
    if recipe.seed + count - 1 > LAST_SEED:
        raise RunError(
            f"{count} seeds from {recipe.seed} on end beyond the last one, {LAST_SEED}",
            "start lower: --set seed=0",
        )
    found = []
    for seed in range(recipe.seed, recipe.seed + count):
        folder = Path(recipe.output.output_dir) / f"seed-{seed}"
        before = recipe.eval.before and (seed == recipe.seed or _has_head(recipe))
        changes = {
            "seed": seed,
            "output": recipe.output.model_copy(update={"output_dir": str(folder)}),
            "eval": recipe.eval.model_copy(update={"before": before}),
        }
        found.append(Seeded(seed, recipe.model_copy(update=changes)))
    return found


def train_seeds(
    recipe: Recipe,
    count: int,
    *,
    call: Call,
    say: Callable[[str], None],
    silent: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train every seed that is not finished, and return what seeds.json holds.

    seeds.json is written after every seed, so that a stop loses none. Raises RunError, before
    anything is trained, where a folder is taken and neither `resume` nor `overwrite` was asked for;
    Interrupted after a signal, with the command that goes on.
    """
    seeds = plan(recipe, count)
    home = Path(recipe.output.output_dir)
    _check_folders(home, seeds, call, resume=resume, overwrite=overwrite)
    tell: Callable[[str], None] = (lambda text: None) if silent else say
    done: list[Seeded] = []
    for one in seeds:
        try:
            if resume and _is_finished(one):
                tell(f"seed {one.seed}: finished before, in {one.folder.path}")
            else:
                tell(f"seed {one.seed} ({len(done) + 1} of {count}), in {one.folder.path}")
                going_on = "auto" if resume and one.folder.recipe_file.is_file() else None
                session = Session(one.recipe, call=call, say=say, silent=silent)
                session.run(resume=going_on, overwrite=overwrite)
                del session  # before the next model is loaded
                gc.collect()
        except KeyboardInterrupt:
            again = f"continue with: {call.command} --resume auto"
            raise Interrupted(signal.SIGINT, f"stopped at seed {one.seed}", again) from None
        done.append(one)
        found = summarize(done)
        status = "finished" if len(done) == count else "running"
        write_json_atomic(home / SUMMARY, {"status": status} | found)
    return {"status": "finished"} | found


def summarize(seeds: Sequence[Seeded]) -> dict[str, Any]:
    """Return every finished seed's scores, their mean and standard deviation, and the median run.

    Deviations are of a sample (n - 1), None for one seed. The median run is the middle one by the
    task's main metric, of several tasks by the average of theirs; of an even number the lower
    middle one, so that it is always a run that there is.
    """
    results = [one.folder.read_results() for one in seeds]
    runs = [
        {
            "seed": one.seed,
            "path": str(one.folder.path),
            "average": found["average"],
            "tasks": {task: _values(entry, "value") for task, entry in found["tasks"].items()},
            "seconds": found["seconds"],
        }
        for one, found in zip(seeds, results, strict=True)
    ]
    main = {task: entry["metric"] for task, entry in results[0]["tasks"].items()}
    before = {task: _values(entry, "before") for task, entry in results[0]["tasks"].items()}
    worse_first = sorted(
        runs, key=lambda run: run["average"], reverse=set(main.values()) == {"perplexity"}
    )
    middle = worse_first[(len(runs) - 1) // 2]
    bases = [before[task][metric] for task, metric in main.items()]
    known = [value for value in bases if value is not None]
    tasks = {
        task: {
            metric: _spread([run["tasks"][task][metric] for run in runs], before[task][metric])
            for metric in metrics
        }
        for task, metrics in before.items()
    }
    base = sum(known) / len(known) if len(known) == len(bases) else None
    return {
        "seeds": runs,
        "tasks": tasks,
        "average": _spread([run["average"] for run in runs], base),
        "median": {
            "seed": middle["seed"],
            "path": middle["path"],
            "value": middle["average"],
            "by": next(iter(main.values())) if len(main) == 1 else "average",
        },
    }


def _values(entry: dict[str, Any], key: str) -> dict[str, float | None]:
    return {name: score[key] for name, score in entry["metrics"].items()}


def _spread(values: Sequence[float], before: float | None) -> dict[str, float | None]:
    """Mean, standard deviation and lower median of a metric's values; the untrained model's."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median_low(values),
        "before": before,
    }


def _has_head(recipe: Recipe) -> bool:
    """Whether a fresh head is drawn from the seed, so that untrained models differ by seed."""
    data = recipe.data
    kind = kind_of(data.suite, data.tasks[0], data.format)
    return kind is None or is_classifier(data.suite, data.tasks[0], data.format)


def _is_finished(one: Seeded) -> bool:
    """Whether the seed's run is done as this recipe has it; a longer one is to be continued."""
    if not (one.folder.path / "results.json").is_file():
        return False
    if one.folder.read_results().get("status") != "finished":
        return False
    known = load_recipe(one.folder.recipe_file).model_dump(mode="json")
    asked = one.recipe.model_dump(mode="json")
    for key, value in asked["data"].items():
        if value is None:  # one's own rows have told it
            asked["data"][key] = known["data"][key]
    check_recipe(known, asked)
    return all(known["train"][key] == asked["train"][key] for key in LENGTH)


def _check_folders(
    home: Path, seeds: Sequence[Seeded], call: Call, *, resume: bool, overwrite: bool
) -> None:
    """Refuse at once what the third seed would otherwise be stopped by."""
    if (home / "recipe.yaml").is_file():
        raise RunError(
            f"{home} holds a single run, and seeds would be mixed with it",
            f"choose another folder: {call.base} --output-dir OTHER",
        )
    taken = [one.folder.path for one in seeds if _holds_files(one.folder.path)]
    if taken and not resume and not overwrite:
        raise RunError(
            f"{', '.join(map(str, taken))}: not empty",
            f"{call.command} --resume auto   # continue these seeds\n"
            f"      {call.command} --overwrite   # replace them\n"
            f"      {call.base} --output-dir OTHER   # leave them alone",
        )
    if resume:
        for one in seeds:
            if one.folder.recipe_file.is_file():
                _is_finished(one)


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
