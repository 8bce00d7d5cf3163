"""Diffusion policies: plans are samples of a conditional denoiser.

The policy's whole choice is where sampling starts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.sampler import PriorSampler
from diffpolicy.core.solvers import make_solver
from diffpolicy.core.starts import shift_plan
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import Obs, each
from diffpolicy.networks.base import described
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState
from diffpolicy.policies.best_of_n import Selector
from diffpolicy.policies.boundary import Boundary, now_of
from diffpolicy.policies.direct import draws_in_one_call
from diffpolicy.policies.guided import condition_of, kept_from_costs, plan_costs
from diffpolicy.policies.plan_loop import Encoded, Loop, PlanLoop, encoded
from diffpolicy.policies.planners import check_anchors, guided, noise_factor, with_actions, written
from diffpolicy.policies.rows import kind_by_kind, row_noise
from diffpolicy.policies.spec import PolicySampler, PolicySpec, check_normalizer
from diffpolicy.policies.truncated import Candidates, ScoredPlans


class DiffusionPlanner(ChunkedPolicy):
    """A trained denoiser that acts; where sampling starts is all that its plans differ in.

    A row's first plan of an episode (cold) is sampled from pure noise. With ``spec.rti`` its later
    ones (warm) start from the last plan; cold and warm rows are solved in one batch each. With
    ``spec.truncated`` every plan is the best of several guesses, solved from a low level.

    Plans are actions, or with ``spec.layout`` hold observations: a planner in the sense of Diffuser
    and its successors differs in nothing else. The plans of :class:`PolicyState` always end in the
    A actions; with layout ``"state"`` these come from the head ``inverse``.

    Args:
        spec: shapes, parameterisation and samplers.
        denoiser: ``spec.make_denoiser()`` with trained weights.
        normalizer: the frozen normaliser of the training data, with the fields ``action`` and
            ``obs`` or all ``obs.NAME``.
        anchors: typical plans of the demonstrations, where ``spec.truncated`` starts from them.
        heads: ``spec.make_heads()`` with trained weights; needed where the spec names any.

    Raises:
        ValueError: clipping with an action normaliser whose range is not [-1, 1], shapes that do
            not match, levels that the network cannot take, or anchors that are missing.
    """

    def __repr__(self) -> str:
        return described(self, self.spec.summary(), self.denoiser)

    def __init__(
        self,
        spec: PolicySpec,
        denoiser: Denoiser,
        normalizer: Normalizer,
        anchors: Anchors | None = None,
        heads: nn.ModuleDict | None = None,
    ) -> None:
        entries: dict[str, Any] = {"obs_dim": spec.obs_dim, "action_dim": spec.action_dim}
        super().__init__(**entries, **spec.sizes, observations=spec.observed)
        check_normalizer(spec, normalizer)
        self.spec, self.layout = spec, spec.plan_layout
        self.plan_dim = self.layout.parts[0] + spec.planned_dim
        self.heads = nn.ModuleDict() if heads is None else heads.eval()
        if set(self.heads) != set(spec.heads):
            raise ValueError(
                f"the spec names the heads {sorted(spec.heads)}, got {sorted(self.heads)}; make "
                "them with spec.make_heads()"
            )
        self.denoiser = denoiser.eval()
        self.normalizer, self.anchors = normalizer, anchors
        ends = spec.action_low, spec.action_high, spec.whole
        self.boundary = Boundary(spec.representation, normalizer, spec.planned_grippers, *ends)
        self.action_dtype = "float32"
        if len(spec.whole) == spec.action_dim:
            self.action_dtype = np.result_type(*spec.whole.values()).name
        self.chooses = len(spec.actions) == 1 and spec.actions[0].choices is not None
        self._unusual: Array | None = None  # changes of the observation that make a row cold
        if spec.rti is not None and spec.rti.innovation is not None:
            usual = np.asarray(spec.observation_step, np.float64)
            largest = np.finfo(np.float32).max  # of entries that never change
            self._unusual = np.minimum(spec.rti.innovation * usual, largest).astype(np.float32)
        check_anchors(spec, anchors)
        if spec.selection is not None:
            self.selector = Selector(spec.selection, self.verified, reads_cond=True)
        self._place()

    def to(self, device: str | torch.device) -> Self:
        """Move the policy to another device, in place, as modules of torch move.

        Compiled loops become eager ones again. Policies made from this one (``with_settings``,
        ``streaming``, ...) share its weights: move them too; wrappers (``chunked``) are made anew.

        Returns:
            self.
        """
        self.denoiser.to(device)
        self.heads.to(device)
        self._place()
        return self

    def _place(self) -> None:
        """Bring what belongs to the weights to where these are."""
        self.device, self._dtype = _where(self.denoiser)
        self.normalizer = self.normalizer.to(self.device)
        self.anchors = None if self.anchors is None else self.anchors.to(self.device)
        self._known = self.layout.known.to(self.device)
        self.costs = None if self.spec.guidance is None else kept_from_costs(self, self.denoiser)
        self._loops: dict[tuple[str, bool], Loop] = self._made_loops()

    def _made_loops(self) -> dict[tuple[str, bool], Loop]:
        return {(k, q): self.loop(k, deterministic=q) for k in self.kinds for q in (False, True)}

    def identity(self) -> dict[str, Any]:
        """What this policy is, for telling one training run from another."""
        weights = {"denoiser": self.denoiser, "heads": self.heads}
        return {"spec": self.spec, "normalizer": self.normalizer, "anchors": self.anchors} | weights

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sampling loops that this policy runs."""
        if self.spec.truncated is not None:
            return self.spec.truncated.loops
        return ("cold",) if self.spec.rti is None else ("cold", "warm")

    def loop(
        self,
        kind: str = "cold",
        *,
        deterministic: bool = False,
        sampler: PriorSampler | None = None,
    ) -> PlanLoop:
        """One of the policy's sampling loops, made anew.

        Args:
            kind: ``"cold"`` or ``"warm"``; of a truncated policy ``"guesses"``, ``"draft"``,
                ``"rank"``.
            deterministic: with the noise-free form of the solver.
            sampler: of a cold loop, in place of the policy's own.

        Raises:
            ValueError: a loop that this policy does not run.
        """
        if kind not in self.kinds:
            raise ValueError(f"this policy runs the loops {self.kinds}, not {kind!r}")
        spec, process, first = self.spec, self.denoiser.process, None
        sampler = spec.sampler if sampler is None else sampler
        if kind == "cold":
            grid, start = sampler.grid(process), "prior"
            if isinstance(sampler, PolicySampler):
                first = sampler.start_noise(self.horizon, self.layout.dim)
            solver = sampler.make(deterministic=deterministic)
        elif kind == "warm":
            assert spec.rti is not None
            grid, start = spec.rti.grid(process), "noised" if spec.rti.renoise else "given"
            solver = spec.rti.make(deterministic=deterministic)
        else:
            assert spec.truncated is not None
            grid, start = spec.truncated.loop_grid(kind, process, self.anchors)
            solver = spec.truncated.make() if kind == "guesses" else make_solver("ddim")
        grid = grid if spec.imagined is None else spec.imagined.held(grid, self.layout)
        denoiser = guided(spec, self.denoiser, self.heads, self._known, quiet=deterministic)
        return PlanLoop(
            denoiser if spec.guidance is None else kept_from_costs(self, denoiser),
            self.normalizer,
            solver,
            grid,
            start=start,
            plan_shape=(self.n_obs_steps, self.obs_dim, self.horizon, self.layout.dim),
            condition=condition_of(self),
            temperature=noise_factor(spec, kind),
            start_noise=first,
            teleport=sampler.teleport if kind == "cold" else None,
        )

    def with_spec(self, spec: PolicySpec) -> DiffusionPlanner:
        """The same weights under other settings, as a plain planner."""
        return DiffusionPlanner(spec, self.denoiser, self.normalizer, self.anchors, self.heads)

    def with_loops(self, loops: Mapping[str, Loop]) -> Self:
        """This policy with other implementations of its loops (compiled ones).

        Args:
            loops: by kind, see ``kinds``; they take the place of both the stochastic and
                the deterministic loop where these are the same arithmetic, else of the former.
        """
        other = copy.copy(self)
        other._loops = dict(self._loops)
        for kind, loop in loops.items():
            other._loops[kind, False] = loop
            if self._loops[kind, True].draws == loop.draws and not draws_in_one_call(self.spec):
                other._loops[kind, True] = loop
        return other

    @property
    def nfe(self) -> int:
        """Network evaluations of an episode's first plan."""
        if self.spec.truncated is not None:
            return self._candidates(deterministic=False).nfe
        return self._loops["cold", False].nfe

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        state, none = super().initial_state(seeds), np.zeros(len(seeds), bool)
        return state if self._unusual is None else state.remember(jumped=none)

    def observe(self, obs: Obs, state: PolicyState) -> PolicyState:
        seen = super().observe(obs, state)
        if self._unusual is None:
            return seen
        step = np.abs(now_of(seen.history) - now_of(state.history))  # innovation is of one vector
        jumped = ~state.fresh & (step > self._unusual).any(1)
        return seen.remember(jumped=state.memory["jumped"] | jumped)

    def needs_plan(self, state: PolicyState) -> Array:
        needed: Array = super().needs_plan(state) | state.memory.get("jumped", np.False_)
        return needed

    def starts_warm(self, state: PolicyState) -> Array:
        warm: Array = state.warm & (self.spec.rti is not None)
        return warm & ~state.memory.get("jumped", np.False_)

    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, ...]:
        with self._no_graph():
            plans, nfe = self._make_plans(state, deterministic)
            return self._complete(plans, state.history), nfe

    def _no_graph(self) -> Any:
        """Inference mode, unless guidance may differentiate."""
        slopes = self.spec.value_scale > 0 or self.spec.guidance is not None
        return torch.no_grad() if slopes else torch.inference_mode()

    def _make_plans(self, state: PolicyState, deterministic: bool) -> tuple[Array, ...]:
        if self.spec.truncated is not None:
            found = self.propose(state, deterministic=deterministic)
            return found.chosen().cpu().numpy(), np.full(len(state), found.nfe)

        def solve(warm: bool, rows: PolicyState) -> tuple[Array, ...]:
            loop = self._loops["warm" if warm else "cold", deterministic]
            return self._solve(loop, rows, deterministic), np.full(len(rows), loop.nfe)

        return kind_by_kind(solve, state, self.starts_warm(state))

    def _complete(self, plans: Array, history: Obs) -> Array:
        """Plans ``[n, H, P]`` as remembered: absolute, and with the actions between states."""
        if self.spec.layout != "state":
            return self.boundary.absolute(torch.from_numpy(plans), now_of(history)).numpy()
        out: Array = with_actions(self.heads, self.on_device(plans)).cpu().numpy()
        return out

    @torch.inference_mode()
    def score(self, history: Obs | Encoded, plans: Array) -> Array:
        """What the head ``critic``, or else ``value``, says of plans.

        Args:
            history: raw observations ``[n, To, O]``, such arrays by name, or
                :class:`~diffpolicy.policies.plan_loop.Encoded`.
            plans: normalised ``[n, H, P]``.

        Returns:
            ``[n]``, higher is better.

        Raises:
            ValueError: a policy with neither head.
        """
        found = [name for name in ("critic", "value") if name in self.heads]
        if not found:
            raise ValueError(f"scores need a head critic or value; heads: {sorted(self.heads)}")
        plan = self.on_device(plans)
        critic = found[0] == "critic"
        judged = plan[..., -self.action_dim :] if critic else plan[..., : self.layout.dim]
        cond = self.encoded(history) if critic else None
        out: Array = self.heads[found[0]].score(cond, judged).cpu().numpy()  # type: ignore[operator]
        return out

    def verified(self, history: Obs | Encoded, plans: Array) -> Array:
        """What selection goes by: :meth:`score`, whose arguments it takes, or minus the costs."""
        verifier = "head" if self.spec.selection is None else self.spec.selection.verifier
        if verifier == "none":
            return np.zeros(len(plans))
        return (
            -plan_costs(self, history, plans) if verifier == "cost" else self.score(history, plans)
        )

    def propose(self, state: PolicyState, *, deterministic: bool = False) -> ScoredPlans:
        """Every candidate plan for the observations in ``state``, with its score.

        Raises:
            ValueError: a policy without ``truncated`` settings, which has one plan only.
        """
        if self.spec.truncated is None:
            raise ValueError("this policy samples one plan; set truncated for several with scores")
        candidates = self._candidates(deterministic=deterministic)
        with self._no_graph():
            return candidates.propose(
                self.on_device(state.history),
                self.on_device(self.shifted(state)),
                self.on_device(state.warm),
                self.draw_noise(state, candidates.draws, deterministic),
                self.told(candidates.loops["guesses"], state),
            )

    def _candidates(self, *, deterministic: bool) -> Candidates:
        assert self.spec.truncated is not None
        loops = {kind: self._loops[kind, deterministic] for kind in self.kinds}
        write = partial(written, self.spec, self.heads, self.normalizer)
        settings = self.spec.truncated, self.anchors, self.normalizer
        return Candidates(*settings, loops, write if "draft" in self.heads else None, deterministic)

    def _solve(self, loop: Loop, state: PolicyState, deterministic: bool) -> Array:
        noise = self.draw_noise(state, loop.draws, deterministic)
        told = self.told(loop, state)
        return loop(told, self.on_device(self.shifted(state)), noise).cpu().numpy()

    def encoded_once(self, state: PolicyState) -> PolicyState:
        if self.layout.pinned or not all(loop.takes_encoded for loop in self._loops.values()):
            return state
        with torch.inference_mode():
            condition = self._loops[self.kinds[0], False].condition
            told = encoded(condition, self.on_device(state.history))
            return state.remember(cond=told.cond.cpu().numpy())

    def told(self, loop: Loop, state: PolicyState) -> Any:
        """What a loop is told of rows: their observations, or what these were encoded to."""
        if "cond" in state.memory and loop.takes_encoded:
            seen = None if self.spec.guidance is None else self.on_device(state.history)
            return Encoded(self.on_device(state.memory["cond"]), seen)
        return self.on_device(state.history)

    def on_device(self, array: Any) -> Any:
        """An array of the host (or such by name) as a tensor where the weights are."""
        return each(lambda one: torch.from_numpy(one).to(self.device), array)

    def encoded(self, history: Obs | Encoded) -> Tensor:
        """The condition ``[n, C]`` of raw observations ``[n, To, ...]`` of the host."""
        if isinstance(history, Encoded):
            return history.cond.to(self.device)
        return self.denoiser.encode(self.normalizer.normalize_obs(self.on_device(history)))

    def draw_noise(self, state: PolicyState, draws: int, deterministic: bool) -> Tensor:
        """Standard normal ``[R, n, H, D]`` of each row's stream; one for all if deterministic.

        Candidates of a plan have streams of their own, also if deterministic.

        Raises:
            ValueError: the denoiser was moved, or its type changed, behind the policy's back.
        """
        if (now := _where(self.denoiser)) != (self.device, self._dtype):
            raise ValueError(
                f"the denoiser is on {now[0]} as {now[1]}, but its policy was made for "
                f"{self.device} and {self._dtype}; move the policy: policy.to({str(now[0])!r})"
            )
        shape = (draws, self.horizon, self.layout.dim)
        streams = state.memory.get("candidate")
        seeds, counters = state.seed, state.counter
        one = deterministic and streams is None
        if deterministic:
            seeds = counters = np.zeros(1 if one else len(state), np.int64)
        noise: Tensor = self.on_device(row_noise(seeds, counters, shape, streams)).transpose(0, 1)
        return noise.expand(-1, len(state), -1, -1) if one else noise

    def shifted(self, state: PolicyState) -> Array:
        """The last plans shifted by the steps executed ``[n, H, D]``, as guesses of new ones."""
        last = torch.from_numpy(state.plan[..., : self.layout.dim])
        steps = torch.from_numpy(self.executed(state))
        return self.moved(last, steps, now_of(state.history)).numpy()

    def moved(self, last: Tensor, steps: Tensor, obs: Any) -> Tensor:
        """Remembered plans ``[n, H, D]`` of which ``steps`` ``[n]`` were executed, as guesses.

        ``obs`` is the raw observation of the current step, which the network's plans begin in.
        """
        tail = "hold" if self.spec.rti is None else self.spec.rti.tail
        guess = self.boundary.relative(shift_plan(last, steps, tail=tail), obs)
        for gripper in self.boundary.grippers:
            guess = gripper.guess(guess)
        return guess

    def to_actions(self, normalised: Array) -> Array:
        actions: Array = self.boundary.actions(normalised[..., -self.layout.action_dim :])
        return actions


def _where(denoiser: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = next(denoiser.parameters())
    return weight.device, weight.dtype
