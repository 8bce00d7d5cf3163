"""Where examples come from, and the loss of averaged weights on those that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from diffpolicy.training.settings import TrainerConfig, mix_seed


class Source(Protocol):
    """Examples by index.

    A resumed run must find the examples that it began with, so the trainer takes digests of the
    arrays that a source holds. One that holds other things (a path, a cache) says what its
    examples are with a method ``identity()``; see :mod:`diffpolicy.training.identity`.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch: every value has ``len(indices)`` rows."""


def autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """The precision that losses are computed in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def validation_loss(
    objective: nn.Module, weights: Mapping[str, Tensor], source: Source, config: TrainerConfig
) -> float:
    """Loss of an objective with other weights on held-out examples, with the same noise every time.

    Args:
        objective: is left as it was.
        weights: the averaged ones.
        source: held-out examples.
        config: batch size, precision and seed.
    """
    device = next(objective.parameters()).device
    modes = [(m, m.training) for m in objective.modules()]
    live = {k: v.clone() for k, v in objective.state_dict().items()}
    objective.load_state_dict(weights)
    objective.eval()
    total, count = 0.0, 0
    for number, rows in enumerate(torch.split(torch.arange(len(source)), config.batch_size)):
        batch = {k: v.to(device) for k, v in source.gather(rows).items()}
        generator = torch.Generator(device).manual_seed(mix_seed(config.seed, number, 0x7A1))
        with autocast(config, device):
            total += objective(batch, generator).loss.sum().item()
        count += len(rows)
    objective.load_state_dict(live)
    for module, mode in modes:
        module.training = mode
    return total / count
