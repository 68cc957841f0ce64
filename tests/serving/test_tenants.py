"""Many tenants: in a mixed batch every row is as alone with its own set, at all times."""

import copy
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from support.messages import refused
from support.models import KINDS_OF_DECODERS, make_tiny, train_controls
from support.tracing import traced
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moc_cli.api import attach, load_controls
from moc_cli.errors import MocError
from moc_cli.serving.tenants import Tenants

NEW = 6
GATE = {"projection_dim": 8}
SETS = {
    "law": ("moc", {"rank": 4, "top_k": 1, "alpha": 0.6, "gate": GATE}),
    "code": ("moc", {"rank": 3, "top_k": 2, "alpha": 0.5, "share_gate": False, "gate": GATE}),
    "math": ("control", {"rank": 2}),
    "news": (
        "moc",
        {
            "rank": 4,
            "sites": "ffn",
            "gate": {"kind": "linear", "estimator": "probability"},
            "scale": 2.0,
            "alpha": 0.7,
        },
    ),
}
NAMES = [*SETS, None, *("law", "code", "news") * 2, None]
ROWS = len(NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Saved controls of every set for a decoder of each kind."""
    found: dict[str, dict[str, Path]] = {}
    for family in KINDS_OF_DECODERS:
        found[family] = {}
        for seed, (name, (method, options)) in enumerate(SETS.items()):
            controls = attach(make(family), method, seed=seed, **options)
            torch.manual_seed(seed)
            train_controls(controls.named_parameters())
            found[family][name] = tmp_path_factory.mktemp(family) / name
            controls.save(found[family][name])
    return found


def make_batch() -> dict[str, Tensor]:
    """Left-padded prompts of 5 to 12 tokens."""
    lengths = torch.arange(ROWS)[:, None] % 8 + 5
    mask = (torch.arange(12) >= 12 - lengths).long()
    ids = torch.randint(5, 250, (ROWS, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids * mask, "attention_mask": mask}


def make(family: str) -> PreTrainedModel:
    model = make_tiny(family).eval()
    model.generation_config.eos_token_id = None
    return model


def serve(model: PreTrainedModel, folders: dict[str, Path]) -> Tenants:
    tenants = Tenants(model)
    for name, folder in folders.items():
        tenants.add(name, folder)
    return tenants


def steps(model: PreTrainedModel, inputs: dict[str, Tensor], **options: object) -> Tensor:
    """The raw logits (B, new, V) of tokens that are forced, so that rows cannot drift apart."""
    cache = options.pop("cache", None) or DynamicCache(config=model.config)
    mask = inputs["attention_mask"]
    tokens, found = inputs["input_ids"], []
    forced = torch.arange(NEW) * 7 + 11
    with torch.no_grad():
        for step in range(NEW):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            found.append(out.logits[:, -1])
            tokens = forced[step].expand(mask.shape[0], 1)
            mask = torch.cat([mask, torch.ones(mask.shape[0], 1, dtype=mask.dtype)], dim=1)
            between = options.get("between")
            if callable(between):
                between(step)
    return torch.stack(found, dim=1)


def row(inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One row without its padding."""
    real = inputs["attention_mask"][number].bool()
    return {name: value[number : number + 1, real] for name, value in inputs.items()}


def singly(family: str, folders: dict[str, Path], inputs: dict[str, Tensor], names: list) -> Tensor:
    """Every row alone, in a model that holds its own set and nothing else."""
    found: list[Tensor] = [torch.empty(0)] * len(names)
    for name in dict.fromkeys(names):
        model = make(family)
        if name is not None:
            load_controls(model, folders[name])
        for number in [number for number, other in enumerate(names) if other == name]:
            found[number] = steps(model, row(inputs, number))[0]
    return torch.stack(found)


@cache
def allowed(family: str) -> float:
    """The base's own error of `make_batch` against its rows alone, doubled for the controls."""
    model, inputs = make(family), make_batch()
    alone = [steps(model, row(inputs, number))[0] for number in range(ROWS)]
    return 2 * float((steps(model, inputs) - torch.stack(alone)).abs().max())


def shuffled() -> list[str | None]:
    return random.Random(3).sample(NAMES, len(NAMES))


@pytest.mark.parametrize("family", KINDS_OF_DECODERS)
def test_a_mixed_batch_equals_every_row_alone(family: str, folders: dict) -> None:
    inputs, names = make_batch(), shuffled()
    expected = singly(family, folders[family], inputs, names)
    tenants = serve(make(family), folders[family])
    bound = allowed(family)
    with tenants.rows(names):
        found = steps(tenants.model, inputs)
    assert (found - expected).abs().max() <= bound
    swap = {"law": "code", "code": "law"}
    with tenants.rows([swap.get(name, name) for name in names]):
        wrong = steps(tenants.model, inputs)
    changed = [number for number, name in enumerate(names) if name in swap]
    assert ((wrong - expected).abs().amax(dim=(1, 2))[changed] > 100 * bound).all()


def test_sets_leave_and_change_while_a_generation_runs(folders: dict) -> None:
    inputs, names = make_batch(), shuffled()
    own = folders["llama"]
    tenants = serve(make("llama"), own)
    with tenants.rows(names):
        expected = steps(tenants.model, inputs)

        def between(step: int) -> None:
            if step == 1:
                tenants.remove("law")
            if step == 2:
                tenants.add("code", own["news"], replace=True)
            if step == 3:
                tenants.add("sport", own["math"])

        assert torch.equal(steps(tenants.model, inputs, between=between), expected)
    with refused(MocError), tenants.rows(names):
        pass
    with tenants.rows(["code"] * ROWS):
        now = steps(tenants.model, inputs)
    assert tenants.names == ("code", "math", "news", "sport")
    bound = allowed("llama")
    news = singly("llama", own, inputs, ["news"] * ROWS)
    assert (now - news).abs().max() <= bound


def test_outside_and_after_detaching_the_model_is_the_bare_base(folders: dict) -> None:
    inputs = make_batch()
    model = make("llama")
    bare = steps(model, inputs)
    tenants = serve(model, folders["llama"])
    assert torch.equal(steps(model, inputs), bare)
    with tenants.rows([None] * ROWS):
        assert torch.equal(steps(model, inputs), bare)
    with tenants.rows(["law"] * ROWS):
        assert not torch.equal(steps(model, inputs), bare)
    assert tenants.detach() is model
    assert torch.equal(steps(model, inputs), bare)
    load_controls(model, folders["llama"]["law"])  # the model is free again


@pytest.mark.parametrize("beams", [1, 4])
def test_generate_with_beams_equals_every_row_alone(beams: int, folders: dict) -> None:
    inputs, names = make_batch(), shuffled()
    options = {"max_new_tokens": NEW, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    tenants = serve(make("llama"), folders["llama"])
    with tenants.rows(names):
        found = tenants.model.generate(**inputs, **options)
    routes = set()
    for number, name in enumerate(names):
        model = make("llama")
        controls = None if name is None else load_controls(model, folders["llama"][name])
        one = row(inputs, number)
        alone = model.generate(**one, **options, return_dict_in_generate=True)
        start = one["input_ids"].shape[1]
        assert found[number, -NEW:].tolist() == alone.sequences[0, start:].tolist(), name
        if controls is not None and name != "math":
            kept = model.moc.current.store.routes
            routes.add((name, *(tuple(route.ids[0].tolist()) for route in kept.values())))
    assert len(routes) >= 6  # else all rows of a set might share one route


def test_interleaved_generations_and_copied_caches_keep_their_sets(folders: dict) -> None:
    inputs = make_batch()
    tenants = serve(make("llama"), folders["llama"])
    first, second = shuffled(), shuffled()[::-1]
    expected = []
    for names in (first, second):
        with tenants.rows(names):
            expected.append(steps(tenants.model, inputs))
    caches = [DynamicCache(config=tenants.model.config) for _ in range(2)]
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    prompt = {**inputs, "position_ids": places, "use_cache": True}
    with torch.no_grad():
        for names, cache in zip((first, second), caches, strict=True):
            with tenants.rows(names):
                tenants.model(**prompt, past_key_values=cache)
        caches[0] = copy.deepcopy(caches[0])
        mask = torch.cat([inputs["attention_mask"], torch.ones(ROWS, 1).long()], dim=1)
        for logits, cache in zip(expected, caches, strict=True):
            out = tenants.model(
                input_ids=torch.full((ROWS, 1), 11),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, -1:],
                past_key_values=cache,
            )
            assert torch.allclose(out.logits[:, -1], logits[:, 1], atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_in_chunks_equals_each_set_alone(chunk: int, folders: dict) -> None:
    """Token by token too, where a short row has nothing but padding for some steps."""
    inputs, names = make_batch(), shuffled()
    tenants = serve(make("llama"), folders["llama"])
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def run(model: PreTrainedModel) -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for start in range(0, 12, chunk):
                end = start + chunk
                out = model(
                    input_ids=inputs["input_ids"][:, start:end],
                    attention_mask=inputs["attention_mask"][:, :end],
                    position_ids=places[:, start:end],
                    past_key_values=cache,
                )
            mask = torch.cat([inputs["attention_mask"], torch.ones(ROWS, 1).long()], dim=1)
            new = model(
                input_ids=torch.full((ROWS, 1), 11),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, -1:],
                past_key_values=cache,
            )
        return torch.cat([out.logits[:, -1:], new.logits], dim=1)

    with tenants.rows(names):
        found = run(tenants.model)
    for name in dict.fromkeys(names):
        model = make("llama")
        if name is not None:
            load_controls(model, folders["llama"][name])
        own = [number for number, other in enumerate(names) if other == name]
        assert torch.allclose(found[own], run(model)[own], atol=1e-4), name


@pytest.mark.parametrize("names", [[None] * 4, ["law", None, None, "code"]])
def test_bare_rows_may_be_selected_and_repeated(names: list, folders: dict) -> None:
    tenants = serve(make("llama"), folders["llama"])
    ids = make_batch()["input_ids"][:4].clamp(min=5)
    later = torch.full((4, 1), 11)
    with torch.no_grad():
        for early in (False, True):  # whether a step has been taken, and its banks stacked
            caches = [DynamicCache(config=tenants.model.config) for _ in range(2)]
            for cache, given in zip(caches, (names, [None] * 2), strict=True):
                with tenants.rows(given):
                    prompt = ids if given is names else ids[1:3]
                    tenants.model(input_ids=prompt, past_key_values=cache)
                    if early:
                        tenants.model(input_ids=later[: len(prompt)], past_key_values=cache)
            caches[0].batch_select_indices(torch.tensor([1, 2]))
            for new in (1, 2):
                expected = tenants.model(
                    input_ids=later[:2].repeat(1, new), past_key_values=caches[1]
                )
                caches[0].batch_repeat_interleave(2)
                again = later[:2].repeat(1, new).repeat_interleave(2**new, dim=0)
                found = tenants.model(input_ids=again, past_key_values=caches[0])
                wanted = expected.logits.repeat_interleave(2**new, dim=0)
                assert torch.allclose(found.logits, wanted, atol=1e-5)


def test_compiled_steps_on_a_static_cache_mix_sets_and_are_traced_whole(folders: dict) -> None:
    inputs, names = make_batch(), shuffled()
    tenants = serve(make("llama"), folders["llama"])
    model = tenants.model
    with tenants.rows(names):
        expected = steps(model, inputs, cache=StaticCache(model.config, 64))
    cache = StaticCache(model.config, 64)
    seen: list[int] = []
    with traced(), tenants.rows(names):
        compiled = torch.compile(model.forward)
        original, calls = model.forward, 0

        def forward(**given: object) -> object:
            nonlocal calls
            calls += 1
            # The prompt runs as it is; so does the first step, in which the sets are stacked.
            if calls <= 2:
                return original(**given)
            seen.append(counters["stats"]["unique_graphs"])
            return compiled(**given)

        model.forward = forward
        try:
            found = steps(model, inputs, cache=cache)
        finally:
            model.forward = original
        graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    assert (found - expected).abs().max() <= allowed("llama")
    assert not breaks
    # The mask grows with every step, so that the second is traced for masks of any length.
    assert seen[2] == 2
    assert graphs == 2


@pytest.mark.parametrize("stage", ["waiting", "prompt", "step"])
@pytest.mark.parametrize(
    "changes",
    [
        {"reorder_cache": torch.tensor([3, 2, 0, 4, 1])},
        {"batch_select_indices": torch.tensor([3, 0, 2]), "batch_repeat_interleave": 2},
    ],
)
def test_rows_of_a_cache_change_places_with_their_sets(
    changes: dict, stage: str, folders: dict
) -> None:
    tenants = serve(make("llama"), folders["llama"])
    names, ids = ["law", None, "code", "law", "math"], make_batch()["input_ids"][:5].clamp(min=5)
    mask = torch.ones_like(ids)
    mask[3, :8] = 0
    order = torch.arange(5)
    for change in changes.values():
        order = order[change] if isinstance(change, Tensor) else order.repeat_interleave(change)

    def step(cache: DynamicCache, rows: Tensor, first: int, last: int) -> Tensor:
        given = {"input_ids": ids[rows, first:last], "attention_mask": mask[rows, :last]}
        return tenants.model(**given, past_key_values=cache).logits

    ends = {"waiting": [6], "prompt": [10], "step": [10, 11]}[stage]
    caches = [DynamicCache(config=tenants.model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, rows in zip(caches, (torch.arange(5), order), strict=True):
            with tenants.rows([names[row] for row in rows]):
                for first, last in zip([0, *ends], ends, strict=False):
                    step(cache, rows, first, last)
        for name, change in changes.items():
            getattr(caches[0], name)(change)
        for first, last in zip([*ends, 11], [11, 12], strict=False):
            moved, expected = (step(cache, order, first, last) for cache in caches)
            assert torch.allclose(moved[:, -1], expected[:, -1], atol=1e-5)


def test_sets_decide_by_row_although_the_model_came_in_training_mode(folders: dict) -> None:
    model = make("llama").train()
    tenants = serve(model, {"law": folders["llama"]["law"]})
    model.eval()
    batch = make_batch()
    with torch.no_grad(), tenants.rows(["law"] * ROWS):
        together = model(**batch).logits
    for row in range(ROWS):
        own = {name: values[row : row + 1] for name, values in batch.items()}
        with torch.no_grad(), tenants.rows(["law"]):
            alone = model(**own).logits[0]
        real = own["attention_mask"][0].bool()
        assert (together[row] - alone)[real].abs().max() < 1e-4


def test_a_batch_of_another_size_than_the_names_is_refused(folders: dict) -> None:
    tenants = serve(make("llama"), folders["llama"])
    with tenants.rows(["law", None]), refused(MocError):
        steps(tenants.model, make_batch())


def test_sets_that_cannot_share_a_batch_are_refused(tmp_path: Path, folders: dict) -> None:
    tenants = serve(make("llama"), folders["llama"])
    cases = {"lora": {}, "moc": {"routing": {"level": "token"}, "gate": GATE, "rank": 2}}
    for method, options in cases.items():
        attach(model := make("llama"), method, **options).save(tmp_path / method)
        with refused(MocError):
            tenants.add("other", tmp_path / method)
        del model
    with refused(MocError):
        tenants.add("law", folders["llama"]["law"])
    with refused(MocError):
        tenants.remove("lav")
    assert tenants.names == tuple(SETS)


def test_the_memory_of_a_set_is_that_of_its_file(folders: dict) -> None:
    tenants = serve(make("llama"), folders["llama"])
    for name, size in tenants.memory().items():
        file = (folders["llama"][name] / "adapter_model.safetensors").stat().st_size
        assert 0 < file - size < 8192  # the file's header
        assert f"{name}  {size / 1e6:,.1f} MB" in str(tenants).splitlines()
