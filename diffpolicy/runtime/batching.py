"""Many sessions, one policy: requests that need a plan at the same time share one policy call.

Every session owns its memory, one row of :class:`~diffpolicy.policies.base.PolicyState`. A policy
is a pure function of rows, so plans are made in a thread of its own from a stack of the rows that
need them, and the new rows are handed back to the sessions in the event loop's thread. No session
can see another's. A request whose action lies in the plan at hand is answered at once, also while
plans are being made for others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.runtime.wire_format import WireError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Idle:
    """A client's silence.

    Attributes:
        since: the event loop's time when it began.
        timer: what ends it.
        lost: its place was given to another client.
    """

    since: float
    timer: asyncio.Timeout
    lost: bool = False


@dataclass(eq=False)
class Session:
    """One client's place in the batcher.

    Attributes:
        state: its memory, one row.
        due: it has acted in this episode and needs a plan next, so a batch may wait for it.
        actions: actions handed out.
        idle: the wait for its next request while there is none under way; ``None`` while there is.
    """

    state: PolicyState
    due: bool = False
    actions: int = 0
    idle: Idle | None = None


@dataclass(frozen=True)
class _Waiting:
    """A request: observations ``[k, O]`` in; one action, or with ``chunk`` all of a new plan."""

    session: Session
    obs: Array
    chunk: bool
    answer: asyncio.Future[Array]


class Batcher:
    """Gathers requests that need plans for a short time and answers them with one policy call.

    Args:
        policy: what acts; it is never changed.
        max_sessions: most sessions at a time.
        max_batch: most rows in one call.
        reclaim_after_s: when all places are taken, the session that has been idle for longest, and
            at least for so many seconds, makes room; ``None``: none does.
        window_s: how long the first request waits for others, in seconds. It waits no longer once
            every session that is due for a plan has asked.
        deterministic: passed to the policy.

    Attributes:
        requests: requests for actions so far.
        policy_calls: calls that made plans so far.
        largest_batch: most requests that shared one.
    """

    def __init__(
        self,
        policy: ChunkedPolicy,
        *,
        max_sessions: int,
        max_batch: int,
        reclaim_after_s: float | None = None,
        window_s: float = 0.001,
        deterministic: bool = False,
    ) -> None:
        self.policy, self.max_sessions, self.max_batch = policy, max_sessions, max_batch
        self.reclaim_after_s = reclaim_after_s
        self.window_s, self.deterministic = window_s, deterministic
        self.requests = self.policy_calls = self.largest_batch = 0
        self._sessions: set[Session] = set()
        self._waiting: deque[_Waiting] = deque()
        self._arrived, self._complete = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffpolicy-serve")

    @property
    def clients(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    def open(self) -> Session:
        """A cold session with random stream 0.

        Raises:
            WireError: ``busy``.
        """
        if self.clients >= self.max_sessions and not self._reclaim():
            raise WireError("busy", f"all {self.clients} places for clients are taken; try later")
        session = Session(self.policy.initial_state([0]))
        self._sessions.add(session)
        return session

    def _reclaim(self) -> bool:
        """Frees the place of the session that has been idle for longest; whether there was one."""
        silent = [(s.idle.since, s.idle, s) for s in self._sessions if s.idle is not None]
        if self.reclaim_after_s is None or not silent:
            return False
        now = asyncio.get_running_loop().time()
        since, idle, session = min(silent, key=lambda entry: entry[0])
        if now - since < self.reclaim_after_s:
            return False
        idle.lost = True
        idle.timer.reschedule(now)
        self.close(session)
        return True

    def close(self, session: Session) -> None:
        """Free the session's place; an answer still being computed for it goes nowhere."""
        self._sessions.discard(session)

    def reset(self, session: Session, seed: int | None = None) -> None:
        """Begin a new episode of one session; without ``seed`` its random stream goes on."""
        seeds = None if seed is None else [seed]
        session.state = self.policy.forget(session.state, np.ones(1, bool), seeds)
        session.due = False

    def totals(self, session: Session) -> dict[str, int]:
        """What the session, and the server as a whole, have done so far."""
        return {
            "actions": session.actions,
            "plans": int(session.state.plans[0]),
            "nfe": int(session.state.nfe[0]),
            "clients": self.clients,
            "requests": self.requests,
            "policy_calls": self.policy_calls,
            "largest_batch": self.largest_batch,
        }

    async def ask(self, session: Session, obs: Array, *, chunk: bool = False) -> Array:
        """The action ``[A]`` for ``obs`` ``[1, O]``, or with ``chunk`` a new plan's ``[Ta, A]``.

        Args:
            session: who asks; one request of a session at a time.
            obs: finite float32 observations since its last request, oldest first.
            chunk: make a new plan and count all its actions as executed.

        Raises:
            WireError: ``policy_failed`` or ``internal``.
        """
        answer = None if chunk else self._from_plan(session, obs)
        if answer is None:
            answer = await self._planned(session, obs, chunk)
        self.requests += 1
        if not np.isfinite(answer).all():
            log.error("the policy gave an action that is not finite; that session starts afresh")
            self.reset(session)  # or every action of this plan would fail
            message = "the policy gave an action that is not finite; a new episode was begun"
            raise WireError("policy_failed", message)
        session.actions += len(answer) if chunk else 1
        return answer

    def _from_plan(self, session: Session, obs: Array) -> Array | None:
        """The action of the plan at hand, or ``None`` (and no change) where a plan is needed."""
        state = self.policy.observe(obs, session.state)
        if self.policy.needs_plan(state)[0]:
            return None
        actions, session.state = self.policy.execute(state)
        session.due = bool(self.policy.needs_plan(session.state)[0])
        answer: Array = np.asarray(actions[0], np.float32)
        return answer

    async def _planned(self, session: Session, obs: Array, chunk: bool) -> Array:
        session.due = True
        answer: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(session, obs, chunk, answer))
        self._arrived.set()
        if self._all_asked():
            self._complete.set()
        return await answer

    def _all_asked(self) -> bool:
        due = sum(s.due for s in self._sessions)
        return len(self._waiting) >= min(due, self.max_batch)

    async def warm_up(self) -> None:
        """Call the policy once, so that no client waits for what a first call sets up.

        Raises:
            Exception: whatever the policy raises.
        """
        blank = np.zeros((1, self.policy.obs_dim), np.float32)
        await self._call([blank], [False], self.policy.initial_state([0]))

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._arrived.wait()
            self._complete.clear()
            if self.window_s > 0 and not self._all_asked():
                try:
                    async with asyncio.timeout(self.window_s):
                        await self._complete.wait()
                except TimeoutError:
                    pass
            count = min(len(self._waiting), self.max_batch)
            batch = [self._waiting.popleft() for _ in range(count)]
            if not self._waiting:
                self._arrived.clear()
            await self._guarded([w for w in batch if not w.answer.done()])

    def stop(self) -> None:
        """Wait for the call in progress and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _guarded(self, batch: Sequence[_Waiting]) -> None:
        """Serve a batch; no failure of it may end the loop that serves the next."""
        try:
            if batch:
                await self._serve(batch)
        except Exception:
            # The policy changed nothing, so one row that makes it fail need not fail the others.
            if len(batch) > 1:
                for one in batch:
                    await self._guarded([one])
                return
            log.exception("the policy failed on a request")
            error = WireError("internal", "the policy failed; the server's log says why")
            if not batch[0].answer.done():
                batch[0].answer.set_exception(error)

    async def _serve(self, batch: Sequence[_Waiting]) -> None:
        obs, chunk = [w.obs for w in batch], [w.chunk for w in batch]
        answers, rows = await self._call(obs, chunk, stacked([w.session.state for w in batch]))
        due = self.policy.needs_plan(rows)
        self.policy_calls += 1
        self.largest_batch = max(self.largest_batch, len(batch))
        for at, (waiting, answer) in enumerate(zip(batch, answers, strict=True)):
            waiting.session.state, waiting.session.due = rows.take([at]), bool(due[at])
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    async def _call(
        self, obs: list[Array], chunk: list[bool], rows: PolicyState
    ) -> tuple[list[Array], PolicyState]:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, answer_rows, self.policy, obs, chunk, rows, self.deterministic
        )


def stacked(states: Sequence[PolicyState]) -> PolicyState:
    """The rows of several states as one state."""
    if len(states) == 1:
        return states[0]
    names = [f.name for f in fields(PolicyState) if f.name != "memory"]
    memory = {k: np.concatenate([s.memory[k] for s in states]) for k in states[0].memory}
    rows = {name: np.concatenate([getattr(s, name) for s in states]) for name in names}
    return PolicyState(**rows, memory=memory)


def answer_rows(
    policy: ChunkedPolicy,
    obs: Sequence[Array],
    chunk: Sequence[bool],
    state: PolicyState,
    deterministic: bool,
) -> tuple[list[Array], PolicyState]:
    """The answers to n requests, with at most one batch of new plans.

    Args:
        policy: what acts.
        obs: per request ``[k, O]``, oldest first.
        chunk: requests for all actions of a new plan instead of one action.
        state: memory of n rows.
        deterministic: passed to the policy.

    Returns:
        Per request ``[A]``, or with ``chunk`` ``[Ta, A]``, float32; and the new memory.
    """
    last = np.stack([o[-1] for o in obs])
    if not any(chunk):
        actions, state = policy.act(last, state, deterministic=deterministic)
        return list(np.asarray(actions, np.float32)), state
    for age in range(max(map(len, obs)) - 1, 0, -1):
        rows = [i for i, o in enumerate(obs) if len(o) > age]
        seen = policy.observe(np.stack([obs[i][-1 - age] for i in rows]), state.take(rows))
        state = state.put(rows, seen)
    state = policy.observe(last, state)
    due = np.flatnonzero(policy.needs_plan(state) | np.asarray(chunk))
    state = policy.replan(state, due, deterministic=deterministic)
    actions, state = policy.execute(state)
    answers = list(np.asarray(actions, np.float32))
    whole = np.flatnonzero(chunk)
    steps, rest = [actions[whole]], state.take(whole)
    for _ in range(policy.n_action_steps - 1):
        actions, rest = policy.execute(rest)
        steps.append(actions)
    plans = np.stack(steps, axis=1).astype(np.float32)
    for row, plan in zip(whole.tolist(), plans, strict=True):
        answers[row] = plan
    return answers, state.put(whole, rest)
