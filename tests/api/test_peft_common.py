"""What peft's own common tests ask of every method, asked of ours."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from support.models import make_batch, make_tiny, train_controls
from transformers import PreTrainedModel

from moc_cli.peft import MocConfig

CONFIGS = {"moc": {"rank": 4, "top_k": 2, "gate": {"projection_dim": 8}}, "control": {"rank": 3}}
pytestmark = pytest.mark.parametrize("method", CONFIGS)


def config(method: str, **more: object) -> MocConfig:
    return MocConfig(method, task_type="CAUSAL_LM", **CONFIGS[method], **more)


def base(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return make_tiny("llama").eval().to(dtype)


def trained(method: str, seed: int = 5, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(base(dtype), config(method, seed=seed))
    train_controls({n: p for n, p in model.named_parameters() if p.requires_grad}, seed)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch(4, "left")).logits


def test_a_config_is_written_and_read(method: str, tmp_path: Path) -> None:
    ours = config(method)
    ours.save_pretrained(tmp_path)
    for kind in (MocConfig, PeftConfig):
        assert kind.from_pretrained(tmp_path).to_dict() == ours.to_dict()
    assert copy.deepcopy(ours).to_dict() == ours.to_dict()


def test_the_wrapped_model_looks_like_the_base(method: str) -> None:
    model = trained(method)
    assert model.base_model.model.config.model_type == "llama"
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


def test_only_the_set_is_trained_and_counted(method: str) -> None:
    model = trained(method)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".moc_mixtures.default." in name for name in names)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == trainable + sum(p.numel() for p in base().parameters())
    assert model.get_model_status().active_adapters == ["default"]


def test_a_state_is_taken_out_and_put_in(method: str) -> None:
    first, second = trained(method, 5), trained(method, 6)
    assert not torch.equal(logits(first), logits(second))
    state = get_peft_model_state_dict(first)
    assert not [key for key in state if "default" in key]
    set_peft_model_state_dict(second, state)
    assert torch.equal(logits(first), logits(second))


def test_chosen_sets_are_saved(method: str, tmp_path: Path) -> None:
    model = trained(method)
    model.add_adapter("other", config(method))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not [n for n, p in again.named_parameters() if p.requires_grad]
    learning = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert [n for n, p in learning.named_parameters() if p.requires_grad]


def test_sets_that_are_not_there(method: str) -> None:
    model = trained(method)
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")


def test_a_copy_and_a_pickle_stand_alone(method: str) -> None:
    model = trained(method)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.endswith(".B"):
                    parameter.zero_()
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)


def test_a_step_changes_the_set_alone(method: str) -> None:
    model = trained(method).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    given = make_batch(4)
    model(**given, labels=given["input_ids"]).loss.backward()
    optimizer.step()
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert changed
    assert all(".moc_mixtures.default." in name for name in changed)


def test_a_bfloat16_base_generates(method: str) -> None:
    model = trained(method, dtype=torch.bfloat16)
    given = make_batch(3, "left")
    ids = given["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    named = model.generate(**given, **options)
    placed = model.generate(ids, attention_mask=given["attention_mask"], **options)
    assert torch.equal(named, placed)
    assert logits(model).dtype == torch.bfloat16


def test_the_base_is_back_after_unloading(method: str) -> None:
    model, bare = trained(method), logits(base())
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), bare)
    assert not hasattr(unloaded, "moc")
    assert logits(get_peft_model(unloaded, config(method))).isfinite().all()
