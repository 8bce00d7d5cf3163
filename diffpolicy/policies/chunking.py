"""Real-time chunking: a new plan is computed while the last one runs, and goes on from it.

Black, Galliker & Levine 2025 (arXiv 2506.07339), for plain diffusion policies. The actions that
will be consumed meanwhile (``state.delay``) are frozen to the last plan's, the following ones
guided towards it with decaying weight, the rest is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.starts import shift_plan
from diffpolicy.guidance.pinned import PREFIX_MODES, PrefixCond, PrefixGuidance
from diffpolicy.policies.base import Array, PolicyState, Rows
from diffpolicy.policies.boundary import now_of
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.direct import refuse_direct
from diffpolicy.policies.ensemble import WrappedPolicy
from diffpolicy.policies.plan_loop import Condition, PlanLoop
from diffpolicy.policies.rows import kind_by_kind
from diffpolicy.settings import check_settings, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True)
class Chunking:
    """How a new plan follows the last one.

    Args:
        schedule: weights of the positions after the frozen ones. With c falling evenly from 1 to 0:
            ``"linear"`` c, ``"exp"`` ``c (e^c - 1) / (e - 1)`` (the paper's; leaves the last plan
            sooner), ``"ones"`` all 1 (the whole overlap is frozen), ``"zeros"`` none (a hard
            prefix).
        overlap: positions from the current step on that follow the last plan, the frozen ones
            among them; ``None``: all that is left of it.
        mode: see :class:`~diffpolicy.guidance.pinned.PrefixGuidance`. ``"soft"`` bounds the seam of
            every plan: it is at most ``1 - weight`` of what the two plans differ by there.
            ``"jacobian"`` lets the whole new plan settle on the mode of the last one, but where it
            does not succeed the seam may be a whole jump.
        max_weight: clip of the guidance of ``"jacobian"``.

    Raises:
        ValueError: settings out of range.
    """

    schedule: str = one_of("linear", "exp", "ones", "zeros")
    overlap: int | None = ranged("[0, inf)", None)
    mode: str = one_of(*PREFIX_MODES)
    max_weight: float = ranged("(0, inf)", 5.0)

    def __post_init__(self) -> None:
        check_settings(self)


def frozen_steps(delay: Array, valid: Array, n_obs_steps: int) -> Array:
    """Actions from the current step on that are frozen ``[n]``: ``min(delay, those left)``.

    The paper demands ``d <= H - s`` (s executed steps): the last plan must last until the next one
    is there. A row that breaks this has the actions frozen that exist; its robot holds the last one
    for the remaining steps, which no plan can undo.
    """
    left: Array = np.maximum(valid - (n_obs_steps - 1), 0)
    return np.minimum(delay, left)


def chunk_weights(
    delay: Array, valid: Array, n_obs_steps: int, horizon: int, settings: Chunking
) -> Array:
    """How closely each position of a new plan follows the last plan (paper, eq. 5).

    With c_i = (e - i) / (e - d + 1) for the steps d <= i < e from the current one, where d are
    frozen and e is the end of the overlap. The past positions are frozen too, unless nothing else
    follows (no delay under ``"zeros"``): then the new plan owes the last one nothing. Weights are 0
    beyond the end of the last plan: it is never padded.

    Args:
        delay: d, actions that will be consumed from the last plan before the new one is there,
            ``[n]``.
        valid: positions of the last plan left after shifting it to the present, ``[n]``.
        n_obs_steps: To; position ``To - 1`` is the current step.
        horizon: H.
        settings: schedule and overlap.

    Returns:
        float32 ``[n, H]`` in [0, 1].

    Raises:
        ValueError: a negative delay, or ``valid`` outside 0..H.
    """
    delay, valid = np.asarray(delay), np.asarray(valid)
    if (delay < 0).any() or (valid < 0).any() or (valid > horizon).any():
        wanted = f"delay must be at least 0 and valid in 0..{horizon}"
        raise ValueError(f"{wanted}; got {delay}, {valid}")
    now = n_obs_steps - 1
    left = np.maximum(valid - now, 0)
    frozen = frozen_steps(delay, valid, n_obs_steps)
    overlap = left if settings.overlap is None else np.minimum(settings.overlap, left)
    end = np.maximum(overlap, frozen)[:, None]
    step = np.arange(horizon) - now
    c = np.clip((end - step) / (end - frozen[:, None] + 1), 0, 1)
    curve = {
        "linear": c,
        "exp": c * np.expm1(c) / np.expm1(1),
        "ones": np.ones_like(c),
        "zeros": np.zeros_like(c),
    }[settings.schedule]
    weight = np.where(step < frozen[:, None], 1.0, curve) * (step < end)
    follows = (weight[:, now:] > 0).any(1)[:, None]
    weight[:, :now] = follows
    inside = np.arange(horizon) < valid[:, None]
    out: Array = (weight * inside).astype(np.float32)
    return out


def seam_jump(old_plan: Array, new_plan: Array, shift: Array, position: Array) -> Array:
    """Distance between two plans at the step where the new one takes over ``[n]``.

    ``|new[position] - old[position + shift]|`` (Euclidean, normalised units): what the action at
    that step changes by. Past the end of the old plan its last action would have been held.

    Args:
        old_plan: ``[n, H, A]``.
        new_plan: ``[n, H, A]``, made ``shift`` steps later.
        shift: steps executed between the two ``[n]``.
        position: in ``new_plan``, of the first action executed from it ``[n]``.
    """
    rows, last = np.arange(len(old_plan)), old_plan.shape[1] - 1
    before = old_plan[rows, np.minimum(position + shift, last)]
    after = new_plan[rows, np.minimum(position, last)]
    jump: Array = np.linalg.norm(after - before, axis=-1)
    return jump


class PrefixCondition(Condition):
    """What the denoiser is told, and the plan that it is to go on from.

    Its loop takes, beside history, guess and noise, ``prefix``: the last plan, shifted to the
    present ``[n, H, A]``, normalised; and ``weight`` ``[n, H, 1]``. Plans are exactly ``prefix``
    where ``weight`` is 1.

    Args:
        told: what the denoiser is told without it.
    """

    def __init__(self, told: Condition) -> None:
        super().__init__(told.normalizer, told.encoder, told.fields)
        self.told, self.guided = told, told.guided

    def forward(self, history: Any, *known: Tensor) -> PrefixCond:
        prefix, weight = known
        return PrefixCond(self.told(history), prefix, weight)

    def settled(self, plan: Tensor, given: PrefixCond) -> Tensor:
        # Solvers in noise form arrive within rounding.
        return torch.where(given.weight >= 1, given.prefix, plan)


def following(loop: PlanLoop, settings: Chunking) -> PlanLoop:
    """The loop of a policy without chunking as one whose plans follow a prefix."""
    return PlanLoop(
        PrefixGuidance(loop.denoiser, settings.mode, max_weight=settings.max_weight),
        loop.normalizer,
        loop.solver,
        loop.levels,
        start=loop.start,
        plan_shape=(*loop.obs_shape, loop.horizon, loop.action_dim),
        condition=PrefixCondition(loop.condition),
        temperature=loop.temperature,
        start_noise=loop.start_noise,
        teleport=loop.teleport,
    )


class RealTimeChunking(WrappedPolicy):
    """A diffusion policy whose warm plans go on from the one that is running.

    Set ``state.delay`` to the actions that will be consumed before a new plan is there (an executor
    does; 0 when control waits). ``state.memory`` reports, per row: ``seam``, the last
    :func:`seam_jump`; ``seam_max``, the largest of the episode; ``seams``, how many; ``short``, how
    many plans came later than the last one lasted (see :func:`frozen_steps`).

    Warm plans are sampled from noise, or with ``spec.rti`` from the planner's warm start. Cold
    plans are the planner's own.

    Args:
        planner: the policy to blend the plans of.
        settings: schedule, overlap and kind of guidance.

    Raises:
        ValueError: a planner whose plans do not come from its ``loop`` alone.
    """

    def __init__(self, planner: DiffusionPlanner, settings: Chunking | None = None) -> None:
        own_way = type(planner).make_plans is not DiffusionPlanner.make_plans
        if own_way or planner.spec.truncated is not None:
            kind = type(planner).__name__ if own_way else "a policy with truncated settings"
            raise ValueError(f"{kind} makes its plans in a way of its own; chunking guides others")
        if planner.spec.layout != "action":
            raise ValueError(f"chunking blends plans of actions, not of {planner.spec.layout!r}")
        refuse_direct(planner.spec, "real-time chunking")
        super().__init__(planner)
        self.planner, self.selector = planner, planner.selector
        self.settings = Chunking() if settings is None else settings
        self._loops = {
            (kind, fixed): following(planner.loop(kind, deterministic=fixed), self.settings)
            for kind in planner.kinds
            for fixed in (False, True)
        }

    def encoded_once(self, state: PolicyState) -> PolicyState:
        return self.planner.encoded_once(state)

    @property
    def max_delay(self) -> int:
        """The longest delay that the last plan outlasts, if it is replaced after Ta steps."""
        return self.horizon - (self.n_obs_steps - 1) - self.n_action_steps

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        count, state = len(seeds), super().initial_state(seeds)
        jumps = {name: np.zeros(count, np.float64) for name in ("seam", "seam_max")}
        return state.remember(**jumps, **{n: np.zeros(count, np.int64) for n in ("seams", "short")})

    def replan(self, state: PolicyState, rows: Rows, *, deterministic: bool = False) -> PolicyState:
        before = state.take(rows)
        planned = super().replan(state, rows, deterministic=deterministic)
        after = planned.take(rows)
        return planned.put(rows, after.remember(**self._seams(before, after)))

    def _seams(self, before: PolicyState, after: PolicyState) -> dict[str, Array]:
        """The report of new plans; rows without a last plan have no seam."""
        shift, warm = self.executed(before), before.warm
        valid = self.horizon - shift
        frozen = frozen_steps(before.delay, valid, self.n_obs_steps)
        jump = seam_jump(before.plan, after.plan, shift, self.n_obs_steps - 1 + before.delay)
        old = before.memory
        return {
            "seam": np.where(warm, jump, old["seam"]),
            "seam_max": np.where(warm, np.maximum(jump, old["seam_max"]), old["seam_max"]),
            "seams": old["seams"] + warm,
            "short": old["short"] + (warm & (frozen < before.delay)),
        }

    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, ...]:
        def solve(kind: int, rows: PolicyState) -> tuple[Array, ...]:
            if kind == 0:
                return self.planner.make_plans(rows, deterministic=deterministic)
            loop = self._loops["cold" if kind == 1 else "warm", deterministic]
            return self._blended(loop, rows, deterministic), np.full(len(rows), loop.nfe)

        return kind_by_kind(solve, state, self.plan_kinds(state))

    def plan_kinds(self, state: PolicyState) -> Array:
        """0: without a plan to follow; 1: follows it, sampled from noise; 2: from its own start."""
        # A row whose observation jumped still follows the plan that runs, but is sampled anew.
        anew = (self.planner.spec.rti is None) | state.memory.get("jumped", np.False_)
        kinds: Array = np.where(state.warm, np.where(anew, 1, 2), 0)
        return kinds

    @torch.no_grad()  # not inference_mode: the Jacobian needs a graph of its own
    def _blended(self, loop: PlanLoop, state: PolicyState, deterministic: bool) -> Array:
        planner, shift = self.planner, self.executed(state)
        sizes = self.n_obs_steps, self.horizon
        weight = chunk_weights(state.delay, self.horizon - shift, *sizes, self.settings)
        prefix = shift_plan(torch.from_numpy(state.plan), torch.from_numpy(shift))
        prefix = planner.boundary.relative(prefix, now_of(state.history))
        plans = loop(
            planner.told(loop, state),
            planner.on_device(planner.shifted(state)),
            planner.draw_noise(state, loop.draws, deterministic),
            prefix.to(planner.device),
            planner.on_device(weight[..., None]),
        )
        return planner._complete(plans.cpu().numpy(), state.history)
