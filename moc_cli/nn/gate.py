"""The gates: from a block's input to each token's probabilities over the pool.

Shapes: B rows, T tokens, d width, N controls in the pool, p the projection's width.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moc_cli.nn.autograd import cosine, project


def _new_bias(size: int, device: str) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))


def _draw_bias(
    bias: nn.Parameter | None, weight: nn.Parameter, generator: torch.Generator | None
) -> None:
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound, generator=generator)


class Gate(nn.Module, ABC):
    """Gives each control of a pool a logit for each token, in float32 or wider, in two steps."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> what a token's logits depend on, (B, T, p or N)."""

    def prepare(self) -> tuple[Tensor, ...]:
        """What `logits` needs of the parameters: a forward prepares a gate once for all sites."""
        return ()

    def logits(self, features: Tensor, *prepared: Tensor) -> Tensor:
        """Features -> (B, T, N)."""
        return features

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> logits (B, T, N)."""
        return self.logits(self.features(x), *self.prepare())


class LinearGate(Gate):
    """logits = W x (+ b), W (N, d) kaiming-uniform(a=√5), b as nn.Linear's; no projection."""

    def __init__(
        self,
        width: int,
        size: int,
        projection_dim: int = 0,
        generator: torch.Generator | None = None,
        device: str = "cpu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width, dtype=torch.float32, device=device))
        self.bias = _new_bias(size, device) if bias else None
        if device != "meta":
            self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the start values."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        _draw_bias(self.bias, self.weight, generator)

    def features(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> the logits."""
        return project(x, self.weight, self.bias)


class CosineGate(Gate):
    """logits = s · cos(P x, e_k), normalised over the feature axis; s = exp(min(log τ, log 100)).

    P (p, d) kaiming-uniform(a=√5), e (N, p) ~ N(0, 0.01²), log τ starts at log 2 (after Tutel).
    With a bias it is P x + b.
    """

    MAX_LOG_TEMPERATURE = math.log(100)

    def __init__(
        self,
        width: int,
        size: int,
        projection_dim: int,
        generator: torch.Generator | None = None,
        device: str = "cpu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        shapes = (projection_dim, width), (size, projection_dim), ()
        self.projection, self.experts, self.log_temperature = (
            nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)) for shape in shapes
        )
        self.bias = _new_bias(projection_dim, device) if bias else None
        if device != "meta":
            self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the start values."""
        nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5), generator=generator)
        _draw_bias(self.bias, self.projection, generator)
        nn.init.normal_(self.experts, std=0.01, generator=generator)
        nn.init.constant_(self.log_temperature, math.log(2))

    def features(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> P x (+ b), (B, T, p)."""
        return project(x, self.projection, self.bias)

    def prepare(self) -> tuple[Tensor, ...]:
        """s · e_k/|e_k| (N, p)."""
        temperature = self.log_temperature.clamp(max=self.MAX_LOG_TEMPERATURE).exp()
        return (temperature * F.normalize(self.experts, dim=-1),)

    def logits(self, features: Tensor, *prepared: Tensor) -> Tensor:
        """P x -> s · (P x)·e_k/|e_k| / |P x|."""
        return cosine(features, *prepared)


GATES: dict[str, type[LinearGate | CosineGate]] = {"linear": LinearGate, "cosine": CosineGate}


def probabilities(logits: Tensor, exclude: int | None = None) -> Tensor:
    """softmax of the logits over the pool (B, T, N); control `exclude` gets probability 0."""
    if exclude is not None:
        away = torch.arange(logits.shape[-1], device=logits.device) == exclude
        logits = logits.masked_fill(away, float("-inf"))
    p: Tensor = logits.softmax(dim=-1)
    return p
