"""Diffusion policies: plans are samples of a conditional denoiser.

The policy's whole choice is where sampling starts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.guidance import ClassifierFreeGuidance
from diffpolicy.core.starts import shift_plan
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState, row_noise
from diffpolicy.policies.loop import PlanLoop
from diffpolicy.policies.spec import Gripper, PolicySpec, Sampler, check_normalizer


class Loop(Protocol):
    """A sampling loop: :class:`~diffpolicy.policies.loop.PlanLoop`, or a compiled form of one."""

    nfe: int
    draws: int

    def __call__(self, history: Tensor, guess: Tensor, noise: Tensor) -> Tensor:
        """Normalised plans ``[n, H, A]``."""


class DiffusionPlanner(ChunkedPolicy):
    """A trained denoiser that acts; where sampling starts is all that its plans differ in.

    A row's first plan of an episode (cold) is sampled from pure noise. With ``spec.rti`` its later
    ones (warm) start from the last plan; cold and warm rows are solved in one batch each.

    Args:
        spec: shapes, parameterisation and samplers.
        denoiser: ``spec.make_denoiser()`` with trained weights.
        normalizer: the frozen normaliser of the training data, with fields ``obs`` and ``action``.

    Raises:
        ValueError: clipping with an action normaliser whose range is not [-1, 1], shapes that do
            not match, or levels that the network cannot take.
    """

    def __init__(self, spec: PolicySpec, denoiser: Denoiser, normalizer: Normalizer) -> None:
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
            usual = np.asarray(spec.observation_step, np.float32)
            self._unusual = spec.rti.innovation * usual
        self._loops: dict[tuple[str, bool], Loop] = {}
        for kind in ("cold",) if spec.rti is None else ("cold", "warm"):
            for deterministic in (False, True):
                self._loops[kind, deterministic] = self.loop(kind, deterministic=deterministic)

    def loop(self, kind: str = "cold", *, deterministic: bool = False) -> PlanLoop:
        """The sampling loop of cold or warm rows, made anew.

        Args:
            kind: ``"cold"`` or ``"warm"``.
            deterministic: with the noise-free form of the solver.

        Raises:
            ValueError: a warm loop of a policy without ``rti``.
        """
        spec, process = self.spec, self.denoiser.process
        guided: BaseDenoiser = self.denoiser
        if spec.sampler.guidance_scale != 1:
            scale = spec.sampler.guidance_scale
            guided = ClassifierFreeGuidance(guided, scale, clip=spec.clip)
        if kind == "cold":
            grid, start = spec.sampler.grid(process), "prior"
            solver = spec.sampler.make(deterministic=deterministic)
        elif spec.rti is None:
            raise ValueError("this policy has no rti settings, so all its plans are cold")
        else:
            grid, start = spec.rti.grid(process), spec.rti.start
            solver = spec.rti.make_solver(deterministic=deterministic)
        shape = (self.n_obs_steps, self.obs_dim, self.horizon, self.action_dim)
        return PlanLoop(guided, self.normalizer, solver, grid, start=start, plan_shape=shape)

    def with_loops(self, loops: Mapping[str, Loop]) -> Self:
        """This policy with other implementations of its loops (compiled ones).

        Args:
            loops: by kind, ``"cold"`` or ``"warm"``; they take the place of both the stochastic and
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
        """Network evaluations of a cold plan."""
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
        warm = state.warm & (self.spec.rti is not None)
        if self._unusual is not None:
            warm = warm & ~state.memory["jumped"]
        plans, nfe = np.empty_like(state.plan), np.empty(len(state), np.int64)
        for kind, rows in (("cold", np.flatnonzero(~warm)), ("warm", np.flatnonzero(warm))):
            if len(rows):
                loop = self._loops[kind, deterministic]
                plans[rows] = self._solve(loop, state.take(rows), deterministic)
                nfe[rows] = loop.nfe
        return plans, nfe

    def _solve(self, loop: Loop, state: PolicyState, deterministic: bool) -> Array:
        noise = self._noise(state, loop.draws, deterministic)
        history = torch.from_numpy(state.history).to(self.device)
        guess = torch.from_numpy(self._guess(state)).to(self.device)
        out: Array = loop(history, guess, noise).cpu().numpy()
        return out

    def _noise(self, state: PolicyState, draws: int, deterministic: bool) -> Tensor:
        """``[R, n, H, A]``; one stream for all rows when deterministic."""
        shape = (draws, self.horizon, self.action_dim)
        zero = np.zeros(1, np.int64)
        seeds, counters = (zero, zero) if deterministic else (state.seed, state.counter)
        drawn = torch.from_numpy(row_noise(seeds, counters, shape))
        noise = drawn.to(self.device).transpose(0, 1)
        return noise.expand(-1, len(state), -1, -1) if deterministic else noise

    def _guess(self, state: PolicyState) -> Array:
        """The last plans shifted by the steps executed ``[n, H, A]``."""
        rti = self.spec.rti
        if rti is None:
            return state.plan
        steps = torch.from_numpy(self.executed(state))
        guess: Array = shift_plan(torch.from_numpy(state.plan), steps, tail=rti.tail).numpy()
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


__all__ = ["DiffusionPlanner", "Gripper", "Loop", "PolicySpec", "Sampler", "check_normalizer"]
