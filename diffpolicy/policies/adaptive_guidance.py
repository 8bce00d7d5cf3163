"""Adaptive guidance: where the unconditional branch of classifier-free guidance may be dropped.

Castillo et al. 2023 (arXiv 2312.12487) stop asking it once both branches agree, which they decide
for every sample while it is drawn. A loop that decides from data reads the device in every step, so
here the level is found once, on recorded observations, and kept with the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diffpolicy.core.sampling import Trajectory, sample
from diffpolicy.data.observation import take
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.policies.base import PolicyState
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.recorded import Demonstrations


@dataclass(frozen=True)
class SwitchReport:
    """Why a level was chosen.

    Attributes:
        t_min: guidance ends at this level; 0: it goes on to the end.
        levels: of the evaluations, first to last.
        agreement: cosine between the noise that the two branches predict, the ``quantile`` of the
            observations, at each of them.
        branches: network branches per plan with the switch.
        branches_before: without it.
    """

    t_min: float
    levels: tuple[float, ...]
    agreement: tuple[float, ...]
    branches: int
    branches_before: int


def observed(planner: DiffusionPlanner, demos: Demonstrations, seed: int) -> PolicyState:
    """The memory of one row per demonstration that has observed its first steps."""
    state = planner.initial_state(range(seed, seed + len(demos.valid)))
    rows, last = np.arange(len(demos.valid)), demos.valid.sum(1) - 1
    for step in range(planner.n_obs_steps):
        seen = take(demos.obs, (rows, np.minimum(step, last)))
        state = planner.observe(seen, state)
    return state


@torch.no_grad()
def switching_level(
    planner: DiffusionPlanner,
    state: PolicyState,
    *,
    threshold: float = 0.991,
    quantile: float = 0.1,
) -> SwitchReport:
    """The level from which on both branches agree, on plans for the observations in ``state``.

    Args:
        planner: a policy with ``sampler.guidance_scale`` other than 1.
        state: memory of rows that have observed; their streams give the noise.
        threshold: the unconditional branch is dropped from where the agreement reaches this (the
            paper's) for good; 1: only where the two are equal.
        quantile: of the rows, that must agree: 0.1 lets every tenth agree less.

    Raises:
        ValueError: a policy that is not guided, or not sampled from pure noise.
    """
    scale = planner.spec.sampler.guidance_scale
    if scale == 1 or planner.layout.pinned or planner.spec.truncated is not None:
        raise ValueError(
            "adaptive guidance needs a policy of plans of actions that are drawn from pure noise "
            f"with sampler.guidance_scale other than 1; this one has {scale}"
        )
    process, loop = planner.denoiser.process, planner.loop("cold", deterministic=True)
    noise = loop.tempered(planner.draw_noise(state, max(loop.draws, 1), deterministic=False))
    cond = planner.encoded(state.history)
    guided = ClassifierFreeGuidance(planner.denoiser, scale, clip=planner.spec.clip)
    own = noise[loop.draws - loop.nfe :] if loop.grid.stochastic else None
    start = loop.begin(noise[0], noise)
    run = sample(guided, loop.solver, start, loop.levels, cond=cond, noise=own, record=True)
    assert isinstance(run, Trajectory)
    found = []
    for step in run.transitions:
        answers = [
            planner.denoiser(step.x, step.t.to(step.x), one).x0_hat
            for one in (cond, torch.zeros_like(cond))
        ]
        alpha, sigma = process.alpha(step.t).to(step.x), process.sigma(step.t).to(step.x)
        first, second = (((step.x - alpha * x0_hat) / sigma).flatten(1) for x0_hat in answers)
        cosine = torch.cosine_similarity(first, second, dim=1)
        found.append(float(cosine.double().quantile(quantile)))
    visited = [float(step.t.max()) for step in run.transitions]
    # At high noise both predict little but the noise that they see: agreement must last.
    differs = [i for i, value in enumerate(found) if value < threshold - 1e-6]
    switch, t_min = (differs[-1] + 1 if differs else 0), 0.0
    if switch < len(found):  # between two levels, so that rounding decides nothing
        t_min = 1.0 if switch == 0 else 0.5 * (visited[switch] + visited[switch - 1])
    return SwitchReport(t_min, tuple(visited), tuple(found), len(found) + switch, 2 * len(found))
