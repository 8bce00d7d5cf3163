"""A policy's planning as one module: from raw observations to bounded actions.

What goes into an exported file: everything that the policy does between its memory and its
actions, for rows that begin an episode (``"cold"``) or go on in one (``"warm"``). The starts are
the policy's own: :meth:`DiffusionPlanner.moved`, :meth:`StreamingPlanner.moved_up` and what
:class:`~diffpolicy.policies.plan_loop.PlanLoop` begins with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.data.observation import from_fields, to_fields
from diffpolicy.policies.boundary import now_of
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.plan_loop import PlanLoop
from diffpolicy.policies.streaming import StreamingPlanner
from diffpolicy.runtime.graph import example_inputs
from diffpolicy.runtime.ports import SEEN, Port, seen_ports
from diffpolicy.runtime.rolled import rolled


class DeployedLoop(nn.Module):
    """Planning and the way to actions, as it goes into the file: a plan sampled by one loop.

    Its inputs are those of ``history [B, To, O]`` raw (or each ``history.NAME``, in the type that
    policies see: an image as bytes), ``last_plan`` (or ``last_buffer``) ``[B, H, P]`` normalised,
    ``shift [B]`` int64 steps executed and ``noise [R, B, H, P]`` that are used; its outputs ``plan
    [B, H, P]`` normalised, ``actions [B, Ta, A]`` in environment units, and the new ``buffer`` of a
    streaming policy. Plans are as policies remember them: absolute.

    Args:
        planner: the policy.
        kind: one of :func:`deployed_kinds`.
        loop: what samples.
        roll: hold the step of a long loop once, see :mod:`diffpolicy.runtime.rolled`.

    Attributes:
        carries: what a warm row hands on, ``"plan"`` or ``"buffer"``; ``None`` if nothing.
        draws: R, slices of noise.
        nfe: network evaluations.
        max_shift: the most steps that may have been executed since the last plan.
        start_level: noise levels of the start.
    """

    carried, rolls_on = "plan", False

    def __init__(self, planner: DiffusionPlanner, kind: str, loop: PlanLoop, *, roll: bool) -> None:
        super().__init__()
        self.planner, self.loop, self.run = planner, loop, rolled(loop) if roll else loop
        self.carries = self.carried if kind == "warm" else None
        self.draws, self.nfe, self.max_shift = loop.draws, loop.nfe, planner.horizon
        self.start_level = loop.levels[0].flatten().tolist()
        first = planner.n_obs_steps - 1
        self.executed = slice(first, first + planner.n_action_steps)

    @property
    def ports(self) -> list[Port]:
        """The inputs that are used, in their order."""
        plan = ("batch", self.loop.horizon, self.loop.action_dim)
        carried = [
            Port(f"last_{self.carries}", plan, "float32", f"the last output {self.carries!r}"),
            Port("shift", ("batch",), "int64", "control steps executed since the last plan"),
        ]
        noise = Port("noise", (self.draws, *plan), "float32", "standard normal")
        seen = seen_ports(self.loop.fields, self.loop.obs_shape[0])
        used = [noise] if self.draws else []
        return [*seen, *(carried if self.carries else []), *used]

    @property
    def made(self) -> list[Port]:
        """The outputs in their order."""
        plan = ("batch", self.loop.horizon, self.loop.action_dim)
        steps = ("batch", self.executed.stop - self.executed.start, self.planner.action_dim)
        units = "environment, within bounds; the first is for the newest observation's step"
        buffer = Port("buffer", plan, "float32", "normalised, at the levels of its actions")
        return [
            Port("plan", plan, "float32", "normalised"),
            Port("actions", steps, "float32", units),
            *([buffer] if self.rolls_on else []),
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for the inputs in the order of ``ports``."""
        given = {port.name: value for port, value in zip(self.ports, inputs, strict=True)}
        unused = inputs[0]  # stands in for an input that is not used
        last, shift = given.get(f"last_{self.carries}", unused), given.get("shift", unused)
        history, noise = from_fields(given, SEEN), given.get("noise", unused)
        plan, *buffer = self.planned(history, last, shift, noise)
        acting = plan[:, self.executed, -self.planner.layout.action_dim :]
        return plan, self.planner.boundary.actions(acting), *buffer

    def planned(
        self, history: Any, last: Tensor, shift: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """Normalised plans ``[B, H, P]`` (and buffers); unused inputs may be anything."""
        guess = self.guess(history, last, shift) if self.carries else last
        return (self.absolute(self.run(history, guess, noise), history),)

    def guess(self, history: Any, last: Tensor, shift: Tensor) -> Tensor:
        """The last plan moved to the present, as the network says it."""
        return self.planner.moved(last, shift, now_of(history))

    def absolute(self, plan: Tensor, history: Any) -> Tensor:
        """A plan of the network as it is remembered."""
        return self.planner.boundary.absolute(plan, now_of(history))

    def example(self, batch: int, *, seed: int = 0) -> list[Tensor]:
        """Random inputs for ``batch`` rows, in the order of ``ports``."""
        generator = torch.Generator().manual_seed(seed)
        history, last, _ = example_inputs(self.loop, batch, seed=seed)
        last = self.absolute(last, history)
        shape = (self.draws, batch, self.loop.horizon, self.loop.action_dim)
        every = {
            **to_fields(history, SEEN),
            f"last_{self.carries}": last,
            "shift": torch.randint(self.max_shift + 1, (batch,), generator=generator),
            "noise": torch.randn(shape, generator=generator),
        }
        return [every[port.name] for port in self.ports]


class _Ranked(DeployedLoop):
    """The best of several plans of a truncated policy."""

    def __init__(
        self, planner: DiffusionPlanner, kind: str, *, deterministic: bool, roll: bool
    ) -> None:
        # Fresh loops: those of a compiled policy cannot be traced.
        loops: dict[str, Any]
        loops = {k: planner.loop(k, deterministic=deterministic) for k in planner.kinds}
        super().__init__(planner, kind, loops["guesses"], roll=False)
        candidates = planner._candidates(deterministic=deterministic)
        if roll and candidates.settings.rank != "confidence":  # which needs more than plans
            loops = {name: rolled(part) for name, part in loops.items()}
        self.parts = nn.ModuleDict(loops)
        self.candidates = replace(candidates, loops=loops)
        self.draws, self.nfe = self.candidates.draws, self.candidates.nfe

    def planned(
        self, history: Any, last: Tensor, shift: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        warm = self.carries is not None
        previous = self.guess(history, last, shift) if warm else torch.zeros_like(noise[0])
        same = torch.ones_like if warm else torch.zeros_like
        has_previous = same(noise[0, :, 0, 0], dtype=torch.bool)
        chosen = self.candidates.propose(history, previous, has_previous, noise).chosen()
        return (self.absolute(chosen, history),)


class _Streamed(DeployedLoop):
    """One tick of a streaming policy, or the filling of its buffer."""

    carried, rolls_on = "buffer", True

    def __init__(
        self, planner: StreamingPlanner, kind: str, *, deterministic: bool, roll: bool
    ) -> None:
        samples = kind == "cold" and planner.streaming.fill == "denoise"
        loop = planner.loop("cold" if samples else "warm", deterministic=deterministic)
        super().__init__(planner, kind, loop, roll=roll)
        self.streaming, self.samples, self.fills = planner, samples, kind == "cold"
        self.draws, self.max_shift = loop.draws + 1, planner.n_action_steps
        self.constant = torch.from_numpy(planner._constant)

    def planned(
        self, history: Any, last: Tensor, shift: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        own, rest = noise[-1], noise[:-1]
        if self.samples:
            plan = self.run(history, own, rest)
            return plan, self.streaming._noised(plan, 0.0, own)
        if self.fills:
            buffer = self.streaming._noised(self.constant.expand_as(own), 1.0, own)
        else:
            buffer = self.streaming.moved_up(last, shift, own)
        plan, buffer = self.run(history, buffer, rest).chunk(2, dim=1)
        return plan, buffer


def deployed_loop(
    planner: DiffusionPlanner, kind: str, *, deterministic: bool, roll: bool = True
) -> DeployedLoop:
    """One of a policy's loops as it goes into a file.

    Args:
        planner: the policy.
        kind: one of :func:`deployed_kinds`.
        deterministic: with the noise-free form of the solver.
        roll: as of :class:`DeployedLoop`.
    """
    if isinstance(planner, StreamingPlanner):
        return _Streamed(planner, kind, deterministic=deterministic, roll=roll).eval()
    if planner.spec.truncated is not None:
        return _Ranked(planner, kind, deterministic=deterministic, roll=roll).eval()
    loop = planner.loop(kind, deterministic=deterministic)
    return DeployedLoop(planner, kind, loop, roll=roll).eval()


def deployed_kinds(planner: DiffusionPlanner) -> tuple[str, ...]:
    """The files of a policy: ``"cold"``, and ``"warm"`` if plans start from the last one."""
    settings = planner.spec.truncated
    if settings is None:
        return planner.kinds
    warm = "previous" in settings.sources or settings.continuity > 0
    return ("cold", "warm") if warm else ("cold",)
