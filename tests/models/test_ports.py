"""Controls placed in real model classes: laws that hold for every family and every way to run."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpointing import checkpoint_activations
from support.messages import refused
from support.models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    has_hooks,
    make_batch,
    make_tiny,
    tiny_config,
    train_controls,
)
from support.processes import run_program
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from moc_cli.errors import MocError
from moc_cli.methods import attach
from moc_cli.models.families import FAMILIES as TABLE
from moc_cli.recipe.methods import ControlMethod, LoraMethod, MocMethod, MolexMethod


def moc(**changes) -> MocMethod:
    section = {"rank": 4, "gate": {"projection_dim": 8}} | changes
    return MocMethod.model_validate(section)


def make(family: str, method=None, *, trained=True, new_modules=(), **changes):
    """A tiny model with a method; `trained` draws non-zero B and a gate with distinct routes."""
    adapted = attach(make_tiny(family, **changes), method or moc(), new_modules=new_modules, seed=1)
    if trained:
        train_controls(adapted.named_trainables())
    return adapted


def routes(adapted) -> list:
    """The last decision of every site, copied."""
    return [ids.clone() for ids in adapted.routes().values()]


def count_updates(adapted) -> list[int]:
    """A list that grows with each update of a site."""
    mixture, seen = adapted.mixture, []
    original = mixture.update

    def spy(site, x):
        seen.append(site.index)
        return original(site, x)

    mixture.update = spy
    return seen


# Families whose sites differ most: one block after another or both at once, fused, encoders.
KINDS = ("llama", "gemma3", "gpt_neox", "bert", "modernbert")
RECOMPUTED = [(family, False) for family in FAMILIES] + [(family, True) for family in KINDS]


@pytest.mark.parametrize(("family", "reentrant"), RECOMPUTED)
def test_gradients_are_equal_with_activation_checkpointing(family, reentrant):
    grads, calls = [], []
    for checkpointing in (False, True):
        adapted = make(family)
        model = adapted.model.train()
        calls.append(count_updates(adapted))
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            checkpoint_activations(model, **kwargs)
            if reentrant:
                model.enable_input_require_grads()
        first, second = make_batch(), make_batch(side="left" if family in DECODERS else "right")
        second = {k: v.flip(0) for k, v in second.items()}
        # Two forwards before one backward: each must be recomputed with its own mask.
        loss = model(**first).logits.square().mean() + model(**second).logits.square().mean()
        loss.backward()
        grads.append({n: p.grad for n, p in adapted.named_trainables().items()})
        assert all(grad is not None for grad in grads[-1].values())
    # Every site really ran again, but for those that write outside the layer's checkpoint.
    again = 1 if TABLE[family].placement.attn.write == "" else 2
    assert [len(seen) for seen in calls] == [2 * 4, again * 2 * 4]
    for name, grad in grads[0].items():
        # Reentrant checkpointing adds the two forwards' gradients in another order.
        assert torch.allclose(grad, grads[1][name], rtol=0, atol=1e-6 if reentrant else 0), name


@pytest.mark.parametrize("family", KINDS)
def test_the_balance_loss_reaches_the_gate_once_and_scaled(family):
    adapted = make(family)
    model = adapted.model.train()
    gate = adapted.named_trainables()["gates.shared.experts"]
    found = []
    for checkpointing, scale in ((False, 1.0), (True, 1.0), (False, 0.25)):
        if checkpointing:
            checkpoint_activations(model)
        else:
            model.activation_checkpointing_disable()
        adapted.set_loss_scale(scale)
        gate.grad = None
        model(**make_batch()).logits.sum().backward()
        found.append(gate.grad.clone())
    assert found[0].abs().max() > 0  # at K = 1 the task loss gives the gate nothing
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-9)
    assert torch.allclose(0.25 * found[0], found[2], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_alone_equal_rows_in_a_batch(family):
    adapted = make(family)
    base = make_tiny(family)
    inputs = make_batch()
    with torch.no_grad():
        together, chosen = adapted.model(**inputs).logits, routes(adapted)
        bare = base(**inputs).logits
        assert len({tuple(c[row].item() for c in chosen) for row in range(8)}) >= 3
        for row in range(8):
            alone = {
                k: v[row : row + 1, : int(inputs["attention_mask"][row].sum())]
                for k, v in inputs.items()
            }
            ours = adapted.model(**alone).logits[0]
            theirs = base(**alone).logits[0]
            for site, choice in enumerate(routes(adapted)):
                assert torch.equal(choice[0], chosen[site][row])
            span = slice(0, ours.shape[0]) if ours.ndim > 1 else slice(None)
            noise = (bare[row][span] - theirs).abs().max()
            assert (together[row][span] - ours).abs().max() <= max(10 * noise, 1e-5)


def test_a_reused_static_cache_is_a_new_prefill_after_reset():
    adapted = make("llama")
    model = adapted.model
    cache = StaticCache(config=model.config, max_cache_len=16)
    inputs = make_batch(rows=1)["input_ids"]
    with torch.no_grad():
        for ids in (inputs, inputs.flip(1)):
            cache.reset()
            model(input_ids=ids, past_key_values=cache)
            chosen = routes(adapted)
            assert chosen[0] is not None
            expected = model(input_ids=ids, use_cache=False)
            assert all(torch.equal(a, b) for a, b in zip(chosen, routes(adapted), strict=True))
            del expected


def test_repeated_and_selected_cache_rows_take_their_routes_along():
    adapted = make("llama")
    inputs = make_batch(side="left")
    with torch.no_grad():
        cache = adapted.model(**inputs, use_cache=True).past_key_values
        kept = adapted.model.moc.current.store
        stored = kept.routes[0].ids.clone()
        cache.batch_repeat_interleave(3)
        assert torch.equal(kept.routes[0].ids, stored.repeat_interleave(3, 0))
        cache.batch_select_indices(torch.tensor([9, 0]))
        assert torch.equal(kept.routes[0].ids, stored[[3, 0]])
        copied = copy.deepcopy(cache)
        copied.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(kept.routes[0].ids, stored[[3, 0]])
        step(adapted.model, copied, {name: value[[0, 3]] for name, value in inputs.items()})
        assert torch.equal(adapted.model.moc.current.store.routes[0].ids, stored[[0, 3]])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_emptied_cache_is_as_any_other(kind):
    model = make("llama").model
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, 16)
    inputs = make_batch(rows=2, side="left")
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for _ in range(2):
            cache.crop(-9) if kind == "dynamic" else cache.reset()
        assert cache.get_seq_length() == 0
        cache.reorder_cache(torch.tensor([1, 0]))
        found = model(**inputs, past_key_values=cache).logits
        assert torch.allclose(found, model(**inputs, use_cache=False).logits, atol=1e-5)


def step(model, cache, inputs, new=1):
    """The logits of `new` more tokens after a prompt in a cache."""
    rows = len(inputs["input_ids"])
    tail = torch.ones(rows, cache.get_seq_length() + new - inputs["attention_mask"].shape[1])
    mask = torch.cat([inputs["attention_mask"], tail.long()], dim=1)
    ids = torch.arange(7, 7 + new).expand(rows, new)
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


def test_a_cache_that_other_controls_began_gets_routes_of_the_present_ones():
    adapted, inputs = make("llama", moc(top_k=2)), make_batch(rows=3, side="left")
    cache = DynamicCache(config=adapted.model.config)
    with torch.no_grad():
        adapted.model(**inputs, past_key_values=cache)
        step(adapted.model, cache, inputs)  # banks of the first controls
        model = adapted.detach()
        other = attach(model, moc(top_k=1, rank=3, share_gate=False), seed=2)
        train_controls(other.named_trainables(), 9)
        plain = DynamicCache(config=model.config)
        for number, layer in enumerate(cache.layers):
            plain.update(layer.keys.clone(), layer.values.clone(), number)
        for new in (2, 1):
            expected, found = (step(model, one, inputs, new) for one in (plain, cache))
            assert torch.equal(found, expected)
        assert model.moc.current.store.routes[0].ids.shape == (3, 1)


def test_gradients_pass_through_cached_steps():
    adapted, inputs = make("llama", moc(top_k=2)), make_batch(rows=2, side="left")
    cache = DynamicCache(config=adapted.model.config)
    with torch.no_grad():
        adapted.model(**inputs, past_key_values=cache)
        step(adapted.model, cache, inputs)
    own = adapted.named_trainables()
    caches = [cache, copy.deepcopy(cache)]
    with torch.no_grad():
        copied = step(adapted.model, caches[1], inputs)
    found = step(adapted.model, cache, inputs)
    assert torch.allclose(found, copied, atol=1e-5)
    found.square().sum().backward()
    for block in ("attn", "ffn"):
        for layer in range(2):
            assert own[f"controls.{layer}.{block}.A"].grad.abs().sum() > 0


def test_a_pickled_model_keeps_its_controls():
    adapted, inputs = make("llama"), make_batch(rows=2, side="left")
    adapted.model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False}
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(adapted.model))
        expected = adapted.model(**inputs).logits
        written = adapted.model.generate(**inputs, **options)
        for parameter in adapted.named_trainables().values():
            parameter.zero_()
        assert torch.equal(again(**inputs).logits, expected)
        assert torch.equal(again.generate(**inputs, **options), written)


@pytest.mark.parametrize(
    "method", [moc(), ControlMethod(rank=2), LoraMethod(rank=2), MolexMethod(rank=2)]
)
def test_disabled_within_disabled_stays_off_to_the_outer_end(method):
    bare = make_tiny("llama")
    adapted, inputs = make("llama", method), make_batch(rows=2)
    with torch.no_grad():
        for name, parameter in adapted.named_trainables().items():
            if "lora_B" in name:
                parameter.fill_(0.1)
        on, off = adapted.model(**inputs).logits, bare(**inputs).logits
        assert not torch.equal(on, off)
        with adapted.disabled():
            with adapted.disabled():
                assert torch.equal(adapted.model(**inputs).logits, off)
            assert torch.equal(adapted.model(**inputs).logits, off)
        assert torch.equal(adapted.model(**inputs).logits, on)
    assert all(parameter.requires_grad for parameter in adapted.named_trainables().values())


def test_chosen_voters_replace_the_mask():
    adapted = make("llama")
    inputs = make_batch(rows=1)
    prompt = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    prompt[:, :4] = True
    with torch.no_grad():
        with adapted.voting(prompt):
            adapted.model(**inputs)
            chosen = routes(adapted)
        adapted.model(input_ids=inputs["input_ids"][:, :4])
        assert all(torch.equal(a, b) for a, b in zip(chosen, routes(adapted), strict=True))


def test_fresh_modules_are_trained_and_saved():
    adapted = make("bert", new_modules=("bert.pooler", "classifier"))
    names = {n for n in adapted.named_trainables() if n.startswith("modules.")}
    assert names == {
        "modules.bert.pooler.dense.weight",
        "modules.bert.pooler.dense.bias",
        "modules.classifier.weight",
        "modules.classifier.bias",
    }
    counts = adapted.counts()
    assert counts.modules == 32 * 32 + 32 + 3 * 32 + 3
    assert counts.adapter == 4 * 2 * 4 * 32 + 8 * 32 + 4 * 8 + 1
    total = sum(p.numel() for p in adapted.model.parameters())
    assert counts.base == total - counts.modules - counts.adapter


@pytest.mark.parametrize("family", ENCODERS)
def test_bfloat16_base_trains_float32_controls_and_heads(family):
    adapted = attach(make_tiny(family).bfloat16().train(), moc(), new_modules=("classifier",))
    out = adapted.model(**make_batch()).logits
    out.float().square().mean().backward()
    for parameter in adapted.named_trainables().values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
    assert out.isfinite().all()


def test_wrong_placement_and_too_many_routes_are_refused_before_anything_changes():
    model = make_tiny("llama")
    keys = set(model.state_dict())
    place = {
        "layers": "layers",
        "attn": {"read": "input_layernorm", "write": "attention"},
        "ffn": {"read": "post_attention_layernorm", "write": "mlp"},
        "causal": True,
    }
    with refused(MocError, modules=r"(?<=Layer 0 holds: )self_attn, [\w., ]+norm"):
        attach(model, moc(placement=place))
    with refused(MocError):
        attach(model, moc(top_k=5))
    with refused(MocError):
        attach(model, moc(top_k=4, routing={"exclude_local": True}))
    model.config.model_type = "lama"
    with refused(MocError, known=r"(?<=known: )[^)]+", modules=r"(?<=Layer: ).*norm"):
        attach(model, moc())
    assert set(model.state_dict()) == keys
    assert not has_hooks(model)


@pytest.mark.parametrize("family", KINDS)
def test_parameters_of_a_placement_are_as_many_as_the_formula_says(family):
    """Sites of one block, and one linear gate for all; see also tests/methods/test_contract.py."""
    counts = make(family, moc(sites="ffn", gate={"kind": "linear"})).counts()
    assert counts.adapter == 2 * (2 * 4 * 32) + 2 * 32
    counts = make(family, moc(gate={"kind": "linear"})).counts()
    assert counts.adapter == 2 * 2 * (2 * 4 * 32) + 4 * 32
    counts = make(family, ControlMethod(rank=4)).counts()
    assert counts.share == counts.adapter / counts.base


RELOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from moc_cli.methods import attach
from moc_cli.models.load import load_model
from moc_cli.recipe.methods import MocMethod
torch.set_num_threads(1)
method = MocMethod.model_validate_json(sys.argv[2])
for folder in sorted(Path(sys.argv[1]).iterdir()):
    kind = (folder / "kind").read_text()
    loaded = load_model(str(folder), kind=kind)
    assert not loaded.new_modules
    adapted = attach(loaded.model.eval(), method, seed=99)
    adapted.load_state(load_file(folder / "adapter" / "controls.safetensors"))
    inputs = load_file(folder / "adapter" / "inputs.safetensors")
    with torch.no_grad():
        logits = adapted.model(**inputs).logits
    save_file({"logits": logits}, folder / "adapter" / "again.safetensors")
"""


def test_saved_controls_give_the_same_logits_in_a_fresh_process(tmp_path):
    expected = {}
    for family in FAMILIES:
        folder = tmp_path / family
        model = make_tiny(family)
        model.save_pretrained(folder)
        (folder / "kind").write_text("causal" if family in DECODERS else "classification")
        adapted = attach(model, moc(), seed=1)
        train_controls(adapted.named_trainables())
        (folder / "adapter").mkdir()
        save_file(adapted.state(), folder / "adapter" / "controls.safetensors")
        save_file(make_batch(), folder / "adapter" / "inputs.safetensors")
        with torch.no_grad():
            expected[family] = model(**make_batch()).logits
    done = run_program(RELOAD, str(tmp_path), moc().model_dump_json())
    assert done.returncode == 0, done.stderr[-2000:]
    for family in FAMILIES:
        again = load_file(tmp_path / family / "adapter" / "again.safetensors")["logits"]
        assert torch.equal(again, expected[family]), family


def test_a_state_loads_strictly():
    adapted = make("llama")
    other = make("llama", trained=False)
    inputs = make_batch()
    other.load_state(adapted.state())
    assert torch.equal(other.model(**inputs).logits, adapted.model(**inputs).logits)
    state = adapted.state()
    state["controls.9.attn.A"] = state.pop("controls.0.attn.A")
    state["controls.0.ffn.A"] = state["controls.0.ffn.A"][:1]
    with refused(MocError):
        other.load_state(state)


@pytest.mark.parametrize("block", ["self_attn", "mlp"])
def test_a_failed_forward_leaves_nothing_behind(block):
    """As one that does not fit in memory: activations are freed, and the model can be copied."""
    adapted, batch = make("llama"), make_batch(4)
    first, last = adapted.model.model.layers
    kept = []

    def remember(module, args, output):
        kept.append(weakref.ref(output.untyped_storage()))

    def fail(module, args, output):
        raise MemoryError

    first.mlp.act_fn.register_forward_hook(remember)
    handle = getattr(last, block).register_forward_hook(fail)
    adapted.model.train()
    with contextlib.suppress(MemoryError):
        adapted.model(**batch)
    handle.remove()
    gc.collect()
    assert len(kept) == 1
    assert kept[0]() is None
    again = copy.deepcopy(adapted.model)
    assert torch.equal(again(**batch).logits, adapted.model(**batch).logits)


@pytest.mark.parametrize("method", [moc(), MolexMethod(rank=4)])
@torch.no_grad()
def test_an_encoders_family_can_be_a_decoder(method):
    """Its generations keep the routes of the prompt, with a cache and without."""
    config = tiny_config("bert", is_decoder=True)
    adapted = attach(AutoModelForCausalLM.from_config(config).eval(), method)
    train_controls(adapted.named_trainables())
    batch = make_batch(4, "left")
    options = {"max_new_tokens": 5, "eos_token_id": None, "output_logits": True}
    cached, whole = (
        adapted.model.generate(
            **batch, **options, use_cache=use_cache, return_dict_in_generate=True
        ).logits
        for use_cache in (True, False)
    )
    for a, b in zip(cached, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
