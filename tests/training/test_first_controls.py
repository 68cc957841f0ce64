"""`method.init`: A from the first rows, against singular vectors of what the model shows."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.group import run_together
from support.messages import refused
from support.models import make_tiny
from support.tiny_runs import choices_run, pairs_run
from support.toy import Plan, toy_collate, toy_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moc_cli.api import attach as attach_new
from moc_cli.api import load_controls
from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.methods import Adapted, attach
from moc_cli.peft import MocConfig
from moc_cli.processes import Processes
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.methods import ControlMethod, MocMethod
from moc_cli.training import session
from moc_cli.training.first_controls import begin_controls
from moc_cli.training.loop_types import Data

RANK, LAYERS = 3, 2
INITS = ("pca", "gradient")
ROWS = [[4, 1], [0, 2, 3]]
CPU = torch.device("cpu")


def data(rows: list[list[int]] = ROWS) -> Data:
    own = toy_rows(6)
    return Data(Plan(rows), lambda numbers: toy_collate(own, numbers))


def begun(method: MocMethod | ControlMethod, rows: list[list[int]] = ROWS) -> Adapted:
    adapted = attach(make_tiny("llama", dtype=torch.float64), method, new_modules=(), seed=1)
    assert begin_controls(adapted, method, data(rows), CPU, Processes()) == sum(map(len, rows))
    return adapted


class Watched:
    """Each site's input, and a zero matrix (d, d) beside it, by hooks on the model's own modules.

    Of a llama: attention reads what its layer does, the FFN what the second norm does.
    """

    def __init__(self, model: nn.Module, normed: bool) -> None:
        self.inputs: list[list[Tensor]] = [[] for _ in range(2 * LAYERS)]
        size = model.config.hidden_size
        self.matrices = [torch.zeros(size, size, requires_grad=True) for _ in self.inputs]
        for number, layer in enumerate(model.model.layers):
            for site, read, write in (
                (2 * number, layer.input_layernorm, layer.self_attn),
                (2 * number + 1, layer.post_attention_layernorm, layer.mlp),
            ):
                read.register_forward_pre_hook(lambda _, args, s=site: self._read(s, args[0]))
                write.register_forward_hook(lambda *given, s=site: self._add(s, given[-1]))
        self.normed = normed

    def _read(self, site: int, x: Tensor) -> None:
        if self.normed:
            x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        self.inputs[site].append(x[0].detach().double())

    def _add(self, site: int, output: Tensor | tuple) -> Tensor | tuple:
        more = (self.inputs[site][-1] @ self.matrices[site].double().T)[None]
        if isinstance(output, tuple):
            return (output[0] + more, *output[1:])
        return output + more


def expected(init: str, normed: bool) -> list[Tensor]:
    """The right singular vectors (d, d) of all states, or of the gradient of a matrix (d, d)."""
    model = make_tiny("llama", dtype=torch.float64).eval()
    watched = Watched(model, normed)
    own = toy_rows(6)
    for number in [row for batch in ROWS for row in batch]:
        ids, labels = (torch.tensor([own[number][name]]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        loss.backward()
    if init == "pca":
        found = [torch.cat(states) for states in watched.inputs]
    else:
        found = [matrix.grad.double() for matrix in watched.matrices]
    return [torch.linalg.svd(matrix)[2] for matrix in found]


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("init", INITS)
def test_rows_of_A_are_leading_singular_vectors(init: str, norm: str) -> None:
    method = MocMethod(rank=RANK, gate={"projection_dim": 8}, init=init, input_norm=norm)
    drawn = attach(make_tiny("llama"), method, new_modules=(), seed=1).state()
    adapted = begun(method)
    named = adapted.state()
    sites = [f"controls.{layer}.{block}" for layer in range(LAYERS) for block in ("attn", "ffn")]
    for site, vectors in zip(sites, expected(init, norm == "rms"), strict=True):
        A, first = named[f"{site}.A"].double(), drawn[f"{site}.A"].double()
        assert A.norm() == pytest.approx(first.norm().item(), rel=1e-5)
        lengths = A.norm(dim=1)
        assert torch.allclose(lengths, lengths[:1], rtol=1e-5)
        along = (A @ vectors.T).abs() / lengths[:, None]  # 1 on the diagonal, 0 elsewhere
        assert (along - torch.eye(*along.shape)).abs().max() < 1e-3, site
        assert not named[f"{site}.B"].any()


@pytest.mark.parametrize("init", INITS)
def test_the_start_is_the_base_and_follows_from_the_rows_alone(init: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    base = make_tiny("llama", dtype=torch.float64).eval()(ids).logits
    adapted = begun(ControlMethod(rank=RANK, init=init))
    assert torch.equal(adapted.model.eval()(ids).logits, base)
    again = begun(ControlMethod(rank=RANK, init=init)).state()
    other = begun(ControlMethod(rank=RANK, init=init), [[5], [3]]).state()
    for name, value in adapted.state().items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == name.endswith(".B")
    assert all(parameter.grad is None for parameter in adapted.model.parameters())


def _together(processes: Processes, folder: Path) -> None:
    method = ControlMethod(rank=RANK, init="gradient")
    adapted = attach(make_tiny("llama"), method, new_modules=(), seed=1)
    rows = ROWS if processes.main else [[5], [3]]  # the first process's own count
    begin_controls(adapted, method, data(rows), CPU, processes)
    torch.save(adapted.state(), folder / f"{processes.rank}.pt")


def test_several_processes_begin_with_the_same_A(tmp_path: Path) -> None:
    run_together(_together, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("init", "runs"), [("pca", choices_run), ("gradient", pairs_run)])
def test_a_run_begins_so_once_and_goes_on_with_what_it_learned(
    init: str, runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*runs(tmp_path), "--set", f"method.init={init}", "--set", "train.max_steps=4"]
    command += ["--set", "output.save_steps=2", "--set", "output.save_total_limit=null"]
    assert run([*command, "--output-dir", str(tmp_path / "whole")]) == 0
    assert re.search(rf"init +{init}, over \d\d training rows", capsys.readouterr().err)
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    parts = [*command, "--output-dir", str(tmp_path / "parts"), "--resume", checkpoint]
    with patch.object(session, "begin_controls", side_effect=AssertionError):
        assert run(parts) == 0
    folders = [tmp_path / name / "controls" for name in ("whole", "parts")]
    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    if runs is choices_run:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        loaded = load_controls(model, folders[0]).named_parameters()
        assert all(torch.equal(loaded[name], states[0][name]) for name in loaded)


def test_where_there_are_no_rows_it_is_refused(tmp_path: Path) -> None:
    with refused(MocError):
        attach_new(make_tiny("llama"), "control", rank=RANK, init="pca")
    with refused(MocError):
        get_peft_model(make_tiny("llama"), MocConfig("moc", rank=RANK, init="gradient"))
    with refused(MocError):
        attach(make_tiny("llama"), ControlMethod(rank=40, init="pca"))
    sets = ["method=control", "method.init=pca", "launch.strategy=fsdp2"]
    with refused(MocError):
        load_recipe("quickstart", sets)
