"""A sampler searched for a trained policy: few evaluations that come close to many.

Pairs of recorded observations and noise are planned for by a teacher of many steps, and
:mod:`diffpolicy.core.autotune` looks for the levels and weights of a few steps that come nearest to
its plans, on half of the episodes. The other half judges them beside every solver with a name. No
environment is needed, and no weight of the policy changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.autotune import Space, distances, named_samplers, search
from diffpolicy.core.sampler import PriorSampler
from diffpolicy.data.observation import take
from diffpolicy.policies.base import Array, PolicyState
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.direct import direct_class
from diffpolicy.policies.few_steps import check_follows_paths
from diffpolicy.policies.recorded import Demonstrations
from diffpolicy.policies.spec import PolicySampler
from diffpolicy.settings import check_range

NOISE_OBSERVATIONS = 32  # on which a draw of start noise is judged


@dataclass(frozen=True)
class Measured:
    """Mean distance of a sampler's plans to the teacher's from the same noise.

    Attributes:
        sampler: itself.
        train: on the episodes that were searched on; normalised units, root mean square a plan.
        held_out: on the others.
    """

    sampler: PriorSampler
    train: float
    held_out: float

    @property
    def name(self) -> str:
        """Solver, options and grid in a few words."""
        if self.sampler.solver == "bespoke":
            return "searched" + (", with a teleport" if self.sampler.teleport else "")
        options = "".join(f" {k}={v}" for k, v in self.sampler.options.items())
        return f"{self.sampler.solver}{options}, {self.sampler.spacing}"


@dataclass(frozen=True)
class StartNoise:
    """A draw of start noise that suits the sampler, out of some.

    Attributes:
        seed: of the draw, ``sampler.start_seed``.
        pool: draws that there were.
        mean: of their mean distances to the teacher's plans.
        least: that of the draw, on the episodes that it was chosen on.
        held_out: that of the draw on the others.
    """

    seed: int
    pool: int
    mean: float
    least: float
    held_out: float


@dataclass(frozen=True)
class AutotuneReport:
    """What was searched, and what it gained.

    Attributes:
        nfe: network evaluations of a plan.
        teacher: the many steps.
        named: every solver with a name, the nearest to the teacher on held-out episodes first.
        searched: the result of the search.
        pairs: of observation and noise, for the search and for the judgement each.
        without_teleport: held-out distance of the best sampler that begins at pure noise.
        start_noise: the calibrated start, if it was asked for.
    """

    nfe: int
    teacher: PriorSampler
    named: tuple[Measured, ...]
    searched: Measured
    pairs: int
    without_teleport: float
    start_noise: StartNoise | None = None

    @property
    def kept(self) -> Measured:
        """What the policy samples with: the search's result unless a named solver is nearer."""
        return min(self.searched, self.named[0], key=lambda one: one.held_out)

    @property
    def ratio(self) -> float:
        """Distance of what is kept, over that of the best named solver, on held-out episodes."""
        return self.kept.held_out / max(self.named[0].held_out, 1e-12)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"kept": self.kept.name, "ratio": self.ratio}

    def table(self) -> str:
        """The nearest named solvers and the searched sampler as text, and what was gained."""
        lines = ["  distance to the teacher: searched episodes, held out"]
        for one in (*self.named[:5], self.searched):
            mark = "*" if one is self.kept else " "
            lines.append(f"{mark} {one.name:<40} {one.train:8.4f} {one.held_out:8.4f}")
        if self.kept is self.searched:
            lines.append(
                f"kept: the searched sampler, {self.ratio:.2f} of the best named one's distance"
            )
        else:
            lines.append("kept: the best named solver; the search found none that is nearer")
        if self.start_noise is not None:
            noise = self.start_noise
            lines.append(
                f"start noise {noise.seed} of {noise.pool}: distance {noise.least:.4f} (held out "
                f"{noise.held_out:.4f}), on average {noise.mean:.4f}. It makes the policy "
                "deterministic: one plan for each observation, whatever the seed"
            )
        return "\n".join(lines)


def autotune(
    planner: DiffusionPlanner,
    demos: Demonstrations,
    nfe: int,
    *,
    teacher: PriorSampler | None = None,
    pairs: int = 128,
    start_noise: int = 0,
    seed: int = 0,
) -> tuple[PolicySampler, AutotuneReport]:
    """Search the sampler of a policy's full solves for ``nfe`` network evaluations.

    Args:
        planner: the trained policy.
        demos: recorded observations; half of the episodes are searched on, half judge.
        nfe: network evaluations of a plan, at least 1.
        teacher: what is aimed at; default DPM-Solver++ 2M in 100 steps. One that adds no noise.
        pairs: of observation and noise in each half.
        start_noise: draws of start noise among which one is chosen that suits the sampler; 0: none,
            plans start from fresh noise. The policy becomes deterministic by it.
        seed: of the choice of observations and of the noise.

    Returns:
        The sampler to use, and the report.

    Raises:
        ValueError: a policy without full solves (truncated, or that answers in one call), a student
            of few steps, a teacher that adds noise, fewer than two episodes, or numbers out of
            range.

    Example:
        >>> sampler, report = autotune(policy, demonstrations(store), 4)
        >>> quick = policy.with_settings(sampler=sampler)
    """
    check_range("[2, inf)", pairs=pairs, episodes=len(demos.action))
    check_range("[0, inf)", start_noise=start_noise)
    if planner.spec.truncated is not None or direct_class(planner.spec) is not None:
        raise ValueError(
            "autotune searches the steps from pure noise, which this policy does not take: its "
            "plans start from guesses (truncated), or are made in one call"
        )
    check_follows_paths(planner.spec, "autotune searches the steps of")
    many = PriorSampler(solver="dpmpp_2m", num_steps=100) if teacher is None else teacher
    if many.make().stochastic:
        raise ValueError(f"the teacher must not add noise; {many.solver!r} does: use dpmpp_2m")
    order = np.random.default_rng(seed).permutation(len(demos.action))
    halves = np.array_split(order, 2)
    train, held_out = (
        Pairs.of(planner, demos, half, pairs, seed=seed + i) for i, half in enumerate(halves)
    )
    targets = train.plans(many), held_out.plans(many)

    def measured(sampler: PriorSampler) -> Measured:
        found = (p.plans(sampler) for p in (train, held_out))
        away = (distances(a, b).mean().item() for a, b in zip(found, targets, strict=True))
        return Measured(sampler, *away)

    named, usable = _named(nfe, measured)
    moments = (targets[0].mean(0), targets[0].var(0))
    rows = tuple(tuple(map(tuple, value.tolist())) for value in moments)
    found = []
    for given in (None, (rows[0], rows[1])):  # from pure noise, and from where a teleport leads
        space = Space(planner.denoiser.process, nfe, given)
        found.append(measured(search(train.plans, targets[0], space, usable)))
    ranked = tuple(sorted(named, key=lambda one: one.held_out))
    searched = min(found, key=lambda one: one.train)
    report = AutotuneReport(nfe, many, ranked, searched, pairs, found[0].held_out)
    sampler = replace(planner.spec.sampler, start_seed=None, **vars(report.kept.sampler))
    if start_noise:
        noise = _calibrated(train, held_out, many, report.kept.sampler, start_noise)
        report = replace(report, start_noise=noise)
        sampler = replace(sampler, start_seed=noise.seed)
    return sampler, report


def _named(
    nfe: int, measured: Callable[[PriorSampler], Measured]
) -> tuple[list[Measured], list[PriorSampler]]:
    """Solvers with a name that this process can take, the nearest on the searched half first."""
    found = []
    for sampler in named_samplers(nfe):
        try:
            found.append((measured(sampler), sampler))
        except ValueError:  # a grid finer than the training levels, or alpha = 0 at the start
            continue
    found.sort(key=lambda one: one[0].train)
    return [one for one, _ in found], [sampler for _, sampler in found]


@dataclass(frozen=True)
class Pairs:
    """Recorded observations with the noise that plans for them start from.

    Attributes:
        planner: the policy.
        state: memories that hold the observations, each with a random stream of its own.
    """

    planner: DiffusionPlanner
    state: PolicyState

    @classmethod
    def of(
        cls, planner: DiffusionPlanner, demos: Demonstrations, rows: Array, count: int, *, seed: int
    ) -> Pairs:
        """``count`` random steps of some episodes, as a policy sees them there.

        Args:
            planner: the policy.
            demos: all episodes.
            rows: of these.
            count: pairs; steps repeat, with other noise, where there are fewer.
            seed: of the choice and of the streams.
        """
        rng = np.random.default_rng(seed)
        episodes, steps = np.nonzero(demos.valid[rows])
        order = np.resize(rng.permutation(len(episodes)), count)
        episodes, steps = rows[episodes[order]], steps[order]
        state = planner.initial_state(range(seed * 2**32, seed * 2**32 + count))
        for back in range(planner.n_obs_steps - 1, -1, -1):
            seen = take(demos.obs, (episodes, np.maximum(steps - back, 0)))
            state = planner.observe(seen, state)
        return cls(planner, planner.encoded_once(state))

    def plans(self, sampler: PriorSampler, start_seed: int | None = None) -> Tensor:
        """Normalised plans ``[count, H, D]``; from one draw of noise for all if that is given."""
        planner, state = self.planner, self.state
        if start_seed is not None:
            same = np.full_like(state.seed, start_seed)
            state = replace(state, seed=same, counter=np.zeros_like(state.counter))
        with planner._no_graph():
            loop = planner.loop("cold", sampler=sampler)
            noise = planner.draw_noise(state, 1, False)
            plans: Tensor = loop(planner.told(loop, state), torch.zeros_like(noise[0]), noise)
        return plans

    def first(self, count: int) -> Pairs:
        """The first so many of them."""
        return replace(self, state=self.state.take(np.arange(min(count, len(self.state)))))


def _calibrated(
    train: Pairs, held_out: Pairs, many: PriorSampler, few: PriorSampler, pool: int
) -> StartNoise:
    """The draw of start noise from which few steps come nearest to many, on average."""

    def away(pairs: Pairs, seed: int) -> float:
        return distances(pairs.plans(few, seed), pairs.plans(many, seed)).mean().item()

    some = train.first(NOISE_OBSERVATIONS)
    found = [away(some, seed) for seed in range(pool)]
    best = int(np.argmin(found))
    return StartNoise(best, pool, float(np.mean(found)), found[best], away(held_out, best))
