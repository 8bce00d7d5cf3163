"""The level chooser: at which noise level plans start, decided from demonstrations alone.

Too low a level cannot leave the last plan (it stalls when the world has moved on), too high a one
asks more of one to three steps than they can solve. Three quantities tell, all measured on
recorded observations with the trained denoiser, never in an environment:

- the *shift error*: how far the shifted last plan is from what a full solve now says;
- the *contraction* of the warm solve: which part of that error survives. For locally Gaussian plans
  it is known in closed form (:func:`ddim_contraction`), and it is
  measured beside it;
- the *regret* of the warm policy driven along the demonstrations by their own observations: the
  continuous ranked probability score (Gneiting & Raftery 2007, eq. 21) of its actions, and of their
  changes over 1, 8, 16 and 32 steps, relative to the best candidate's. The score is proper, so
  neither lag nor blur nor a lost mode can improve it; changes are scored because plans that switch
  between modes have the right actions at every single step, and over many steps because few
  switches show in few differences of neighbours. Runs begin in the demonstration's mode: which one
  was drawn first would otherwise be luck that a policy keeping to it carries through the episode.
  The worst action dimension counts: one that must jump (a gripper) is not outvoted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.data.observation import take
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.policies.boundary import now_of
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.level_report import Level, LevelReport
from diffpolicy.policies.recorded import Demonstrations, replay, told
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.truncated import Truncated

ALIKE = 0.01
LAGS = (1, 8, 16, 32)
DRAWS = 8  # first plans, of which the one nearest to the demonstration is kept
CANDIDATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


def choose_level(
    planner: DiffusionPlanner,
    demos: Demonstrations,
    settings: RTI | Truncated,
    *,
    candidates: Sequence[float] = CANDIDATES,
    replicates: int = 3,
    seed: int = 0,
) -> LevelReport:
    """The start level for other settings (steps, solver, tail, ...) on a trained policy.

    Chosen is the smallest candidate whose regret is within one percent of the least. Where the
    network takes a level per action dimension, each dimension chooses its own in the same way, and
    they are kept if together they are no worse.

    Args:
        planner: the trained policy (with anchors, for truncated settings that use them);
            ``n_action_steps`` counts, its own ``rti`` or ``truncated`` does not.
        demos: see :func:`demonstrations`; held-out ones are better, training ones will do.
        settings: of warm starts or truncated plans; their ``t_start`` is replaced.
        candidates: levels in (0, 1] to choose from.
        replicates: independent runs, at least 2.
        seed: of their noise.

    Returns:
        The report; ``replace(settings, t_start=report.t_start)`` are the settings to use.

    Raises:
        ValueError: no candidates, fewer than two replicates, or settings with a list of levels.
    """
    if not candidates or replicates < 2:
        raise ValueError("choosing a level needs candidates and at least 2 replicates")
    if isinstance(settings, RTI) and settings.levels is not None:
        raise ValueError("a list of levels is a choice already; give num_steps instead")
    process, steps = planner.denoiser.process, settings.num_steps
    # Steps need levels of their own on a discrete process.
    knots = round(1 / process.first_level) if process.first_level else 10**9
    ordered = sorted({float(c) for c in candidates if steps <= round(float(c) * knots)})
    if not ordered:
        raise ValueError(f"no candidate of {list(candidates)} leaves {steps} different levels")
    study = _Study(planner, demos, settings, replicates, seed)
    made = [_with(planner, replace(settings, t_start=t)) for t in ordered]
    scores = np.stack([study.crps(policy) for policy in made])
    regret = _regret(scores, scores)  # [levels, 2 A]
    common = ordered[_smallest(regret.max(1))]
    chosen: float | tuple[float, ...] = common
    per_dim = "dim" in getattr(planner.denoiser.network, "t_kinds", ())
    plain = planner.spec.layout == "action"  # contraction, and a level each, is of plans of actions
    if per_dim and plain and isinstance(settings, RTI):
        chosen = _per_dimension(study, ordered, scores, common)
    probe = study.probe() if isinstance(settings, RTI) and plain else None
    table = []
    for t, policy, row in zip(ordered, made, regret, strict=True):
        measured, predicted = (None, None) if probe is None else study.contraction(policy, probe)
        actions, changes = (tuple(map(float, part)) for part in np.split(row, 2))
        table.append(Level(t, measured, predicted, actions, changes))
    shift_error = None if probe is None else probe.shift_error
    return LevelReport(chosen, tuple(table), shift_error, len(demos.action), replicates)


def _smallest(regret: Array) -> int:
    """The first level that is as good as the best, to within :data:`ALIKE`."""
    return int((regret <= regret.min() + ALIKE).argmax())


def _with(planner: DiffusionPlanner, settings: RTI | Truncated | None) -> DiffusionPlanner:
    """The planner with these settings alone, and no innovation test."""
    rti = replace(settings, innovation=None) if isinstance(settings, RTI) else None
    truncated = settings if isinstance(settings, Truncated) else None
    spec = replace(planner.spec, rti=rti, truncated=truncated)
    return planner.with_spec(spec)


def _regret(scores: Array, among: Array) -> Array:
    """``scores [n, 1 + lags, A]`` over the least ``among``, of changes the worst: ``[n, 2 A]``."""
    excess = scores / among.min(0) - 1
    return np.concatenate([excess[:, 0], excess[:, 1:].max(1)], axis=1)


def _per_dimension(
    study: _Study, ordered: list[float], scores: Array, common: float
) -> float | tuple[float, ...]:
    regret = np.maximum(*np.split(_regret(scores, scores), 2, axis=1))  # [levels, A]
    own = tuple(ordered[_smallest(column)] for column in regret.T)
    if len(set(own)) == 1:
        return own[0]
    assert isinstance(study.settings, RTI)
    together = study.crps(_with(study.planner, replace(study.settings, t_start=own)))
    rows = np.stack([together, scores[ordered.index(common)]])
    worst = _regret(rows, scores).max(1)
    return own if worst[0] <= worst[1] else common


class _Probe(NamedTuple):
    """Decision points of the demonstrations with two independent guesses each."""

    state: PolicyState
    guesses: tuple[Array, Array]
    shift_error: float


@dataclass
class _Study:
    """The measurements, all on the same episodes and noise."""

    planner: DiffusionPlanner
    demos: Demonstrations
    settings: RTI | Truncated
    replicates: int
    seed: int

    def __post_init__(self) -> None:
        warm = isinstance(self.settings, RTI)
        self.target = self.planner.boundary.entries(self.demos.action)
        self.cond = self._conditions()
        self.starts = [self._start(run) if warm else None for run in range(self.replicates)]

    def _conditions(self) -> Array | None:
        """What each observation is encoded to ``[E, T, C]``: once, however often it is replayed."""
        planner, found = _with(self.planner, None), list[Array]()
        state = planner.initial_state(range(len(self.demos.action)))
        for step in range(self.demos.valid.shape[1]):
            state = planner.observe(take(self.demos.obs, (slice(None), step)), state)
            found += [v for k, v in planner.encoded_once(state).memory.items() if k == "cond"]
        return np.stack(found, 1) if found else None

    def crps(self, policy: ChunkedPolicy) -> Array:
        """Continuous ranked probability score of executed actions and of their changes.

        Returns:
            ``[1 + lags, A]``, the mean over steps; lower is better.
        """
        count, valid = len(self.demos.action), self.demos.valid
        first = [self.seed + run * count for run in range(self.replicates)]
        pairs = zip(first, self.starts, strict=True)
        runs = np.stack(
            [
                replay(policy, self.demos.obs, range(n, n + count), start, self.cond)
                for n, start in pairs
            ]
        )
        scores = [_crps(runs, self.target, valid)]
        for lag in LAGS:
            if lag < valid.shape[1] and valid[:, lag:].any():
                made, wanted = (v[..., lag:, :] - v[..., :-lag, :] for v in (runs, self.target))
                scores.append(_crps(made, wanted, valid[:, lag:]))
        return np.stack(scores)

    def _start(self, run: int) -> PolicyState:
        """Memories after a first full solve, of several the one nearest to what was recorded."""
        planner, demos, count = _with(self.planner, None), self.demos, len(self.demos.action)
        rows = np.repeat(np.arange(count), DRAWS)
        first = self.seed + run * len(rows)
        state = planner.initial_state(range(first, first + len(rows)))
        state = planner.observe(take(demos.obs, (rows, 0)), state)
        state = told(state, self.cond, rows, 0)
        state = planner.replan(state, np.arange(len(rows)))
        ahead = state.plan[:, planner.n_obs_steps - 1 :, -self.target.shape[-1] :]
        length = min(ahead.shape[1], demos.action.shape[1])
        away = np.square(ahead[:, :length] - self.target[rows, :length]).sum(2)
        distance = (away * demos.valid[rows, :length]).sum(1).reshape(count, DRAWS)
        return state.take(distance.argmin(1) + np.arange(count) * DRAWS)

    def probe(self, points: int = 512) -> _Probe:
        """Two full solves an episode part apart, at random decision points."""
        planner = _with(self.planner, None)
        rng = np.random.default_rng(self.seed)
        before = planner.n_action_steps
        rows, steps = np.nonzero(self.demos.valid[:, before:])
        if len(rows) == 0:
            raise ValueError(f"no demonstration is longer than n_action_steps={before}")
        chosen = rng.permutation(len(rows))[:points]
        rows, steps = rows[chosen], steps[chosen]  # the earlier decision; the later is `before` on

        def planned(at: Array, seed: int) -> PolicyState:
            state = planner.initial_state(range(seed, seed + len(rows)))
            for back in range(planner.n_obs_steps - 1, -1, -1):
                seen = take(self.demos.obs, (rows, np.maximum(at - back, 0)))
                state = planner.observe(seen, state)
            return planner.replan(told(state, self.cond, rows, at), np.arange(len(rows)))

        guesses = []
        now = planned(steps + before, self.seed)
        for seed in (self.seed, self.seed + len(rows)):
            last = planned(steps, seed)
            moved = replace(now, plan=last.plan, cursor=last.cursor + before)
            guesses.append(_with(self.planner, self.settings).shifted(moved))
        ahead = slice(planner.n_obs_steps - 1, planner.n_obs_steps - 1 + before)
        error = guesses[0][:, ahead] - self.said(now).numpy()[:, ahead]
        shift_error = float(np.sqrt(np.square(error).mean()))
        return _Probe(now, (guesses[0], guesses[1]), shift_error)

    def contraction(self, warm: DiffusionPlanner, probe: _Probe) -> tuple[float, float | None]:
        """Part of the difference of two guesses that is left after a warm solve.

        Returns:
            Measured, and in closed form for plans that are locally Gaussian, coordinate by
            coordinate (of DDIM; None for other solvers).
        """
        loop = warm.loop("warm")
        noise = warm.draw_noise(probe.state, loop.draws, False)
        told = warm.told(loop, probe.state)
        with warm._no_graph():
            ends = [
                loop(told, torch.from_numpy(g).to(warm.device), noise).cpu().numpy()
                for g in probe.guesses
            ]
        ahead = slice(warm.n_obs_steps - 1, warm.n_obs_steps - 1 + warm.n_action_steps)
        gap, left = (np.square((a - b)[:, ahead]) for a, b in (probe.guesses, ends))
        total = max(float(gap.mean()), 1e-12)
        measured = math.sqrt(float(left.mean()) / total)
        rti = self.settings
        if not isinstance(rti, RTI) or rti.solver != "ddim" or rti.options:
            return measured, None
        grid = loop.levels.max(-1, keepdim=True).values
        spread = self.local_std(probe.state, float(grid[0]))
        factor = ddim_contraction(warm.denoiser.process, grid, spread).numpy()[:, ahead]
        if not rti.renoise:  # the guess is not scaled by alpha then
            factor = factor / float(warm.denoiser.process.alpha(grid[0]))
        return measured, math.sqrt(float((factor**2 * gap).mean()) / total)

    def said(self, now: PolicyState) -> Tensor:
        """The plans of memories right after planning, as the network said them."""
        return self.planner.boundary.relative(torch.from_numpy(now.plan), now_of(now.history))

    def local_std(self, now: PolicyState, t: float, draws: int = 8) -> Tensor:
        """Spread of plans around their mode as the denoiser sees it at level ``t``.

        A Gaussian of standard deviation s has denoising error ``s^2 sigma^2 / (alpha^2 s^2 +
        sigma^2)``; s is what explains the error measured. The higher the level, the more modes are
        one to it.

        Returns:
            ``[n, H, A]`` in [0, 1].
        """
        denoiser: Denoiser = self.planner.denoiser
        plan = self.said(now).to(self.planner.device)
        cond = self.planner.on_device(now.memory["cond"])
        generator = torch.Generator().manual_seed(self.seed)
        at = torch.full((1, 1, 1), t, dtype=plan.dtype, device=plan.device)
        alpha, sigma = denoiser.process.alpha(at), denoiser.process.sigma(at)
        error = torch.zeros_like(plan)
        with torch.inference_mode():
            for _ in range(draws):
                noise = torch.randn(plan.shape, generator=generator).to(plan)
                found = denoiser(alpha * plan + sigma * noise, at, cond).x0_hat
                error += (found - plan).square() / draws
        left = (sigma.square() - alpha.square() * error).clamp_min(1e-12)
        return (error * sigma.square() / left).sqrt().clamp(max=1.0).cpu()


def ddim_contraction(process: GaussianProcess, grid: Tensor, std: Tensor) -> Tensor:
    """The part of a guess's error that survives noising and DDIM, coordinate by coordinate.

    Args:
        process: the noise process.
        grid: levels from the start down that DDIM steps along, ``[K + 1, ...]`` with one entry
            each.
        std: standard deviation of every coordinate around its mode, any shape.

    Returns:
        ``alpha(t_start) prod_k (alpha alpha' s^2 + sigma sigma') / V``, the shape of ``std``.
    """
    t = grid.double().reshape(len(grid), -1)[:, 0]
    alpha, sigma = process.alpha(t), process.sigma(t)
    factor = alpha[0] * torch.ones_like(std, dtype=torch.float64)
    for k in range(len(t) - 1):
        inner = alpha[k] * alpha[k + 1] * std.square() + sigma[k] * sigma[k + 1]
        factor = factor * inner / ((alpha[k] * std).square() + sigma[k].square())
    return factor


def _crps(runs: Array, target: Array, valid: Array) -> Array:
    """``E|X - y| - E|X - X'| / 2`` per dimension ``[D]``, of runs ``[R, E, T, D]``."""
    error = np.abs(runs - target).mean(0)
    pairs = [np.abs(a - b) for i, a in enumerate(runs) for b in runs[:i]]
    out: Array = (error - 0.5 * np.mean(pairs, 0))[valid].mean(0)
    out[np.ptp(target[valid], axis=0) < 1e-3] = 1.0  # no skill to show where nothing ever happens
    return np.maximum(out, 1e-3)  # below a two-thousandth of the range differences mean nothing
