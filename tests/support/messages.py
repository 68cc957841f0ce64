"""The wording of refusals and warnings, frozen in one table: tests/frozen/messages.yaml.

    with refused(MocError):
        load("nowhere")

compares the whole text with what the table holds for the running test: its first message with the
first text, and so on. `pytest --write-messages PATH ...` writes the texts of the tests that it runs
again, and drops those of tests that are gone. Processes that a test forks keep `match=`.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from support.machine import ROOT

TABLE = ROOT / "tests" / "frozen" / "messages.yaml"
WRITE = "--write-messages"


class Messages:
    """What is frozen, as the texts of each test, and what the running test has said."""

    def __init__(self, table: Path) -> None:
        files = yaml.safe_load(table.read_text(encoding="utf-8"))
        self.frozen = {
            f"{file}::{name}": files[file][name] for file in files for name in files[file]
        }
        self.collected: set[str] = set()  # with all parameters of each
        self.temporary = ""
        self.write = False
        self.test = ""
        self.texts: list[str] = []

    def start(self, test: str) -> None:
        self.test, self.texts = test, []

    def add(self, text: str) -> None:
        """Compare the next text of the running test; the same text once more is one with it."""
        text = re.sub(re.escape(self.temporary) + r"/[\w-]+", "<tmp>", text)
        text = text.replace(str(ROOT), "<repository>")
        if self.texts[-1:] == [text]:
            return
        frozen = self.frozen.get(self.test, [])[len(self.texts) :]
        self.texts.append(text)
        if not self.write:
            assert frozen, f"this is not frozen; see pytest {WRITE}: {text}"
            assert text == frozen[0], f"another text is frozen; see pytest {WRITE}"

    def finish(self) -> None:
        """The running test has passed: it has said all that is frozen for it."""
        if self.write:
            self.frozen[self.test] = self.texts
        unsaid = self.frozen.get(self.test, [])[len(self.texts) :]
        assert not unsaid, f"this is frozen and was not said; see pytest {WRITE}: {unsaid}"

    def stale(self) -> list[str]:
        """Return the names that are frozen and of no test: of no function, or of no parameters."""
        collected = {name.partition("[")[0] for name in self.collected}
        return [name for name in self.frozen if self._is_stale(name, collected)]

    def _is_stale(self, name: str, collected: set[str]) -> bool:
        function = name.partition("[")[0]
        if function in collected:
            return name not in self.collected
        path, *_, title = function.split("::")
        return not (ROOT / path).exists() or f"def {title}(" not in (ROOT / path).read_text()

    def dump(self) -> str:
        """Return the table, sorted, without stale entries."""
        files: dict[str, dict[str, list[_Block]]] = {}
        for test in self.frozen.keys() - self.stale():
            file, _, name = test.partition("::")
            if texts := self.frozen[test]:
                files.setdefault(file, {})[name] = [_Block(text) for text in texts]
        return yaml.dump(files, Dumper=_Dumper, width=10**6, allow_unicode=True)


class _Block(str):
    """A text that stands in the table as it is, without quotes."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)

messages = Messages(TABLE)


@contextmanager
def refused(
    error: type[Exception], **elsewhere: str
) -> Iterator["pytest.ExceptionInfo[Exception]"]:
    """Expect `error`, with exactly the message and the hint that are frozen for this test.

    `elsewhere` names what a library says, or what depends on the machine, as regular expressions:
    with `reason="ZeroDivisionError: .*"` that part must be there, and is `<reason>` in the table.
    """
    with pytest.raises(error) as caught:
        yield caught
    hint = getattr(caught.value, "hint", None)
    messages.add(_hidden(str(caught.value) + (f"\nHint: {hint}" if hint else ""), elsewhere))


@contextmanager
def warned(category: type[Warning], **elsewhere: str) -> Iterator[None]:
    """Expect warnings of `category` and of one text, exactly that which is frozen for this test."""
    with pytest.warns(category) as caught:
        yield
    (text,) = {str(warning.message) for warning in caught if issubclass(warning.category, category)}
    messages.add(_hidden(text, elsewhere))


def _hidden(text: str, elsewhere: dict[str, str]) -> str:
    for name, pattern in elsewhere.items():
        text, count = re.subn(pattern, f"<{name}>", text)
        assert count, f"no {name} like {pattern!r} in: {text}"
    return text


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(WRITE, action="store_true", help="freeze the messages of the tests that run")


def pytest_configure(config: pytest.Config) -> None:
    messages.write = config.getoption(WRITE)
    if messages.write and config.getoption("numprocesses", None):
        raise pytest.UsageError(f"{WRITE} is for one process: -n 0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not any("[" in argument for argument in config.args):
        messages.collected = {item.nodeid for item in items}


@pytest.fixture(scope="session", autouse=True)
def _folder_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    messages.temporary = str(tmp_path_factory.getbasetemp())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    messages.start(item.nodeid)
    result = yield
    messages.finish()
    return result


def pytest_sessionfinish() -> None:
    if messages.write:
        TABLE.write_text(messages.dump(), encoding="utf-8")
