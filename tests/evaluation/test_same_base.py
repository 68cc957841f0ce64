"""A run knows its base by the tensors: not by the names of files, folders or who calls."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.messages import refused
from support.models import make_byte_tokenizer, make_tiny_model
from support.rows import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from moc_cli import load_run
from moc_cli.cli import run
from moc_cli.errors import MocError, RunError
from moc_cli.evaluation.base_scores import before_training
from moc_cli.export import session
from moc_cli.load_run import open_run
from moc_cli.models.fingerprint import describe_tensors, find_differences, hash_tensors
from moc_cli.models.weight_files import known_hash
from moc_cli.runs import BaseOptions, RunFolder

RECIPE = """
model: {model_name_or_path: model}
method: {name: moc, rank: 4, gate: {projection_dim: 8}}
data: {suite: custom, path: rows.jsonl, format: text, held_out: 4, max_length: 32}
train: {max_steps: 2, per_device_train_batch_size: 2}
eval: {before: false}
output: {output_dir: run, save_steps: 1}
launch: {device: cpu, num_threads: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, rows and a run on them, all named by relative paths."""
    home = tmp_path_factory.mktemp("made")
    make_tiny_model("llama").save_pretrained(home / "model")
    make_byte_tokenizer().save_pretrained(home / "model")
    write_rows(home / "rows.jsonl", [{"text": f"abab {n}"} for n in range(12)])
    (home / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run(["train", "recipe.yaml", "--json"]) == 0
    return home


@pytest.fixture
def base(made, tmp_path) -> Path:
    """A copy of the model's folder."""
    return Path(shutil.copytree(made / "model", tmp_path / "moved"))


def test_the_recipe_of_a_run_holds_absolute_paths(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained = open_run(made / "run")
    assert trained.recipe.model.model_name_or_path == str(made / "model")
    assert trained.recipe.data.path == str(made / "rows.jsonl")
    assert run(["eval", str(made / "run"), "--limit", "1", "--json"]) == 0
    monkeypatch.chdir(made)
    capsys.readouterr()
    assert run(["eval", "run", "--limit", "1"]) == 0  # the same scores: nothing is replaced
    assert "replaced" not in capsys.readouterr().err


def test_other_shards_and_stray_files_are_the_same_base(made, base):
    stray = base / "consolidated.safetensors"
    shutil.copy(base / "model.safetensors", stray)
    known = open_run(made / "run", base=BaseOptions(base)).weights_hash
    stray.unlink()
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    assert open_run(made / "run", base=BaseOptions(base)).weights_hash == known


def test_a_moved_base_is_named_in_the_hint(made, base, tmp_path, capsys):
    copy = Path(shutil.copytree(made / "run", tmp_path / "run"))
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made / "model"), "/gone/model"))
    for command in (["eval"], ["generate", "--prompt", "a"], ["inspect-routing"]):
        assert run([command[0], str(copy), *command[1:]]) == 2
        said = capsys.readouterr().err
        assert "was in /gone/model, which is not there" in said
        assert "--base-path DIR" in said
    place = ["--base-path", str(base), "--json"]
    assert run(["eval", str(copy), "--limit", "1", *place]) == 0
    assert run(["generate", str(copy), "--prompt", "a", "--max-new-tokens", "1", *place]) == 0
    assert run(["eval", str(copy), "--base-path", str(tmp_path / "nothing")]) == 2
    assert "no model is there" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["someone/tokenizer", "/no/such/tokenizer"])
def test_a_moved_base_replaces_only_a_tokenizer_that_is_gone(
    name, made, base, tmp_path, capsys, monkeypatch
):
    copy = Path(shutil.copytree(made / "run", tmp_path / "copy"))
    text = (copy / "recipe.yaml").read_text()
    assert "  tokenizer_name: null" in text
    text = text.replace("  tokenizer_name: null", f"  tokenizer_name: {name}")
    (copy / "recipe.yaml").write_text(text)
    asked = []

    def refuse(model, *_):
        asked.append(model.tokenizer_name)
        raise MocError("this is enough")

    monkeypatch.setattr(load_run.build, "make_tokenizer", refuse)
    with refused(RunError):
        open_run(copy, base=BaseOptions(base))
    gone = name.startswith("/")
    assert asked == [None if gone else name]
    assert ("which is not there: that of" in capsys.readouterr().err) == gone


def test_other_values_in_a_layer_are_named_and_refused(made, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] += 1e-3  # one value, that no sample looks at
    model.save_pretrained(base)
    for allow in (False, True):
        with refused(RunError):
            open_run(made / "run", base=BaseOptions(base, allow))


def test_a_run_goes_on_with_more_rows_of_embeddings_where_it_is_allowed(
    made, base, tmp_path, capsys
):
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(rows + 8)
    model.save_pretrained(base)
    folder = shutil.copytree(made / "run", tmp_path / "run")
    moved = ["train", str(folder / "recipe.yaml"), "--output-dir", str(folder)]
    moved += ["--base-path", str(base), "--resume", "auto"]
    assert run([*moved, "--overwrite", "--allow-changed-base"]) == 2
    capsys.readouterr()
    assert run(moved) == 2
    said = capsys.readouterr().err
    assert f"model.embed_tokens.weight: {rows} rows then, {rows + 8} now" in said
    assert "to accept the change: --allow-changed-base" in said
    longer = [*moved, "--set", "train.max_steps=3", "--json"]
    assert run([*longer, "--allow-changed-base"]) == 0
    assert "changed: the weights of the base model" in capsys.readouterr().err
    assert run(longer) == 0  # its checkpoints are now of this base
    assert run(["eval", str(folder), "--base-path", str(base), "--limit", "1"]) == 0
    assert run([*moved[:2], "--allow-changed-base"]) == 2
    assert "is for a run that is continued" in capsys.readouterr().err


def test_more_rows_of_embeddings_may_be_allowed(made, base, capsys):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    rows = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(rows + 8)
    model.save_pretrained(base)
    with refused(RunError):
        open_run(made / "run", base=BaseOptions(base))
    open_run(made / "run", base=BaseOptions(base, allow_changes=True))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    model.resize_token_embeddings(rows)
    model.save_pretrained(base)
    with refused(RunError):
        open_run(made / "run", base=BaseOptions(base))
    capsys.readouterr()
    open_run(made / "run", base=BaseOptions(base, allow_changes=True))
    assert "another vocabulary" in capsys.readouterr().err


def test_a_score_before_training_is_of_the_base_of_the_training(made, base, tmp_path, capsys):
    folder = tmp_path / "run"
    recipe = ["train", str(made / "recipe.yaml"), "--set", "eval.before=true"]
    places = [f"model.model_name_or_path={made / 'model'}", f"data.path={made / 'rows.jsonl'}"]
    places = [part for place in places for part in ("--set", place)]
    assert run([*recipe, *places, "--output-dir", str(folder)]) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 2
    model.save_pretrained(base)
    command = ["eval", str(folder), "--json"]
    sources = []
    for options in ([], ["--base-path", str(base), "--allow-changed-base"]):
        capsys.readouterr()
        assert run([*command, *options]) == 0
        entry = json.loads(capsys.readouterr().out)["tasks"]["custom"]
        sources.append(entry.get("base_source"))
    assert sources == ["before training", None]
    trained = {"base_weights_sha256": "a", "base_quantization": None}
    four_bits = trained | {"base_quantization": {"load_in_4bit": True}}
    run_folder = RunFolder.open(folder)
    assert before_training(run_folder, "texts", trained, trained)
    assert before_training(run_folder, "texts", trained, four_bits) == []


def test_a_run_is_continued_on_a_moved_base_only_if_it_is_the_same(made, base, tmp_path, capsys):
    copy = Path(shutil.copytree(made / "run", tmp_path / "run"))
    command = ["train", str(copy / "recipe.yaml"), "--resume", "auto", "--output-dir", str(copy)]
    shutil.rmtree(copy / "checkpoints" / "step-000002")
    assert run([*command, "--base-path", str(base)]) == 0
    assert "the same weights in another place" in capsys.readouterr().err
    assert open_run(copy).recipe.model.model_name_or_path == str(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(base)
    assert run(command) == 2
    assert "lm_head.weight: other values" in capsys.readouterr().err
    assert run(["train", "quickstart", "--base-path", str(base)]) == 2


def test_identities_of_older_runs_are_still_read(made, base, tmp_path):
    """They name the base by the hash of its files; a fingerprint stands beside it, or not."""
    trained = open_run(made / "run")
    folder = trained.folder
    copy = type(folder)(shutil.copytree(made / "run", tmp_path / "run"))
    environment = copy.read_environment()
    del environment["model"]["tensors"], environment["tokenizer"]
    copy.write_environment(environment)
    old = trained.adapter_config | {"base_weights_sha256": known_hash(str(made / "model"))}
    payload = save(trained.adapted.state(), {"format": "pt"})
    for lost in (None, "base_fingerprint"):
        copy.save_controls({k: v for k, v in old.items() if k != lost}, payload)
        assert open_run(copy.path).weights_hash == trained.weights_hash
    (base / "more.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with refused(RunError, hash=r"\b[0-9a-f]{12}\b"):
        open_run(copy.path, base=BaseOptions(base))


def test_differences_of_tensors(tiny_model):
    then = describe_tensors(tiny_model("llama"))
    now = describe_tensors(tiny_model("llama", seed=1))
    assert set(find_differences(then, now).values()) == {"other values"}
    assert hash_tensors(dict(reversed(then.items()))) == hash_tensors(then) != hash_tensors(now)
    name = next(iter(then))
    lost = {key: value for key, value in then.items() if key != name}
    assert find_differences(then, lost) == {name: "not there now"}
    assert find_differences(lost, then) == {name: "not there then"}
    half = describe_tensors(tiny_model("llama").bfloat16())
    assert find_differences(then, half)[name] == "float32 then, bfloat16 now"
    assert json.loads(json.dumps(then)) == then


def test_a_run_is_scored_with_the_products_of_its_training(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TF32 on a GPU, where the recipe says so: scores differ by some items else."""
    chosen: list[str] = []
    monkeypatch.setattr(load_run, "matmul_precision", lambda *_, **__: "the recipe's")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    open_run(made / "run")
    assert chosen == ["the recipe's"]


def test_an_export_is_made_and_compared_with_exact_products(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fresh process that loads it knows nothing of train.tf32."""
    chosen: list[str] = []
    monkeypatch.setattr(load_run, "matmul_precision", lambda *_, **__: "the recipe's")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)

    def opened(*given: object, **options: bool) -> None:
        open_run(*given, **options)
        raise RunError("opened")

    monkeypatch.setattr(session, "open_run", opened)
    export = ["export", str(made / "run"), "--to", "controls", "--output-dir"]
    assert run([*export, str(tmp_path / "out")]) == 2
    assert chosen == ["highest"]
