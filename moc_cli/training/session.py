"""`moc train` behind the door: from a recipe to a finished run folder.

claim the folder -> find a checkpoint -> rows, tokenizer, model -> score before
-> fit -> the best controls -> score after -> results.json
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moc_cli.errors import FileError
from moc_cli.kinds import make_kind
from moc_cli.methods import Counts
from moc_cli.recipe.load import dump
from moc_cli.recipe.schema import Recipe
from moc_cli.report.progress import TrainProgress, WorkProgress
from moc_cli.results import FORMAT
from moc_cli.runs import Call, RunFolder
from moc_cli.scoring.results import Evaluation, average
from moc_cli.training import build, words
from moc_cli.training.checkpoint import Checkpoints, Snapshot, read_checkpoint
from moc_cli.training.contracts import Outcome, StepReport, total_steps
from moc_cli.training.environment import describe_environment
from moc_cli.training.interrupt import Interrupt, Interrupted
from moc_cli.training.log import MetricsLog, require_trackers
from moc_cli.training.loop import fit
from moc_cli.training.memory import peak_kind
from moc_cli.training.resume import check_facts, check_recipe, make_identity


@dataclass(frozen=True)
class Finished:
    """A finished run and what results.json holds."""

    folder: RunFolder
    results: dict[str, Any]
    counts: Counts
    outcome: Outcome


class Session:
    """One call of `moc train`; remarks go to `say`, unless `silent` and not a warning."""

    def __init__(
        self, recipe: Recipe, *, call: Call, say: Callable[[str], None], silent: bool = False
    ) -> None:
        self.recipe = recipe
        self.call = call
        self.again = f"{call.command} --resume auto"
        self.warn = say
        self.say = (lambda text: None) if silent else say
        self.silent = silent
        self.interrupt = Interrupt()
        self.trained = False
        self.remarks: list[str] = []

    def run(self, *, resume: str | None = None, overwrite: bool = False) -> Finished:
        """Train from the start or from a checkpoint (`auto`, or its path), and score.

        Raises MocError for what the user can mend, Interrupted after a signal.
        """
        recipe = self.recipe
        require_trackers(recipe.output.report_to)
        self.folder = RunFolder.claim(
            recipe.output.output_dir,
            call=self.call,
            resume=resume is not None,
            overwrite=overwrite,
        )
        with self.folder:
            self.checkpoints = Checkpoints(self.folder.checkpoints, recipe.output.save_total_limit)
            self.recipe, self.rows = build.read_rows(recipe)
            self.snapshot = self.find_checkpoint(resume) if resume else None
            self.prepare()
            self.open_folder()
            with self.interrupt:
                try:
                    return self.train_and_score()
                except Interrupted as stop:
                    raise self.explained(stop) from None
                except FileError as error:
                    hint = f"make room or mend the disk, then: {self.again}"
                    raise FileError(error.message, error.hint or hint) from error

    def find_checkpoint(self, resume: str) -> Snapshot | None:
        """Return the checkpoint to go on from; None where `auto` finds none.

        Raises RunError when it is damaged, or when the recipe became another one.
        """
        if resume != "auto":
            path: Path = Path(resume)
            snapshot = read_checkpoint(path)
        else:
            found = self.checkpoints.newest(self.warn)
            if found is None:
                self.say(f"no checkpoint in {self.folder.path}: starting from the first step")
                return None
            path, snapshot = found
        self.remarks = check_recipe(
            snapshot.identity["recipe"], self.recipe.model_dump(mode="json")
        )
        self.say(words.columns("resume", f"{path}, step {snapshot.counters.step}"))
        return snapshot

    # Everything that can be wrong is found here, before a file is touched.

    def prepare(self) -> None:
        """Make device, rows, tokenizer, model and data; check them against the checkpoint."""
        recipe, data = self.recipe, self.recipe.data
        self.accelerator = build.make_accelerator(
            recipe.launch, recipe.output.report_to, self.folder.trackers
        )
        self.device = self.accelerator.device
        self.say(words.columns("device", words.device(self.device)))
        self.tokenizer = build.make_tokenizer(recipe.model)
        self.kind = make_kind(data)
        self.kind.check(self.rows.all_examples, self.tokenizer)
        self.built = build.build(recipe, self.device)
        self.adapted = self.built.adapted
        self.say(words.columns("model", words.model(self.built)))
        self.say(words.columns("method", words.method(recipe.method.name, self.adapted.counts())))
        self.encoded = self.kind.encode(
            self.rows.train,
            self.tokenizer,
            max_length=data.max_length,
            train_on_inputs=data.train_on_inputs,
        )
        self.data = build.make_data(
            self.kind,
            self.encoded,
            self.tokenizer,
            batch_size=recipe.train.per_device_train_batch_size,
            seed=recipe.seed,
            group_by_length=recipe.train.group_by_length,
        )
        self.say(words.columns("data", words.rows(self.rows, self.encoded, data.max_length)))
        self.scoring = build.make_scoring_options(recipe)
        named = self.adapted.named_trainables()
        self.identity = make_identity(
            recipe.model_dump(mode="json"),
            weights=self.built.weights_hash,
            data=self.rows.fingerprints(),
            trainables={name: list(parameter.shape) for name, parameter in named.items()},
            threads=torch.get_num_threads(),
        )
        if self.snapshot is not None:
            self.remarks += check_facts(self.snapshot.identity, self.identity)
        for remark in self.remarks:
            self.warn(f"changed: {remark}")

    def open_folder(self) -> None:
        """Begin the run folder, or go on in it; checkpoints beyond the resumed one step aside."""
        snapshot, fresh = self.snapshot, self.snapshot is None
        history = [] if fresh else self.folder.history()
        self.known_before = {} if fresh else self.folder.scores_before()
        self.folder.begin(dump(self.recipe), fresh=fresh)
        if snapshot is not None:
            for path in self.checkpoints.set_aside_after(snapshot.counters.step):
                self.warn(f"moved a later checkpoint to {path}")
        self.folder.write_environment(
            describe_environment(
                self.device,
                model=self.recipe.model.model_name_or_path,
                revision=self.recipe.model.revision,
                weights=self.built.weights_hash,
                data=self.rows.fingerprints(),
            )
            | {
                "history": [
                    *history,
                    {
                        "started": datetime.now(UTC).isoformat(timespec="seconds"),
                        "from_step": snapshot.counters.step if snapshot else 0,
                        "changed": self.remarks,
                    },
                ]
            }
        )

    def train_and_score(self) -> Finished:
        """Score, train, keep the best controls, score again, and write the results."""
        before = self.known_before
        if self.recipe.eval.before and not before:
            before = {name: scored.values for name, scored in self.score("before").items()}
        self.folder.write_results({"format": FORMAT, "status": "running", "before": before})
        outcome = self.fit()
        self.trained = True
        chosen = self.keep_controls(outcome)
        recorder = self.adapted.recorder(detailed=False)
        with recorder or nullcontext():
            after = self.score("after")
        routing = {} if recorder is None else recorder.record().summary()
        results = self.results(outcome, after, before) | {"controls": chosen, "routing": routing}
        self.folder.write_results(results)
        return Finished(self.folder, results, self.adapted.counts(), outcome)

    def fit(self) -> Outcome:
        """Run the loop under a progress bar."""
        settings = build.make_settings(self.recipe)
        log = MetricsLog(self.folder.metrics, build.start_trackers(self.accelerator, self.recipe))
        bar = TrainProgress(
            total_steps(settings, self.data.batches),
            silent=self.silent,
            every=settings.logging_steps,
            memory_kind=peak_kind(self.device),
        )
        self.step = self.snapshot.counters.step if self.snapshot else 0

        def observe(report: StepReport) -> None:
            self.step = report.step
            bar.observe_step(report)

        try:
            with bar:
                return fit(
                    self.adapted,
                    self.data,
                    settings,
                    accelerator=self.accelerator,
                    checkpoints=self.checkpoints,
                    log=log,
                    identity=self.identity,
                    evaluate=self.watch if settings.eval_strategy != "no" else None,
                    resume=self.snapshot,
                    interrupt=self.interrupt,
                    observe=observe,
                    command=self.again,
                )
        finally:
            if log.track is not None:
                self.accelerator.end_training()

    def watch(self) -> dict[str, float]:
        """Evaluate in the middle of training; a signal stops it."""
        values = self.kind.watch(
            self.adapted,
            self.tokenizer,
            self.rows.validation,
            self.scoring,
            lambda *_: self.interrupt.check(),
        )
        self.say(words.watched(self.step, values))
        return values

    def score(self, label: str) -> dict[str, Evaluation]:
        """Score every task; a signal stops it."""
        scores = {}
        for name, examples in self.rows.tests.items():
            with WorkProgress(f"{label} {name}", len(examples), silent=self.silent) as bar:

                def progress(done: int, total: int, bar: WorkProgress = bar) -> None:
                    bar.observe(done, total)
                    self.interrupt.check()

                scores[name] = self.kind.score(
                    self.adapted, self.tokenizer, examples, self.scoring, progress
                )
        return scores

    def keep_controls(self, outcome: Outcome) -> dict[str, Any]:
        """Save the best checkpoint's controls, or the last ones, and say which."""
        step, name = outcome.counters.step, "last"
        best = outcome.counters.best_step
        if best is not None and best not in self.checkpoints.steps():
            # It lies in the folder of the run that this one was continued from.
            self.warn(f"the best step, {best}, has no checkpoint here: keeping the last controls")
        elif best is not None:
            name = f"best {build.make_settings(self.recipe).metric}"
            if best != step:
                self.adapted.load_state(read_checkpoint(self.checkpoints.path(best)).trainables)
                step = best
        config = self.adapted.adapter_config() | {
            **build.base_facts(self.recipe, self.built),
            "step": step,
        }
        self.folder.save_controls(config, save(self.adapted.state(), {"format": "pt"}))
        return {"step": step, "chosen": name}

    def results(
        self,
        outcome: Outcome,
        after: dict[str, Evaluation],
        before: dict[str, dict[str, float]],
    ) -> dict[str, Any]:
        """Return what results.json holds, but for controls and routing."""
        recipe, counters, counts = self.recipe, outcome.counters, self.adapted.counts()
        return {
            "format": FORMAT,
            "status": "finished",
            "tasks": {
                name: scored.entry("before", before.get(name)) for name, scored in after.items()
            },
            "average": average(list(after.values())),
            "protocol": self.scoring.protocol,
            "train_on_inputs": recipe.data.train_on_inputs,
            "stopped": outcome.stopped,
            "steps": counters.step,
            "epochs": outcome.epochs,
            "examples": counters.examples,
            "tokens": counters.tokens,
            "seconds": counters.seconds,
            "padding_share": outcome.padding_share,
            "truncated": self.encoded.truncated,
            "answerless": self.encoded.answerless,
            "parameters": {
                "adapter": counts.adapter,
                "modules": counts.modules,
                "base": counts.base,
                "share": counts.share,
            },
            "memory": outcome.memory,
            **self.rows.facts,
            **self.kind.facts,
        }

    def explained(self, stop: Interrupted) -> Interrupted:
        """Return the interruption with what was kept and how to go on."""
        if stop.hint is not None:
            return stop
        kept = "training is done and kept" if self.trained else "stopped before the first step"
        return Interrupted(
            stop.number,
            f"{kept}; scoring was stopped",
            f"continue with: {self.again}",
        )
