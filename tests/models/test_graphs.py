"""No module may keep a tensor that carries a graph: it would keep a recomputed layer alive."""

import gc

import pytest
import torch
from support.checkpointing import checkpoint_activations
from support.models import make_tiny_model

from moc_cli.methods import attach
from moc_cli.recipe.methods import MocMethod, MolexMethod


def tensors_with_graph() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.grad_fn is not None)


@pytest.mark.usefixtures("new_objects")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_nothing_with_a_graph_outlives_the_backward_pass(family, checkpointing):
    model = make_tiny_model(family, num_labels=None if family == "llama" else 2).train()
    adapted = attach(model, MocMethod(rank=4))
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.randint(5, 200, (3, 7))
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean()
    if checkpointing:
        # In the backward pass every recomputed layer must be freed before the next is recomputed:
        # count what is alive whenever the gradient of a layer's control arrives.
        alive: list[int] = []
        for name, parameter in adapted.named_trainables().items():
            if name.endswith("attn.A"):
                parameter.register_post_accumulate_grad_hook(
                    lambda _: alive.append(tensors_with_graph())
                )
        loss.backward()
        assert len(alive) == model.config.get_text_config().num_hidden_layers
        assert max(alive) <= min(alive) + 2, alive
    else:
        loss.backward()
    del loss
    assert tensors_with_graph() == 0


@pytest.mark.parametrize("method", [MocMethod(rank=4), MolexMethod(rank=4, dropout=0.0)])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_logged_balance_loss_survives_a_recompute_that_stops_early(family, method):
    found = []
    for checkpointing in (False, True):
        model = make_tiny_model(family, num_labels=None if family == "llama" else 2).train()
        adapted = attach(model, method, seed=3)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            checkpoint_activations(model)
        ids = torch.arange(5, 26).reshape(3, 7)
        with adapted.recorder() as recorder:
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        found.append((adapted.balance_loss(), recorder.record().summary()))
    assert found[0] == found[1]
