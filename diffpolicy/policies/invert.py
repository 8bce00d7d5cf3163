"""The noise of given actions, and actions of such noise: a policy's sampling, run backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core import bdia
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.starts import Start, level, levels
from diffpolicy.data.observation import Obs, count
from diffpolicy.policies.base import Array
from diffpolicy.policies.boundary import now_of
from diffpolicy.policies.direct import direct_class
from diffpolicy.policies.few_steps import check_follows_paths
from diffpolicy.settings import check_range, check_shape

if TYPE_CHECKING:
    from diffpolicy.policies.diffusion import DiffusionPlanner
    from diffpolicy.policies.plan_loop import PlanLoop


class Inversion(NamedTuple):
    """Where plans come from; :func:`restore` makes actions of it again.

    Attributes:
        noise: ``[N, H, P]`` at level 1, about standard normal where the policy knows such plans.
        second: the state after it, ``[N, H, P]``, without which the way back is not exact.
        levels: host grid of the chain, ``[K + 1, 1, 1, 1]``.
    """

    noise: Tensor
    second: Tensor
    levels: Tensor


def invert(
    policy: DiffusionPlanner, history: Obs, actions: Array, *, num_steps: int = 20
) -> Inversion:
    """The noise that a policy makes given actions of, by BDIA (:mod:`diffpolicy.core.bdia`).

    Args:
        policy: whose plans; classifier-free guidance is part of it.
        history: raw observations ``[N, To, ...]``, oldest first, one or by name.
        actions: whole plans ``[N, H, A]`` in environment units; position ``To - 1`` is the step of
            the newest observation.
        num_steps: evaluations, at least 2. More: the noise is nearer to that of the exact flow.

    Raises:
        ValueError: a policy whose plans hold observations or are made in one call, a student of few
            steps, guidance by costs, fewer than two steps, or actions of another shape.

    Example:
        >>> found = policy.invert(history, actions)
        >>> same = policy.restore(history, found)  # the actions, to rounding
        >>> other = policy.restore(elsewhere, found)  # what the same noise is in another state
    """
    loop = _loop(policy)
    check_range("[2, inf)", num_steps=num_steps)
    wanted = (count(history), policy.horizon, policy.action_dim)
    check_shape("actions", np.shape(actions), wanted)
    entries = policy.boundary.entries(np.asarray(actions, np.float32))
    plan = policy.boundary.relative(torch.from_numpy(np.asarray(entries)), now_of(history))
    with torch.no_grad():
        cond = loop.condition(policy.on_device(history))
        grid = _levels(policy.denoiser.process, num_steps)
        states = bdia.invert(loop.denoiser, policy.on_device(plan.numpy()), grid, cond=cond)
    return Inversion(*states, grid)


def restore(policy: DiffusionPlanner, history: Obs, inversion: Inversion) -> Array:
    """Actions ``[N, H, A]``, within bounds, of an :func:`invert`-ed plan in a state.

    Of the same ``history`` they are the actions that were inverted, to rounding; of another one,
    what the policy makes of the same noise there.
    """
    loop, states = _loop(policy), bdia.Inverted(inversion.noise, inversion.second)
    with torch.no_grad():
        cond = loop.condition(policy.on_device(history))
        plan = bdia.restore(loop.denoiser, states, inversion.levels, cond=cond)
    absolute = policy.boundary.absolute(plan.cpu(), now_of(history)).numpy()
    return policy.to_actions(absolute)


def _loop(policy: DiffusionPlanner) -> PlanLoop:
    """A loop of the policy, for its denoiser with guidance and for its condition."""
    if policy.spec.layout != "action" or direct_class(policy.spec) is not None:
        raise ValueError(
            "inversion is of plans of actions that are drawn from noise; this policy has layout="
            f"{policy.spec.layout!r} and network {policy.spec.network.get('type')!r}"
        )
    check_follows_paths(policy.spec, "inversion follows")
    if policy.spec.guidance is not None:
        raise ValueError(
            "plans that a cost forbids come from no noise: invert without guidance by costs "
            "(policy.with_guidance())"
        )
    return policy.loop(policy.kinds[0])


def _levels(process: GaussianProcess, num_steps: int) -> Tensor:
    """From 1 to the lowest level that networks know: at 0 nothing of the noise is left.

    Even in log SNR, or the last step would multiply rounding errors by a large ratio of sigmas.
    """
    top = level(1.0, torch.zeros(1, 1, 1))
    last = max(1e-3, process.first_level)
    return levels(
        Start(torch.zeros(1, 1, 1), top), num_steps, end=last, spacing="log_snr", process=process
    )
