"""The formulas that layers are made of: norms, activations, rotary positions, masks, attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Weights:
    """A model's parameters by name."""

    def __init__(self, module: nn.Module) -> None:
        self._values = dict(module.named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self._values.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * self[f"{name}.weight"] + self._values.get(f"{name}.bias", 0.0)

    def rms_norm(self, name: str, x: Tensor, eps: float, around_one: bool = False) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * (self[f"{name}.weight"] + around_one)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def causal(mask: Tensor, window: int | None = None) -> Tensor:
    """Which keys each token may see (B, 1, T, T): real ones, not later, within the window."""
    back = torch.arange(mask.shape[1])[:, None] - torch.arange(mask.shape[1])[None]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near & mask.bool()[:, None, None]


def both_ways(mask: Tensor, reach: int | None = None) -> Tensor:
    """Which keys each token may see (B, 1, T, T): real ones, at most `reach` away."""
    back = torch.arange(mask.shape[1])[:, None] - torch.arange(mask.shape[1])[None]
    near = torch.ones_like(back, dtype=torch.bool) if reach is None else back.abs() <= reach
    return near & mask.bool()[:, None, None]


def split(x: Tensor, size: int) -> Tensor:
    """(B, T, heads · size) -> (B, heads, T, size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def rotate(x: Tensor, theta: float, size: int) -> Tensor:
    """Rotary positions on the first `size` features of each head of x (B, heads, T, h)."""
    frequency = theta ** -(torch.arange(0, size, 2, dtype=x.dtype) / size)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * frequency  # (T, size / 2)
    a, b, rest = x.tensor_split([size // 2, size], dim=-1)
    turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest]
    return torch.cat(turned, dim=-1)


def rotate_pairs(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on neighbouring features of each head of x (B, heads, T, h)."""
    apart = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    a, b = rotate(apart, theta, x.shape[-1]).chunk(2, dim=-1)
    return torch.stack([a, b], dim=-1).flatten(-2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, cap: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v, heads side by side (B, T, heads · h); keys may be grouped."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = scale * (q @ k.transpose(-1, -2))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def windows(config) -> list[int | None]:
    """Each layer's attention window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
