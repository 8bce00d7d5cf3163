"""Rollouts of masked sequences: what reward tuning without the reward's gradient learns from.

A rollout remembers in which network evaluation each position was revealed. Its states follow from
that, so log-probabilities can be evaluated again at all of them as one batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import to_tokens
from diffpolicy.core.reveal import KNOWN, Scheduled, blank_start, reveals
from diffpolicy.core.sampling import Trajectory, sample
from diffpolicy.core.starts import Start, level
from diffpolicy.learn.reward.chains import categorical_kl

MAX_STATES = 4096  # evaluated at a time: larger batches leave the cache and gain nothing


class MaskedRollout(NamedTuple):
    """Sequences made from all masks, and how.

    Attributes:
        tokens: int64 ``[B, L]``, clean.
        groups: int64 ``[B, L]``: the evaluation, from 0, that revealed a position.
        nfe: K, evaluations of the denoiser.
        levels: host grid ``[K + 1, 1, 1, 1]``.
        vocab_size: V, which is also the token of a mask.
        log_p: ``[B, L]``, log-probability of a token when it was revealed, under the denoiser that
            drew it.
        cond: ``[B, C]`` or None.
        log_reference: ``[B, L]``, the same under the reference; None without one.
        step_kl: ``[B, K]``, see :func:`step_kl`; None without a reference.
    """

    tokens: Tensor
    groups: Tensor
    nfe: int
    levels: Tensor
    vocab_size: int
    log_p: Tensor
    cond: Tensor | None = None
    log_reference: Tensor | None = None
    step_kl: Tensor | None = None

    def states(self, steps: Tensor | None = None) -> Tensor:
        """What evaluations ``steps [B or 1, n]`` (None: all) saw, tokens ``[B, n, L]``.

        Masked are those that were not yet revealed.
        """
        at = self.steps() if steps is None else steps
        hidden = self.groups.unsqueeze(1) >= at.unsqueeze(-1)
        return torch.where(hidden, self.vocab_size, self.tokens.unsqueeze(1))

    def steps(self) -> Tensor:
        """All evaluations, ``[1, K]``."""
        return torch.arange(self.nfe, device=self.tokens.device).unsqueeze(0)

    @property
    def log_ratio(self) -> Tensor:
        """``log p(trajectory) - log p_ref(trajectory)``, ``[B]``: its mean estimates the path KL.

        The order of reveals has the same law under both and cancels.
        """
        return (self.log_p - self._scored(self.log_reference)).sum(1)

    @property
    def path_kl(self) -> Tensor:
        """KL of the path to the reference given the states that it visited, ``[B]``.

        Has the mean of :attr:`log_ratio` and less variance.
        """
        return self._scored(self.step_kl).sum(1)

    def _scored(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("this rollout was drawn without reference=...")
        return value


def draw_rollout(
    denoiser: MaskedDenoiser,
    size: int,
    *,
    generator: torch.Generator | None = None,
    num_steps: int | None = None,
    reference: MaskedDenoiser | None = None,
    cond: Tensor | None = None,
    graph: bool = False,
) -> MaskedRollout:
    """Draw ``size`` sequences and remember how.

    Args:
        denoiser: who draws.
        size: B.
        generator: of orders and tokens, on the denoiser's device.
        num_steps: of the grid. ``None`` reveals one position an evaluation in random order: L
            evaluations, exact for time-free denoisers. With a number, evaluations in which a row
            would reveal nothing are skipped if the denoiser is time-free.
        reference: frozen denoiser to score the sequences with, never with a graph.
        cond: ``[B, C]``.
        graph: keep the graph of ``log_p`` and ``step_kl`` with respect to the weights (tokens have
            none), which saves their evaluation afterwards.

    Raises:
        ValueError: ``num_steps=None`` for a denoiser that depends on the level.
    """
    order = draw_order(denoiser, size, num_steps, generator)
    with torch.set_grad_enabled(graph):
        rollout, log_p = run_order(denoiser, order, cond=cond, generator=generator)
        if reference is None:
            return rollout
        with torch.no_grad():
            other = state_log_probs(reference, rollout)
        return rollout._replace(
            log_reference=at_reveal(other, rollout), step_kl=step_kl(log_p, other, rollout)
        )


def check_steps(denoiser: MaskedDenoiser, num_steps: int | None) -> None:
    """Raise ``ValueError`` if a denoiser that sees levels is to reveal one position at a time."""
    if num_steps is None and not denoiser.time_free:
        raise ValueError("a denoiser that depends on the level (not time_free) needs num_steps=K")


def all_masked(
    denoiser: MaskedDenoiser, size: int, generator: torch.Generator | None = None
) -> Start:
    """The start of ``size`` sequences: masks, and what is known (a drawn length, for instance)."""
    return blank_start(denoiser.process, _zeros(denoiser, size), generator)


def start_of(denoiser: MaskedDenoiser, groups: Tensor) -> Start:
    """The start whose positions are revealed in an order ``groups [B, L]`` of :func:`draw_order`.

    What it does not reveal is known from the beginning.
    """
    like = _zeros(denoiser, len(groups))
    return Start(denoiser.process.filled(groups == KNOWN, like), level(1.0, like))


def _zeros(denoiser: MaskedDenoiser, size: int) -> Tensor:
    return denoiser.weight.new_zeros((size, denoiser.length, denoiser.vocab_size + 1))


def draw_order(
    denoiser: MaskedDenoiser, size: int, num_steps: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """When each position of sequences is revealed, int64 ``[size, L]``, and the grid that takes.

    Positions that are known from the beginning are in the group ``KNOWN``.

    Raises:
        ValueError: ``num_steps=None`` for a denoiser that depends on the level.
    """
    start, how = all_masked(denoiser, size, generator), {"generator": generator}
    return reveals(denoiser.process, start, num_steps, time_free=denoiser.time_free, **how)


def run_order(
    denoiser: MaskedDenoiser,
    order: tuple[Tensor, Tensor],
    *,
    cond: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[MaskedRollout, Tensor]:
    """Draw sequences whose positions are revealed in a given order.

    Args:
        denoiser: who draws.
        order: the evaluation that reveals each position ``[B, L]``, and the grid.
        cond: ``[B, C]``.
        generator: of tokens.

    Returns:
        The rollout, and log-probabilities ``[B, K, L, V]`` at all its states.
    """
    groups, grid = order
    chain = denoiser, Scheduled(groups), start_of(denoiser, groups), grid
    path = sample(*chain, cond=cond, generator=generator, record=True)
    assert isinstance(path, Trajectory)
    log_p = torch.stack([row.denoised.aux["log_p"] for row in path.transitions], 1)
    tokens = to_tokens(path.x0)
    bare = MaskedRollout(tokens, groups, len(grid) - 1, grid, denoiser.vocab_size, log_p, cond)
    return bare._replace(log_p=at_reveal(log_p, bare)), log_p


def state_log_probs(
    denoiser: MaskedDenoiser, rollout: MaskedRollout, steps: Tensor | None = None
) -> Tensor:
    """``log p(x0_i | x_k)`` at the rollout's states, in the caller's gradient mode.

    All states are one batch (in chunks), each with its level.

    Args:
        denoiser: whose.
        rollout: B sequences.
        steps: int64 ``[B or 1, n]``, which evaluations; None: all.

    Returns:
        ``[B, n, L, V]``.
    """
    at = rollout.steps() if steps is None else steps
    states = rollout.states(at)
    size, count, length = states.shape
    dtype = denoiser.weight.dtype
    grid = rollout.levels[:-1].flatten().to(states.device, dtype, non_blocking=True)
    t = grid[at].expand(size, count).reshape(-1, 1, 1)
    flat = states.reshape(-1, length)
    cond = None if rollout.cond is None else rollout.cond.repeat_interleave(count, dim=0)
    conds = [None] * len(flat) if cond is None else torch.split(cond, MAX_STATES)
    parts = zip(torch.split(flat, MAX_STATES), torch.split(t, MAX_STATES), conds, strict=False)
    return torch.cat([denoiser.log_probs(*part) for part in parts]).view(size, count, length, -1)


def at_reveal(log_p: Tensor, rollout: MaskedRollout) -> Tensor:
    """Of log-probabilities ``[B, K, L, V]`` at all states, those of the reveals, ``[B, L]``."""
    _, _, length, vocab = log_p.shape
    # What is known has probability one in every state, the first among them.
    when = rollout.groups.clamp_min(0).view(-1, 1, length, 1).expand(-1, 1, length, vocab)
    rows = log_p.gather(1, when).squeeze(1)
    return rows.gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)


def step_kl(
    log_p: Tensor, log_reference: Tensor, rollout: MaskedRollout, steps: Tensor | None = None
) -> Tensor:
    """KL of each step to the reference in closed form: no draw of the next state enters.

    ``g / m sum_{i masked} KL(p(x0_i | x_k) || p_ref(x0_i | x_k))``, with m masks of which the step
    reveals g. Which ones is uniform given g, because the order does not look at tokens, so the sum
    over steps is the path KL without bias.

    Args:
        log_p: ``[B, n, L, V]`` of :func:`state_log_probs`.
        log_reference: the same of the reference.
        rollout: B sequences.
        steps: ``[B or 1, n]`` that these belong to; None: all.

    Returns:
        ``[B, n]``, nats.
    """
    at = (rollout.steps() if steps is None else steps).unsqueeze(-1)
    groups = rollout.groups.unsqueeze(1)
    masked, revealed = groups >= at, (groups == at).sum(-1)
    inner = categorical_kl(log_p, log_reference)
    return (inner * masked).sum(-1) * revealed / masked.sum(-1).clamp_min(1)
