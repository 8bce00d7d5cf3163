"""A policy's planning as one module: from raw observations to bounded actions.

What goes into an exported file: everything that the policy does between its memory and its
actions, for rows that begin an episode (``"cold"``) or go on in one (``"warm"``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpolicy.core.starts import shift_plan
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.plan_loop import PlanLoop
from diffpolicy.policies.streaming import StreamingPlanner
from diffpolicy.runtime.compile import example_inputs
from diffpolicy.runtime.rolled import rolled


class Port(NamedTuple):
    """One input or output of an exported file; the axis ``"batch"`` is that of the rows."""

    name: str
    axes: tuple[int | str, ...]
    dtype: str
    unit: str


class Sampled(nn.Module):
    """A plan sampled by one loop; warm rows start from their last plan.

    Args:
        planner: the policy.
        kind: ``"cold"`` or ``"warm"``.
        loop: what samples.

    Attributes:
        carries: what a warm row hands on, ``"plan"`` or ``"buffer"``; ``None`` if nothing.
        draws: R, slices of noise.
        nfe: network evaluations.
        max_shift: the most steps that may have been executed since the last plan.
        start_level: noise levels of the start.
    """

    carries: str | None

    def __init__(
        self, planner: DiffusionPlanner, kind: str, loop: PlanLoop, *, roll: bool = True
    ) -> None:
        super().__init__()
        self.loop, self.run = loop, rolled(loop) if roll else loop
        self.carries = "plan" if kind == "warm" else None
        self.draws, self.nfe, self.max_shift = self.loop.draws, self.loop.nfe, planner.horizon
        self.start_level = self.loop.levels[0].flatten().tolist()
        self.grippers = planner.spec.grippers
        self.tail = "hold" if planner.spec.rti is None else planner.spec.rti.tail

    def forward(
        self, history: Tensor, last: Tensor, shift: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """Normalised plans ``[B, H, A]`` (and buffers); unused inputs may be anything."""
        guess = self.guess(last, shift) if self.carries else last
        return (self.run(history, guess, noise),)

    def guess(self, last: Tensor, shift: Tensor) -> Tensor:
        """The last plan moved to the present; grippers as the policy treats them."""
        guess = shift_plan(last, shift, tail=self.tail)
        for gripper in self.grippers:
            if gripper.mode == "clip":
                guess = _set_ends(guess, gripper.dim, 1 / gripper.factor)
        return guess


class Ranked(Sampled):
    """The best of several plans of a truncated policy."""

    def __init__(
        self, planner: DiffusionPlanner, kind: str, *, deterministic: bool, roll: bool
    ) -> None:
        # Fresh loops: those of a compiled policy cannot be traced.
        loops: dict[str, Any]
        loops = {k: planner.loop(k, deterministic=deterministic) for k in planner.kinds}
        super().__init__(planner, kind, loops["guesses"], roll=False)
        candidates = planner._candidates(deterministic=deterministic)
        whole = not roll or candidates.settings.rank == "confidence"  # which needs more than plans
        loops = loops if whole else {name: rolled(part) for name, part in loops.items()}
        self.parts = nn.ModuleDict(loops)
        self.candidates = replace(candidates, loops=loops)
        self.draws, self.nfe = self.candidates.draws, self.candidates.nfe

    def forward(
        self, history: Tensor, last: Tensor, shift: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        warm = self.carries is not None
        previous = self.guess(last, shift) if warm else torch.zeros_like(noise[0])
        has_previous = (torch.ones_like if warm else torch.zeros_like)(
            history[:, 0, 0], dtype=torch.bool
        )
        return (self.candidates.propose(history, previous, has_previous, noise).chosen(),)


class Rolled(nn.Module):
    """One tick of a streaming policy, or the filling of its buffer."""

    def __init__(
        self, planner: StreamingPlanner, kind: str, *, deterministic: bool, roll: bool
    ) -> None:
        super().__init__()
        self.fills = kind == "cold"
        samples = self.fills and planner.streaming.fill == "denoise"
        self.planner, self.samples = planner, samples
        self.loop = planner.loop("cold" if samples else "warm", deterministic=deterministic)
        self.carries = None if self.fills else "buffer"
        self.run = rolled(self.loop) if roll else self.loop
        self.draws, self.nfe = self.loop.draws + 1, self.loop.nfe
        self.max_shift = planner.n_action_steps
        self.start_level = self.loop.levels[0].flatten().tolist()
        self.constant = torch.from_numpy(planner._constant)

    def forward(
        self, history: Tensor, last: Tensor, shift: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """Normalised plans and buffers, each ``[B, H, A]``."""
        own, rest = noise[-1], noise[:-1]
        if self.samples:
            plan = self.run(history, own, rest)
            return plan, self._noised(plan, 0.0, own)
        if self.fills:
            buffer = self._noised(self.constant.expand_as(own), 1.0, own)
        else:
            keep, add = self.planner._renoise
            buffer = keep[shift] * shift_plan(last, shift) + add[shift] * own
        plan, buffer = self.run(history, buffer, rest).chunk(2, dim=1)
        return plan, buffer

    def _noised(self, x0: Tensor, phase: float, noise: Tensor) -> Tensor:
        return self.planner._noised(x0, phase, noise)


class DeployedLoop(nn.Module):
    """Planning and the way to actions, as it goes into the file.

    Its inputs are those of ``history [B, To, O]`` raw, ``last_plan`` (or ``last_buffer``)
    ``[B, H, A]`` normalised, ``shift [B]`` int64 steps executed and ``noise [R, B, H, A]`` that are
    used; its outputs ``plan [B, H, A]`` normalised, ``actions [B, Ta, A]`` in environment units,
    and the new ``buffer`` of a streaming policy.

    Args:
        planner: the policy.
        kind: one of :func:`deployed_kinds`.
        deterministic: with the noise-free form of the solver.
        roll: hold the step of a long loop once, see :mod:`diffpolicy.runtime.rolled`.
    """

    def __init__(
        self, planner: DiffusionPlanner, kind: str, *, deterministic: bool, roll: bool = True
    ) -> None:
        super().__init__()
        self.core: Sampled | Rolled
        options = {"deterministic": deterministic, "roll": roll}
        if isinstance(planner, StreamingPlanner):
            self.core = Rolled(planner, kind, **options)
        elif planner.spec.truncated is not None:
            self.core = Ranked(planner, kind, **options)
        else:
            loop = planner.loop(kind, deterministic=deterministic)
            self.core = Sampled(planner, kind, loop, roll=roll)
        self.normalizer, self.grippers = planner.normalizer, planner.spec.grippers
        first = planner.n_obs_steps - 1
        self.executed = slice(first, first + planner.n_action_steps)
        self.bounds = tuple(
            None if b is None else torch.tensor(b, dtype=torch.float32)
            for b in (planner.spec.action_low, planner.spec.action_high)
        )
        carried = () if self.core.carries is None else (f"last_{self.core.carries}", "shift")
        self.names = ("history", *carried, *(("noise",) if self.core.draws else ()))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for the inputs in the order of ``names``."""
        given = dict(zip(self.names, inputs, strict=True))
        history = given["history"]  # also stands in for an input that is not used
        last = given.get(f"last_{self.core.carries}", history)
        plan, *buffer = self.core(
            history, last, given.get("shift", history), given.get("noise", history)
        )
        return plan, self.actions(plan[:, self.executed]), *buffer

    def actions(self, normalised: Tensor) -> Tensor:
        """Normalised to environment units, within bounds."""
        for gripper in self.grippers:
            end = 1 / gripper.factor if gripper.mode == "scale" else 1.0
            normalised = _set_ends(normalised, gripper.dim, end)
        out = self.normalizer.unnormalize("action", normalised)
        low, high = self.bounds
        out = out if low is None else torch.maximum(out, low)
        return out if high is None else torch.minimum(out, high)

    def inputs(self) -> list[Port]:
        """The inputs in the order of ``names``."""
        loop, carries = self.core.loop, self.core.carries
        plan = (loop.horizon, loop.action_dim)
        every = (
            Port("history", ("batch", *loop.obs_shape), "float32", "environment, oldest first"),
            Port(f"last_{carries}", ("batch", *plan), "float32", f"the last output {carries!r}"),
            Port("shift", ("batch",), "int64", "control steps executed since the last plan"),
            Port("noise", (self.core.draws, "batch", *plan), "float32", "standard normal"),
        )
        return [port for port in every if port.name in self.names]

    def outputs(self) -> list[Port]:
        """The outputs in their order."""
        loop = self.core.loop
        steps = self.executed.stop - self.executed.start
        plan = ("batch", loop.horizon, loop.action_dim)
        units = "environment, within bounds; the first is for the newest observation's step"
        every = [
            Port("plan", plan, "float32", "normalised"),
            Port("actions", ("batch", steps, loop.action_dim), "float32", units),
        ]
        if isinstance(self.core, Rolled):
            every.append(
                Port("buffer", plan, "float32", "normalised, at the levels of its actions")
            )
        return every

    def example(self, batch: int, *, seed: int = 0) -> list[Tensor]:
        """Random inputs for ``batch`` rows, in the order of ``names``."""
        loop, generator = self.core.loop, torch.Generator().manual_seed(seed)
        history, last, _ = example_inputs(loop, batch, seed=seed)
        shape = (self.core.draws, batch, loop.horizon, loop.action_dim)
        every = {
            "history": history,
            f"last_{self.core.carries}": last,
            "shift": torch.randint(self.core.max_shift + 1, (batch,), generator=generator),
            "noise": torch.randn(shape, generator=generator),
        }
        return [every[name] for name in self.names]


def deployed_kinds(planner: DiffusionPlanner) -> tuple[str, ...]:
    """The files of a policy: ``"cold"``, and ``"warm"`` if plans start from the last one."""
    if isinstance(planner, StreamingPlanner):
        return ("cold", "warm")
    settings = planner.spec.truncated
    if settings is None:
        return planner.kinds
    warm = "previous" in settings.sources or settings.continuity > 0
    return ("cold", "warm") if warm else ("cold",)


def _set_ends(values: Tensor, dim: int, end: float) -> Tensor:
    """Entries ``dim`` of the last axis set to ``end`` where positive, else to ``-end``."""
    chosen = torch.arange(values.shape[-1]) == dim
    return torch.where(chosen, torch.where(values > 0, end, -end), values)
