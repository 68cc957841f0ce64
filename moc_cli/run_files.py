"""The small files of a run folder, each read through one shape.

A run folder may be damaged, or come from a stranger: whatever its files hold, reading them gives
values of the shape, or a RunError that names the file and the key. Keys beyond a shape are let
through as they are.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from moc_cli.errors import FileError, RunError, system_reason
from moc_cli.results import read_results

LARGEST = 2**31  # bytes
NAMED = 4  # mistakes of a file that an error names

Whole = Annotated[int, Field(ge=0, lt=2**63)]
Plain = bool | int | float | str | None


def absent() -> Any:
    """Return the default of a key that may be absent, but not null."""
    return Field(default=None)


class Shape(BaseModel):
    """What a file, or a part of one, holds."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())


class ScoreEntry(Shape):
    """One metric; `before` and `base` are those of the model without the method."""

    value: float | None
    stderr: float | None
    majority: float | None
    n: Whole
    before: float | None = None
    base: float | None = None


class TaskEntry(Shape):
    """A scored task."""

    metric: str
    metrics: dict[str, ScoreEntry]
    rows: Whole = absent()
    limited: bool = absent()
    rows_sha256: str = absent()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.metric not in self.metrics:
            raise ValueError(f"no numbers of its metric {self.metric[:40]!r}")
        if self.limited and self.rows is None:
            raise ValueError("it is 'limited' and lacks 'rows'")
        return self


class Pool(Shape):
    """What the sites of a pool chose."""

    controls: list[str]
    use: list[float]
    dead: list[str]
    local_share: float
    decisions: Whole

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.use) != len(self.controls):
            raise ValueError("'use' and 'controls' differ in length")
        return self


class RoutingSummary(Shape):
    """The routing of the final scoring, by pool."""

    pools: dict[str, Pool] = absent()


class MemoryFacts(Shape):
    """Bytes, and what the peak measures."""

    peak: Whole
    kind: str


class ParameterCounts(Shape):
    """Numbers of parameters; the method's as a share of the base's."""

    adapter: Whole
    modules: Whole
    base: Whole
    share: float


class Running(Shape):
    """results.json until the run has finished; `before` holds tasks not scored since."""

    status: str = absent()
    before: dict[str, dict[str, float | None]] = absent()
    controls: dict[str, Plain] = absent()


class Finished(Running):
    """results.json of a finished run."""

    tasks: dict[str, TaskEntry]
    average: float | None = None
    protocol: str
    train_on_inputs: bool
    steps: Whole
    stopped: str
    tokens: Whole
    seconds: float
    memory: MemoryFacts
    parameters: ParameterCounts = absent()
    routing: RoutingSummary = absent()


class Evaluated(Shape):
    """results.json of `moc eval`."""

    tasks: dict[str, TaskEntry]
    protocol: str
    limit: Whole | None = None
    samples_sha256: str = absent()
    controls_sha256: str | None = None


class Sample(Shape):
    """A line of samples.jsonl."""

    model_config = ConfigDict(allow_inf_nan=True)

    task: str
    row: int | str
    prompt: str
    label: Plain = None
    correct: bool | None = None
    loss: float | None = None
    tokens: Whole | None = None


class MetricsLine(Shape):
    """A line of metrics.jsonl."""

    step: Whole
    epoch: float = absent()
    loss: float | None = None
    eval: dict[str, float | None] = absent()


class BaseFacts(Shape):
    """The base model of a run."""

    name: str
    weights_sha256: str
    tensors: dict[str, str] = absent()


class Part(Shape):
    """Rows of one part of the data; the prompts' template is a part without rows."""

    rows: Whole = absent()
    sha256: str


class Device(Shape):
    """What computed."""

    kind: str
    name: str
    threads: Whole | None = None


class Environment(Shape):
    """environment.json."""

    model: BaseFacts = absent()
    tokenizer: dict[str, str | None] = absent()
    data: dict[str, Part] = absent()
    device: Device = absent()
    versions: dict[str, str | None] = absent()
    history: list[dict[str, Any]] = absent()

    @field_validator("data")
    @classmethod
    def _rows_are_counted(cls, data: dict[str, Part]) -> dict[str, Part]:
        for name, part in data.items():
            if part.rows is None and name != "template":
                raise ValueError(f"part {name[:40]!r} lacks 'rows'")
        return data


class Compared(Shape):
    """comparison.json."""

    runs: list[dict[str, Any]]
    resamples: Whole


class Benched(Shape):
    """bench.json."""

    methods: dict[str, Any]
    measured: str
    repeats: Whole


class RoutingJson(Shape):
    """routing.json."""

    run: str
    sites: list[Any]
    warnings: list[dict[str, Any]]


def read_object(path: Path, shape: type) -> dict[str, Any]:
    """Return the JSON object in a file; raises RunError unless it has the shape."""
    return parse(read_bytes(path), shape, str(path))


def read_lines(path: Path, shape: type) -> list[dict[str, Any]]:
    """Return the JSON object in each line; a last line that was cut off is left out.

    Raises RunError naming the first line that has not the shape.
    """
    lines = read_bytes(path).split(b"\n")[:-1]
    return [parse(line, shape, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def read_training(path: Path) -> dict[str, Any]:
    """Return the results.json of a training, in format 2 whichever it has."""
    results = _in_format_2(path)
    shape = Finished if results.get("status") == "finished" else Running
    return parse(json.dumps(results).encode(), shape, str(path))


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the results.json of `moc eval`, in format 2 whichever it has."""
    return parse(json.dumps(_in_format_2(path)).encode(), Evaluated, str(path))


def check_own(
    folder: Path, record: str, shape: type, other_files: Iterable[str], *, command: str
) -> None:
    """Raise FileError where a command would replace files of a folder that it did not write.

    `record` is its JSON file: where that has the shape, the `other_files` are the command's too.
    """
    present = [name for name in (record, *other_files) if os.path.lexists(folder / name)]
    if not present:
        return
    try:
        read_object(folder / record, shape)
    except RunError as error:
        raise FileError(
            f"{folder / present[0]} is damaged or was not written by `{command}`, and would be "
            "overwritten",
            "remove it, or give another folder: --output-dir DIR",
        ) from error


def read_base_tensors(path: Path) -> dict[str, str]:
    """Return the base's tensors from an environment.json; {} where it does not say them."""
    with contextlib.suppress(RunError):
        tensors: dict[str, str] = read_object(path, Environment).get("model", {}).get("tensors", {})
        return tensors
    return {}


def read_bytes(path: Path, largest: int | None = LARGEST) -> bytes:
    """Return the content of a regular file; raises RunError where it cannot be read."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(os.open(path, flags), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise RunError(f"{path} cannot be read: it is no regular file")
            if largest is not None and state.st_size > largest:
                raise RunError(f"{path} cannot be read: it is larger than {largest} bytes")
            return file.read()
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist", "has the run finished?") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {system_reason(error)}") from error


def parse(content: bytes, shape: type, source: str) -> dict[str, Any]:
    """Return a JSON object as it is; raises RunError unless it has the shape."""
    try:
        _adapter(shape).validate_json(content, strict=True)
        value: dict[str, Any] = from_json(content)  # twice as fast as json's own
    except ValidationError as error:
        raise RunError(f"{source} cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{source} cannot be read: not JSON: {str(error)[:80]}") from error
    return value


def _in_format_2(path: Path) -> dict[str, Any]:
    try:
        return read_results(read_object(path, dict[str, Any]))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}") from error


@cache
def _adapter(shape: type) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _reason(error: ValidationError) -> str:
    """Say what is wrong with the first keys: which are missing, and what the others hold."""
    details = error.errors(include_url=False, include_input=False)
    lacking = [_key(detail) for detail in details if detail["type"] == "missing"]
    reasons = [f"it lacks {', '.join(lacking[:NAMED])}"] if lacking else []
    for detail in details:
        if not detail["loc"]:
            is_json = detail["type"] != "json_invalid"
            return "not a JSON object" if is_json else f"not JSON: {detail['msg'][:120]}"
        if detail["type"] != "missing":
            message = detail["msg"].removeprefix("Value error, ")
            reasons.append(f"{_key(detail)}: {message[:1].lower()}{message[1:]}")
    return "; ".join(dict.fromkeys(reasons[: NAMED + 1]))


def _key(detail: Mapping[str, Any]) -> str:
    return ".".join(str(part)[:60] for part in detail["loc"])
