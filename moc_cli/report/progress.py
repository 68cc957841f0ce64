"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere, nothing if silent.

with TrainProgress(total_steps, memory_kind="peak resident") as bar:
    loop.run(observe=bar.observe_step)
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moc_cli.report import output
from moc_cli.report.numbers import byte_size, duration

if TYPE_CHECKING:
    from moc_cli.training.loop_types import StepReport

WINDOW = 20  # steps over which the shown loss and speeds are means


class _BarWithFacts(Progress):
    """A bar with its facts on a second line: one line of 80 columns cannot hold both."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["facts"]:
                yield Text(f"  {task.fields['facts']}", no_wrap=True, overflow="ellipsis")


class WorkProgress:
    """Progress of work such as scoring: how much is done, and the time left.

    Without a terminal a line is printed each time that `interval` more are done; by default a
    quarter. `clock` returns seconds.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        silent: bool = False,
        interval: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plain = not silent and not sys.stderr.isatty()
        self._interval = max(1, math.ceil(total / 4) if interval is None else interval)
        self._lines = 0
        self._live = _BarWithFacts(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=output.err(),
            disable=silent or self._plain,
            redirect_stdout=False,  # stdout may be a file or a pipe of results
            get_time=clock,
            speed_estimate_period=math.inf,  # a step may take longer than rich's 30 seconds
        )
        self._live.add_task(label, total=total, facts="")
        (self._task,) = self._live.tasks

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def observe(self, done: int, total: int | None = None, facts: str = "") -> None:
        """Show that `done` of the work is finished, and facts about it; `total` if it changed."""
        task = self._task
        self._live.update(task.id, completed=done, total=total, facts=facts)
        if self._plain and (done // self._interval > self._lines or task.finished):
            # Batches need not end at a multiple of `interval`: a line whenever one has been passed.
            self._lines = done // self._interval
            columns = [f"{task.description} {done}/{task.total:.0f}", facts]
            if task.finished:
                columns.append(f"in {duration(task.elapsed or 0)}")
            elif (remaining := task.time_remaining) is not None:
                columns.append(f"{duration(remaining)} left")
            output.say("  ".join(filter(None, columns)))


class TrainProgress(WorkProgress):
    """Loss and speed over the last steps, memory, and the time left by the run's own clock."""

    def __init__(
        self, total_steps: int, *, silent: bool = False, interval: int = 10, memory_kind: str = ""
    ) -> None:
        self._steps: deque[StepReport] = deque(maxlen=WINDOW)
        super().__init__(
            "train", total_steps, silent=silent, interval=interval, clock=self._seconds
        )
        self._memory_kind = memory_kind

    def _seconds(self) -> float:
        return self._steps[-1].seconds if self._steps else 0.0

    def observe_step(self, step: "StepReport") -> None:
        """Show a finished step; made for the loop's `observe`."""
        self._steps.append(step)
        first = self._steps[0]
        facts = [f"loss {sum(report.loss for report in self._steps) / len(self._steps):.4f}"]
        if seconds := step.seconds - first.seconds:
            facts.append(f"{(step.examples - first.examples) / seconds:,.1f} examples/s")
            facts.append(f"{(step.tokens - first.tokens) / seconds:,.0f} tokens/s")
        facts.append(f"{byte_size(step.memory)} {self._memory_kind}".strip())
        self.observe(step.step, facts="  ".join(facts))
