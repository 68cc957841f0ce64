"""The answer in a generated text, by the rule of LLM-Adapters: its first option word.

The rule is taken as it is: capitals count, parts of longer words count, and of several answers the
first counts even where the text takes it back.
"""

import re
from collections.abc import Sequence

RESPONSE = "### Response:"
_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
PATTERNS = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": _ANSWERS,
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
    "ARC-Easy": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "openbookqa": _ANSWERS,
}


def response(completion: str) -> str:
    """Return what is read of a completion: all before a second response begins, stripped."""
    return completion.split(RESPONSE)[0].strip()


def extract(task: str, output: str, options: Sequence[str]) -> str | None:
    """Return the first option word in `output`, or None where there is none.

    A commonsense task has its words whatever this row offers, so that the answer may be none of
    its `options`. Elsewhere the row's own options are looked for, the longest first where several
    begin at one place.
    """
    own = (re.escape(word) for word in sorted(options, key=len, reverse=True))
    found = re.search(PATTERNS.get(task) or "|".join(own), output)
    return found[0] if found else None
