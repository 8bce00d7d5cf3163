"""Distilling one masked denoiser into another: the divergence of its reveal paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, rows_and_cond
from diffpolicy.learn.reward.rollouts import draw_order, run_order, state_log_probs, step_kl
from diffpolicy.learn.reward.sequence_tuning import SequenceMethod, SequenceTuning
from diffpolicy.settings import ranged


@dataclass(frozen=True)
class PathDistillation(SequenceMethod):
    """A denoiser learns another one's conditionals in the states that the other visits.

    The loss is ``KL(path of the teacher || path of the student)``, in closed form given the states:
    at least the divergence of sequences, and 0 where the laws agree. It makes a plain network of a
    model whose logits stand on a reward, or a small one of a large one.

    Args:
        num_steps: of the teacher's chains; ``None``: one position at a time.
    """

    command: ClassVar[str] = "distill"
    num_steps: int | None = ranged("[1, inf)", None)

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`PathDistillationLoss`; the teacher is the material's reference."""
        return PathDistillationLoss(denoiser, material.reference, material.reward, self)


class PathDistillationLoss(SequenceTuning):
    """``KL(path of the reference || path of the denoiser)`` ``[B]``, in nats (the teacher draws).

    ``forward(batch, generator)`` takes ``index [B]`` and optionally ``cond [B, C]``.
    """

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        size, cond = rows_and_cond(self.denoiser, batch)
        with torch.no_grad():
            order = draw_order(self.reference, size, self.settings.num_steps, generator)
            rollout, theirs = run_order(self.reference, order, cond=cond, generator=generator)
        ours = state_log_probs(self.denoiser, rollout)
        return LossOutput(step_kl(theirs, ours, rollout).sum(1), {})
