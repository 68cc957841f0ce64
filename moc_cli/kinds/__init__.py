"""A kind of task is an object: how its rows are encoded, trained on, scored and shown.

    Choice       questions with options: the commonsense suite and the builtin one
    Pairs        one text or two with a class or a score: GLUE, custom classification and regression
    Instruction  custom instructions with an output
    Writing      custom conversations
    PlainText    custom texts without a prompt

What can be said without torch (protocols, prompt frames, metrics to watch) is in `recipe.tasks`.
"""

from moc_cli.errors import DataError
from moc_cli.kinds.choice import Choice
from moc_cli.kinds.instruction import Instruction
from moc_cli.kinds.kind import Kind
from moc_cli.kinds.pairs import Pairs
from moc_cli.kinds.writing import PlainText, Writing
from moc_cli.recipe.tasks import UNKNOWN, Task

__all__ = ["KINDS", "Choice", "Instruction", "Kind", "Pairs", "PlainText", "Writing", "make_kind"]

# The class of each kind in `recipe.tasks`.
KINDS: dict[str, type[Kind]] = {
    "choice": Choice,
    "classification": Pairs,
    "regression": Pairs,
    "instruction": Instruction,
    "chat": Writing,
    "text": PlainText,
}


def make_kind(task: Task) -> Kind:
    """Return the kind of a task, as `data.task` of a recipe names it.

    Raises DataError where the rows of a custom dataset have to be read first to know it.
    """
    if task is UNKNOWN:
        raise DataError("data.format is known only when the rows are read")
    return KINDS[task.kind.name].of(task)
