"""A checkpoint's files: where they lie, whether they are whole and hold what its config asks for.

Names and shapes come from the headers of the safetensors files; values are not read.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from moc_cli.errors import MocError
from moc_cli.run_files import Shape, read_object

BUILTIN = "builtin:"
_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched


class Index(Shape):
    """model.safetensors.index.json: each tensor's file."""

    weight_map: dict[str, str]


def resolve(name: str) -> str:
    """The folder of a `builtin:` model; any other name as it is."""
    if not name.startswith(BUILTIN):
        return name
    folder = Path(str(files("moc_cli.builtin") / name.removeprefix(BUILTIN)))
    if not (folder / "config.json").is_file():
        builtin_names = sorted(BUILTIN + p.parent.name for p in folder.parent.glob("*/config.json"))
        raise MocError(f"'{name}' is not a built-in model; known: {', '.join(builtin_names)}")
    return str(folder)


def checkpoint_shapes(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]] | None:
    """The names and shapes in the files that a checkpoint is loaded from, else None.

    None where they do not all lie here; the hub is not asked. Raises MocError for files that are
    cut off, or no safetensors files.
    """
    paths = loaded_weight_files(name, revision)
    fetched = Path(resolve(name)).is_dir() or all(path.is_file() for path in paths)
    if not paths or not fetched:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names: list[str] = file.keys()
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in names}
        except (SafetensorError, OSError) as error:
            raise _damaged(name, path, error) from error
    return shapes


def loaded_weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The files that a checkpoint is loaded from; none where their names are not known here.

    Raises MocError for an index that cannot be read.
    """
    entry = _entry(name, revision)
    if entry is None or entry.suffix != ".json":
        return [] if entry is None else [entry]
    files = set(read_object(entry, Index)["weight_map"].values())
    return [entry.parent / file for file in sorted(files)]


def known_hash(name: str, revision: str | None = None) -> str | None:
    """sha256 over the safetensors files of a model, by name and content; None where they do not lie
    here: the hub is not asked.

    Older runs and adapters name their base by it; newer ones by its tensors.
    """
    folder = resolve(name)
    if not os.path.isdir(folder):
        entry = _entry(name, revision) if name else None
        if entry is None:
            return None
        folder = str(entry.parent)
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        return None
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {_hash_file(path)}\n".encode())
    return digest.hexdigest()


def _entry(name: str, revision: str | None) -> Path | None:
    """The file from which transformers loads a model's weights, or the index of such files; None
    where it does not lie here.
    """
    for entry in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            path = cached_file(
                resolve(name),
                entry,
                revision=revision or "main",
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
            )
        except (OSError, ValueError):
            return None
        if path:
            return Path(path)
    return None


def _hash_file(path: Path) -> str:
    """sha256 of a file; the hub's cache names large files by it already."""
    target = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target):
        return target
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_weights(
    name: str,
    model: PreTrainedModel,
    mismatched: Mapping[str, tuple[Collection[int], Collection[int]]],
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
) -> None:
    """Raise MocError where the weights of model `name` do not fit its config.

    `mismatched` holds the shape in the file and the one that the config asks for. A classifier may
    lack its head and small modules such as a pooler, but no layer; and no layer may be left over.
    """
    base, complete = f"{model.base_model_prefix}.", model.can_generate()
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    layers = {f"{path}.{key}" for path, m in lists.items() for key, _ in m.named_parameters()}
    wrong = [
        f"{key} has shape {tuple(stored)}, its config asks for {tuple(config_shape)}"
        for key, (stored, config_shape) in sorted(mismatched.items())
        if complete or key.startswith(base)
    ]
    wrong += [f"{key} is missing" for key in sorted(missing) if complete or key in layers]
    for path, module in lists.items():
        numbers = {key.removeprefix(f"{path}.").partition(".")[0] for key in unexpected}
        beyond = [int(number) for number in numbers if number.isdecimal()]
        if beyond and max(beyond) >= len(module):
            wrong.append(f"{path} has {max(beyond) + 1} layers, its config asks for {len(module)}")
    if wrong:
        and_more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise MocError(
            f"model '{name}': its weights do not fit its config: {'; '.join(wrong[:3])}{and_more}",
            "give the folder or hub id in which config and weights belong together",
        )


def own_head(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[str, ...]:
    """The modules around a classifier's base that its checkpoint holds, in the model's shapes.

    `shapes` are those of the checkpoint's files; where they are not known, the class that the
    config names tells.
    """
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    if shapes is None:
        architectures = getattr(model.config, "architectures", None) or ()
        return tuple(heads) if type(model).__name__ in architectures else ()
    return tuple(
        name
        for name in heads
        if (parameters := dict(model.get_submodule(name).named_parameters()))
        and all(shapes.get(f"{name}.{key}") == tuple(p.shape) for key, p in parameters.items())
    )


def _damaged(model: str, path: Path, error: Exception) -> MocError:
    if isinstance(error, FileNotFoundError):
        reason, hint = "is missing", "download it again, or copy it from where it is whole"
    elif _is_pointer(path):
        reason, hint = "is a pointer of git-lfs, not the file itself", "run: git lfs pull"
    else:
        reason = f"is incomplete or damaged ({error})"
        hint = "download it again, or copy it again from where it is whole"
    return MocError(f"model '{model}': its weights cannot be loaded: {path.name} {reason}", hint)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER
