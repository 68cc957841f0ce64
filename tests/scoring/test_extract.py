"""Answers found in generated texts: outputs as models write them, judged by the protocol's rule.

The rule: the text up to a second `### Response:`, stripped; in it the first place where an option
word of the task stands, in lower case, be it inside a longer word. Nothing else counts. What is
expected below follows from that sentence, not from the code.
"""

import pytest

from moc_cli.recipe.tasks import TASKS
from moc_cli.scoring.extract import extract, response

NONE = None
THINKING = "<think>Let me see. The question asks about tails.</think>"
GOLDEN: list[tuple[str, str, str | None]] = [
    # As trained
    ("boolq", "the correct answer is true", "true"),
    ("boolq", "the correct answer is false", "false"),
    ("piqa", "the correct answer is solution2", "solution2"),
    ("social_i_qa", "the correct answer is answer3", "answer3"),
    ("hellaswag", "the correct answer is ending4", "ending4"),
    ("winogrande", "the correct answer is option1", "option1"),
    ("ARC-Easy", "the correct answer is answer5", "answer5"),
    ("ARC-Challenge", "the correct answer is answer1", "answer1"),
    ("openbookqa", "the correct answer is answer4", "answer4"),
    # Nothing, or nothing to find
    ("boolq", "", NONE),
    ("piqa", " \n\n\t ", NONE),
    ("winogrande", "I'm sorry, but I cannot help with that.", NONE),
    ("openbookqa", "the correct answer is", NONE),
    ("hellaswag", "\u00a0\u200b", NONE),
    ("ARC-Easy", "1", NONE),
    ("ARC-Easy", "B", NONE),
    ("boolq", "yes", NONE),
    ("boolq", "No, it is not.", NONE),
    # Capitals are other words
    ("boolq", "True", NONE),
    ("boolq", "FALSE.", NONE),
    ("piqa", "Solution1", NONE),
    ("social_i_qa", "Answer2: he felt proud", NONE),
    ("winogrande", "OPTION2", NONE),
    ("boolq", "True, the correct answer is false", "false"),
    ("openbookqa", "Answer1: wind Answer2: sun\nthe correct answer is answer2", "answer2"),
    # Of two answers the first, also where it is taken back or only quoted
    ("boolq", "true or false? false", "true"),
    ("boolq", "It is not true, it is false.", "true"),
    ("piqa", "solution2, because solution1 would melt", "solution2"),
    ("social_i_qa", "answer1 is wrong; answer3", "answer1"),
    ("hellaswag", "Answer format: ending1/ending2/ending3/ending4\n ending3", "ending1"),
    ("winogrande", "option2 option1", "option2"),
    ("ARC-Challenge", "either answer4 or answer2", "answer4"),
    # Words of another task, or of no task
    ("piqa", "the correct answer is option1", NONE),
    ("winogrande", "the correct answer is solution2", NONE),
    ("boolq", "the correct answer is answer1", NONE),
    ("hellaswag", "the correct answer is answer2", NONE),
    ("piqa", "the correct answer is solution3", NONE),
    ("winogrande", "the correct answer is option3", NONE),
    ("hellaswag", "the correct answer is ending5", NONE),
    ("ARC-Easy", "the correct answer is answer6", NONE),
    ("openbookqa", "the correct answer is answer0", NONE),
    ("piqa", "the correct solution is 2", NONE),
    ("winogrande", "option 1", NONE),
    ("hellaswag", "ending_2", NONE),
    ("social_i_qa", "answer-2", NONE),
    ("openbookqa", "the correct answer is answer two", NONE),
    # A word of the task that this row does not offer is an answer all the same
    ("social_i_qa", "the correct answer is answer4", "answer4"),
    ("openbookqa", "the correct answer is answer5", "answer5"),
    # Inside longer words and numbers
    ("piqa", "solution12", "solution1"),
    ("openbookqa", "answer10", "answer1"),
    ("openbookqa", "answer34 answer2", "answer3"),
    ("boolq", "untrue", "true"),
    ("boolq", "That is a falsehood.", "false"),
    ("boolq", "trueish", "true"),
    ("winogrande", "option1option2", "option1"),
    ("hellaswag", "mending2", "ending2"),
    ("hellaswag", "[ending3]", "ending3"),
    ("ARC-Easy", "**answer2**", "answer2"),
    ("ARC-Easy", '"answer3".', "answer3"),
    ("piqa", "the correct answer is\\boxed{solution2}", "solution2"),
    # Cut off, or run on
    ("boolq", "the correct answer is fals", NONE),
    ("boolq", "the correct answer is tru", NONE),
    ("piqa", "the correct answer is solution", NONE),
    ("social_i_qa", "the correct answer is answ", NONE),
    ("openbookqa", "the correct answer is answer", NONE),
    ("hellaswag", "the correct answer is ending2 the correct answer is ending1 the cor", "ending2"),
    ("winogrande", "option2option2option2option2opti", "option2"),
    # Lines, blanks and marks of the end
    ("boolq", "\n\n   true\n", "true"),
    ("piqa", "the correct answer is\nsolution1", "solution1"),
    ("piqa", "solution\n1", NONE),
    ("ARC-Easy", "\tanswer4\r\n", "answer4"),
    ("boolq", "the correct answer is false</s>", "false"),
    ("boolq", "false<|im_end|>\n<|im_start|>user\ntrue?", "false"),
    ("openbookqa", "<|endoftext|>", NONE),
    ("social_i_qa", "answer2</s>answer1", "answer2"),
    # Another turn written by itself
    ("boolq", "I do not know.\n### Response:\ntrue", NONE),
    ("piqa", "solution1\n\n                ### Response:\n                solution2", "solution1"),
    ("winogrande", "### Response: option1", NONE),
    ("ARC-Easy", "### Instruction:\nChoose.\n answer3", "answer3"),
    ("boolq", "### response: true", "true"),
    # Talk around it
    ("boolq", f"{THINKING} true", "true"),
    ("boolq", "The passage says that it's true that dogs have tails, so: false", "true"),
    ("winogrande", "Answer: option2 (the trophy)", "option2"),
    ("hellaswag", "Ending3: pours the milk. So ending3.", "ending3"),
    ("openbookqa", "das ist answer2 \u2714", "answer2"),
    ("openbookqa", "\u7b54\u6848\u662fanswer3\u3002", "answer3"),
    ("piqa", "\uff53olution1", NONE),
]
OPTIONS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "ARC-Challenge": ["answer1", "answer2", "answer3", "answer4"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}


def test_the_table_is_large_and_covers_every_task() -> None:
    assert len(GOLDEN) == len(set(GOLDEN)) >= 60
    assert {task for task, *_ in GOLDEN} == set(TASKS["commonsense"]) == set(OPTIONS)


@pytest.mark.parametrize(("task", "output", "expected"), GOLDEN)
def test_the_first_option_word_counts(task: str, output: str, expected: str | None) -> None:
    assert extract(task, response(output), OPTIONS[task]) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("  true \n", "true"),
        ("", ""),
        ("a ### Response: b ### Response: c", "a"),
        ("### Response:", ""),
        ("###Response: b", "###Response: b"),
    ],
)
def test_a_second_response_is_not_read(completion: str, expected: str) -> None:
    assert response(completion) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("the correct answer is harp", "harp"),
        ("harpsichord", "harpsichord"),
        ("a harpist", "harp"),
        ("Harp", None),
        ("c++ (or so)", "c++ (or so)"),
        ("c+", None),
    ],
)
def test_other_tasks_look_for_the_rows_own_options(output: str, expected: str | None) -> None:
    """The longest where several begin at one place; their marks are no patterns."""
    assert extract("world", output, ["harp", "harpsichord", "c++ (or so)"]) == expected
