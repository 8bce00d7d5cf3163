"""Plans as a control loop sees them: checked actions in environment units, laid out in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffpolicy.data.fields import checked_bounds, inward_bounds
from diffpolicy.data.observation import Obs, stack, take
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.settings import check_shape

_FIRST = np.zeros(1, np.int64)


class ActionLimits:
    """What may be sent to the robot.

    Args:
        safe: the action ``[A]`` of last resort, in environment units, within bounds: what makes the
            robot stand still. For position control its position at the start, say.
        low: lower bounds ``[A]`` or one number; ``None``: unbounded.
        high: upper bounds, likewise.

    Raises:
        ValueError: shapes that do not match, bounds that are NaN or in the wrong order, or a safe
            action that is not finite or not within them.
    """

    def __init__(
        self,
        safe: Sequence[float] | Array,
        *,
        low: float | Sequence[float] | Array | None = None,
        high: float | Sequence[float] | Array | None = None,
    ) -> None:
        given = np.array(safe, np.float64)
        if given.ndim != 1 or not len(given) or not np.isfinite(given).all():
            raise ValueError(f"the safe action must be finite numbers [A], got {safe!r}")
        bounds = checked_bounds(
            -np.inf if low is None else low, np.inf if high is None else high, given.shape
        )
        assert bounds is not None
        if not ((bounds[0] <= given) & (given <= bounds[1])).all():
            raise ValueError(f"the safe action {safe!r} is not within {low!r} .. {high!r}")
        # Actions are in single precision; bounds are rounded inwards, so that none passes them.
        self.low, self.high = inward_bounds(*bounds)
        self.safe = np.clip(given.astype(np.float32), self.low, self.high)
        self.safe.setflags(write=False)
        scale = np.maximum(np.abs(self.low), np.abs(self.high))
        # A policy's own clipping may miss a bound by its rounding; that is put right, not refused.
        self._slack = np.where(np.isfinite(scale), 1e-6 * scale, 0).astype(np.float32)

    def check(self, actions: Array) -> tuple[Array, list[bool]]:
        """Read-only float32 actions ``[S, A]``, and which of them ``[S]`` may be sent."""
        given = np.asarray(actions, np.float32)
        check_shape("actions", given.shape, ("S", len(self.safe)))
        with np.errstate(invalid="ignore"):  # a comparison with NaN is False, as it should be
            inside = (given >= self.low - self._slack) & (given <= self.high + self._slack)
            good: Array = np.all(inside & np.isfinite(given), axis=1)
            kept = np.clip(given, self.low, self.high)
        kept.setflags(write=False)
        return kept, good.tolist()


class UnusablePlanError(ValueError):
    """A plan that is no array of the policy's shape and of real numbers."""


def _check_array(what: str, value: Any, shape: tuple[int, ...]) -> None:
    got = type(value).__name__
    if isinstance(value, np.ndarray):
        if value.shape == shape and value.dtype.kind == "f":
            return
        got = f"{value.dtype.name} {list(value.shape)}"
    raise UnusablePlanError(f"{what} must be a float array {list(shape)}, got {got}")


@dataclass(frozen=True, slots=True)
class Track:
    """A plan laid out in time.

    Attributes:
        tick: of the observation that the plan was made from.
        start: at which its first action is to be taken.
        state: the policy's memory right after planning, one row.
        actions: in environment units, one per tick from ``start`` on.
        good: which of them may be sent.
        finite: the whole plan is finite, so that the next may start from it.
        nfe: network evaluations it took.
        refined: it is a one-evaluation refinement.
        warm: it was started from the last plan (not so after a jump of the observation).
    """

    tick: int
    start: int
    state: PolicyState
    actions: list[Array]
    good: list[bool]
    finite: bool
    nfe: int
    refined: bool = False
    warm: bool = True


class TrackMaker:
    """Makes tracks with a policy; pure, so any thread may call it.

    Args:
        policy: the policy.
        limits: what may be sent.
        deterministic: as in ``ChunkedPolicy.act``.

    Raises:
        TypeError: a policy that is no ``ChunkedPolicy``.
        ValueError: limits for another number of action dimensions.
    """

    def __init__(
        self, policy: ChunkedPolicy, limits: ActionLimits, *, deterministic: bool = False
    ) -> None:
        if not isinstance(policy, ChunkedPolicy):
            raise TypeError(f"the executor drives a ChunkedPolicy, got {type(policy).__name__}")
        size = len(limits.safe)
        if size != policy.action_dim:
            own = f"the policy's actions have {policy.action_dim}"
            raise ValueError(f"the safe action has {size} dimensions, {own}")
        self.policy, self.limits, self.deterministic = policy, limits, deterministic
        # What is done in the base class's way is done for all ticks at once.
        kind = type(policy)
        self._plain_execute = kind.execute is ChunkedPolicy.execute
        self._plain = self._plain_execute and kind.observe is ChunkedPolicy.observe
        self.length = policy.horizon - policy.n_obs_steps + 1
        # Observations that a memory can depend on, beyond which its plan is over anyway.
        self.trail_length = policy.horizon + policy.n_obs_steps

    def snapshot(
        self,
        memory: PolicyState,
        since: int | None,
        trail: Sequence[Obs],
        *,
        delay: int = 0,
        failures: int = 0,
    ) -> PolicyState:
        """The memory at the last observation of ``trail``.

        Args:
            memory: cold, or right after planning.
            since: ticks between that plan's first action and now; ``None`` for a cold memory.
            trail: the last observations (``[O]``, or arrays by name), oldest first.
            delay: ticks that the next plan is expected to take.
            failures: plans that failed since ``memory``; their noise is used up, and the same noise
                might only fail again.
        """
        policy = self.policy
        expected = np.array([delay])
        counter = memory.counter + failures if failures else memory.counter
        if since is not None and self._plain:
            seen = list(trail[-policy.n_obs_steps :])
            seen = seen[:1] * (policy.n_obs_steps - len(seen)) + seen
            history, cursor = take(stack(seen), None), memory.cursor + since
            return replace(memory, history=history, cursor=cursor, delay=expected, counter=counter)
        state, length = memory, policy.n_obs_steps if since is None else since
        for obs in trail[max(len(trail) - length, 0) :]:  # live through the ticks since then
            if since is not None and self._plain_execute:
                state = replace(state, cursor=state.cursor + 1)
            elif since is not None:
                state = policy.execute(state)[1]
            state = policy.observe(take(obs, None), state)
        return replace(state, delay=expected, counter=counter)

    def make(self, snapshot: PolicyState, tick: int) -> Track:
        """A plan for the observation of ``tick``, the last one in ``snapshot``."""
        planned = self.policy.replan(snapshot, _FIRST, deterministic=self.deterministic)
        _check_array("a plan", planned.plan, snapshot.plan.shape)
        decoded = self._decode(planned)
        _check_array("the actions of a plan", decoded, (self.length, self.policy.action_dim))
        actions, good = self.limits.check(decoded)
        finite = bool(np.isfinite(planned.plan).all() and np.isfinite(actions).all())
        nfe = int(planned.nfe[0] - snapshot.nfe[0])
        warm = bool(self.policy.starts_warm(snapshot)[0])
        return Track(tick, tick, planned, list(actions), good, finite, nfe, warm=warm)

    def _decode(self, state: PolicyState) -> Array:
        policy = self.policy
        if self._plain_execute:
            return policy.to_actions(state.plan[0, policy.n_obs_steps - 1 :])
        actions = []
        for _ in range(self.length):
            action, state = policy.execute(state)
            actions.append(action[0])
        return np.stack(actions)
