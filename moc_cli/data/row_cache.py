"""Tokenised rows on the disk, so that a run on the same rows does not tokenise them again.

A file's name is a hash of all that decides the tokens: the examples, the tokenizer, the arguments,
the versions. Files are safetensors. MOC_CACHE names the folder, `off` switches it off.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from moc_cli import __version__
from moc_cli.data.encode import Encoded, Row
from moc_cli.data.examples import Example, fingerprint
from moc_cli.errors import FileError
from moc_cli.files import cache_folder, write_bytes_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST = 10_000  # rows; fewer are tokenised in a few seconds
KEPT = 16  # files, those used last
_COLUMNS = ("input_ids", "token_type_ids", "labels")


def encode_cached(
    encode: Callable[[], Encoded],
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, Any],
) -> tuple[Encoded, str | None]:
    """Return encoded rows, from the cache or by `encode`, and what is to be said of it.

    `arguments` are all that `encode` depends on beside examples and tokenizer. Few rows, tokenizers
    written in Python and chat templates that write the date are encoded each time. A file that is
    damaged or cannot be written is as if it were not there.
    """
    folder = cache_folder("rows")
    if folder is None or len(examples) < SMALLEST or not _is_lasting(tokenizer):
        return encode(), None
    path = folder / f"{_key(examples, tokenizer, arguments)}.safetensors"
    with contextlib.suppress(OSError, ValueError, KeyError, safetensors.SafetensorError):
        encoded = _read(path)
        os.utime(path)
        return encoded, f"rows were tokenised before: {path} (MOC_CACHE=off tokenises them again)"
    encoded = encode()
    try:
        write_bytes_atomic(path, _to_bytes(encoded))
    except FileError as error:
        return encoded, f"tokenised rows are not kept: {error.message}"
    _prune(folder)
    return encoded, f"tokenised rows are kept in {path} (MOC_CACHE=off keeps none)"


def _is_lasting(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer gives the same tokens tomorrow, and can be named by a hash."""
    return tokenizer.is_fast and "strftime_now" not in str(tokenizer.chat_template or "")


def _key(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, Any],
) -> str:
    content = [
        __version__,
        *map(version, ("transformers", "tokenizers")),
        fingerprint(examples),
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,  # templates write them
        tokenizer.model_input_names,
        sorted(arguments.items()),
    ]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _to_bytes(encoded: Encoded) -> bytes:
    rows = encoded.rows
    tensors = {
        "lengths": torch.tensor(encoded.lengths, dtype=torch.int32),
        "prompt_lengths": torch.tensor(encoded.prompt_lengths, dtype=torch.int32),
    }
    for name in _COLUMNS:
        if name in rows[0]:
            values = [row[name] for row in rows]
            flat = list(chain.from_iterable(values)) if isinstance(values[0], list) else values
            wide = torch.float64 if any(isinstance(value, float) for value in flat) else torch.int32
            tensors[name] = torch.tensor(flat, dtype=wide)
    facts = {
        "truncated": encoded.truncated,
        "answers_cut_off": encoded.answers_cut_off,
        "fingerprint": encoded.fingerprint,
        "one_label": not isinstance(rows[0]["labels"], list),
        "digest": _digest(tensors),
    }
    return bytes(save(tensors, {"facts": json.dumps(facts)}))


def _read(path: Path) -> Encoded:
    """Return the rows in a file; raises one of several errors where it is missing or damaged."""
    with safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if facts.pop("digest") != _digest(tensors):
        raise ValueError("the content is not what was written")
    lengths = tensors["lengths"].tolist()
    scalar_columns = ("labels",) if facts.pop("one_label") else ()
    columns = {
        name: tensors[name].tolist()
        if name in scalar_columns
        else [part.tolist() for part in tensors[name].split(lengths)]
        for name in _COLUMNS
        if name in tensors
    }
    rows: list[Row] = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return Encoded(rows, tensors["prompt_lengths"].tolist(), **facts)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _prune(folder: Path) -> None:
    """Drop all files but those used last."""
    with contextlib.suppress(OSError):
        files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for file in files[:-KEPT]:
            file.unlink()
