"""A chain cut into its steps, each a :func:`~diffpolicy.core.sampling.sample` of its own.

What decides from data between steps (search, resampling) needs the network's answer *before* the
step it belongs to; here the answer is asked for first, rows are chosen, and the step then runs on
that answer without another evaluation. Weights of groups of particles are ``[B, N]``, in float64
logs; reckoning with them never reads the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise
from diffpolicy.core.masking import MaskingProcess, hard_one_hot
from diffpolicy.core.noise import NoiseProcess
from diffpolicy.core.reveal import Ancestral, Scheduled, one_by_one
from diffpolicy.core.sampling import sample
from diffpolicy.core.solvers import make_solver
from diffpolicy.core.starts import Start, levels, prior_start
from diffpolicy.core.steps import Solver
from diffpolicy.guidance.reward import reward_of

BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True)
class Chain:
    """A denoiser on a grid of K levels, and the reward of what it ends at.

    Attributes:
        denoise: gives the answers.
        denoised: the answer at level ``k`` of the grid, ``(k, x, cond)``.
        reward: of masked sequences ``[B, L, V] -> [B]``; continuous ``([B, H, D], cond) -> [B]``.
        solver: makes the steps.
        levels: host grid ``[K + 1, ...]``.
        random_order: each step reveals one position, drawn anew for every row.
        generator: source of all randomness.
    """

    denoise: BaseDenoiser
    denoised: GridDenoise
    reward: Callable[..., Tensor]
    solver: Solver
    levels: Tensor
    random_order: bool
    generator: torch.Generator | None

    @classmethod
    def of(
        cls,
        denoise: BaseDenoiser,
        reward: Callable[..., Tensor],
        start: Start,
        num_steps: int | None,
        *,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Chain:
        """The chain from ``start`` in ``num_steps`` steps.

        ``None``: as many as a row has masks, one position a step.

        Raises:
            ValueError: ``num_steps=None`` where it is not right, or with a solver.
        """
        masked = isinstance(denoise.process, MaskingProcess)
        if num_steps is None:
            if not masked or not is_time_free(denoise) or solver is not None:
                what = "a time-free denoiser of masked sequences and without a solver"
                raise ValueError(f"num_steps=None reveals one position a step, for {what}")
            num_steps = max(1, int((start.x[..., -1] > 0.5).sum(1).amax().item()))
            grid, solver, random_order = levels(start, num_steps), Ancestral(), True
        else:
            grid, random_order = levels(start, num_steps), False
            solver = solver or (Ancestral() if masked else make_solver("ddpm"))
        denoise.check_t(grid[0])
        on_grid = denoise.on_grid(grid[:-1])
        return cls(denoise, on_grid, reward, solver, grid, random_order, generator)

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.levels) - 1

    @property
    def masked(self) -> bool:
        """Whether states are masked sequences."""
        return isinstance(self.denoise.process, MaskingProcess)

    def with_denoiser(self, denoise: BaseDenoiser) -> Chain:
        """The same chain of another denoiser."""
        return replace(self, denoise=denoise, denoised=denoise.on_grid(self.levels[:-1]))

    def check_steps(self, estimate: str) -> None:
        """Raise unless rows can be exchanged between steps, and differ again after them.

        Raises:
            ValueError: levels per row, or a solver or estimate that does not fit.
        """
        if self.levels.shape[1] != 1:
            got = tuple(self.levels.shape[1:])
            raise ValueError(f"rows that may be exchanged must share their level: start.t is {got}")
        if self.masked:
            if not isinstance(self.solver, Ancestral) or self.solver.relaxation is not None:
                how = "Ancestral() without relaxation, or one position a step (num_steps=None)"
                raise ValueError(f"particles of masked sequences move by {how}; got {self.solver}")
            return
        if estimate != "soft":
            raise ValueError("continuous states have no most probable completion; estimate='soft'")
        if not self.solver.stochastic or self.solver.nfe(1) != 1 or self.solver.nfe(2) != 2:
            how = "noise of steps of one evaluation each: use ddpm, or ddim with eta > 0"
            raise ValueError(f"copied particles part by the {how}; got {self.solver}")

    def step(self, k: int, x: Tensor, out: Denoised) -> Tensor:
        """From level ``k`` to the next, with the answer ``out`` at ``x``; no evaluation."""
        return self._moved(_Known(self.denoise.process, out), x, self.levels[k : k + 2])

    def whole(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """All steps at once."""
        return self.between(0, self.num_steps, x, cond)

    def between(self, first: int, last: int, x: Tensor, cond: Tensor | None) -> Tensor:
        """From level ``first`` of the grid to level ``last`` at once."""
        return self._moved(self.denoise, x, self.levels[first : last + 1], cond)

    def rewards(self, x0: Tensor, cond: Tensor | None) -> Tensor:
        """The rewards ``[B]`` of clean states."""
        given = (x0[..., :-1],) if self.masked else (x0, cond)
        return checked(reward_of(self.reward, *given))

    def estimated(self, x0_hat: Tensor, cond: Tensor | None, estimate: str) -> Tensor:
        """The rewards of clean estimates, float64; ``"hard"``: of their most probable tokens."""
        return self.rewards(hard_one_hot(x0_hat) if estimate == "hard" else x0_hat, cond).double()

    def _moved(
        self, denoise: BaseDenoiser, x: Tensor, grid: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        solver, start = self.solver, Start(x, grid[0])
        if self.random_order:
            solver = Scheduled(one_by_one(x[..., -1] > 0.5, self.generator))
        moved = sample(denoise, solver, start, grid, cond=cond, generator=self.generator)
        assert isinstance(moved, Tensor)
        return moved


class _Known(BaseDenoiser):
    """A denoiser whose answer at the one state and level it is asked for is known."""

    process: NoiseProcess  # type: ignore[assignment]

    def __init__(self, process: NoiseProcess, out: Denoised) -> None:
        super().__init__()
        self.process, self._out = process, out

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._out


def is_time_free(denoise: BaseDenoiser) -> bool:
    """Whether the denoiser, inside its guidance if it has any, does not look at the level."""
    inner: object = denoise
    while hasattr(inner, "denoiser"):
        inner = inner.denoiser
    return bool(getattr(inner, "time_free", False))


def started(
    denoise: BaseDenoiser,
    start: Start | Sequence[int],
    chains: int,
    generator: torch.Generator | None = None,
) -> Start:
    """A start of ``chains`` rows per group; of a shape ``(B, L, D)``, at the prior.

    Raises:
        ValueError: a shape of another form, or rows that do not make whole groups.
    """
    if isinstance(start, Start):
        if len(start.x) % chains or not len(start.x):
            raise ValueError(f"groups of {chains} chains need a multiple of {chains} rows to start")
        return start
    if len(start) != 3 or min(start) < 1:
        raise ValueError(f"start must be a Start or a shape (B, L, D), got {start}")
    device = torch.device("cpu") if generator is None else generator.device
    like = next(denoise.parameters(), torch.zeros((), device=device))
    shape = (start[0] * chains, *start[1:])
    if isinstance(denoise.process, MaskingProcess):
        noise = like.new_zeros(shape)  # the prior is all masks
    else:
        noise = denoise.process.draw_noise(shape, generator, like)
    return prior_start(denoise.process, noise)


def rows(out: Denoised, index: Tensor) -> Denoised:
    """The answers to the rows ``index``."""
    return Denoised(out.x0_hat[index], {name: value[index] for name, value in out.aux.items()})


def checked(rewards: Tensor) -> Tensor:
    """``rewards``, unless they cannot weigh anything; reads the device.

    Raises:
        ValueError: nan or plus infinity.
    """
    if bool((rewards.isnan() | (rewards == torch.inf)).any()):
        raise ValueError("rewards must be finite or minus infinity; got nan or inf")
    return rewards


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one in each group ``[B, N]``; even where all are zero."""
    top = log_weights.amax(1, keepdim=True)
    alive = top > -torch.inf
    weights = (log_weights - torch.where(alive, top, 0.0)).exp()
    weights = torch.where(alive, weights, 1.0)
    return weights / weights.sum(1, keepdim=True)


def log_mean(log_weights: Tensor) -> Tensor:
    """``log(mean(exp(log_weights)))`` of each group ``[B]``."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def effective_size(weights: Tensor) -> Tensor:
    """``1 / sum w^2`` of each group ``[B]``, between 1 and N."""
    return 1 / weights.square().sum(1)


def systematic(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Systematic resampling: the particle that each new one copies, ``[B, N]``, ascending.

    One uniform number per group places N evenly spaced points in the cumulative weights, so that a
    particle of weight w is copied ``floor(N w)`` or ``ceil(N w)`` times, ``N w`` on average, and
    one without weight never.
    """
    count = weights.shape[1]
    steps = torch.arange(count, device=weights.device, dtype=torch.float64)
    return _under(weights, (steps + _uniform(weights, generator)) / count)


def choose(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One particle of each group, drawn by weight, ``[B]``."""
    return _under(weights, _uniform(weights, generator))[:, 0]


def _uniform(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    shape = (len(weights), 1)
    return torch.rand(shape, generator=generator, device=weights.device, dtype=torch.float64)


def _under(weights: Tensor, points: Tensor) -> Tensor:
    """The particles whose shares of the cumulative weights hold ``points`` in [0, 1)."""
    cumulative = weights.double().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]  # exactly 1 from the last particle with weight on
    return torch.searchsorted(cumulative, points.clamp(max=BELOW_ONE), right=True)
