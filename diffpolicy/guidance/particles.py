"""Drawing for a reward at inference time: several chains, several next states, or particles.

The chains are those of :func:`diffpolicy.core.sampling.sample`; what is kept of them is decided
between its calls, on sub-grids of one step. A reward is weighed, so it may be any function; only
:class:`TDS` takes a gradient of it, unless its mode is ``"exact"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.starts import Start
from diffpolicy.core.steps import Solver
from diffpolicy.guidance.reward import REWARD_MODES, RewardGuidance
from diffpolicy.guidance.stepped_chain import (
    Chain,
    checked,
    choose,
    effective_size,
    log_mean,
    normalised,
    rows,
    started,
    systematic,
)
from diffpolicy.settings import check_choice, check_range

ESTIMATES = ("soft", "hard")


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
            groups = len(start.x) // self.chains
            if len(cond) != groups:
                raise ValueError(f"cond needs one row per group, {groups}; got {len(cond)}")
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


@dataclass(frozen=True)
class SMC(ParticleMethod):
    """Sequential Monte Carlo: the pre-trained chain proposes, the reward to come decides.

    Targets ``p(x0) exp(r(x0) / kl_weight) / Z``. At every level a particle weighs
    ``exp(r(x0_hat) / kl_weight)`` with its clean estimate, and the reward itself at the end; a
    group in which the effective number of particles falls below ``ess_threshold`` times their
    number is resampled (systematically). One state is drawn per group from the final weights: its
    law tends to the target as ``particles`` grows, whatever the quality of the estimates. Groups
    know nothing of each other. If all of a group end at minus infinity, one is drawn evenly, and
    its ``log_z`` says so.

    Args:
        particles: N per group; 1 is the pre-trained chain.
        kl_weight: positive.
        ess_threshold: in [0, 1]; 0 never resamples (importance sampling).
        estimate: the reward is asked at the ``"soft"`` clean estimate (probabilities), or at the
            most probable, ``"hard"``, completion (masked sequences).
    """

    particles: int = 16
    kl_weight: float = 1.0
    ess_threshold: float = 0.5
    estimate: str = "soft"
    name: ClassVar[str] = "smc"

    def __post_init__(self) -> None:
        check_range("[1, inf)", particles=self.particles)
        check_range("(0, inf)", kl_weight=self.kl_weight)
        check_range("[0, 1]", ess_threshold=self.ess_threshold)
        check_choice("estimate", self.estimate, ESTIMATES)

    @property
    def chains(self) -> int:
        return self.particles

    def run(self, chain: Chain, x: Tensor, cond: Tensor | None) -> Drawn:
        chain.check_steps(self.estimate)
        chain = self._proposing(chain)
        count, shape = self.particles, (-1, self.particles)
        log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device).view(shape)
        log_z, twist, sizes = log_w[:, 0], log_w, []
        for k in range(chain.num_steps):
            out = chain.denoised(k, x, cond)
            ahead = self._reward_ahead(chain, x, out, cond).view(shape) / self.kl_weight
            ahead = _never_zero(ahead, twist)
            log_w, twist = log_w + ahead - twist, ahead
            weights = normalised(log_w)
            sizes.append(effective_size(weights))
            poor = (sizes[-1] < self.ess_threshold * count) & (log_w.amax(1) > -torch.inf)
            parents = torch.where(
                poor[:, None],
                systematic(weights, chain.generator),
                torch.arange(count, device=x.device),
            )
            log_z = torch.where(poor, log_z + log_mean(log_w), log_z)
            log_w = torch.where(poor[:, None], 0.0, log_w)
            x, out, twist = _selected(x, out, twist, parents)
            moved = chain.step(k, x, out)
            log_w = log_w + self._correction(x, out, moved).view(shape)
            x = moved
        rewards = chain.rewards(x, cond).view(shape)
        log_w = log_w + rewards.double() / self.kl_weight - twist
        weights = normalised(log_w)
        return Drawn.picked(
            x.view(*shape, *x.shape[1:]),
            rewards,
            choose(weights, chain.generator),
            weights,
            nfe=count * chain.num_steps,
            reward_calls=count * (1 + chain.num_steps * self._rewards_per_step(chain, x)),
            ess=torch.stack([*sizes, effective_size(weights)]),
            log_z=log_z + log_mean(log_w),
        )

    def _proposing(self, chain: Chain) -> Chain:
        return chain

    def _reward_ahead(self, chain: Chain, x: Tensor, out: Denoised, cond: Tensor | None) -> Tensor:
        return chain.estimated(out.x0_hat, cond, self.estimate)

    def _correction(self, x: Tensor, out: Denoised, moved: Tensor) -> Tensor:
        """``log p(moved | x) - log q(moved | x)`` of target and proposal ``[B * N]``."""
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def _rewards_per_step(self, chain: Chain, x: Tensor) -> int:
        return 1


@dataclass(frozen=True)
class TDS(SMC):
    """Twisted diffusion sampling (Wu et al. 2023) of masked sequences: SMC with a guided proposal.

    Steps are proposed by :class:`~diffpolicy.guidance.reward.RewardGuidance`, and the weights
    corrected by the ratio of the two chains' kernels, which is exact: guidance moves only the laws
    of tokens, so what remains of the ratio are the probabilities of those newly revealed.

    Args:
        guidance_scale: in units of ``1 / kl_weight``; 1 is the paper's proposal.
        mode: of the guidance, ``"clean"``, ``"state"`` or ``"exact"``.
    """

    guidance_scale: float = 1.0
    mode: str = "clean"
    name: ClassVar[str] = "tds"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("(0, inf)", guidance_scale=self.guidance_scale)
        check_choice("mode", self.mode, REWARD_MODES)

    def _proposing(self, chain: Chain) -> Chain:
        if not chain.masked:
            raise ValueError("tds is for masked sequences; otherwise use smc or ValueGuidance")
        scale = self.guidance_scale / self.kl_weight
        guided = RewardGuidance(chain.denoise, chain.reward, scale, mode=self.mode)
        return chain.with_denoiser(guided)

    def _reward_ahead(self, chain: Chain, x: Tensor, out: Denoised, cond: Tensor | None) -> Tensor:
        if self.estimate == "soft":
            return checked(out.aux["reward"]).double()
        unguided = x[..., :-1] + x[..., -1:] * out.aux["log_p_unguided"].exp()
        return chain.estimated(pad(unguided, (0, 1)), cond, self.estimate)

    def _correction(self, x: Tensor, out: Denoised, moved: Tensor) -> Tensor:
        revealed = (moved[..., :-1] - x[..., :-1]) > 0.5
        ratio = out.aux["log_p_unguided"].double() - out.aux["log_p"].double()
        return torch.where(revealed, ratio, 0.0).sum((-1, -2))

    def _rewards_per_step(self, chain: Chain, x: Tensor) -> int:
        guidance: Any = chain.denoise
        calls: int = guidance.reward_calls(x.shape[-2], x.shape[-1] - 1)
        return calls + (self.estimate == "hard")


def _never_zero(ahead: Tensor, twist: Tensor) -> Tensor:
    """Log-twists ``ahead [B, N]`` without minus infinity.

    A bad estimate must not end a particle that can still become good: it counts as the worst of its
    group that is not, or where none is, as the twist before. Only the end excludes.
    """
    finite = ahead > -torch.inf
    worst = torch.where(finite, ahead, torch.inf).amin(1, keepdim=True)
    instead = torch.where(worst < torch.inf, worst, twist)
    return torch.where(finite, ahead, instead)


def _selected(
    x: Tensor, out: Denoised, twist: Tensor, parents: Tensor
) -> tuple[Tensor, Denoised, Tensor]:
    """States, answers and twists of the particles ``parents [B, N]`` of each group."""
    first = torch.arange(len(parents), device=x.device)[:, None] * parents.shape[1]
    index = (first + parents).flatten()
    return x[index], rows(out, index), twist.gather(1, parents)
