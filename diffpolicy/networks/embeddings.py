"""Embeddings of noise levels and positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def check_embedding_dim(dim: int, name: str) -> None:
    """Raise unless ``dim`` can hold half sines and half cosines.

    Raises:
        ValueError: ``dim`` is odd or below 4.
    """
    if not isinstance(dim, int) or dim < 4 or dim % 2:
        raise ValueError(f"{name} must be an even integer >= 4 (sines, cosines), got {dim!r}")


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Return a layer whose weights and biases begin at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def condition_mlp(cond_dim: int, width: int) -> nn.Module | None:
    """Make the layers that embed a condition ``[B, C]``; ``None`` without one."""
    if not cond_dim:
        return None
    return nn.Sequential(nn.Linear(cond_dim, width), nn.SiLU(), nn.Linear(width, width))


def sinusoidal(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of ``t`` at geometric frequencies.

    Frequencies ``10000 ** (-i / (dim/2 - 1))``, i = 0 .. dim/2 - 1; all sines, then all cosines
    (the convention of Diffusion Policy, arXiv 2303.04137; other code divides by ``dim/2``).
    Computed in float32 at least, whatever the network's precision: bfloat16 would merge
    neighbouring levels.

    Args:
        t: Any shape, any unit; resolves best with values up to about 1000.
        dim: Even, at least 4.

    Returns:
        ``t.shape + (dim,)``.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    index = torch.arange(half, device=t.device, dtype=dtype)
    angle = t.to(dtype).unsqueeze(-1) * torch.exp(index * -(math.log(10000.0) / (half - 1)))
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class TimeMLP(nn.Module):
    """Sinusoidal embedding followed by Linear, activation, Linear.

    Args:
        dim: Size of the sinusoidal embedding of one time, even.
        width: Hidden size.
        out: Output size.
        activation: The activation between the linear layers.
        slots: How many times are embedded together (their sinusoids are concatenated).
    """

    def __init__(
        self, dim: int, width: int, out: int, *, activation: nn.Module, slots: int = 1
    ) -> None:
        super().__init__()
        self.dim = dim
        self.first = nn.Linear(dim * slots, width)
        self.activation = activation
        self.second = nn.Linear(width, out)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t [..., slots]`` to ``[..., out]``."""
        embedded = sinusoidal(t, self.dim).flatten(-2)
        hidden = self.activation(self.first(embedded.to(self.first.weight.dtype)))
        out: Tensor = self.second(hidden)
        return out
