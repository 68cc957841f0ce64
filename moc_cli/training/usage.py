"""The use of controls while a run trains: counted in every step, written with every log line."""

from typing import Any

from moc_cli.methods.route_counts import Recorder

Choices = list[list[int]]  # of each site: how often it chose each control


class Usage:
    """Choices since the last log line; without a recorder, of a method without a gate, nothing.

    `count` follows each forward of a training.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder

    def count(self) -> None:
        """Add the choices of the forward that has just ended."""
        if self._recorder is not None:
            self._recorder.count()

    def line(self) -> dict[str, Any]:
        """What a log line says of the choices since the last one, which are forgotten then."""
        if self._recorder is None:
            return {}
        return {"routing": self._recorder.record(reset=True).use()}

    def state(self) -> Choices | None:
        """The choices since the last line, for a checkpoint; None where there are none."""
        return None if self._recorder is None else self._recorder.record().choices()

    def resume(self, choices: Choices | None) -> None:
        """Go on from a checkpoint's state."""
        if self._recorder is not None and choices is not None:
            self._recorder.resume(choices)

    def mark(self) -> None:
        """Remember the state before a step."""
        if self._recorder is not None:
            self._recorder.mark()

    def rewind(self) -> None:
        """Forget the step that was not taken."""
        if self._recorder is not None:
            self._recorder.rewind()
