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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from diffpolicy.data import observation
from diffpolicy.data.observation import Obs
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.runtime.wire_format import WireError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Session:
    """One client's place in the batcher.

    Attributes:
        state: its memory, one row.
        due: it has acted in this episode and needs a plan next, so a batch may wait for it.
        actions: actions handed out.
        silent_since: the event loop's time since when it asks nothing; ``None`` while it does.
    """

    state: PolicyState
    due: bool = False
    actions: int = 0
    silent_since: float | None = None


@dataclass(frozen=True)
class _Waiting:
    """A request: observations ``[k, ...]``; asks for an action, or with ``chunk`` a whole plan."""

    session: Session
    obs: Obs
    chunk: bool
    answer: asyncio.Future[Array]


class Batcher:
    """Gathers requests that need plans for a short time and answers them with one policy call.

    Args:
        policy: what acts; it is never changed.
        max_batch: most rows in one call.
        window_s: how long the first request waits for others, in seconds. It waits no longer once
            every session that is due for a plan has asked.
        deterministic: passed to the policy.

    Attributes:
        sessions: the open ones.
        requests: requests for actions so far.
        policy_calls: calls that made plans so far.
        largest_batch: most requests that shared one.
    """

    def __init__(
        self,
        policy: ChunkedPolicy,
        *,
        max_batch: int,
        window_s: float = 0.001,
        deterministic: bool = False,
    ) -> None:
        self.policy, self.max_batch = policy, max_batch
        self.window_s, self.deterministic = window_s, deterministic
        self.requests = self.policy_calls = self.largest_batch = 0
        self.sessions: set[Session] = set()
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffpolicy-serve")

    def open(self) -> Session:
        """A cold session with random stream 0."""
        session = Session(self.policy.initial_state([0]))
        self.sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        """Forget a session; an answer still being computed for it goes nowhere."""
        self.sessions.discard(session)

    def reset(self, session: Session, seed: int | None = None) -> None:
        """Begin a new episode of one session; without ``seed`` its random stream goes on."""
        seeds = None if seed is None else [seed]
        session.state = self.policy.forget(session.state, np.ones(1, bool), seeds)
        session.due = False

    def totals(self, session: Session) -> dict[str, int]:
        """What the session, and the server as a whole, have done so far."""
        state, names = session.state, ("requests", "policy_calls", "largest_batch")
        own = {"actions": session.actions, "plans": int(state.plans[0]), "nfe": int(state.nfe[0])}
        return {
            **own,
            "clients": len(self.sessions),
            **{name: getattr(self, name) for name in names},
        }

    async def ask(self, session: Session, obs: Obs, *, chunk: bool = False) -> Array:
        """The action ``[A]`` for ``obs``, or with ``chunk`` a new plan's ``[Ta, A]``.

        Args:
            session: who asks; one request of a session at a time.
            obs: finite observations ``[k, ...]`` since its last request, oldest first; one of them
                unless ``chunk``.
            chunk: make a new plan and count all its actions as executed.

        Raises:
            WireError: ``policy_failed`` or ``internal``.
        """
        answer = None if chunk else self._from_plan(session, obs)
        if answer is None:
            session.due = True
            planned: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
            self._waiting.put_nowait(_Waiting(session, obs, chunk, planned))
            answer = await planned
        self.requests += 1
        if not np.isfinite(answer).all():
            log.error("the policy gave an action that is not finite; that session starts afresh")
            self.reset(session)  # or every action of this plan would fail
            message = "the policy gave an action that is not finite; a new episode was begun"
            raise WireError("policy_failed", message)
        session.actions += len(answer) if chunk else 1
        return answer

    def _from_plan(self, session: Session, obs: Obs) -> Array | None:
        """The action of the plan at hand, or ``None`` (and no change) where a plan is needed."""
        state = self.policy.observe(obs, session.state)
        if self.policy.needs_plan(state)[0]:
            return None
        actions, session.state = self.policy.execute(state)
        session.due = bool(self.policy.needs_plan(session.state)[0])
        answer: Array = np.asarray(actions[0], np.float32)
        return answer

    async def warm_up(self) -> None:
        """Call the policy once, so that no client waits for what a first call sets up.

        Raises:
            Exception: whatever the policy raises.
        """
        blank = observation.zeros(self.policy.observed, (1,))
        await self._call([blank], [False], self.policy.initial_state([0]))

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            batch = await self._gathered()
            await self._guarded([w for w in batch if not w.answer.done()])

    async def _gathered(self) -> list[_Waiting]:
        """The requests of one call: those that are there, and those that come within the window."""
        batch = [await self._waiting.get()]
        until = asyncio.get_running_loop().time() + self.window_s
        while len(batch) < self.max_batch:
            due = sum(session.due for session in self.sessions)
            if self._waiting.empty() and len(batch) >= due:
                break
            try:
                async with asyncio.timeout_at(until):
                    batch.append(await self._waiting.get())
            except TimeoutError:
                break
        return batch

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
        self, obs: list[Obs], chunk: list[bool], rows: PolicyState
    ) -> tuple[list[Array], PolicyState]:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, answer_rows, self.policy, obs, chunk, rows, self.deterministic
        )


def stacked(states: Sequence[PolicyState]) -> PolicyState:
    """The rows of several states as one state."""
    if len(states) == 1:
        return states[0]
    names = [f.name for f in fields(PolicyState)]
    return PolicyState(**{n: observation.concat([getattr(s, n) for s in states]) for n in names})


def answer_rows(
    policy: ChunkedPolicy,
    obs: Sequence[Obs],
    chunk: Sequence[bool],
    state: PolicyState,
    deterministic: bool,
) -> tuple[list[Array], PolicyState]:
    """The answers to n requests, with at most one batch of new plans.

    Args:
        policy: what acts.
        obs: per request ``[k, ...]``, oldest first.
        chunk: requests for all actions of a new plan instead of one action.
        state: memory of n rows.
        deterministic: passed to the policy.

    Returns:
        Per request ``[A]``, or with ``chunk`` ``[Ta, A]``, float32; and the new memory.
    """
    steps = [observation.count(o) for o in obs]
    for age in range(max(steps) - 1, -1, -1):  # the oldest first; requests with fewer begin later
        rows = [i for i, count in enumerate(steps) if count > age]
        seen = observation.stack([observation.take(obs[i], -1 - age) for i in rows])
        state = state.put(rows, policy.observe(seen, state.take(rows)))
    due = np.flatnonzero(policy.needs_plan(state) | np.asarray(chunk))
    if len(due):
        state = policy.replan(state, due, deterministic=deterministic)
    actions, state = policy.execute(state)
    answers = list(np.asarray(actions, np.float32))
    whole = np.flatnonzero(chunk)
    if not len(whole):
        return answers, state
    plans, rest = [actions[whole]], state.take(whole)
    for _ in range(policy.n_action_steps - 1):
        actions, rest = policy.execute(rest)
        plans.append(actions)
    for row, plan in zip(whole.tolist(), np.stack(plans, axis=1), strict=True):
        answers[row] = plan.astype(np.float32)
    return answers, state.put(whole, rest)
