"""MoLEx generates step by step as its reference does on whole sequences, whatever the cache.

Each row runs the second layers that its prompt chose, with keys and values of their own.
"""

from functools import cache

import pytest
import torch
from models.test_generation import (
    CHUNK,
    MODES,
    NEW,
    ROWS,
    TOLERANCE,
    emitted,
    first_chunk,
    frozen,
    generate,
)
from nn.test_molex import bare, expect, make
from support.full_layers import logits
from support.models import DECODERS, all_float64, make_batch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from moc_cli.methods import Adapted

# One of each kind: one cache for all layers, windows, two types of layers (of masks; of positions
# too), fused projections, the cache under another name.
FEW = ("llama", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox")


@cache
def made(family: str) -> Adapted:
    adapted = make(family)
    adapted.model.generation_config.eos_token_id = None
    return adapted


@cache
def expected(family: str, ids: tuple, mask: tuple, voters: tuple) -> tuple[Tensor, list]:
    """Logits (B, T, V) of whole sequences, and each depth's choices by row."""
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        found = expect(family, made(family), batch, voters=torch.tensor(voters))
        return logits(bare(family), found.hidden), found.picks


def check(family: str, out, steps: list, voters: Tensor, mask: Tensor, beams: int) -> None:
    """Each emitted token's logits and each new forward's routes are the reference's."""
    ids, new = out.sequences, len(out.logits)
    tail = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    voters = torch.cat([voters, torch.zeros(len(ids), ids.shape[1] - voters.shape[1]).bool()], 1)
    mask = torch.cat([mask, tail], dim=1)
    scores, picks = expected(family, frozen(ids), frozen(mask), frozen(voters))
    assert (emitted(out, beams) - scores[:, -new - 1 : -1]).abs().max() < TOLERANCE
    assert len(set(zip(*picks, strict=True))) >= 3
    assert any(j != t for t, row in enumerate(picks) for j in row)
    for step in steps[-new:]:
        for depth, chosen in enumerate(step):
            assert chosen.flatten().tolist() == [j for j in picks[depth] for _ in range(beams)]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FEW)
def test_every_step_equals_the_reference(family, mode, beams):
    with all_float64():
        adapted, inputs = made(family), make_batch(ROWS, "left")
        mask = inputs["attention_mask"]
        out, steps = generate(adapted, inputs, beams, **MODES[mode])
        voters = first_chunk(mask) if "chunks" in mode else mask.bool()
        check(family, out, steps, voters, mask, beams)


@pytest.mark.parametrize("family", [name for name in DECODERS if name not in FEW])
def test_every_step_equals_the_reference_in_the_other_families(family):
    with all_float64():
        adapted, inputs = made(family), make_batch(ROWS, "left")
        out, steps = generate(adapted, inputs, 4)
        check(family, out, steps, inputs["attention_mask"].bool(), inputs["attention_mask"], 4)


@pytest.mark.parametrize(
    # A static cache's rows cannot be repeated for beams.
    ("kind", "beams"),
    [("dynamic", 1), ("dynamic", 4), ("static", 1)],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_second_turn_keeps_the_layers_of_the_first(family, kind, beams):
    with all_float64():
        adapted, inputs = made(family), make_batch(ROWS, "left")
        config = adapted.model.config
        store = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, 64)
        first, _ = generate(adapted, inputs, 1, past_key_values=store)
        if beams > 1:
            store.batch_repeat_interleave(beams)
        more = torch.randint(5, 250, (ROWS, 5), generator=torch.Generator().manual_seed(4))
        ids = torch.cat([first.sequences, more], dim=1)
        tail = torch.ones(ROWS, NEW + 5, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], tail], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        out, steps = generate(adapted, turn, beams, past_key_values=store)
        check(family, out, steps, inputs["attention_mask"].bool(), mask, beams)


@pytest.mark.parametrize("family", FEW)
def test_guessed_tokens_are_taken_out_of_every_slot(family):
    """Prompt lookup feeds several new tokens at once and takes wrong ones out of the cache."""
    with all_float64():
        adapted, ids = made(family), torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        plain, _ = generate(adapted, inputs, 1)
        guessed, steps = generate(adapted, inputs, 1, prompt_lookup_num_tokens=3)
        assert torch.equal(plain.sequences, guessed.sequences)
        for a, b in zip(plain.logits, guessed.logits, strict=True):
            assert (a - b).abs().max() < TOLERANCE
        assert any(int(chosen) != depth for depth, chosen in enumerate(steps[0]))


@pytest.mark.parametrize("family", FEW)
def test_tokens_taken_back_leave_no_trace(family):
    with all_float64(), torch.no_grad():
        adapted, ids = made(family), torch.randint(5, 250, (4, 12))
        store = DynamicCache(config=adapted.model.config)
        adapted.model(input_ids=ids[:, :7], past_key_values=store)
        store.activate_past_recording()
        wrong = torch.randint(5, 250, (4, 3))
        adapted.model(input_ids=wrong, past_key_values=store)
        store.crop(-3)
        out = adapted.model(input_ids=ids[:, 7:], past_key_values=store).logits
        voters = torch.arange(12).expand(4, -1) < 7
        scores, _ = expected(family, frozen(ids), frozen(torch.ones_like(ids)), frozen(voters))
        assert (out - scores[:, 7:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_of_a_cache_are_dropped_and_swapped_with_their_slots(family, kind):
    with all_float64(), torch.no_grad():
        adapted, inputs = made(family), make_batch(6, "left")
        if kind == "lazy" and family != "llama":
            return  # without its config a cache knows no windows
        config = adapted.model.config
        store = {
            "dynamic": lambda: DynamicCache(config=config),
            "lazy": DynamicCache,
            "static": lambda: StaticCache(config, 32),
        }[kind]()
        adapted.model(**inputs, past_key_values=store)
        order = torch.tensor([4, 0, 3, 3])
        if kind == "static":
            order = torch.tensor([4, 0, 3, 3, 1, 2])
            store.reorder_cache(order)
        else:
            store.batch_select_indices(order)
        new = torch.randint(5, 250, (len(order), 3))
        ids = torch.cat([inputs["input_ids"][order], new], dim=1)
        mask = torch.cat([inputs["attention_mask"][order], torch.ones_like(new)], dim=1)
        out = adapted.model(input_ids=new, attention_mask=mask, past_key_values=store).logits
        voters = torch.cat([inputs["attention_mask"][order], torch.zeros_like(new)], dim=1).bool()
        scores, picks = expected(family, frozen(ids), frozen(mask), frozen(voters))
        assert (out - scores[:, -3:]).abs().max() < TOLERANCE
        slots = store._moc_routes.slots
        routed = {(t, j) for t, row in enumerate(picks) for j in row if j != t}
        assert set(slots) == routed
        assert all(
            slots[t, j].rows == [r for r, k in enumerate(picks[t]) if k == j] for t, j in slots
        )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scrambled_routes_change_the_output(family):
    with all_float64():
        adapted, inputs = made(family), make_batch(ROWS, "left")
        found = []
        for scramble in (False, True):
            store = DynamicCache(config=adapted.model.config)

            def after(ids, scores, store=store, scramble=scramble):
                if scramble and ids.shape[1] == inputs["input_ids"].shape[1]:
                    store._moc_routes.rows(lambda kept: kept.roll(1, 0))
                return scores

            processors = LogitsProcessorList([after])
            out, _ = generate(
                adapted, inputs, 1, past_key_values=store, logits_processor=processors
            )
            found.append(emitted(out, 1))
        same, other = found
        assert torch.equal(same[:, 0], other[:, 0])
        assert ((same[:, 1] - other[:, 1]).abs().amax(-1) > 1e-3).sum() >= 3


def test_two_generations_interleave():
    with all_float64():
        adapted = made("llama")
        both = make_batch(4, "left")
        parts = [{k: v[:2] for k, v in both.items()}, {k: v[2:] for k, v in both.items()}]
        wanted = [generate(adapted, part, 1)[0] for part in parts]
        stores = [DynamicCache(config=adapted.model.config) for _ in parts]
        with torch.no_grad():
            for t in range(NEW):
                for part, store, whole in zip(parts, stores, wanted, strict=True):
                    length = part["input_ids"].shape[1]
                    new = whole.sequences[:, length + t - 1 : length + t]
                    tail = torch.ones(2, t, dtype=torch.long)
                    out = adapted.model(
                        input_ids=part["input_ids"] if t == 0 else new,
                        attention_mask=torch.cat([part["attention_mask"], tail], dim=1),
                        past_key_values=store,
                    )
                    assert (out.logits[:, -1] - whole.logits[t]).abs().max() < TOLERANCE


def test_a_static_cache_is_a_new_prefill_after_reset():
    with all_float64(), torch.no_grad():
        adapted, ids = made("llama"), torch.randint(5, 250, (3, 9))
        store = StaticCache(adapted.model.config, 16)
        for prompt in (ids, ids.flip(1)):
            store.reset()
            out = adapted.model(input_ids=prompt[:, :-1], past_key_values=store)
            out = adapted.model(input_ids=prompt[:, -1:], past_key_values=store)
            voters = torch.ones_like(prompt, dtype=torch.bool)
            voters[:, -1] = False
            scores, _ = expected(
                "llama", frozen(prompt), frozen(torch.ones_like(prompt)), frozen(voters)
            )
            assert (out.logits[:, -1] - scores[:, -1]).abs().max() < TOLERANCE


def test_a_cache_filled_without_the_mixture_is_refused():
    adapted, ids = made("llama"), make_batch(2)["input_ids"]
    store = DynamicCache(config=adapted.model.config)
    with torch.no_grad():
        with adapted.disabled():
            adapted.model(input_ids=ids, past_key_values=store)
        del store._moc_routes
        with pytest.raises(RuntimeError, match="filled without this mixture"):
            adapted.model(input_ids=ids[:, :CHUNK], past_key_values=store)
