"""The geometry of streaming diffusion: noise levels that rise along the plan, chunk by chunk.

Hoeg, Du & Egeland 2024 (arXiv 2406.04806). Training and sampling share it, so that a network is
asked for the levels that it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ramp:
    """A plan cut into h chunks of ``n_action_steps``; chunk c runs from level (c+1)/h to c/h.

    The first chunk also holds the ``n_obs_steps - 1`` past positions. Positions after the last
    whole chunk stay at level 1 (pure noise) until they have moved up.

    Args:
        horizon: plan length H.
        n_obs_steps: To; position ``To - 1`` is the current step.
        n_action_steps: actions executed per tick, Ta.

    Raises:
        ValueError: sizes that leave fewer than two chunks.
    """

    horizon: int
    n_obs_steps: int
    n_action_steps: int

    def __post_init__(self) -> None:
        if min(self.horizon, self.n_obs_steps, self.n_action_steps) < 1 or self.chunks < 2:
            raise ValueError(
                "streaming needs a plan of at least two chunks: horizon >= n_obs_steps - 1 + "
                f"2 n_action_steps; got horizon={self.horizon}, n_obs_steps={self.n_obs_steps}, "
                f"n_action_steps={self.n_action_steps}. Raise horizon or lower n_action_steps"
            )

    @property
    def chunks(self) -> int:
        """Whole chunks h = floor((H - To + 1) / Ta)."""
        return (self.horizon - self.n_obs_steps + 1) // self.n_action_steps

    @property
    def clean(self) -> int:
        """Positions that a tick finishes, ``To - 1 + Ta``."""
        return self.n_obs_steps - 1 + self.n_action_steps

    def index(self) -> Tensor:
        """The chunk of every position ``[H]`` (h after the last whole one)."""
        ahead = torch.arange(self.horizon) - (self.n_obs_steps - 1)
        return ahead.clamp_min(0).div(self.n_action_steps, rounding_mode="floor")

    def levels(self, phase: Tensor) -> Tensor:
        """Levels ``[..., H, 1]`` for a phase ``[..., 1, 1]`` of the tick: 1 at its start, 0 at end.

        SDP's code has index ``floor(N (c + 1) / h) - 1 - j`` of N, where ``j / N`` is
        ``(1 - phase) / h``.
        """
        index = self.index().to(phase.device, phase.dtype, non_blocking=True).view(-1, 1)
        return ((index + phase) / self.chunks).clamp(max=1)

    def grid(self, num_steps: int) -> Tensor:
        """Host levels ``[K + 1, 1, H, 1]`` of one tick in K even steps.

        Raises:
            ValueError: ``num_steps`` < 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        phase = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return self.levels(phase.view(-1, 1, 1, 1))
