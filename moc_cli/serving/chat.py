"""A conversation on the terminal: each message is answered after all messages before it.

Each answer is computed again from the complete conversation, so that all of it votes for the route.
With a template for single questions, each message is answered on its own.
"""

from collections.abc import Callable

from moc_cli.errors import DataError
from moc_cli.serving.prompts import SINGLE, Message
from moc_cli.serving.text import GeneratedText, Writer

HELP = "/reset clears the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


class Chat:
    """A conversation; `texts` are the user's and the model's messages in turn.

    `read` returns the user's next line and raises EOFError at the end; `write` gets answers as they
    come, `say` gets notes beside them.
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
        self.texts: list[str] = []
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
                self.texts.clear()
                self._say("cleared")
            elif line.startswith("/"):
                self._say(f"no command {line.split()[0]}: {HELP}")
            elif line:
                self._reply(line)

    def _reply(self, line: str) -> None:
        """Answer one line; one that fails or is stopped does not enter the conversation."""
        past = [] if self.writer.frame in SINGLE else self.texts
        messages = self.writer.messages(*past, line)
        try:
            answer = self._answer("", messages, base=False)
            if self.base:
                self._answer("base: ", messages, base=True)
        except DataError as error:
            self._say(f"{error.message}; /reset starts over" if past else error.message)
        except KeyboardInterrupt:
            self._write("\n")
            self._say("stopped; this message is left out of the conversation")
        else:
            self.texts += [line, answer.text]

    def _answer(self, label: str, messages: list[Message], *, base: bool) -> GeneratedText:
        self._write(label)
        answer = self.writer.answer(messages, self._write, base=base)
        self._write("\n")
        return answer
