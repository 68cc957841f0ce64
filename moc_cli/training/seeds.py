"""`moc train --seeds N`: one run for each of N seeds, and their scores together.

    OUTPUT_DIR/seed-42/   a run folder, as `moc train --set seed=42` would have made it
    OUTPUT_DIR/seed-43/   ...
    OUTPUT_DIR/seeds.json every seed's scores, mean, spread, and which run is the median

Seeds are the recipe's, and the next ones. The model is loaded again for each. An untrained language
model is the same whatever the seed, so it is scored only once, in the first run. An untrained
classifier has another head with each seed: `before` is the mean of its scores.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moc_cli.errors import MocError, RunError
from moc_cli.files import write_json_atomic
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.tasks import LANGUAGE
from moc_cli.recipe.types import LAST_SEED
from moc_cli.results import LOWER_IS_BETTER
from moc_cli.runs import RunFolder
from moc_cli.signals import stop_number
from moc_cli.training.accelerator import join_launched
from moc_cli.training.build import read_rows
from moc_cli.training.changes import is_finished
from moc_cli.training.interrupt import Interrupted
from moc_cli.training.prepare import Forecast
from moc_cli.training.session import Session, TrainOptions

SUMMARY = "seeds.json"


def folder_of(recipe: Recipe) -> RunFolder:
    """Return the run folder of a recipe."""
    return RunFolder(recipe.output.output_dir)


def plan(recipe: Recipe, count: int) -> list[Recipe]:
    """Return the recipes of `count` seeds from the recipe's own on; RunError past the last seed."""
    if recipe.seed + count - 1 > LAST_SEED:
        raise RunError(
            f"{count} seeds from {recipe.seed} on end beyond the last one, {LAST_SEED}",
            "start lower: --set seed=0",
        )
    draws_head = recipe.data.kind.head is not LANGUAGE  # None: only the rows say it
    seeds = []
    for seed in range(recipe.seed, recipe.seed + count):
        folder = Path(recipe.output.output_dir) / f"seed-{seed}"
        before = recipe.eval.before and (seed == recipe.seed or draws_head)
        seed_recipe = recipe.changed(output={"output_dir": str(folder)}, eval={"before": before})
        seeds.append(seed_recipe.model_copy(update={"seed": seed}))
    return seeds


def train_seeds(
    recipe: Recipe,
    count: int,
    options: TrainOptions,
    say: Callable[[str], None],
    forecast: Forecast | None = None,
) -> dict[str, Any]:
    """Train every seed that is not finished, in a session of its own; return what seeds.json holds.

    seeds.json is written after every seed, so that a stop loses none. Raises RunError, before
    anything is trained, where a folder is taken and the options neither resume nor overwrite;
    MocError where no rows are scored; Interrupted after a signal, with the command that goes on.
    """
    seeds = plan(recipe, count)
    home = Path(recipe.output.output_dir)
    on_main = join_launched(recipe.launch).on_main
    on_main(lambda: _check_folders(home, seeds, options))
    on_main(lambda: _check_rows(recipe))
    done: list[Recipe] = []
    summary: dict[str, Any] = {}
    for run in seeds:
        folder = folder_of(run)
        try:
            if options.resume and on_main(partial(is_finished, run, folder)):
                say(f"seed {run.seed}: finished before, in {folder.path}")
            else:
                say(f"seed {run.seed} ({len(done) + 1} of {count}), in {folder.path}")
                begun = on_main(folder.recipe_file.is_file)
                seed_options = options if begun else replace(options, resume=None)
                Session(run, seed_options, say, forecast).run()
                gc.collect()  # before the next model is loaded
        except KeyboardInterrupt as stop:
            hint = f"continue with: {options.call.command} --resume auto"
            raise Interrupted(stop_number(stop), f"stopped at seed {run.seed}", hint) from None
        done.append(run)
        status = "finished" if len(done) == count else "running"
        summary = on_main(partial(_write_summary, home, done, status))
    return summary


def _write_summary(home: Path, done: Sequence[Recipe], status: str) -> dict[str, Any]:
    """Write seeds.json, and return what it holds."""
    summary = {"status": status} | summarize_seeds(done)
    write_json_atomic(home / SUMMARY, summary)
    return summary


def summarize_seeds(seeds: Sequence[Recipe]) -> dict[str, Any]:
    """Return every finished seed's scores, their mean and standard deviation, and the median run.

    Deviations are of a sample (n - 1), None for one seed. The median run is the middle one by the
    task's main metric, of several tasks by the average of theirs; of an even number the lower
    middle one, so that it is always an existing run. `before` is the mean of the values that are
    known, None where none is.
    """
    results = [folder_of(run).read_results() for run in seeds]
    runs = [
        {
            "seed": run.seed,
            "path": str(folder_of(run).path),
            "average": result["average"],
            "tasks": {task: _values(entry, "value") for task, entry in result["tasks"].items()},
            "seconds": result["seconds"],
        }
        for run, result in zip(seeds, results, strict=True)
    ]
    first = results[0]["tasks"]
    before = {
        task: {
            metric: _mean_known(
                run["tasks"][task]["metrics"][metric].get("before") for run in results
            )
            for metric in entry["metrics"]
        }
        for task, entry in first.items()
    }
    main = {task: entry["metric"] for task, entry in first.items()}
    worse_first = sorted(
        runs,
        key=lambda run: run["average"],
        reverse=all(metric in LOWER_IS_BETTER for metric in main.values()),
    )
    median = worse_first[(len(runs) - 1) // 2]
    main_before = [before[task][metric] for task, metric in main.items()]
    known_values = [value for value in main_before if value is not None]
    return {
        "seeds": runs,
        "tasks": {
            task: {
                metric: _spread([run["tasks"][task][metric] for run in runs], value)
                for metric, value in metrics.items()
            }
            for task, metrics in before.items()
        },
        "average": _spread(
            [run["average"] for run in runs],
            sum(known_values) / len(known_values)
            if len(known_values) == len(main_before)
            else None,
        ),
        "median": {
            "seed": median["seed"],
            "path": median["path"],
            "value": median["average"],
            "by": next(iter(main.values())) if len(main) == 1 else "average",
        },
    }


def _values(entry: dict[str, Any], key: str) -> dict[str, float | None]:
    return {name: score.get(key) for name, score in entry["metrics"].items()}


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float], before: float | None) -> dict[str, float | None]:
    """Mean, standard deviation and lower median of a metric's values; the untrained model's."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median_low(values),
        "before": before,
    }


def _check_rows(recipe: Recipe) -> None:
    """Refuse a custom dataset without rows to score; other suites always have some."""
    if recipe.data.custom and not read_rows(recipe)[1].tests:
        raise MocError("--seeds compares scores, and this recipe scores no rows", "leave it out")


def _check_folders(home: Path, seeds: Sequence[Recipe], options: TrainOptions) -> None:
    """Refuse at once what the third seed would otherwise be stopped by."""
    call = options.call
    if (home / "recipe.yaml").is_file():
        raise RunError(
            f"{home} holds a single run, and seeds would be mixed with it",
            f"choose another folder: {call.base} --output-dir OTHER",
        )
    nonempty = [folder.path for folder in map(folder_of, seeds) if folder.content()]
    if nonempty and not options.resume and not options.overwrite:
        raise RunError(
            f"{', '.join(map(str, nonempty))}: not empty",
            f"{call.command} --resume auto   # continue these seeds\n"
            f"      {call.command} --overwrite   # replace them\n"
            f"      {call.base} --output-dir OTHER   # leave them alone",
        )
    if options.resume:
        for run in seeds:
            if folder_of(run).recipe_file.is_file():
                is_finished(run, folder_of(run))  # raises for another recipe
