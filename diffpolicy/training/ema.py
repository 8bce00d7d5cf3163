"""Exponential moving average of weights: what policies act with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_Place = tuple[Mapping[str, Tensor | None], str]  # a module's parameters or buffers, and a name


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
        # Where each tensor lives: making a state_dict at every step would cost more than averaging.
        self._averaged: list[tuple[Tensor, _Place]] = []
        self._copied: list[tuple[Tensor, _Place]] = []
        for prefix, part in module.named_modules(remove_duplicate=False):
            for tensors in (part._parameters, part._buffers):
                for key in tensors:
                    average = self.state.get(f"{prefix}.{key}" if prefix else key)
                    if average is None:  # not persistent
                        continue
                    moves = tensors is part._parameters and average.is_floating_point()
                    (self._averaged if moves else self._copied).append((average, (tensors, key)))

    def decay(self) -> float:
        """The decay of the next update."""
        n = max(0, self.updates - 1)
        return min(self.max_decay, 1 - float((1 + n) ** -self.power))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the module's present weights."""
        averages = [average for average, _ in self._averaged]
        live = [_tensor(tensors[key]) for _, (tensors, key) in self._averaged]
        torch._foreach_lerp_(averages, live, 1 - self.decay())
        for kept, (tensors, key) in self._copied:
            kept.copy_(_tensor(tensors[key]))
        self.updates += 1

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore a saved average and its number of updates."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None  # it had a value when its average began
    return value.detach()
