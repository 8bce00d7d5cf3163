"""Search at inference time: the best of several chains, or of several next states in every step.

The chains are those of :func:`diffpolicy.core.sampling.sample`; what is kept of them is decided
between its calls, on sub-grids of one step. Nothing here needs a reward's gradient. Weights of
groups of particles are ``[B, N]``, in float64 logs; reckoning with them never reads the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.solvers import Solver
from diffpolicy.core.starts import Start
from diffpolicy.guidance.stepped_chain import Chain, rows, started
from diffpolicy.settings import check_choice, check_range

ESTIMATES = ("soft", "hard")
BELOW_ONE = 1 - 2**-53


class Drawn(NamedTuple):
    """What a particle method returns.

    Attributes:
        x0: one state per group ``[B, L, D]``.
        rewards: theirs ``[B]``.
        nfe: network evaluations per returned state.
        reward_calls: reward evaluations per returned state (with gradient: counted as one).
        ess: effective number of particles after each weighting, first to last, ``[R, B]``; from 1
            (one particle has all the weight) to their number. Of :class:`SVDD`, of the candidates.
            ``None`` where nothing is weighted.
        log_z: log of an unbiased estimate of ``E[exp(r / kl_weight)]`` under the chain, ``[B]``.
        particles: all final states ``[B, N, L, D]``.
        weights: their weights ``[B, N]``, which sum to one in each group.
    """

    x0: Tensor
    rewards: Tensor
    nfe: int
    reward_calls: int
    ess: Tensor | None = None
    log_z: Tensor | None = None
    particles: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def picked(
        cls, states: Tensor, rewards: Tensor, pick: Tensor, weights: Tensor, **rest: Any
    ) -> Drawn:
        """The states ``pick [B]`` of groups ``[B, N, L, D]``, and all with their weights."""
        row = torch.arange(len(pick), device=states.device)
        return cls(states[row, pick], rewards[row, pick], particles=states, weights=weights, **rest)


class ParticleMethod:
    """A way to draw for a reward with several chains; a frozen value, its settings.

    :meth:`draw` takes the same arguments for all of them.
    """

    name: ClassVar[str]

    @property
    def chains(self) -> int:
        """Chains that are started per returned state."""
        raise TypeError(f"{type(self).__name__} must define chains")

    def run(self, chain: Chain, x: Tensor, cond: Tensor | None) -> Drawn:
        """Draw from the starts ``x [B * chains, L, D]``, groups one after the other."""
        raise TypeError(f"{type(self).__name__} must define run")

    @torch.no_grad()
    def draw(
        self,
        denoise: BaseDenoiser,
        reward: Callable[..., Tensor],
        start: Start | Sequence[int],
        *,
        num_steps: int | None,
        cond: Tensor | None = None,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Drawn:
        """Draw one state per group.

        Args:
            denoise: the pre-trained denoiser, of masked sequences or (but for :class:`TDS`)
                continuous.
            reward: of masked sequences ``[B, L, V] -> [B]``, without the mask's channel, soft
                unless ``estimate="hard"``; continuous ``([B, H, D], cond) -> [B]``. Finite, or
                minus infinity for what must not be.
            start: the shape ``(B, L, D)`` of what is returned, to begin at the prior; or a start of
                ``B * chains`` rows, those of a group consecutive, at one level for all.
            num_steps: K. ``None``, for masked sequences and time-free denoisers: one position a
                step in uniformly random order, the limit of infinitely many steps.
            cond: ``[B, C]``, one row per group.
            solver: the chain, stochastic and of one evaluation a step; by default
                :class:`~diffpolicy.core.reveal.Ancestral`, or ``ddpm`` of continuous states.
            generator: source of all randomness, on the device of the states.

        Raises:
            ValueError: a start, solver or reward that does not fit, as said above.
        """
        start = started(denoise, start, self.chains, generator)
        if cond is not None:
            if len(cond) * self.chains != len(start.x):
                raise ValueError(
                    f"cond needs one row per group, {len(start.x) // self.chains}; got {len(cond)}"
                )
            cond = cond.repeat_interleave(self.chains, 0)
        chain = Chain.of(denoise, reward, start, num_steps, solver=solver, generator=generator)
        return self.run(chain, start.x, cond)


@dataclass(frozen=True)
class BestOfN(ParticleMethod):
    """The best of ``n`` complete chains. Any solver will do, reveal schedules too.

    Its law is that of the maximum: a reward r is the best with probability ``F(r)^n - F(r-)^n``,
    where F is the distribution function of the chain's rewards.
    """

    n: int = 16
    name: ClassVar[str] = "best_of_n"

    def __post_init__(self) -> None:
        check_range("[1, inf)", n=self.n)

    @property
    def chains(self) -> int:
        return self.n

    def run(self, chain: Chain, x: Tensor, cond: Tensor | None) -> Drawn:
        x0 = chain.whole(x, cond)
        rewards = chain.rewards(x0, cond).view(-1, self.n)
        best = rewards.argmax(1)
        return Drawn.picked(
            x0.view(-1, self.n, *x0.shape[1:]),
            rewards,
            best,
            one_hot(best, self.n).double(),
            nfe=self.n * chain.solver.nfe(chain.num_steps),
            reward_calls=self.n,
        )


@dataclass(frozen=True)
class SVDD(ParticleMethod):
    """Value-based selection in every step (Li et al. 2024), with the posterior mean's reward.

    Each chain draws ``candidates`` next states and keeps one, with probability proportional to
    ``exp(r(x0_hat) / kl_weight)``. Chains are never weighed against each other, so the law does not
    tend to the tilted one of SMC unless the estimates are the values.

    Args:
        candidates: M; 1 is the pre-trained chain.
        kl_weight: positive; ``None`` keeps the best candidate.
        estimate: as in :class:`SMC`.
    """

    candidates: int = 10
    kl_weight: float | None = None
    estimate: str = "soft"
    name: ClassVar[str] = "svdd"

    def __post_init__(self) -> None:
        check_range("[1, inf)", candidates=self.candidates)
        check_range("(0, inf)", kl_weight=self.kl_weight)
        check_choice("estimate", self.estimate, ESTIMATES)

    @property
    def chains(self) -> int:
        return 1

    def run(self, chain: Chain, x: Tensor, cond: Tensor | None) -> Drawn:
        chain.check_steps(self.estimate)
        count, last = self.candidates, chain.num_steps - 1
        each = None if cond is None else cond.repeat_interleave(count, 0)
        row = torch.arange(len(x), device=x.device)
        first, repeated = row * count, row.repeat_interleave(count)
        out, sizes = chain.denoised(0, x, cond), []
        for k in range(chain.num_steps):
            offers = chain.step(k, x[repeated], rows(out, repeated))
            if k == last:
                values = chain.rewards(offers, each)
            else:
                out = chain.denoised(k + 1, offers, each)
                values = chain.estimated(out.x0_hat, each, self.estimate)
            values = values.view(-1, count)
            if self.kl_weight is None:
                pick = values.argmax(1)
            else:
                weights = normalised(values.double() / self.kl_weight)
                sizes.append(effective_size(weights))
                pick = choose(weights, chain.generator)
            x, rewards = offers[first + pick], values.gather(1, pick[:, None])[:, 0]
            out = out if k == last else rows(out, first + pick)
        ess = torch.stack(sizes) if sizes else None
        return Drawn(x, rewards, 1 + count * last, count * chain.num_steps, ess)


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one in each group ``[B, N]``; even where all are zero."""
    top = log_weights.amax(1, keepdim=True)
    alive = top > -torch.inf
    weights = (log_weights - torch.where(alive, top, 0.0)).exp()
    weights = torch.where(alive, weights, 1.0)
    return weights / weights.sum(1, keepdim=True)


def log_mean(log_weights: Tensor) -> Tensor:
    """``log(mean(exp(log_weights)))`` of each group ``[B]``."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def effective_size(weights: Tensor) -> Tensor:
    """``1 / sum w^2`` of each group ``[B]``, between 1 and N."""
    return 1 / weights.square().sum(1)


def systematic(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Systematic resampling: the particle that each new one copies, ``[B, N]``, ascending.

    One uniform number per group places N evenly spaced points in the cumulative weights, so that a
    particle of weight w is copied ``floor(N w)`` or ``ceil(N w)`` times, ``N w`` on average, and
    one without weight never.
    """
    batch, count = weights.shape
    u = torch.rand((batch, 1), generator=generator, device=weights.device, dtype=torch.float64)
    steps = torch.arange(count, device=weights.device, dtype=torch.float64)
    return _under(weights, (steps + u) / count)


def choose(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One particle of each group, drawn by weight, ``[B]``."""
    u = torch.rand(
        (len(weights), 1), generator=generator, device=weights.device, dtype=torch.float64
    )
    return _under(weights, u)[:, 0]


def _under(weights: Tensor, points: Tensor) -> Tensor:
    """The particles whose shares of the cumulative weights hold ``points`` in [0, 1)."""
    cumulative = weights.double().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # exactly 1 from the last particle with weight on
    return torch.searchsorted(cumulative, points.clamp(max=BELOW_ONE), right=True)
