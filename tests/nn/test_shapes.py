"""The shapes that ship with the package: without the hub they give the paper's shares."""

import pytest
import torch
from support.messages import refused
from support.models import make_tiny
from transformers import AutoConfig

from moc_cli.errors import MocError
from moc_cli.methods import attach
from moc_cli.models.load import build_meta, find_shape
from moc_cli.recipe.methods import ControlMethod, MocMethod

LLAMA2, LLAMA3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"
MISTRAL, QWEN = "mistralai/Mistral-7B-Instruct-v0.3", "Qwen/Qwen2.5-14B-Instruct"
# Trained parameters over the base's, in percent: Control and MoC of rank 64 on both sites.
SHARES = {
    LLAMA2: (0.498, 0.514),
    LLAMA3: (0.418, 0.431),
    MISTRAL: (0.463, 0.478),
    QWEN: (0.426, 0.435),
}
# Parameters of the encoders alone, without a pooler: known from their checkpoints.
ENCODERS = {
    "FacebookAI/roberta-base": 124_055_040,
    "FacebookAI/roberta-large": 354_310_144,
    "microsoft/deberta-v3-base": 183_831_552,
    "microsoft/deberta-v3-large": 434_012_160,
}


@pytest.fixture
def unreachable(monkeypatch):
    """As on a machine that has never seen these models, without a network."""

    def refuse(name, **options):
        raise OSError(f"{name} is neither cached nor reachable")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("name", SHARES)
def test_shares_of_the_decoders_are_the_papers(name):
    model = build_meta(name, kind="causal", dtype="bfloat16")
    assert model.published_shape
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shares = []
    for method in (ControlMethod(rank=64), MocMethod(rank=64)):
        adapted = attach(model, method)
        shares.append(round(100 * adapted.counts().share, 3))
        adapted.detach()
    assert tuple(shares) == SHARES[name]


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_their_published_size(name):
    model = build_meta(name, kind="classification", num_labels=2)
    assert model.published_shape
    size = sum(p.numel() for n, p in model.base_model.named_parameters() if "pooler" not in n)
    assert size == ENCODERS[name]
    adapted = attach(model, MocMethod(rank=16), new_modules=("classifier",))
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    gate = 256 * width + 2 * layers * 256 + 1
    assert adapted.counts().adapter == 2 * layers * 2 * 16 * width + gate


def test_a_config_at_hand_comes_before_the_published_one(monkeypatch):
    changed = AutoConfig.for_model("llama", num_hidden_layers=3)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **options: changed)
    config, published = find_shape(LLAMA2)
    assert config.num_hidden_layers == 3
    assert not published


@pytest.mark.usefixtures("unreachable")
def test_another_revision_is_not_the_published_one():
    with refused(MocError):
        find_shape(LLAMA2, revision="step-10")
    with refused(MocError):
        find_shape("meta-llama/Llama-2-13b-hf")


def test_a_folder_is_read_as_it_is(tmp_path):
    make_tiny("qwen3").save_pretrained(tmp_path)
    model = build_meta(str(tmp_path), kind="causal")
    assert not model.published_shape
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.float32
