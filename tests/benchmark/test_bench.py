"""`moc bench`: variants, the same batches in turns, ratios, weights that are shared, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import refused
from support.tiny_runs import save_model

from moc_cli.benchmark import machine, turns
from moc_cli.benchmark.memory import StepMemory
from moc_cli.benchmark.models import random_base, sharing_copy
from moc_cli.benchmark.rows import make_rows
from moc_cli.benchmark.summary import summarize_variants
from moc_cli.benchmark.turns import Turn, VariantMeasurement
from moc_cli.benchmark.variants import make_variants, with_bases
from moc_cli.cli import run
from moc_cli.data.encode import IGNORED
from moc_cli.errors import MocError
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import RecipeFile

SHORT = ["--set", "data.max_length=12", "--set", "train.per_device_train_batch_size=2"]
TINY = [*SHORT, "--set", "method.rank=4", "--layers", "1", "--repeats", "2", "--warmup", "0"]
CPU = torch.device("cpu")


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `moc bench quickstart --json` prints, of a run that takes a second."""
    code = run(["bench", "quickstart", *TINY, *arguments, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    return json.loads(printed.out)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no pictures, which take seconds."""
    monkeypatch.setattr("moc_cli.benchmark.figure.draw_benchmark", lambda results: {})


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_training_of_all_methods_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "--methods", "moc,control,lora,dora,molex")
    assert list(found["methods"]) == ["moc", "control", "lora", "dora", "molex"]
    for name, entry in found["methods"].items():
        assert entry["step_seconds"] > 0
        # 2 rows of 12 tokens, whatever the method: what differs is the time.
        assert entry["tokens_per_second"] == pytest.approx(12 * entry["examples_per_second"])
        for other in ("control", "lora"):
            low, high = entry["interval"][f"ratio_to_{other}"]
            assert low <= entry[f"ratio_to_{other}"] <= high
        assert (entry["ratio_to_control"] == 1) == (name == "control")
        assert entry["peak_bytes"] > entry["kept_bytes"] > 0
    counted = [found["methods"][name]["peak_bytes"] for name in ("control", "moc", "molex")]
    assert counted == sorted(counted)
    assert found["environment"]["device"]["kind"] == "cpu"
    assert "cpu_percent" in found["environment"]["load"]
    folder = Path("runs/bench/quickstart")
    written = {path.name for path in folder.iterdir()}
    assert written == {"bench.json", "bench.png", "bench.svg"}
    assert json.loads((folder / "bench.json").read_text()) == found
    assert run(["bench", "quickstart", *TINY, "--methods", "control"]) == 0  # its own files
    assert "÷" not in capsys.readouterr().out  # nothing to compare with
    (folder / "bench.json").write_text("{}")
    assert run(["bench", "quickstart", *TINY]) == 2
    assert "was not written by `moc bench`" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_values_of_keys_are_tried_with_the_methods_that_have_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    vary = ["--vary", "method.top_k=0,2", "--vary", "train.gradient_accumulation_steps=1,3"]
    found = bench(capsys, "--methods", "moc,control", *vary)["methods"]
    one, three = ("train.gradient_accumulation_steps=1", "train.gradient_accumulation_steps=3")
    assert list(found) == [
        f"moc method.top_k=0 {one}",
        f"moc method.top_k=0 {three}",
        f"moc method.top_k=2 {one}",
        f"moc method.top_k=2 {three}",
        f"control {one}",
        f"control {three}",
    ]
    assert found[f"moc method.top_k=0 {one}"]["trained"] == found[f"control {one}"]["trained"]
    assert found[f"control {three}"]["ratio_to_control"] == 1


@pytest.mark.usefixtures("undrawn")
def test_generation_beside_the_bare_base(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--prompt-tokens", "5", "--new-tokens", "3"]
    vary = ["--vary", "eval.per_device_eval_batch_size=1,2"]
    found = bench(capsys, "--generate", "--methods", "moc,lora", *lengths, *vary)
    names = [f"{entry['method']} {entry['rows']}" for entry in found["methods"].values()]
    assert names == ["base 1", "moc 1", "base 2", "moc 2", "lora 1", "lora 2"]
    assert all(entry["ratio_to_base"] > 0 for entry in found["methods"].values())
    # Merged, a low-rank method has the base's weights and no others.
    kept = {name: entry["kept_bytes"] for name, entry in found["methods"].items()}
    assert len({kept[name] for name in kept if not name.startswith("moc")}) == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("generate", [(), ("--generate",)])
def test_each_variant_has_its_own_precision_of_products(
    generate: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undrawn: None,
) -> None:
    set_to: list[str] = []
    wanted = {False: "highest", True: "high"}
    monkeypatch.setattr(turns, "matmul_precision", lambda _, tf32: wanted[tf32])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    few = ["--methods", "moc", "--repeats", "1", "--warmup", "0", *generate]
    bench(capsys, *few, "--vary", "train.tf32=false,true")
    assert {"highest", "high"} == set(set_to)
    assert set_to.index("highest") < set_to.index("high")


def test_a_classifier_is_measured_too(capsys: pytest.CaptureFixture[str]) -> None:
    few = [*SHORT, "--layers", "1", "--repeats", "1", "--warmup", "0", "--methods", "control"]
    assert run(["bench", "glue/roberta-base/moc", *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"]["control"]["step_seconds"] > 0
    assert run(["bench", "glue/roberta-base/moc", *few, "--generate"]) == 2
    assert "writes no text" in capsys.readouterr().err


def test_more_layers_than_the_model_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "quickstart", *SHORT, "--layers", "5"]) == 2
    assert "builtin:world-llama has 4 layers; allowed: 1 to 4" in capsys.readouterr().err


def test_a_model_with_a_config_of_its_text_has_fewer_layers(tmp_path: Path) -> None:
    save_model(tmp_path, "gemma3")
    recipe = load_recipe("quickstart", [f"model.model_name_or_path={tmp_path}"])
    model = random_base(recipe, CPU, layers=1).model
    assert model.config.get_text_config().num_hidden_layers == 1


def test_methods_share_one_base_and_train_apart() -> None:
    recipe = load_recipe("glue/roberta-base/moc")
    base = random_base(recipe, CPU, layers=1)
    copies = [sharing_copy(base), sharing_copy(base)]
    assert base.new_modules == ("classifier",)
    pairs = zip(*(copy.model.named_parameters() for copy in copies), strict=True)
    for (name, first), (_, second) in pairs:
        assert (first is second) == (not name.startswith("classifier.")), name


@pytest.mark.usefixtures("undrawn")
def test_quantised_bases_are_measured_beside_the_plain_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    vary = ["--vary", "model.load_in_4bit=false,true"]
    found = bench(capsys, "--methods", "moc,lora", *vary)["methods"]
    plain, four = (found[f"moc model.load_in_4bit={value}"] for value in ("false", "true"))
    assert four["kept_bytes"] < plain["kept_bytes"]
    assert four["trained"] == plain["trained"]
    eight = bench(capsys, "--methods", "moc,lora", "--set", "model.load_in_8bit=true")["methods"]
    assert four["kept_bytes"] < eight["moc"]["kept_bytes"] < plain["kept_bytes"]


def test_rows_are_full_or_have_the_lengths_of_the_recipes_own() -> None:
    recipe = load_recipe("quickstart", ["data.max_length=20"])
    model = random_base(recipe, CPU, layers=1).model
    full = make_rows(recipe, model, 3, own_rows=False)
    assert full.lengths == [20] * 3
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in full.rows)
    own = make_rows(load_recipe("quickstart"), model, 3, own_rows=True)
    assert len(set(own.lengths)) > 1
    assert any(row["labels"].count(IGNORED) > 1 for row in own.rows)


def test_a_ratio_is_of_the_same_turn() -> None:
    """What slows all of a turn, such as other work, changes times and no ratio."""
    slow = np.array([1, 1, 5, 1, 9])
    measured = [
        VariantMeasurement(
            variant, [Turn(0.1 * n * factor, 2, 8) for n in slow], StepMemory(100 * factor, 50), 7
        )
        for variant, factor in zip(
            make_variants("quickstart", [], ["control", "moc"], []), (1, 2), strict=True
        )
    ]
    entry = summarize_variants(measured, training=True)["moc"]
    assert entry["ratio_to_control"] == pytest.approx(2)
    assert entry["interval"]["ratio_to_control"] == pytest.approx([2, 2])
    assert entry["interval"]["step_seconds"][1] > entry["step_seconds"] == pytest.approx(0.2)
    assert entry["ratio_to_lora"] is None
    assert entry["peak_bytes_to_control"] == 2
    assert entry["working_bytes_to_control"] == 3


def test_a_recipe_is_parsed_once_and_validated_once_for_each_variant(
    recipes_read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    validated = []
    validate = RecipeFile.model_validate
    monkeypatch.setattr(RecipeFile, "model_validate", lambda v: validated.append(v) or validate(v))
    make_variants("quickstart", [], None, [])
    assert (len(recipes_read), len(validated)) == (1, 1)
    make_variants("quickstart", [], ["moc", "control"], ["train.bf16=true,false"])
    assert (len(recipes_read), len(validated)) == (2, 1 + 1 + 4)


def test_kin_share_their_keys_and_others_have_their_defaults() -> None:
    variants = make_variants("quickstart", ["method.rank=6"], ["moc", "control", "lora"], [])
    assert [variant.recipe.method.rank for variant in variants] == [6, 6, 32]
    tried = make_variants("quickstart", [], ["moc", "lora"], ["train.bf16=true,false"])
    assert [base.changes for base in with_bases(tried) if base.bare] == [
        ("train.bf16=true",),
        ("train.bf16=false",),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "moc,lorra"], "'lorra' is no method; did you mean 'lora'?"),
        (["--methods", ","], "--methods names no method"),
        (["--methods", "moc,lora,moc"], "--methods: moc is given more than once"),
        (["--vary", "method.top_k=1,1"], "--vary: method.top_k=1 is given more than once"),
        (["--vary", "seed=1", "--vary", "seed=2"], "--vary: seed is given more than once"),
        (["--vary", "method.top_k"], "expected KEY=VALUE,VALUE"),
        (["--vary", "method.topk=1,3"], "has the key method.topk"),
        (["--vary", "train.bf=true"], "--vary train.bf=true: train.bf: unknown key"),
        (["--vary", "train.bf=true"], "did you mean 'bf16'?"),
        (["--vary", "launch.device=cpu,cuda"], "the same for everything"),
        (["--vary", "model.trust_remote_code=false,true"], "the same for everything"),
        (["--rows", "some"], "--rows: found 'some', allowed: full, data"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "quickstart", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_does_not_fit_in_memory_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moc_cli.kinds.loss.TaskLoss.__call__", full)
    assert run(["bench", "quickstart", *TINY, "--methods", "control"]) == 2
    said = capsys.readouterr().err
    assert "control: a step of 2 rows of up to 12 tokens does not fit in memory" in said
    assert "measure fewer methods" in said


def test_beside_other_work_processor_time_counts() -> None:
    assert machine.choose_clock({"cpu_percent": 3})[1:] == ("elapsed", None)
    _, name, note = machine.choose_clock({"cpu_percent": 80})
    assert name == "processor"
    assert "busy for 80 %" in note


def have_gpu(free: float, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = int(free * 1e9), int(23e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: sizes)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(machine, "utilization", lambda device: used)


@pytest.mark.parametrize(("free", "used"), [(8, 0), (22.9, 40)])
def test_a_busy_gpu_is_refused(free: float, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpu(free, used, monkeypatch)
    with refused(MocError):
        machine.check_idle(torch.device("cuda"))


def test_an_idle_gpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpu(22.9, 5, monkeypatch)
    assert machine.check_idle(torch.device("cuda"))["gpu_percent"] == 5


@pytest.mark.usefixtures("undrawn")
def test_a_custom_dataset_tells_its_classes(capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Path("model"), "bert")
    rows = "".join(f"text {n},{'abc'[n % 3]}\n" for n in range(12))
    Path("rows.csv").write_text(f"text,label\n{rows}")
    changes = ("data.path=rows.csv", "data.held_out=3", "model.model_name_or_path=model")
    few = [text for change in changes for text in ("--set", change)]
    few += [*SHORT, "--repeats", "1", "--warmup", "0", "--methods", "control", "--json"]
    for rows_from in ("full", "data"):
        assert run(["bench", "custom/minilm/moc", *few, "--rows", rows_from]) == 0
        trained = json.loads(capsys.readouterr().out)["methods"]["control"]["trained"]
    assert trained > 3 * 32  # a head of three classes is trained with the controls
