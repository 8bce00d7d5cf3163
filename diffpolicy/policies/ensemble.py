"""Temporal ensembling: plan at every step, execute the average of all plans made for the step.

Zhao et al. 2023 (ACT, arXiv 2304.13705), section IV-B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from diffpolicy.data.observation import Obs
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState, Rows


class WrappedPolicy(ChunkedPolicy):
    """A policy around another one: it observes, starts and acts as that does, unless it says how.

    Args:
        policy: the one inside.
        n_action_steps: actions executed per plan; those of the one inside when absent.
    """

    def __init__(self, policy: ChunkedPolicy, n_action_steps: int | None = None) -> None:
        names = ("obs_dim", "action_dim", "horizon", "n_obs_steps")
        sizes = {name: getattr(policy, name) for name in names}
        steps = n_action_steps or policy.n_action_steps
        super().__init__(**sizes, n_action_steps=steps, observations=policy.observed)
        self.policy, self.plan_dim = policy, policy.plan_dim
        self.action_dtype, self.chooses = policy.action_dtype, policy.chooses

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        return self.policy.initial_state(seeds)

    def observe(self, obs: Obs, state: PolicyState) -> PolicyState:
        return self.policy.observe(obs, state)

    def starts_warm(self, state: PolicyState) -> Array:
        return self.policy.starts_warm(state)

    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, ...]:
        return self.policy.make_plans(state, deterministic=deterministic)

    def to_actions(self, normalised: Array) -> Array:
        return self.policy.to_actions(normalised)


class TemporalEnsemble(WrappedPolicy):
    """Averages the plans of another policy, which plans anew at every step.

    The prediction i for a time step, i = 0 the oldest, has weight ``exp(-m i)``. The averages are
    updated as plans come, in ``state.memory["average"]`` ``[N, H, A]`` (normalised) and
    ``["count"]`` ``[N, H]``, aligned with the last plan. ``state.plan`` remains the policy's own
    last plan: warm starts, streaming buffers and chunk blending go on from that.

    Args:
        policy: any chunked policy; its own ``n_action_steps`` is not used.
        m: 0 weighs all predictions alike, the larger the more the oldest counts (0.01 in ACT),
            negative favours the newest.

    Raises:
        ValueError: ``m`` is not finite, or the policy is an ensemble already.
    """

    def __init__(self, policy: ChunkedPolicy, m: float = 0.01) -> None:
        if not math.isfinite(m):
            raise ValueError(f"m must be a finite number, got {m}")
        if isinstance(policy, TemporalEnsemble):
            raise ValueError("this policy averages its plans already; wrap the one inside")
        super().__init__(policy, n_action_steps=1)
        self.m = float(m)

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        state = super().initial_state(seeds)
        return state.remember(
            average=np.zeros_like(state.plan), count=np.zeros(state.plan.shape[:2], np.int64)
        )

    def with_plan_batch(self, size: int | None) -> TemporalEnsemble:
        other = super().with_plan_batch(size)
        other.policy = self.policy.with_plan_batch(size)
        return other

    def replan(self, state: PolicyState, rows: Rows, *, deterministic: bool = False) -> PolicyState:
        before = state.take(rows)
        planned = self.policy.replan(state, rows, deterministic=deterministic)
        after = planned.take(rows)
        average, count = self._shifted(before)
        share = newest_share(count, self.m)[..., None]
        average = average + share * (after.plan - average)
        merged = after.remember(average=average.astype(np.float32), count=count + 1)
        return planned.put(rows, merged)

    def _shifted(self, state: PolicyState) -> tuple[Array, Array]:
        """Averages and counts moved up by the steps executed; none where nothing was predicted."""
        position = np.arange(self.horizon) + self.executed(state)[:, None]
        known = (position < self.horizon) & state.warm[:, None]
        position = np.minimum(position, self.horizon - 1)
        rows = np.arange(len(state))[:, None]
        count = np.where(known, state.memory["count"][rows, position], 0)
        return state.memory["average"][rows, position], count

    def execute(self, state: PolicyState) -> tuple[Array, PolicyState]:
        position = np.minimum(state.cursor, self.horizon - 1)
        actions = self.to_actions(state.memory["average"][np.arange(len(state)), position])
        return actions, replace(state, cursor=state.cursor + 1)


def newest_share(count: Array, m: float) -> Array:
    """Weight of a new prediction beside ``count`` older ones.

    That is ``exp(-m count) / sum_{i <= count} exp(-m i)``; 1 where there are none.
    """
    if m == 0:
        even: Array = 1 / (count + 1.0)
        return even
    # Written with exponents below 0 only, so that nothing overflows.
    share: Array = np.expm1(-abs(m)) / np.expm1(-abs(m) * (count + 1.0))
    return share * np.exp(-m * count) if m > 0 else share
