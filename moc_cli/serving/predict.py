"""`moc predict`: classes of new rows with their probabilities, or values of a regression."""

import csv
import io
import json
import os
import shlex
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moc_cli.data.custom.unlabelled import UnlabelledRows, read_unlabelled
from moc_cli.errors import DataError, FileError, MocError
from moc_cli.files import check_folder, write_text_atomic
from moc_cli.report.output import say
from moc_cli.report.progress import WorkProgress
from moc_cli.run_files import read_bytes
from moc_cli.runs import BaseOptions, RunFolder

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe

ENDINGS = (".jsonl", ".csv")
OWN = ("prediction", "probability", "probabilities")  # columns that predictions add to a row


@dataclass(frozen=True)
class PredictOptions:
    """The options of `moc predict`; without `output_file` the rows are printed as JSON lines."""

    run: Path
    file: Path
    output_file: Path | None = None
    batch_size: int | None = None
    device: str | None = None
    base_options: BaseOptions = BaseOptions()
    trust_remote_code: bool = False

    def read_recipe(self) -> "Recipe":
        """Return the run's recipe; raises MocError for a run that is no classifier."""
        if self.output_file is not None:
            if self.output_file.suffix not in ENDINGS:
                raise MocError(
                    f"--output-file {self.output_file}: give a name in {' or '.join(ENDINGS)}"
                )
            check_folder(self.output_file.parent)
            self._check_replaced(self.output_file)
        recipe = RunFolder.open(self.run).read_recipe(trust_remote_code=self.trust_remote_code)
        data = recipe.data
        if not data.kind.classifier:
            command = ["moc", "generate", str(self.run), "--file", str(self.file)]
            raise MocError(
                f"{self.run} is a language model ({', '.join(data.tasks)}): it has no classes",
                f"have it write: {shlex.join(command)}",
            )
        return recipe

    def _check_replaced(self, file: Path) -> None:
        """Raise FileError unless a file that is there has our column in its header or first row."""
        text = read_bytes(file).decode(errors="replace") if os.path.lexists(file) else ""
        if text and OWN[0] not in _first_columns(text, file.suffix):
            raise FileError(
                f"--output-file {file} was not written by `moc predict` and would be overwritten",
                "give another name",
            )

    def read_rows(self, recipe: "Recipe") -> UnlabelledRows:
        """Read the file; raises DataError where a row cannot be used or a column is ours."""
        rows = read_unlabelled(recipe.data, self.file)
        for note in rows.notes:
            say(note)
        clashes = [name for name in OWN if any(name in fields for fields in rows.fields)]
        if clashes:
            raise DataError(
                f"{self.file} has a column {clashes[0]!r} already, which predictions would replace",
                "rename it",
            )
        return rows


def _first_columns(text: str, suffix: str) -> Container[str]:
    """Return the columns of a CSV or of the first of JSON lines; none where they cannot be read."""
    try:
        if suffix == ".csv":
            return next(csv.reader(io.StringIO(text, newline="")), [])
        row = json.loads(text.split("\n", 1)[0])
    except (csv.Error, ValueError, RecursionError):
        return ()
    return row if isinstance(row, dict) else ()


def predict(options: PredictOptions, recipe: "Recipe", rows: UnlabelledRows) -> dict[str, Any]:
    """Classify the rows, write them to `output_file` if given, and return what --json prints."""
    from moc_cli.data.encode import encode_pairs
    from moc_cli.load_run import open_run
    from moc_cli.scoring.classify import classify

    model = open_run(options.run, device=options.device, recipe=recipe, base=options.base_options)
    limit = recipe.data.max_length
    truncated = encode_pairs(rows.examples, model.tokenizer, max_length=limit).truncated
    if truncated:
        say(f"{truncated} of {len(rows.examples)} rows are cut to {limit} tokens, as in training")
    with WorkProgress("predict", len(rows.examples)) as bar:
        items = classify(
            model,
            rows.examples,
            batch_size=options.batch_size or recipe.eval.per_device_eval_batch_size,
            max_length=limit,
            on_progress=bar.observe,
        )
    names = list(model.base.get("id2label", {}).values())
    predictions = [
        {**fields, **describe_prediction(item.scores, names)}
        for fields, item in zip(rows.fields, items, strict=True)
    ]
    facts: dict[str, Any] = {"run": str(options.run), "file": str(options.file)}
    facts |= {"classes": names or None, "rows": len(predictions), "truncated": truncated}
    if options.output_file is None:
        return facts | {"predictions": predictions}
    write_text_atomic(options.output_file, to_text(predictions, options.output_file.suffix))
    return facts | {"output_file": str(options.output_file)}


def describe_prediction(outputs: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Return the class with its probability and those of all classes, or a regression's value."""
    if len(outputs) == 1:
        return {"prediction": outputs[0]}
    import torch

    shares = torch.tensor(outputs, dtype=torch.float64).softmax(0).tolist()
    best = shares.index(max(shares))
    classes = names or [str(number) for number in range(len(shares))]
    return {
        "prediction": classes[best],
        "probability": shares[best],
        "probabilities": dict(zip(classes, shares, strict=True)),
    }


def to_text(predictions: Sequence[dict[str, Any]], suffix: str) -> str:
    """Return rows as JSON lines or as a CSV, where each class has a column `probability: NAME`."""
    if suffix == ".jsonl":
        return "".join(json_line(row) + "\n" for row in predictions)
    flat = []
    for row in predictions:
        shares = row.get("probabilities", {})
        rest = {key: value for key, value in row.items() if key != "probabilities"}
        flat.append(rest | {f"probability: {name}": share for name, share in shares.items()})
    stream = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in flat for key in row)
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def json_line(row: dict[str, Any]) -> str:
    """Return a row as JSON; values that JSON lacks (dates of a Parquet file) as texts."""
    return json.dumps(row, ensure_ascii=False, default=str)
