"""The one training loop: windows of micro-batches, clipping, AdamW, logs, evaluations, checkpoints.

A window is what one optimizer step sees: up to n micro-batches of one epoch, in all processes. Its
loss is the sum of its tokens' losses (for classification its rows' losses) over their number in the
whole window, so that neither the split into micro-batches, nor that into processes, nor a short
last window changes a gradient.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from moc_cli.data.packing import count_tokens
from moc_cli.methods import Adapted
from moc_cli.processes import Processes, current
from moc_cli.training import memory, optim, rng
from moc_cli.training.best import out_of_patience, update_best
from moc_cli.training.checkpoint import Checkpoints, Counters, Snapshot
from moc_cli.training.compiled import compiled_layers
from moc_cli.training.gradients import Gradients
from moc_cli.training.interrupt import Interrupt, Interrupted
from moc_cli.training.log import MEASURED, MetricsLog
from moc_cli.training.loop_types import (
    Data,
    Evaluate,
    Outcome,
    Settings,
    StepReport,
    total_steps,
    warmup_steps,
)
from moc_cli.training.step_errors import refusal
from moc_cli.training.windows import Windows


class Loop:
    """One training of `adapted`, in place.

    `identity` goes into every checkpoint. `evaluate` returns named values; it runs in evaluation
    mode, without gradients, and leaves no trace in the random numbers. `command` continues the run.
    Several processes do the same, but for their shares of the micro-batches; the first one writes.
    """

    def __init__(
        self,
        adapted: Adapted,
        data: Data,
        settings: Settings,
        *,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        log: MetricsLog,
        identity: dict[str, Any] | None = None,
        evaluate: Evaluate | None = None,
        interrupt: Interrupt | None = None,
        command: str = "moc train RECIPE --resume auto",
        processes: Processes | None = None,
    ) -> None:
        self.adapted, self.data, self.settings = adapted, data, settings
        self.accelerator, self.checkpoints, self.log = accelerator, checkpoints, log
        self.identity, self.scorer = identity or {}, evaluate
        self.interrupt, self.command = interrupt or Interrupt(), command
        self.processes = processes or current()
        self.device, self.model = accelerator.device, adapted.model
        self.windows = Windows(data.collate, pin=self.device.type == "cuda")
        self.gradients = Gradients(adapted, data, settings, accelerator, self.processes)
        self.named = adapted.named_trainables()
        self.recorder = adapted.recorder(detailed=False)  # of choices since the last log line
        self.optimizer = optim.make_optimizer(adapted, settings)
        self.stepper = accelerator.prepare_optimizer(self.optimizer)
        self.total = total_steps(settings, data.batches)
        self.warmup = warmup_steps(settings, self.total)
        self.counters = Counters()
        self.peaks = memory.Peaks(self.device)
        self.grad_norm = 0.0
        self.saved_step: int | None = None
        self.last_rank = 0  # who had the last micro-batch of the step

    def run(
        self,
        *,
        resume: Snapshot | None = None,
        observe: Callable[[StepReport], None] | None = None,
    ) -> Outcome:
        """Train from the first step or from a checkpoint.

        Raises Interrupted after a signal and MocError at a loss that is not finite, both with a
        checkpoint of the last good state; FileError when the disk is full.
        """
        with compiled_layers(self.model, self.settings.torch_compile):
            self.begin(resume)
            while not self.finished():
                report = self.train_step()
                if observe is not None:
                    observe(report)
                self.after_step()
        return self.outcome()

    # Beginning and end

    def begin(self, resume: Snapshot | None) -> None:
        """Seed the run, or put everything back to where a checkpoint left it."""
        memory.reset_peak(self.device)
        lines = resume.counters.log_lines if resume else 0
        self.processes.on_main(lambda: self.log.keep(lines))
        if resume is None:
            rng.seed_everything(self.settings.seed)
        else:
            self.counters = replace(resume.counters)
            self.adapted.load_state(resume.trainables)
            optim.load_optimizer_tensors(self.optimizer, self.named, resume.optimizer)
            if self.recorder is not None and self.counters.choices is not None:
                self.recorder.resume(self.counters.choices)
            rng.restore(resume.rng)
            self.saved_step = self.counters.step
        self.plan = self.data.batches.epoch(self.counters.epoch)
        self.marked = replace(self.counters)
        self.model.train()
        if self.evaluation_due():  # a signal came before this step's evaluation was done
            self.evaluate_and_save()

    def finished(self) -> bool:
        """Return whether all steps are done or patience has run out."""
        return self.last() or out_of_patience(self.counters, self.settings.patience)

    def last(self) -> bool:
        """Return whether all steps are done."""
        return self.counters.step >= self.total

    def outcome(self) -> Outcome:
        """Describe the finished run."""
        counters = self.counters
        model, optimizer = self.adapted.model, optim.state_bytes(self.optimizer)
        used = memory.measure(model, self.named.values(), optimizer, self.peaks, self.processes)
        return Outcome(
            stopped="finished" if self.last() else "early",
            counters=counters,
            epochs=self.epoch(),
            padding_share=1.0 - counters.tokens / max(1, counters.positions),
            memory=used,
        )

    def epoch(self) -> float:
        """Return epochs done, with the fraction of the running one."""
        return round(self.counters.epoch + self.counters.batch / max(1, len(self.plan)), 6)

    # One step

    def train_step(self) -> StepReport:
        """Take one window, update the trainables, and count.

        Raises MocError, with nothing updated and the state kept, when a loss or the gradient is not
        finite, and when the window does not fit in memory.
        """
        started, random_state = time.perf_counter(), rng.capture()
        if self.recorder is not None:
            self.recorder.mark()
        first, n = self.counters.batch, self.settings.window
        window = self.plan[first : first + n]
        batches = self.windows.take(window)
        total = self.gradients.of_window(
            batches,
            (self.counters.epoch, first),
            signal=self.interrupt.received,
            after_forward=self.count_choices,
            meanwhile=lambda: self.windows.ahead(self.plan[first + n : first + 2 * n]),
        )
        self.grad_norm = total.norm
        if self.interrupt.signal is None:
            self.interrupt.signal = total.signal
        self.last_rank = (len(batches) - 1) % self.processes.world
        if not (total.fits and total.finite):
            self.keep(random_state)
            place = self.counters, len(self.plan)
            raise self.processes.reported_by_main(
                refusal(
                    total, window, batches, place, self.settings, self.command, self.checkpoints
                )
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate_factor(self.counters.step)
        self.stepper.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = sum(total.losses)
        self.count(window, batches, value)
        self.counters.seconds += time.perf_counter() - started
        return self.report(value)

    def count_choices(self) -> None:
        """Count what the last forward chose: what processes choose together, in the first alone."""
        counts = self.processes.main or not self.settings.routing_sync
        if self.recorder is not None and counts:
            self.recorder.count()

    def keep(self, random_state: dict[str, Tensor]) -> None:
        """Write a checkpoint of the state before a step that was not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.recorder is not None:
            self.recorder.rewind()
        self.save(random_state)

    def rate_factor(self, step: int) -> float:
        """Return the part of the peak rates that the step after `step` done ones has."""
        kind = self.settings.lr_scheduler_type
        return optim.rate_factor(step, kind=kind, total=self.total, warmup=self.warmup)

    def count(
        self, window: list[list[int]], batches: list[dict[str, Tensor]], value: float
    ) -> None:
        """Add one step to the counters; at an epoch's end turn to the next one."""
        c = self.counters
        c.step += 1
        c.batch += len(window)
        c.examples += sum(map(len, window))
        c.tokens += sum(map(count_tokens, batches))
        c.positions += sum(batch["input_ids"].numel() for batch in batches)
        c.loss_sum += value
        c.loss_steps += 1
        if c.batch >= len(self.plan):
            c.epoch, c.batch = c.epoch + 1, 0
            self.plan = self.data.batches.epoch(c.epoch)

    def report(self, value: float) -> StepReport:
        """Return what an observer sees of the step just done."""
        c = self.counters
        return StepReport(c.step, value, c.examples, c.tokens, c.seconds, self.peaks.training)

    # Between two steps

    def after_step(self) -> None:
        """Log, evaluate and save what is due; answer a signal.

        Raises Interrupted, with a checkpoint of this step on the disk.
        """
        if self.counters.step % self.settings.logging_steps == 0 or self.last():
            self.write_line()
        self.evaluate_and_save()

    def evaluate_and_save(self) -> None:
        """Evaluate and save what is due, as `after_step` says."""
        improved = False
        if self.evaluation_due() and self.interrupt.signal is None:
            try:
                improved = self.evaluate()
            except Interrupted as stop:
                self.interrupt.signal = stop.number
        if self.finished() and self.counters.loss_steps:  # early, between two lines
            self.write_line()
        due = self.due(self.settings.save_strategy, self.settings.save_steps)
        if improved or due or self.finished():
            self.save()
        if self.interrupt.signal is not None:
            if self.saved_step != self.counters.step:
                self.save()
            raise Interrupted(
                self.interrupt.signal,
                f"stopped after step {self.counters.step} of {self.total}; "
                f"the state is in {self.checkpoints.path(self.counters.step)}",
                f"continue with: {self.command}",
            )

    def evaluation_due(self) -> bool:
        """Return whether this step asks for an evaluation that it has not had."""
        c = self.counters
        if self.scorer is None or c.step in (0, c.evaluated_step):
            return False
        return self.due(self.settings.eval_strategy, self.settings.eval_steps)

    def due(self, strategy: str, steps: int | None) -> bool:
        """Return whether `strategy` names this step; the last step counts unless it is `no`."""
        if strategy == "epoch":
            return self.counters.batch == 0 or self.last()
        return strategy == "steps" and (self.counters.step % (steps or 1) == 0 or self.last())

    def evaluate(self) -> bool:
        """Evaluate, log, and return whether this is the best so far."""
        assert self.scorer is not None
        random_state, started = rng.capture(), time.perf_counter()
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.peaks.evaluating():
                values = self.scorer()
        finally:
            self.model.train()
            rng.restore(random_state)
        measured = {"seconds": time.perf_counter() - started, "memory": self.peaks.evaluation}
        improved = update_best(self.counters, values, self.settings.metric)
        record = {"step": self.counters.step, "epoch": self.epoch(), "eval": values}
        self.write(record | {"best": improved, MEASURED: measured})
        return improved

    def write(self, record: dict[str, Any]) -> None:
        """Write one line of the log."""
        self.processes.on_main(lambda: self.log.write(record))

    def write_line(self) -> None:
        """Write the means since the last line, and start new ones."""
        c, mark = self.counters, self.marked
        seconds = max(c.seconds - mark.seconds, 1e-9)
        record: dict[str, Any] = {
            "step": c.step,
            "epoch": self.epoch(),
            "loss": c.loss_sum / max(1, c.loss_steps),
            "balance_loss": self.balance_loss(),
            "lr": self.settings.learning_rate * self.rate_factor(c.step - 1),
            "grad_norm": self.grad_norm,
            "examples": c.examples,
            "tokens": c.tokens,
        }
        measured = {
            "seconds": c.seconds,
            "examples_per_second": (c.examples - mark.examples) / seconds,
            "tokens_per_second": (c.tokens - mark.tokens) / seconds,
            "memory": self.peaks.training,
        }
        if self.recorder is not None:
            record["routing"] = self.recorder.record(reset=True).use()
        self.write(record | {MEASURED: measured})
        c.loss_sum, c.loss_steps = 0.0, 0
        self.marked = replace(c)

    def balance_loss(self) -> float | None:
        """Return that of the last micro-batch of the step."""
        return self.processes.gather(self.adapted.balance_loss())[self.last_rank]

    def save(self, random_state: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint of this step, with the random state of now or the one given."""
        if self.recorder is not None:
            self.counters.choices = self.recorder.record().choices()
        self.processes.on_main(lambda: self.write_checkpoint(random_state or rng.capture()))
        self.saved_step = self.counters.step

    def write_checkpoint(self, random_state: dict[str, Tensor]) -> None:
        """Write a checkpoint, once the lines that it counts on are on the disk."""
        self.log.flush()
        self.counters.log_lines = self.log.lines
        self.checkpoints.save(
            Snapshot(
                counters=replace(self.counters),
                trainables=self.adapted.state(),
                optimizer=optim.optimizer_tensors(self.optimizer, self.named),
                rng=random_state,
                identity=self.identity,
            )
        )
