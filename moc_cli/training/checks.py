"""What recipe, rows, tokenizer and model must have in common, asked before weights load.

Only shapes and the config of the model are read, so that it may lie on the meta device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli import processes
from moc_cli.data.custom.chat import answer_ends
from moc_cli.data.encode import Encoded, has_target
from moc_cli.data.examples import Example
from moc_cli.data.source import BadRow, BadRows
from moc_cli.data.splits import Splits, TaskRows
from moc_cli.errors import DataError
from moc_cli.kinds import Kind
from moc_cli.methods import TextModel
from moc_cli.models.families import FAMILIES
from moc_cli.models.tokens import match_tokens, max_positions, token_problems
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.sections import DataSection
from moc_cli.report.output import say
from moc_cli.scoring.results import ScoringOptions

# Why rows are left out, after "3 with ".
TOO_LONG = "more tokens than the model takes"
NO_ANSWER = "no answer left within data.max_length"


def match(
    data: DataSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Give model and tokenizer the same padding and end tokens; say what was taken for what."""
    if data.frame != "chat":
        return match_tokens(model, tokenizer)
    ends = answer_ends(tokenizer)
    notes = match_tokens(model, tokenizer, ends)
    if tokenizer.chat_template and not ends:
        notes.append(
            "the chat template ends an answer with no token of its own: a generation goes on to "
            "its limit"
        )
    return notes


def problems(
    data: DataSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
) -> list[str]:
    """Name all that the model cannot take: more tokens than positions, tokens unknown to it."""
    limit = max_positions(model)
    positions = []
    if limit is not None and data.max_length > limit:
        positions = [f"data.max_length {data.max_length}, the model takes {limit}"]
    return positions + token_problems(model, tokenizer, rows)


def leave_out_long(
    kind: Kind,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    options: ScoringOptions,
) -> tuple[Splits, list[str]]:
    """Return the splits without scored rows that are too long for the model, and lines that name
    these rows; they are counted as dropped.

    Raises DataError where the recipe refuses them, and where no answer of a part is left within
    `data.max_length`.
    """
    dropped = {part: dict(reasons) for part, reasons in splits.dropped.items()}
    notes: list[str] = []

    def keep(part: str, examples: list[Any], options: ScoringOptions) -> list[Any]:
        numbers, lines = fitting(kind, examples, tokenizer, model, options)
        if lines:
            notes.extend(lines)
            dropped.setdefault(part, {})[TOO_LONG] = len(examples) - len(numbers)
        return [examples[number] for number in numbers]

    tests = {
        name: keep(splits.scored or name, examples, options)
        for name, examples in splits.tests.items()
    }
    validation = splits.validation
    if validation and kind.watched_by is not None:
        validation = keep("validation", validation, replace(options, protocol=kind.watched_by))
    for part, rows in [("validation", validation), *tests.items()]:
        if rows and not kind.has_targets(rows, tokenizer, options.max_length):
            raise DataError(
                f"data.max_length cuts off the answer of every row of '{part}'",
                "raise data.max_length",
            )
    return replace(splits, tests=tests, validation=validation, dropped=dropped), notes


def fitting(
    kind: Kind,
    examples: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    options: ScoringOptions,
) -> tuple[list[int], list[str]]:
    """Return the numbers of the examples that the model has positions for when they are scored, and
    lines that name the others.

    Raises DataError for the others where they are refused, and where nothing is left.
    """
    limit = max_positions(model)
    long = {} if limit is None else kind.too_long(examples, tokenizer, options, limit)
    bad_rows = BadRows()
    for number in long:
        place = (f"task {examples[number].task}", "scored row", number + 1)
        reason = f"prompt and output have more tokens than the {limit} that the model takes"
        bad_rows.add(getattr(examples[number], "place", place), BadRow(reason))
    if options.too_long == "refuse" or (long and len(long) == len(examples)):
        bad_rows.raise_if_any("shorten them, or leave them out with eval.too_long: leave_out")
    fitting_numbers = [number for number in range(len(examples)) if number not in long]
    return fitting_numbers, [f"not scored: {line}" for line in bad_rows.lines()]


def fit(
    kind: Kind, tasks: Sequence[TaskRows], model: TextModel, options: ScoringOptions
) -> list[TaskRows]:
    """Leave out, and name, the rows that are too long for the model; joint.

    Raises DataError where they are refused, and where nothing is left of a task.
    """
    fitted = []
    with processes.current().together():
        for task in tasks:
            network = model.adapted.model
            numbers, notes = fitting(kind, task.examples, model.tokenizer, network, options)
            for note in notes:
                say(f"{task.name}: {note}")
            rows = [task.rows[number] for number in numbers]
            fitted.append(replace(task, rows=rows) if notes else task)
    return fitted


def leave_out_empty(
    encoded: Encoded, splits: Splits, max_length: int
) -> tuple[Encoded, Splits, list[Example]]:
    """Return the encoded training rows without those that hold nothing to learn, which are counted
    as dropped, and the examples that are left; raises DataError where none is.
    """
    numbers = [number for number, row in enumerate(encoded.rows) if has_target(row)]
    left_out = [row for row in encoded.rows if not has_target(row)]
    lost = len(left_out)
    if not lost and encoded.answers_cut_off < len(encoded.rows):
        return encoded, splits, splits.train
    if not numbers or encoded.answers_cut_off == len(encoded.rows):
        raise DataError(
            "data.max_length cuts off the answer of every training row", "raise data.max_length"
        )
    reasons = splits.dropped.get("train", {}) | {NO_ANSWER: lost}
    rows = replace(
        encoded,
        rows=[encoded.rows[number] for number in numbers],
        prompt_lengths=[encoded.prompt_lengths[number] for number in numbers],
        truncated=encoded.truncated - sum(len(row["input_ids"]) == max_length for row in left_out),
        answers_cut_off=max(0, encoded.answers_cut_off - lost),
    )
    splits = replace(splits, dropped=splits.dropped | {"train": reasons})
    return rows, splits, [splits.train[number] for number in numbers]


def check_family(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise DataError where an encoder is to write text."""
    family = FAMILIES.get(model.config.model_type)
    if family is None or family.placement.causal or not model.can_generate():
        return
    data, name = recipe.data, recipe.model.model_name_or_path
    source = f"format '{data.format}'" if data.format else f"the suite '{data.suite}'"
    raise DataError(
        f"{source} is learned by a language model, and {name} is an encoder "
        f"({model.config.model_type})",
        "an encoder learns classes or scores: rows with a label (data.columns.label names its "
        "column); for text choose a language model",
    )


def watched_rows(recipe: Recipe, splits: Splits) -> list[str]:
    """Say which rows pick the best step, and whether they are the rows that are scored.

    Of a benchmark also say where rows are held out that nothing watches.
    """
    if not splits.validation:
        return []
    if recipe.eval.eval_strategy == "no":
        if not recipe.data.holds_out:
            return []
        return [
            f"training rows are held out (data.held_out: {recipe.data.held_out}), but are "
            "never scored: eval.eval_strategy is no; --set data.held_out=0 trains on them too"
        ]
    scored = {example for examples in splits.tests.values() for example in examples}
    text = f"{len(splits.validation):,} validation rows select the best step"
    scored_too = sum(example in scored for example in splits.validation)
    if scored_too == len(splits.validation):
        text += "; the scored rows are the same ones, so their score is a little too good"
    elif scored_too:
        text += f"; {scored_too:,} of them are also scored"
    return [text]


def head_note(
    recipe: Recipe, heads: Sequence[str], classes: Mapping[Any, str], labels: Mapping[Any, str]
) -> str:
    """Say what becomes of a checkpoint's own head, and what its classes are beside the rows'."""
    names = ", ".join(heads)
    trained = set(heads) <= set(recipe.train.modules or ())
    fate = "trained further" if trained else "kept and frozen"
    text = f"the checkpoint has a head of its own ({names}), which is {fate}"
    if len(classes) > 1:
        text += f"; its classes: {_listed(classes)}; the rows' classes: {_listed(labels)}"
    return text if trained else f"{text}; to train it: --set train.modules=[{names}]"


def logits_note(kind: Kind, model: PreTrainedModel) -> list[str]:
    """Say why the loss takes the logits of all positions, where it does."""
    why = kind.loss(model, model.device).why_whole
    return [f"the loss keeps the logits of all positions, which takes memory: {why}"] if why else []


def _listed(classes: Mapping[Any, str]) -> str:
    return ", ".join(f"{number} = {name}" for number, name in classes.items())
