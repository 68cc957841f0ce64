"""A run's export: check, load, write, prove, describe; then, with `--push-to-hub`, upload."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moc_cli.errors import MocError, first_line
from moc_cli.export import FormatOptions, check_format, find_format, parity
from moc_cli.export.card import make_card
from moc_cli.export.parity import Written
from moc_cli.export.unquantized import check_stored, open_for
from moc_cli.files import check_folder, write_folder_atomic, write_text_atomic
from moc_cli.load_run import open_run
from moc_cli.runs import BaseOptions, RunFolder

Say = Callable[[str], None]
CARD = "README.md"


@dataclass(frozen=True)
class ExportOptions:
    """The options of `moc export`; with `push_to_hub` the folder is uploaded to that repository."""

    run: Path
    to: str
    output_dir: Path
    format_options: FormatOptions = FormatOptions()
    device: str | None = None
    trust_remote_code: bool = False
    base_options: BaseOptions = BaseOptions()
    push_to_hub: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """An export that is done: where, how its logits compared, how many bytes each file has."""

    run: str
    to: str
    folder: str
    parity: dict[str, Any]
    notes: tuple[str, ...]
    sizes: dict[str, int]
    facts: dict[str, Any]
    url: str | None = None


def export_run(options: ExportOptions, say: Say = lambda text: None) -> ExportResult:
    """Export a run into a new or empty folder, which appears only when it is proven.

    Raises MocError for what can be known before weights are loaded, for an export that does not
    give the run's logits, and for an upload that fails (the folder is then complete).
    """
    run, to, output, base = options.run, options.to, options.output_dir, options.base_options
    format = find_format(to)
    check_export_folder(output)
    if options.push_to_hub is not None:
        check_online()
    folder = RunFolder.open(run)
    recipe = folder.read_recipe(trust_remote_code=options.trust_remote_code)
    folder.read_evaluations()  # damage is reported before weights load; the card reads them again
    check_format(to, recipe, options.format_options)
    check_stored(to, recipe, base)
    open_with = partial(open_run, run, device=options.device, base=base, exact=True)
    trained, notes = open_for(to, recipe, open_with)
    say(f"writing {output} and reading it back in another process")
    with write_folder_atomic(output) as temporary:
        written: Written = format.load().export(trained, temporary, options.format_options)
        written = replace(written, notes=(*notes, *written.notes))
        proof = parity.prove(
            temporary, written, trained.device.type, trained.recipe.model.model_name_or_path
        )
        sizes = sizes_of(temporary)
        write_text_atomic(temporary / CARD, make_card(trained, written, proof, to, sizes))
        sizes = sizes_of(temporary)
    url = None if options.push_to_hub is None else push(output, options.push_to_hub)
    return ExportResult(str(run), to, str(output), proof, written.notes, sizes, written.facts, url)


def check_export_folder(output: Path) -> None:
    """Raise MocError unless the folder is new or empty."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise MocError(f"--output-dir {output} is not a folder")
    if output.is_dir() and any(output.iterdir()):
        raise MocError(f"--output-dir {output} is not empty", "give a new folder")
    check_folder(output)


def sizes_of(folder: Path) -> dict[str, int]:
    """The bytes of every file below a folder, by its name relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def check_online() -> None:
    """Raise MocError where the environment forbids to reach the hub."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise MocError(f"--push-to-hub cannot upload: {name} is set", f"unset {name}")


def push(folder: Path, name: str) -> str:
    """Upload a folder to a model repository, made private if it is new; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of moc")
    except Exception as error:  # the hub's client passes on those of whatever it is made from
        reason = first_line(error)
        raise MocError(
            f"{folder} is complete, but the upload to '{name}' failed: {reason}",
            "see `hf auth whoami` and the network, then upload the folder: "
            f"hf upload {shlex.join([name, str(folder)])}",
        ) from error
    return str(address)
