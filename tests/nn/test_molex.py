"""MoLEx against plain loops over bare layers: forward, routes, balance, gradients, generation."""

import gc

import pytest
import torch
from support.checkpointing import checkpoint_activations
from support.messages import refused
from support.models import DECODERS, FAMILIES, all_float64, has_hooks, make_batch, make_tiny
from support.molex import ALPHA, RANK, bare, expect, make, molex, train
from support.published import published
from torch import Tensor

from moc_cli.errors import FamilyError, MocError
from moc_cli.methods import Adapted, attach
from moc_cli.nn.layer_mixture import LayerMixture
from moc_cli.recipe.methods import LoraMethod, MolexMethod


def choices(adapted: Adapted) -> list[list[int]]:
    return [ids.flatten().tolist() for ids in adapted.routes().values()]


def states(adapted: Adapted, batch: dict[str, Tensor]) -> Tensor:
    """The base model's last hidden states."""
    return adapted.model.base_model(**batch)[0]


# Padding on the left also in the tests of training and of generation, in every decoder.
SIDES = [(family, "right") for family in FAMILIES] + [("llama", "left"), ("gemma3_text", "left")]


@pytest.mark.parametrize(("family", "side"), SIDES)
def test_rows_are_routed_as_in_the_reference(family, side):
    with all_float64(), torch.no_grad():
        adapted, batch = make(family), make_batch(side=side)
        ours, theirs = states(adapted, batch), expect(family, adapted, batch)
        assert choices(adapted) == theirs.picks
        assert len(set(zip(*theirs.picks, strict=True))) >= 3
        assert (ours - theirs.hidden)[batch["attention_mask"].bool()].abs().max() < 1e-10


KINDS = [{"gate": {"kind": "linear"}}, {"weight": "learned"}, {"balance": {"weight": 0.0}}]
TRAINED = [(family, {}) for family in FAMILIES]
TRAINED += [(family, kind) for family in ("llama", "bert") for kind in KINDS]


@pytest.mark.parametrize(("family", "changes"), TRAINED, ids=str)
def test_training_equals_the_reference(family, changes):
    """One choice for the batch at each depth; gradients of the task and of the balance loss."""
    side = "left" if family in DECODERS else "right"
    with all_float64():
        adapted, batch = make(family, molex(**changes)), make_batch(side=side)
        adapted.model.train()
        adapted.set_loss_scale(0.5)
        real = batch["attention_mask"].bool()
        task = torch.randn(8, 9, 32)[real]
        ours = states(adapted, batch)
        (ours[real] * task).sum().backward()
        parameters = adapted.named_trainables()
        grads = {name: p.grad.clone() for name, p in parameters.items()}
        adapted.model.zero_grad()

        theirs = expect(family, adapted, batch, by_row=False)
        balance = changes.get("balance", {"weight": 0.01})["weight"]
        ((theirs.hidden[real] * task).sum() + 0.5 * balance * sum(theirs.losses)).backward()
        assert (ours - theirs.hidden)[real].abs().max() < 1e-10
        assert choices(adapted) == [picks[:1] for picks in theirs.picks]
        assert any(picks[0] != t for t, picks in enumerate(theirs.picks))
        if balance:
            expected = balance * sum(theirs.losses).item()
            assert adapted.balance_loss() == pytest.approx(expected, abs=1e-12)
        else:
            assert adapted.balance_loss() is None
        for name, parameter in parameters.items():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (grads[name] - wanted).abs().max() < 1e-9 * max(1, wanted.abs().max()), name


@pytest.mark.parametrize("weight", [0.95, "learned"])
def test_every_parameter_gets_a_gradient_where_each_layer_chooses_itself(weight):
    adapted = make("llama", molex(weight=weight, balance={"weight": 0.0}), torch.float32, layers=1)
    adapted.model.train()(**make_batch()).logits.sum().backward()
    assert choices(adapted) == [[0]]
    for name, parameter in adapted.named_trainables().items():
        assert parameter.grad is not None, name
        assert parameter.grad.any() != name.startswith(("gates", "weight_logits")), name


def test_a_learned_weight_starts_at_the_fixed_one():
    fixed, learned = make("llama", molex(weight=0.95)), make("llama", molex(weight="learned"))
    batch = make_batch()
    with torch.no_grad():
        assert torch.allclose(states(fixed, batch), states(learned, batch), atol=1e-6)
    assert learned.no_decay("weight_logits")
    in_gate = set(filter(learned.in_gate, learned.named_trainables()))
    assert {name.split(".")[0] for name in in_gate} == {"gates", "weight_logits"}
    assert not any("lora" in name for name in in_gate)
    assert learned.no_decay("gates.shared.projection")


def test_all_weight_on_the_layer_itself_is_lora():
    method = LoraMethod(rank=RANK, alpha=ALPHA, dropout=0.0)
    plain = train(attach(bare("llama"), method, seed=1))
    batch = make_batch()
    with torch.no_grad():
        expected = plain.model(**batch).logits
        assert torch.equal(make("llama", molex(weight=1.0)).model(**batch).logits, expected)
        assert not torch.allclose(make("llama").model(**batch).logits, expected, atol=1e-3)


# Both ways of recomputing, in the kinds of layers; of deberta the table of positions is recomputed.
@pytest.mark.parametrize(
    ("family", "reentrant"),
    [(family, False) for family in ("llama", "gemma3_text", "phi3", "gpt_neox", "bert")]
    + [("modernbert", False), ("deberta-v2", False)]
    + [(family, True) for family in ("mistral", "gemma2", "roberta", "deberta")],
)
def test_gradients_are_equal_with_activation_checkpointing(family, reentrant):
    grads = []
    for checkpointing in (False, True):
        adapted = make(family, molex(weight="learned"), torch.float32)
        model = adapted.model.train()
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            checkpoint_activations(model, **kwargs)
            if reentrant:
                model.enable_input_require_grads()
        batch = make_batch()
        second = {k: v.flip(0)[:5] for k, v in batch.items()}
        # Two forwards before one backward: each must be recomputed with its own layers.
        loss = model(**batch).logits.square().mean() + model(**second).logits.square().mean()
        loss.backward()
        grads.append({n: p.grad for n, p in adapted.named_trainables().items()})
    for name, grad in grads[0].items():
        # Sums over the two forwards and passes are taken in another order.
        assert torch.allclose(grad, grads[1][name], rtol=1e-4, atol=1e-5), name
    assert grads[0]["weight_logits"].any()


def with_graph() -> int:
    gc.collect()
    # isinstance() would wake the lazy modules that it meets.
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    return sum(tensor.grad_fn is not None for tensor in tensors)


@pytest.mark.usefixtures("new_objects")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_recomputed_layer_outlives_its_backward_pass(family):
    """What lives in the backward pass is each depth's input; of a layer alone it would be 26."""
    adapted = make(family, molex(), torch.float32)
    model = adapted.model.train()
    checkpoint_activations(model)
    alive = []
    for name, parameter in adapted.named_trainables().items():
        if name.endswith("q_proj.lora_A.weight"):
            parameter.register_post_accumulate_grad_hook(lambda _: alive.append(with_graph()))
    loss = model(**make_batch()).logits.square().mean()
    loss.backward()
    assert len(alive) == 3
    assert max(alive) <= 2 * 3, alive
    del loss
    assert with_graph() == 0
    assert all(not site.loss.requires_grad for site in model.moc.sites)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert", "deberta-v2", "modernbert"])
def test_rows_alone_equal_rows_in_a_batch(family):
    with all_float64(), torch.no_grad():
        adapted, batch = make(family), make_batch()
        together, chosen = states(adapted, batch), choices(adapted)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
            assert (states(adapted, alone)[0] - together[row, :length]).abs().max() < 1e-9
            assert choices(adapted) == [[picks[row]] for picks in chosen]


@pytest.mark.parametrize(("family", "times"), [("deberta", 4), ("deberta-v2", 2)])
def test_as_many_rows_as_relative_positions(family, times):
    """The table of positions is nobody's row, also where it is as long as the batch."""
    adapted, batch = make(family, dtype=torch.float32), make_batch()
    more = {key: value.repeat(times, 1) for key, value in batch.items()}
    with torch.no_grad():
        table = adapted.model.base_model.encoder.get_rel_embedding()
        assert len(table) == 8 * times
        expected = states(adapted, batch).repeat(times, 1, 1)
        assert torch.allclose(states(adapted, more), expected, atol=1e-4)


def test_decisions_are_counted_once_and_named():
    adapted, batch = make("llama", dtype=torch.float32), make_batch()
    checkpoint_activations(adapted.model.train())
    recorder = adapted.recorder()
    with recorder:
        for _ in range(2):
            adapted.model(**batch).logits.sum().backward()
        adapted.model.eval()
        with torch.no_grad():
            adapted.model(**batch)
    pool = recorder.record(reset=True).summary()["pools"]["shared"]
    assert pool["controls"] == ["0", "1", "2"]
    assert pool["decisions"] == 2 * 3 + 8 * 3
    own = sum(picks.count(t) for t, picks in enumerate(choices(adapted)))
    assert sum(pool["use"]) == pytest.approx(1)
    assert pool["local_share"] * pool["decisions"] >= own
    assert recorder.record().summary() == {}


def test_chosen_voters_replace_the_mask():
    with all_float64(), torch.no_grad():
        adapted, batch = make("llama"), make_batch()
        voters = batch["attention_mask"].bool()
        voters[:, 1:] = False
        with adapted.voting(voters):
            ours = states(adapted, batch)
        theirs = expect("llama", adapted, batch, voters=voters)
        assert choices(adapted) == theirs.picks
        real = batch["attention_mask"].bool()
        assert (ours - theirs.hidden)[real].abs().max() < 1e-10
        states(adapted, batch)
        assert choices(adapted) != theirs.picks


def test_a_cache_that_training_passes_along_changes_nothing():
    """Models make a cache by default; layer j must not find its own keys of depth j in it."""
    adapted, batch = make("llama", dtype=torch.float32), make_batch()
    adapted.model.train()
    with torch.no_grad():
        without = adapted.model(**batch, use_cache=False).logits
        assert torch.equal(adapted.model(**batch, use_cache=True).logits, without)


def test_recorded_hidden_states_are_the_mixed_ones_and_one_a_layer():
    model, batch = bare("llama", torch.float32), make_batch()
    with torch.no_grad():
        model(**batch, output_hidden_states=True)  # transformers sets its hooks first
        train(attach(model, molex(), seed=1))
        seen = []
        model.model.layers[0].register_forward_hook(lambda *given: seen.append(given[-1]))
        found = model(**batch, output_hidden_states=True).hidden_states
    assert len(found) == 4
    assert torch.equal(found[1], seen[0])


def test_a_layer_that_chooses_itself_runs_once():
    adapted, batch = make("llama", dtype=torch.float32), make_batch()
    calls = []
    for layer in adapted.model.model.layers:
        layer.mlp.register_forward_hook(lambda *given: calls.append(len(given[-1])))
    with torch.no_grad():
        adapted.model(**batch)
        others = [j for t, row in enumerate(choices(adapted)) for j in row if j != t]
        assert 0 < len(others) < 3 * 8
        assert sum(calls) == 3 * 8 + len(others)
        calls.clear()
        adapted.model.train()(**batch)
        others = sum(picks != [t] for t, picks in enumerate(choices(adapted)))
        assert len(calls) == 3 + others


def test_rehearsing_masks_leaves_no_trace():
    """Families with layers of two types run everything but the layers once more."""
    adapted, batch = make("modernbert", dtype=torch.float32), make_batch()
    model = adapted.model.train()
    model.base_model.embeddings.drop.p = 0.5
    before = torch.get_rng_state()
    model(**batch)
    used = torch.get_rng_state()
    torch.set_rng_state(before)
    with adapted.disabled():
        model(**batch)
    assert torch.equal(torch.get_rng_state(), used)
    assert not any("forward" in vars(layer) for layer in model.base_model.layers)


def test_counts_follow_the_formula():
    lora = 2 * 3 * RANK * (64 + 48 + 48 + 96 + 96) // 2
    for changes, own in (
        ({}, 8 * 32 + 3 * 8 + 1),
        ({"gate": {"kind": "linear"}}, 3 * 32),
        ({"weight": "learned"}, 8 * 32 + 3 * 8 + 1 + 2),
    ):
        assert make("llama", molex(**changes)).counts().adapter == lora + own


@pytest.mark.parametrize(
    ("name", "share"),
    [("LLaMA2-7B", 0.848), ("LLaMA3-8B", 0.718), ("Mistral-7B", 0.796), ("Qwen2.5-14B", 0.637)],
)
def test_the_papers_shares(name, share):
    """The cosine gate, 256 wide, gives the paper's digits; a linear one adds 0.002 to LoRA's."""
    adapted = attach(published(name), MolexMethod())
    assert round(100 * adapted.counts().share, 3) == share
    assert all(p.device.type == "meta" for p in adapted.model.parameters())


def test_what_cannot_be_placed_is_refused_before_anything_changes():
    model = make_tiny("llama")
    names = set(model.state_dict())
    with refused(MocError):
        attach(model, molex(targets=["q_prj"]))
    with refused(MocError):
        attach(model, molex(mixed_layers=[0, 7, 2]))
    model.config.model_type = "lama"
    with refused(FamilyError, known=r"(?<=known: )[^)]+"):
        attach(model, molex())
    assert set(model.state_dict()) == names
    assert not has_hooks(model)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_gate_may_have_a_bias(kind: str) -> None:
    """Set to favour one layer it decides alone; without it the layer is chosen by the state."""
    gate = {"kind": kind, "projection_dim": 8, "bias": True}
    adapted = attach(bare("llama", torch.float32), molex(gate=gate), seed=1)
    named = adapted.named_trainables()
    bias = named["gates.shared.bias"]
    assert bias.any()
    assert adapted.no_decay("gates.shared.bias")
    with torch.no_grad():
        bias.copy_(1e4 * (named["gates.shared.experts"][2] if kind == "cosine" else bias * 0))
        if kind == "linear":
            bias[2] = 1e4
        adapted.model.eval()(**make_batch())
    assert all(set(picks) == {2} for picks in choices(adapted))


def test_the_most_frequent_pick_may_decide() -> None:
    """Two tokens of three pick layer 0 by a little, the third picks layer 1 by far."""
    p = torch.tensor([[[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.0, 1.0, 0.0]]])
    picks = {}
    for vote in ("mean", "mode"):
        mixture = LayerMixture(3, 3, gate="linear", vote=vote).eval()
        with torch.no_grad():
            mixture.gates["shared"].weight.copy_(torch.eye(3))
        route, _ = mixture.route(mixture.sites[0], (p + 1e-6).log())
        picks[vote] = route.ids.item()
    assert picks == {"mean": 1, "mode": 0}


def test_a_learned_weight_starts_where_it_is_said() -> None:
    mixture = LayerMixture(2, 4, weight=None, start=0.5)
    assert mixture.mix(torch.ones(1), torch.zeros(1)).item() == pytest.approx(0.5)


def always_the_first(**changes: object) -> Adapted:
    """A gate that picks layer 0 everywhere; LoRA's B is 0 and adds nothing."""
    gate = {"kind": "linear", "bias": True}
    adapted = attach(bare("llama", torch.float32), molex(gate=gate, **changes), seed=1)
    with torch.no_grad():
        adapted.named_trainables()["gates.shared.bias"][0] = 1e4
    return adapted


def test_naming_all_layers_is_the_default() -> None:
    batch, named = make_batch(), make("llama", molex(mixed_layers=[2, 0, 1]))
    with torch.no_grad():
        assert torch.equal(states(named, batch), states(make("llama"), batch))


def test_layers_that_do_not_mix_are_the_model_s_own_and_may_be_picked() -> None:
    adapted, batch, inputs = always_the_first(mixed_layers=[2]), make_batch(), []
    plain = bare("llama", torch.float32)
    for model in (adapted.model, plain):
        model.model.norm.register_forward_hook(lambda *given: inputs.append(given[1][0]))
    with torch.no_grad():
        ours, theirs = (
            model(**batch, output_hidden_states=True).hidden_states
            for model in (adapted.model, plain)
        )
        assert all(torch.equal(*pair) for pair in zip(ours[:3], theirs[:3], strict=True))
        assert set(adapted.routes()) == {"2"}
        assert not torch.allclose(*inputs, atol=1e-3)
    adapted.model.train()(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.named_trainables().values())


def test_a_generation_mixes_in_some_layers_as_one_forward_does() -> None:
    adapted, ids = always_the_first(mixed_layers=[1]), torch.randint(5, 250, (2, 9))
    with torch.no_grad():
        mask = torch.ones_like(ids)
        whole = adapted.model(ids, mask, use_cache=False).logits
        past = adapted.model(ids[:, :6], mask[:, :6], use_cache=True).past_key_values
        rest = adapted.model(ids[:, 6:], mask, past_key_values=past).logits
    assert torch.allclose(rest, whole[:, 6:], atol=1e-5)


def mean_choice(gate: dict[str, Tensor], h: Tensor) -> Tensor:
    """The mean over all tokens of h (B, T, d) of the gate's softmax, in float64."""
    gate = {name: value.detach().double() for name, value in gate.items()}
    shares = []
    for x in h.double().flatten(0, 1):
        if "weight" in gate:
            logits = gate["weight"] @ x
        else:
            f, s = gate["projection"] @ x, gate["log_temperature"].exp()
            logits = torch.stack([s * (f @ e) / (f.norm() * e.norm()) for e in gate["experts"]])
        shares.append(logits.exp() / logits.exp().sum())
    return torch.stack(shares).mean(dim=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_under_autocast_layers_are_chosen_in_float32(kind: str) -> None:
    """And the gate can be trained: its products are not in two types."""
    mixture = LayerMixture(4, 16, gate=kind, projection_dim=8).train()
    h, means = torch.randn(2, 5, 16, requires_grad=True), []

    class Watcher:
        def decided(self, site, decision):
            means.append(decision.ballot.mean[0])

    mixture.watchers.append(Watcher())
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = mixture.route(mixture.sites[0], h)
        mixture.settle(mixture.sites[0], h, loss).sum().backward()
    right = mean_choice(dict(mixture.gates["shared"].named_parameters()), h.detach())
    assert (means[0] - right).abs().max() < 1e-6
    assert all(p.grad.isfinite().all() and p.grad.any() for p in mixture.gates.parameters())
