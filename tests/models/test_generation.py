"""Generation step by step against full layers: logits of every emitted token, and routes used.

A row's route is that of its prompt: of all its tokens; of its first chunk with a real token where
the prompt comes in chunks; of the first turn's prompt in a second turn.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from support.full_layers import FULL, logits
from support.models import DECODERS, all_float64, make_batch, make_tiny, train_controls
from support.reference import Settings, choose, gate_logits, softmax_without
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LogitsProcessorList, StaticCache

from moc_cli.methods import Adapted, attach
from moc_cli.recipe.methods import MocMethod

ROWS, NEW, CHUNK = 5, 6, 4
TOLERANCE = 1e-9  # float64; a cache sums attention in another order
SETTINGS = Settings(top_k=2, alpha=0.6, level="sample")


@cache
def make(family: str, decode: str = "frozen") -> Adapted:
    method = {"rank": 4, "top_k": 2, "alpha": 0.6, "gate": {"projection_dim": 8}}
    section = MocMethod.model_validate(method | {"routing": {"decode": decode}})
    adapted = attach(make_tiny(family, dtype=torch.float64), section, seed=1)
    train_controls(adapted.named_trainables())
    adapted.model.generation_config.eos_token_id = None
    return adapted


@dataclass
class Frozen:
    """eq. 9 with each row routed by its own voters (B, T), or from `start` on by running sums."""

    controls: list[tuple[Tensor, Tensor]]
    gate: dict[str, Tensor]
    voters: Tensor
    start: int | None = None

    def __post_init__(self) -> None:
        self.picks: list[list] = []  # of each site: of each row (and of each token): the controls

    def __call__(self, layer: int, block: str, x: Tensor) -> Tensor:
        own = x @ self.controls[2 * layer + (block == "ffn")][0].T
        own = own @ self.controls[2 * layer + (block == "ffn")][1].T
        rows = [self._row(row, real) for row, real in zip(x, self.voters, strict=True)]
        self.picks.append([picks for picks, _ in rows])
        return 0.6 * own + 0.4 * torch.stack([update for _, update in rows])

    def _row(self, x: Tensor, real: Tensor) -> tuple[list, Tensor]:
        p = {t: self._p(x[t]) for t in range(len(x)) if real[t]}
        if self.start is None:
            picks, weights = choose(list(p.values()), SETTINGS)
            return picks, self._mix(x, picks, weights)
        parts, all_picks = [], []
        for t in range(len(x)):
            if t >= self.start:
                p[t] = self._p(x[t])
            if t < self.start - 1:
                continue
            picks, weights = choose(list(p.values()), SETTINGS)
            first = 0 if t == self.start - 1 else t
            parts.append(self._mix(x[first : t + 1], picks, weights))
            all_picks.append(picks)
        return all_picks, torch.cat(parts)

    def _p(self, token: Tensor) -> Tensor:
        return softmax_without(gate_logits(token, self.gate, "cosine"), None)

    def _mix(self, x: Tensor, picks: list[int], weights: list[Tensor]) -> Tensor:
        total = torch.zeros_like(x)
        for k, weight in zip(picks, weights, strict=True):
            A, B = self.controls[k]
            total = total + weight * (x @ A.T) @ B.T
        return total


@cache
def expect(
    family: str, ids: tuple, mask: tuple, voters: tuple, start: int | None = None
) -> tuple[Tensor, list[list]]:
    """Logits (B, T, V) of whole sequences, and each site's picks."""
    p = {name: value.detach() for name, value in make(family).named_trainables().items()}
    controls = [
        (p[f"controls.{layer}.{block}.A"], p[f"controls.{layer}.{block}.B"])
        for layer in range(2)
        for block in ("attn", "ffn")
    ]
    gate = {name.removeprefix("gates.shared."): p[name] for name in p if name.startswith("gates.")}
    bare = make_tiny(family, dtype=torch.float64)
    sites = Frozen(controls, gate, torch.tensor(voters), start)
    with torch.no_grad():
        hidden = FULL[family](bare.base_model, torch.tensor(ids), torch.tensor(mask), sites)
        return logits(bare, hidden), sites.picks


def frozen(value: Tensor) -> tuple:
    return tuple(map(tuple, value.tolist()))


def watch(adapted: Adapted) -> SimpleNamespace:
    """Record what every site used in each forward (route ids), until `stop()`."""
    log: list[list[Tensor]] = []

    def note(*_: object) -> None:
        mixture = adapted.model.moc
        stored = {} if mixture.current.store is None else mixture.current.store.routes
        used = [
            stored[site.index].ids if site.index in stored else site.choice
            for site in mixture.sites
        ]
        log.append([ids.clone() for ids in used])

    handle = adapted.model.base_model.register_forward_hook(note)

    def stop() -> list[list[Tensor]]:
        handle.remove()
        return log

    return SimpleNamespace(stop=stop)


def generate(adapted: Adapted, inputs: dict[str, Tensor], beams: int, **options):
    """New tokens, their raw logits, and the routes that each forward used."""
    seen = watch(adapted)
    out = adapted.model.generate(
        **inputs,
        max_new_tokens=NEW,
        num_beams=beams,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out, seen.stop()


def emitted(out, beams: int) -> Tensor:
    """The logits (B, new, V) from which each token of the returned sequences was taken."""
    rows = out.sequences.shape[0]
    chosen = [
        step[torch.arange(rows) if beams == 1 else out.beam_indices[:, t]]
        for t, step in enumerate(out.logits)
    ]
    return torch.stack(chosen, dim=1)


def check(family: str, out, steps: list, voters: Tensor, mask: Tensor, beams: int) -> None:
    """Each emitted token's logits and each new forward's routes are those of the full layers."""
    ids, new = out.sequences, len(out.logits)
    tail = torch.ones(ids.shape[0], ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    mask = torch.cat([mask, tail], dim=1)
    voters = torch.cat([voters, torch.zeros(ROWS, ids.shape[1] - voters.shape[1]).bool()], dim=1)
    scores, picks = expect(family, frozen(ids), frozen(mask), frozen(voters))
    expected = scores[:, -new - 1 : -1]
    assert (emitted(out, beams) - expected).abs().max() < TOLERANCE
    assert len({tuple(tuple(site[row]) for site in picks) for row in range(ROWS)}) >= 3
    for step in steps[-new:]:
        for site, ids in enumerate(step):
            assert ids.tolist() == [picks[site][row] for row in range(ROWS) for _ in range(beams)]


def first_chunk(mask: Tensor) -> Tensor:
    """The voters of a prompt in chunks: each row's tokens of its first chunk with a real one."""
    voters = torch.zeros_like(mask, dtype=torch.bool)
    for row, line in enumerate(mask.bool()):
        begin = int(line.nonzero()[0]) // CHUNK * CHUNK
        voters[row, begin : begin + CHUNK] = line[begin : begin + CHUNK]
    return voters


MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": CHUNK},
    "static chunks": {"prefill_chunk_size": CHUNK, "cache_implementation": "static"},
}


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", DECODERS)
def test_every_step_equals_the_full_layers(family, mode, beams):
    with all_float64():
        adapted, inputs = make(family), make_batch(ROWS, "left")
        mask = inputs["attention_mask"]
        out, steps = generate(adapted, inputs, beams, **MODES[mode])
        voters = first_chunk(mask) if "chunks" in mode else mask.bool()
        check(family, out, steps, voters, mask, beams)


@pytest.mark.parametrize(
    # A static cache's rows cannot be repeated for beams.
    ("kind", "beams"),
    [("dynamic", 1), ("dynamic", 4), ("static", 1)],
)
@pytest.mark.parametrize("family", DECODERS)
def test_a_second_turn_keeps_the_routes_of_the_first(family, kind, beams):
    with all_float64():
        adapted, inputs = make(family), make_batch(ROWS, "left")
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


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_running_routes_follow_each_beam(family, kind, beams):
    with all_float64():
        adapted, inputs = make(family, "running"), make_batch(ROWS, "left")
        options = {"cache_implementation": "static"} if kind == "static" else {}
        out, _ = generate(adapted, inputs, beams, **options)
        mask = inputs["attention_mask"]
        voters = torch.cat([mask, torch.zeros(ROWS, NEW, dtype=torch.long)], dim=1).bool()
        whole = torch.cat([mask, torch.ones(ROWS, NEW, dtype=torch.long)], dim=1)
        scores, picks = expect(
            family, frozen(out.sequences), frozen(whole), frozen(voters), mask.shape[1]
        )
        assert (emitted(out, beams) - scores[:, -NEW - 1 : -1]).abs().max() < TOLERANCE
        changed = [row for site in picks for row in site if len({tuple(p) for p in row}) > 1]
        assert changed  # else `frozen` would pass too


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_scrambled_routes_change_the_output(family, kind):
    with all_float64():
        adapted, inputs = make(family), make_batch(ROWS, "left")
        config = adapted.model.config
        found = []
        for scramble in (False, True):
            store = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, 64)

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


@pytest.mark.parametrize("family", DECODERS)
def test_guessed_tokens_are_no_new_prefill(family):
    """Prompt lookup feeds several new tokens at once and takes wrong ones out of the cache."""
    with all_float64():
        adapted, ids = make(family), torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        plain, first = generate(adapted, inputs, 1)
        guessed, steps = generate(adapted, inputs, 1, prompt_lookup_num_tokens=3)
        assert torch.equal(plain.sequences, guessed.sequences)
        assert all(torch.equal(a, b) for a, b in zip(first[0], steps[0], strict=True))
        assert all(torch.equal(a, b) for step in steps for a, b in zip(step, steps[0], strict=True))


def test_a_static_cache_does_not_start_a_compiler(monkeypatch):
    compiler = CompileConfig()
    compiler._compile_all_devices = True  # as on a GPU

    def refuse(self, config):
        raise AssertionError("compiled")

    options = {"cache_implementation": "static", "compile_config": compiler}
    with all_float64():
        adapted, inputs = make("llama"), make_batch(ROWS, "left")
        monkeypatch.setattr(type(adapted.model), "get_compiled_call", refuse)
        generate(adapted, inputs, 1, **options)
        with pytest.raises(AssertionError, match="compiled"):
            generate(adapted, inputs, 1, **options, disable_compile=False)


@pytest.mark.parametrize("family", DECODERS)
def test_generations_interleave(family):
    """Two caches fed in turns keep apart, and equal their own generations."""
    with all_float64():
        adapted = make(family)
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
