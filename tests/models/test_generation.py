"""Generation step by step: logits of every emitted token and the routes used, in both methods."""

import pytest
import torch
from support.generations import (
    CHUNK,
    MODES,
    NEW,
    ROWS,
    SUBJECTS,
    TOLERANCE,
    check,
    emitted,
    expect_moc,
    expect_molex,
    first_chunk,
    frozen,
    generate,
    make_moc,
    make_molex,
)
from support.messages import refused
from support.models import DECODERS, KINDS_OF_DECODERS, all_float64, make_batch
from support.molex import bare
from transformers import Cache, CompileConfig, DynamicCache, LogitsProcessorList, StaticCache

from moc_cli.methods import Adapted

FEW = KINDS_OF_DECODERS
OTHERS = tuple(family for family in DECODERS if family not in FEW)
BOTH = [(subject, family) for subject in SUBJECTS for family in FEW]
# Every mode in a family of each kind, in two of them with and without beams; in the others what
# differs most.
TWO = ("llama", "gemma3_text")
STEPS = [("moc", family, mode, 1) for family in FEW for mode in MODES]
STEPS += [("moc", family, mode, 4) for family in TWO for mode in MODES]
STEPS += [("moc", family, mode, 4) for family in OTHERS for mode in ("dynamic", "no cache")]
STEPS += [("moc", family, "static chunks", 1) for family in OTHERS]
STEPS += [("molex", family, mode, 1) for family in TWO for mode in MODES]
STEPS += [("molex", family, "static chunks", 1) for family in FEW if family not in TWO]
STEPS += [("molex", family, "dynamic", 4) for family in DECODERS]
STEPS += [("molex", family, "static chunks", 4) for family in TWO]
# A static cache's rows cannot be repeated for beams.
CACHES = [("dynamic", 1), ("dynamic", 4), ("static", 1)]
TURNS = [(subject, family, *cache) for subject in SUBJECTS for family in TWO for cache in CACHES]
TURNS += [("moc", family, "dynamic", 4) for family in DECODERS if family not in TWO]


def make_cache(adapted: Adapted, kind: str, length: int = 64) -> Cache:
    config = adapted.model.config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, length)


@pytest.mark.parametrize(("subject", "family", "mode", "beams"), STEPS)
def test_every_step_equals_the_reference(subject: str, family: str, mode: str, beams: int) -> None:
    with all_float64():
        adapted, inputs = SUBJECTS[subject].make(family), make_batch(ROWS, "left")
        mask = inputs["attention_mask"]
        out, steps = generate(adapted, inputs, beams, **MODES[mode])
        voters = first_chunk(mask) if "chunks" in mode else mask.bool()
        check(SUBJECTS[subject], family, out, steps, voters, mask, beams)


@pytest.mark.parametrize(("subject", "family", "kind", "beams"), TURNS)
def test_a_second_turn_keeps_the_routes_of_the_first(
    subject: str, family: str, kind: str, beams: int
) -> None:
    with all_float64():
        adapted, inputs = SUBJECTS[subject].make(family), make_batch(ROWS, "left")
        store = make_cache(adapted, kind)
        first, _ = generate(adapted, inputs, 1, past_key_values=store)
        if beams > 1:
            store.batch_repeat_interleave(beams)
        more = torch.randint(5, 250, (ROWS, 5), generator=torch.Generator().manual_seed(4))
        ids = torch.cat([first.sequences, more], dim=1)
        tail = torch.ones(ROWS, NEW + 5, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], tail], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        out, steps = generate(adapted, turn, beams, past_key_values=store)
        voters = inputs["attention_mask"].bool()
        check(SUBJECTS[subject], family, out, steps, voters, mask, beams)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("subject", "family"), [*BOTH[: len(FEW)], *BOTH[-1:], ("molex", "llama")])
def test_scrambled_routes_change_the_output(subject: str, family: str, kind: str) -> None:
    with all_float64():
        adapted, inputs = SUBJECTS[subject].make(family), make_batch(ROWS, "left")
        prompt, logits = inputs["input_ids"].shape[1], []

        def scramble(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] == prompt:
                adapted.model.moc.current.store.rows(lambda kept: kept.roll(1, 0))
            return scores

        for processors in ([], [scramble]):
            out, _ = generate(
                adapted,
                inputs,
                1,
                past_key_values=make_cache(adapted, kind),
                logits_processor=LogitsProcessorList(processors),
            )
            logits.append(emitted(out, 1))
        same, other = logits
        assert torch.equal(same[:, 0], other[:, 0])
        assert ((same[:, 1] - other[:, 1]).abs().amax(-1) > 1e-3).sum() >= 3


@pytest.mark.parametrize(("subject", "family"), BOTH)
def test_guessed_tokens_are_no_new_prefill_and_leave_no_trace(subject: str, family: str) -> None:
    """Prompt lookup feeds several new tokens at once and takes wrong ones out of the cache."""
    with all_float64():
        adapted, ids = SUBJECTS[subject].make(family), torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        plain, first = generate(adapted, inputs, 1)
        guessed, steps = generate(adapted, inputs, 1, prompt_lookup_num_tokens=3)
        assert torch.equal(plain.sequences, guessed.sequences)
        for a, b in zip(plain.logits, guessed.logits, strict=True):
            assert (a - b).abs().max() < TOLERANCE
        for step in steps:
            assert all(torch.equal(a, b) for a, b in zip(step, first[0], strict=True))
        used = [ids.flatten().tolist() for ids in steps[0]]
        assert any(ids != [number] for number, ids in enumerate(used))


@pytest.mark.parametrize(("subject", "family"), [*BOTH[: len(FEW)], ("molex", "llama")])
def test_generations_interleave(subject: str, family: str) -> None:
    """Two caches fed in turns keep apart, and equal their own generations."""
    with all_float64():
        adapted = SUBJECTS[subject].make(family)
        both = make_batch(4, "left")
        parts = [{k: v[:2] for k, v in both.items()}, {k: v[2:] for k, v in both.items()}]
        expected = [generate(adapted, part, 1)[0] for part in parts]
        stores = [DynamicCache(config=adapted.model.config) for _ in parts]
        with torch.no_grad():
            for t in range(NEW):
                for part, store, whole in zip(parts, stores, expected, strict=True):
                    length = part["input_ids"].shape[1]
                    new = whole.sequences[:, length + t - 1 : length + t]
                    tail = torch.ones(2, t, dtype=torch.long)
                    out = adapted.model(
                        input_ids=part["input_ids"] if t == 0 else new,
                        attention_mask=torch.cat([part["attention_mask"], tail], dim=1),
                        past_key_values=store,
                    )
                    assert (out.logits[:, -1] - whole.logits[t]).abs().max() < TOLERANCE


# Only of controls


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_running_routes_follow_each_beam(family: str, kind: str, beams: int) -> None:
    with all_float64():
        adapted, inputs = make_moc(family, "running"), make_batch(ROWS, "left")
        options = {"cache_implementation": "static"} if kind == "static" else {}
        out, _ = generate(adapted, inputs, beams, **options)
        mask = inputs["attention_mask"]
        voters = torch.cat([mask, torch.zeros(ROWS, NEW, dtype=torch.long)], dim=1).bool()
        whole = torch.cat([mask, torch.ones(ROWS, NEW, dtype=torch.long)], dim=1)
        scores, picks = expect_moc(
            family, frozen(out.sequences), frozen(whole), frozen(voters), mask.shape[1]
        )
        assert (emitted(out, beams) - scores[:, -NEW - 1 : -1]).abs().max() < TOLERANCE
        changed = [row for site in picks for row in site if len({tuple(p) for p in row}) > 1]
        assert changed  # else `frozen` would pass too


def test_a_static_cache_does_not_start_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = CompileConfig()
    compiler._compile_all_devices = True  # as on a GPU

    def refuse(*_: object) -> None:
        raise AssertionError("compiled")

    options = {"cache_implementation": "static", "compile_config": compiler}
    with all_float64():
        adapted, inputs = make_moc("llama"), make_batch(ROWS, "left")
        monkeypatch.setattr(type(adapted.model), "get_compiled_call", refuse)
        generate(adapted, inputs, 1, **options)
        with pytest.raises(AssertionError, match="compiled"):
            generate(adapted, inputs, 1, **options, disable_compile=False)


def test_tokens_that_have_voted_are_not_taken_back() -> None:
    """With running votes a guess would stay in the count; an emptied cache begins anew."""
    adapted, ids = make_moc("llama", "running"), torch.randint(5, 250, (4, 12))
    cache = DynamicCache(config=adapted.model.config)
    with torch.no_grad():
        adapted.model(input_ids=ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="have voted already"):
            cache.crop(-3)
        cache.crop(-9)
        adapted.model(input_ids=ids, past_key_values=cache)


# Only of layers mixed


@pytest.mark.parametrize("family", FEW)
def test_tokens_taken_back_leave_no_trace(family: str) -> None:
    with all_float64(), torch.no_grad():
        adapted, ids = make_molex(family), torch.randint(5, 250, (4, 12))
        store = DynamicCache(config=adapted.model.config)
        adapted.model(input_ids=ids[:, :7], past_key_values=store)
        store.activate_past_recording()
        wrong = torch.randint(5, 250, (4, 3))
        adapted.model(input_ids=wrong, past_key_values=store)
        store.crop(-3)
        out = adapted.model(input_ids=ids[:, 7:], past_key_values=store).logits
        voters = torch.arange(12).expand(4, -1) < 7
        scores, _ = expect_molex(family, frozen(ids), frozen(torch.ones_like(ids)), frozen(voters))
        assert (out - scores[:, 7:]).abs().max() < TOLERANCE


# Without its config ("lazy") a cache knows no windows.
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ("llama", "gemma3_text") for kind in ("dynamic", "static")]
    + [("llama", "lazy")],
)
def test_rows_of_a_cache_are_dropped_and_swapped_with_their_slots(family: str, kind: str) -> None:
    with all_float64(), torch.no_grad():
        adapted, inputs = make_molex(family), make_batch(6, "left")
        store = DynamicCache() if kind == "lazy" else make_cache(adapted, kind)
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
        scores, picks = expect_molex(family, frozen(ids), frozen(mask), frozen(voters))
        assert (out - scores[:, -3:]).abs().max() < TOLERANCE
        slots = adapted.model.moc.current.store.slots
        routed = {(t, j) for t, row in enumerate(picks) for [j] in row if j != t}
        assert set(slots) == routed
        assert all(
            slots[t, j].rows == [r for r, k in enumerate(picks[t]) if k == [j]] for t, j in slots
        )


def test_a_static_cache_is_a_new_prefill_after_reset() -> None:
    with all_float64(), torch.no_grad():
        adapted, ids = make_molex("llama"), torch.randint(5, 250, (3, 9))
        store = StaticCache(adapted.model.config, 16)
        for prompt in (ids, ids.flip(1)):
            store.reset()
            out = adapted.model(input_ids=prompt[:, :-1], past_key_values=store)
            out = adapted.model(input_ids=prompt[:, -1:], past_key_values=store)
            voters = torch.ones_like(prompt, dtype=torch.bool)
            voters[:, -1] = False
            scores, _ = expect_molex(
                "llama", frozen(prompt), frozen(torch.ones_like(prompt)), frozen(voters)
            )
            assert (out.logits[:, -1] - scores[:, -1]).abs().max() < TOLERANCE


def test_a_reset_static_cache_takes_new_routes() -> None:
    adapted, prompts = make_moc("llama"), torch.randint(5, 250, (2, 3, 9))
    used = StaticCache(adapted.model.config, 16)
    chosen = []
    for prompt in prompts:
        used.reset()
        for store in (used, StaticCache(adapted.model.config, 16)):
            with torch.no_grad():
                adapted.model(input_ids=prompt, past_key_values=store)
            chosen.append(adapted.routes())
    for again, fresh in zip(chosen[::2], chosen[1::2], strict=True):
        assert all(torch.equal(again[site], fresh[site]) for site in fresh)
    assert any(not torch.equal(chosen[0][site], chosen[2][site]) for site in chosen[0])


def test_a_cache_filled_without_the_mixture_is_refused() -> None:
    adapted, ids = make_molex("llama"), make_batch(2)["input_ids"]
    store = DynamicCache(config=adapted.model.config)
    with torch.no_grad():
        bare("llama")(input_ids=ids, past_key_values=store)
        with refused(RuntimeError):
            adapted.model(input_ids=ids[:, :CHUNK], past_key_values=store)
