"""Any chunked policy under simulated inference latency, so that a score can be had per latency.

Control ticks every ``control_ms``. A plan made from the observation of tick ``k`` that takes ``L``
milliseconds is there at tick ``k + d``, ``d = ceil(L / control_ms)``; until then the robot goes on
with its old plan. Nothing here waits: the world of a simulator stands still while a plan is
computed, and the delay is put back by holding the plan from the robot for ``d`` ticks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from diffpolicy.data.observation import put, take
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.policies.holding import hold_limit, holds
from diffpolicy.settings import check_choice, check_range, check_shape


@dataclass(frozen=True)
class PlanRequest:
    """The plans whose latency is asked for; every array has a row per plan.

    Attributes:
        seed: stream of the row's randomness ``[n]``.
        number: plans drawn from that stream before this one ``[n]``.
        warm: the row had a plan of its episode to start from ``[n]``.
        nfe: network evaluations that the plan took ``[n]``.
    """

    seed: Array
    number: Array
    warm: Array
    nfe: Array


Latency = Callable[[PlanRequest], Any]


@dataclass(frozen=True)
class LinearLatency:
    """Latency that grows with the evaluations: ``base_ms`` and ``per_nfe_ms`` for each."""

    base_ms: float
    per_nfe_ms: float

    def __call__(self, request: PlanRequest) -> Array:
        """Milliseconds ``[n]``."""
        return np.asarray(self.base_ms + self.per_nfe_ms * request.nfe, np.float64)


@dataclass(frozen=True)
class DelayedState:
    """Memory of a :class:`DelayedPolicy` for N rows.

    Attributes:
        running: the policy's memory with the plan that is being executed.
        pending: the same with the plan that is under way, advanced tick by tick as if it were
            executed already; of no meaning in rows with ``wait`` 0.
        wait: ticks until the pending plan is there, 0 = none is under way ``[N]``.
        expected: ticks that the next plan is expected to take, cold and warm ``[N, 2]``.
        action: action of the last tick in environment units ``[N, A]``.
        acted: the episode has had an action ``[N]``.
        starved: ticks in a row that had no action of a plan ``[N]``.
        totals: sums over all ticks of a row, see :meth:`DelayedPolicy.statistics`.
    """

    running: PolicyState
    pending: PolicyState
    wait: Array
    expected: Array
    action: Array
    acted: Array
    starved: Array
    totals: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.wait)

    @property
    def nfe(self) -> Array:
        """Network evaluations so far ``[N]``, those of a plan under way included."""
        return np.where(self.wait > 0, self.pending.nfe, self.running.nfe)

    @property
    def plans(self) -> Array:
        """Plans begun so far ``[N]``."""
        return np.where(self.wait > 0, self.pending.plans, self.running.plans)

    def take(self, rows: Array | Sequence[int]) -> DelayedState:
        """The state of some rows (indices or a bool mask)."""
        own = {name: take(getattr(self, name), rows) for name in _ARRAYS}
        return DelayedState(self.running.take(rows), self.pending.take(rows), **own)

    def put(self, rows: Array | Sequence[int], other: DelayedState) -> DelayedState:
        """This state with ``rows`` replaced by those of ``other``."""
        own = {name: put(getattr(self, name), rows, getattr(other, name)) for name in _ARRAYS}
        running, pending = other.running, other.pending
        return DelayedState(self.running.put(rows, running), self.pending.put(rows, pending), **own)


_ARRAYS = ("wait", "expected", "action", "acted", "starved", "totals")
_COUNTS = ("ticks", "starved", "safe", "adopted", "seam", "inner")
_JUMPS = ("seam", "inner")  # where a plan was adopted, and within plans


class DelayedPolicy:
    """A chunked policy whose plans come late; it has ``initial_state``, ``act`` and ``forget``.

    - At most one plan of a row is under way. The next is begun when none is and the running one is
      due (``replan="due"``: ``n_action_steps`` ticks after its observation), or at once
      (``replan="always"``).
    - Meanwhile the old plan goes on, past its ``n_action_steps``. Beyond its end the row is starved
      and gets what :class:`~diffpolicy.runtime.executor.RealTimeExecutor` gives on its ladder
      ``("rest", "hold")``: its last action, for at most ``hold_ticks`` ticks in a row, then
      ``safe_action``. Such ticks are counted.
    - A plan is adopted aligned in time: actions whose tick has passed are skipped
      (``arrival="aligned"``); or it is executed from its start, late as it is
      (``arrival="start"``), as control loops do that know nothing of the delay.
    - Before planning, the memory's ``delay`` is set to the ticks that the plan is expected to take
      (the last plan of its kind, cold or warm; at first what ``latency_ms`` says of a warm plan
      with the evaluations of the first plan), for policies that freeze them; to 0 with
      ``arrival="start"``, where no action is skipped, so none is to be frozen. Its cursor stands
      where the running plan stood at the observation, so that a warm start shifts by the ticks
      between two observations.
    - The first plan of an episode is free: the robot stands still until it has one, and time starts
      then. That is so for every method, so none is charged for its cold start.

    With a latency of 0 the actions are those of ``policy``, bit for bit.

    Args:
        policy: the policy to delay.
        latency_ms: of a plan in milliseconds, <= 0 for none: a number; ``{"cold": x, "warm": y}``,
            by whether the row had a plan to start from when planning began; or a pure function of
            a :class:`PlanRequest` to ``[n]`` numbers, e.g. :class:`LinearLatency`.
        control_ms: milliseconds between two control ticks.
        hold_ticks: for how many ticks in a row a starved row repeats its last action; 0: not at
            all; ``None``: the actions of two plans, as in the executor.
        safe_action: what a row gets after that, ``[A]`` in environment units, the ``safe`` of the
            executor's limits; ``None``: zeros.
        replan: when the next plan is begun, ``"due"`` or ``"always"``.
        arrival: where a late plan is joined, ``"aligned"`` or ``"start"``.

    Raises:
        ValueError: a latency, period, safe action, ``replan`` or ``arrival`` that is none.
    """

    plan_batch: int | None = None

    def __init__(
        self,
        policy: ChunkedPolicy,
        latency_ms: float | Mapping[str, float] | Latency,
        control_ms: float,
        *,
        hold_ticks: int | None = None,
        safe_action: Sequence[float] | Array | None = None,
        replan: Literal["due", "always"] = "due",
        arrival: Literal["aligned", "start"] = "aligned",
    ) -> None:
        check_range("(0, inf)", control_ms=control_ms)
        check_choice("replan", replan, ("due", "always"))
        check_choice("arrival", arrival, ("aligned", "start"))
        self.policy, self.control_ms, self.replan = policy, float(control_ms), replan
        self.aligned = arrival == "aligned"
        self.latency = _latency(latency_ms)
        self.hold_ticks = hold_limit(policy, hold_ticks)
        wanted = np.zeros(policy.action_dim) if safe_action is None else safe_action
        self.safe_action = np.asarray(wanted, np.float64)
        check_shape("safe_action", self.safe_action.shape, (policy.action_dim,))
        if not np.isfinite(self.safe_action).all():
            raise ValueError(f"safe_action must be finite numbers, got {safe_action!r}")
        self.max_delay = policy.horizon - policy.n_obs_steps + 1  # a plan is stale from here on

    def with_plan_batch(self, size: int | None) -> DelayedPolicy:
        """This policy, planning in batches of constant size (see ``ChunkedPolicy``)."""
        other = copy.copy(self)
        other.policy, other.plan_batch = self.policy.with_plan_batch(size), size
        return other

    def initial_state(self, seeds: Sequence[int]) -> DelayedState:
        """Memory for ``len(seeds)`` environments at the start of an episode."""
        count = len(seeds)
        running = self.policy.initial_state(seeds)
        totals: dict[str, Array] = {name: np.zeros(count, np.int64) for name in _COUNTS}
        totals |= {f"{name}_{what}": np.zeros(count) for name in _JUMPS for what in ("sum", "max")}
        return DelayedState(
            running=running,
            pending=running,
            wait=np.zeros(count, np.int64),
            expected=np.zeros((count, 2), np.int64),
            action=np.zeros((count, self.policy.action_dim), np.float64),
            acted=np.zeros(count, bool),
            starved=np.zeros(count, np.int64),
            totals={**totals, "delays": np.zeros((count, self.max_delay + 1), np.int64)},
        )

    def forget(
        self, state: DelayedState, done: Array, seeds: Sequence[int] | None = None
    ) -> DelayedState:
        """Make rows cold for a new episode; a plan under way is dropped, the totals go on.

        ``done`` is bool ``[N]``, the rows to reset; ``seeds`` are new random streams for those
        rows, as in ``ChunkedPolicy.forget``.
        """
        done = np.asarray(done, bool)
        busy = np.flatnonzero(state.wait > 0)
        spent = state.pending.take(busy)  # what was drawn and spent stays drawn and spent
        current = replace(
            state.running.take(busy), counter=spent.counter, nfe=spent.nfe, plans=spent.plans
        )
        running = self.policy.forget(state.running.put(busy, current), done, seeds=seeds)
        rows = np.flatnonzero(done)
        cleared = self.initial_state(running.seed[rows].tolist())
        old = state.take(rows)
        fresh = replace(cleared, running=running.take(rows), totals=old.totals)
        return state.put(rows, fresh)

    def act(
        self, obs: Any, state: DelayedState, *, deterministic: bool = False
    ) -> tuple[Array, DelayedState]:
        """One action per environment.

        Args:
            obs: ``[N, O]``, or what else the policy observes.
            state: memory of N rows.
            deterministic: as in ``ChunkedPolicy.act``.

        Returns:
            Actions ``[N, A]`` in environment units, and the new memory.

        Raises:
            ValueError: wrong shape or non-finite observations, or a latency that is no number.
        """
        policy = self.policy
        running, pending = policy.observe(obs, state.running), state.pending
        busy = np.flatnonzero(state.wait > 0)
        if len(busy):
            # The pending plan lives through the same ticks as the running one, so whatever a
            # policy does in `observe` and `execute` has been done when the plan is adopted.
            shadow = policy.observe(take(obs, busy), pending.take(busy))
            pending = pending.put(busy, shadow)
        wait = np.maximum(state.wait - 1, 0)
        adopted = (state.wait > 0) & (wait == 0)
        if adopted.any():
            running = running.put(adopted, pending.take(adopted))
        state = replace(state, running=running, pending=pending, wait=wait)

        due = wait == 0
        if self.replan == "due":
            due = due & policy.needs_plan(running)
        if due.any():
            state, at_once = self._begin(state, np.flatnonzero(due), deterministic)
            adopted[at_once] = True
        return self._execute(state, adopted)

    def statistics(self, state: DelayedState) -> dict[str, Any]:
        """Totals over all rows and episodes of a state, ready for JSON.

        ``ticks``, ``starved_ticks``, ``safe_ticks`` of them, ``plans`` begun, ``adopted``, ``nfe``;
        ``delays``: how many plans took 0, 1, ... ticks (the last entry: so many that nothing of the
        plan was left), first plans left out; ``seam_jump`` and ``plan_jump``: mean and max
        Euclidean length (environment units) of ``a(k) - a(k - 1)`` where a plan was adopted at tick
        ``k``, and within plans.
        """
        counts = {name: int(state.totals[name].sum()) for name in _COUNTS}

        def jump(kind: str) -> dict[str, float]:
            mean = float(state.totals[f"{kind}_sum"].sum() / max(counts[kind], 1))
            most = float(state.totals[f"{kind}_max"].max(initial=0))
            return {"mean": mean, "max": most, "count": counts[kind]}

        return {
            "ticks": counts["ticks"],
            "starved_ticks": counts["starved"],
            "safe_ticks": counts["safe"],
            "plans": int(np.sum(state.plans)),
            "nfe": int(np.sum(state.nfe)),
            "adopted": counts["adopted"],
            "delays": state.totals["delays"].sum(axis=0).tolist(),
            "seam_jump": jump("seam"),
            "plan_jump": jump("inner"),
        }

    def _begin(
        self, state: DelayedState, rows: Array, deterministic: bool
    ) -> tuple[DelayedState, Array]:
        """Begin plans for ``rows``; also the rows whose plan is there at once."""
        before = state.running.take(rows)
        starts_warm = self.policy.starts_warm(before)
        kind = starts_warm.astype(np.int64)
        expected = state.expected[rows, kind]
        first = ~state.acted[rows]
        skipped = np.where(first | (not self.aligned), 0, np.minimum(expected, self.max_delay))
        snapshot = replace(before, delay=skipped)
        planned = self.policy.replan(snapshot, np.arange(len(rows)), deterministic=deterministic)
        request = PlanRequest(before.seed, before.counter, starts_warm, planned.nfe - before.nfe)
        measured = self._ticks(self.latency(request), len(rows))
        expectations = state.expected[rows]
        expectations[np.arange(len(rows)), kind] = measured
        warm = self._ticks(self.latency(replace(request, warm=np.ones_like(first))), len(rows))
        expectations[first, 1] = warm[first]  # until a warm plan was measured
        histogram = state.totals["delays"].copy()
        counted = np.flatnonzero(~first)
        histogram[rows[counted], np.minimum(measured[counted], self.max_delay)] += 1
        delay = np.where(first, 0, measured)
        late, at_once = delay > 0, delay == 0
        new = replace(
            state,
            running=state.running.put(rows[at_once], planned.take(at_once)),
            pending=state.pending.put(rows[late], planned.take(late)),
            wait=put(state.wait, rows, delay),
            expected=put(state.expected, rows, expectations),
            totals={**state.totals, "delays": histogram},
        )
        return new, rows[at_once]

    def _execute(self, state: DelayedState, adopted: Array) -> tuple[Array, DelayedState]:
        starved = state.running.cursor >= self.policy.horizon
        since = np.where(starved, state.starved + 1, 0)
        safe = ~holds(since, self.hold_ticks)
        actions, running = self.policy.execute(state.running)
        pending = state.pending
        busy = np.flatnonzero(state.wait > 0)
        if len(busy) and self.aligned:
            _, shadow = self.policy.execute(pending.take(busy))
            pending = pending.put(busy, shadow)
        if starved.any():
            # A policy's first plan has an action for its first tick, so there is one to hold.
            instead = np.where(safe[:, None], self.safe_action, state.action)
            actions = np.where(starved[:, None], instead, actions).astype(actions.dtype)
        new = replace(
            state,
            running=running,
            pending=pending,
            action=np.asarray(actions, np.float64),
            acted=np.ones_like(state.acted),
            starved=since,
            totals=self._counted(state, actions, adopted, starved, safe),
        )
        return actions, new

    def _counted(
        self, state: DelayedState, actions: Array, adopted: Array, starved: Array, safe: Array
    ) -> dict[str, Array]:
        jump = np.linalg.norm(actions - state.action, axis=1)
        known = state.acted & ~starved  # a held action makes no jump of a plan's
        seam, inner = known & adopted, known & ~adopted
        more = (np.ones_like(adopted), starved, safe, adopted, seam, inner)
        counted = dict(zip(_COUNTS, more, strict=True))
        totals = dict(state.totals) | {n: state.totals[n] + rows for n, rows in counted.items()}
        for name in _JUMPS:
            of_rows = np.where(counted[name], jump, 0)
            totals[f"{name}_sum"] = totals[f"{name}_sum"] + of_rows
            totals[f"{name}_max"] = np.maximum(totals[f"{name}_max"], of_rows)
        return totals

    def _ticks(self, latency_ms: Any, count: int) -> Array:
        values = np.asarray(latency_ms, np.float64)
        if values.shape not in ((), (count,)) or np.isnan(values).any():
            wanted = f"a number of milliseconds per plan, [{count}]"
            raise ValueError(f"latency_ms must return {wanted}; got {latency_ms!r}")
        # A latency of 0.15 s at a period of 0.05 s is 3 ticks, not the 4 that rounding may make.
        ticks = np.ceil(np.maximum(values, 0) / self.control_ms * (1 - 1e-12))
        ceiling = np.iinfo(np.int32).max
        return np.broadcast_to(np.minimum(ticks, ceiling).astype(np.int64), (count,))


def _latency(value: float | Mapping[str, float] | Latency) -> Latency:
    if callable(value):
        return value
    if not isinstance(value, Mapping):
        constant = _number(value)
        return lambda request: np.full(len(request.seed), constant)
    if set(value) != {"cold", "warm"}:
        got = sorted(value)
        raise ValueError(f"latency_ms as a mapping needs exactly 'cold' and 'warm', got {got}")
    cold, warm = _number(value["cold"]), _number(value["warm"])
    return lambda request: np.where(request.warm, warm, cold)


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not np.isfinite(float(value)):
        raise ValueError(f"a latency must be a finite number of milliseconds, got {value!r}")
    return float(value)
