"""`moc eval RUN --harness A,B`: tasks of lm-evaluation-harness."""

import shlex
from typing import TYPE_CHECKING

from moc_cli.errors import MocError
from moc_cli.runs import RunFolder

if TYPE_CHECKING:
    from moc_cli.evaluation.options import EvalOptions
    from moc_cli.recipe.schema import Recipe


def score_harness(options: "EvalOptions", json: bool) -> None:
    """Read the tasks' rows, load the model, run the tasks, and print lm_eval's table. One process.

    Mistakes in options and tasks are reported before the model is loaded.
    """
    from moc_cli.evaluation.job import check_language_model, model_home

    recipe, run = None, None
    if options.run is None:
        check_language_model(options.model or "", trust_remote_code=options.trust_remote_code)
    else:
        run = RunFolder.open(options.run)
        recipe = _read_recipe(options, run)
    from moc_cli.evaluation import lm_eval_tasks
    from moc_cli.evaluation.results_folder import check_results_folder
    from moc_cli.evaluation.session import load_model
    from moc_cli.report.characters import printable
    from moc_cli.report.output import print_json, say

    label = options.label("harness")
    if run is not None:
        home = run.path / "eval" / run.labelled(label)
    else:
        home = model_home(options.model or "") / label
    folder = options.output_dir or home
    check_results_folder(folder, within=run.path if run and not options.output_dir else None)
    tasks = lm_eval_tasks.load_tasks(options)
    model = load_model(options, recipe)
    written, by_model = lm_eval_tasks.run(options, tasks, model, folder)
    results = written.to_json()
    if json:
        print_json(results | {"folder": str(folder)})
        return
    from lm_eval.utils import make_table

    for name, tables in by_model.items():
        title = f"{name}\n" if options.base else ""
        print(printable(f"{title}{make_table(tables)}"))
    print(f"lm_eval {results['lm_eval_version']}; only contexts vote on routes")
    if results["limited"]:
        print(f"limited: the first {options.limit} rows of each task")
    if cut := max(entry["cut"] for entry in results["tasks"].values()):
        print(f"{cut:,} contexts were longer than the model takes: their ends were kept")
    say(f"every item: {written.samples_file}")


def _read_recipe(options: "EvalOptions", run: RunFolder) -> "Recipe":
    """Return a run's recipe; MocError where the run is a classifier."""
    recipe = run.read_recipe(trust_remote_code=options.trust_remote_code)
    if recipe.data.kind.classifier:
        raise MocError(
            f"--harness scores language models; {run.path} is a classifier "
            f"({', '.join(recipe.data.tasks)})",
            f"score it: {shlex.join(['moc', 'eval', str(run.path)])}",
        )
    return recipe
