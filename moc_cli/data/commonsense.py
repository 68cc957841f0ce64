"""The eight commonsense tasks: rows of the hub, or LLM-Adapters' four fields, to examples.

The instructions are those of LLM-Adapters, byte for byte, whichever of the two they come from.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

from moc_cli.data.examples import ANSWER, ChoiceExample
from moc_cli.data.prompts import eval_prompt, train_prompt
from moc_cli.data.source import BadRow, Fields, take
from moc_cli.recipe.tasks import TASKS

QUESTION = "Please choose the correct answer to the question: "
_FORMAT = re.compile(r"Answer format: (\S+)$")


def _boolq(row: Fields) -> tuple[str, list[str], int]:
    question, right = take(row, "question", str), take(row, "answer", bool)
    instruction = (
        "Please answer the following question with true or false, "
        f"question: {question}?\n\nAnswer format: true/false"
    )
    return instruction, ["true", "false"], 0 if right else 1


def _piqa(row: Fields) -> tuple[str, list[str], int]:
    options = [take(row, "sol1", str), take(row, "sol2", str)]
    request = f"Please choose the correct solution to the question: {take(row, 'goal', str)}"
    instruction, option_words = _with_options(request, options, "solution", between="\n\n")
    return instruction, option_words, _position(row, "label", ["0", "1"])


def _social_i_qa(row: Fields) -> tuple[str, list[str], int]:
    options = [take(row, f"answer{letter}", str) for letter in "ABC"]
    request = f"{QUESTION}{take(row, 'context', str)} {take(row, 'question', str)}"
    instruction, option_words = _with_options(request, options, "answer")
    return instruction, option_words, _position(row, "label", ["1", "2", "3"])


def _hellaswag(row: Fields) -> tuple[str, list[str], int]:
    endings = take(row, "endings", list)
    request = (
        "Please choose the correct ending to complete the given sentence: "
        f"{take(row, 'activity_label', str)}: {take(row, 'ctx', str)}"
    )
    instruction, option_words = _with_options(request, endings, "ending")
    return instruction, option_words, _position(row, "label", ["0", "1", "2", "3"])


def _winogrande(row: Fields) -> tuple[str, list[str], int]:
    options = [take(row, "option1", str), take(row, "option2", str)]
    request = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{take(row, 'sentence', str)}"
    )
    instruction, option_words = _with_options(request, options, "option", before_format=" ")
    return instruction, option_words, _position(row, "answer", ["1", "2"])


def _lettered(row: Fields, question: str = "question") -> tuple[str, list[str], int]:
    choices = take(row, "choices", dict)
    options = take(choices, "text", list)
    instruction, option_words = _with_options(
        f"{QUESTION}{take(row, question, str)}", options, "answer"
    )
    return instruction, option_words, _position(row, "answerKey", take(choices, "label", list))


def _with_options(
    request: str, options: list[str], stem: str, *, between: str = " ", before_format: str = "\n\n"
) -> tuple[str, list[str]]:
    """Return the request with `Stem1: option Stem2: option`, and the words stem1, stem2."""
    option_words = [f"{stem}{number}" for number in range(1, len(options) + 1)]
    pairs = zip(option_words, options, strict=True)
    listed = between.join(f"{word.capitalize()}: {option}" for word, option in pairs)
    answer_format = f"Answer format: {'/'.join(option_words)}"
    return f"{request}\n\n{listed}{before_format}{answer_format}", option_words


def _position(row: Fields, name: str, names: Sequence[str]) -> int:
    """The place of the label among its possible values, which the hub spells as text or number."""
    label = str(row.get(name, "")).strip()
    if label not in names:
        raise BadRow(f"'{name}' is {label!r}, not one of {', '.join(names)}")
    return list(names).index(label)


# How a raw row of the hub becomes (instruction, option words, number of the right one).
BUILD: dict[str, Callable[[Fields], tuple[str, list[str], int]]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "social_i_qa": _social_i_qa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "ARC-Easy": _lettered,
    "ARC-Challenge": _lettered,
    "openbookqa": partial(_lettered, question="question_stem"),
}


def from_hub(task: str, row: Fields) -> ChoiceExample:
    """The example of a raw row of the hub; raises BadRow."""
    instruction, option_words, label = BUILD[task](row)
    return make_example(task, instruction, option_words, label)


def from_fields(task: str, row: Fields) -> ChoiceExample:
    """The example of a row of LLM-Adapters' four fields; raises BadRow.

    The options are what the instruction's last line names, and the answer must be among them.
    """
    last_line = _FORMAT.search(take(row, "instruction", str))
    if not last_line:
        raise BadRow("'instruction' does not end in 'Answer format: ' and the options")
    option_words = last_line[1].split("/")
    expected = list(TASKS["commonsense"][task].answers)
    stem = expected[0].rstrip("1")
    if stem != expected[0]:  # numbered words: a row may have more or fewer options than most
        expected = [f"{stem}{n}" for n in range(1, len(option_words) + 1)]
    if option_words != expected:
        raise BadRow(f"the options are '{last_line[1]}', not like '{'/'.join(expected)}'")
    return answered(task, row, option_words)


def from_options(task: str, row: Fields) -> ChoiceExample:
    """The example of a row that lists its own options in `candidates`; raises BadRow."""
    option_words = take(row, "candidates", list)
    all_texts = all(isinstance(word, str) for word in option_words)
    if not all_texts or len(set(option_words)) < len(option_words):
        raise BadRow("'candidates' is not a list of different texts")
    return answered(task, row, option_words)


def answered(task: str, row: Fields, option_words: list[str]) -> ChoiceExample:
    """The example of a row's four fields whose options are `option_words`; raises BadRow."""
    answer = take(row, "answer", str)
    if row.get("input"):
        raise BadRow("'input' is not empty")
    if answer not in option_words:
        raise BadRow(f"'answer' is {answer!r}, not one of {', '.join(option_words)}")
    if take(row, "output", str) != ANSWER + answer:
        raise BadRow(f"'output' is not '{ANSWER}' and the answer")
    return make_example(
        task, take(row, "instruction", str), option_words, option_words.index(answer)
    )


def make_example(task: str, instruction: str, option_words: list[str], label: int) -> ChoiceExample:
    """Put an instruction and its options into both templates; raises BadRow."""
    if len(option_words) < 2:
        raise BadRow("fewer than two options")
    prompt = train_prompt(instruction)
    candidates = tuple(ANSWER + word for word in option_words)
    return ChoiceExample(
        task, prompt + candidates[label], len(prompt), eval_prompt(instruction), candidates, label
    )
