"""`moc eval RUN --harness A,B`: tasks of lm-evaluation-harness."""

from typing import TYPE_CHECKING

from moc_cli.errors import MocError

if TYPE_CHECKING:
    from moc_cli.evaluation.options import EvalOptions


def score_harness(options: "EvalOptions", json: bool) -> None:
    """Read the tasks' rows, load the model, run them, and show; mistakes are reported first."""
    from moc_cli.evaluation.job import check_language_model, model_home

    if options.run is None:
        check_language_model(options.model or "")
        home = model_home(options.model or "")
    else:
        _refuse_classifier(options)
        home = options.run / "eval"
    from moc_cli.evaluation.harness import HarnessPlan, check_installed, load_tasks, run
    from moc_cli.evaluation.session import load_model
    from moc_cli.files import check_folder
    from moc_cli.report.harness_table import harness_table
    from moc_cli.report.output import print_json, print_table, say

    check_installed()
    plan = HarnessPlan(
        list(options.harness or ()),
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.rows_per_batch("auto"),
        path=options.tasks_path,
        base=options.base,
    )
    folder = options.output or home / plan.label
    check_folder(folder)
    tasks = load_tasks(plan)
    results = run(load_model(options), plan, tasks, folder, silent=json)
    if json:
        print_json(results.to_json() | {"folder": str(folder)})
    else:
        print_table(harness_table(results.to_json()))
        say(f"every item: {results.samples_file}")


def _refuse_classifier(options: "EvalOptions") -> None:
    from moc_cli.recipe.load import load_recipe
    from moc_cli.recipe.tasks import is_classifier
    from moc_cli.runs import RunFolder

    assert options.run is not None
    data = load_recipe(RunFolder.open(options.run).recipe_file).data
    if is_classifier(data.suite, data.tasks[0], data.format):
        raise MocError(
            f"--harness asks language models; {options.run} is a classifier "
            f"({', '.join(data.tasks)})",
            f"score it: moc eval {options.run}",
        )
