"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere, nothing if silent.

with TrainProgress(total, memory_kind="peak resident") as bar:
    fit(..., observe=bar.observe)
"""

import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, Self

from moc_cli.report.tables import duration, size

WINDOW = 20  # steps that the shown loss, speed and time left are means of


class Step(Protocol):
    """A step just done; examples, tokens and seconds count from the start of the run."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def examples(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def memory(self) -> int: ...


class _Line:
    """One live line on a terminal, or plain lines every `every` counts, or silence."""

    def __init__(self, label: str, total: int, *, silent: bool, every: int) -> None:
        self.label, self.total, self.silent = label, total, silent
        self.every = max(1, every)
        self.live: Any = None
        self.task: Any = None

    def __enter__(self) -> Self:
        if not self.silent and sys.stderr.isatty():
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def _start(self) -> None:
        from rich.console import RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        from moc_cli.report.output import err

        class TwoLines(Progress):
            """The bar, and what is known below it: side by side they do not fit 80 columns."""

            def get_renderables(self) -> Iterable[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    yield Text(f"  {task.fields['facts']}", no_wrap=True, overflow="ellipsis")

        self.live = TwoLines(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            console=err(),
            expand=False,
        )
        self.task = self.live.add_task(self.label, total=self.total, facts="")
        self.live.start()

    def show(self, done: int, facts: str) -> None:
        """Show `done` of the total, with what is known about it."""
        if self.live is not None:
            self.live.update(self.task, completed=done, total=self.total, facts=facts)
        elif not self.silent and (done % self.every == 0 or done >= self.total):
            print(f"{self.label} {done}/{self.total}  {facts}", file=sys.stderr, flush=True)


class TrainProgress(_Line):
    """Loss, examples and tokens per second, time left and memory, over the last steps."""

    def __init__(
        self,
        total_steps: int,
        *,
        label: str = "train",
        silent: bool = False,
        every: int = 10,
        memory_kind: str = "",
    ) -> None:
        super().__init__(label, total_steps, silent=silent, every=every)
        self.memory_kind = memory_kind
        self._seen: deque[tuple[int, int, int, float]] = deque(maxlen=WINDOW + 1)
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def observe(self, report: Step) -> None:
        """Show a step just done; made for the loop's `observe`."""
        self.update(
            step=report.step,
            loss=report.loss,
            examples=report.examples,
            tokens=report.tokens,
            seconds=report.seconds,
            memory=report.memory,
        )

    def update(
        self, *, step: int, loss: float, examples: int, tokens: int, seconds: float, memory: int
    ) -> None:
        """Show a step just done; counts and seconds are those of the run so far."""
        if not self._seen and step == 1:
            self._seen.append((0, 0, 0, 0.0))
        self._seen.append((step, examples, tokens, seconds))
        self._losses.append(loss)
        self.show(step, self._facts(memory))

    def _facts(self, memory: int) -> str:
        first, last = self._seen[0], self._seen[-1]
        facts = [f"loss {sum(self._losses) / len(self._losses):.4f}"]
        elapsed = last[3] - first[3]
        if elapsed > 0 and last[0] > first[0]:
            facts.append(f"{(last[1] - first[1]) / elapsed:,.1f} examples/s")
            facts.append(f"{(last[2] - first[2]) / elapsed:,.0f} tokens/s")
            left = (self.total - last[0]) * elapsed / (last[0] - first[0])
            facts.append(f"{duration(left)} left")
        facts.append(f"{size(memory)} {self.memory_kind}".strip())
        return "  ".join(facts)


class WorkProgress(_Line):
    """A plain count of work done, with the time left: scoring, tokenising."""

    def __init__(self, label: str, total: int, *, silent: bool = False) -> None:
        super().__init__(label, total, silent=silent, every=-(-total // 4) if total else 1)
        self._started = time.monotonic()
        self._told = 0

    def observe(self, done: int, total: int | None = None) -> None:
        """Show that `done` of the work is done."""
        self.total = self.total if total is None else total
        elapsed = time.monotonic() - self._started
        left = elapsed * (self.total - done) / done if done else 0.0
        facts = f"{duration(left)} left" if done < self.total else f"{duration(elapsed)}"
        if self.live is not None:
            self.show(done, facts)
        elif done // self.every > self._told or done >= self.total:
            # Batches need not hit the round counts: a line whenever one has been passed.
            self._told = done // self.every
            self._line(done, facts)

    def _line(self, done: int, facts: str) -> None:
        if not self.silent:
            print(f"{self.label} {done}/{self.total}  {facts}", file=sys.stderr, flush=True)
