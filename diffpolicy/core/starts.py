"""Where sampling starts: a state together with the noise level it is at.

Full diffusion, truncated diffusion, real-time iteration and streaming differ only in their
:class:`Start`. The start and the grid of levels that is sampled from it are one object:
:func:`levels` derives the grid from the start, because noising to one level and denoising from
another is silent and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.noise import GaussianProcess, NoiseProcess
from diffpolicy.settings import check_choice, check_range

SPACINGS = ("t", "log_snr", "karras")


class Start(NamedTuple):
    """A noisy state and its level.

    Attributes:
        x: ``[B, H, D]``.
        t: level(s) of ``x`` in [0, 1], float64 on the *host*, broadcastable to ``x``: ``[1, 1, 1]``
            or ``[B, 1, 1]`` (per row), ``[B, H, 1]`` (per position), ``[B, 1, D]`` (per dimension).
            Levels are decided before the loop; only the constants computed from them travel to the
            device.
    """

    x: Tensor
    t: Tensor


def level(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a float64 level on the host that broadcasts to ``like``.

    Numbers become ``[1, 1, 1]``.
    """
    if isinstance(value, Tensor):
        if value.dim() != like.dim():
            got, wanted = tuple(value.shape), tuple(like.shape)
            raise ValueError(f"a level must broadcast to x {wanted}; got shape {got}")
        return value.to("cpu", torch.float64)
    check_range("[0, 1]", level=value)
    return torch.full((1,) * like.dim(), float(value), dtype=torch.float64)


def prior_start(process: NoiseProcess, noise: Tensor) -> Start:
    """Pure noise at ``t = 1``: the start of a full diffusion.

    ``noise`` ``[B, H, D]`` is a draw of ``process.draw_noise``: standard normal, or Gumbel of
    masking, where every start is fully masked.
    """
    return Start(process.prior(noise), level(1.0, noise))


def truncated_start(
    process: NoiseProcess, x0: Tensor, t_start: float | Tensor, noise: Tensor
) -> Start:
    """A guess ``x0`` (anchor, draft, last plan, given sequence) noised to ``t_start``.

    Sampling runs from there only. Of a sequence, each token is masked with the probability of that
    level: sampling then edits the sequence.

    Args:
        process: the noise process of the denoiser.
        x0: clean guess ``[B, H, D]``, normalised; one-hot if the process masks tokens.
        t_start: level in (0, 1], a number or a tensor as in :class:`Start`.
        noise: a draw of ``process.draw_noise``, the shape of ``x0``.
    """
    t = level(t_start, x0)
    return Start(process.restart(x0, t, noise), t)


TAILS = ("hold", "extrapolate")


def shift_plan(plan: Tensor, steps: int | Tensor, *, tail: str = "hold") -> Tensor:
    """``plan`` ``[B, H, D]`` moved ``steps`` positions to the present, its tail filled in.

    Args:
        plan: the last plan.
        steps: positions to drop, 0..H: a number, or an integer tensor ``[B]`` on the plan's device
            (larger entries count as H).
        tail: ``"hold"`` repeats the last action (Duan et al. 2025, algorithm 1), ``"extrapolate"``
            goes on with the last difference.

    Raises:
        ValueError: a number outside 0..H, or an unknown tail.
    """
    horizon = plan.shape[1]
    check_choice("tail", tail, TAILS)
    if not isinstance(steps, Tensor):
        check_range(f"[0, {horizon}]", shift=steps)
        if steps == 0:
            return plan
        steps = torch.full((1,), steps, dtype=torch.long, device=plan.device)
    position = torch.arange(horizon, device=plan.device) + steps[:, None]  # [B or 1, H]
    inside = position.clamp(max=horizon - 1)
    shifted = plan.gather(1, inside[..., None].expand(*plan.shape))
    if tail == "hold":
        return shifted
    slope = plan[:, -1:] - plan[:, -2:-1]
    over = (position - inside).clamp(max=horizon).to(plan.dtype)
    return shifted + over[..., None] * slope


def warm_start(
    process: NoiseProcess,
    plan: Tensor,
    t_start: float | Tensor,
    noise: Tensor,
    *,
    shift: int | Tensor = 1,
    renoise: bool = True,
    tail: str = "hold",
) -> Start:
    """Real-time iteration (Duan et al. 2025): the last plan moved to the present, at ``t_start``.

    Args:
        process: the noise process of the denoiser.
        plan: the last plan ``[B, H, D]``, normalised.
        t_start: level in (0, 1], a number or a tensor as in :class:`Start`.
        noise: a draw of ``process.draw_noise``, the shape of ``plan``.
        shift: steps executed since it was made, see :func:`shift_plan`; 0: it is shifted already.
        renoise: noise it to ``t_start``. ``False`` takes the shifted plan as if it already were
            there (the published variant); it is off the true marginal by ``(1 - alpha) x`` and
            under-dispersed, so it is safe for small ``t_start`` only.
        tail: what fills its end.
    """
    shifted = shift_plan(plan, shift, tail=tail)
    if renoise:
        return truncated_start(process, shifted, t_start, noise)
    return Start(shifted, level(t_start, plan))


@dataclass(frozen=True)
class Ramp:
    """The geometry of streaming diffusion: noise levels that rise along the plan, chunk by chunk.

    Hoeg, Du & Egeland 2024 (arXiv 2406.04806). Training and sampling share it, so that a network is
    asked for the levels that it has seen. A plan is cut into h chunks of ``n_action_steps``; in a
    tick, chunk c runs from level (c + 1) / h to c / h. The first chunk also holds the
    ``n_obs_steps - 1`` past positions. Positions after the last whole chunk stay at level 1 (pure
    noise) until they have moved up.

    Args:
        horizon: plan length H.
        n_obs_steps: To; position ``To - 1`` is the current step.
        n_action_steps: actions executed per tick, Ta.

    Raises:
        ValueError: sizes that leave fewer than two chunks.
    """

    horizon: int
    n_obs_steps: int
    n_action_steps: int

    def __post_init__(self) -> None:
        if min(self.horizon, self.n_obs_steps, self.n_action_steps) < 1 or self.chunks < 2:
            least = "at least two chunks (horizon >= n_obs_steps - 1 + 2 n_action_steps)"
            raise ValueError(f"streaming needs plans of {least}; got {self}")

    @property
    def chunks(self) -> int:
        """Whole chunks h = floor((H - To + 1) / Ta)."""
        return (self.horizon - self.n_obs_steps + 1) // self.n_action_steps

    @property
    def clean(self) -> int:
        """Positions that a tick finishes, ``To - 1 + Ta``."""
        return self.n_obs_steps - 1 + self.n_action_steps

    def index(self) -> Tensor:
        """The chunk of every position ``[H]`` (h after the last whole one)."""
        ahead = torch.arange(self.horizon) - (self.n_obs_steps - 1)
        return ahead.clamp_min(0).div(self.n_action_steps, rounding_mode="floor")

    def levels(self, phase: Tensor) -> Tensor:
        """Levels ``[..., H, 1]`` for a phase ``[..., 1, 1]`` of the tick: 1 at its start, 0 at end.

        SDP's code has index ``floor(N (c + 1) / h) - 1 - j`` of N, where ``j / N`` is
        ``(1 - phase) / h``.
        """
        index = self.index().to(phase.device, phase.dtype, non_blocking=True).view(-1, 1)
        return ((index + phase) / self.chunks).clamp(max=1)

    def grid(self, num_steps: int) -> Tensor:
        """Host levels ``[K + 1, 1, H, 1]`` of one tick in K even steps."""
        check_range("[1, inf)", num_steps=num_steps)
        phase = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return self.levels(phase.view(-1, 1, 1, 1))


def ramp_start(
    process: NoiseProcess, x0: Tensor, ramp: Ramp, noise: Tensor, *, phase: float = 1.0
) -> Start:
    """A plan noised to levels that rise along it (streaming diffusion): near actions are cleaner.

    Args:
        process: the noise process of the denoiser.
        x0: clean plan ``[B, H, D]``, normalised.
        ramp: the geometry of the levels.
        noise: standard normal, the shape of ``x0``.
        phase: 1 for the levels that a tick starts from, 0 for those that it ends at.
    """
    t = ramp.levels(torch.full((1, 1, 1), phase, dtype=torch.float64))
    return truncated_start(process, x0, t, noise)


def levels(
    start: Start,
    num_steps: int,
    *,
    end: float = 0.0,
    spacing: str = "t",
    process: NoiseProcess | None = None,
    t_min: float | None = None,
) -> Tensor:
    """The grid of levels from ``start`` down to ``end``.

    Args:
        start: where sampling begins; every entry of ``start.t`` gets its own grid.
        num_steps: steps K >= 1.
        end: last level, 0 = clean.
        spacing: ``"t"`` even in t (snapped to the knots of a discrete ``process``), ``"log_snr"``
            even in log SNR, ``"karras"`` even in ``(sigma / alpha)^(1/7)`` (Karras et al. 2022).
        process: needed by ``log_snr`` and ``karras``.
        t_min: with these two and ``end = 0``, the last level before the step to clean. By default
            1e-3, or the first level of a discrete process; of two steps, however, the second would
            then have nothing left to solve: it begins half-way instead.

    Returns:
        float64 ``[K + 1, *start.t.shape]``; the first entry equals ``start.t``.

    Raises:
        ValueError: ``num_steps`` < 1, an unknown spacing, no process where one is needed, or more
            steps than the process has levels.
    """
    check_range("[1, inf)", num_steps=num_steps)
    check_range("(0, 1)", t_min=t_min)
    check_choice("spacing", spacing, SPACINGS)
    first = start.t.double()
    fraction = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    fraction = fraction.view(-1, *[1] * first.dim())
    if spacing == "t":
        grid = first + fraction * (end - first)
        inner = grid[1:-1] if process is None else process.snap(grid[1:-1])
        grid = torch.cat([first[None], inner, torch.full_like(first, end)[None]])
        return grid if process is None else check_snapped(grid, process)
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"spacing {spacing!r} needs Gaussian noise; for others use spacing='t'")
    rho = 7.0 if spacing == "karras" else None
    return _ratio_grid(process, first, num_steps, end, t_min, rho)


def trained_level(process: NoiseProcess, t_start: Tensor) -> Tensor:
    """The level that a network is trained on nearest to ``t_start``, where sampling begins.

    Raises:
        ValueError: it is clean data.
    """
    t = process.snap(t_start)
    if bool((t <= 0).any()):
        fix = f"raise t_start to at least {process.first_level:.4g}"
        raise ValueError(f"t_start={float(t_start.min()):.4g} is nearer to clean data: {fix}")
    return t


def check_snapped(grid: Tensor, process: NoiseProcess) -> Tensor:
    """``grid``, unless two of its levels are one training level of a discrete ``process``.

    Raises:
        ValueError: such a step would evaluate the network for nothing.
    """
    moving = grid[0] > grid[-1]  # single positions may rest at the end
    if bool(((grid[1:] >= grid[:-1]) & moving).any()):
        apart = process.first_level
        most = max(1, int(((grid[0] - grid[-1])[moving].min() / apart).round()))
        raise ValueError(
            f"a grid of {len(grid) - 1} steps from level {float(grid[0][moving].min()):.4g} to "
            f"{float(grid[-1].max()):.4g} repeats a training level, of which there are "
            f"{round(1 / apart)}. Take at most {most} steps, or levels {apart:.4g} apart"
        )
    return grid


def _ratio_grid(
    process: GaussianProcess,
    first: Tensor,
    num_steps: int,
    end: float,
    t_min: float | None,
    rho: float | None,
) -> Tensor:
    """A grid even in ``log(sigma / alpha)`` or in that ratio's power ``1 / rho``.

    A step to exactly 0 is appended when ``end`` is 0.
    """
    lands = end == 0 and (num_steps != 2 or t_min is not None)  # on t_min, before it goes to 0
    intervals = num_steps - 1 if lands else num_steps
    least = max(1e-3, process.first_level) if t_min is None else t_min
    last = torch.full_like(first, end if end > 0 else least).minimum(first)
    # In flow matching the ratio is infinite at t = 1.
    finite = torch.where(process.alpha(first) > 0, first, 1 - 1e-3)
    ends = torch.stack([finite, last])
    ratio = (-0.5 * process.log_snr(ends)).exp()
    warped = ratio.log() if rho is None else ratio ** (1 / rho)
    fraction = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    grid = warped[0] + fraction.view(-1, *[1] * first.dim()) * (warped[1] - warped[0])
    log_ratio = grid if rho is None else rho * grid.log()
    inner = process.t_from_log_snr(-2 * log_ratio)[1:num_steps]
    return torch.cat([first[None], inner, torch.full_like(first, end)[None]])


def explicit_levels(start: Start, following: Sequence[float]) -> Tensor:
    """A grid by hand: ``start.t``, then the levels of ``following``.

    These are strictly descending; the last one is the end.
    """
    values = [float(v) for v in following]
    if not values or any(a <= b for a, b in pairwise(values)) or values[-1] < 0:
        raise ValueError(f"levels must be strictly descending and end at 0 or above, got {values}")
    rest = [torch.full_like(start.t, v) for v in values]
    return torch.stack([start.t, *rest])
