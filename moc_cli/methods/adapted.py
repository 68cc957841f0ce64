"""A model with a method placed in it: the one interface that the other rooms see."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.errors import MocError, compare_entries
from moc_cli.methods.route_counts import Recorder
from moc_cli.models.generation import GenerationTracker
from moc_cli.models.hooks import cast_inputs
from moc_cli.models.tokens import pooling_token
from moc_cli.nn.base import MixtureBase
from moc_cli.nn.mixture import Mixture


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: the method's own, fresh modules (heads), and the base without them."""

    adapter: int
    modules: int
    base: int

    @property
    def trainable(self) -> int:
        return self.adapter + self.modules

    @property
    def share(self) -> float:
        """The paper's "% params" as a fraction: adapter / base, both without heads."""
        return self.adapter / self.base

    def to_json(self) -> dict[str, Any]:
        """The counts and the share as plain values."""
        return {**asdict(self), "share": self.share}


class Placed:
    """What a method does once it is in the model; by itself it is no method, in a bare model.

    Where a `mixture` decides routes, `tracker` tells it which tokens vote.
    """

    mixture: MixtureBase | None = None
    tracker: GenerationTracker | None = None

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self.mixture is None:
            yield
            return
        was_active, self.mixture.active = self.mixture.active, False
        try:
            yield
        finally:
            self.mixture.active = was_active

    def merge(self) -> None:
        raise MocError("this method cannot be folded into the base's weights")

    def detach(self) -> None:
        pass


class FreshModules:
    """Modules that the checkpoint lacked (a classifier head, a pooler): trained and saved whole.

    They are kept in float32; where the base is in another type, their input is cast.
    """

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        self.names = names
        self._parts = {name: model.get_submodule(name) for name in names}
        self._handles = []
        self._types = [
            (part, name, tensor.dtype)
            for module in self._parts.values()
            for part in module.modules()
            for name, tensor in {**part._parameters, **part._buffers}.items()
            if tensor is not None
        ]
        for module in self._parts.values():
            if model.dtype != torch.float32 and model.dtype != torch.float64:
                module.float()
                self._handles.append(module.register_forward_pre_hook(cast_inputs))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"modules.{name}.{key}": parameter
            for name, module in self._parts.items()
            for key, parameter in module.named_parameters()
        }

    def remove(self) -> None:
        """Take the hooks away; the numbers stay in float32."""
        for handle in self._handles:
            handle.remove()

    def restore(self) -> None:
        """Give each module its own type back."""
        self.remove()
        for part, name, dtype in self._types:
            tensor: Tensor = getattr(part, name)
            tensor.data = tensor.data.to(dtype)
            if tensor.grad is not None:
                tensor.grad.data = tensor.grad.data.to(dtype)


class Adapted:
    """A model, the method placed in it, and the fresh modules trained with it.

    `named_trainables()` gives the parameters under the keys of the adapter file; everything else
    in the model is frozen. `detach()` gives the model back as it came.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        placed: Placed,
        fresh: FreshModules,
        required_grad: dict[str, bool],
        base: int,
    ) -> None:
        self.model = model
        self._placed = placed
        self._fresh = fresh
        self._required_grad = required_grad
        self._base = base
        named = self.named_trainables()
        self._vectors = {name for name, parameter in named.items() if parameter.ndim < 2}
        for parameter in named.values():
            parameter.requires_grad_(True)

    def named_trainables(self) -> dict[str, nn.Parameter]:
        """Every trained parameter, keyed as in the adapter file."""
        return self._placed.named_parameters() | self._fresh.named_parameters()

    def no_decay(self, name: str) -> bool:
        """Whether weight decay must leave this parameter alone: gates, biases, norms."""
        return name.startswith("gates.") or name in self._vectors

    def in_gate(self, name: str) -> bool:
        """Whether this has the gate's learning rate: gates, and learned weights of layers."""
        return name.startswith(("gates.", "weight_logits"))

    def state(self) -> dict[str, Tensor]:
        """A copy of every trained parameter on the CPU."""
        return {
            name: parameter.detach().to("cpu", copy=True).contiguous()
            for name, parameter in self.named_trainables().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy a state in; raises MocError on missing or unexpected keys and wrong shapes."""
        parameters = self.named_trainables()
        wrong = compare_entries(
            {name: tuple(value.shape) for name, value in state.items()},
            {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        )
        if wrong:
            raise MocError(f"the saved controls do not fit this model and recipe: {wrong}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def counts(self) -> Counts:
        return Counts(
            adapter=sum(p.numel() for p in self._placed.named_parameters().values()),
            modules=sum(p.numel() for p in self._fresh.named_parameters().values()),
            base=self._base,
        )

    @property
    def mixture(self) -> Mixture | None:
        """The controls and gates of `moc` and `control`; None with another method."""
        mixture = self._placed.mixture
        return mixture if isinstance(mixture, Mixture) else None

    def routes(self) -> dict[str, Tensor]:
        """What each site, or layer of `molex`, chose in the last forward: ids (V, K) in its pool.

        V is 1 for a batch, the rows, or rows times tokens. Sites that chose nothing then, because a
        generation goes on or there is no gate, are left out.
        """
        mixture = self._placed.mixture
        sites = [] if mixture is None else mixture.sites
        return {site.name: site.choice for site in sites if site.choice is not None}

    def adapter_config(self) -> dict[str, Any]:
        """What `adapter_config.json` says about the method and where it sits.

        Of a classifier that is a decoder also the pad token, on which its logits depend.
        """
        config = self._placed.config() | {"modules": list(self._fresh.names)}
        pad = pooling_token(self.model)
        return config if pad is None else config | {"pad_token_id": pad}

    def set_loss_scale(self, scale: float) -> None:
        """Multiply the balance loss's gradient by this: 1 / micro-batches of the window."""
        if self._placed.mixture is not None:
            self._placed.mixture.loss_scale = scale

    def balance_loss(self) -> float | None:
        """The last training forward's weighted balance loss; None where there is no gate."""
        return None if self._placed.mixture is None else self._placed.mixture.balance()

    def recorder(self, *, detailed: bool = True) -> Recorder | None:
        """Something to enter that adds up what the gates decide; None where there is no gate."""
        mixture = self._placed.mixture
        if mixture is None or not mixture.top_k:
            return None
        return Recorder(mixture, next(mixture.parameters()).device, detailed=detailed)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Within it recorders count nothing if it ends by an error."""
        mixture = self._placed.mixture
        watchers = () if mixture is None else mixture.watchers
        recorders = [watcher for watcher in watchers if isinstance(watcher, Recorder)]
        for recorder in recorders:
            recorder.mark()
        try:
            yield
        except Exception:
            for recorder in recorders:
                recorder.rewind()
            raise

    def voting(self, mask: Tensor) -> AbstractContextManager[None]:
        """Within it the tokens of mask (B, T) vote instead of the attention mask's."""
        tracker = self._placed.tracker
        return nullcontext() if tracker is None else tracker.voting(mask)

    def disabled(self) -> AbstractContextManager[None]:
        """Within it the method adds nothing; fresh modules stay as trained."""
        return self._placed.disabled()

    def merge(self) -> PreTrainedModel:
        """Fold a low-rank method into the base's weights, for good, and give the model back.

        Raises MocError where the method is none that weights alone can hold.
        """
        self._placed.merge()
        self._fresh.remove()
        return self.model

    def detach(self) -> PreTrainedModel:
        """Take the method out; the base's parameters and flags are as before `attach`."""
        self._placed.detach()
        self._fresh.restore()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
        return self.model


@dataclass(frozen=True)
class TextModel:
    """A model that can read text: `adapted` holds it with its method, or with none."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
