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
