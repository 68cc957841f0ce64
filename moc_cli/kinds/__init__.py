"""A kind of task is an object: how its rows are encoded, trained on, scored and shown.

    Choice    questions with options: the commonsense suite and the builtin one
    Pairs     one text or two with a class or a score: GLUE, custom classification and regression
    Writing   texts to be written: custom instruction, chat and plain text

What can be said without torch (protocols, prompt frames, metrics to watch) is in `recipe.tasks`.
"""

from moc_cli.errors import DataError
from moc_cli.kinds.choice import Choice
from moc_cli.kinds.kind import Kind
from moc_cli.kinds.pairs import Pairs
from moc_cli.kinds.writing import Writing
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.tasks import FORMATS, TASKS, kind_of

__all__ = ["Choice", "Kind", "Pairs", "Writing", "make_kind"]


def make_kind(data: DataSection) -> Kind:
    """Return the kind of the tasks that a recipe names.

    Raises DataError where the rows of a custom dataset have to be read first to know it.
    """
    name = kind_of(data.suite, data.tasks[0], data.format)
    if name is None:
        raise DataError("data.format is known only when the rows are read")
    if name == "choice":
        return Choice()
    if data.suite != "custom":
        task = TASKS[data.suite][data.tasks[0]]
        return Pairs(task.metrics, task.num_labels, task.labels)
    assert data.format is not None
    if name == "writing":
        return Writing(data.format, data.frame == "chat")
    if name == "regression":
        return Pairs(FORMATS[data.format].metrics, 1)
    return Pairs(FORMATS[data.format].metrics, len(data.labels or ()), data.labels)
