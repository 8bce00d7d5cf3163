"""Streaming diffusion: a buffer of partly denoised actions that rolls along with time.

Hoeg, Du & Egeland 2024 (arXiv 2406.04806). Near actions are nearly clean, far ones nearly noise.
Each plan denoises the whole buffer a little, which finishes its first chunk; the rest waits in
``state.memory["buffer"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import PriorSampler
from diffpolicy.core.sampling import Trajectory
from diffpolicy.core.starts import Ramp, ramp_start, shift_plan
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.base import Array, PolicyState
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.plan_loop import PlanLoop
from diffpolicy.policies.rows import kind_by_kind
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.settings import check_settings, check_shape, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True)
class Streaming:
    """How a streaming policy plans.

    Args:
        steps_per_chunk: network evaluations K per chunk of ``n_action_steps`` actions. An action is
            denoised K times for each of the h chunks of the plan; the published code has K = N / h
            for its N training levels.
        fill: the buffer of a row without one. ``"denoise"``: a full sample, noised to the levels of
            the buffer. ``"noise"``: zeros noised to them; ``"constant"``: a given action noised to
            them (both cost K evaluations only, and their first chunks are worse).
        constant: that action, in environment units ``[A]``.

    Raises:
        ValueError: settings out of range or that do not belong together.
    """

    steps_per_chunk: int = ranged("[1, inf)", 5)
    fill: str = one_of("denoise", "noise", "constant")
    constant: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.constant is None and self.fill == "constant":
            raise ValueError("fill='constant' needs constant=(the action to begin with)")


class StreamingLoop(PlanLoop):
    """One tick of a streaming policy; ``forward`` returns the plan and the buffer.

    As :class:`~diffpolicy.policies.plan_loop.PlanLoop` with a given start, except that the result
    is ``[n, 2 H, A]``: the clean plan, then the buffer at the levels of the tick's end. The plan's
    first ``To - 1 + Ta`` positions are finished; the others are the network's last clean estimate.
    """

    def __init__(self, *parts: Any, **how: Any) -> None:
        super().__init__(*parts, start="given", **how)
        self.finished = (self.levels[-1] == 0).to(self.device)

    def forward(self, history: Tensor, guess: Tensor, noise: Tensor, *known: Tensor) -> Tensor:
        """One tick per row.

        Args:
            history: raw observations ``[n, To, O]``.
            guess: the buffer at the levels of the tick's start ``[n, H, A]``.
            noise: standard normal ``[R, n, H, A]``.
            known: of the condition.

        Returns:
            Plans and buffers ``[n, 2 H, A]``, normalised.
        """
        result = self._sample(self.condition(history, *known), guess, noise, record=True)
        assert isinstance(result, Trajectory)  # what record=True returns
        estimate = result.transitions[-1].denoised.x0_hat
        return torch.cat([torch.where(self.finished, result.x0, estimate), result.x0], dim=1)


class StreamingPlanner(DiffusionPlanner):
    """A diffusion policy whose plans roll: K evaluations per chunk, from a buffer per row.

    The denoiser must be trained at such levels: ``spec.level_law="position"``, with the same
    ``n_action_steps``.
    A cold row fills its buffer (``streaming.fill``). A row that executed fewer than
    ``n_action_steps`` actions of its plan, as asynchronous control does, has its buffer noised up
    to the levels that a tick starts from; one that executed more is filled anew.

    Args:
        spec: as of :class:`~diffpolicy.policies.diffusion.DiffusionPlanner`, without ``rti``; its
            solver takes the ticks, and the full sample of ``fill="denoise"``.
        denoiser: trained, and taking levels per position.
        normalizer: of the training data.
        streaming: evaluations per chunk, and how buffers are filled.

    Raises:
        ValueError: a plan of fewer than two chunks, a network that takes no levels per position,
            or settings that do not fit.
    """

    def __init__(
        self,
        spec: PolicySpec,
        denoiser: Denoiser,
        normalizer: Normalizer,
        *,
        streaming: Streaming | None = None,
    ) -> None:
        if spec.rti is not None or spec.truncated is not None:
            raise ValueError("a streaming policy has neither rti nor truncated, but its buffer")
        if spec.layout != "action" or spec.selection is not None or spec.temperature != 1:
            none = "no other layout, selection or temperature"
            raise ValueError(f"a streaming policy rolls one plan of actions; it takes {none}")
        if spec.sampler.solver == "bespoke":
            raise ValueError(
                "a searched sampler is for full solves, and ticks are steps between other levels: "
                "name another solver (sampler.solver='ddim')"
            )
        if spec.level_law != "position":
            law = f"level_law='position', and this one was trained with {spec.level_law!r}"
            raise ValueError(f"streaming needs a policy of {law}")
        if spec.representation is not None and spec.representation.moves:
            raise ValueError(
                "a streaming policy's buffer holds noisy actions, which cannot be said anew in the "
                "next state: it takes action groups of kind 'absolute' alone"
            )
        self.streaming = Streaming() if streaming is None else streaming
        trained = spec.trained_action_steps
        if trained is not None and trained != spec.n_action_steps:
            other = f"n_action_steps={spec.n_action_steps}"
            raise ValueError(f"this policy was trained to stream chunks of {trained}, not {other}")
        self.ramp = Ramp(**spec.sizes)
        super().__init__(spec, denoiser, normalizer)
        self._constant = self._first_action()

    def _place(self) -> None:
        super()._place()
        keep, add = renoise_tables(self.denoiser.process, self.ramp)
        self._renoise = keep.to(self.device), add.to(self.device)

    def _first_action(self) -> Array:
        """What a buffer that is not sampled begins as, normalised ``[A]``."""
        constant = self.streaming.constant
        if constant is None:
            return np.zeros(self.plan_dim, np.float32)
        check_shape("streaming.constant", (len(constant),), (self.action_dim,))
        out: Array = self.boundary.entries(np.array([constant], np.float32))[0]
        return out

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("cold", "warm")

    def loop(
        self,
        kind: str = "cold",
        *,
        deterministic: bool = False,
        sampler: PriorSampler | None = None,
    ) -> PlanLoop:
        """The full sample (``"cold"``) or the tick (``"warm"``, a :class:`StreamingLoop`)."""
        if kind != "warm":
            return super().loop(kind, deterministic=deterministic, sampler=sampler)
        base = super().loop("cold", deterministic=deterministic)
        return StreamingLoop(
            base.denoiser,
            base.normalizer,
            base.solver,
            self.ramp.grid(self.streaming.steps_per_chunk),
            plan_shape=(*base.obs_shape, self.horizon, self.plan_dim),
            condition=base.condition,
        )

    @property
    def nfe_per_chunk(self) -> int:
        """Network evaluations of a tick."""
        return self._loops["warm", False].nfe

    def initial_state(self, seeds: Sequence[int]) -> PolicyState:
        state = super().initial_state(seeds)
        return state.remember(buffer=np.zeros_like(state.plan))

    def adopted(self, state: PolicyState, plan: Array, nfe: Array, *made: Array) -> PolicyState:
        return super().adopted(state.remember(buffer=made[0]), plan, nfe)

    def _cold(self, state: PolicyState) -> Array:
        stale = state.cursor > self.n_obs_steps - 1 + self.n_action_steps
        cold: Array = ~state.warm | stale
        return cold

    def plan_kinds(self, state: PolicyState) -> Array:
        """Rows whose buffer goes on ``[N]``; the others are sampled in full."""
        rolled: Array = ~self._cold(state) | (self.streaming.fill != "denoise")
        return rolled

    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, ...]:
        """One tick of every row: plans, network evaluations and buffers ``[n, H, A]``."""

        def tick(rolls: bool, rows: PolicyState) -> tuple[Array, ...]:
            plan, buffer = (self._rolled if rolls else self._sampled)(rows, deterministic)
            nfe = self._loops["warm" if rolls else "cold", deterministic].nfe
            return plan, np.full(len(rows), nfe), buffer

        with self._no_graph():
            return kind_by_kind(tick, state, self.plan_kinds(state))

    def _sampled(self, state: PolicyState, deterministic: bool) -> tuple[Array, Array]:
        """A full sample, as a policy without streaming draws it, and a buffer made of it."""
        loop = self._loops["cold", deterministic]
        noise = self.draw_noise(state, loop.draws + 1, deterministic)
        plan = loop(self.on_device(state.history), noise[-1], noise[:-1])
        buffer = self._noised(plan, 0.0, noise[-1])
        return plan.cpu().numpy(), buffer.cpu().numpy()

    def _rolled(self, state: PolicyState, deterministic: bool) -> tuple[Array, Array]:
        """One tick of buffers moved up by the steps executed; those of cold rows are filled."""
        loop = self._loops["warm", deterministic]
        noise = self.draw_noise(state, loop.draws + 1, deterministic)
        steps = np.minimum(self.executed(state), self.n_action_steps)
        moved = self.on_device(steps)
        buffer = self.moved_up(self.on_device(state.memory["buffer"]), moved, noise[-1])
        if (cold := self._cold(state)).any():
            start = self.on_device(self._constant).expand_as(buffer)
            filled = self._noised(start, 1.0, noise[-1])
            buffer = torch.where(self.on_device(cold)[:, None, None], filled, buffer)
        both = loop(self.on_device(state.history), buffer, noise[:-1]).cpu().numpy()
        return both[:, : self.horizon], both[:, self.horizon :]

    def moved_up(self, last: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """Buffers ``[n, H, A]`` after ``steps`` ``[n]`` actions, at a tick's first levels."""
        keep, add = self._renoise
        return keep[steps] * shift_plan(last, steps) + add[steps] * noise

    def _noised(self, x0: Tensor, phase: float, noise: Tensor) -> Tensor:
        """A clean plan noised to the levels of a tick's start (phase 1) or end (0)."""
        return ramp_start(self.denoiser.process, x0, self.ramp, noise, phase=phase).x


def renoise_tables(process: GaussianProcess, ramp: Ramp) -> tuple[Tensor, Tensor]:
    """Weights that bring a shifted buffer to the levels from which a tick starts.

    After a shift by e the state x at position p has level t and goes to level ``t' >= t`` by the
    forward process: ``r x + sqrt(sigma'^2 - r^2 sigma^2) noise`` with ``r = alpha' / alpha``. After
    e = Ta that moves the past positions only: the others are where the next tick wants them.
    Positions from beyond the buffer become pure noise.

    Returns:
        Weights of the shifted buffer and of standard normal noise, float32 ``[Ta + 1, H, 1]`` by e.
    """
    start, end = (ramp.levels(torch.full((1, 1), p, dtype=torch.float64))[:, 0] for p in (1.0, 0.0))
    position = torch.arange(ramp.horizon) + torch.arange(ramp.n_action_steps + 1)[:, None]
    inside = position < ramp.horizon
    source = torch.where(inside, end[position.clamp(max=ramp.horizon - 1)], 1.0)
    ratio = process.alpha(start) / process.alpha(source)
    spread = process.sigma(start).square() - (ratio * process.sigma(source)).square()
    same, prior = inside & (source == start), (start >= 1).expand_as(inside)
    keep = torch.where(same, 1.0, torch.where(prior, 0.0, ratio))
    add = torch.where(prior, process.sigma(start), spread.clamp_min(0).sqrt())
    add = torch.where(same, 0.0, add)
    return keep[..., None].float(), add[..., None].float()
