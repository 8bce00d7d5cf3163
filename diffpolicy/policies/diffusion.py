"""Diffusion policies: plans are samples of a conditional denoiser.

The policy's whole choice is where sampling starts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.guidance import ClassifierFreeGuidance
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.solvers import make_solver
from diffpolicy.core.starts import Start, check_distinct, levels, shift_plan
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState, row_noise
from diffpolicy.policies.candidates import Candidates, Truncated
from diffpolicy.policies.loop import Loop, PlanLoop
from diffpolicy.policies.spec import Gripper, PolicySpec, Sampler, check_normalizer
from diffpolicy.policies.truncated import ScoredPlans


class DiffusionPlanner(ChunkedPolicy):
    """A trained denoiser that acts; where sampling starts is all that its plans differ in.

    A row's first plan of an episode (cold) is sampled from pure noise. With ``spec.rti`` its later
    ones (warm) start from the last plan; cold and warm rows are solved in one batch each. With
    ``spec.truncated`` every plan is the best of several guesses, solved from a low level.

    Args:
        spec: shapes, parameterisation and samplers.
        denoiser: ``spec.make_denoiser()`` with trained weights.
        normalizer: the frozen normaliser of the training data, with fields ``obs`` and ``action``.
        anchors: typical plans of the demonstrations, where ``spec.truncated`` starts from them.

    Raises:
        ValueError: clipping with an action normaliser whose range is not [-1, 1], shapes that do
            not match, levels that the network cannot take, or anchors that are missing.
    """

    def __init__(
        self,
        spec: PolicySpec,
        denoiser: Denoiser,
        normalizer: Normalizer,
        anchors: Anchors | None = None,
    ) -> None:
        super().__init__(
            obs_dim=spec.obs_dim,
            action_dim=spec.action_dim,
            horizon=spec.horizon,
            n_obs_steps=spec.n_obs_steps,
            n_action_steps=spec.n_action_steps,
        )
        check_normalizer(spec, normalizer)
        self.spec = spec
        self.denoiser = denoiser.eval()
        self.device = next(denoiser.parameters()).device
        self.normalizer = normalizer.to(self.device)
        self._low, self._high = (
            None if b is None else np.asarray(b, np.float32)
            for b in (spec.action_low, spec.action_high)
        )
        self._unusual: Array | None = None  # changes of the observation that make a row cold
        if spec.rti is not None and spec.rti.innovation is not None:
            usual = np.asarray(spec.observation_step, np.float64)
            largest = np.finfo(np.float32).max  # of entries that never change
            self._unusual = np.minimum(spec.rti.innovation * usual, largest).astype(np.float32)
        check_anchors(spec, anchors)
        self.anchors = None if anchors is None else anchors.to(self.device)
        self._loops: dict[tuple[str, bool], Loop] = {}
        for kind in self.kinds:
            for deterministic in (False, True):
                self._loops[kind, deterministic] = self.loop(kind, deterministic=deterministic)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sampling loops that this policy runs."""
        if self.spec.truncated is not None:
            return self.spec.truncated.loops
        return ("cold",) if self.spec.rti is None else ("cold", "warm")

    def loop(self, kind: str = "cold", *, deterministic: bool = False) -> PlanLoop:
        """One of the policy's sampling loops, made anew.

        Args:
            kind: ``"cold"`` or ``"warm"``; of a truncated policy ``"guesses"``, ``"draft"``,
                ``"rank"``.
            deterministic: with the noise-free form of the solver.

        Raises:
            ValueError: a loop that this policy does not run.
        """
        if kind not in self.kinds:
            raise ValueError(f"this policy runs the loops {self.kinds}, not {kind!r}")
        spec, process = self.spec, self.denoiser.process
        guided: BaseDenoiser = self.denoiser
        if spec.sampler.guidance_scale != 1:
            scale = spec.sampler.guidance_scale
            guided = ClassifierFreeGuidance(guided, scale, clip=spec.clip)
        start, solver = "noised", make_solver("ddim")
        if kind == "cold":
            grid, start = spec.sampler.grid(process), "prior"
            solver = spec.sampler.make(deterministic=deterministic)
        elif kind == "warm":
            assert spec.rti is not None
            grid, start = spec.rti.grid(process), spec.rti.start
            solver = spec.rti.make_solver(deterministic=deterministic)
        else:
            assert spec.truncated is not None
            grid, start = truncated_grid(kind, spec.truncated, self.anchors, process)
            if kind == "guesses":
                solver = make_solver(spec.truncated.solver, **spec.truncated.options)
        shape = (self.n_obs_steps, self.obs_dim, self.horizon, self.action_dim)
        return PlanLoop(guided, self.normalizer, solver, grid, start=start, plan_shape=shape)

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
            if self._loops[kind, True].draws == loop.draws:
                other._loops[kind, True] = loop
        return other

    @property
    def nfe(self) -> int:
        """Network evaluations of an episode's first plan."""
        if self.spec.truncated is not None:
            return self._candidates(deterministic=False).nfe
        return self._loops["cold", False].nfe

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        state = super().initial_state(seeds)
        if self._unusual is None:
            return state
        last = np.zeros((len(seeds), self.obs_dim), np.float32)
        return state.remember(last=last, jumped=np.zeros(len(seeds), bool))

    def observe(self, obs: Array, state: PolicyState) -> PolicyState:
        seen = super().observe(obs, state)
        if self._unusual is None:
            return seen
        newest = seen.history[:, -1]
        step = np.abs(newest - state.memory["last"])
        jumped = ~state.fresh & (step > self._unusual).any(1)
        return seen.remember(last=newest, jumped=state.memory["jumped"] | jumped)

    def needs_plan(self, state: PolicyState) -> Array:
        needed = super().needs_plan(state)
        return needed if self._unusual is None else needed | state.memory["jumped"]

    def starts_warm(self, state: PolicyState) -> Array:
        warm: Array = state.warm & (self.spec.rti is not None)
        return warm if self._unusual is None else warm & ~state.memory["jumped"]

    def replan(
        self, state: PolicyState, rows: Array | Sequence[int], *, deterministic: bool = False
    ) -> PolicyState:
        planned = super().replan(state, rows, deterministic=deterministic)
        if self._unusual is None:
            return planned
        jumped = planned.memory["jumped"].copy()
        jumped[rows] = False
        return planned.remember(jumped=jumped)

    @torch.inference_mode()
    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, Array]:
        if self.spec.truncated is not None:
            found = self.propose(state, deterministic=deterministic)
            return found.best().cpu().numpy(), np.full(len(state), found.nfe)
        warm = self.starts_warm(state)
        if warm.all() or not warm.any():
            loop = self._loops["warm" if warm.all() else "cold", deterministic]
            return self._solve(loop, state, deterministic), np.full(len(state), loop.nfe)
        plans, nfe = np.empty_like(state.plan), np.empty(len(state), np.int64)
        for kind, rows in (("cold", np.flatnonzero(~warm)), ("warm", np.flatnonzero(warm))):
            loop = self._loops[kind, deterministic]
            plans[rows] = self._solve(loop, state.take(rows), deterministic)
            nfe[rows] = loop.nfe
        return plans, nfe

    @torch.inference_mode()
    def propose(self, state: PolicyState, *, deterministic: bool = False) -> ScoredPlans:
        """Every candidate plan for the observations in ``state``, with its score.

        Raises:
            ValueError: a policy without ``truncated`` settings, which has one plan only.
        """
        if self.spec.truncated is None:
            raise ValueError("this policy samples one plan; set truncated for several with scores")
        candidates = self._candidates(deterministic=deterministic)
        return candidates.propose(
            torch.from_numpy(state.history).to(self.device),
            torch.from_numpy(self.shifted(state)).to(self.device),
            torch.from_numpy(state.warm).to(self.device),
            self.draw_noise(state, candidates.draws, deterministic),
        )

    def _candidates(self, *, deterministic: bool) -> Candidates:
        assert self.spec.truncated is not None
        loops = {kind: self._loops[kind, deterministic] for kind in self.kinds}
        return Candidates(self.spec.truncated, self.anchors, self.normalizer, loops)

    def _solve(self, loop: Loop, state: PolicyState, deterministic: bool) -> Array:
        noise = self.draw_noise(state, loop.draws, deterministic)
        history = torch.from_numpy(state.history).to(self.device)
        guess = torch.from_numpy(self.shifted(state)).to(self.device)
        out: Array = loop(history, guess, noise).cpu().numpy()
        return out

    def draw_noise(self, state: PolicyState, draws: int, deterministic: bool) -> Tensor:
        """Standard normal ``[R, n, H, A]`` of each row's stream; one for all if deterministic."""
        shape = (draws, self.horizon, self.action_dim)
        zero = np.zeros(1, np.int64)
        seeds, counters = (zero, zero) if deterministic else (state.seed, state.counter)
        drawn = torch.from_numpy(row_noise(seeds, counters, shape))
        noise = drawn.to(self.device).transpose(0, 1)
        return noise.expand(-1, len(state), -1, -1) if deterministic else noise

    def shifted(self, state: PolicyState) -> Array:
        """The last plans shifted by the steps executed ``[n, H, A]``."""
        tail = "hold" if self.spec.rti is None else self.spec.rti.tail
        steps = torch.from_numpy(self.executed(state))
        guess: Array = shift_plan(torch.from_numpy(state.plan), steps, tail=tail).numpy()
        for gripper in self.spec.grippers:
            guess = gripper.guess(guess)
        return guess

    def to_actions(self, normalised: Array) -> Array:
        for gripper in self.spec.grippers:
            normalised = gripper.snap(normalised)
        actions = (
            self.normalizer.unnormalize("action", torch.from_numpy(normalised).to(self.device))
            .cpu()
            .numpy()
        )
        return (
            actions
            if self._low is None and self._high is None
            else np.clip(actions, self._low, self._high)
        )


def truncated_grid(
    kind: str, settings: Truncated, anchors: Anchors | None, process: GaussianProcess
) -> tuple[Tensor, str]:
    """Levels and kind of start of a truncated policy's loops.

    A draft is the clean estimate at ``t = 1`` and a rank the one at ``rank_t``: one DDIM step each.
    """
    first, num_steps = {"draft": 1.0, "rank": settings.rank_t}.get(kind), 1
    if first is None:
        num_steps = settings.num_steps
        first = settings.t_start
        if first is None:
            assert anchors is not None
            first = anchors.default_t_start(process)
    t = process.snap(torch.full((1, 1, 1), first, dtype=torch.float64))
    grid = levels(Start(t, t), num_steps, spacing=settings.spacing, process=process)
    check_distinct(grid, first)
    return grid, "prior" if kind == "draft" else "noised"


def check_anchors(spec: PolicySpec, anchors: Anchors | None) -> None:
    """Raise ``ValueError`` unless truncated settings have the anchors they need."""
    settings = spec.truncated
    trained = spec.network.get("type") == "anchored"
    if trained and (settings is None or settings.rank != "confidence"):
        raise ValueError(
            "a network of type 'anchored' is trained near its anchors alone; set truncated with "
            "rank 'confidence'"
        )
    if settings is None:
        return
    if settings.rank == "confidence" and not trained:
        raise ValueError(
            "rank 'confidence' needs a network of type 'anchored'; use 'denoising' or 'prior'"
        )
    if anchors is None and ("anchors" in settings.sources or settings.t_start is None):
        raise ValueError(
            "truncated plans start from anchors; fit them with Anchors.fit(windows, normalizer) or "
            "`diffpolicy anchors`, or give t_start and other sources"
        )
    shape = (spec.horizon, spec.action_dim)
    if anchors is not None and tuple(anchors.plans.shape[1:]) != shape:
        raise ValueError(
            f"the anchors are plans of shape {list(anchors.plans.shape[1:])}, this policy's are "
            f"{list(shape)}"
        )


__all__ = ["DiffusionPlanner", "Gripper", "Loop", "PolicySpec", "Sampler", "check_normalizer"]
