"""Real-time iteration (RTI): every plan after the first starts from the last one.

Duan, Yin & Kragic 2025 (arXiv 2508.05396). The shifted plan is taken to a low noise level and one
to three steps lead back to a clean plan. Which level is right depends on the task;
:mod:`diffpolicy.policies.choose_level` chooses it from data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.noise import DiscreteVP, GaussianProcess
from diffpolicy.core.solvers import DDIM, Row, Solver, make_solver
from diffpolicy.core.starts import TAILS, Start, check_snapped, levels, trained_level
from diffpolicy.settings import named_settings, settings_of

SCHEDULES = ("matched", "linear")


@named_settings
@dataclass(frozen=True)
class RTI:
    """How warm rows are planned.

    Args:
        t_start: noise level in (0, 1] that the shifted plan is taken to; one for all, or one per
            action dimension (then the network must take levels per dimension).
        num_steps: solver steps from there, usually 1 to 3.
        levels: the levels after ``t_start`` by hand, strictly descending to 0, in place of an even
            grid of ``num_steps``.
        solver: name from :data:`diffpolicy.core.SOLVERS`.
        options: its options.
        spacing: of the even grid, see :func:`diffpolicy.core.starts.levels`.
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
        t_min: of the even grid, as ``spacing``.

    Raises:
        ValueError: settings out of range or that exclude each other.
    """

    t_start: float | tuple[float, ...]
    num_steps: int = 3
    levels: tuple[float, ...] | None = None
    solver: str = "ddim"
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing: str = "t"
    renoise: bool = True
    tail: str = "hold"
    innovation: float | None = None
    legacy: bool = False
    legacy_schedule: str = "matched"
    t_min: float | None = None

    def __post_init__(self) -> None:
        first = self.t_start if isinstance(self.t_start, tuple) else (self.t_start,)
        if not first or not all(0 < t <= 1 for t in first):
            raise ValueError(f"t_start must be in (0, 1], got {self.t_start}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if self.tail not in TAILS:
            raise ValueError(f"unknown tail {self.tail!r}; expected one of {TAILS}")
        if self.innovation is not None and self.innovation <= 0:
            raise ValueError(f"innovation must be positive (or null), got {self.innovation}")
        if self.legacy_schedule not in SCHEDULES:
            raise ValueError(f"legacy_schedule must be one of {SCHEDULES}")
        if self.legacy and (self.renoise or self.levels is None):
            raise ValueError(
                "legacy=True reproduces the published sampler, which needs renoise=False and the "
                "list of levels, e.g. t_start=0.03, levels=(0.02, 0.01, 0)"
            )
        if self.legacy and (self.solver != "ddim" or self.options):
            raise ValueError("legacy=True has a solver of its own; leave solver and options out")
        if self.legacy_schedule != "matched" and not self.legacy:
            raise ValueError("legacy_schedule is an option of legacy=True")
        if self.levels is not None:
            self._check_levels(min(first))

    def _check_levels(self, least: float) -> None:
        assert self.levels is not None
        if self.num_steps not in (3, len(self.levels)) or self.spacing != "t":
            raise ValueError(
                f"levels={self.levels} are {len(self.levels)} steps already; leave num_steps and "
                "spacing out"
            )
        whole = (least, *self.levels)
        if not self.levels or any(a <= b for a, b in pairwise(whole)) or self.levels[-1] != 0:
            raise ValueError(
                "levels are what follows t_start, strictly descending to 0; "
                f"got t_start={self.t_start}, levels={self.levels}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RTI:
        """From JSON values (lists become tuples).

        Raises:
            ValueError: unknown entries or values out of range.
        """
        return settings_of(cls, config, "rti")

    def make_solver(self, *, deterministic: bool = False) -> Solver:
        """The solver of warm rows; ``deterministic`` takes its noise-free form."""
        if self.legacy:
            return LegacyRTI(0.0 if deterministic else 1.0, self.legacy_schedule)
        solver = make_solver(self.solver, **self.options)
        if deterministic and solver.stochastic:
            return make_solver(self.solver, **{**self.options, "eta": 0.0})
        return solver

    def grid(self, process: GaussianProcess) -> Tensor:
        """Host levels ``[K + 1, 1, 1, 1 or A]`` that begin at ``t_start``."""
        first = self.t_start if isinstance(self.t_start, tuple) else (self.t_start,)
        t = trained_level(process, torch.tensor(first, dtype=torch.float64).view(1, 1, -1))
        if self.levels is not None:
            following = torch.tensor(self.levels, dtype=torch.float64).view(-1, 1, 1, 1)
            grid = torch.cat([t[None], process.snap(following.expand(-1, *t.shape))])
            return check_snapped(grid, process)
        return levels(
            Start(t, t), self.num_steps, spacing=self.spacing, process=process, t_min=self.t_min
        )

    @property
    def start(self) -> str:
        """Kind of start, see :data:`diffpolicy.policies.plan_loop.STARTS`."""
        return "noised" if self.renoise else "given"


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
            raise ValueError(
                "legacy RTI steps along the training levels of a discrete process (ddpm_cosine, "
                f"ddpm_linear); this one is {process.type!r}"
            )
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
