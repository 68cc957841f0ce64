"""The proof of an export: a fresh process loads the folder, and its logits are compared with ours.

The other process gets the folder, reference rows and a few lines of Python that load the model; it
shares nothing with this one.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moc_cli.data.batches import pad_batch
from moc_cli.errors import MocError
from moc_cli.files import disk_errors
from moc_cli.load_run import LoadedRun
from moc_cli.models.tokens import max_positions
from moc_cli.scoring.forward import evaluating

# Largest |Δlogit| that is let pass, as a share of the largest |logit|, by the type of the file.
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}

LONGEST_QUOTE = 300  # characters of an error
LONGEST = 512  # tokens of a reference row, where the model does not say how many it takes

# Of several lengths, so that rows are padded and take routes of their own.
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: does water boil at a lower temperature on a high mountain? Answer:",
    "No.",
    "A long time ago, in a small house by the sea, there lived a woman who kept three cats.",
    "def add(first, second): return first + second",
    "The committee has not decided whether the motion, which was tabled last week, is in order.",
    "2 4 8 16 32",
    "Why?",
)

_PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
folder, given, answer, threads, device = sys.argv[1:]
torch.set_num_threads(int(threads))
{load}
model.to(device).eval()
inputs = {{name: value.to(device) for name, value in load_file(given).items()}}
with torch.no_grad():
    logits = model(**inputs).logits
save_file({{"logits": logits.float().cpu().contiguous()}}, answer)
"""


@dataclass(frozen=True)
class Reference:
    """Rows, what the run's model answers to them, and which logits count.

    `logits` is (B, T, V) of a language model or (B, labels) of a classifier; `counted` (B, T) or
    (B,) leaves padding out.
    """

    inputs: dict[str, Tensor]
    logits: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Written:
    """What a format wrote, and how it is to be proven.

    `loading` is Python that leaves the model in `model`, given the path in `folder` and the base
    model's name in `base`: a fresh process runs it, and the card shows it. Its logits must be those
    of `expected` within `tolerance`, a share of the largest |logit| (None: that of `dtype`).
    Without `needs_moc` the process cannot import moc_cli. `rounding` compares the run with the run
    in the file's type, where that is another. `notes` are sentences for the user and the card;
    `library` is the card's `library_name`.
    """

    loading: str
    expected: Reference
    dtype: str = "float32"
    tolerance: float | None = None
    needs_moc: bool = True
    rounding: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    library: str = "transformers"
    facts: dict[str, Any] = field(default_factory=dict)


def reference(trained: LoadedRun) -> Reference:
    """Run the source on padded rows; decoders are padded on the left, as for generation."""
    limit = max_positions(trained.adapted.model) or LONGEST
    encoded = [dict(trained.tokenizer(text)) for text in TEXTS]
    rows = [{name: values[:limit] for name, values in row.items()} for row in encoded]
    inputs = pad_batch(rows, trained.tokenizer, side=trained.kind.head.side)
    with evaluating(trained.adapted.model) as device:
        moved = {name: value.to(device) for name, value in inputs.items()}
        logits = trained.adapted.model(**moved).logits.float().cpu()
    mask = inputs["attention_mask"].bool()
    counted = mask if logits.ndim == 3 else torch.ones(len(TEXTS), dtype=torch.bool)
    return Reference(inputs, logits, counted)


def prove(folder: Path, written: Written, device: str, base: str = "") -> dict[str, Any]:
    """Load `folder` in a fresh process and return how its logits compare with those expected.

    `base` is where the base model is. Raises MocError where they differ by more than the tolerance.
    """
    load = f"base = {base!r}\n{written.loading}"
    if not written.needs_moc:
        load = f'sys.modules["moc_cli"] = None  # as where it is not installed\n{load}'
    logits = fresh_logits(folder, load, written.expected.inputs, device=device)
    proof = check_tolerance(compare(written.expected, logits), written.dtype, written.tolerance)
    return proof | ({"rounding": written.rounding} if written.rounding else {})


def check_tolerance(
    figures: dict[str, Any], dtype: str, tolerance: float | None = None
) -> dict[str, Any]:
    """Return the figures of `compare` with their tolerance; raises MocError beyond it."""
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    difference = figures["relative_difference"]
    if not difference <= allowed:
        raise MocError(
            "the export does not give the run's logits when it is loaded: they differ by "
            f"{figures['max_difference']:.3g}, which is {difference:.2g} of the largest; "
            f"at most {allowed:g} is allowed" + (f" in {dtype}" if tolerance is None else ""),
            None if dtype == "float32" else "export with --dtype float32",
        )
    return figures | {"tolerance": allowed, "dtype": dtype}


def compare(expected: Reference, logits: Tensor) -> dict[str, Any]:
    """The largest |Δlogit| over what counts, absolute and relative, and whether all bits agree."""
    if logits.shape != expected.logits.shape:
        raise MocError(
            f"the export gives logits of shape {tuple(logits.shape)} when it is loaded, "
            f"the run {tuple(expected.logits.shape)}"
        )
    expected_logits, actual_logits = expected.logits[expected.counted], logits[expected.counted]
    difference = (expected_logits - actual_logits).abs().max().item()
    largest = expected_logits.abs().max().item()
    same_best = expected_logits.argmax(-1) == actual_logits.argmax(-1)
    return {
        "max_difference": difference,
        "relative_difference": difference / largest if largest else difference,
        "bit_equal": bool(torch.equal(expected_logits, actual_logits)),
        "same_best": same_best.double().mean().item(),
        "rows": int(expected.logits.shape[0]),
        "positions": int(expected_logits.shape[0]),
    }


def fresh_logits(
    folder: Path, load: str, inputs: dict[str, Tensor], *, device: str = "cpu"
) -> Tensor:
    """The logits that a fresh Python process gets from a folder, offline.

    Raises MocError with the line that names its error where it failed.
    """
    with disk_errors(gettempdir()), TemporaryDirectory(prefix="moc-parity-") as scratch:
        inputs_file = Path(scratch, "inputs.safetensors")
        logits_file = Path(scratch, "logits.safetensors")
        save_file(inputs, inputs_file)
        arguments = [
            str(folder),
            str(inputs_file),
            str(logits_file),
            str(torch.get_num_threads()),
            device,
        ]
        process = subprocess.run(
            [sys.executable, "-c", _PROGRAM.format(load=load), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            | {"HF_MODULES_CACHE": str(Path(scratch, "modules"))},  # modeling files of the folder
        )
        if process.returncode:
            reason = _error_line(process.stderr) or f"exit code {process.returncode}"
            raise MocError(f"the export cannot be loaded by a fresh process: {reason}")
        return load_file(logits_file)["logits"]


def _error_line(text: str) -> str:
    """The line of an error output that begins with the exception's name; else its last line.

    It follows the last frame of the traceback; the error's message may have lines after it.
    """
    lines = text.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] :] if frames else []
    line = next((line for line in after if not line.startswith(" ")), lines[-1] if lines else "")
    return shorten(line, LONGEST_QUOTE, placeholder=" ...")
