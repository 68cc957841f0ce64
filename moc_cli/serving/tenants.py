"""Many tenants on one base: control sets come and go, and one batch may mix them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moc_cli.adapter.check import check_adapter, check_free, read_state
from moc_cli.errors import MocError
from moc_cli.methods.controls import make_mixture
from moc_cli.models.generation import GenerationTracker
from moc_cli.models.hooks import BlockHook, find_layers
from moc_cli.models.placement import Placement
from moc_cli.recipe.methods import ControlMethod, MethodConfig, MocMethod
from moc_cli.recipe.suggest import choices
from moc_cli.serving.mixed_batch import ControlSet, MixedBatch


class Tenants:
    """Control sets on one frozen model, each the adapter folder of a `moc` or `control` run.

        tenants = Tenants(model)
        tenants.add("law", "runs/law/controls")
        tenants.add("code", "runs/code/controls")
        with tenants.rows(["law", None, "code"]):
            model.generate(**three_prompts)

    A row without a set is the bare base, as is everything outside of `rows`. A generation keeps
    the sets it began with: they can be removed or replaced while it runs, and its later steps need
    no `rows`. Rows are routed apart, by their own sets. Not for training, nor for several threads.
    Move the model to its device before the first `add`: sets are made where it lies.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_free(model)
        self.model = model
        self._sets: dict[str, ControlSet] = {}
        self._batch = MixedBatch()
        self._placement: Placement | None = None
        self._handles: list[RemovableHandle] = []
        self._tracker: GenerationTracker | None = None

    def add(self, name: str, folder: str | Path, *, replace: bool = False) -> int:
        """Read an adapter folder and keep it under a name; returns the bytes that it takes.

        With `replace` a set of the same name gives way; generations that use it go on with it.
        Raises MocError for a name that is taken, RunError as `load_controls` does, and where the
        set cannot share a batch: another method, a trained head, a route for every token.
        """
        if name in self._sets and not replace:
            raise MocError(f"there is a control set '{name}' already", "give replace=True")
        checked = check_adapter(self.model, folder)
        method = _shareable(str(folder), checked.config.method, tuple(checked.config.modules))
        mixture, placement = make_mixture(self.model, method, checked.seed)
        if self._placement is not None and placement != self._placement:
            raise MocError(f"{folder} places its controls elsewhere than the sets that are here")
        mixture.load_state_dict(read_state(checked.adapter), strict=True)
        mixture.requires_grad_(False).train(False)
        if self._placement is None:
            self._place(placement)
        self._sets[name] = ControlSet(name, mixture)
        return self._sets[name].bytes

    def remove(self, name: str) -> None:
        """Forget a set; generations that use it go on with it, new ones cannot begin."""
        self._find(name)
        del self._sets[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The sets there are."""
        return tuple(self._sets)

    def memory(self) -> dict[str, int]:
        """The bytes of each set's controls and gates."""
        return {name: controls.bytes for name, controls in self._sets.items()}

    def __str__(self) -> str:
        """A line for each set: its name and the memory that it takes."""
        lines = [f"{name}  {size / 1e6:,.1f} MB" for name, size in self.memory().items()]
        return "\n".join(lines) or "no control set"

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it the rows of a batch use these sets, in their order; None: the bare base.

        Beams and returned sequences of a row share its set. Raises MocError for an unknown name.
        """
        previous = self._batch.assigned
        self._batch.assigned = tuple(None if name is None else self._find(name) for name in names)
        try:
            yield
        finally:
            self._batch.assigned = previous

    def detach(self) -> PreTrainedModel:
        """Take every set and hook out: the model is as it came."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._tracker is not None:
            self._tracker.remove()
        self._tracker = self._placement = None
        self._sets.clear()
        return self.model

    def _find(self, name: str) -> ControlSet:
        if name not in self._sets:
            known_names = choices(name, self._sets) if self._sets else "; there is none yet"
            raise MocError(f"no control set '{name}'{known_names}")
        return self._sets[name]

    def _place(self, placement: Placement) -> None:
        """Register the hooks, once, at every block where a set may have a control."""
        self._placement = placement
        for number, layer in enumerate(find_layers(self.model, placement)):
            for block in ("attn", "ffn"):
                hook = BlockHook(self._batch, (number, block))
                self._handles += hook.register(layer, placement.place(block))
        self._tracker = GenerationTracker(
            self.model, self._batch, placement, new_store=self._batch.new_store
        )


def _shareable(
    folder: str, method: MethodConfig, modules: tuple[str, ...]
) -> MocMethod | ControlMethod:
    """Return the method; refuse what cannot share a forward with other sets."""
    if not isinstance(method, MocMethod | ControlMethod):
        raise MocError(
            f"{folder} holds method '{method.name}'; tenants share a batch with moc and control"
        )
    if modules:
        raise MocError(f"{folder} holds trained modules ({', '.join(modules)}); a batch has one")
    if isinstance(method, MocMethod) and method.top_k:
        if method.routing.level == "token":
            raise MocError(f"{folder} routes every token apart (method.routing.level: token)")
        if method.routing.decode == "running":
            raise MocError(f"{folder} routes again at every step (method.routing.decode: running)")
    return method
