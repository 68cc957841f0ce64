"""Which tokens vote in a forward of a model, and which generation the forward belongs to.

Hooks on one module only, as a rule the base model. The routes of a generation are tied to its KV
cache, so that several may run interleaved, and follow the cache's rows when beams reorder them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from itertools import count
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from moc_cli.models.masks import inside_padding, valid_tokens
from moc_cli.models.packing import packed_forward
from moc_cli.models.placement import Placement
from moc_cli.nn.forward import Forward

_STORE = "_moc_routes"  # where a cache carries the routes of its own generation
_OWNER = "_moc_owner"  # and whose they are
_OWNERS = count()
_UNMASKED = (
    "no attention_mask was given, so every token votes on the routes; only pad tokens "
    "(pad_token_id {pad}) at the ends of the rows do not. Padding with another token votes too, "
    "and the scores then depend on the batch. Give attention_mask, or one row at a time."
)


class Store(Protocol):
    """What one generation remembers; its rows follow those of the cache.

    `waiting` (B,) marks the rows of which only padding has been seen, None where there are none.
    A `settled` store needs neither mask nor length of the later forwards.
    """

    waiting: Tensor | None
    settled: bool

    def rows(self, change: Callable[[Tensor], Tensor]) -> None: ...
    def settle(self) -> None: ...


class RoutedMixture(Protocol):
    """A mixture: it reads `current`, the running forward."""

    training: bool
    current: Forward


@dataclass
class _Generation:
    """A running `generate()`: its tracker, the length and rows of its prompt (None: not known yet),
    whether it is `compiled`, and whether a forward of it has been run.
    """

    tracker: "GenerationTracker"
    prompt_length: int | None = None
    rows: int | None = None
    compiled: bool = False
    begun: bool = False


_GENERATION: ContextVar[_Generation | None] = ContextVar("moc_generation", default=None)


class GenerationTracker:
    """Keeps `mixture.current` true for each forward of a model, its generations included.

    `new_store` makes what a generation remembers. With `running` the new tokens of a generation
    without a cache vote too; with `votes` false no token votes for another, with `by_row` each row
    decides for itself in training too. `fill` makes what a settled store needs for a compiled
    generation, whose `copies` of a row share its routes. `runner` is the module that sees every
    forward, with its token ids and mask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mixture: RoutedMixture,
        placement: Placement,
        *,
        new_store: Callable[[], Store],
        running: bool = False,
        votes: bool = True,
        by_row: bool = False,
        fill: Callable[[Any, int], None] | None = None,
    ) -> None:
        self.model = model
        self.mixture = mixture
        is_decoder = getattr(model.config, "is_decoder", False)  # of a family of encoders
        self.causal = placement.causal or bool(is_decoder)
        self.running = running
        self.votes = votes
        self.by_row = by_row
        self.voters: Tensor | None = None
        self._new_store = new_store
        self._fill = fill
        self._number = next(_OWNERS)
        self.runner = find_runner(model, placement)
        self._names = list(signature(self.runner.forward).parameters)
        self._handles = [
            self.runner.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            self.runner.register_forward_hook(self._end_forward),
            self.runner.register_forward_hook(self._after_error, always_call=True),
        ]
        if hasattr(model, "generate"):
            model.__dict__["generate"] = self._generate  # over the class's own

    def remove(self) -> None:
        """Take the hooks out of the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.__dict__.pop("generate", None)

    @contextmanager
    def voting(self, mask: Tensor) -> Iterator[None]:
        """Within it, the tokens of mask (B, T) vote, whatever the attention mask says."""
        previous, self.voters = self.voters, mask.bool()
        try:
            yield
        finally:
            self.voters = previous

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, knowing that its forwards belong together.

        On a GPU it would compile a model with a static cache by itself, which takes minutes.
        `disable_compile=False` asks for it.
        """
        kwargs.setdefault("disable_compile", True)
        names = ("inputs", "input_ids", "inputs_embeds")
        prompt = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
        length = prompt.shape[1] if isinstance(prompt, Tensor) else None
        rows = prompt.shape[0] if isinstance(prompt, Tensor) else None
        compile_asked = kwargs["disable_compile"] is False
        compiled = compile_asked or self.model._compiled_call_impl is not None
        token = _GENERATION.set(_Generation(self, length, rows, compiled))
        try:
            generate: Any = getattr(type(self.model), "generate")  # noqa: B009
            return generate(self.model, *args, **kwargs)
        finally:
            _GENERATION.reset(token)

    def _begin_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Pre-hook of the runner: the voting tokens and the route store of this forward."""
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        length = tokens.shape[1]
        cache = arguments.get("past_key_values")
        earlier = self._store_of(cache)
        if earlier is not None and earlier.settled and not self.mixture.training:
            self.mixture.current = Forward(store=earlier, shape=(tokens.shape[0], length))
            return
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.voters is None and past == 0 and _GENERATION.get() is None:
            apart = self.votes and (self.by_row or not self.mixture.training)
            packed = packed_forward(arguments, length, apart=apart)
            if packed is not None:
                self.mixture.current = packed
                return
        valid = self.voters
        if valid is None:
            valid = valid_tokens(arguments.get("attention_mask"), length, past)
            unmasked = arguments.get("attention_mask") is None and _GENERATION.get() is None
            if self.votes and past == 0 and unmasked:
                valid = self._without_padding(arguments.get("input_ids"), tokens.shape[0])
        store = deciding = None
        copies, had_forward = self._copies(tokens.shape[0])
        if self.causal and not self.mixture.training:
            store = earlier
            if store is None or past == 0:
                valid = self._prompt_only(valid, tokens)
                store = self._new_store()
                store.waiting = _marked(None if valid is None else ~valid.any(dim=1))
                if cache is not None:
                    follow(cache, store, self._number)
            elif store.waiting is not None:
                has_tokens = torch.ones_like(store.waiting) if valid is None else valid.any(dim=1)
                deciding = _marked(store.waiting & has_tokens)
                store.waiting = _marked(store.waiting & ~has_tokens)
        repeat = had_forward and past == 0 and not self.running
        shape = tokens.shape[0], length
        self.mixture.current = Forward(valid, store, deciding, shape, past, copies, repeat)

    def _without_padding(self, ids: Tensor | None, rows: int) -> Tensor | None:
        """The voting tokens (B, T) of rows without a mask: pad tokens at their ends are none.

        Warns once that the rest votes, where the rows are several or padded. `generate` is not
        asked: it makes a mask itself, and leaves it out where it marks every token.
        """
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        valid = None if ids is None or pad is None else inside_padding(ids, pad)
        if rows > 1 or valid is not None:
            warnings.warn(_UNMASKED.format(pad=pad), stacklevel=2)
        return valid

    def _store_of(self, cache: Cache | None) -> Any:
        """What the cache's generation remembers; None where it began with other controls."""
        if getattr(cache, _OWNER, None) != self._number:
            return None
        store: Any = getattr(cache, _STORE, None)
        return store

    def _copies(self, rows: int) -> tuple[int, bool]:
        """How many rows of a generation's forward stand for one of its prompt, as beams do, and
        whether it had a forward before; later ones of `running` decide for each beam again.
        """
        generation = _GENERATION.get()
        if generation is None or generation.tracker is not self:
            return 1, False
        begun, generation.begun = generation.begun, True
        if generation.rows is None or (begun and self.running):
            return 1, begun
        return max(1, rows // generation.rows), begun

    def _prompt_only(self, valid: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Of the tokens of a generation's first forward those of its prompt vote.

        Without a cache every forward is a first one; with guesses (prompt lookup) the first one
        holds more than the prompt. `running` counts the new tokens too, so it keeps them.
        """
        generation = _GENERATION.get()
        if generation is None or generation.tracker is not self:
            return valid
        length = tokens.shape[1]
        if generation.prompt_length is None:
            generation.prompt_length = length
        if self.running or length <= generation.prompt_length:
            return valid
        if valid is None:
            valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        prompt = torch.arange(length, device=tokens.device) < generation.prompt_length
        return valid & prompt

    def _end_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the runner: a cache made inside the forward gets the routes decided in it."""
        current = self.mixture.current
        current.end()
        if current.store is not None and current.store.settled:
            return  # in a compiled forward this is all
        values = output if isinstance(output, tuple) else output.values()
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is not None and current.store is not None:
            if self._store_of(cache) is None:
                follow(cache, current.store, self._number)
            current.store.settle()
            generation = _GENERATION.get()
            if self._fill and generation and generation.compiled and current.store.settled:
                self._fill(current.store, current.copies)

    def _after_error(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the runner, called after an error in it too, then without an output: what its
        sites share and the graph of the failed forward would keep each other alive.
        """
        if output is None:
            self.mixture.current.end()
            self.mixture.current = Forward()


def find_runner(model: PreTrainedModel, placement: Placement) -> nn.Module:
    """The innermost module around the layers that takes token ids and their mask.

    As a rule that is the base model; but OPT's head calls the base's decoder past the base.
    """
    path = placement.layers
    while "." in path:
        path = path.rpartition(".")[0]
        module = model.base_model.get_submodule(path)
        if {"input_ids", "attention_mask"} <= signature(module.forward).parameters.keys():
            return module
    return model.base_model


def _marked(rows: Tensor | None) -> Tensor | None:
    """The marked rows, or None where there are none; reads from the device."""
    return rows if rows is not None and bool(rows.any()) else None


def follow(cache: Cache, store: Store, owner: int) -> None:
    """Tie a store to its cache: wherever the cache's rows are reordered, the routes' are too."""
    setattr(cache, _STORE, store)
    setattr(cache, _OWNER, owner)
    for name, call in _FOLLOWED.items():
        if name == "activate_past_recording" and not hasattr(store, name):
            continue
        if hasattr(type(cache), name):
            setattr(cache, name, MethodType(call, cache))


def _forget(cache: Cache) -> None:
    """Untie the store: the cache is as any other again, and what comes next is a new prompt."""
    for name in (_STORE, _OWNER, *_FOLLOWED):
        vars(cache).pop(name, None)


def _reset(cache: Cache) -> None:
    _forget(cache)
    cache.reset()


def _reorder(cache: Cache, beam_idx: torch.LongTensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    getattr(cache, _STORE).rows(lambda rows: rows[beam_idx])


def _repeat(cache: Cache, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    getattr(cache, _STORE).rows(lambda rows: rows.repeat_interleave(repeats, dim=0))


def _crop(cache: Cache, tokens_to_remove: int) -> None:
    type(cache).crop(cache, tokens_to_remove)
    store = getattr(cache, _STORE)
    if not cache.get_seq_length():
        _forget(cache)
    elif hasattr(store, "crop"):
        store.crop(tokens_to_remove)


def _record(cache: Cache) -> None:
    type(cache).activate_past_recording(cache)
    getattr(cache, _STORE).activate_past_recording()


def _select(cache: Cache, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    getattr(cache, _STORE).rows(lambda rows: rows[indices])


_FOLLOWED: dict[str, Callable[..., None]] = {
    "reorder_cache": _reorder,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _select,
    "reset": _reset,
    "crop": _crop,
    "activate_past_recording": _record,
}
