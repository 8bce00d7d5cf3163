"""Stepwise alignment (SDPO): likelihood ratios of re-masked sequences match their rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.cloning.masked import masked_cross_entropy
from diffpolicy.learn.method import Batch
from diffpolicy.learn.reward.replay import remask
from diffpolicy.learn.reward.sequence_tuning import ReplayMethod, ReplayTuning
from diffpolicy.settings import one_of, ranged


@dataclass(frozen=True)
class Stepwise(ReplayMethod):
    """Groups of sequences and how their rewards are compared (Han et al., arXiv 2507.04832).

    The loss of a group is the cross-entropy from the softmax of rewards to that of the implicit
    rewards ``kl_weight beta_t (log p(x0 | x_t) - log p_ref(x0 | x_t))``, both over kl_weight, where
    ``log p(x0 | x_t)`` sums over the masked positions. Sequences may come from anywhere. The
    minimum is near the law ``p_ref exp(r / kl_weight) / Z`` and not at it: probabilities of the
    masked positions are a product, and what is revealed differs between the rows of a group.

    ``kl_weight`` and the settings of the buffer are those of
    :class:`~diffpolicy.learn.reward.sequence_tuning.ReplayMethod`.

    Args:
        group_size: N sequences compared; 2 with hard labels is DPO.
        labels: ``"soft"``: ``softmax(r / kl_weight)``. ``"hard"``: all on the best of the group,
            against implicit rewards as they are (not over kl_weight), as in DPO, whose beta is
            kl_weight.
        beta: ``"constant"``: ``beta_t = 1``, which tilts posteriors as the reward does.
            ``"bound"``: ``L / k`` with k masks: implicit rewards then have the difference of the
            two likelihood bounds as their mean, as preference losses of masked language models
            do; posteriors given few masks are tilted by less than the reward.
        remasks: masks drawn for each group, shared by its rows.

    Raises:
        ValueError: an unknown choice, or a value out of range.
    """

    group_size: int = ranged("[2, inf)", 8)
    labels: str = one_of("soft", "hard")
    beta: str = one_of("constant", "bound")
    remasks: int = ranged("[1, inf)", 4)

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`StepwiseLoss`."""
        return StepwiseLoss(denoiser, material.reference, material.reward, self)


class StepwiseLoss(ReplayTuning):
    """Cross-entropy of rewards to implicit rewards within groups (see :class:`Stepwise`).

    ``forward(batch, generator)`` takes ``index [B]``, B a multiple of ``group_size``, and
    optionally ``cond [B, C]``, of which the first ``refresh / group_size`` get new groups.
    Sequences, groups and masks come from ``generator``; without conditions groups are put together
    anew in every update. The buffer is part of the state, and of one process. Every row of a group
    has its group's loss.

    Metrics: ``reward`` (mean of the buffer), ``kl`` (of those who drew it to the reference, path,
    nats), ``accuracy`` (groups whose best sequence has the highest implicit reward), ``margin``
    (of the implicit rewards, best minus the group's mean).

    Args:
        denoiser: trained.
        reference: frozen; None: a copy of ``denoiser`` as it is now.
        reward: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
        settings: which.

    Raises:
        ValueError: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
    """

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        settings = self.settings
        size, group = len(batch["index"]), settings.group_size
        if size % group:
            raise ValueError(f"group_size={group} must divide the batch of {size} rows")
        kept = self.refill(batch, generator)
        tokens, reward, cond = self.kept(self._picked(size, generator))
        gain = self._implicit(tokens, cond, generator)
        loss, best = stepwise_loss(gain, reward.view(-1, group), settings)
        top = gain.detach().gather(1, best.view(-1, 1, 1).expand(-1, 1, gain.shape[-1]))
        others = gain.detach()
        metrics = {
            **kept,
            "accuracy": (top >= others.amax(1, keepdim=True)).float().mean(),
            "margin": settings.kl_weight * (top - others.mean(1, keepdim=True)).mean(),
        }
        return LossOutput(loss.repeat_interleave(group), metrics)

    def _implicit(self, tokens: Tensor, cond: Tensor | None, generator: torch.Generator) -> Tensor:
        """``beta_t (log p - log p_ref)`` of grouped rows at each of their masks, ``[G, N, R]``."""
        group, draws = self.settings.group_size, self.settings.remasks
        masked, t, weight = remask(self.denoiser, len(tokens) // group, draws, generator)

        back = torch.arange(len(tokens) * draws, device=tokens.device)
        # Row r of the group r // N, at its mask j, is entry r * draws + j.
        own = back // (group * draws) * draws + back % draws
        many = tokens.repeat_interleave(draws, dim=0)
        cond = None if cond is None else cond.repeat_interleave(draws, dim=0)
        masked, t = masked[own], t[own]
        error = masked_cross_entropy(self.denoiser, many, t, masked, cond=cond)
        with torch.no_grad():
            other = masked_cross_entropy(self.reference, many, t, masked, cond=cond)
        gain = other - error
        if self.settings.beta == "bound":
            gain = gain * weight[own]
        return gain.view(-1, group, draws)

    def _picked(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows of the buffer ``[size]``, in groups; none twice before all were taken."""
        group = self.settings.group_size if self.cond_dim else 1
        count, wanted, device = self.replay.slots // group, size // group, generator.device
        rounds = [
            torch.randperm(count, generator=generator, device=device)
            for _ in range(-(-wanted // count))
        ]
        first = torch.cat(rounds)[:wanted] * group
        rows = (first.unsqueeze(1) + torch.arange(group, device=device)).flatten()
        return rows.to(self.replay["tokens"].device)


def stepwise_loss(gain: Tensor, reward: Tensor, settings: Stepwise) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each group, and which of its rows is the best.

    Args:
        gain: ``beta_t (log p - log p_ref)``, ``[G, N, R]`` at R masks.
        reward: ``[G, N]``.
        settings: labels and kl_weight.

    Returns:
        ``[G]``, the mean over masks, and int64 ``[G]``.
    """
    best = reward.argmax(1)
    if settings.labels == "soft":
        wanted = (reward / settings.kl_weight).softmax(1)
    else:
        wanted = torch.nn.functional.one_hot(best, reward.shape[1]).to(gain.dtype)
        gain = settings.kl_weight * gain
    return -(wanted.unsqueeze(-1) * gain.log_softmax(1)).sum(1).mean(1), best
