"""Training as every learner of the library does it: to the averaged weights, or not at all."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.sources import Source
from diffpolicy.training.trainer import Trainer, TrainResult
from diffpolicy.training.weights import unchanged_on_error


def train(
    objective: nn.Module,
    source: Source,
    config: TrainerConfig,
    run_dir: str | os.PathLike[str],
    **run: Any,
) -> TrainResult:
    """Train an objective, which ends in evaluation mode with the averaged (EMA) weights.

    If that fails, or is interrupted by an exception, what it trains is as it was before.

    Args:
        objective: as :class:`~diffpolicy.training.trainer.Trainer` takes it.
        source: the examples.
        config: settings.
        run_dir: receives metrics and checkpoints.
        **run: further arguments of the trainer.

    Example:
        >>> result = train(DenoisingLoss(denoiser), windows, TrainerConfig(steps=500), "runs/mine")
    """
    learning = [m for m in objective.children() if any(p.requires_grad for p in m.parameters())]
    with unchanged_on_error(*learning):
        result = Trainer(objective, source, config, run_dir, **run).fit()
        objective.load_state_dict(result.ema)
        objective.eval()
    return result
