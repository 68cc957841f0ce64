"""`moc eval`: tasks in turn, each written to the results folder as soon as it is scored.

options -> job -> rows -> model -> scores, the base model's beside them -> results folder

Several processes share the batches. All read the run and the rows, the first one before the others,
and it alone reads and writes results.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moc_cli import processes
from moc_cli.data.examples import Example
from moc_cli.data.splits import TaskRows
from moc_cli.evaluation.base_scores import (
    BaseScore,
    before_training,
    earlier_evaluation,
    find_score,
)
from moc_cli.evaluation.job import EvalJob, check_language_model, model_folder, model_job, run_job
from moc_cli.evaluation.options import EvalOptions
from moc_cli.evaluation.results_folder import ResultsFolder, check_results_folder, prompt_hash
from moc_cli.evaluation.same_rows import count_trained, find_changed
from moc_cli.kinds import Kind
from moc_cli.load_run import LoadedModel, LoadedRun, open_model, open_run
from moc_cli.processes import Processes
from moc_cli.recipe.launch import LaunchSection
from moc_cli.recipe.schema import Recipe
from moc_cli.report.output import say
from moc_cli.report.progress import WorkProgress
from moc_cli.runs import RunFolder
from moc_cli.scoring.results import Evaluation
from moc_cli.training.accelerator import join_launched
from moc_cli.training.checks import fit, fitting
from moc_cli.training.device_checks import check_compiler


def evaluate(options: EvalOptions) -> ResultsFolder:
    """Score a run, or a bare model, as the options say.

    Joint: of several processes the first one writes the results, and it alone returns them all.
    Raises MocError for all that is wrong with options and rows before weights are read.
    """
    if options.run is None:
        assert options.model is not None  # EvalOptions.check has refused neither and both
        job = model_job(options)
        group = join_others(options)
        with group.together(), group.main_first():
            check_language_model(options.model, trust_remote_code=options.trust_remote_code)
        folder = options.output_dir or model_folder(options.model, job)
        rows = _read_rows(group, job, folder)
        bare = load_model(options)
        return score_rows(job, bare, fit(job.kind, rows, bare, job.scoring), folder)
    run = RunFolder.open(options.run)
    recipe = run.read_recipe(trust_remote_code=options.trust_remote_code)
    job = run_job(options, recipe)
    group = join_others(options, recipe)
    folder = options.output_dir or run.path / "eval" / run.labelled(job.label)
    rows = _read_rows(group, job, folder, within=None if options.output_dir else run.path)
    model = load_model(options, recipe)
    assert isinstance(model, LoadedRun)
    rows = fit(job.kind, rows, model, job.scoring)
    trained = group.on_main(lambda: count_trained(run, rows))
    for task in rows:
        if task.name in trained:
            say(
                f"{task.name}: the run was trained on {trained[task.name]:,} of the "
                f"{len(task.rows):,} rows to score; such a score says nothing about new rows"
            )
    base_scores = group.on_main(lambda: _look_back(job, run, recipe, model, rows))
    return score_rows(job, model, rows, folder, base_scores=base_scores, trained=trained)


def join_others(options: EvalOptions, recipe: Recipe | None = None) -> Processes:
    """Join the other processes that a launcher has started; `recipe` is the run's."""
    launch = LaunchSection() if recipe is None else recipe.launch
    update = {} if options.device is None else {"device": options.device}
    return join_launched(launch.model_copy(update=update))


def _read_rows(
    group: Processes, job: EvalJob, folder: Path, *, within: Path | None = None
) -> list[TaskRows]:
    """Read the rows, by the first process first; it also looks at the folder for the results."""
    with group.together(), group.main_first():
        if group.main:
            check_results_folder(folder, within=within)
        tasks = job.read_rows()
    for task in tasks:
        for note in task.notes:
            say(f"{task.name}: {note}")
    return tasks


def _look_back(
    job: EvalJob, run: RunFolder, recipe: Recipe, model: LoadedRun, rows: Sequence[TaskRows]
) -> list[BaseScore]:
    """Return earlier scores of the base; say where the rows are not those of the training."""
    if job.path is None:

        def fitting_rows(examples: list[Example]) -> list[Example]:
            network = model.adapted.model
            numbers, _ = fitting(job.kind, examples, model.tokenizer, network, job.scoring)
            return [examples[number] for number in numbers]

        for sentence in find_changed(run, rows, recipe.eval.max_samples, fitting_rows):
            say(sentence)
    facts = model_facts(model)
    shared = {key: facts[key] for key in ("base_weights_sha256", "dtype", "quantization")}
    file = model_folder(facts["model"], job) / "results.json"
    return [
        *before_training(run, job.scoring.protocol, model.adapter_config, model.base),
        *earlier_evaluation(file, shared | job.conditions | {"run": None}),
    ]


def load_model(options: EvalOptions, recipe: Recipe | None = None) -> LoadedModel:
    """Load the run or the bare model that the options name; `recipe` is the run's. Joint."""
    check_compiler(recipe, options.torch_compile, options.device)
    with processes.current().together():
        if options.run is not None:
            return open_run(
                options.run, device=options.device, recipe=recipe, base=options.base_options
            )
        assert options.model is not None
        return open_model(
            options.model,
            device=options.device or "auto",
            dtype=options.dtype or "float32",
            trust_remote_code=options.trust_remote_code,
            load_in_4bit=options.base_options.load_in_4bit,
        )


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return what names the scored model in results.json."""
    facts: dict[str, Any] = {
        "run": None,
        "method": "none",
        "model": model.name,
        "base_weights_sha256": model.weights_hash,
        # The last bits of a score depend on type and device.
        "dtype": model.dtype,
        "quantization": str(model.quantization) if model.quantization else None,
        "device": model.device.type,
    }
    if isinstance(model, LoadedRun):
        data = model.recipe.data
        facts |= {
            "run": model.name,
            "method": model.recipe.method.name,
            "model": model.adapter_config["base_model_name_or_path"],
            "controls_sha256": model.adapter_config["payload_sha256"],
            "train_on_inputs": data.train_on_inputs if data.kind.prompted else None,
        }
    return facts


def score_rows(
    job: EvalJob,
    model: LoadedModel,
    tasks: Sequence[TaskRows],
    folder: Path,
    *,
    base_scores: Sequence[BaseScore] = (),
    trained: Mapping[str, int] = MappingProxyType({}),
) -> ResultsFolder:
    """Score tasks that fit the model; write results.json and samples.jsonl after each; joint.

    `base_scores` of the same rows are added to them, unless the job scores the base itself, and the
    number of `trained` rows of each task.
    """
    group = processes.current()
    results = group.on_main(lambda: ResultsFolder(folder, model_facts(model) | job.conditions))
    if results.replaced:
        say(f"{folder}: other {', '.join(results.replaced)} than before: its scores are replaced")
    try:
        for task in tasks:
            evaluation = _score(job, model, task)
            base, values, source = None, None, None
            if job.base:
                base = _score(job, model, task, base=True)
                values, source = base.values, "scored with it"
            elif score := find_score(base_scores, task, evaluation):
                values, source = dict(score.values), score.source
            entry = make_entry(task, evaluation, values, source)
            if task.name in trained:
                entry["trained_rows"] = trained[task.name]
            lines = samples(job.kind, task, evaluation, base)
            group.on_main(partial(results.add, task.name, entry, lines))
    except KeyboardInterrupt:
        saved = f"{len(results.tasks)} scored tasks are in {results.results_file}"
        say(f"stopped; {saved if results.tasks else 'no task was scored, nothing was written'}")
        raise
    return results


def make_entry(
    task: TaskRows,
    evaluation: Evaluation,
    base: Mapping[str, float] | None,
    base_source: str | None,
) -> dict[str, Any]:
    """Return what results.json says of a scored task, with the base model's values if known."""
    scored = evaluation.entry() if base is None else evaluation.entry("base", base)
    entry = scored | {
        "rows": task.total,
        "limited": task.limited,
        "rows_sha256": task.fingerprint,
        "batch_size": evaluation.batch.used,
        "halved": evaluation.batch.halved,
    }
    return entry | ({} if base is None else {"base_source": base_source})


def samples(
    kind: Kind, task: TaskRows, evaluation: Evaluation, base: Evaluation | None = None
) -> list[dict[str, Any]]:
    """Return the lines of samples.jsonl, the base model's item under `base`."""
    lines = [
        {"row": row, "prompt": prompt_hash(kind.prompt(example)), **item.sample()}
        for row, example, item in zip(task.rows, task.examples, evaluation.items, strict=True)
    ]
    for line, item in zip(lines, base.items if base else (), strict=base is not None):
        line["base"] = item.sample()
    return lines


def _score(job: EvalJob, model: LoadedModel, task: TaskRows, base: bool = False) -> Evaluation:
    """Score one task under a progress bar; with `base` the base model."""
    label = f"{task.name} (base)" if base else task.name
    off: AbstractContextManager[None] = model.adapted.disabled() if base else nullcontext()
    with off, WorkProgress(label, len(task.examples)) as bar:
        return job.kind.score(model, task.examples, job.scoring, bar.observe)
