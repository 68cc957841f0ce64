"""A transformers model with its Mixture-of-Control inside: this one file and the weights are all.

x_{t+1} = x_t + f_t(x_t) + α·g_t(x_t) + (1−α)·Σ_{k∈S} π_k·g_k(x_t), with g_k(x) = scale · B_k A_k x

A gate reads the block's input x_t; the tokens of a row's prompt vote for the K controls S of the
row (padding never votes), and a generation keeps that route beside its key-value cache, through
beams and several turns. Without a gate (K = 0) each block adds its own control alone.

Made for inference: in training mode routes are decided as in evaluation, and nothing balances them.
Needs torch and transformers. `config.moc` says where the controls sit and how routes are decided.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import chain, product
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

_STORE = "_moc_routes"  # where a cache carries the routes of its own generation
# Of the running `generate()`: its model, and how long the prompt is, None before it is seen.
_GENERATION: ContextVar[tuple[Any, int | None]] = ContextVar("moc_generation")


def _float32(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class Control(nn.Module):
    """One low-rank pair, A (r, d) and B (d, r), kept in float32."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.A, self.B = _float32(rank, width), _float32(width, rank)
        self.reset()

    def reset(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The pair, on the device of x."""
        return self.A.to(x.device), self.B.to(x.device)


class Gate(nn.Module):
    """Logits over N controls: W x, or s · cos(P x, e_k) where `projection_dim` is given."""

    def __init__(self, width: int, size: int, projection_dim: int | None) -> None:
        super().__init__()
        self.cosine = projection_dim is not None
        if self.cosine:
            self.projection = _float32(projection_dim, width)
            self.experts = _float32(size, projection_dim)
            self.log_temperature = _float32()
        else:
            self.weight = _float32(size, width)
        self.reset()

    def reset(self) -> None:
        nn.init.kaiming_uniform_(self.projection if self.cosine else self.weight, a=math.sqrt(5))
        if self.cosine:
            nn.init.normal_(self.experts, std=0.01)
            nn.init.constant_(self.log_temperature, math.log(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, N), in float32 or wider."""
        where = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
        if not self.cosine:
            return F.linear(x.to(**where), self.weight.to(**where))
        features = F.normalize(F.linear(x.to(**where), self.projection.to(**where)), dim=-1)
        experts = F.normalize(self.experts.to(**where), dim=-1)
        temperature = self.log_temperature.clamp(max=math.log(100)).exp()
        return temperature.to(**where) * F.linear(features, experts)


@dataclass
class Store:
    """What one generation remembers by site: a route (frozen), or sums of votes (running).

    All are (B, ...); `waiting` (B,) marks the rows of which only padding has been seen.
    """

    kept: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    waiting: Tensor | None = None

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows what the cache does to its own."""
        self.kept = {site: tuple(map(change, values)) for site, values in self.kept.items()}
        self.waiting = None if self.waiting is None else change(self.waiting)


@dataclass(eq=False)
class Site:
    """Where one control sits: reads a block's input and adds to its output."""

    mixture: "Mixture"
    control: Control
    layer: int
    block: str
    pool: str
    state: Tensor | None = None

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.state = args[0] if args else kwargs["hidden_states"]

    def write(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state, self.state = self.state, None
        update = self.mixture.update(self, state)
        if isinstance(output, tuple):
            return (output[0] + update, *output[1:])
        return output + update


class Mixture(nn.Module):
    """Every control and gate of the model, and the update that each site adds.

    Of one forward, `shape` is (B, T), `valid` (B, T) says who votes (None: all), `store` is its
    generation's, and `late` (B,) marks the rows that decide only now.
    """

    def __init__(self, settings: dict[str, Any], layers: int, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.shape = self.valid = self.store = self.late = None
        blocks = tuple(settings["ports"])
        self.controls = nn.ModuleList(
            nn.ModuleDict({block: Control(width, settings["rank"]) for block in blocks})
            for _ in range(layers)
        )
        self.pools: dict[str, list[Site]] = {pool: [] for pool in settings["pools"].values()}
        for layer, block in product(range(layers), blocks):
            site = Site(self, self.controls[layer][block], layer, block, settings["pools"][block])
            self.pools[site.pool].append(site)
        gates = self.pools.items() if settings["top_k"] else ()
        self.gates = nn.ModuleDict(
            {pool: Gate(width, len(sites), settings["projection_dim"]) for pool, sites in gates}
        )

    def update(self, site: Site, x: Tensor) -> Tensor:
        """What the site adds for its block's input x (B, T, d)."""
        if x.ndim == 2 and self.shape is not None:  # (B·T, d)
            return self.update(site, x.unflatten(0, self.shape)).flatten(0, 1)
        if not self.settings["top_k"]:
            A, B = site.control(x)
            return (x @ A.to(x.dtype).T) @ (self.settings["scale"] * B).to(x.dtype).T
        ids, weights = self.route(site, x)
        used = ids.unique().tolist()
        pairs = [s.control(x) for s in (site, *(self.pools[site.pool][k] for k in used))]
        # Every control in use, one after another; a row that does not use one gives it weight 0.
        shares = torch.stack([(weights * (ids == k)).sum(dim=1) for k in used], dim=1)
        shares = (1 - self.settings["alpha"]) * shares  # (V, used)
        shares = F.pad(shares, (1, 0), value=self.settings["alpha"])
        shares = self.settings["scale"] * shares.repeat_interleave(self.settings["rank"], dim=1)
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
        hidden = x.reshape(len(ids), -1, x.shape[-1]) @ A.to(x.dtype).T  # (V, tokens, R)
        return ((hidden * shares[:, None]).to(x.dtype) @ B.to(x.dtype).T).reshape(x.shape)

    def route(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen controls and their weights, (V, K): of V rows, or at level `token` V tokens.

        A generation keeps those of its rows.
        """
        frozen, key = self.settings["decode"] == "frozen", f"{site.layer}.{site.block}"
        kept = {} if self.store is None or self.settings["level"] == "token" else self.store.kept
        known = kept.get(key)
        if frozen and known is not None and self.late is None:
            return known
        ballot = self._poll(self._probabilities(site, x), self.valid)
        if not frozen and known is not None:
            ballot = tuple(map(torch.add, known, ballot))
        route = self._decide(*ballot)
        if frozen and known is not None:
            late = self.late.to(x.device)[:, None]
            route = tuple(torch.where(late, *both) for both in zip(route, known, strict=True))
        kept[key] = tuple(t.detach() for t in (route if frozen else ballot))
        return route

    def _probabilities(self, site: Site, x: Tensor) -> Tensor:
        """softmax over the pool, (B, T, N)."""
        logits = self.gates[site.pool](x).to(x.device)
        if self.settings["exclude_local"]:
            own = torch.tensor([self.pools[site.pool].index(site)], device=x.device)
            logits = logits.index_fill(-1, own, float("-inf"))
        return logits.softmax(dim=-1)

    def _poll(self, p: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the votes p (B, T, N): sums and own picks counted (V, N), and voters (V, 1)."""
        if self.settings["level"] == "token":
            p, valid = p.flatten(0, 1)[:, None], None
        weight = p.new_ones(p.shape[:2]) if valid is None else valid.to(p.device, p.dtype)
        counts = torch.zeros_like(p[:, 0])
        if self.settings["vote"] == "mode":
            picks = torch.zeros_like(p).scatter_(-1, _top(p.detach(), self.settings["top_k"]), 1.0)
            counts = (picks * weight[..., None]).sum(dim=1)
        return (p * weight[..., None]).sum(dim=1), counts, weight.sum(dim=1, keepdim=True)

    def _decide(self, sums: Tensor, counts: Tensor, voters: Tensor) -> tuple[Tensor, Tensor]:
        """The K of the largest mean probability, or the most counted; and their weights."""
        k, mean = self.settings["top_k"], sums / voters.clamp(min=1)
        ids = _top(mean, k)
        if self.settings["vote"] == "mode":
            by_mean = mean.sort(dim=-1, descending=True, stable=True).indices
            order = counts.gather(-1, by_mean).sort(dim=-1, descending=True, stable=True)
            ids = by_mean.gather(-1, order.indices[..., :k])
        chosen = mean.gather(-1, ids)
        if self.settings["weights"] == "probability":
            return ids, chosen
        tiny = torch.finfo(chosen.dtype).tiny
        return ids, chosen / chosen.sum(-1, keepdim=True).clamp(min=tiny)


class Controlled:
    """Placed before a transformers class: the same model with its controls in `self.moc`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.moc
        layers = self.get_submodule(settings["layers"])
        self.moc = Mixture(settings, len(layers), config.get_text_config().hidden_size)
        for site in chain(*self.moc.pools.values()):
            read, write = map(layers[site.layer].get_submodule, settings["ports"][site.block])
            read.register_forward_pre_hook(site.read, with_kwargs=True)
            write.register_forward_hook(site.write)
        self._keep_in_fp32_modules_strict |= {"moc", *settings["modules"]}
        for name in settings["modules"]:
            self.get_submodule(name).register_forward_pre_hook(_to_own_type)
        runner = self.get_submodule(settings["runner"])
        self._moc_names = list(signature(runner.forward).parameters)
        runner.register_forward_pre_hook(self._moc_before, with_kwargs=True)
        runner.register_forward_hook(self._moc_after)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Control | Gate):
            module.reset()
        else:
            super()._init_weights(module)

    def _moc_before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Find out which tokens vote in this forward, and whose routes it uses."""
        given = dict(zip(self._moc_names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        cache, length = given.get("past_key_values"), tokens.shape[1]
        past = int(cache.get_seq_length()) if cache is not None else 0
        valid = _valid_tokens(given.get("attention_mask"), length, past)
        store = late = None
        if self.config.moc["causal"] and not self.training:
            store = getattr(cache, _STORE, None)
            if store is None or past == 0:
                valid = self._moc_prompt_only(valid, tokens)
                store = Store(waiting=_marked(None if valid is None else ~valid.any(dim=1)))
                if cache is not None:
                    _follow(cache, store)
            elif store.waiting is not None:
                seen = torch.ones_like(store.waiting) if valid is None else valid.any(dim=1)
                late = _marked(store.waiting & seen)
                store.waiting = _marked(store.waiting & ~seen)
        self.moc.shape, self.moc.valid = tokens.shape[:2], valid
        self.moc.store, self.moc.late = store, late

    def _moc_prompt_only(self, valid: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Of a generation's first forward the prompt votes, also where no cache is used."""
        model, prompt = _GENERATION.get((None, None))
        length = tokens.shape[1]
        if model is self and prompt is None:
            _GENERATION.set((self, length))
            return valid
        if model is not self or self.config.moc["decode"] == "running" or length <= prompt:
            return valid
        asked = torch.arange(length, device=tokens.device) < prompt
        return asked.expand(tokens.shape[:2]) if valid is None else valid & asked

    def _moc_after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Give a cache that was made inside the forward the routes decided in it."""
        store = self.moc.store
        values = output if isinstance(output, tuple) else output.values()
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is not None and store is not None and not hasattr(cache, _STORE):
            _follow(cache, store)


class Generating(Controlled):
    """The same for a language model."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, but forwards know the prompt's length; compiled only for who asks for it."""
        kwargs.setdefault("disable_compile", True)
        given = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((tokens for tokens in (*args[:1], *given) if tokens is not None), None)
        length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        token = _GENERATION.set((self, length))
        try:
            return super().generate(*args, **kwargs)
        finally:
            _GENERATION.reset(token)


def _top(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest; equal scores: the lower index first."""
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _to_own_type(module: nn.Module, args: tuple) -> tuple:
    kind = next(module.parameters()).dtype
    return tuple(a.to(kind) if getattr(a, "is_floating_point", bool)() else a for a in args)


def _marked(rows: Tensor | None) -> Tensor | None:
    return rows if rows is not None and bool(rows.any()) else None


def _valid_tokens(mask: Any, length: int, past: int) -> Tensor | None:
    """Which new tokens are real (B, T), from a mask of 2 or 4 dimensions or a dict of those."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask[:, -length:].bool()
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    keys, rows = allowed.shape[-1], torch.arange(length, device=mask.device)
    # A token may attend to itself exactly if it is real. A rolling window keeps the last keys.
    return allowed[:, 0, rows, (past if keys >= past + length else keys - length) + rows]


def _follow(cache: Cache, store: Store) -> None:
    """Tie routes to a cache: where its rows are reordered, selected or repeated, theirs are too."""
    setattr(cache, _STORE, store)
    for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
        if hasattr(type(cache), name):
            setattr(cache, name, MethodType(partial(_both, name), cache))


def _both(name: str, cache: Cache, value: Any) -> None:
    def change(rows: Tensor) -> Tensor:
        if name == "batch_repeat_interleave":
            return rows.repeat_interleave(value, dim=0)
        return rows[value.to(rows.device)]

    getattr(type(cache), name)(cache, value)
    getattr(cache, _STORE).rows(change)
