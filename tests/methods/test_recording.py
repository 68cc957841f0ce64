"""The record of the gates' decisions against a recount from the gates' raw inputs.

The recount is this file's own: hooks on the norms whose inputs the gate reads, and numpy.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpointing import checkpoint_activations
from support.combinations import half_of_product
from support.group import run_together, saved
from support.messages import refused
from support.models import make_tiny, train_controls

from moc_cli import processes
from moc_cli.methods import Adapted, attach
from moc_cli.methods.route_counts import Record, Sums
from moc_cli.processes import Processes
from moc_cli.recipe.methods import ControlMethod, LoraMethod, MocMethod

LAYERS = 4
SITES = 2 * LAYERS
NORMS = ("input_layernorm", "post_attention_layernorm")
BLOCKS = ("self_attn", "mlp")


def make(
    *, level="sample", top_k=1, decode="frozen", dtype=torch.float32, layers=LAYERS, **more
) -> Adapted:
    section = {
        "rank": 4,
        "top_k": top_k,
        "alpha": 0.7,
        "gate": {"projection_dim": 8},
        "routing": {"level": level, "decode": decode} | more.pop("routing", {}),
    }
    model = make_tiny("llama", num_hidden_layers=layers, dtype=dtype)
    adapted = attach(model, MocMethod.model_validate(section | more), seed=1)
    train_controls(adapted.named_trainables())
    with torch.no_grad():  # a sharper gate votes 1 or 0, and rows of two opinions would tie
        for name, parameter in adapted.named_trainables().items():
            if name.endswith("log_temperature"):
                parameter.fill_(2.0)
    model.generation_config.eos_token_id = None
    return adapted


def batch(rows: int, *, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of 3 to 10 random tokens, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 250, (rows, 10), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        length = 3 + (5 * row + seed) % 8
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


class Inputs:
    """What enters each gate in each forward, as its own hooks see it: a list of (B, T, d)."""

    def __init__(self, adapted: Adapted) -> None:
        self.seen: list[list[np.ndarray]] = [[] for _ in range(SITES)]
        self.open = True
        for number, layer in enumerate(adapted.model.model.layers):
            for block, norm in enumerate(NORMS):
                getattr(layer, norm).register_forward_pre_hook(self._hook(2 * number + block))

    def _hook(self, site: int):
        def keep(module, args):
            if self.open:
                self.seen[site].append(args[0].detach().double().numpy().copy())

        return keep


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probabilities(adapted: Adapted, x: np.ndarray) -> np.ndarray:
    """The cosine gate's formula on x (..., d)."""
    named = {k: v.detach().double().numpy() for k, v in adapted.named_trainables().items()}
    experts = named["gates.shared.experts"]
    features = x @ named["gates.shared.projection"].T
    features = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    experts = experts / np.linalg.norm(experts, axis=-1, keepdims=True)
    scale = np.exp(min(named["gates.shared.log_temperature"], np.log(100)))
    return softmax(scale * features @ experts.T)


@dataclass
class Recount:
    """Sums by site, counted again."""

    counts: np.ndarray
    weight: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray
    one_token: np.ndarray


def recount(adapted, forwards, level: str, k: int) -> Recount:
    """Count the decisions on pairs of (gate inputs by site, mask (B, T))."""
    found = Recount(*(np.zeros((SITES, SITES)) for _ in range(3)), *np.zeros((3, SITES)))
    for inputs, mask in forwards:
        for site in range(SITES):
            p = probabilities(adapted, inputs[site])
            if level == "batch":
                groups = [p[mask > 0]]
            elif level == "token":
                groups = [row[None] for row in p[mask > 0]]
            else:
                groups = [p[row][mask[row] > 0] for row in range(len(p)) if mask[row].any()]
            for tokens in groups:
                count_one(found, site, tokens, k, level)
    return found


def count_one(found: Recount, site: int, tokens: np.ndarray, k: int, level: str) -> None:
    mean = tokens.mean(0)
    order = np.argsort(-mean, kind="stable")
    chosen = order[:k]
    for control in chosen:
        found.counts[site, control] += 1
        found.weight[site, control] += mean[control] / mean[chosen].sum()
    found.probability[site] += mean
    found.entropy[site] -= (mean * np.log(mean)).sum()
    found.margin[site] += mean[order[k - 1]] - mean[order[k]]
    if level != "token":
        others = [
            set(np.argsort(-np.delete(tokens, i, axis=0).mean(0), kind="stable")[:k])
            for i in range(len(tokens))
            if len(tokens) > 1
        ]
        found.one_token[site] += any(o != set(chosen) for o in others) or len(tokens) == 1


def check(record: Record, expected: Recount, *, exact: bool = True) -> None:
    sums = record.sums
    assert np.array_equal(sums.counts, expected.counts)
    close = {"atol": 1e-4} if exact else {"atol": 0.1}
    for ours, theirs in (
        (sums.weights, expected.weight),
        (sums.probabilities, expected.probability),
        (sums.entropy, expected.entropy),
        (sums.margin, expected.margin),
        (sums.one_token, expected.one_token),
    ):
        assert np.allclose(ours, theirs, **close)


ROUTES = [("sample", 1), ("sample", 2), ("batch", 1), ("token", 2)]


@pytest.mark.parametrize(
    ("route", "checkpointing", "rows"), half_of_product(ROUTES, [False, True], [1, 16])
)
def test_training_is_counted_as_a_recount_does(route, checkpointing, rows):
    level, k = route
    adapted = make(level=level, top_k=k)
    model = adapted.model.train()
    if checkpointing:
        checkpoint_activations(model)
    inputs, forwards = Inputs(adapted), []
    with adapted.recorder() as recorder:
        for seed in range(3):
            given = batch(rows, seed=seed)
            inputs.open = True
            loss = model(**given).logits.square().mean()
            inputs.open = False  # a recompute runs the hooks again
            loss.backward()
            seen = [site[seed] for site in inputs.seen]
            forwards.append((seen, given["attention_mask"].numpy()))
    expected = recount(adapted, forwards, level, k)
    check(recorder.record(), expected)
    if rows == 16 and level != "batch":
        assert (expected.counts.sum(0) > 0).sum() >= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_counted_alone_and_together(side, dtype):
    adapted = make(top_k=2, dtype=dtype)
    given, inputs = batch(16, side=side), Inputs(adapted)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model(**given)
        seen = [site[0] for site in inputs.seen]
        expected = recount(adapted, [(seen, given["attention_mask"].numpy())], "sample", 2)
        together = recorder.record(reset=True)
        check(together, expected)
        inputs.open = False
        for row in range(16):
            adapted.model(**{name: value[row : row + 1] for name, value in given.items()})
    alone = recorder.record()
    if dtype == torch.float32 and side == "right":  # positions of left-padded rows differ
        assert torch.equal(alone.sums.counts, together.sums.counts)
    assert [alone.decisions(s) for s in range(SITES)] == [16] * SITES
    assert (expected.counts.sum(0) > 0).sum() >= 5


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_generation_counts_each_prompt_once(beams, cached):
    """Beams are copies of a prompt, and later tokens keep its route."""
    adapted, given = make(), batch(5)
    inputs = Inputs(adapted)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model.generate(
            **given, num_beams=beams, max_new_tokens=4, do_sample=False, use_cache=cached
        )
    assert len(inputs.seen[0]) == 4
    first = [site[0] for site in inputs.seen]
    assert len(first[0]) == 5 * beams
    prompts = [x[::beams] for x in first]
    expected = recount(adapted, [(prompts, given["attention_mask"].numpy())], "sample", 1)
    check(recorder.record(), expected)
    assert (expected.counts.sum(0) > 0).sum() >= 5


def test_several_answers_to_one_prompt_count_it_once():
    adapted, given = make(), batch(3)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model.generate(**given, num_return_sequences=3, do_sample=True, max_new_tokens=3)
    assert [recorder.record().decisions(s) for s in range(SITES)] == [3] * SITES


@pytest.mark.parametrize("cached", [True, False])
def test_running_routes_are_decided_with_every_new_token(cached):
    adapted, given = make(decode="running"), batch(3)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model.generate(**given, max_new_tokens=4, do_sample=False, use_cache=cached)
    assert [recorder.record().decisions(s) for s in range(SITES)] == [3 * 4] * SITES


def test_a_row_counts_when_its_first_real_token_comes():
    """A prompt in chunks: the first one holds only padding of a short row."""
    adapted, given = make(), batch(4)
    given["attention_mask"][:, :] = 1
    given["attention_mask"][1, :6] = 0
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad(), adapted.recorder() as recorder:
        out = adapted.model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        assert recorder.record().decisions(0) == 3
        adapted.model(
            input_ids=ids[:, 4:], attention_mask=mask, past_key_values=out.past_key_values
        )
    assert [recorder.record().decisions(s) for s in range(SITES)] == [4] * SITES


def test_what_decides_nothing_is_not_counted():
    adapted, given = make(), batch(4)
    given["attention_mask"][2] = 0  # a row of padding alone
    with torch.no_grad(), adapted.recorder() as recorder:
        with adapted.disabled():
            adapted.model(**given)
        assert recorder.record().empty
        adapted.model(**given)
    assert recorder.record().decisions(0) == 3
    with torch.no_grad():
        adapted.model(**given)  # after the recorder was left
    assert recorder.record().decisions(0) == 3


@pytest.mark.parametrize("level", ["batch", "sample", "token"])
def test_a_training_counts_after_each_forward(level):
    """The choices of the last forward: those of rows of padding alone left out."""
    adapted, given = make(level=level), batch(4)
    given["attention_mask"][-1] = 0
    adapted.model.train()(**given)
    counted, watched = adapted.recorder(detailed=False), adapted.recorder(detailed=False)
    for _ in range(2):
        with watched:
            adapted.model(**given)
        counted.count()
    assert torch.equal(counted.record().sums.counts, watched.record().sums.counts)
    expected = {"batch": 1, "sample": 3, "token": int(given["attention_mask"].sum())}[level]
    assert counted.record().decisions(0) == 2 * expected


def test_sizes_are_of_what_is_added_beside_the_blocks_output():
    adapted, given = make(), batch(6)
    mask = given["attention_mask"].double()
    outputs: list[torch.Tensor] = []
    mixture = adapted.mixture
    updates = [[] for _ in range(SITES)]
    original = mixture.update
    mixture.update = lambda site, x: keep(updates[site.index], original(site, x))

    def keep(kept, value):
        kept.append(value.double())
        return value

    for layer in adapted.model.model.layers:
        for block in BLOCKS:
            getattr(layer, block).register_forward_hook(
                lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out),
            )
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model(**given)
    record = recorder.record()
    for site in range(SITES):
        update = updates[site][0]
        own = outputs[site].double() - update  # this file's hook comes after the site's
        sizes = [(x.square().sum(-1) * mask).sum(-1).sqrt() for x in (update, own)]
        assert record.sums.rows[site] == 6
        assert record.sums.relative_size[site].item() == pytest.approx(
            (sizes[0] / sizes[1]).sum().item(), 1e-4
        )


def test_recording_changes_nothing():
    found = []
    for recorded in (False, True):
        adapted = make(level="batch", top_k=2)
        model = adapted.model.train()
        recorder = adapted.recorder()
        if recorded:
            recorder.__enter__()
        logits = model(**batch(4)).logits
        logits.square().mean().backward()
        found.append([logits] + [p.grad for p in adapted.named_trainables().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def alive() -> tuple[int, int]:
    """Bytes of all tensors that the test made, and the number of its objects."""
    gc.collect()
    objects = gc.get_objects()
    return sum(o.nbytes for o in objects if type(o) is torch.Tensor), len(objects)


@pytest.mark.usefixtures("new_objects")
def test_memory_after_three_hundred_batches_is_that_after_ten():
    adapted, given = make(layers=1), batch(2)
    sizes = []
    with torch.no_grad(), adapted.recorder() as recorder:
        for number in range(1, 301):
            adapted.model(**given)
            if number in (10, 300):
                sizes.append(alive())
    assert recorder.record().decisions(0) == 600
    (bytes_early, objects_early), (bytes_late, objects_late) = sizes
    assert bytes_early == bytes_late > 0
    assert objects_late - objects_early < 58  # one a batch would be 290


def test_records_of_parts_add_up_to_that_of_the_whole():
    adapted, given = make(top_k=2), batch(12, side="right")
    parts = [slice(0, 5), slice(5, 12)]
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model(**given)
        whole = recorder.record(reset=True)
        halves = []
        for part in parts:
            adapted.model(**{name: value[part] for name, value in given.items()})
            halves.append(recorder.record(reset=True))
    assert same(halves[0] + halves[1], whole)
    with refused(ValueError):
        halves[0] + record_of_another()


def record_of_another() -> Record:
    model = make_tiny("llama", num_hidden_layers=2)
    return attach(model, MocMethod(rank=4)).recorder().record()


def same(a: Record, b: Record) -> bool:
    pairs = zip(a.sums.arrays, b.sums.arrays, strict=True)
    equal = torch.equal(a.sums.counts, b.sums.counts)
    return equal and all(torch.allclose(x, y, atol=1e-5) for x, y in pairs)


def record_a_part(group: Processes, folder: Path) -> None:
    adapted, given = make(top_k=2), batch(12, side="right")
    part = slice(0, 5) if group.main else slice(5, 12)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model(**{name: value[part] for name, value in given.items()})
        with processes.same_work():  # counts once, and must not change what follows
            adapted.model(**{name: value[part] for name, value in batch(12).items()})
    record = recorder.record()
    torch.save(record.sums.arrays, folder / f"{group.rank}.pt")
    # A resumed count is one process's alone: the sum of both must not hold it twice.
    again = adapted.recorder()
    again.resume(record.choices())
    assert again.record().choices() == record.choices()


def test_two_processes_record_what_one_does(tmp_path):
    adapted = make(top_k=2)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model(**batch(12, side="right"))
        adapted.model(**{name: value[:5] for name, value in batch(12).items()})
    whole = recorder.record()
    run_together(record_a_part, 2, tmp_path)
    for arrays in saved(tmp_path, 2):
        assert same(Record(whole.layout, Sums(*arrays)), whole)


def test_unshared_gates_have_pools_of_their_own():
    adapted = make(share_gate=False)
    with torch.no_grad(), adapted.recorder() as recorder:
        adapted.model(**batch(8))
    record = recorder.record()
    assert record.layout.pools == {"attn": [0, 2, 4, 6], "ffn": [1, 3, 5, 7]}
    summary = record.summary()["pools"]
    assert summary["ffn"]["controls"] == ["0.ffn", "1.ffn", "2.ffn", "3.ffn"]
    assert summary["ffn"]["decisions"] == 8 * 4
    table = np.array(summary["ffn"]["per_site"])
    assert np.allclose(table.sum(1), 1)
    assert summary["ffn"]["local_share"] == pytest.approx(table.diagonal().mean())
    assert record.use()["use"][1::2] == summary["ffn"]["use"]


@pytest.mark.parametrize("method", [ControlMethod(rank=4), LoraMethod(rank=4)])
def test_without_a_gate_there_is_nothing_to_record(method):
    adapted = attach(make_tiny("llama"), method)
    assert adapted.recorder() is None
