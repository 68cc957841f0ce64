"""Run a second layer beside each layer of a model, on the same input, and mix the two outputs.

One forward hook a layer. In a generation the second layer has keys and values of its own: layer j
at depth t sees other inputs than at depth j, so they must not share a slot of the cache.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from moc_cli.models.generation import GenerationTracker, find_runner
from moc_cli.models.hooks import FollowLoss, find_layers
from moc_cli.models.placement import Placement
from moc_cli.nn.layer_mixture import LayerMixture, LayerSite
from moc_cli.nn.vote import Route

_BY_TYPE = ("attention_mask", "position_embeddings")  # what differs between types of layers
_NO_ROWS = "rel_embeddings"  # (positions, d): its first axis is never that of the rows


@dataclass
class Slot:
    """Keys and values of layer j at depth t, of the batch's `rows` that are routed there."""

    layer: Any
    rows: list[int]

    def take(self, places: list[int], rows: list[int]) -> None:
        """Keep the rows at `places`, in that order, under new numbers."""
        if places != list(range(len(self.rows))):
            self.layer.reorder_cache(torch.tensor(places, device=self.layer.keys.device))
        self.rows = rows


@dataclass
class LayerStore:
    """What one generation remembers: each layer's route, and slots by (depth t, layer j)."""

    routes: dict[int, Route] = field(default_factory=dict)
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    waiting: Tensor | None = None
    settled: bool = False  # never: the second layers' caches need every forward's length

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows what the cache does to its own: reorder, select or repeat them."""
        if not self.routes:
            return
        first = next(iter(self.routes.values()))
        sources = change(torch.arange(first.voters, device=first.ids.device)).tolist()
        self.routes = {depth: route.rows(change) for depth, route in self.routes.items()}
        if self.waiting is not None:
            self.waiting = change(self.waiting)
        for key, slot in list(self.slots.items()):
            place = {row: index for index, row in enumerate(slot.rows)}
            moves = [(place[old], new) for new, old in enumerate(sources) if old in place]
            if moves:
                slot.take([index for index, _ in moves], [new for _, new in moves])
            else:
                del self.slots[key]

    def settle(self) -> None:
        """Called after each forward that fills the cache."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as the cache does when it takes back a guess."""
        for slot in self.slots.values():
            slot.layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what leaves a window until the next crop, as the cache does from now on."""
        for slot in self.slots.values():
            if hasattr(slot.layer, "activate_past_recording"):
                slot.layer.activate_past_recording()


class LayerMixedModel:
    """A model whose layers each run a second layer, chosen by the mixture; hooks and caches.

    Only the layers numbered in `mixed` do so; each of them may choose any layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mixture: LayerMixture,
        placement: Placement,
        mixed: Collection[int],
    ) -> None:
        self.model = model
        self.mixture = mixture
        self.layers = find_layers(model, placement)
        self._parts: list[dict[str, Any]] | None = None
        self._rehearsing = False
        self._names = list(signature(self.layers[0].forward).parameters)
        model.add_module("moc", mixture)
        runner = find_runner(model, placement)
        # First among a layer's hooks, so that any other sees the mixed output. As partials of a
        # bound method, copies and pickles of the model keep their own.
        self._handles = [
            layer.register_forward_hook(
                partial(self._after_layer, site), with_kwargs=True, prepend=True
            )
            for site, layer in zip(mixture.sites, self.layers, strict=True)
            if site.index in mixed
        ]
        if mixture.balance_weight:
            self._handles.append(FollowLoss(mixture).register(model))
        if len(set(getattr(model.config.get_text_config(), "layer_types", None) or [])) > 1:
            self._handles.append(runner.register_forward_pre_hook(self._prepare, with_kwargs=True))
            self._handles.append(runner.register_forward_hook(self._forget))
        self.tracker = GenerationTracker(model, mixture, placement, new_store=LayerStore)

    def remove(self) -> None:
        """Take every hook and the mixture out of the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tracker.remove()
        del self.model.moc

    def _after_layer(
        self, site: LayerSite, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Any:
        """Forward hook of layer t, outside its activation checkpoint: the mixed output."""
        if self._rehearsing or not self.mixture.active:
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        first = output[0] if isinstance(output, tuple) else output
        recompute = getattr(self.layers[site.index], "gradient_checkpointing", False)
        route, loss = self.mixture.route(site, hidden, recompute)
        mixed = first
        for j, rows in route.groups():
            if j == site.index:
                continue
            # The route knows its rows on the host: no read from the device at every step.
            numbers = [row for row, (choice,) in enumerate(route.picks()) if choice == j]
            everyone = len(numbers) == route.voters  # of a batch's one choice too
            second = self._second(site.index, j, None if everyone else rows, numbers, args, kwargs)
            if everyone:
                mixed = self.mixture.mix(first, second)
            else:
                mixed = mixed.index_copy(0, rows, self.mixture.mix(first[rows], second))
        mixed = self.mixture.settle(site, mixed, loss)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    def _second(
        self,
        depth: int,
        j: int,
        rows: Tensor | None,
        numbers: list[int],
        args: tuple,
        kwargs: dict,
    ) -> Tensor:
        """u_j of depth t's input, for some rows or all (None); layer j's own hooks do not run."""
        size = len(args[0] if args else kwargs["hidden_states"])

        def part(name: str, value: Any) -> Any:
            if self._parts is not None and name in _BY_TYPE:
                value = self._parts[j].get(name, value)
            if isinstance(value, Cache):
                return self._slot(depth, j, numbers, value)
            return value if rows is None or name == _NO_ROWS else _select(value, rows, size)

        names = self._names
        output = self.layers[j].forward(
            *(part(name, value) for name, value in zip(names, args, strict=False)),
            **{name: part(name, value) for name, value in kwargs.items()},
        )
        return output[0] if isinstance(output, tuple) else output

    def _slot(self, depth: int, j: int, rows: list[int], cache: Cache) -> Cache | None:
        """A cache whose only layer is j's slot at this depth; None in training."""
        current = self.mixture.current
        if current.store is None:
            return None  # a training forward starts from nothing: the new keys are all there are
        slot = current.store.slots.get((depth, j))
        if slot is None:
            slot = Slot(_empty(cache, j), [])
            current.store.slots[depth, j] = slot
        if slot.rows != rows:
            _join(slot, rows, cache, j, current.past)
        view = copy.copy(cache)
        view.layers = [None] * j + [slot.layer]
        view.offloading = False
        return view

    def _prepare(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the module around the layers: the masks and positions of each layer.

        Layers of several types get different ones, and a layer at another's depth needs its own.
        Running the module with every layer replaced by a recorder gives them.
        """
        if not self.mixture.active:
            return
        parts: list[dict[str, Any]] = [{} for _ in self.layers]
        names = self._names

        def record(index: int, *args: Any, **kwargs: Any) -> Tensor:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            parts[index] = {name: arguments[name] for name in _BY_TYPE if name in arguments}
            return arguments["hidden_states"]

        with _forwards(self.layers, record), _unseen(module), torch.no_grad():
            self._rehearsing = True
            try:
                type(module).forward(module, *args, **kwargs)
            finally:
                self._rehearsing = False
        self._parts = parts

    def _forget(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._parts = None


def _select(value: Any, rows: Tensor, size: int) -> Any:
    """The rows of everything in value that has the batch's rows as its first axis."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 1 and value.shape[0] == size else value
    if isinstance(value, tuple):
        return tuple(_select(item, rows, size) for item in value)
    return value


def _empty(cache: Cache, j: int) -> Any:
    """A slot of the kind that the cache has for layer j, with nothing in it."""
    if j >= len(cache.layers):  # a dynamic cache makes its layers as they come
        return cache.layer_class_to_replicate()
    fresh = copy.copy(cache.layers[j])
    fresh.keys = fresh.values = None
    fresh.is_initialized = False
    for name in ("cumulative_length", "cumulative_length_int"):
        if hasattr(fresh, name):
            length = getattr(fresh, name)
            setattr(fresh, name, torch.zeros_like(length) if isinstance(length, Tensor) else 0)
    return fresh


def _join(slot: Slot, rows: list[int], cache: Cache, j: int, past: int) -> None:
    """Give a slot exactly these rows.

    A row that joins after the first forward had nothing but padding before: any keys will do.
    """
    if not past:
        slot.rows = rows
        return
    staying = [row for row in slot.rows if row in rows]
    if staying != slot.rows and staying:
        slot.take([slot.rows.index(row) for row in staying], staying)
    new = [row for row in rows if row not in staying]
    if new:
        keys, values = cache.layers[j].keys, cache.layers[j].values
        padding = _empty(cache, j)
        padding.update(
            *(t.new_zeros(len(new), t.shape[1], past, t.shape[3]) for t in (keys, values))
        )
        if staying:
            slot.layer.keys = torch.cat([slot.layer.keys, padding.keys])
            slot.layer.values = torch.cat([slot.layer.values, padding.values])
        else:
            slot.layer = padding
        slot.rows = staying + new
    slot.take([slot.rows.index(row) for row in rows], rows)


@contextmanager
def _forwards(layers: nn.ModuleList, record: Callable[..., Tensor]) -> Iterator[None]:
    """Within it each layer does nothing but call `record` with its number and its arguments."""
    own_forwards = [vars(layer).get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = partial(record, index)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own_forwards, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _unseen(module: nn.Module) -> AbstractContextManager[None]:
    """Within it random draws leave no trace."""
    device = next(module.parameters()).device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
