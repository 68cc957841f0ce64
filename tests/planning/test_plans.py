"""Plans of recipes: what they add up to, what they follow from, and that they are true."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.messages import refused
from support.models import make_byte_tokenizer, tiny_config
from support.rows import choice_rows, write_rows

from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.kinds import Choice
from moc_cli.models.quantization import parts
from moc_cli.planning import session
from moc_cli.planning.batches import Rows, Work, full_batch, read_rows
from moc_cli.planning.cards import CARDS, Card, card_of, find_card
from moc_cli.planning.fake_device import Kernel
from moc_cli.planning.fit import fitting_mode
from moc_cli.planning.footprint import Footprint, footprint, seconds_of
from moc_cli.planning.plans import KEPT, Planner, alternatives_to, changes_to, cheapest
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.report.plan_table import PARTS, parts_table, plans_table, wire_table
from moc_cli.training import build
from moc_cli.training.recompute import recompute_mode

LAYERS = 16
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a model of shapes alone, deep and narrow; its rows and tokenizer are there."""
    folder = tmp_path_factory.mktemp("plans")
    deep = tiny_config("qwen3", num_hidden_layers=LAYERS, layer_types=None)
    deep.save_pretrained(folder / "deep")
    make_byte_tokenizer().save_pretrained(folder / "deep")
    write_rows(folder / "data/ARC-Easy/train.jsonl", choice_rows(40))
    write_rows(folder / "data/ARC-Easy/test.jsonl", choice_rows(4))
    (folder / "r.yaml").write_text(
        f"model: {{model_name_or_path: {folder}/deep}}\n"
        f"data: {{suite: commonsense, tasks: [ARC-Easy], path: {folder}/data, held_out: 4, "
        f"max_length: 64}}\noutput: {{output_dir: {folder}/run}}\n"
        "method: {name: control, rank: 8}\ntrain: {bf16: true, per_device_train_batch_size: 8}\n"
    )
    return folder


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Replays are made once for all tests; each sets its card."""
    return Planner(None, Rows(None))


@pytest.fixture
def recipe(folder: Path) -> MakeRecipe:
    return lambda *changes: load_recipe(folder / "r.yaml", changes)


@pytest.mark.parametrize(("method", "mode"), [("moc", "none"), ("control", "selective")])
def test_few_layers_tell_of_many(method: str, mode: str, recipe: MakeRecipe) -> None:
    own = recipe(f"method={method}", f"train.activation_checkpointing={mode}")
    work, card = Work(full_batch(8, 64, Choice()), Choice(), None, 64), CARDS["A100-80GB"]
    whole, few = (footprint(own, work, card, all_layers=whole) for whole in (True, False))
    assert sum(few.parts.values()) == pytest.approx(sum(whole.parts.values()), rel=0.005)
    assert few.parts["weights"] == pytest.approx(whole.parts["weights"], rel=0.001)
    assert few.seconds == pytest.approx(whole.seconds, rel=0.01)


def test_the_batches_are_those_of_the_rows(recipe: MakeRecipe) -> None:
    own = recipe("train.per_device_train_batch_size=5", "data.max_length=400")
    rows, unread = read_rows(own, build.base_shape(own))
    assert unread is None
    work = rows.work(own)
    count, tokens = work.largest["input_ids"].shape
    assert count == 5
    assert tokens < 400, "the longest row, not data.max_length"
    micro_batches = 3 * -(-36 // 5)
    assert work.scored_tokens >= tokens
    assert work.times is not None
    assert 0.5 * micro_batches < work.times <= micro_batches
    shared = rows.work(own, 4).times
    assert shared == pytest.approx(work.times / 4, rel=0.01), "each has a quarter of the rows"
    full = Rows(None).work(own)
    assert full.largest["input_ids"].shape == (5, 400)
    assert full.times is None
    assert Rows(None).work(recipe("train.max_steps=7")).times == 7
    packed = Rows(None).work(recipe("train.packing=true", "data.max_length=20")).largest
    assert packed["input_ids"].shape == (1, 8 * 20)


def test_packed_rows_are_planned(recipe: MakeRecipe, planner: Planner) -> None:
    padded = planner.plan(recipe("data.max_length=20"))
    packed = planner.plan(recipe("data.max_length=20", "train.packing=true"))
    assert packed.step_bytes == pytest.approx(padded.step_bytes, rel=0.2)


def test_a_plan_adds_up_and_other_settings_take_less(recipe: MakeRecipe, planner: Planner) -> None:
    own, planner.card = recipe(), find_card("24GB")
    settings = [own, *alternatives_to(own)]
    assert len(settings) == 4 * 2 * 2
    plans = [planner.plan(setting) for setting in (*settings[:5], settings[8])]
    for plan in plans:
        kept = sum(plan.parts[name] for name in KEPT)
        step = sum(plan.parts[name] for name in ("gradients", "activations", "loss"))
        others = (plan.parts[name] for name in ("evaluation", "checkpoint_saving", "resume"))
        assert plan.step_bytes == kept + step
        assert plan.peak_bytes == kept + max(step, *others) + plan.parts["overhead"]
        assert plan.per_device_train_batch_size * plan.gradient_accumulation_steps == 8
        assert plan.fits
        assert plan.seconds is None
    none, selective, full, offload, quarter, four_bits = plans
    taken = [plan.step_bytes for plan in (none, full, offload)]
    assert taken == sorted(taken, reverse=True)
    assert selective.step_bytes > full.step_bytes, "none keeps less than selective: see keep_less"
    assert four_bits.load_in_4bit
    assert four_bits.parts["weights"] < none.parts["weights"]
    assert quarter.parts["activations"] < 0.5 * none.parts["activations"]


def test_the_cheapest_that_fits_can_be_typed(recipe: MakeRecipe, planner: Planner) -> None:
    own = recipe()
    modes = [own, *alternatives_to(own)[:3]]
    *larger, full, _ = (planner.plan(setting).peak_bytes for setting in modes)
    planner.card = Card("small", (min(larger) + full) // 2)
    best = cheapest([planner.plan(setting) for setting in modes])
    assert best is not None
    changes = changes_to(best, own)
    assert changes == ["train.activation_checkpointing=full"]
    assert recipe(*changes).train.activation_checkpointing == "full"
    # It replays all layers, as test_fit.py does; few layers tell of many.
    few: Any = SimpleNamespace(card=planner.card, plan=lambda own, all_layers: planner.plan(own))
    auto = fitting_mode(recipe("train.activation_checkpointing=auto"), few)
    assert auto.train.activation_checkpointing == "full"
    planner.card = Card("none", 1)
    assert cheapest([planner.plan(own)]) is None


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ("train.gradient_checkpointing=true", 16),
        ("train.torch_compile=true", 16),
        ("model.load_in_8bit=true", 8),
        ("model={model_name_or_path: DEEP, load_in_4bit: true, bnb_4bit_quant_type: fp4}", 8),
    ],
)
def test_settings_beside_the_own_can_be_typed(
    change: str, number: int, folder: Path, recipe: MakeRecipe
) -> None:
    given = change.replace("DEEP", str(folder / "deep"))
    own = recipe(given)
    beside = alternatives_to(own)
    assert len(beside) == number - 1
    for setting in (own, *beside):
        train = setting.train
        plan: Any = SimpleNamespace(
            activation_checkpointing=train.activation_checkpointing,
            per_device_train_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            load_in_4bit=setting.model.load_in_4bit,
        )
        typed = recipe(given, *changes_to(plan, own))
        assert recompute_mode(typed) == recompute_mode(setting)
        assert typed.model == setting.model


def test_classifiers_are_planned_by_their_published_shapes() -> None:
    own = load_recipe("glue/roberta-base/moc", ["data.tasks=[mrpc]"])
    plan = Planner(find_card("RTX3090"), Rows(None)).plan(own)
    encoder = 124_055_040  # parameters, of 4 bytes; tests/nn/test_shapes.py
    assert plan.parts["weights"] == pytest.approx(4 * encoder, rel=0.01)
    assert plan.parts["activations"] > plan.parts["weights"]
    assert plan.step_seconds is not None


@pytest.mark.parametrize("double", ["true", "false"])
def test_a_base_in_4_bits_is_planned_as_bitsandbytes_keeps_it(double: str) -> None:
    pytest.importorskip("bitsandbytes")
    own = load_recipe(
        "quickstart",
        ["model.load_in_4bit=true", f"model.bnb_4bit_use_double_quant={double}"],
    )
    planned = Planner(None, Rows(None)).plan(own).parts["weights"]
    cpu, tokenizer = torch.device("cpu"), build.make_tokenizer(own.model)
    built = build.build(own, cpu, tokenizer).adapted
    frozen = [p for p in built.model.parameters() if not p.requires_grad]
    kept = sum(part.nbytes for parameter in frozen for part in parts(parameter))
    assert planned == pytest.approx(kept, rel=0.03)


def test_moments_in_8_bits_are_planned(recipe: MakeRecipe, planner: Planner) -> None:
    wide = "method.rank=128"  # 4,096 numbers: from there on bitsandbytes keeps 8 bits
    taken = [
        planner.plan(recipe(f"train.optim={kind}", wide)).parts["optimizer"]
        for kind in ("adamw", "adamw_8bit")
    ]
    assert taken[0] > 0
    assert taken[1] == pytest.approx((2 + 8 / 256) / 8 * taken[0], rel=0.1)


@pytest.mark.parametrize("highest", ["forward", "loss", "backward", "optimizer"])
def test_a_step_peaks_in_any_of_its_phases(highest: str) -> None:
    phases = dict.fromkeys(("forward", "loss", "backward", "optimizer"), {"weights": 1})
    taken = Footprint(phases | {highest: {"weights": 2}, "resume": {"weights": 9}}, None)
    assert taken.parts == {"weights": 2}


def test_cards_are_named_or_sized() -> None:
    assert find_card("24GB").memory == 24_000_000_000
    assert find_card("1.5 GiB").memory == 3 * 2**29
    assert find_card("h100 80gb") is CARDS["H100-80GB"]
    here = card_of("NVIDIA A100-SXM4-40GB", 42_300_000_000)
    assert (here.memory, here.bandwidth) == (42_300_000_000, CARDS["A100-40GB"].bandwidth)
    assert card_of("Unheard 9000", 5).half is None
    names = {"NVIDIA L40": None, "NVIDIA GeForce RTX 4090": "RTX4090", "Tesla T4": "T4"}
    for name, same in names.items():
        assert card_of(name, 5).half == (CARDS[same].half if same else None)
    with refused(MocError):
        find_card("A100")
    with refused(MocError):
        find_card("A100-80C")
    with refused(MocError):
        find_card("0GB")


def test_time_is_that_of_operations_or_of_bytes() -> None:
    card = Card("c", 1, half=1e12, tf32=5e11, single=1e11, bandwidth=1e10)
    product, half, moving = (
        Kernel(10**12, 8, False),
        Kernel(10**12, 8, True),
        Kernel(0, 10**10, True),
    )
    assert seconds_of({product: 1}, card) == pytest.approx(10 * (seconds_of({half: 1}, card) or 0))
    assert seconds_of({product: 1}, card) == pytest.approx(
        5 * (seconds_of({product: 1}, card, tf32=True) or 0)
    )
    assert (seconds_of({moving: 2}, card) or 0) > 2
    assert seconds_of({moving: 2}, find_card("24GB")) is None


def test_the_command_prints_what_fits(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "alternatives_to", lambda recipe: [])
    command = ["plan", str(folder / "r.yaml"), "--gpu", "T4", "--set", "data.max_length=400"]
    assert run([*command, "--vary", "method.rank=4,6", "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"plans", "recipe", "device", "choice", "unread"}
    assert printed["choice"] == []
    assert printed["unread"] is None
    assert printed["device"]["name"] == "T4"
    changes = [plan["changes"] for plan in printed["plans"]]
    assert changes == [["method.rank=4"], ["method.rank=6"]]
    assert all(plan["seconds"] > 0 and plan["fits"] for plan in printed["plans"])
    assert run(["plan", str(folder / "r.yaml"), "--gpu", "T5"]) == 2
    assert (
        "'T5' is neither a size such as 24GB nor a known card; allowed: T4"
        in capsys.readouterr().err
    )


def test_the_line_to_paste_trains_what_was_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "alternatives_to", lambda recipe: [])
    command = ["plan", "quickstart", "--gpu", "T4", "--methods", "lora", "--vary", "method.rank=4"]
    assert run([*command, "--set", "train.max_steps=9"]) == 0
    line = shlex.split(capsys.readouterr().err.partition("Fits: moc train quickstart ")[2])
    assert line[1::2] == ["train.max_steps=9", "method=lora", "method.rank=4"]


def test_plans_are_shown_as_tables() -> None:
    plan: dict[str, Any] = {
        "method": "moc",
        "changes": [],
        "activation_checkpointing": "full",
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "peak_bytes": 7_400_000_000,
        "parts": dict.fromkeys(PARTS, 1_000_000),
        "step_seconds": None,
        "seconds": None,
        "fits": None,
        "processes": 1,
    }
    console = Console(width=100)
    with console.capture() as shown:
        console.print(parts_table({"plans": [plan]}))
        console.print(plans_table({"plans": [plan], "device": None}))
    assert wire_table({"plans": [plan]}) == []
    assert "Memory of moc, full, 16 rows, 4-bit" in shown.get()
    assert "16 x 2" in shown.get()
    assert "7.40 GB" in shown.get()
    joint = {"processes": 4, "strategy": "ddp", "wire_bytes": 9_000_000, "step_seconds": 0.5}
    results = {"plans": [plan | joint | {"wire_seconds": {"NVLink": 0.5}}], "device": None}
    with console.capture() as shown:
        console.print(plans_table(results))
        console.print(*wire_table(results))
    assert "each of 4 processes (ddp)" in shown.get()
    assert "in a step of 128 rows, each of 4 processes (ddp) sends 9.0 MB" in shown.get()
    assert ["NVLink", "500.00", "50.0", "%"] in map(str.split, shown.get().splitlines())
