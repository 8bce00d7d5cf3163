"""Policies as values: memory and randomness go in and come out, per environment row.

A policy plans ``horizon`` actions from its last ``n_obs_steps`` observations, executes
``n_action_steps`` of them and plans again. Everything it remembers is a :class:`PolicyState`; no
attribute of a policy changes while it acts.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from diffpolicy.data.observation import (
    Obs,
    ObsField,
    ObsFields,
    as_seen,
    by_store_field,
    count,
    each,
    put,
    take,
    to_fields,
    zeros,
)
from diffpolicy.policies.rows import in_batches
from diffpolicy.settings import check_range

if TYPE_CHECKING:
    from diffpolicy.policies.best_of_n import Selector

Array = npt.NDArray[Any]
Rows = Array | Sequence[int]  # of environments: their numbers


@dataclass(frozen=True)
class PolicyState:
    """Memory of a chunked policy for N environments; every array has N rows.

    Attributes:
        history: last observations ``[N, To, O]``, or such arrays by name, oldest first.
        plan: last plan ``[N, H, P]``, normalised; P = A, or O + A where plans hold observations.
        level: noise level that ``plan`` is at, 0 = clean ``[N]``.
        cursor: position in ``plan`` of the next action ``[N]``.
        fresh: no observation of this episode was seen yet ``[N]``.
        warm: ``plan`` belongs to this episode ``[N]``, so a warm start may use it.
        seed: stream of each row's randomness ``[N]``.
        counter: plans drawn from that stream ``[N]``.
        nfe: network evaluations so far ``[N]``.
        plans: plans so far ``[N]``.
        delay: actions that will be consumed from ``plan`` while the next one is computed ``[N]``;
            0 when control waits for its plans.
        memory: further per-row arrays ``[N, ...]`` of a kind of policy.
    """

    history: Obs
    plan: Array
    level: Array
    cursor: Array
    fresh: Array
    warm: Array
    seed: Array
    counter: Array
    nfe: Array
    plans: Array
    delay: Array
    memory: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cursor)

    def take(self, rows: Rows) -> PolicyState:
        """The state of some rows (indices or a bool mask)."""
        return PolicyState(**{n: take(getattr(self, n), rows) for n in _ROWS})

    def put(self, rows: Rows, other: PolicyState) -> PolicyState:
        """This state with ``rows`` replaced by those of ``other``."""
        pairs = {n: (getattr(self, n), getattr(other, n)) for n in _ROWS}
        return PolicyState(**{n: put(a, rows, b) for n, (a, b) in pairs.items()})

    def remember(self, **arrays: Array) -> PolicyState:
        """This state with some arrays of its memory replaced or added."""
        return self.having(memory={**self.memory, **arrays})

    def having(self, **changes: Any) -> PolicyState:
        """This state with some attributes replaced.

        As ``dataclasses.replace``, in a fifth of its time: several are made for every action.
        """
        other = object.__new__(PolicyState)
        other.__dict__.update(self.__dict__, **changes)
        return other


_ROWS = tuple(f.name for f in fields(PolicyState))


class ChunkedPolicy(abc.ABC):
    """History, chunk execution and per-row bookkeeping; subclasses say how a plan is made.

    Args:
        obs_dim: O.
        action_dim: A.
        horizon: plan length H.
        n_obs_steps: observations a plan sees, To. Position ``To - 1`` of a plan is the current
            step.
        n_action_steps: actions executed per plan, Ta.
        observations: what is observed, where that is several things by name.

    Attributes:
        observed: what a step's observation is made of.
        plan_dim: P, entries of a plan per step: A, unless a subclass says otherwise; the last A
            are the action.
        action_dtype: NumPy's type of the actions that :meth:`predict` returns; an integer's where
            all dimensions are whole numbers.
        chooses: an action is one whole number that chooses, as a ``Discrete`` space holds it.
        selector: chooses among several plans per decision; ``None``: one plan is made.
        plan_batch: rows that plan at once, see :meth:`with_plan_batch`; ``None``: all that are due.

    Raises:
        ValueError: a horizon too short for To and Ta.
    """

    action_dtype = "float32"
    chooses = False
    selector: Selector | None = None
    plan_batch: int | None = None

    def __init__(
        self,
        *,
        obs_dim: int,
        action_dim: int,
        horizon: int,
        n_obs_steps: int,
        n_action_steps: int,
        observations: ObsFields | None = None,
    ) -> None:
        check_horizon(horizon, n_obs_steps, n_action_steps)
        self.observed: ObsFields = observations or ObsField((obs_dim,))
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.plan_dim = action_dim
        self.horizon, self.n_obs_steps, self.n_action_steps = horizon, n_obs_steps, n_action_steps

    @abc.abstractmethod
    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, ...]:
        """Normalised plans ``[n, H, P]``, and the network evaluations ``[n]`` each took.

        ``state`` holds the rows that need a plan: their observations, and their last plan with the
        cursor where execution stands.
        """

    @abc.abstractmethod
    def to_actions(self, normalised: Array) -> Array:
        """Environment actions ``[N, A]``, within bounds, for normalised plan entries ``[N, P]``."""

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        """Memory for ``len(seeds)`` environments at the start of an episode.

        One random stream per seed.
        """
        count = len(seeds)
        return PolicyState(
            history=zeros(self.observed, (count, self.n_obs_steps)),
            plan=np.zeros((count, self.horizon, self.plan_dim), np.float32),
            level=np.zeros(count, np.float64),
            cursor=np.zeros(count, np.int64),
            fresh=np.ones(count, bool),
            warm=np.zeros(count, bool),
            seed=np.asarray(seeds, np.int64),
            counter=np.zeros(count, np.int64),
            nfe=np.zeros(count, np.int64),
            plans=np.zeros(count, np.int64),
            delay=np.zeros(count, np.int64),
        )

    def forget(
        self, state: PolicyState, done: Array, seeds: Sequence[int] | None = None
    ) -> PolicyState:
        """Make rows cold for a new episode.

        Args:
            state: memory of N rows.
            done: bool ``[N]``, the rows to reset.
            seeds: new random streams for those rows (``done.sum()`` of them), counted from 0 again;
                without them a row keeps its stream and goes on in it.
        """
        rows = np.flatnonzero(done)
        cleared = self.initial_state(state.seed[rows].tolist() if seeds is None else seeds)
        totals = state.take(rows)
        cleared = replace(cleared, nfe=totals.nfe, plans=totals.plans)
        return state.put(
            rows, cleared if seeds is not None else replace(cleared, counter=totals.counter)
        )

    def act(
        self, obs: Obs, state: PolicyState, *, deterministic: bool = False
    ) -> tuple[Array, PolicyState]:
        """One action per environment: observe, plan where a plan is due, execute.

        Args:
            obs: ``[N, O]``, or arrays ``[N, ...]`` by name.
            state: memory of N rows.
            deterministic: fixed noise and no noise in the solver: the same observations give the
                same actions.

        Returns:
            Actions ``[N, A]`` in environment units, and the new memory.

        Raises:
            ValueError: wrong shape or non-finite observations.
        """
        state = self.observe(obs, state)
        due = np.flatnonzero(self.needs_plan(state))
        if len(due):
            state = self.replan(state, due, deterministic=deterministic)
        return self.execute(state)

    def observe(self, obs: Obs, state: PolicyState) -> PolicyState:
        """The memory after observing ``obs`` of N rows; an episode's first one fills the history.

        Raises:
            ValueError: wrong shape or non-finite observations.
        """
        obs = self._checked(obs, len(state))

        def followed(history: Array, newest: Array) -> Array:
            out = np.concatenate([history[:, 1:], newest[:, None]], axis=1)
            out[state.fresh] = newest[state.fresh, None]
            return out

        history = each(followed, state.history, obs)
        return state.having(history=history, fresh=np.zeros_like(state.fresh))

    def needs_plan(self, state: PolicyState) -> Array:
        """Rows whose next action needs a new plan, bool ``[N]``."""
        spent = state.cursor >= self.n_obs_steps - 1 + self.n_action_steps
        needed: Array = ~state.warm | spent
        return needed

    def starts_warm(self, state: PolicyState) -> Array:
        """Rows whose next plan starts from their last one, bool ``[N]``."""
        return state.warm

    def plan_kinds(self, state: PolicyState) -> Array:
        """Which networks each row's next plan goes through ``[N]``: rows of a kind plan alike."""
        return self.starts_warm(state)

    def with_plan_batch(self, size: int | None) -> Self:
        """This policy, planning in batches of constant size (:mod:`diffpolicy.policies.rows`).

        Without it all rows that are due plan at once, and the last bits of a plan depend on which.

        Args:
            size: rows of every call of the networks, filled up where fewer are due; 1: one by one;
                ``None``: all at once.

        Raises:
            ValueError: a size below 1.
        """
        check_range("[1, inf)", plan_batch=size)
        other = copy.copy(self)
        other.plan_batch = size
        return other

    def _batched(
        self, plan: Callable[[PolicyState], tuple[Array, ...]], state: PolicyState
    ) -> tuple[Array, ...]:
        """``plan(state)``, in batches of constant size if that was asked for."""
        if self.plan_batch is None or not len(state):
            return plan(state)
        return in_batches(plan, state, self.plan_kinds(state), self.plan_batch)

    def replan(self, state: PolicyState, rows: Rows, *, deterministic: bool = False) -> PolicyState:
        """The memory with new plans for ``rows`` (indices), made for their last observation."""
        whole = len(state) == 1 or np.array_equal(rows, np.arange(len(state)))
        chosen = state if whole else state.take(rows)  # copying a memory costs tens of microseconds

        def make(part: PolicyState) -> tuple[Array, ...]:
            if self.selector is None:
                return self.make_plans(part, deterministic=deterministic)
            told = self.encoded_once(part)
            return self.selector.choose(self.make_plans, told, deterministic=deterministic)

        planned = self.adopted(chosen, *self._batched(make, chosen))
        return planned if whole else state.put(rows, planned)

    def encoded_once(self, state: PolicyState) -> PolicyState:
        """The memory of rows of which several plans are made, with ``cond`` ``[n, C]`` if they can.

        Candidates repeat it, rather than what was observed.
        """
        return state

    def adopted(self, state: PolicyState, plan: Array, nfe: Array, *made: Array) -> PolicyState:
        """The memory of rows whose new plan ``[n, H, P]`` took ``nfe`` ``[n]`` evaluations.

        ``made`` is what else :meth:`make_plans` returned.
        """
        if "jumped" in state.memory:  # the plan is the answer to a surprising observation
            state = state.remember(jumped=np.zeros(len(state), bool))
        return state.having(
            plan=plan,
            level=np.zeros_like(state.level),
            cursor=np.full_like(state.cursor, self.n_obs_steps - 1),
            warm=np.ones_like(state.warm),
            counter=state.counter + 1,
            nfe=state.nfe + nfe,
            plans=state.plans + 1,
        )

    def execute(self, state: PolicyState) -> tuple[Array, PolicyState]:
        """The actions ``[N, A]`` under the cursors, which move on.

        Past the end of a plan its last action is held.
        """
        position = np.minimum(state.cursor, self.horizon - 1)
        actions = self.to_actions(state.plan[np.arange(len(state)), position])
        return actions, state.having(cursor=state.cursor + 1)

    def executed(self, state: PolicyState) -> Array:
        """Steps since each row's plan was made ``[N]``: what a warm start shifts it by."""
        steps: Array = np.clip(state.cursor - (self.n_obs_steps - 1), 0, self.horizon)
        return steps

    def predict(
        self,
        observation: Obs,
        state: PolicyState | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, PolicyState]:
        """Stable-Baselines3's signature.

        ``state`` is opaque to the caller and is passed back unchanged.

        Args:
            observation: ``[O]`` or ``[N, O]``, or such arrays by name.
            state: what the last call returned, ``None`` at the start.
            episode_start: bool ``[N]``, rows whose observation is the first of an episode.
            deterministic: as in :meth:`act`.

        Returns:
            Action ``[A]`` or ``[N, A]``, and the new state. Whole numbers have the integer type of
            their space; those of a ``Discrete`` one (A = 1) come without their last dimension.
        """
        obs = each(np.asarray, observation)
        name, field = next(iter(by_store_field(self.observed).items()))
        array = to_fields(obs).get(name)
        single = array is None or array.ndim <= len(field.shape)
        batched = take(obs, None) if single else obs
        if state is None:
            state = self.initial_state(range(count(batched)))
        elif episode_start is not None and np.any(episode_start):
            state = self.forget(
                state, np.broadcast_to(np.asarray(episode_start, bool), (len(state),))
            )
        actions, state = self.act(batched, state, deterministic=deterministic)
        actions = actions.astype(self.action_dtype, copy=False)
        actions = actions[:, 0] if self.chooses else actions
        return (actions[0] if single else actions), state

    def _checked(self, obs: Obs, rows: int) -> Obs:
        try:
            seen = as_seen(obs, self.observed, lead=(rows,))
        except ValueError as error:
            raise ValueError(
                f"{error} ({rows} environments; for another number of them start with state=None)"
            ) from None
        for name, array in to_fields(seen).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():  # bytes always are
                row, *index = np.argwhere(~np.isfinite(array))[0].tolist()
                found, where = array[(row, *index)], ", ".join(map(str, index))
                raise ValueError(f"{name!r} of environment {row} is {found} at index {where}")
        return seen


def check_horizon(horizon: int, n_obs_steps: int, n_action_steps: int) -> None:
    """Raise ``ValueError`` unless ``1 <= Ta <= H - To + 1``."""
    sizes = {"horizon": horizon, "n_obs_steps": n_obs_steps, "n_action_steps": n_action_steps}
    check_range("[1, inf)", **sizes)
    limit = horizon - n_obs_steps + 1
    if n_action_steps > limit:
        raise ValueError(
            f"n_action_steps={n_action_steps} is too large: a plan of horizon={horizon} with "
            f"n_obs_steps={n_obs_steps} has {limit} actions from the current step on; "
            "lower n_action_steps or raise horizon"
        )
