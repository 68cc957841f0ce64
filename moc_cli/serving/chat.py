"""A conversation on the terminal: what was said is given to the model again with every turn.

Every turn is computed anew from the whole conversation, so that a route is voted by all of it. In
the frames that know single questions only, every turn stands alone.
"""

from collections.abc import Callable

from moc_cli.errors import DataError
from moc_cli.serving.prompts import SINGLE
from moc_cli.serving.text import Answer, Writer

HELP = "/reset forgets what was said, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


class Chat:
    """The turns of a conversation.

    `read` returns a line of the user's and raises EOFError at the end; `write` takes text as it
    comes; `say` takes remarks.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        read: Callable[[], str],
        write: Callable[[str], None],
        say: Callable[[str], None],
        base: bool = False,
    ) -> None:
        self.writer, self.base = writer, base
        self.said: list[str] = []
        self._read, self._write, self._say = read, write, say

    def run(self) -> None:
        """Answer line after line, until /exit, the end of the input, or Ctrl-C while it waits."""
        self._say(HELP)
        while True:
            try:
                line = self._read().strip()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self.said.clear()
                self._say("forgotten")
            elif line.startswith("/"):
                self._say(f"no command {line.split()[0]}: {HELP}")
            elif line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        """Answer one line; a turn that fails or is stopped leaves no trace in the conversation."""
        past = [] if self.writer.frame in SINGLE else self.said
        turns = self.writer.turns(*past, line)
        try:
            answer = self._answer("", turns, base=False)
            if self.base:
                self._answer("base: ", turns, base=True)
        except DataError as error:
            self._say(f"{error.message}; /reset begins anew" if past else error.message)
        except KeyboardInterrupt:
            self._write("\n")
            self._say("stopped; this turn is forgotten")
        else:
            self.said += [line, answer.text]

    def _answer(self, label: str, turns: list, *, base: bool) -> Answer:
        self._write(label)
        answer = self.writer.answer(turns, self._write, base=base)
        self._write("\n")
        return answer
