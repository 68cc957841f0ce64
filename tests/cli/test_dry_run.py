"""`moc train RECIPE --dry-run` of the paper's backbones, by every method, without a hub."""

import json

import pytest

from moc_cli.cli import run

# The adapters' share of the base in percent: spec and, to two digits, the paper's Table 1.
SHARES = {
    "llama2-7b": {"control": 0.498, "moc": 0.514, "lora": 0.833, "molex": 0.848},
    "llama3-8b": {"control": 0.418, "moc": 0.431, "lora": 0.705, "molex": 0.718},
    "mistral-7b-instruct-v0.3": {"control": 0.463, "moc": 0.478, "lora": 0.781, "molex": 0.796},
    "qwen2.5-14b-instruct": {"control": 0.426, "moc": 0.435, "lora": 0.628, "molex": 0.637},
}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ALL = [(model, method) for model, row in SHARES.items() for method in row]


@pytest.mark.parametrize(("model", "method"), ALL)
def test_the_papers_shares_come_out(model, method, capsys):
    options = [] if method == "moc" else ["--set", f"method={method}"]
    assert run(["train", f"commonsense/{model}/moc", "--dry-run", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert round(100 * found["share"], 3) == SHARES[model][method]
    assert found["trainable"] == found["adapter"]
    assert found["published_shape"]
    assert "Hugging Face hub" in found["unread"]
    assert "row" not in found


def test_only_the_hub_may_be_out_of_reach(capsys):
    recipe = ["train", "commonsense/llama2-7b/moc", "--dry-run"]
    assert run([*recipe, "--set", "data.path=/no/such/folder"]) == 2
    assert "no folder /no/such/folder" in capsys.readouterr().err
    assert run([*recipe, "--set", "model.model_name_or_path=nobody/nothing"]) == 2
    assert run([*recipe, "--set", "method=lora", "--set", "method.targets=[q_prj]"]) == 2
    assert "q_proj" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", [{}, TORCHRUN])
def test_steps_are_those_of_all_processes_together(launcher, choices, capsys, monkeypatch):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    number = [] if launcher else ["--set", "launch.num_processes=2"]
    command = [*choices, "--set", "train.max_steps=-1", "--dry-run"]
    assert run([*command, *number, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # 16 rows in micro-batches of 3, two of them a step in each of two processes; three epochs
    assert (found["rows"], found["processes"], found["steps"]) == (16, 2, 3 * 2)
    assert run([*command, *number]) == 0
    assert "6 steps of 2 processes" in " ".join(capsys.readouterr().out.split())
    for name in launcher:
        monkeypatch.delenv(name)
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3 * 3


def test_what_the_run_needs_beside_its_recipe_is_looked_for(choices, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = [*choices, "--dry-run"]
    assert run([*command, "--set", "output.report_to=[wandb]"]) == 2
    assert "asks for wandb, but the package wandb is not installed" in capsys.readouterr().err
    assert run([*command, "--set", "launch.device=cuda"]) == 0
    said = capsys.readouterr().err
    assert "launch.device is cuda, but torch sees no GPU: on this machine the run is ref" in said
