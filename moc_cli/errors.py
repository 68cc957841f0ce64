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


class MocError(Exception):
    """Message: where, what was found, what is allowed. Hint: what to do next, or None."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["MocError"], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)


class RecipeError(MocError):
    """The recipe or an override is wrong; the message holds one line per mistake."""


class FamilyError(MocError):
    """The model's architecture, or a place named in it, is not known."""


class DataError(MocError):
    """Examples are missing, malformed or out of reach."""


class RunError(MocError):
    """A run folder is missing, occupied or inconsistent."""


class FileError(MocError):
    """The disk refused a read or a write."""
