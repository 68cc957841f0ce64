"""The parts of a custom dataset (train, validation, test) and the files that each consists of.

A part is a file, several shards of one, a folder of its name, or a split of a dataset that
`datasets` wrote or that lies on the hub.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moc_cli.data.custom.table import Table, joined, read_table, suffix_of, table_of_dataset
from moc_cli.data.source import library_errors, load_from_hub
from moc_cli.errors import DataError, first_line
from moc_cli.recipe.names import PARTS
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.suggest import did_you_mean

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\..+)")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes
_LISTED = 10


@dataclass
class PartFiles:
    """The files of a part, and those that tell its name too and are not read."""

    files: list[Path]
    not_read: list[Path] = field(default_factory=list)


def read_parts(data: DataSection, *, to_score: bool = False) -> dict[str, Table]:
    """Read every part that `data` names; of a file that stands alone the part is train.

    There must be a train part, or with `to_score` any. Raises DataError naming every file that
    cannot be read at all.
    """
    parts: dict[str, PartFiles] = {}
    tables: dict[str, Table] = {}
    if data.path is not None:
        place = _existing(data.path)
        if place is None:
            message = f"data.path: no file or folder {data.path}, and it"
            dataset = load_from_hub(
                message, "give a path, or go online", data.path, data.config_name
            )
            tables = _tables_of(dataset, data.path, data, to_score)
        elif any((place / name).is_file() for name in _SAVED):
            import datasets

            with library_errors(f"{place} cannot be read by datasets"):
                saved = datasets.load_from_disk(str(place))
            if data.config_name is not None and not to_score:
                message = f"data.config_name: {place} was saved by datasets, and has one alone"
                raise DataError(message, "leave it out")
            tables = _tables_of(saved, str(place), data, to_score)
        else:
            parts = {"train": PartFiles([place])}
            if place.is_dir():
                parts = _find_parts(place, data, to_score)
            elif not to_score:
                _check_lone_file(place, data)
    for part in PARTS:
        path = getattr(data, part)
        if path is not None:
            tables.pop(part, None)
            parts[part] = PartFiles(_files_of(path, f"data.{part}"))
    errors: list[DataError] = []
    for part in filter(parts.__contains__, PARTS):
        try:
            files = parts[part].files
            tables[part] = joined([read_table(file, data.quoting) for file in files])
            if not_read := parts[part].not_read:
                names = ", ".join(str(file.relative_to(files[0].parent)) for file in not_read)
                tables[part].notes.append(f"{files[0]} is all of {part}; not read: {names}")
        except DataError as error:
            errors.append(error)
    if errors:
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise DataError("\n".join(error.message for error in errors), "; ".join(hints) or None)
    return {part: tables[part] for part in PARTS if part in tables}


def read_other(path: str, data: DataSection) -> dict[str, Table]:
    """Read the parts of another path to score, as `data` would be read from it."""
    no_parts = dict.fromkeys(PARTS)
    return read_parts(data.model_copy(update={**no_parts, "path": path}), to_score=True)


def _existing(path: str, key: str = "data.path") -> Path | None:
    """Return the file or folder of this name; None for the id of a dataset on the hub.

    Raises DataError where it is none of them.
    """
    try:
        place = Path(path).expanduser()
        if place.exists():
            return place
        siblings = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{key}: {path[:200]} cannot be read: {reason}") from error
    if key == "data.path" and _HUB_ID.fullmatch(path) and suffix_of(place) is None:
        return None
    raise DataError(f"{key}: no file or folder {path}{did_you_mean(place.name, siblings)}")


def _files_of(path: str, key: str) -> list[Path]:
    """Return a file, or all files of rows in a folder, in the order of their names."""
    place = _existing(path, key)
    assert place is not None
    if not place.is_dir():
        return [place]
    files = [file for file in _entries(place) if file.is_file() and suffix_of(file)]
    if not files:
        raise DataError(f"{key}: {place} holds no file of rows")
    _check_shards(files)
    return files


def _find_parts(folder: Path, data: DataSection, to_score: bool) -> dict[str, PartFiles]:
    """Return the files of each part: in the folder, or below it in `data` or in the config's."""
    names = _part_names(data)
    places = [folder, folder / "data"]
    if data.config_name is not None:
        places = [place / data.config_name for place in places]
    places = [place for place in places if place.is_dir()]
    if data.config_name is not None and not places:
        folders = [entry.name for entry in _entries(folder) if entry.is_dir()]
        near = did_you_mean(data.config_name, folders)
        raise DataError(
            f"data.config_name: no folder {data.config_name!r} in {folder}{near}",
            f"its folders: {', '.join(folders[:_LISTED])}" if folders else "leave it out",
        )
    for place in places:
        parts = _parts_in(place, names)
        if "train" in parts or ((to_score or data.train is not None) and parts):
            if not to_score:
                _check_names(place, parts, data)
            return parts
    lone = [file for place in places for file in _entries(place) if suffix_of(file)]
    alone = len(lone) == 1 or (lone and all(_SHARD.fullmatch(file.name) for file in lone))
    if alone and not any(_part_of(file.name, names) for file in lone):
        _check_shards(lone)
        if not to_score:
            _check_names(folder, {"train"}, data)
        return {"train": PartFiles(lone)}
    below = [
        entry.name
        for place in places
        for entry in _entries(place)
        if entry.is_dir() and "train" in _parts_in(entry, names)
    ]
    if below:
        raise DataError(
            f"no train file in {folder}; there is one in each of its folders {', '.join(below)}",
            f"choose one: --set data.config_name={below[0]}",
        )
    held_files = ", ".join(file.name for file in lone[:_LISTED]) or "no file of rows"
    raise DataError(
        f"no train file in {folder}; it holds {held_files}",
        "name it train.csv, ..., or give data.train, data.validation and data.test",
    )


def _check_names(place: Path, parts: Collection[str], data: DataSection) -> None:
    """Raise DataError where the recipe names a part that a folder or a file does not have."""
    for part in PARTS:
        name = getattr(data.splits, part)
        if name is None or part in parts or getattr(data, part) is not None:
            continue
        files = [file.name for file in _entries(place)] if place.is_dir() else []
        near = did_you_mean(name, [file.split(".")[0] for file in files])
        raise DataError(
            f"data.splits.{part}: {place} has no part {name!r}{near}",
            f"it holds {', '.join(files[:_LISTED])}" if files else "leave it out",
        )


def _check_lone_file(file: Path, data: DataSection) -> None:
    """Raise DataError where the recipe names parts or a configuration of a file, which has none."""
    if data.config_name is not None:
        raise DataError(f"data.config_name: {file} is a file, and has no folders", "leave it out")
    _check_names(file, (), data)


def _parts_in(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, PartFiles]:
    """Return the files of each part that lie in a folder or in folders of the parts' names.

    Of several, one that lies in the folder itself under the part's exact name is all of the part.
    """
    parts: dict[str, list[Path]] = {}
    found: dict[str, PartFiles] = {}
    for entry in _entries(folder):
        part = _part_of(entry.name, names)
        if part is None:
            continue
        if entry.is_dir():
            inside = [file for file in _entries(entry) if file.is_file() and suffix_of(file)]
            if inside:
                _check_shards(inside)
                parts.setdefault(part, []).extend(inside)
        elif suffix_of(entry):
            parts.setdefault(part, []).append(entry)
    for part, files in parts.items():
        exact = [
            file
            for file in files
            if file.parent == folder and file.name.split(".")[0].lower() in names[part]
        ]
        if len(exact) == 1:
            found[part] = PartFiles(exact, [file for file in files if file not in exact])
            continue
        shards = all(_SHARD.fullmatch(file.name) for file in files)
        if len(files) > 1 and not shards and len({file.parent for file in files} - {folder}) != 1:
            raise DataError(
                f"{files[0]} and {files[1].name} are both {part}",
                f"keep one of them, or name the one to take: data.{part}",
            )
        _check_shards(files)
        found[part] = PartFiles(files)
    return found


def _check_shards(files: Sequence[Path]) -> None:
    """Raise DataError where shards of a set are absent: train-00000-of-00002 tells of two."""
    shards: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            stem, number, count, suffix = match.groups()
            shards.setdefault((stem, count, suffix), set()).add(int(number))
    for (stem, count, suffix), numbers in shards.items():
        absent = sorted(set(range(int(count))) - numbers) if len(count) < 7 else []
        if absent:
            name = f"{stem}-{absent[0]:0{len(count)}}-of-{count}{suffix}"
            and_more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise DataError(
                f"{files[0].parent}: {name}{and_more} of {int(count)} shards is missing"
            )


def _part_names(data: DataSection) -> dict[str, tuple[str, ...]]:
    """Return the names of each part; a name that the recipe gives takes the place of the usual."""
    recipe_names = {part: getattr(data.splits, part) for part in PARTS}
    return {
        part: (recipe_names[part].lower(),) if recipe_names[part] else PARTS[part] for part in PARTS
    }


def _part_of(name: str, names: Mapping[str, Sequence[str]]) -> str | None:
    """Return the part that a file's or folder's name tells: by all of it, else by its first word.

    `train-00000-of-00002.parquet`, `my_train.csv` and `train` are train.
    """
    match = _SHARD.fullmatch(name)
    stem = (match.group(1) if match else name.split(".")[0]).lower()
    words = [stem, *re.split(r"[^a-z0-9]+", stem)]
    return next((part for word in words for part in PARTS if word in names[part]), None)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def _tables_of(dataset: Any, name: str, data: DataSection, to_score: bool) -> dict[str, Table]:
    """Return the parts of a `datasets` object; one without splits is train."""
    splits = list(dataset) if isinstance(dataset, dict) else []
    if to_score and not splits:  # a recipe's names may be those of the rows it was trained on
        return {"train": table_of_dataset(name, dataset)}
    for part in PARTS:
        split_name = getattr(data.splits, part)
        if split_name is not None and split_name not in splits:
            near = did_you_mean(split_name, splits)
            raise DataError(
                f"data.splits.{part}: {name} has no split {split_name!r}{near}",
                f"its splits: {', '.join(splits)}" if splits else "leave it out",
            )
    if not splits:
        return {"train": table_of_dataset(name, dataset)}
    tables: dict[str, Table] = {}
    for part, names in PARTS.items():
        split_name = getattr(data.splits, part)
        split = split_name or next((split for split in names if split in dataset), None)
        if split is not None:
            tables[part] = table_of_dataset(f"{name}, split {split}", dataset[split])
    if "train" not in tables and data.train is None and not (to_score and tables):
        raise DataError(
            f"{name} has no split 'train'; it has {', '.join(dataset)}",
            f"name it: --set data.splits.train={next(iter(dataset), 'NAME')}",
        )
    return tables
