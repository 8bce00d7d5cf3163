"""Search among the paths of a chain: the best noise is looked for on the way, on a fixed budget.

The counterpart of resampling (:mod:`diffpolicy.guidance.particles`) with a verifier whose scale
means nothing, so that the best is kept. A reward is compared, so it may be any function. That a
path is judged by its clean estimate finds what a verifier overrates as surely as what is good: keep
budgets small, or add what a plan must not lose to the reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffpolicy.core.denoiser import Denoised
from diffpolicy.guidance.particles import ESTIMATES, SMC, SVDD, TDS, BestOfN, Drawn, ParticleMethod
from diffpolicy.guidance.stepped_chain import Chain, rows
from diffpolicy.settings import check_choice, check_range, settings_of


@dataclass(frozen=True)
class PathSearch(ParticleMethod):
    """Search over paths (Ma et al. 2025, arXiv 2501.09732), of continuous states.

    ``paths`` states go ``down`` steps; each is judged by the reward of its clean estimate. The best
    of every group are kept, noised ``up`` steps again, ``branches`` times each, and so on to the
    end, where the best state is returned.

    Args:
        paths: N.
        branches: M; 1 with ``paths=1`` only noises up and down.
        down: steps of the chain between two choices.
        up: steps that a kept path is noised up; fewer than ``down``.
    """

    paths: int = 4
    branches: int = 2
    down: int = 3
    up: int = 1
    name: ClassVar[str] = "path_search"

    def __post_init__(self) -> None:
        check_range("[1, inf)", paths=self.paths, branches=self.branches, down=self.down)
        check_range("[0, inf)", up=self.up)
        if self.up >= self.down:
            raise ValueError(f"paths must get on: up < down, got up={self.up}, down={self.down}")

    @property
    def chains(self) -> int:
        return self.paths

    def run(self, chain: Chain, x: Tensor, cond: Tensor | None) -> Drawn:
        if chain.masked or chain.levels.shape[1] != 1:
            raise ValueError("path search noises states up again: continuous ones, at one level")
        groups, nfe, calls, at = len(x) // self.paths, 0, 0, 0
        told = None if cond is None else cond[:: self.paths]
        while True:
            many = len(x) // groups
            each = None if told is None else told.repeat_interleave(many, 0)
            to = min(at + self.down, chain.num_steps)
            x = chain.between(at, to, x, each)
            nfe, calls = nfe + many * chain.solver.nfe(to - at), calls + many
            if to == chain.num_steps:
                break
            values = chain.estimated(chain.denoised(to, x, each).x0_hat, each, "soft")
            nfe += many
            best = values.view(groups, many).topk(self.paths).indices
            first = many * torch.arange(groups, device=x.device)[:, None]
            kept = (first + best).flatten().repeat_interleave(self.branches)
            at = to - self.up
            x = self._noised(chain, x[kept], to, at)
        rewards = chain.rewards(x, each).view(groups, many)
        pick = rewards.argmax(1)
        states, weights = x.view(groups, many, *x.shape[1:]), one_hot(pick, many).double()
        return Drawn.picked(states, rewards, pick, weights, nfe=nfe, reward_calls=calls)

    @staticmethod
    def _noised(chain: Chain, x: Tensor, low: int, high: int) -> Tensor:
        """States at level ``low`` of the grid taken to the noisier one ``high``."""
        process = chain.denoise.process
        t, s = chain.levels[low], chain.levels[high]
        ratio = process.alpha(s) / process.alpha(t)
        spread = (process.sigma(s).square() - (ratio * process.sigma(t)).square()).clamp_min(0)
        noise = process.draw_noise(x.shape, chain.generator, x)
        return ratio.to(x) * x + spread.sqrt().to(x) * noise


@dataclass(frozen=True)
class RolloverBudget(ParticleMethod):
    """Rollover budget forcing (Kim et al. 2025, arXiv 2503.19385): next states drawn until better.

    The best of ``particles`` starts goes on. Every step has the same share of the budget and draws
    next states one at a time: the first whose clean estimate is better than the state's own is
    taken at once, and what is left of the share rolls over to the next step; where none is, the
    best one is taken.

    Args:
        budget: network evaluations per returned state that are never exceeded.
        particles: chains that are begun.
        estimate: as in :class:`~diffpolicy.guidance.particles.SMC`.
    """

    budget: int = 64
    particles: int = 4
    estimate: str = "soft"
    name: ClassVar[str] = "rollover"

    def __post_init__(self) -> None:
        check_range("[1, inf)", budget=self.budget, particles=self.particles)
        check_choice("estimate", self.estimate, ESTIMATES)

    @property
    def chains(self) -> int:
        return self.particles

    def run(self, chain: Chain, x: Tensor, cond: Tensor | None) -> Drawn:
        chain.check_steps(self.estimate)
        steps, many = chain.num_steps - 1, self.particles
        if self.budget < many + steps:
            least = f"{many} starts and {steps} steps need at least {many + steps}"
            raise ValueError(f"budget={self.budget} is too small: {least} evaluations")
        out = chain.denoised(0, x, cond)
        value = chain.estimated(out.x0_hat, cond, self.estimate).view(-1, many)
        value, best = value.max(1)
        best = best + many * torch.arange(len(best), device=x.device)
        x, out, cond = x[best], rows(out, best), None if cond is None else cond[best]
        spent = torch.full_like(best, many)
        left, extra = torch.zeros_like(best), self.budget - many
        for k in range(steps):
            left = left + extra // steps + (k < extra % steps)
            x, out, value, used = self._step(chain, k, (x, out, value), left, cond)
            left, spent = left - used, spent + used
        x = chain.step(chain.num_steps - 1, x, out)
        most = int(spent.max())
        return Drawn(x, chain.rewards(x, cond), nfe=most, reward_calls=most + 1)

    def _step(
        self,
        chain: Chain,
        k: int,
        at: tuple[Tensor, Denoised, Tensor],
        left: Tensor,
        cond: Tensor | None,
    ) -> tuple[Tensor, Denoised, Tensor, Tensor]:
        """One step of every row: its next state, the answer and value there, evaluations used."""
        x, out, own = at
        found, answer = x.clone(), Denoised(out.x0_hat.clone(), dict(out.aux))
        value, used = torch.full_like(own, -torch.inf), torch.zeros_like(left)
        going = torch.arange(len(x), device=x.device)
        while len(going):  # every row has at least one evaluation left
            offer = chain.step(k, x[going], rows(out, going))
            told = None if cond is None else cond[going]
            new = chain.denoised(k + 1, offer, told)
            score = chain.estimated(new.x0_hat, told, self.estimate)
            used[going] += 1
            better = (score > value[going]) | (used[going] == 1)
            takers = going[better]
            found[takers], value[takers] = offer[better], score[better]
            answer = _put(answer, takers, rows(new, better))
            going = going[(score <= own[going]) & (used[going] < left[going])]
        return found, answer, value, used


def _put(out: Denoised, index: Tensor, other: Denoised) -> Denoised:
    """An answer with some rows replaced."""
    place = (index,)
    aux = {name: value.index_put(place, other.aux[name]) for name, value in out.aux.items()}
    return Denoised(out.x0_hat.index_put(place, other.x0_hat), aux)


_ALL = (BestOfN, SMC, TDS, SVDD, PathSearch, RolloverBudget)
PARTICLE_METHODS: Mapping[str, type[Any]] = {method.name: method for method in _ALL}


def make_particle_method(name: str, **settings: Any) -> ParticleMethod:
    """A particle method by its name, e.g. ``make_particle_method("smc", particles=32)``.

    Raises:
        ValueError: unknown name or setting, with the valid ones.
    """
    check_choice("particle method", name, sorted(PARTICLE_METHODS))
    method: ParticleMethod = settings_of(PARTICLE_METHODS[name], settings, repr(name))
    return method
