"""Real-time iteration (RTI): every plan after the first starts from the last one.

Duan, Yin & Kragic 2025 (arXiv 2508.05396). The shifted plan is taken to a low noise level and one
to three steps lead back to a clean plan. Which level is right depends on the task;
:mod:`diffpolicy.policies.choose_level` chooses it from data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.solvers import DDIM
from diffpolicy.core.starts import TAILS, Start, check_snapped
from diffpolicy.core.steps import Row, Solver
from diffpolicy.settings import check_range, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True, kw_only=True)
class RTI(Sampler):
    """How warm rows are planned; a :class:`~diffpolicy.core.sampler.Sampler` of few steps.

    Args:
        t_start: noise level in (0, 1] that the shifted plan is taken to; one for all, or one per
            action dimension (then the network must take levels per dimension).
        num_steps: solver steps from there, usually 1 to 3.
        levels: the levels after ``t_start`` by hand, in place of an even grid of ``num_steps``; the
            nearest that networks are trained on are taken.
        renoise: noise the plan to ``t_start`` (on the marginal of the process); False takes it as
            if it were there already, as published.
        tail: what fills the end of the shifted plan, ``"hold"`` or ``"extrapolate"``.
        innovation: observations that change by more than this multiple of the usual largest step
            (the 0.999 quantile of the demonstrations) make a row cold: a full solve, at once;
            ``None``: never.
        legacy: the published sampler: every evaluation at a level of the list is followed by a
            DDPM step of one training level, whatever the next level is (needs a discrete process,
            ``renoise=False`` and ``levels``).
        legacy_schedule: coefficients of those steps: ``"matched"`` to the training schedule, or
            ``"linear"``, the schedule that the published evaluation ran with by an omission.

    Raises:
        ValueError: settings out of range or that exclude each other.
    """

    t_start: float | tuple[float, ...] = field(kw_only=False)
    num_steps: int = 3
    renoise: bool = True
    tail: str = one_of(*TAILS)
    innovation: float | None = ranged("(0, inf)", None)
    legacy: bool = False
    legacy_schedule: str = one_of("matched", "linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.t_start if isinstance(self.t_start, tuple) else (self.t_start,)
        for t in first:
            check_range("(0, 1]", t_start=t)
        if self.legacy and (self.renoise or self.levels is None):
            example = "t_start=0.03, levels=(0.02, 0.01, 0)"
            raise ValueError(f"legacy=True needs renoise=False and levels, such as {example}")
        down = (1.0, 0.0) if self.levels is None else (min(first), *self.levels)
        if len(down) < 2 or down[-1] != 0 or any(a <= b for a, b in pairwise(down)):
            got = f"t_start={self.t_start}, levels={self.levels}"
            raise ValueError(f"levels follow t_start, strictly descending to 0; got {got}")

    def make(self, *, deterministic: bool = False) -> Solver:
        """The solver of warm rows; ``deterministic`` takes its noise-free form."""
        if self.legacy:
            return LegacyRTI(0.0 if deterministic else 1.0, self.legacy_schedule)
        return super().make(deterministic=deterministic)

    def grid(
        self,
        process: GaussianProcess,
        start: Start | float | Sequence[float] | None = None,
        *,
        num_steps: int | None = None,
    ) -> Tensor:
        """Host levels ``[K + 1, 1, 1, 1 or A]`` that begin at ``t_start``."""
        first = self.t_start if start is None else start
        grid = super().grid(process, first, num_steps=num_steps)
        return grid if self.levels is None else check_snapped(process.snap(grid), process)


@dataclass(frozen=True)
class LegacyRTI(Solver):
    """RTI-DP's published loop: evaluate at each level of a list, step down *one* training level.

    With a list such as 25, 20, 17, ... the state is moved from 25 to 24 while the next evaluation
    says 20. ``schedule="linear"`` takes the steps' coefficients from the linear schedule
    (1e-4 to 0.02) although the network was trained on another; its clean estimate is not clamped
    again (the denoiser has clamped its own).
    """

    eta: float = 1.0
    schedule: str = "matched"

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        if not isinstance(process, DiscreteVP):
            raise ValueError(f"legacy RTI needs a discrete process, and this is {process.type!r}")
        count = len(process.betas)
        stepping = process
        if self.schedule == "linear":
            stepping = DiscreteVP.linear(count, beta_start=1e-4, beta_end=0.02)
        rows = []
        for t in levels[:-1]:
            s = ((t * count).round() - 1).clamp_min(0) / count
            row = DDIM(eta=self.eta).rows(stepping, torch.stack([t, s]))[0]
            rows.append(row if stepping is process else _translated(row, process, stepping))
        return rows


def _translated(row: Row, trained: GaussianProcess, stepping: GaussianProcess) -> Row:
    """``row`` of another schedule, for clean estimates made with the trained one.

    Both share the predicted noise: ``eps = (x - alpha x0_hat) / sigma``.
    """
    alpha, sigma = trained.alpha(row.t), trained.sigma(row.t)
    alpha_s, sigma_s = stepping.alpha(row.t), stepping.sigma(row.t)
    of_x = (1 - sigma_s / sigma) / alpha_s
    of_x0 = sigma_s * alpha / (sigma * alpha_s)
    (b,) = row.b
    return Row(row.t, row.a + b * of_x, (b * of_x0,), row.g)
