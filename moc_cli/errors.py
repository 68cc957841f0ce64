"""The errors a user can cause.

    MocError
    ├── RecipeError   the YAML file or an override is wrong
    ├── FamilyError   the model is one we cannot place controls in
    ├── DataError     examples are missing or malformed
    ├── RunError      a run folder is missing, occupied or inconsistent
    └── FileError     the disk refused a read or a write

The command line turns each into one sentence and a hint, with exit code 2. Anything else is a bug
and keeps its traceback.
"""

import errno
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


class MocError(Exception):
    """Message: where, what was found, what is allowed. Hint: what to do next, or None."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: where it stands (file:line or the override), the key, and why."""

    place: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.message) if part)


class RecipeError(MocError):
    """The recipe or an override is wrong; the message holds one line per mistake."""

    def __init__(
        self, message: str, hint: str | None = None, problems: tuple[Problem, ...] = ()
    ) -> None:
        super().__init__(message, hint)
        self.problems = problems

    @classmethod
    def of(cls, problems: Iterable[Problem], hint: str | None = None) -> "RecipeError":
        """Return the error of these mistakes."""
        problems = tuple(problems)
        return cls("\n".join(map(str, problems)), hint, problems)


class FamilyError(MocError):
    """The model's architecture, or a place named in it, is not known."""


class DataError(MocError):
    """Examples are missing, malformed or out of reach."""


class RunError(MocError):
    """A run folder is missing, occupied or inconsistent."""


class FileError(MocError):
    """The disk refused a read or a write."""

    @property
    def disk_is_full(self) -> bool:
        """Whether the reason is want of space, or of the user's share of it.

        The system's own words tell: an error of another process, or of a library, is text alone.
        """
        return self.message.endswith(tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT))))


def compare_entries(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """Say which tensors are missing, unexpected or of another shape, at most five; "" if none."""
    wrong = [f"missing '{name}'" for name in expected.keys() - found.keys()]
    wrong += [f"unexpected '{name[:80]}'" for name in found.keys() - expected.keys()]
    wrong += [
        f"'{name}' has shape {str(found[name])[:60]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    and_more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return "; ".join(sorted(wrong)[:5]) + and_more


def system_reason(error: BaseException) -> str | None:
    """Say why the system refused something, as in "No space left on device"; None if it did not.

    Libraries written in Rust have errors of their own, which end in the system's number.
    """
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    number = re.search(r"\(os error (\d{1,4})\)", str(error))
    return os.strerror(int(number[1])) if number else None


def explain_system(error: OSError) -> FileError:
    """Return what the system refused as an error of ours, with the file where it is known."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if not names and isinstance(error, FileNotFoundError):
        return FileError("the working directory is gone", "go to another folder first")
    return FileError(f"{' -> '.join(names) or 'the system'}: {system_reason(error)}")


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or else the name of its error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
