"""`moc train`: from a recipe to a finished run folder.

claim the folder -> find a checkpoint -> rows, tokenizer, model -> score before
-> fit -> the best controls -> score after -> results.json
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save

from moc_cli.data.examples import row_hashes
from moc_cli.errors import FileError, MocError, RunError
from moc_cli.processes import LostProcess, Processes
from moc_cli.recipe.load import dump
from moc_cli.recipe.paths import absolute_paths
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.tasks import LANGUAGE
from moc_cli.report import lines
from moc_cli.report.progress import TrainProgress, WorkProgress
from moc_cli.results import FORMAT
from moc_cli.runs import Call, RunFolder
from moc_cli.scoring.results import Evaluation
from moc_cli.training import build
from moc_cli.training.accelerator import join_launched, make_accelerator
from moc_cli.training.checkpoint import Checkpoints, Snapshot, read_checkpoint
from moc_cli.training.environment import describe_environment
from moc_cli.training.interrupt import Interrupt, Interrupted
from moc_cli.training.log import MetricsLog, require_trackers, start_trackers
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Outcome, total_steps
from moc_cli.training.memory import peak_kind
from moc_cli.training.prepare import Forecast, Job, Resume, prepare
from moc_cli.training.results import LAST, make_results
from moc_cli.training.resume import Scores, known_of


@dataclass(frozen=True)
class TrainOptions:
    """The options of `moc train` that are not in the recipe, and how it was called.

    `resume`: go on from the newest checkpoint (`auto`) or from that at a path; None: from the
    start. `allow_changed_base`: a resumed run may have another vocabulary, and other weights of its
    base outside of the layers.
    """

    call: Call
    resume: str | None = None
    overwrite: bool = False
    allow_changed_base: bool = False


class Session:
    """One training; messages go to `say`.

    `forecast` plans the run, and refuses one that does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: TrainOptions,
        say: Callable[[str], None],
        forecast: Forecast | None = None,
    ) -> None:
        self.recipe = absolute_paths(recipe)
        self.folder = RunFolder(self.recipe.output.output_dir)
        limit = self.recipe.output.save_total_limit
        self.checkpoints = Checkpoints(self.folder.checkpoints, limit)
        self.options = options
        self.forecast = forecast
        self.resume_command = f"{options.call.command} --resume auto"
        self.say = say
        self.interrupt = Interrupt()
        self.processes = Processes()

    def run(self) -> dict[str, Any]:
        """Train from the start or from a checkpoint, and score.

        Returns what results.json holds.
        Raises MocError for what the user can correct, Interrupted after a signal.
        """
        launch, report_to = self.recipe.launch, self.recipe.output.report_to
        require_trackers(report_to)
        self.processes = join_launched(launch)
        accelerator = make_accelerator(launch, report_to, self.folder.trackers)
        with self.claim() as self.folder:
            job = self.prepare(accelerator)
            before = self.processes.on_main(lambda: self.open_folder(job))
            with self.interrupt:
                try:
                    return self.train_and_score(job, before)
                except FileError as error:
                    first = "free some disk space" if error.disk_is_full else "mend that"
                    hint = f"{first}, then: {self.resume_command}"
                    raise FileError(error.message, error.hint or hint) from error

    def claim(self) -> RunFolder:
        """Claim the run's folder; of several processes the first one alone writes in it."""
        folder, options = self.folder, self.options
        with self.processes.main_first():
            if self.processes.main:
                folder = RunFolder.claim(
                    folder.path,
                    call=options.call,
                    resume=options.resume is not None,
                    overwrite=options.overwrite,
                )
        return folder

    def prepare(self, accelerator: Accelerator) -> Job:
        """Make everything ready, before a file is touched."""
        options, resumed = self.options, None
        if options.resume is not None:
            snapshot = self.processes.on_main(partial(self.find_checkpoint, options.resume))
            if snapshot is not None:
                tensors = self.processes.on_main(self.folder.base_tensors)
                resumed = Resume(snapshot, tensors, options.allow_changed_base)
        return prepare(
            self.recipe,
            accelerator,
            self.processes,
            self.say,
            resume=resumed,
            forecast=self.forecast,
        )

    def find_checkpoint(self, resume: str) -> Snapshot | None:
        """Return the checkpoint to go on from; None where `auto` finds none.

        Raises RunError when it is damaged, and where the folder holds controls and no checkpoint:
        starting over would delete them.
        """
        if resume == "auto":
            newest = self.checkpoints.newest(self.say)
            if newest is None and self.folder.controls.exists():
                call = self.options.call
                raise RunError(
                    f"{self.folder.path} holds controls, and no checkpoint to go on from",
                    f"{call.command} --overwrite   # replace them\n"
                    f"      {call.base} --output-dir OTHER   # leave them alone",
                )
            if newest is None:
                self.say(f"no checkpoint in {self.folder.path}: starting from the first step")
                return None
            path, snapshot = newest
        else:
            path, snapshot = Path(resume), read_checkpoint(Path(resume))
        self.say(lines.labelled("resume", f"{path}, step {snapshot.counters.step}"))
        return snapshot

    def open_folder(self, job: Job) -> Scores:
        """Begin the run folder, or go on in it; return the scores before training known from it.

        Checkpoints beyond the resumed one are moved aside.
        """
        snapshot, fresh, folder = job.snapshot, job.snapshot is None, self.folder
        history, before = ([], {}) if fresh else known_of(folder, self.say)
        folder.begin(dump(job.recipe), fresh=fresh)
        step = snapshot.counters.step if snapshot else 0
        if snapshot is not None:
            for path in self.checkpoints.set_aside_after(step):
                self.say(f"moved a later checkpoint to {path}")
            if self.options.allow_changed_base:  # it is now a checkpoint of a run on this base
                self.checkpoints.save(replace(snapshot, identity=job.identity))
        environment = describe_environment(
            job.accelerator.device,
            job.recipe,
            job.built,
            vocabulary=job.identity["vocabulary"],
            data=job.identity["data"],
        )
        started = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"started": started, "from_step": step, "changed": job.changes}
        folder.write_environment(environment | {"history": [*history, start]})
        folder.write_trained_rows(row_hashes(job.rows.learned))
        return before

    def train_and_score(self, job: Job, before: Scores) -> dict[str, Any]:
        """Score, train, keep the best controls, score again, and write the results."""
        if job.recipe.eval.before:
            before = before | self.score_before(job, known=before)
        begun = {"format": FORMAT, "status": "running", "before": before}
        self.processes.on_main(lambda: self.folder.write_results(begun))
        outcome = self.fit(job)
        begun["controls"] = chosen = self.keep_controls(job, outcome)
        self.processes.on_main(lambda: self.folder.write_results(begun))
        recorder = job.built.adapted.recorder(detailed=False)
        with recorder or nullcontext():
            after, unscored = self.score_trained(job)
        routing = {} if recorder is None else recorder.record().summary()
        results = make_results(job, outcome, after, before, chosen)
        results["routing"] = routing
        if unscored:
            results["unscored"] = {name: error.message for name, error in unscored.items()}
            results["before"] = {name: before[name] for name in unscored if name in before}
        self.processes.on_main(lambda: self.folder.write_results(results))
        if unscored:
            why = "; ".join(f"{name}: {error.message}" for name, error in unscored.items())
            error = MocError(
                f"the training is finished and kept, but not all of it is scored: {why}",
                next(iter(unscored.values())).hint or f"try again: {self.resume_command}",
            )
            raise self.processes.reported_by_main(error)
        return results

    def fit(self, job: Job) -> Outcome:
        """Run the loop under a progress bar."""
        settings = job.settings
        trackers = start_trackers(job.accelerator, job.recipe)
        bar = TrainProgress(
            total_steps(settings, job.rows.data.batches),
            interval=settings.logging_steps,
            memory_kind=peak_kind(job.accelerator.device),
        )

        def watch() -> dict[str, float]:
            validation, check = job.rows.splits.validation, self.interrupt.check
            values = job.rows.kind.watch(job.model, validation, job.scoring, lambda *_: check())
            self.say(lines.watched_line(loop.counters.step, values))
            return values

        loop = Loop(
            job.built.adapted,
            job.rows.data,
            settings,
            accelerator=job.accelerator,
            checkpoints=self.checkpoints,
            log=MetricsLog(self.folder.metrics, trackers),
            identity=job.identity,
            evaluate=watch if settings.eval_strategy != "no" else None,
            interrupt=self.interrupt,
            command=self.resume_command,
            processes=self.processes,
        )
        try:
            with bar:
                return loop.run(resume=job.snapshot, observe=bar.observe_step)
        finally:
            if trackers is not None:
                job.accelerator.end_training()

    def score_before(self, job: Job, known: Scores) -> Scores:
        """Score the tasks that are not `known` before training, and return these scores.

        A language model is scored without the method: that is its base, whatever the method and the
        seed. A classifier has no trained head before: it is scored as it was drawn.
        """
        language = job.rows.kind.head is LANGUAGE
        with job.built.adapted.disabled() if language else nullcontext():
            return {
                name: self.score(job, name, "before", "stopped before the first step").values
                for name in job.rows.splits.tests
                if name not in known
            }

    def score_trained(self, job: Job) -> tuple[dict[str, Evaluation], dict[str, MocError]]:
        """Score every task of a trained model; return the scores, and why others have none."""
        scores: dict[str, Evaluation] = {}
        unscored: dict[str, MocError] = {}
        for name in job.rows.splits.tests:
            try:
                scores[name] = self.score(job, name, "after", "training is done and kept")
            except (Interrupted, FileError, LostProcess):
                raise
            except MocError as error:
                unscored[name] = error
        return scores, unscored

    def score(self, job: Job, task: str, label: str, progress: str) -> Evaluation:
        """Score a task; after a signal raises Interrupted, which tells of the `progress`."""
        examples = job.rows.splits.tests[task]
        with WorkProgress(f"{label} {task}", len(examples)) as bar:

            def observe(done: int, total: int) -> None:
                bar.observe(done, total)
                hint = f"continue with: {self.resume_command}"
                self.interrupt.check(f"{progress}; scoring was stopped", hint)

            return job.rows.kind.score(job.model, examples, job.scoring, observe)

    def keep_controls(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """Save the best checkpoint's controls, or the last ones, and say which."""
        adapted, step, name = job.built.adapted, outcome.counters.step, LAST
        best, on_main = outcome.counters.best_step, self.processes.on_main
        if best is not None and job.settings.metric is None:
            self.say(
                f"step {best} was the best so far, but eval.eval_strategy is no now, and nothing "
                "chooses a step: keeping the last controls"
            )
        elif best is not None and best not in on_main(self.checkpoints.steps):
            # It lies in the folder of the run that this one was continued from.
            self.say(f"the best step, {best}, has no checkpoint here: keeping the last controls")
        elif best is not None:
            name = f"best {job.settings.metric}"
            if best != step:
                saved = partial(read_checkpoint, self.checkpoints.path(best))
                adapted.load_state(on_main(lambda: saved().trainables))
                step = best
        config = adapted.adapter_config() | build.base_facts(job.recipe, job.built)
        payload = save(adapted.state(), {"format": "pt"})
        on_main(lambda: self.folder.save_controls(config | {"step": step}, payload))
        return {"step": step, "chosen": name}
