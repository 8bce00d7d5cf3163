"""Exponential moving average of weights: what policies act with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Power schedule of Diffusion Policy: ``decay = min(max_decay, 1 - (1 + n)^-power)``.

    ``n = max(0, updates - 1)``, so the first two updates copy.

    Args:
        module: whose parameters (averaged) and buffers (copied) are followed.
        power: 0.75 suits runs of under a million steps.
        max_decay: upper bound of the decay.
    """

    def __init__(
        self, module: nn.Module, *, power: float = 0.75, max_decay: float = 0.9999
    ) -> None:
        if not 0 <= max_decay < 1 or power <= 0:
            raise ValueError(f"need 0 <= max_decay < 1 and power > 0, got {max_decay} and {power}")
        self.power, self.max_decay, self.updates = power, max_decay, 0
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        floating = [n for n, v in self.state.items() if v.is_floating_point()]
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self._averaged = [n for n in floating if n in parameters]
        self._copied = [n for n in self.state if n not in set(self._averaged)]

    def decay(self) -> float:
        """The decay of the next update."""
        n = max(0, self.updates - 1)
        return min(self.max_decay, 1 - float((1 + n) ** -self.power))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards ``module``'s present weights."""
        live = module.state_dict()
        averages = [self.state[n] for n in self._averaged]
        torch._foreach_lerp_(averages, [live[n] for n in self._averaged], 1 - self.decay())
        for name in self._copied:
            self.state[name].copy_(live[name])
        self.updates += 1

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore a saved average and its number of updates."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates
