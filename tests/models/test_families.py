"""Where each family's controls sit: against full layers written from eq. 9, and nowhere else."""

import re
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from support.full_layers import FULL, Sites
from support.messages import refused
from support.models import (
    DECODERS,
    FAMILIES,
    WIDTH,
    all_float64,
    has_hooks,
    make_batch,
    make_tiny,
    train_controls,
)
from support.reference import Settings
from torch import Tensor, nn

from moc_cli.errors import FamilyError
from moc_cli.methods import Adapted, attach
from moc_cli.models.families import FAMILIES as TABLE
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.methods import MocMethod

TOLERANCE = 1e-10
# gpt_neox has two forms of layer under one name.
CASES = {family: (family, {}) for family in FAMILIES} | {
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False})
}
# Families whose blocks end in a dropout of their own: with it at 1, nothing of the block is left.
DROPPED = ("phi", "phi3", "gpt_neox", "gpt_neox sequential")


def moc(**changes) -> MocMethod:
    section = {"rank": 4, "top_k": 2, "alpha": 0.6, "gate": {"projection_dim": 8}} | changes
    return MocMethod.model_validate(section)


def make(case: str) -> nn.Module:
    family, changes = CASES.get(case, (case, {}))
    return make_tiny(family, dtype=torch.float64, **changes)


def drop_blocks(model: nn.Module) -> None:
    """Train mode, with the dropouts at the end of each block at 1."""
    model.train()
    for name, module in model.named_modules():
        if name.endswith(("resid_dropout", "resid_attn_dropout", "resid_mlp_dropout")):
            module.p = 1.0
        if name.endswith(("post_attention_dropout", "post_mlp_dropout")):
            module.p = 1.0


def sites_of(adapted: Adapted, voters: Tensor, **settings) -> Sites:
    """The same controls and gate for the full layers of a bare model."""
    p = {name: value.detach() for name, value in adapted.named_trainables().items()}
    controls = [
        (p[f"controls.{layer}.{block}.A"], p[f"controls.{layer}.{block}.B"])
        for layer in range(2)
        for block in ("attn", "ffn")
    ]
    gate = {name.removeprefix("gates.shared."): p[name] for name in p if name.startswith("gates.")}
    return Sites(controls, gate, Settings(**{"top_k": 2, "alpha": 0.6} | settings), voters)


def full(case: str, batch: dict[str, Tensor], sites: Sites, keep: float = 1.0) -> Tensor:
    bare = make(case)
    with torch.no_grad():
        forward = FULL[CASES.get(case, (case,))[0]]
        return forward(bare.base_model, batch["input_ids"], batch["attention_mask"], sites, keep)


def error(model: nn.Module, batch: dict[str, Tensor], expected: Tensor) -> float:
    """Largest difference of last hidden states over real tokens."""
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
    return (hidden - expected)[batch["attention_mask"].bool()].abs().max().item()


def sides(case: str) -> tuple[str, ...]:
    return ("right", "left") if CASES[case][0] in DECODERS else ("right",)


@pytest.mark.parametrize("case", CASES)
def test_rows_routed_alone_equal_the_full_layers(case):
    with all_float64():
        adapted = attach(make(case), moc(), seed=1)
        train_controls(adapted.named_trainables())
        for side in sides(case):
            batch = make_batch(6, side)
            sites = sites_of(adapted, batch["attention_mask"].bool(), level="sample")
            assert error(adapted.model, batch, full(case, batch, sites)) < TOLERANCE
            ours = [ids.tolist() for ids in adapted.routes().values()]
            assert ours == sites.picks
            rows = {tuple(tuple(site[row]) for site in ours) for row in range(6)}
            assert len(rows) >= 3


@pytest.mark.parametrize("case", CASES)
def test_a_batch_routed_together_equals_the_full_layers(case):
    with all_float64():
        method = moc(gate={"kind": "linear"}, routing={"vote": "mode"}, balance={"weight": 0.0})
        adapted = attach(make(case).train(), method, seed=1)
        train_controls(adapted.named_trainables())
        batch = make_batch(6, sides(case)[-1])
        sites = sites_of(
            adapted, batch["attention_mask"].bool(), level="batch", kind="linear", vote="mode"
        )
        assert error(adapted.model, batch, full(case, batch, sites)) < TOLERANCE
        ours = [ids.tolist() for ids in adapted.routes().values()]
        assert ours == sites.picks


@pytest.mark.parametrize("case", DROPPED)
def test_a_dropped_block_leaves_its_control(case):
    with all_float64():
        adapted = attach(make(case), moc(), seed=1)
        train_controls(adapted.named_trainables())
        drop_blocks(adapted.model)
        batch = make_batch(6)
        sites = sites_of(adapted, batch["attention_mask"].bool(), level="batch")
        assert error(adapted.model, batch, full(case, batch, sites, keep=0.0)) < TOLERANCE


# Swaps that name the same place of eq. 9 in other words, and so must not change anything: an outer
# module whose input (output) is that of the one in the table, or the module inside it that sees it
# first (makes it last). "" is the layer itself: its input is x_t of its first block, and adding to
# its output is adding to the sum that it returns.
_FIRST = {"", "input_layernorm"}
_SAME_PRE_NORM = {
    "attn.read": _FIRST,
    "attn.write": {"self_attn", "self_attn.o_proj"},
    "ffn.read": {"post_attention_layernorm"},
    "ffn.write": {"mlp", "mlp.down_proj", ""},
}
_SAME_TWO_NORMS = {
    "attn.read": _FIRST,
    "attn.write": {"post_attention_layernorm"},
    "ffn.read": {"pre_feedforward_layernorm"},
    "ffn.write": {"post_feedforward_layernorm", ""},
}
_SAME_NEOX = {
    "attn.read": _FIRST,
    "attn.write": {"post_attention_dropout"},
    "ffn.read": {"post_attention_layernorm"},
    "ffn.write": {"post_mlp_dropout", ""},
}
_ONE_SUM = {"self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", ""}
_SAME_POST_NORM = {
    "attn.read": {"", "attention", "attention.self"}
    | {f"attention.self.{name}" for name in ("query", "key", "value")},
    "attn.write": {"attention", "attention.output", "attention.output.LayerNorm"},
    "ffn.read": {"intermediate", "intermediate.dense"},
    "ffn.write": {"output", "output.LayerNorm", ""},
}
SAME: dict[str, dict[str, set[str]]] = {
    "llama": _SAME_PRE_NORM,
    "mistral": _SAME_PRE_NORM,
    "qwen2": _SAME_PRE_NORM,
    "qwen3": _SAME_PRE_NORM,
    # The experts see rows and tokens as one axis.
    "qwen3_moe": _SAME_PRE_NORM | {"ffn.write": {"mlp", ""}},
    "smollm3": _SAME_PRE_NORM,
    # Not the layer itself: its output is not multiplied as the blocks' are.
    "granite": _SAME_PRE_NORM | {"ffn.write": {"mlp", "mlp.down_proj"}},
    "gemma2": _SAME_TWO_NORMS,
    "gemma3_text": _SAME_TWO_NORMS,
    "gemma3": _SAME_TWO_NORMS,
    # The layer alone: a dropout follows the blocks, and it is called twice.
    "phi": {
        "attn.read": _FIRST,
        "attn.write": {""},
        "ffn.read": _FIRST,
        "ffn.write": {""},
    },
    # Not `self_attn` and `mlp`, which a dropout follows.
    "phi3": _SAME_PRE_NORM
    | {"attn.write": {"resid_attn_dropout"}, "ffn.write": {"resid_mlp_dropout", ""}},
    "olmo2": {
        "attn.read": {"", "self_attn"} | {f"self_attn.{c}_proj" for c in "qkv"},
        "attn.write": {"post_attention_layernorm"},
        "ffn.read": {"mlp", "mlp.gate_proj", "mlp.up_proj"},
        "ffn.write": {"post_feedforward_layernorm", ""},
    },
    # Both blocks read the layer's input and add to one sum, so either may be written for the other.
    "gpt_neox": _SAME_NEOX
    | {
        "attn.write": {"post_attention_dropout", "post_mlp_dropout", ""},
        "ffn.read": {"post_attention_layernorm", *_FIRST},
    },
    "gpt_neox sequential": _SAME_NEOX,
    # Both blocks read one norm and add to one sum: each may be written where the other is.
    "cohere": {
        "attn.read": _FIRST,
        "attn.write": _ONE_SUM,
        "ffn.read": _FIRST,
        "ffn.write": _ONE_SUM,
    },
    "bert": _SAME_POST_NORM,
    "roberta": _SAME_POST_NORM,
    "xlm-roberta": _SAME_POST_NORM,
    "camembert": _SAME_POST_NORM,
    "electra": _SAME_POST_NORM,
    "deberta": _SAME_POST_NORM
    | {"attn.read": {"", "attention", "attention.self", "attention.self.in_proj"}},
    # Here query_proj and key_proj see x_t too, but then the position table: the last call counts.
    "deberta-v2": _SAME_POST_NORM
    | {"attn.read": {"", "attention", "attention.self", "attention.self.value_proj"}},
    "distilbert": {
        "attn.read": {"", "attention"} | {f"attention.{c}_lin" for c in "qkv"},
        "attn.write": {"sa_layer_norm"},
        "ffn.read": {"ffn", "ffn.lin1"},
        "ffn.write": {"output_layer_norm", ""},
    },
    "modernbert": {
        "attn.read": {"", "attn_norm"},
        "attn.write": {"attn", "attn.Wo", "attn.out_drop"},
        "ffn.read": {"mlp_norm"},
        "ffn.write": {"mlp", "mlp.Wo", ""},
    },
}


def states_of_width(layer: nn.Module, run: Callable[[], object]) -> dict[str, set[str]]:
    """The layer's modules whose first input ("read") or output ("write") could be a state."""
    found: dict[str, set[str]] = {"read": set(), "write": set()}

    def is_state(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim == 3 and value.shape[-1] == WIDTH

    def watch(name: str) -> Callable[..., None]:
        def hook(module, args, kwargs, output) -> None:
            if is_state(args[0] if args else kwargs.get("hidden_states")):
                found["read"].add(name)
            if is_state(output[0] if isinstance(output, tuple) else output):
                found["write"].add(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in layer.named_modules()
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", CASES)
def test_no_other_place_is_right(case):
    """Each of the four places swapped for every other module in the layer that sees a state."""
    placement = TABLE[CASES[case][0]].placement
    place = asdict(placement) | {"multiplier": placement.multiplier or None}
    with all_float64():
        model = make(case)
        batch = {name: value[:, 3:] for name, value in make_batch(4, "left").items()}
        if not placement.causal:
            batch = {name: value.flip(1) for name, value in batch.items()}
        layer = model.base_model.get_submodule(placement.layers)[1]
        places = states_of_width(layer, lambda: model(**batch))
        expected: dict[str, Tensor] = {}

        def matches(changed: dict) -> bool:
            adapted = attach(model.eval(), moc(placement=changed), seed=1)
            train_controls(adapted.named_trainables())
            voters = batch["attention_mask"].bool()
            if not expected:
                sites = sites_of(adapted, voters, level="sample")
                expected["eval"] = full(case, batch, sites)
            if case in DROPPED and "dropped" not in expected:
                sites = sites_of(adapted, voters, level="batch")
                expected["dropped"] = full(case, batch, sites, keep=0.0)
            try:
                right = error(model, batch, expected["eval"]) < TOLERANCE
                if right and case in DROPPED:
                    drop_blocks(model)
                    right = error(model, batch, expected["dropped"]) < TOLERANCE
            except RuntimeError:  # written before it is read, or read in another shape
                right = False
            adapted.detach()
            return right

        assert matches(place)
        for block in ("attn", "ffn"):
            for end in ("read", "write"):
                swaps = {p: {**place, block: {**place[block], end: p}} for p in places[end]}
                right = {name for name, changed in swaps.items() if matches(changed)}
                assert right == SAME[case][f"{block}.{end}"], f"{block}.{end}"


@pytest.mark.parametrize("multiplier", [None, "hidden_act"])
def test_a_placement_must_know_what_the_model_multiplies_blocks_with(multiplier):
    placement = asdict(TABLE["granite"].placement) | {"multiplier": multiplier}
    model = make_tiny("granite")
    with refused(FamilyError):
        attach(model, moc(placement=placement))
    assert not hasattr(model, "moc")


def test_every_family_of_the_table_is_tested():
    assert set(TABLE) == set(FAMILIES)
    assert {name: family.placement.causal for name, family in TABLE.items()} == {
        name: name in DECODERS for name in FAMILIES
    }


def test_an_unknown_family_is_named_with_what_to_add():
    model = make_tiny("gpt2")
    known = re.escape(", ".join(sorted(TABLE)))
    with refused(FamilyError, known=known, modules=r"(?<=GPT2Block: )ln_1, attn, .*(?=\))"):
        attach(model, moc())
    assert not has_hooks(model)


RECIPE = """
model: {model_name_or_path: somewhere}
data: {suite: builtin, tasks: [world]}
output: {output_dir: runs/one}
method:
  name: moc
  rank: 4
  top_k: 2
  alpha: 0.6
  gate: {projection_dim: 8}
  placement:
    layers: PATH
    attn: {read: ATTN_READ, write: ATTN_WRITE}
    ffn: {read: FFN_READ, write: FFN_WRITE}
    causal: true
"""
PLACES = {
    "gpt2": ("h", "ln_1", "attn", "ln_2", "mlp"),
    # Its FFN sees rows and tokens as one axis.
    "opt": ("decoder.layers", "self_attn_layer_norm", "self_attn", "final_layer_norm", "fc2"),
}


@pytest.mark.parametrize("family", PLACES)
def test_a_recipe_places_controls_in_an_unknown_family(family, tmp_path):
    text = RECIPE
    words = ("PATH", "ATTN_READ", "ATTN_WRITE", "FFN_READ", "FFN_WRITE")
    for word, place in zip(words, PLACES[family], strict=True):
        text = text.replace(word, place)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with all_float64():
        adapted = attach(make(family), load_recipe(path).method, seed=1)
        train_controls(adapted.named_trainables())
        batch = make_batch(6)
        sites = sites_of(adapted, batch["attention_mask"].bool(), level="sample")
        assert error(adapted.model, batch, full(family, batch, sites)) < TOLERANCE
        batch = make_batch(6, "left")
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
        first = adapted.model.generate(**batch, **options)
        assert torch.equal(first, adapted.model.generate(**batch, **options, use_cache=False))
        adapted.model.train()(**make_batch(6)).logits.square().mean().backward()
        assert all(p.grad is not None for p in adapted.named_trainables().values())
