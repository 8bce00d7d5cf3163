"""Settings of a training run, and the seeds of everything random in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffpolicy.settings import check_choice, check_range, named_settings

MAY_CHANGE = ("steps", "lr", "checkpoint_every", "keep_last", "progress", "compile", "tensorboard")
"""Settings that may differ when a run is resumed: the two that users want to change, and those that
only change what is printed or kept."""

_POSITIVE = (
    *("steps", "batch_size", "accumulate", "lr", "grad_clip", "ema_power"),
    *("log_every", "eval_every", "checkpoint_every", "keep_last"),
)


@named_settings
@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training run.

    Args:
        steps: optimiser steps.
        batch_size: examples per step, over all processes.
        accumulate: parts that a batch is cut into, one after the other, to save memory.
        lr: peak learning rate.
        encoder_lr_scale: what the encoder of observations learns at, as a share of ``lr`` at every
            step: 0.1 for a backbone with pre-trained weights, 0 to leave it as it is.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: linear warm-up, over half of ``steps`` at most; ``None``: a tenth of them, at
            most 500.
        lr_schedule: ``cosine`` (to 0 at ``steps``) or ``constant``.
        grad_clip: largest norm of the gradient; ``None``: no limit.
        ema_power: of the weight average (see :class:`EMA`); ``None``: no average.
        ema_max: its largest decay.
        precision: ``fp32``, or ``bf16`` autocast, for GPUs and for CPUs with AMX.
        compile: ``torch.compile`` the objective.
        seed: of data order, levels and noise.
        log_every: steps between rows of ``metrics.csv``.
        eval_every: steps between evaluations, each with a checkpoint; ``None``: at the end only.
        checkpoint_every: steps between checkpoints; ``None``: with evaluations only.
        keep_last: checkpoints kept beside the best one.
        tensorboard: also write TensorBoard files to ``tb/`` (needs the ``tensorboard`` extra).
        progress: show a bar with the time left.
    """

    steps: int = 10_000
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 3e-4
    encoder_lr_scale: float = 1.0
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    warmup_steps: int | None = None
    lr_schedule: str = "cosine"
    grad_clip: float | None = 1.0
    ema_power: float | None = 0.75
    ema_max: float = 0.9999
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    log_every: int = 100
    eval_every: int | None = None
    checkpoint_every: int | None = 2000
    keep_last: int = 2
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_choice("lr_schedule", self.lr_schedule, ("cosine", "constant"))
        check_choice("precision", self.precision, ("fp32", "bf16"))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        first, second = self.betas
        check_range("[0, 1)", beta_1=first, beta_2=second, ema_max=self.ema_max)
        for name in ("warmup_steps", "weight_decay", "encoder_lr_scale"):
            check_range("[0, inf)", **{name: getattr(self, name)})
        check_range("(0, inf)", **{name: getattr(self, name) for name in _POSITIVE})

    @property
    def warmup(self) -> int:
        """Steps of the warm-up: as given or in proportion, and never more than half of all."""
        given = min(500, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        return min(given, self.steps // 2)

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step ``step`` (from 0)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_schedule == "constant":
            return self.lr * warm
        span = max(1, self.steps - self.warmup)
        fraction = min(1.0, max(0.0, (step - self.warmup) / span))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * fraction))


def mix_seed(*values: int) -> int:
    """A 63-bit seed that differs whenever any of the values does (splitmix64 steps)."""
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
