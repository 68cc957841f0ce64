"""An adapter folder from a stranger does no harm: 240 seeded mutations, links, absurd sizes.

A mutated folder is refused with a sentence, the model as it was; or it gives the same logits.
"""

import hashlib
import json
import os
import random
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from support.machine import absent
from support.messages import refused
from support.models import has_hooks, make_batch, make_tiny, train_controls
from support.processes import run_program
from transformers import PreTrainedModel

from moc_cli import attach, load_controls
from moc_cli.adapter.folder import CONFIG, PAYLOAD, stamp
from moc_cli.errors import MocError
from moc_cli.serving.tenants import Tenants

EACH = int(os.environ.get("MOC_FUZZ", "40"))  # mutations of each kind
GATE = {"projection_dim": 8}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny("llama")


@pytest.fixture(scope="module")
def good(model, tmp_path_factory) -> Path:
    """An adapter of the model, trained."""
    folder = tmp_path_factory.mktemp("good") / "controls"
    controls = attach(model, "moc", rank=4, gate=GATE)
    train_controls(controls.named_parameters())
    controls.save(folder)
    controls.detach()
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch(side="left")).logits


def split(payload: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + length]), payload[8 + length :]


def join(header: dict, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def write(folder: Path, config: dict, payload: bytes) -> None:
    """Write a folder whose hashes are right: a stranger can compute them too."""
    (folder / PAYLOAD).write_bytes(payload)
    (folder / CONFIG).write_text(json.dumps(stamp(config, payload), indent=2))


def flip(path: Path, rng: random.Random, first: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(first, len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


def payload_byte(folder: Path, rng: random.Random) -> None:
    flip(folder / PAYLOAD, rng)


def config_byte(folder: Path, rng: random.Random) -> None:
    """Any byte; or a digit of a number, a letter of a word, a blank between them."""
    path = folder / CONFIG
    content = path.read_bytes()
    kind = rng.choice([None, rb": -?\d[.\d]*", rb'": "[a-z]+"', rb"\n +"])
    if kind is None:
        flip(path, rng)
        return
    start, end = rng.choice([match.span() for match in re.finditer(kind, content)])
    choices = {b"0": b"123456789", b"a": b"bcdefgh", b" ": b"\t\n\r"}
    places = [i for i in range(start, end) if content[i : i + 1].isalnum() or kind == rb"\n +"]
    place = rng.choice(places)
    old = content[place : place + 1]
    new = choices[b"0" if old.isdigit() else b"a" if old.isalpha() else b" "]
    new = bytes([rng.choice([byte for byte in new if byte != old[0]])])
    path.write_bytes(content[:place] + new + content[place + 1 :])


def key(folder: Path, rng: random.Random) -> None:
    """A name in the payload or in the config is lost, added, or another; hashes are right."""
    config = json.loads((folder / CONFIG).read_text())
    header, numbers = split((folder / PAYLOAD).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.randrange(4)
    if kind == 0:
        header[rng.choice([name.upper(), f"../{name}", f"{name}.weight", "", "x" * 5000])] = (
            header.pop(name)
        )
    elif kind == 1:
        spare = max(names, key=lambda one: header[one]["data_offsets"][1])
        numbers = numbers[: header.pop(spare)["data_offsets"][0]]
    elif kind == 2:
        end = len(numbers)
        header[f"controls.{rng.randrange(9)}.more.A"] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [end, end + 4],
        }
        numbers += bytes(4)
    else:
        spare = rng.choice(["trust_remote_code", "auto_map", "rank", "__class__", "peft_type"])
        place = rng.choice([config, config["method"], config["placement"]])
        place["method" if spare == "rank" else spare] = rng.choice([True, 1, "os.system", None])
    write(folder, config, join(header, numbers))


def shape(folder: Path, rng: random.Random) -> None:
    config = json.loads((folder / CONFIG).read_text())
    header, numbers = split((folder / PAYLOAD).read_bytes())
    name = rng.choice([one for one, entry in header.items() if len(entry.get("shape", ())) == 2])
    rows, width = header[name]["shape"]
    header[name]["shape"] = rng.choice(
        [
            [width, rows],
            [rows * width],
            [rows, width, 1],
            [1, rows * width],
            [rows, width + 1],
            [-rows, -width],
            [rows, float(width)],
            [rows, str(width)],
            [True, rows * width],
            [],
        ]
    )
    if rng.random() < 0.3:
        header[name]["dtype"] = rng.choice(["F16", "F64", "I32", "BOOL", "F8_E4M3", 7, None])
    write(folder, config, join(header, numbers))


def truncation(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([PAYLOAD, PAYLOAD, CONFIG])
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content.rstrip()))])


def declared_size(folder: Path, rng: random.Random) -> None:
    """Sizes that the file does not have, in its header's length, its entries and its config."""
    config = json.loads((folder / CONFIG).read_text())
    payload = (folder / PAYLOAD).read_bytes()
    header, numbers = split(payload)
    name = rng.choice([one for one in header if one != "__metadata__"])
    large = rng.choice([10**6, 2**31, 10**12, 2**62, 2**63, 10**30])
    kind = rng.randrange(6)
    if kind == 0:
        payload = (large % 2**64).to_bytes(8, "little") + payload[8:]
    elif kind == 1:
        header[name]["shape"] = [large, 32]
        payload = join(header, numbers)
    elif kind == 2:
        begin = header[name]["data_offsets"][0]
        header[name] |= {"shape": [large], "data_offsets": [begin, begin + 4 * large]}
        payload = join(header, numbers)
    elif kind == 3:
        config["method"]["rank"] = large
    elif kind == 4:
        config["method"]["gate"]["projection_dim"] = large
    else:
        config["method"]["top_k"] = large
    write(folder, config, payload)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "payload byte": payload_byte,
    "config byte": config_byte,
    "key": key,
    "shape": shape,
    "truncation": truncation,
    "declared size": declared_size,
}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_mutated_folder_is_refused_or_means_the_same(kind, model, good, tmp_path):
    base = {name: value.clone() for name, value in model.state_dict().items()}
    controls = load_controls(model, good)
    expected = logits(model)
    controls.detach()
    size = sum(path.stat().st_size for path in good.iterdir())
    said = []
    for seed in range(EACH):
        folder = tmp_path / str(seed)
        shutil.copytree(good, folder)
        MUTATIONS[kind](folder, random.Random(f"{kind} {seed}"))
        tracemalloc.start()
        try:
            controls = load_controls(model, folder)
        except MocError as error:
            said.append(error.message)
        else:
            assert torch.equal(logits(model), expected)
            controls.detach()
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 3_000_000 + 50 * size  # a copy of the model's modules is most of it
        assert not hasattr(model, "moc")
        assert not has_hooks(model)
    assert all(0 < len(text) < 1000 and "\n" not in text for text in said)
    # Another blank between two words of the config means the same.
    assert len(said) == EACH if kind != "config byte" else EACH * 0.6 < len(said) < EACH
    print(kind, len(said), "of", EACH, "refused")
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_flip_among_the_numbers_is_refused_by_the_hash(model, good, tmp_path):
    length = int.from_bytes((good / PAYLOAD).read_bytes()[:8], "little")
    for seed in range(EACH):
        folder = tmp_path / str(seed)
        shutil.copytree(good, folder)
        flip(folder / PAYLOAD, random.Random(seed), first=8 + length)
        with refused(MocError, seed=f"(?<=/){seed}(?=/)"):
            load_controls(model, folder)


def test_links_out_and_what_is_no_file_are_refused(model, good, tmp_path):
    for name in (CONFIG, PAYLOAD):
        for make in ("link", "loop", "fifo", "folder", "nothing"):
            folder = tmp_path / f"{name}-{make}"
            shutil.copytree(good, folder)
            path = folder / name
            path.unlink()
            if make == "link":
                path.symlink_to(good / name)
            elif make == "loop":
                path.symlink_to(path)
            elif make == "fifo":
                os.mkfifo(path)
            elif make == "folder":
                path.mkdir()
            reason = {"reason": "(?<=cannot be read: ).*"} if make == "loop" else {}
            with refused(MocError, **reason):
                load_controls(model, folder)


def test_links_inside_the_folder_and_to_the_cache_of_the_hub_are_followed(model, good, tmp_path):
    inside = tmp_path / "inside"
    shutil.copytree(good, inside)
    (inside / PAYLOAD).rename(inside / "real")
    (inside / PAYLOAD).symlink_to("real")
    cached = tmp_path / "models--me--mine"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(good, cached / "blobs")
    for name in (CONFIG, PAYLOAD):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    whole = tmp_path / "whole"
    whole.symlink_to(good)
    for folder in (inside, snapshot, whole):
        load_controls(model, folder).detach()


def test_numbers_that_are_not_finite_are_refused(model, good, tmp_path):
    config = json.loads((good / CONFIG).read_text())
    state = load((good / PAYLOAD).read_bytes())
    for value in (float("nan"), float("inf"), -float("inf")):
        folder = tmp_path / str(value)
        folder.mkdir()
        spoiled = {name: numbers.clone() for name, numbers in state.items()}
        spoiled["controls.0.attn.B"][0, 0] = value
        write(folder, config, save(spoiled))
        with refused(MocError):
            load_controls(model, folder)
        with refused(MocError):
            Tenants(model).add("a", folder)


def test_no_pickle_is_read(model, good, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(good, folder)
    torch.save({}, folder / "adapter_model.bin")
    (folder / PAYLOAD).unlink()
    with refused(MocError):
        load_controls(model, folder)


def test_numbers_may_not_go_into_layers_or_tied_weights(model, good, tmp_path):
    config = json.loads((good / CONFIG).read_text())
    payload = (good / PAYLOAD).read_bytes()
    for name in ("model", "model.layers", "nowhere"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, config | {"modules": [name]}, payload)
        with refused(MocError):
            load_controls(model, folder)
    tied = make_tiny("llama", tie_word_embeddings=True)
    folder = tmp_path / "tied"
    folder.mkdir()
    write(folder, config | {"modules": ["lm_head"]}, payload)
    with refused(MocError):
        load_controls(tied, folder)


def test_nested_and_repeated_json_is_told_in_a_sentence(model, good, tmp_path):
    texts = {
        "nested": "[" * 100_000,
        "twice": '{"format": 2, "format": 2}',
        "nan": '{"format": NaN}',
        "long": " " * 300_000,
        "list": "[]",
        "latin": '{"é": 1}',
        "digits": '{"format": ' + "9" * 5000 + "}",
    }
    for name, text in texts.items():
        folder = tmp_path / name
        shutil.copytree(good, folder)
        (folder / CONFIG).write_bytes(text.encode("latin-1"))
        reason = {"reason": "(?<=read as JSON: ).*"} if name in ("latin", "digits") else {}
        with refused(MocError, **reason):
            load_controls(model, folder)


PEAK = """
import sys
import torch
torch.set_num_threads(1)
from support.models import make_tiny
from moc_cli import load_controls
from moc_cli.errors import MocError
def peak(folder):
    open("/proc/self/clear_refs", "w").write("5")
    before = now("VmRSS")
    try:
        controls = load_controls(model, folder)
    except MocError as error:
        answer = "refused"
    else:
        answer = "loaded"
        controls.detach()
        del controls
    return answer, now("VmHWM") - before
def now(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
model = make_tiny("llama")
peak(sys.argv[1])  # everything is imported and warm
for folder in sys.argv[2:]:
    print(*peak(folder))
"""


def test_memory_stays_in_proportion_to_the_file(model, good, tmp_path):
    """An honest adapter of 8 MB takes a few times its size; an absurd one next to nothing."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        absent("only Linux's /proc tells a peak of memory that can be set back")
    controls = attach(model, "control", rank=8_192)
    honest = tmp_path / "honest"
    controls.save(honest)
    controls.detach()
    size = (honest / PAYLOAD).stat().st_size
    assert size > 8_000_000
    config = json.loads((honest / CONFIG).read_text())
    payload = (honest / PAYLOAD).read_bytes()
    header, numbers = split(payload)
    name = next(one for one in header if one != "__metadata__")
    begin = header[name]["data_offsets"][0]
    huge = header | {
        name: {"dtype": "F32", "shape": [10**11], "data_offsets": [begin, begin + 4 * 10**11]}
    }
    one = {name: {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}}
    folders = [honest]
    for label, values, content in (
        ("rank", config | {"method": config["method"] | {"rank": 4_000_000}}, payload),
        ("header", config, join(huge, numbers)),
        ("length", config, (2**40).to_bytes(8, "little") + payload[8:]),
        (  # one number's file that asks for controls of its whole size at every site
            "amplified",
            config | {"method": config["method"] | {"rank": 2**20}},
            join(one, bytes(2**22)),
        ),
    ):
        folder = tmp_path / label
        folder.mkdir()
        write(folder, values, content)
        folders.append(folder)
    done = run_program(PEAK, str(good), *map(str, folders))
    answers = [line.split() for line in done.stdout.splitlines()[-len(folders) :]]
    assert [answer for answer, _ in answers] == ["loaded"] + ["refused"] * (len(folders) - 1)
    print(f"file {size}: {done.stdout}")
    peaks = [int(peak) for _, peak in answers]
    assert peaks[0] < 5 * size
    assert max(peaks[1:]) < size / 2


def test_the_hash_of_a_config_is_of_its_values(good):
    config = json.loads((good / CONFIG).read_text())
    assert config["payload_sha256"] == hashlib.sha256((good / PAYLOAD).read_bytes()).hexdigest()
    again = dict(reversed(config.items()))
    assert stamp(again, (good / PAYLOAD).read_bytes()) == config
