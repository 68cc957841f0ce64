"""`moc train`: from a recipe to a finished run folder.

claim the folder -> find a checkpoint -> rows, tokenizer, model -> score before
-> fit -> the best controls -> score after -> results.json
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moc_cli.data.examples import row_hashes
from moc_cli.errors import FileError, MocError
from moc_cli.methods import Counts
from moc_cli.models.fingerprint import hash_vocabulary
from moc_cli.recipe.load import dump
from moc_cli.recipe.paths import absolute_paths
from moc_cli.recipe.schema import Recipe
from moc_cli.report import lines
from moc_cli.report.progress import TrainProgress, WorkProgress
from moc_cli.results import FORMAT
from moc_cli.runs import Call, RunFolder
from moc_cli.scoring.results import Evaluation
from moc_cli.training import build
from moc_cli.training.accelerator import make_accelerator
from moc_cli.training.checkpoint import Checkpoints, Snapshot, read_checkpoint
from moc_cli.training.compiled import matmul_precision
from moc_cli.training.device_checks import check_device_keys
from moc_cli.training.environment import describe_device, describe_environment
from moc_cli.training.interrupt import Interrupt, Interrupted
from moc_cli.training.job import Forecast, Job, Values
from moc_cli.training.log import MetricsLog, require_trackers, start_trackers
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Outcome, StepReport, total_steps
from moc_cli.training.memory import peak_kind, tensor_bytes
from moc_cli.training.results import make_results
from moc_cli.training.resume import (
    check_facts,
    check_recipe,
    check_weights,
    keep_place,
    known_of,
    make_identity,
)


@dataclass(frozen=True)
class Finished:
    """A finished run and what results.json holds."""

    folder: RunFolder
    results: dict[str, Any]
    counts: Counts
    outcome: Outcome


class Session:
    """One call of `moc train`; messages go to `say`.

    `allow_changed_base`: a resumed run may have another vocabulary, and other weights of its base
    outside of the layers. `forecast` plans the run, and refuses one that does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        call: Call,
        say: Callable[[str], None],
        allow_changed_base: bool = False,
        forecast: Forecast | None = None,
    ) -> None:
        self.recipe = absolute_paths(recipe)
        self.call = call
        self.allow_changed_base = allow_changed_base
        self.forecast = forecast
        self.again = f"{call.command} --resume auto"
        self.warn = say
        self.say = say
        self.interrupt = Interrupt()

    def run(self, *, resume: str | None = None, overwrite: bool = False) -> Finished:
        """Train from the start or from a checkpoint (`auto`, or its path), and score.

        Raises MocError for what the user can correct, Interrupted after a signal.
        """
        output = self.recipe.output
        require_trackers(output.report_to)
        folder = RunFolder.claim(
            output.output_dir, call=self.call, resume=resume is not None, overwrite=overwrite
        )
        with folder:
            checkpoints = Checkpoints(folder.checkpoints, output.save_total_limit)
            job = self.prepare(folder, checkpoints, resume)
            before = self.open_folder(job, folder, checkpoints)
            with self.interrupt:
                try:
                    return self.train_and_score(job, folder, checkpoints, before)
                except FileError as error:
                    hint = f"free some disk space, then: {self.again}"
                    raise FileError(error.message, error.hint or hint) from error

    def prepare(self, folder: RunFolder, checkpoints: Checkpoints, resume: str | None) -> Job:
        """Make rows, device, tokenizer, model and data, and check them against the checkpoint.

        Everything that can be wrong is found here, before a file is touched.
        """
        recipe, splits = build.read_rows(self.recipe)
        snapshot = self.find_checkpoint(checkpoints, resume, folder) if resume else None
        saved = snapshot.identity if snapshot else {}
        changes = []
        if snapshot is not None:
            changes = check_recipe(saved["recipe"], recipe.model_dump(mode="json"))
            snapshot, split = keep_place(snapshot, recipe)
            changes += split
        accelerator = make_accelerator(recipe.launch, recipe.output.report_to, folder.trackers)
        check_device_keys(recipe, accelerator.device, training=True)
        torch.set_float32_matmul_precision(matmul_precision(recipe, accelerator.device))
        self.say(lines.device_line(describe_device(accelerator.device)))
        tokenizer = build.make_tokenizer(recipe.model, recipe.data.chat_template)
        shapes = build.build_shapes(recipe).model
        rows = build.encode_rows(recipe, splits, tokenizer, shapes)
        splits = rows.splits
        for note in rows.notes:
            self.warn(lines.labelled("note", note))
        fitted, predicted = recipe, None
        if self.forecast is not None:
            fitted, predicted = self.forecast(recipe, rows, tokenizer, accelerator.device)
        built = build.build(fitted, accelerator.device, tokenizer)
        counts = built.adapted.counts()
        quantized = str(built.quantization or "")
        size = tensor_bytes(p for p in built.adapted.model.parameters() if not p.requires_grad)
        self.say(lines.model_line(built.name, counts.base, built.dtype, quantized, size))
        self.say(lines.method_line(recipe.method.name, counts))
        for line in lines.taken_lines(splits.taken):
            self.say(line)
        self.say(
            lines.rows_line(
                train=len(rows.encoded.rows),
                validation=len(splits.validation),
                scored=sum(map(len, splits.tests.values())),
                max_length=recipe.data.max_length,
                truncated=rows.encoded.truncated,
                answers_cut_off=rows.encoded.answers_cut_off,
                dropped=splits.dropped,
            )
        )
        trainables = built.adapted.named_trainables()
        identity = make_identity(
            recipe.model_dump(mode="json"),
            weights=built.weights_hash,
            quantization=built.quantization.arguments if built.quantization else None,
            vocabulary=hash_vocabulary(tokenizer),
            data=splits.fingerprints(),
            trainables={name: list(parameter.shape) for name, parameter in trainables.items()},
            threads=torch.get_num_threads(),
        )
        if snapshot is not None:
            allow, then = self.allow_changed_base, folder.base_tensors()
            changes += check_weights(saved, recipe.model, built, then, allow_changes=allow)
            changes += check_facts(saved, identity, allow_changes=allow)
        for change in changes:
            self.warn(f"changed: {change}")
        return Job(
            recipe,
            splits,
            accelerator,
            tokenizer,
            built,
            rows,
            build.make_settings(fitted),
            build.make_scoring_options(recipe),
            identity,
            snapshot,
            changes,
            predicted,
        )

    def find_checkpoint(
        self, checkpoints: Checkpoints, resume: str, folder: RunFolder
    ) -> Snapshot | None:
        """Return the checkpoint to go on from; None where `auto` finds none.

        Raises RunError when it is damaged.
        """
        if resume == "auto":
            newest = checkpoints.newest(self.warn)
            if newest is None:
                self.say(f"no checkpoint in {folder.path}: starting from the first step")
                return None
            path, snapshot = newest
        else:
            path, snapshot = Path(resume), read_checkpoint(Path(resume))
        self.say(lines.labelled("resume", f"{path}, step {snapshot.counters.step}"))
        return snapshot

    def open_folder(self, job: Job, folder: RunFolder, checkpoints: Checkpoints) -> Values:
        """Begin the run folder, or go on in it; return the scores before training known from it.

        Checkpoints beyond the resumed one are moved aside.
        """
        snapshot, fresh = job.snapshot, job.snapshot is None
        history, before = ([], {}) if fresh else known_of(folder, self.warn)
        folder.begin(dump(job.recipe), fresh=fresh)
        step = snapshot.counters.step if snapshot else 0
        if snapshot is not None:
            for path in checkpoints.set_aside_after(step):
                self.warn(f"moved a later checkpoint to {path}")
            if self.allow_changed_base:  # it is now a checkpoint of a run on this base
                checkpoints.save(replace(snapshot, identity=job.identity))
        environment = describe_environment(
            job.accelerator.device,
            model=job.recipe.model.model_name_or_path,
            revision=job.recipe.model.revision,
            weights=job.built.weights_hash,
            tensors=job.built.tensors,
            vocabulary=job.identity["vocabulary"],
            data=job.identity["data"],
        )
        started = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"started": started, "from_step": step, "changed": job.changes}
        folder.write_environment(environment | {"history": [*history, start]})
        folder.write_trained_rows(row_hashes(job.splits.train))
        return before

    def train_and_score(
        self, job: Job, folder: RunFolder, checkpoints: Checkpoints, before: Values
    ) -> Finished:
        """Score, train, keep the best controls, score again, and write the results."""
        if job.recipe.eval.before and not before:
            untrained = self.score(job, "before", "stopped before the first step", job.splits.tests)
            before = {name: evaluation.values for name, evaluation in untrained.items()}
        folder.write_results({"format": FORMAT, "status": "running", "before": before})
        outcome = self.fit(job, folder, checkpoints)
        chosen = self.keep_controls(job, folder, checkpoints, outcome)
        recorder = job.built.adapted.recorder(detailed=False)
        with recorder or nullcontext():
            after, unscored = self.score_trained(job)
        routing = {} if recorder is None else recorder.record().summary()
        results = make_results(job, outcome, after, before)
        results |= {"controls": chosen, "routing": routing}
        if unscored:
            results["unscored"] = {name: error.message for name, error in unscored.items()}
        folder.write_results(results)
        if unscored:
            why = "; ".join(f"{name}: {error.message}" for name, error in unscored.items())
            raise MocError(
                f"the training is finished and kept, but not all of it is scored: {why}",
                next(iter(unscored.values())).hint or f"try again: {self.again}",
            )
        return Finished(folder, results, job.built.adapted.counts(), outcome)

    def fit(self, job: Job, folder: RunFolder, checkpoints: Checkpoints) -> Outcome:
        """Run the loop under a progress bar."""
        settings, step = job.settings, job.snapshot.counters.step if job.snapshot else 0
        trackers = start_trackers(job.accelerator, job.recipe)
        bar = TrainProgress(
            total_steps(settings, job.rows.data.batches),
            every=settings.logging_steps,
            memory_kind=peak_kind(job.accelerator.device),
        )

        def observe(report: StepReport) -> None:
            nonlocal step
            step = report.step
            bar.observe_step(report)

        def watch() -> dict[str, float]:
            values = job.rows.kind.watch(
                job.model, job.splits.validation, job.scoring, lambda *_: self.interrupt.check()
            )
            self.say(lines.watched_line(step, values))
            return values

        loop = Loop(
            job.built.adapted,
            job.rows.data,
            settings,
            accelerator=job.accelerator,
            checkpoints=checkpoints,
            log=MetricsLog(folder.metrics, trackers),
            identity=job.identity,
            evaluate=watch if settings.eval_strategy != "no" else None,
            interrupt=self.interrupt,
            command=self.again,
        )
        try:
            with bar:
                return loop.run(resume=job.snapshot, observe=observe)
        finally:
            if trackers is not None:
                job.accelerator.end_training()

    def score_trained(self, job: Job) -> tuple[dict[str, Evaluation], dict[str, MocError]]:
        """Score every task of a trained model; return the scores, and why others have none."""
        scores: dict[str, Evaluation] = {}
        unscored: dict[str, MocError] = {}
        for name in job.splits.tests:
            try:
                scores |= self.score(job, "after", "training is done and kept", [name])
            except (Interrupted, FileError):
                raise
            except MocError as error:
                unscored[name] = error
        return scores, unscored

    def score(
        self, job: Job, label: str, progress: str, tasks: Iterable[str]
    ) -> dict[str, Evaluation]:
        """Score tasks; after a signal raises Interrupted, which tells of the `progress`."""
        scores = {}
        for name in tasks:
            examples = job.splits.tests[name]
            with WorkProgress(f"{label} {name}", len(examples)) as bar:

                def observe(done: int, total: int, bar: WorkProgress = bar) -> None:
                    bar.observe(done, total)
                    if self.interrupt.signal is not None:
                        raise Interrupted(
                            self.interrupt.signal,
                            f"{progress}; scoring was stopped",
                            f"continue with: {self.again}",
                        )

                scores[name] = job.rows.kind.score(job.model, examples, job.scoring, observe)
        return scores

    def keep_controls(
        self, job: Job, folder: RunFolder, checkpoints: Checkpoints, outcome: Outcome
    ) -> dict[str, Any]:
        """Save the best checkpoint's controls, or the last ones, and say which."""
        adapted, step, name = job.built.adapted, outcome.counters.step, "last"
        best = outcome.counters.best_step
        if best is not None and best not in checkpoints.steps():
            # It lies in the folder of the run that this one was continued from.
            self.warn(f"the best step, {best}, has no checkpoint here: keeping the last controls")
        elif best is not None:
            name = f"best {job.settings.metric}"
            if best != step:
                adapted.load_state(read_checkpoint(checkpoints.path(best)).trainables)
                step = best
        config = adapted.adapter_config() | build.base_facts(job.recipe, job.built)
        folder.save_controls(config | {"step": step}, save(adapted.state(), {"format": "pt"}))
        return {"step": step, "chosen": name}
