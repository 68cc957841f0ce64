"""The answer in a generated text, by the rule of LLM-Adapters: its first option word.

The rule is taken as it is: capitals count, parts of longer words count, and of several answers the
first counts even where the text takes it back.
"""

import re
from collections.abc import Sequence

from moc_cli.recipe.tasks import TASKS

RESPONSE = "### Response:"


def response(completion: str) -> str:
    """Return what is read of a completion: all before a second response begins, stripped."""
    return completion.split(RESPONSE)[0].strip()


def extract(task: str, output: str, options: Sequence[str]) -> str | None:
    """Return the first option word in `output`, or None where there is none.

    A commonsense task has its words whatever this row offers, so that the answer may be none of
    its `options`. Elsewhere the row's own options are looked for, the longest first where several
    begin at one place.
    """
    commonsense_task = TASKS["commonsense"].get(task)
    answers = (
        commonsense_task.answers if commonsense_task else sorted(options, key=len, reverse=True)
    )
    match = re.search("|".join(map(re.escape, answers)), output)
    return match[0] if match else None
