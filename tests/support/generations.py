"""Generation step by step, in two methods, and what each step must be on whole sequences.

A row's route is that of its prompt: of all its tokens; of its first chunk with a real token where
the prompt comes in chunks; of the first turn's prompt in a second turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from support import molex
from support.full_layers import FULL, logits
from support.models import make_tiny, train_controls
from support.reference import Settings, choose, gate_logits, softmax_without
from torch import Tensor

from moc_cli.methods import Adapted, attach
from moc_cli.recipe.methods import MocMethod

ROWS, NEW, CHUNK = 5, 4, 4
TOLERANCE = 1e-9  # float64; a cache sums attention in another order
SETTINGS = Settings(top_k=2, alpha=0.6, level="sample")

Rows = tuple[tuple[int, ...], ...]  # of a tensor (B, T), so that answers can be kept
Picks = list[list[Any]]  # of each site, of each row: the controls (layers) that it uses


@cache
def make_moc(family: str, decode: str = "frozen") -> Adapted:
    """A tiny model whose rows take different controls."""
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
def expect_moc(
    family: str, ids: Rows, mask: Rows, voters: Rows, start: int | None = None
) -> tuple[Tensor, Picks]:
    """Logits (B, T, V) of whole sequences through full layers, and each site's picks."""
    p = {name: value.detach() for name, value in make_moc(family).named_trainables().items()}
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


@cache
def make_molex(family: str) -> Adapted:
    """A tiny model whose rows take different second layers."""
    adapted = molex.make(family)
    adapted.model.generation_config.eos_token_id = None
    return adapted


@cache
def expect_molex(family: str, ids: Rows, mask: Rows, voters: Rows) -> tuple[Tensor, Picks]:
    """Logits (B, T, V) of whole sequences in plain loops, and each depth's second layers."""
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        reference = molex.expect(family, make_molex(family), batch, voters=torch.tensor(voters))
        picks = [[[layer] for layer in row] for row in reference.picks]
        return logits(molex.bare(family), reference.hidden), picks


@dataclass(frozen=True)
class Subject:
    """A method that routes: a model with it, and its reference on whole sequences."""

    make: Callable[[str], Adapted]
    expect: Callable[[str, Rows, Rows, Rows], tuple[Tensor, Picks]]


SUBJECTS = {"moc": Subject(make_moc, expect_moc), "molex": Subject(make_molex, expect_molex)}


def frozen(value: Tensor) -> Rows:
    """The rows of (B, T) as a key."""
    return tuple(map(tuple, value.tolist()))


def generate(
    adapted: Adapted, inputs: dict[str, Tensor], beams: int, **options: Any
) -> tuple[Any, list[list[Tensor]]]:
    """New tokens with their raw logits, and the routes that every site used in each forward."""
    mixture, used = adapted.model.moc, []

    def note(*_: object) -> None:
        stored = {} if mixture.current.store is None else mixture.current.store.routes
        sites = mixture.sites
        ids = [stored[s.index].ids if s.index in stored else s.choice for s in sites]
        used.append([value.clone() for value in ids])

    handle = adapted.model.base_model.register_forward_hook(note)
    try:
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
    finally:
        handle.remove()
    return out, used


def emitted(out: Any, beams: int) -> Tensor:
    """The logits (B, new, V) from which each token of the returned sequences was taken."""
    rows = out.sequences.shape[0]
    chosen = [
        step[torch.arange(rows) if beams == 1 else out.beam_indices[:, t]]
        for t, step in enumerate(out.logits)
    ]
    return torch.stack(chosen, dim=1)


def check(
    subject: Subject, family: str, out: Any, steps: list, voters: Tensor, mask: Tensor, beams: int
) -> None:
    """Each emitted token's logits and each new forward's routes are the reference's."""
    ids, new = out.sequences, len(out.logits)
    rows = len(ids)
    tail = torch.ones(rows, ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    mask = torch.cat([mask, tail], dim=1)
    voters = torch.cat([voters, torch.zeros(rows, ids.shape[1] - voters.shape[1]).bool()], dim=1)
    scores, picks = subject.expect(family, frozen(ids), frozen(mask), frozen(voters))
    assert (emitted(out, beams) - scores[:, -new - 1 : -1]).abs().max() < TOLERANCE
    assert len({tuple(tuple(site[row]) for site in picks) for row in range(rows)}) >= 3
    assert any(row != [number] for number, site in enumerate(picks) for row in site)
    for step in steps[-new:]:
        for site, used in zip(picks, step, strict=True):
            expected = [row for row in site for _ in range(beams)]
            assert used.reshape(len(expected), -1).tolist() == expected


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
