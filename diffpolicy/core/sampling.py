"""The one sampling loop. Full, truncated, warm-started and streaming diffusion all run here.

``sample()`` has no gradient policy of its own, reads nothing from the device and draws its
randomness before the loop; what must decide from data decides outside and calls it again on a
sub-grid.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise
from diffpolicy.core.noise import NoiseProcess
from diffpolicy.core.starts import Start
from diffpolicy.core.steps import Memory, Solver
from diffpolicy.settings import check_shape


class Transition(NamedTuple):
    """One row of the loop: the state the network saw, its answer, and the law of the next state.

    ``x_next ~ N(mean, std^2)`` with ``std`` broadcastable to ``[B, H, D]`` (``None`` for
    deterministic solvers). Of masked sequences ``mean`` holds the probabilities of the next tokens.
    """

    x: Tensor
    t: Tensor
    denoised: Denoised
    mean: Tensor
    std: Tensor | None
    x_next: Tensor


class Trajectory(NamedTuple):
    """Result of ``sample(record=True)``: the final sample and every transition, oldest first."""

    x0: Tensor
    transitions: tuple[Transition, ...]


class Grid:
    """A grid of levels made ready for a denoiser and solver, its constants on the device.

    Build one with :func:`prepare` when many samples share the same levels (every policy does), and
    pass it to :func:`sample` in place of the levels.
    """

    def __init__(self, denoise: BaseDenoiser, solver: Solver, levels: Tensor, like: Tensor) -> None:
        denoise.check_t(levels[0])
        rows = solver.rows(denoise.process, levels)
        shape = levels.shape[1:]
        flat = torch.stack([v.broadcast_to(shape) for row in rows for v in row.constants()])
        values = iter(flat.to(like.device, like.dtype, non_blocking=True).unbind(0))
        self.rows = [row.with_constants([next(values) for _ in row.constants()]) for row in rows]
        self.denoise = self._on_grid(denoise)
        self._denoiser, self._weights = denoise, list(denoise.parameters())
        self._made_of = self.weight_versions()
        self.levels = levels
        self.has_graph = torch.is_grad_enabled()
        self.stochastic = any(row.stochastic for row in rows)
        self.process: NoiseProcess = denoise.process

    def _on_grid(self, denoise: BaseDenoiser) -> GridDenoise:
        t = [row.t for row in self.rows]
        ends = [getattr(row, "s", None) for row in self.rows]  # rows that reveal tokens have none
        s = [level if end is None else end for level, end in zip(t, ends, strict=True)]
        return denoise.on_grid(torch.stack(t), torch.stack(s))

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return len(self.rows)

    def part(self, first: int, last: int, denoise: GridDenoise | None = None) -> Grid:
        """Evaluations ``first`` to ``last`` (not included) as a grid of their own.

        For solvers of one evaluation a step and without a memory. ``denoise(row, x, cond)``, with
        rows of the whole grid, may take the denoiser's place.
        """
        self.follow_weights()
        inner, part = denoise or self.denoise, copy(self)
        part._weights, part._made_of = [], ()  # what it is part of follows them
        part.rows, part.levels = self.rows[first:last], self.levels[first : last + 1]
        part.denoise = lambda row, x, cond: inner(first + row, x, cond)
        return part

    def follow_weights(self) -> None:
        """Embed the levels anew if the weights changed since: loaded, trained, or another copy's.

        Edits through ``parameter.data`` are seen by nobody, torch's own bookkeeping included.
        """
        if torch.compiler.is_compiling() or self._made_of == (made_of := self.weight_versions()):
            return
        with torch.inference_mode(mode=False), torch.set_grad_enabled(self.has_graph):
            self.denoise = self._on_grid(self._denoiser)
        self._made_of = made_of

    def weight_versions(self) -> tuple[tuple[int, int], ...]:
        """What changes whenever the denoiser's weights do."""
        try:
            return tuple((weight.data_ptr(), weight._version) for weight in self._weights)
        except RuntimeError:  # made in inference mode, where torch does not count
            return tuple((weight.data_ptr(), 0) for weight in self._weights)


def prepare(denoise: BaseDenoiser, solver: Solver, levels: Tensor, like: Tensor) -> Grid:
    """Precompute everything that does not depend on the state, for states like ``like``.

    Its embeddings of the levels follow the weights. To back-propagate into the weights, prepare
    with gradients enabled.
    """
    return Grid(denoise, solver, levels, like)


def sample(
    denoise: BaseDenoiser,
    solver: Solver,
    start: Start,
    levels: Tensor | Grid,
    *,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    before: Tensor | None = None,
    grad_steps: int | None = None,
    checkpoint: bool = False,
    record: bool = False,
) -> Tensor | Trajectory:
    """Run ``solver`` with ``denoise`` from ``start`` down ``levels``.

    Args:
        denoise: ``(x_t, t, cond) -> Denoised``.
        solver: see :mod:`diffpolicy.core.solvers`.
        start: a state ``[B, H, D]`` and its level.
        levels: host grid ``[K + 1, ...]`` derived from ``start`` by
            :func:`diffpolicy.core.starts.levels`, or the :class:`Grid` made from it.
        cond: condition ``[B, C]`` handed to the denoiser.
        noise: ``[R, B, H, D]`` standard normal (of masked sequences: Gumbel), one slice per network
            evaluation, for stochastic solvers; drawn from ``generator`` when absent.
        generator: source of that noise (the global one when absent).
        before: the state before the start's ``[B, H, D]``, of a chain that goes on and whose solver
            looks back at it.
        grad_steps: build a graph for the last ``grad_steps`` evaluations only (0: none); ``None``
            leaves the caller's gradient mode alone.
        checkpoint: recompute each evaluation with a graph in the backward pass instead of storing
            its activations.
        record: return a :class:`Trajectory`.

    Returns:
        The final state ``[B, H, D]``, or the trajectory.

    Raises:
        ValueError: a grid that does not begin at the start's level, or noise of the wrong shape.
    """
    wants_graph = torch.is_grad_enabled() and grad_steps != 0
    if isinstance(levels, Grid):
        grid = levels
        grid.follow_weights()
    else:
        with torch.set_grad_enabled(wants_graph):
            grid = prepare(denoise, solver, levels, start.x)
    if wants_graph and not grid.has_graph:
        raise ValueError(
            "this grid was prepared without gradients: enable them, or sample under torch.no_grad()"
        )
    if grid.levels[0].shape != start.t.shape or not torch.equal(grid.levels[0], start.t):
        raise ValueError("levels[0] differs from start.t: make the grid by levels(start, ...)")
    noise = _loop_noise(grid, start.x, noise, generator)
    ambient = torch.is_grad_enabled()
    first_grad = 0 if grad_steps is None else len(grid.rows) - grad_steps
    modulations = getattr(grid.denoise, "modulations", None)
    with torch.set_grad_enabled(wants_graph):
        films = None if modulations is None else modulations(start.x, cond)
    recompute: Callable[..., Denoised] = checkpointed
    memory = Memory(start.x, start.x if before is None else before, ())
    transitions: list[Transition] = []
    for i, row in enumerate(grid.rows):
        x = memory.x
        with torch.set_grad_enabled(ambient and i >= first_grad):
            inputs: tuple[Any, ...] = (i, x, cond) if films is None else (i, x, cond, films[i])
            if checkpoint and torch.is_grad_enabled():
                out = recompute(grid.denoise, *inputs, use_reentrant=False)
            else:
                out = grid.denoise(*inputs)
            memory, mean, std = row.advance(memory, out, None if noise is None else noise[i])
        if record:
            transitions.append(Transition(x, row.t, out, mean, std, memory.x))
    return Trajectory(memory.x, tuple(transitions)) if record else memory.x


def _loop_noise(
    grid: Grid, x: Tensor, noise: Tensor | None, generator: torch.Generator | None
) -> Tensor | None:
    if not grid.stochastic:
        return None
    shape = (grid.nfe, *x.shape)
    if noise is None:
        return grid.process.draw_noise(shape, generator, x)
    check_shape("noise (a slice per network evaluation)", noise.shape, shape)
    return noise
