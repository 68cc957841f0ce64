"""LoRA and DoRA: equal to peft used alone, to their formulas, and lawful in every family."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpointing import checkpoint_activations
from support.combinations import half_of_product
from support.messages import refused
from support.models import DECODERS, FAMILIES, make_batch, make_tiny, tiny_config
from support.processes import run_program
from support.published import published
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from moc_cli.errors import MocError
from moc_cli.methods import Adapted, attach
from moc_cli.models.families import FAMILIES as TABLE
from moc_cli.recipe.methods import DoraMethod, LoraMethod, MolexMethod

RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK
REWRITING = ("pissa", "pissa_niter_4", "olora")
# Equal to the base at init only up to rounding: B₀A₀ is not zero.
INEXACT = (*REWRITING, "orthogonal")
INITS = ("default", "gaussian", *INEXACT)
# (in, out) of each target of one tiny layer, by hand: 32 wide, 64 inside, keys and values half.
_LLAMA = [(32, 32), (32, 16), (32, 16), (32, 64), (64, 32)]
_BERT = [(32, 32), (32, 32), (32, 32), (32, 64), (64, 32)]
_FUSED = [(32, 96), (32, 64), (64, 32)]
SHAPES = {family: _LLAMA if family in DECODERS else _BERT for family in FAMILIES} | {
    "qwen3_moe": _LLAMA[:3],
    "phi3": [(32, 64), (32, 128), (64, 32)],
    "gpt_neox": _FUSED,
    "deberta": _FUSED,
    "modernbert": [(32, 96), (32, 128), (64, 32)],
}


def lora(**changes) -> LoraMethod:
    return LoraMethod(**{"rank": RANK, "alpha": ALPHA, "dropout": 0.0} | changes)


def dora(**changes) -> DoraMethod:
    return DoraMethod(**{"rank": RANK, "alpha": ALPHA, "dropout": 0.0} | changes)


def title(method: LoraMethod | DoraMethod) -> str:
    return f"{method.name}-{method.init}"


# Every family with LoRA, and DoRA where the targets or the layers differ most.
CASES = [(family, lora()) for family in FAMILIES]
CASES += [(family, dora()) for family in ("llama", "phi3", "gpt_neox", "bert", "deberta-v2")]
in_every_family = pytest.mark.parametrize(
    ("family", "method"), CASES, ids=[f"{method.name}-{family}" for family, method in CASES]
)


def train(adapted: Adapted, seed: int = 5) -> Adapted:
    """Move every trained parameter away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.named_trainables().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def make(family: str = "llama", method=None, **changes) -> Adapted:
    return attach(make_tiny(family, **changes), method or lora(), seed=1)


def logits(model: nn.Module, family: str = "llama") -> torch.Tensor:
    side = "left" if family in DECODERS else "right"
    with torch.no_grad():
        return model(**make_batch(side=side)).logits


def by_peft(family: str, **changes) -> nn.Module:
    """The same adapter by peft alone, with targets spelled out here."""
    targets = {
        "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "bert": r".*\.(query|key|value|intermediate\.dense|layer\.\d+\.output\.dense)",
    }[family]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **changes)
    model = make_tiny(family)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    # peft's own dropouts start in training mode inside an evaluated model.
    return adapted.eval()


@pytest.mark.parametrize(
    ("family", "init", "magnitude"), half_of_product(["llama", "bert"], INITS, [False, True])
)
def test_trains_exactly_as_peft_alone(family, init, magnitude):
    options = {"lora_dropout": 0.2, "use_dora": magnitude}
    theirs = by_peft(family, init_lora_weights=True if init == "default" else init, **options)
    ours = make(family, (dora if magnitude else lora)(init=init, dropout=0.2))
    assert torch.equal(logits(ours.model, family), logits(theirs, family))
    tracks = []
    for model in (ours.model, theirs):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        torch.manual_seed(3)
        grads = []
        for _ in range(3):
            optimizer.zero_grad()
            model(**make_batch()).logits.square().mean().backward()
            grads += [p.grad.clone() for p in trained]
            optimizer.step()
        tracks.append(grads)
        model.eval()
    assert all(torch.equal(a, b) for a, b in zip(*tracks, strict=True))
    state = peft.get_peft_model_state_dict(theirs)
    own = ours.state()
    assert set(own) == set(state)
    assert all(torch.equal(own[key], value) for key, value in state.items())
    assert torch.equal(logits(ours.model, family), logits(theirs, family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_equals_the_formula_on_the_weights(family, magnitude):
    """W + s·B A, and DoRA's m·(W + s·B A)/|W + s·B A| by rows, written into a bare model."""
    method = dora() if magnitude else lora()
    adapted = train(make(family, method))
    bare = make_tiny(family)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in adapted.state().items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        parts.setdefault(name, {})[part.removesuffix(".weight")] = value
    shapes = []
    with torch.no_grad():
        for name, part in parts.items():
            weight = bare.get_submodule(name).weight
            shapes.append((weight.shape[1], weight.shape[0]))
            weight += SCALE * part["B"] @ part["A"]
            if magnitude:
                weight *= (part["magnitude_vector"] / weight.norm(dim=1))[:, None]
    expected = logits(bare, family)
    assert (logits(adapted.model, family) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert sorted(shapes) == sorted(2 * SHAPES[family])
    count = sum(RANK * (i + o) + magnitude * o for i, o in 2 * SHAPES[family])
    assert adapted.counts().adapter == count


def test_every_known_family_has_targets():
    assert all(family.targets for family in TABLE.values())


@pytest.mark.parametrize("init", INEXACT)
@pytest.mark.parametrize("method", [lora, dora])
def test_inits_that_touch_the_base_give_it_back_up_to_rounding(init, method):
    model = make_tiny("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    before, expected = weight.detach().clone(), logits(model)
    adapted = attach(model, method(init=init, dropout=0.5), seed=1)
    moved = adapted.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(moved, before) == (init not in REWRITING)
    tolerance = 1e-4
    assert torch.allclose(logits(model), expected, atol=tolerance)
    state = train(adapted).state()
    trained = logits(model)
    assert not torch.allclose(trained, expected, atol=0.01)
    model.train()
    with adapted.disabled():  # no dropout either
        assert torch.allclose(logits(model), expected, atol=tolerance)
    model.eval()
    assert torch.equal(logits(model), trained)
    assert all(torch.equal(value, state[key]) for key, value in adapted.state().items())
    adapted.detach()
    assert torch.allclose(logits(model), expected, atol=tolerance)
    assert torch.allclose(weight, before, atol=1e-5)


@in_every_family
def test_gradients_are_equal_with_activation_checkpointing(family, method):
    reentrant = method.name == "dora"
    grads = []
    for checkpointing in (False, True):
        adapted = train(make(family, method))
        model = adapted.model.train()
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            checkpoint_activations(model, **kwargs)
            if reentrant:
                model.enable_input_require_grads()
        model(**make_batch()).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in adapted.named_trainables().items()})
        assert all(grad is not None for grad in grads[-1].values())
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_magnitudes_alone_are_spared_weight_decay():
    adapted = make("llama", dora())
    spared = {name for name in adapted.named_trainables() if adapted.no_decay(name)}
    assert spared == {n for n in adapted.named_trainables() if n.endswith("magnitude_vector")}


METHODS = [lora(), dora(), lora(init="orthogonal"), *(lora(init=init) for init in REWRITING)]
METHODS.append(MolexMethod(rank=RANK, alpha=ALPHA, weight="learned"))
READ = [lora(), dora(), lora(init="pissa"), dora(init="olora")]
_FRESH = """
import sys, torch
from support.models import make_batch, make_tiny
import moc_cli.methods
assert "peft" not in sys.modules  # it is imported by the methods that use it alone
from safetensors.torch import load_file
from pydantic import TypeAdapter
from moc_cli.recipe.methods import DoraMethod, LoraMethod, MolexMethod
torch.set_num_threads(1)
methods = TypeAdapter(list[LoraMethod | DoraMethod | MolexMethod]).validate_json(sys.argv[2])
for number, method in enumerate(methods):
    adapted = moc_cli.methods.attach(make_tiny("llama"), method, seed=1)
    adapted.load_state(load_file(f"{sys.argv[1]}/{number}.safetensors"))
    with torch.no_grad():
        logits = adapted.model(**make_batch(side="left")).logits
    torch.save(logits, f"{sys.argv[1]}/{number}.pt")
"""


def test_saved_and_loaded_in_a_fresh_process_it_gives_the_same_logits(tmp_path):
    expected = []
    for number, method in enumerate(METHODS):
        adapted = train(make("llama", method))
        save_file(adapted.state(), tmp_path / f"{number}.safetensors")
        expected.append(logits(adapted.model))
    methods = json.dumps([method.model_dump(mode="json") for method in METHODS])
    done = run_program(_FRESH, str(tmp_path), methods)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, logits_here in enumerate(expected):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt"), logits_here), METHODS[number]


@pytest.mark.parametrize("method", READ, ids=title)
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_peft_reads_the_adapter_folder(family, method, tmp_path):
    adapted = train(make(family, method))
    save_file(adapted.state(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapted.adapter_config()))
    theirs = peft.PeftModel.from_pretrained(make_tiny(family), str(tmp_path)).eval()
    assert torch.equal(logits(theirs, family), logits(adapted.model, family))
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == adapted.state().keys()


def meta(family: str = "llama") -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


def test_a_target_that_matches_nothing_is_refused_before_weights_load():
    model = meta()
    names = set(model.state_dict())
    with refused(MocError):
        attach(model, lora(targets=["k_proj", "q_prj"]))
    with refused(MocError):
        attach(model, lora(targets=["lm_head"]))
    with refused(MocError):
        attach(meta("phi3"), lora(targets=["q_proj"]))
    assert set(model.state_dict()) == names


def test_targets_are_paths_in_a_layer_or_their_ends():
    def adapted(*targets: str) -> set[str]:
        keys = make("bert", lora(targets=targets)).state()
        return {key.split(".layer.0.")[1].split(".lora")[0] for key in keys if ".layer.0." in key}

    assert adapted("output.dense") == {"output.dense"}
    assert adapted("attention.output.dense") == {"attention.output.dense"}
    assert adapted("dense") == {"output.dense", "attention.output.dense", "intermediate.dense"}
    assert adapted("query", "self.key") == {"attention.self.query", "attention.self.key"}


def test_the_vision_tower_is_no_target():
    keys = make("gemma3").state()
    assert all(".language_model." in key for key in keys)


def test_an_unknown_model_type_asks_for_targets():
    model = make_tiny("llama")
    model.config.model_type = "lama"
    with refused(MocError, known=r"(?<=known: )[^)]+"):
        attach(model, lora())
    adapted = attach(model, lora(targets=["q_proj"]))
    assert adapted.counts().adapter == 2 * RANK * 64


def test_inits_that_cannot_work_are_refused():
    with refused(MocError):
        attach(make_tiny("llama"), lora(init="orthogonal", rank=3))
    with refused(MocError):
        attach(make_tiny("llama"), lora(init="pissa", rank=32))


def test_the_programs_own_random_state_is_untouched():
    before = torch.get_rng_state()
    make("llama", lora(init="pissa_niter_4"))
    model = make_tiny("llama")
    assert torch.equal(torch.get_rng_state(), before)
    attach(model, lora(init="orthogonal"), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "share"),
    [("LLaMA2-7B", 0.833), ("LLaMA3-8B", 0.705), ("Mistral-7B", 0.781), ("Qwen2.5-14B", 0.628)],
)
def test_the_papers_shares(name, share):
    adapted = attach(published(name), LoraMethod())
    assert round(100 * adapted.counts().share, 3) == share
    assert all(p.device.type == "meta" for p in adapted.model.parameters())


class Products(TorchDispatchMode):
    """Counts the matrix products within it by their type."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.types.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("make", [lora, dora], ids=["lora", "dora"])
def test_over_a_bfloat16_base_no_product_is_in_float32(make, dropout):
    """So that a step is as fast and small as under autocast, and the base as it was."""
    model = make_tiny("llama").to(torch.bfloat16)
    batch = make_batch()
    expected = model(**batch).logits
    adapted = attach(model, make(dropout=dropout))
    assert torch.equal(model(**batch).logits, expected)
    train(adapted)
    with adapted.disabled():
        assert torch.equal(model(**batch).logits, expected)
    trainables = adapted.named_trainables()
    assert {parameter.dtype for parameter in trainables.values()} == {torch.float32}
    with Products() as products:
        model.train()(**batch).logits.float().logsumexp(-1).sum().backward()
    assert set(products.types) == {torch.bfloat16}
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainables.values())


def test_lora_over_a_bfloat16_base_is_its_formula_in_bfloat16():
    model = make_tiny("llama").to(torch.bfloat16)
    adapted = train(attach(model, lora()))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    named = adapted.named_trainables()
    key = "base_model.model.model.layers.0.mlp.up_proj"
    A, B = (named[f"{key}.lora_{part}.weight"].to(torch.bfloat16) for part in "AB")
    assert torch.equal(layer(x), layer.base_layer(x) + (x @ A.T) @ B.T * SCALE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dora_starts_as_its_base_in_half_precision(dtype: torch.dtype) -> None:
    """Its magnitudes are the norms that it divides by, not these rounded to the base's type."""
    model, batch = make_tiny("llama", dtype=dtype), make_batch(4)
    base = model(**batch).logits
    attach(model, DoraMethod(rank=4))
    assert torch.equal(model(**batch).logits, base)
