"""Bradley-Terry: the probability that one segment is preferred, from rewards of its steps.

The logit is the difference of the two segments' mean rewards. A mean rather than a sum, because a
constant added to every reward must not matter, also where the two segments have different lengths;
for equal lengths n it is the model of Christiano et al. 2017 (eq. 1) with rewards n times smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch
from diffpolicy.settings import check_range

StepRewards = Callable[[Tensor, Tensor], Tensor]
"""Rewards of several members, ``(cond [N, To * O], actions [N, H, A]) -> [M, N]``."""


def bradley_terry_loss(
    gap: Tensor, tie: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of the model ``P(chosen is better) = sigmoid(gap)``, in nats.

    Args:
        gap: score of the chosen segment minus that of the rejected one, ``[..., B]``.
        tie: bool ``[B]``: neither was better, so the wanted probability is 1/2 and the loss least
            (log 2) at gap 0.
        label_smoothing: the share of labels taken to be wrong, 0 to below 1/2; the loss is then
            least at ``gap = log((1 - s) / s)`` instead of at infinity.

    Returns:
        Of the shape of ``gap``.

    Raises:
        ValueError: label smoothing out of range.
    """
    check_range("[0, 0.5)", label_smoothing=label_smoothing)
    wanted = torch.full_like(gap, 1 - label_smoothing)
    if tie is not None:
        wanted = torch.where(tie, 0.5, wanted)
    return F.softplus(gap) - wanted * gap


def segment_rewards(rewards: StepRewards, obs: Tensor, action: Tensor, steps: Tensor) -> Tensor:
    """The mean reward of segments that are given as windows.

    Args:
        rewards: of a window: its observations and its H actions. For rewards of single steps H
            and To are 1; otherwise a window counts as many times as it has scored steps.
        obs: normalised ``[B, W, To, O]``.
        action: normalised ``[B, W, H, A]``.
        steps: bool ``[B, W, H]``, the steps that belong to the segment; at least one in each.

    Returns:
        ``[M, B]``.
    """
    count, windows = steps.shape[:2]
    found = rewards(obs.flatten(0, 1).flatten(1), action.flatten(0, 1))
    weight = steps.sum(-1).to(found.dtype)
    total = (found.view(-1, count, windows) * weight).sum(-1)
    return total / weight.sum(-1)


class BradleyTerryLoss(nn.Module):
    """The training objective of reward networks: cross-entropy of preferences between segments.

    ``forward(batch, generator)`` takes ``chosen_obs [B, W, To, O]``, ``chosen_action [B, W, H, A]``
    and ``chosen_steps [B, W, H]``, likewise ``rejected_...``, as
    :class:`diffpolicy.data.preferences.examples.PairExamples` gives them; optionally ``tie [B]``
    bool, and ``weight [B, M]``, how often each member sees an example (a bootstrap). Nothing in it
    is random. The loss is the mean over the members, each of which learns by itself.

    Metrics: ``accuracy`` (of the members' mean, without ties; equal scores count half), ``gap``
    (mean logit), ``disagreement`` (standard deviation of the logit over the members).

    Args:
        network: rewards of every member; its parameters are trained.
        label_smoothing: see :func:`bradley_terry_loss`.

    Raises:
        ValueError: label smoothing out of range.
    """

    def __init__(self, network: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_range("[0, 0.5)", label_smoothing=label_smoothing)
        self.network, self.label_smoothing = network, label_smoothing

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        chosen, rejected = (
            segment_rewards(
                self.network, *(batch[f"{side}_{k}"] for k in ("obs", "action", "steps"))
            )
            for side in ("chosen", "rejected")
        )
        gap = chosen - rejected
        tie = batch.get("tie")
        loss = bradley_terry_loss(gap, tie, label_smoothing=self.label_smoothing)
        if "weight" in batch:
            loss = loss * batch["weight"].mT
        return LossOutput(loss.mean(0), _metrics(gap.detach(), tie))


def _metrics(gap: Tensor, tie: Tensor | None) -> dict[str, Tensor]:
    mean = gap.mean(0)
    decided = torch.ones_like(mean) if tie is None else (~tie).to(mean.dtype)
    right = (mean.sign() + 1) / 2
    return {
        "accuracy": (right * decided).sum() / decided.sum().clamp_min(1),
        "gap": mean.mean(),
        "disagreement": gap.std(0, correction=0).mean(),
    }
