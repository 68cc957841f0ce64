"""The one training loop: windows of micro-batches, clipping, AdamW, logs, evaluations, checkpoints.

A window is what one optimizer step sees: up to n micro-batches of one epoch. Its loss is the sum of
its tokens' losses (for classification its rows' losses) over their number in the whole window, so
that neither the split into micro-batches nor a short last window changes a gradient.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from moc_cli.data.packing import count_tokens
from moc_cli.methods import Adapted
from moc_cli.scoring.batch_size import is_out_of_memory
from moc_cli.training import loss, memory, optim, rng
from moc_cli.training.best import out_of_patience, update_best
from moc_cli.training.checkpoint import Checkpoints, Counters, Snapshot
from moc_cli.training.compiled import compiled_layers
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
from moc_cli.training.step_errors import may_split, not_finite, out_of_memory
from moc_cli.training.usage import Usage
from moc_cli.training.windows import Windows


class Loop:
    """One training of `adapted`, in place.

    `identity` goes into every checkpoint. `evaluate` returns named values; it runs in evaluation
    mode, without gradients, and leaves no trace in the random numbers. `command` continues the run.
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
    ) -> None:
        self.adapted, self.data, self.settings = adapted, data, settings
        self.accelerator, self.checkpoints, self.log = accelerator, checkpoints, log
        self.identity, self.scorer = identity or {}, evaluate
        self.interrupt, self.command = interrupt or Interrupt(), command
        self.device = accelerator.device
        self.model = accelerator.prepare_model(adapted.model)
        self.windows = Windows(data.collate, pin=self.device.type == "cuda")
        self.loss = loss.TaskLoss(self.model, data.kind, self.device)
        self.named = adapted.named_trainables()
        self.usage = Usage(adapted.recorder(detailed=False, training=True))
        self.optimizer = optim.make_optimizer(adapted, settings)
        self.stepper = accelerator.prepare_optimizer(self.optimizer)
        self.total = total_steps(settings, data.batches)
        self.warmup = warmup_steps(settings, self.total)
        self.counters = Counters()
        self.peaks = memory.Peaks(self.device)
        self.grad_norm = 0.0
        self.saved_step: int | None = None

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
        with self.usage, compiled_layers(self.model, self.settings.torch_compile):
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
        self.peaks.begin()
        if resume is None:
            self.log.keep(0)
            rng.seed_everything(self.settings.seed)
        else:
            self.counters = replace(resume.counters)
            self.adapted.load_state(resume.trainables)
            optim.load_optimizer_tensors(self.optimizer, self.named, resume.optimizer)
            self.log.keep(self.counters.log_lines)
            self.usage.resume(resume.counters.choices)
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
        frozen = [p for p in self.adapted.model.parameters() if not p.requires_grad]
        return Outcome(
            stopped="finished" if self.last() else "early",
            total=self.total,
            counters=counters,
            epochs=self.epoch(),
            padding_share=1.0 - counters.tokens / max(1, counters.positions),
            memory=memory.Memory(
                weights=memory.tensor_bytes(frozen),
                trainable=memory.tensor_bytes(self.named.values()),
                optimizer=optim.state_bytes(self.optimizer),
                peak=self.peaks.training,
                kind=memory.peak_kind(self.device),
                evaluation_peak=self.peaks.evaluation,
            ),
            checkpoint=self.checkpoints.path(counters.step),
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
        started, before = time.perf_counter(), rng.capture()
        self.usage.mark()
        first, n = self.counters.batch, self.settings.gradient_accumulation_steps
        window = self.plan[first : first + n]
        batches = self.windows.take(window)
        short = False
        try:
            values = self.gradients(batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            short = True  # what the error holds in memory is free after this block
        if short:
            self.keep(before)
            splits = may_split(self.counters.batch, self.settings.group_by_length)
            raise out_of_memory(batches, self.settings, self.command, splits=splits)
        if not all(map(math.isfinite, [*values, self.grad_norm])):
            self.keep(before)
            c, rate = self.counters, self.settings.learning_rate / 3
            place = c.step, c.epoch, c.batch, len(self.plan)
            again = f"{self.command} --set train.learning_rate={rate:.2g}"
            raise not_finite(values, self.grad_norm, window, place=place, again=again)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate_factor(self.counters.step)
        self.stepper.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count(window, batches, sum(values))
        self.counters.seconds += time.perf_counter() - started
        return self.report(sum(values))

    def gradients(self, batches: list[dict[str, Tensor]]) -> list[float]:
        """Add the gradients of a window and clip them; return each micro-batch's loss."""
        targets = max(1, sum(loss.count_targets(b["labels"], self.data.kind) for b in batches))
        self.adapted.set_loss_scale(1.0 / len(batches))
        losses = [self.backward(batch, targets) for batch in batches]
        limit = self.settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), limit)
        after = self.counters.batch + len(batches)
        self.windows.ahead(self.plan[after : after + self.settings.gradient_accumulation_steps])
        # The step's only wait for the device: all that decides whether it may be taken.
        *values, self.grad_norm = torch.stack([*losses, norm.to(losses[0])]).tolist()
        return values

    def keep(self, random_state: dict[str, Tensor]) -> None:
        """Write a checkpoint of the state before a step that was not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        self.usage.rewind()
        self.save(random_state)

    def backward(self, batch: dict[str, Tensor], targets: int) -> Tensor:
        """Add the gradient of one micro-batch; return its share of the window's loss."""
        value = self.loss(batch, targets)
        self.accelerator.backward(value)
        return value.detach().float()

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
        counted = c.examples, c.tokens, c.seconds
        return StepReport(c.step, self.total, self.epoch(), value, *counted, self.peaks.training)

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
        before, started = rng.capture(), time.perf_counter()
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.peaks.evaluating():
                values = self.scorer()
        finally:
            self.model.train()
            rng.restore(before)
        improved = update_best(self.counters, values, self.settings.metric)
        record = {"step": self.counters.step, "epoch": self.epoch(), "eval": values}
        seconds = time.perf_counter() - started
        measured = {MEASURED: {"seconds": seconds, "memory": self.peaks.evaluation}}
        self.log.write(record | {"best": improved} | measured)
        return improved

    def write_line(self) -> None:
        """Write the means since the last line, and start new ones."""
        c, mark = self.counters, self.marked
        seconds = max(c.seconds - mark.seconds, 1e-9)
        record = {
            "step": c.step,
            "epoch": self.epoch(),
            "loss": c.loss_sum / max(1, c.loss_steps),
            "balance_loss": self.adapted.balance_loss(),
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
        self.log.write(record | self.usage.line() | {MEASURED: measured})
        c.loss_sum, c.loss_steps = 0.0, 0
        self.marked = replace(c)

    def save(self, random_state: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint of this step, with the random state of now or the one given."""
        self.log.flush()
        self.counters.log_lines = self.log.lines
        self.counters.choices = self.usage.state()
        self.checkpoints.save(
            Snapshot(
                counters=replace(self.counters),
                trainables=self.adapted.state(),
                optimizer=optim.optimizer_tensors(self.optimizer, self.named),
                rng=random_state or rng.capture(),
                identity=self.identity,
            )
        )
        self.saved_step = self.counters.step
