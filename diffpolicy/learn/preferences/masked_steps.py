"""Moves of samplers of masked sequences: drawn, or bridged to given ones, and log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import to_tokens
from diffpolicy.core.reveal import Scheduled, reveals
from diffpolicy.core.sampling import Trajectory, sample
from diffpolicy.core.starts import prior_start
from diffpolicy.learn.preferences.few_step import FewStep, Moves, evaluating
from diffpolicy.learn.reward.rollouts import MaskedRollout, at_reveal, state_log_probs


class MaskedSteps:
    """The steps of a masked sampler: which tokens its reveals draw.

    The order of reveals does not look at tokens, so its probability cancels in ratios and is left
    out.

    Args:
        denoiser: tells sizes and whether rows may advance on their own.
        sampler: its ``num_steps``.

    Raises:
        ValueError: settings without effect here, or ``num_steps=None`` with a denoiser that depends
            on the level.
    """

    def __init__(self, denoiser: MaskedDenoiser, sampler: FewStep) -> None:
        sampler.check_masked(denoiser)
        self.process, self.time_free = denoiser.process, denoiser.time_free
        self.length = int(denoiser.network.horizon)  # type: ignore[arg-type]
        self.vocab_size, self.num_steps = denoiser.vocab_size, sampler.num_steps

    def order(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """When each position is revealed ``[size, L]``, and the grid."""
        shape = (size, self.length, self.vocab_size + 1)
        start = prior_start(self.process, torch.zeros(shape, device=generator.device))
        return reveals(
            self.process, start, self.num_steps, time_free=self.time_free, generator=generator
        )

    @torch.no_grad()
    def draw(
        self,
        denoiser: MaskedDenoiser,
        order: tuple[Tensor, Tensor],
        generator: torch.Generator,
        *,
        cond: Tensor | None = None,
    ) -> MaskedRollout:
        """Run the sampler in a given order; ``log_p`` is that of the reveals, without a graph."""
        groups, grid = order
        shape = (*groups.shape, self.vocab_size + 1)
        like = torch.zeros(shape, device=groups.device, dtype=denoiser.weight.dtype)
        start = prior_start(self.process, like)
        with evaluating(denoiser):
            path = sample(
                denoiser,
                Scheduled(groups),
                start,
                grid,
                cond=cond,
                generator=generator,
                record=True,
            )
        assert isinstance(path, Trajectory)
        log_p = torch.stack([row.denoised.aux["log_p"] for row in path.transitions], 1)
        rollout = self.bridge(to_tokens(path.x0), order, cond=cond)
        return rollout._replace(log_p=at_reveal(log_p, rollout))

    def bridge(
        self, tokens: Tensor, order: tuple[Tensor, Tensor], *, cond: Tensor | None = None
    ) -> MaskedRollout:
        """Chains that end in given ``tokens [B, L]``; nobody drew them, so ``log_p`` is empty."""
        groups, grid = order
        nothing = torch.empty(0, device=tokens.device)
        return MaskedRollout(tokens, groups, len(grid) - 1, grid, self.vocab_size, nothing, cond)

    def log_prob(self, denoiser: MaskedDenoiser, rollout: MaskedRollout) -> Moves:
        """Of all steps as one batch."""
        log_p = at_reveal(state_log_probs(denoiser, rollout), rollout)
        zero = log_p.new_zeros(len(log_p), rollout.nfe)
        entries = zero.scatter_add(1, rollout.groups, torch.ones_like(log_p))
        return Moves(zero.scatter_add(1, rollout.groups, log_p), entries)

    def pair(self, first: MaskedRollout, second: MaskedRollout) -> MaskedRollout:
        """Both, the second's rows after the first's; ``log_p`` is left empty."""
        cond = None
        if first.cond is not None and second.cond is not None:
            cond = torch.cat([first.cond, second.cond])
        order = torch.cat([first.groups, second.groups]), first.levels
        return self.bridge(torch.cat([first.tokens, second.tokens]), order, cond=cond)

    def take(self, rollout: MaskedRollout, rows: Tensor) -> MaskedRollout:
        """Some of the chains; ``log_p`` is left empty."""
        cond = None if rollout.cond is None else rollout.cond[rows]
        order = rollout.groups[rows], rollout.levels
        return self.bridge(rollout.tokens[rows], order, cond=cond)


__all__ = ["MaskedSteps"]
