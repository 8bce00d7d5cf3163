"""Weighted denoising: sequences, or steps, that the reward favours are learned like data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.core.masking import hard_one_hot, one_hot
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.cloning.masked import masked_cross_entropy
from diffpolicy.learn.method import Batch
from diffpolicy.learn.reward.replay import Columns, effective_fraction, remask, resample, settle
from diffpolicy.learn.reward.rollouts import MAX_STATES, MaskedRollout, state_log_probs
from diffpolicy.learn.reward.sequence_tuning import ReplayMethod, ReplayTuning
from diffpolicy.settings import one_of, ranged


@dataclass(frozen=True)
class WeightedDenoising(ReplayMethod):
    """What is weighted, by what, and how sequences are kept.

    Args:
        kl_weight: alpha of the target law ``p_ref exp(r / alpha) / Z``; as ``buffer``, ``refresh``,
            ``refresh_every`` and ``num_steps``, see
            :class:`~diffpolicy.learn.reward.sequence_tuning.ReplayMethod`.
        target: ``"sequence"`` (WDCE of TR2-D2, arXiv 2509.25171): whole sequences, re-masked at
            random, with the importance weights of their trajectories to the target law,
            ``exp(r / alpha + log p_ref - log p_drawn)``. ``"soft_value"`` (VIDD, arXiv
            2507.00445): steps of the rollouts, with ``exp((v(x_s) - v(x_t)) / alpha)``.
        remasks: per row of the batch, re-maskings of its sequence; of ``soft_value``, steps.
        pick: ``"resample"``: rows of the batch are drawn in proportion to their weights.
            ``"uniform"``: drawn evenly, their losses are weighted. The same mean; the first
            spends no evaluation on what hardly counts.
        max_weight: most that a weight can be, in multiples of their mean; None: no limit.
        min_ess: least effective sample size, as a fraction of N (of each step's entries): weights
            are raised to the largest power up to 1 that has it. The target is then the point on
            the way to ``p_ref exp(r / alpha)`` that these sequences can support. None: 1.
        group_size: rows that share a condition, within which weights are relative. None: all N,
            which must then be drawn under one condition.
        value: of ``soft_value``, ``v`` of a state is the reward of what the reference thinks is
            clean: ``"mean"`` its probabilities (for rewards that take soft sequences), ``"mode"``
            the most probable token of each position (as VIDD's released code), ``"draw"`` one drawn
            from them.
        anchored: of ``soft_value``, multiply weights by ``p_ref / p_drawn`` of the step: its law
            then stays relative to the reference. False, as published, is relative to the denoiser
            that drew, and drifts further at every refresh.

    Raises:
        ValueError: an unknown choice, a value out of range, or sizes that do not divide.
    """

    target: str = one_of("sequence", "soft_value")
    remasks: int = ranged("[1, inf)", 4)
    pick: str = one_of("resample", "uniform")
    max_weight: float | None = ranged("(1, inf)", None)
    min_ess: float | None = ranged("(0, 1)", None)
    group_size: int | None = ranged("[2, inf)", None)
    value: str = one_of("mean", "mode", "draw")
    anchored: bool = True

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`WeightedDenoisingLoss`."""
        return WeightedDenoisingLoss(denoiser, material.reference, material.reward, self)


class WeightedDenoisingLoss(ReplayTuning):
    """Masked cross-entropy on a replay buffer of the denoiser's own weighted sequences.

    ``forward(batch, generator)`` takes ``index [B]`` and optionally ``cond [B, C]``, the first
    ``refresh / group_size`` of which new sequences are drawn for. New sequences, rows, re-maskings
    and steps come from ``generator``; the buffer is part of the state. The loss is in nats per
    sequence. Buffers are those of one process.

    Metrics: ``reward`` (mean of the buffer), ``kl`` (of those who drew it to the reference, path,
    nats), ``ess`` (effective sample size of the weights, a fraction of N), ``max_weight`` (in
    multiples of the mean), ``power`` (of the weights, see ``min_ess``).

    Args:
        denoiser: trained.
        reference: frozen; None: a copy of ``denoiser`` as it is now.
        reward: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
        settings: which.

    Raises:
        ValueError: as :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning` says.
    """

    def columns(self) -> Columns:
        if self.settings.target == "sequence":
            return {"log_weight": ((1,), torch.float32)}
        steps = self.evaluations(self.settings.num_steps)
        groups = ((self.denoiser.length,), torch.long)
        return {"log_weight": ((steps,), torch.float32), "groups": groups}

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        settings, replay = self.settings, self.replay
        kept = self.refill(batch, generator)
        limits = {n: getattr(settings, n) for n in ("group_size", "max_weight", "min_ess")}
        weights, power = settle(replay["log_weight"], **limits)
        size = len(batch["index"])
        if settings.target == "sequence":
            loss = self._sequences(size, weights[:, 0], generator)
        else:
            loss = self._steps(size, weights, generator)
        metrics = {
            **kept,
            "ess": effective_fraction(weights.unsqueeze(0), replay["log_weight"].unsqueeze(0)),
            "max_weight": weights.max(),
            "power": power,
        }
        return LossOutput(loss, metrics)

    @torch.no_grad()
    def draw(self, rows: int, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """New rows of the buffer, drawn by the present denoiser."""
        rollout, new = self.roll_out(rows, batch, generator)
        reward, alpha = new["reward"], self.settings.kl_weight
        if self.settings.target == "sequence":
            new["log_weight"] = (reward / alpha - rollout.log_ratio).unsqueeze(1)
        else:
            new["groups"] = rollout.groups
            new["log_weight"] = self._step_weights(rollout, reward, generator)
        return new

    def _sequences(self, size: int, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Bounds of the negative log-likelihood of picked sequences, weighted, ``[size]``."""
        draws = self.settings.remasks
        rows, scale = self._picked(weights, size, generator)
        masked, t, bound = remask(self.denoiser, size, draws, generator)
        tokens, _, cond = self.kept(rows.repeat_interleave(draws))
        error = masked_cross_entropy(self.denoiser, tokens, t, masked, cond=cond)
        return scale * (bound * error).view(size, -1).mean(1)

    def _steps(self, size: int, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Negative log-likelihoods of picked steps, weighted, times steps: ``[size]``."""
        settings, replay = self.settings, self.replay
        count = weights.shape[1]
        entries, scale = self._picked(weights.flatten(), size * settings.remasks, generator)
        rows, steps = entries // count, (entries % count).unsqueeze(1)
        (tokens, _, cond), groups = self.kept(rows), replay["groups"][rows]
        state = torch.where(groups >= steps, self.denoiser.mask_id, tokens)
        t = (1 - steps / count).unsqueeze(-1)
        log_p = self.denoiser.log_probs(state, t, cond).gather(-1, tokens.unsqueeze(-1))
        error = -(log_p.squeeze(-1) * (groups == steps)).sum(1)
        # Rows have no more than the steps that reveal something; weights have mean 1 over those.
        per_row = (replay["log_weight"] > -math.inf).sum() / replay.slots
        return per_row * (scale * error).view(size, -1).mean(1)

    def _picked(
        self, weights: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Entries ``[count]`` to learn from and the factors of their losses."""
        if self.settings.pick == "resample":
            return resample(weights, count, generator), torch.ones_like(weights[:1])
        rows = resample((weights > 0).to(weights.dtype), count, generator)
        return rows, weights[rows] / weights[weights > 0].mean()

    def _step_weights(
        self, rollout: MaskedRollout, reward: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Log-weights of steps ``[B, K]``, ``-inf`` where one reveals nothing."""
        settings = self.settings
        values = torch.cat([self._values(rollout, generator), reward.unsqueeze(1)], 1)
        weight = values.diff(dim=1) / settings.kl_weight
        groups = rollout.groups.clamp_min(0)
        ones = (rollout.groups >= 0).to(rollout.log_p.dtype)  # what is known is revealed by no step
        empty = torch.zeros_like(weight)
        if settings.anchored:
            assert rollout.log_reference is not None
            ratio = rollout.log_reference - rollout.log_p
            weight = weight + empty.scatter_add(1, groups, ratio)
        weight = weight.masked_fill(empty.scatter_add(1, groups, ones) == 0, -math.inf)
        missing = self.replay["log_weight"].shape[1] - rollout.nfe
        return torch.nn.functional.pad(weight, (0, missing), value=-math.inf)

    def _values(self, rollout: MaskedRollout, generator: torch.Generator) -> Tensor:
        """``v`` of the states of all evaluations, ``[B, K]``."""
        vocab_size = self.denoiser.vocab_size
        every = (rollout.states(), state_log_probs(self.reference, rollout))
        parts = (torch.split(v.flatten(0, 1), MAX_STATES) for v in every)
        values = []
        for state, log_p in zip(*parts, strict=True):
            guess = self._guess(log_p, generator)
            known = one_hot(state, vocab_size).to(guess)
            values.append(self.score_soft(known[..., :-1] + known[..., -1:] * guess))
        return torch.cat(values).view(-1, rollout.nfe)

    def _guess(self, log_p: Tensor, generator: torch.Generator) -> Tensor:
        if self.settings.value == "mean":
            return log_p.exp()
        if self.settings.value == "mode":
            return hard_one_hot(log_p)
        noise = self.denoiser.process.draw_noise(log_p.shape, generator, log_p)
        return hard_one_hot(log_p + noise)
