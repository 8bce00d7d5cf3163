"""Solvers as tables: every sampler here is the same linear update with other constants.

One row of a table is one network evaluation. With ``m_0`` the newest model value, ``m_1`` the one
before, and so on:

    y  <-  corrector  c y + sum_j d_j m_j          (UniPC and Heun; otherwise y = x)
    x  <-  predictor  a y + sum_j b_j m_j + g z    (z standard normal, stochastic solvers only)

``m`` is the clean estimate ``x0_hat`` (data form) or the noise estimate (noise form, DEIS and
iPNDM). The constants depend on the process and on *both* ends ``(t, s)`` of each step; they are
computed once per grid in float64, so the loop in :mod:`diffpolicy.core.sampling` does two or three
fused operations per step and never reads the device.

Notation: ``lambda = log(alpha / sigma)``, ``h = lambda_s - lambda_t > 0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.bespoke import Bespoke
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.steps import Row, Solver, Step, orders_of, safe_ratio, steps_of
from diffpolicy.settings import check_choice, check_known, check_range, setting_names


@dataclass(frozen=True)
class DDIM(Solver):
    """First-order exponential integrator with noise ``eta`` (Song et al. 2021, eq. 12).

    It takes any process. ``eta = 0`` is the deterministic DDIM, which is also Euler's rule on the
    probability-flow ODE in ``(x / alpha, sigma / alpha)``, DPM-Solver++ 1 and, for flow matching,
    Euler in ``t``. ``eta = 1`` is ancestral DDPM sampling between the levels actually visited;
    ``variance = "large"`` uses the forward variance for its noise (Ho et al. 2020, section 3.2),
    and ``"renoise"`` with ``eta = 1`` noises the clean estimate anew, as consistency models are
    sampled (Song et al. 2023, algorithm 1). No noise is added on the step to ``t = 0``.
    """

    eta: float = 0.0
    variance: str = "small"
    name: ClassVar[str] = "ddim"

    def __post_init__(self) -> None:
        check_range("[0, 1]", eta=self.eta)
        check_choice("variance", self.variance, ("small", "large", "renoise"))

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def quiet(self) -> Solver:
        # With estimates of where a path ends DDIM would take the line to it for the path.
        return self if self.variance == "renoise" else replace(self, eta=0.0)

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        rows = [self._row(step) for step in steps_of(process, levels)]
        silent = not any(row.g is not None and bool(row.g.any()) for row in rows)
        # Students by consistency that go to the end in one step draw no noise beside the start's.
        return [replace(r, g=None) for r in rows] if self.variance == "renoise" and silent else rows

    def _row(self, step: Step) -> Row:
        small = self.eta**2 * step.sigma_s.square()
        if self.variance == "renoise":
            small = torch.where(step.still, 0.0, small)  # what rests is not noised either
        else:
            small = small * -torch.expm1(-2 * step.h)
        a = (step.sigma_s.square() - small).clamp_min(0).sqrt() / step.sigma_t
        a, b = step.freeze(a, [step.alpha_s - step.alpha_t * a])
        g = None
        if self.stochastic:
            forward = step.sigma_t.square() - (step.alpha_t / step.alpha_s * step.sigma_s).square()
            large = self.eta**2 * torch.where(step.sigma_s > 0, forward, 0.0)
            g = (large if self.variance == "large" else small).clamp_min(0).sqrt()
        return Row(step.t, a, b, g, s=self._end(step))

    def _end(self, step: Step) -> Tensor | None:
        """Where a network of steps is to lead; an ancestral step is of the mean of all ends."""
        if self.eta == 0:
            return step.s
        renoised = self.eta == 1 and self.variance == "renoise"
        return torch.zeros_like(step.s) if renoised else None


@dataclass(frozen=True)
class Heun(Solver):
    """Second-order Heun (Karras et al. 2022, algorithm 1, without churn).

    A step takes two evaluations, one that goes to 0 takes one. With ``c`` the process's ODE scale
    (alpha; 1 for flow matching), ``z = x / c`` and ``rho = sigma / c`` obey
    ``dz/drho = (z - x0_hat) / rho``.
    """

    name: ClassVar[str] = "heun"

    def nfe(self, num_steps: int) -> int:
        return 2 * num_steps - 1

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        return [row for step in steps_of(process, levels) for row in self._pair(process, step)]

    def _pair(self, process: GaussianProcess, step: Step) -> list[Row]:
        scale_t, scale_s = process.ode_scale(step.t), process.ode_scale(step.s)
        rho_t, rho_s = step.sigma_t / scale_t, step.sigma_s / scale_s
        ratio = rho_s / rho_t
        euler = scale_s / scale_t * ratio
        a, b = step.freeze(euler, [scale_s * (1 - ratio)])
        predict = Row(step.t, a, b)
        if bool((step.sigma_s == 0).all()):
            return [predict]  # the slope is singular at sigma = 0
        half = 0.5 * (rho_s - rho_t)
        c, d = step.freeze(
            euler, [-scale_s * half / rho_s, scale_s * half * ((1 - ratio) / rho_s - 1 / rho_t)]
        )
        clean = step.sigma_s == 0  # single entries that arrive: keep their Euler step
        c = torch.where(clean, a, c)
        d = (torch.where(clean, 0.0, d[0]), torch.where(clean, b[0], d[1]))
        return [predict, Row(step.s, torch.ones_like(a), (), c=c, d=d)]


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep in data form (Lu et al. 2022), orders 1 to 3, as ODE or as SDE.

    Args:
        order: 2 or 3 (1 is DDIM).
        eta: 0 solves the ODE; above 0 the SDE with that noise scale (1: the reverse SDE), orders 1
            and 2.
        midpoint: order 2 by the midpoint form (usually better at few steps), else by Taylor
            expansion.
        damped: order 3 with half its second-difference term, as the public implementations have it.
            That form converges with order 2 only; it is sometimes better at ten steps or fewer.
        lower_order_final: lower the order on the last steps; turn off only when sampling ends above
            ``t = 0``.
    """

    order: int = 2
    eta: float = 0.0
    midpoint: bool = True
    damped: bool = False
    lower_order_final: bool = True
    name: ClassVar[str] = "dpmpp"

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2, 3))
        check_range("[0, inf)", eta=self.eta)
        if self.eta > 0 and self.order == 3:
            raise ValueError("the SDE form has orders 1 and 2; use order=2 or eta=0")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def quiet(self) -> Solver:
        return replace(self, eta=0.0)

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        steps = steps_of(process, levels)
        orders = orders_of(len(steps), self.order, self.lower_order_final)
        return [self._row(steps[max(0, i - 2) : i + 1][::-1], orders[i]) for i in range(len(steps))]

    def _row(self, recent: Sequence[Step], order: int) -> Row:
        """``recent``: this step, then the ones before it."""
        step = recent[0]
        weight = -torch.expm1(-(1 + self.eta) * step.h)
        a, first = step.sigma_s / step.sigma_t, step.alpha_s * weight
        if self.eta > 0:
            a = a * torch.exp(-self.eta * step.h)
        if order == 1:
            b = [first]
        elif order == 2:
            # By Taylor: ``int_0^h e^{-(1+eta)(h-u)} (1+eta) u du / h`` weighs the difference.
            taylor = 1 - safe_ratio(weight, (1 + self.eta) * step.h)
            slope = 0.5 * first if self.midpoint else step.alpha_s * taylor
            # Times (m0 - m1), per unit of the previous step.
            slope = slope * safe_ratio(step.h, recent[1].h)
            b = [first + slope, -slope]
        else:
            b = self._third(step, recent[1], recent[2])
        a, rows = step.freeze(a, b)
        g = step.sigma_s * (-torch.expm1(-2 * self.eta * step.h)).sqrt() if self.eta > 0 else None
        return Row(step.t, a, rows, g)

    def _third(self, step: Step, before: Step, before2: Step) -> list[Tensor]:
        r0, r1 = safe_ratio(before.h, step.h), safe_ratio(before2.h, step.h)
        p1, p2, p3 = _phi(step.h)
        w1, w2 = step.alpha_s * p2, step.alpha_s * p3 * (0.5 if self.damped else 1.0)
        # Divided differences: A over the last interval, B over the one before; D1, D2 are h m' and
        # h^2 m''.
        a_gain, b_gain = safe_ratio(torch.ones_like(r0), r0), safe_ratio(torch.ones_like(r1), r1)
        mix, curve = safe_ratio(r0, r0 + r1), 2 * safe_ratio(torch.ones_like(r0), r0 + r1)
        on_a, on_b = w1 * (1 + mix) + w2 * curve, -w1 * mix - w2 * curve
        return [step.alpha_s * p1 + on_a * a_gain, -on_a * a_gain + on_b * b_gain, -on_b * b_gain]


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC in data form (Zhao et al. 2023, algorithms 5 to 8).

    A predictor that the next evaluation corrects for free.

    Args:
        order: 1 to 3 (2 for guided or few steps).
        variant: ``"bh1"`` or ``"bh2"``, the scale B(h) of equation 11.
        corrector: off gives UniP.
        lower_order_final: lower the order on the last steps.
    """

    order: int = 2
    variant: str = "bh2"
    corrector: bool = True
    lower_order_final: bool = True
    name: ClassVar[str] = "unipc"

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2, 3))
        check_choice("variant", self.variant, ("bh1", "bh2"))

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        steps = steps_of(process, levels)
        orders = orders_of(len(steps), self.order, self.lower_order_final)
        out = []
        for i, step in enumerate(steps):
            a, b = step.freeze(*self._update(steps, i, orders[i], corrector=False))
            row = Row(step.t, a, b)
            if i > 0 and self.corrector:
                update = self._update(steps, i - 1, orders[i - 1], corrector=True)
                c, d = steps[i - 1].freeze(*update)
                row = replace(row, c=c, d=d)
            out.append(row)
        return out

    def _update(
        self, steps: Sequence[Step], i: int, order: int, *, corrector: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """``a`` of step ``i``, and the weights of ``m_0, m_1, ...``.

        Of the corrector, the new value's weight comes first.
        """
        step = steps[i]
        # r_j < 0: positions of the history in units of h.
        back = accumulate(
            (steps[i - k].h for k in range(1, order)), initial=torch.zeros_like(step.h)
        )
        nodes = [-safe_ratio(distance, step.h) for distance in islice(back, 1, None)]
        gain = step.alpha_s * -torch.expm1(-step.h)
        scale = step.alpha_s * (step.h if self.variant == "bh1" else -torch.expm1(-step.h))
        rho = self._weights(step.h, nodes + ([torch.ones_like(step.h)] if corrector else []))
        finite = step.h.isfinite()
        per_node = [
            torch.where(finite, scale * safe_ratio(w, r), 0.0)
            for w, r in zip(rho, nodes, strict=False)
        ]
        newest = torch.where(finite, scale * rho[-1], 0.0) if corrector else None
        total = sum(per_node, torch.zeros_like(gain)) + (newest if newest is not None else 0.0)
        weights = [gain - total, *per_node]
        return step.sigma_s / step.sigma_t, weights if newest is None else [newest, *weights]

    def _weights(self, h: Tensor, nodes: Sequence[Tensor]) -> list[Tensor]:
        """Solve ``sum_j r_j^(k-1) rho_j = b_k``, with the paper's shortcuts at low order.

        The weights are exact for polynomials.
        """
        count = len(nodes)
        if count == 0:
            return []
        safe = torch.where(h.isfinite() & (h > 0), h, torch.ones_like(h))
        if count == 1:  # UniP-2, UniC-1: 1/2 keeps the order and is steadier
            return [torch.full_like(h, 0.5)]
        hh, psi, target = -safe, torch.expm1(-safe) / -safe - 1, []
        scale = hh if self.variant == "bh1" else torch.expm1(hh)
        for k in range(1, count + 1):
            target.append(psi * math.factorial(k) / scale)
            psi = psi / hh - 1 / math.factorial(k + 1)
        powers = torch.stack([torch.stack(list(nodes)) ** k for k in range(count)])  # [k, j, ...]
        matrix, right = powers.movedim((0, 1), (-2, -1)), torch.stack(target).movedim(0, -1)
        # Two nodes coincide where history is missing or a step is infinite; least squares drops one
        # of them.
        solved = torch.linalg.lstsq(matrix, right.unsqueeze(-1), driver="gelsd")
        return list(solved.solution.squeeze(-1).unbind(-1))


@dataclass(frozen=True)
class DEIS(Solver):
    """Exponential Adams-Bashforth in noise form.

    ``x / alpha`` is integrated exactly against ``rho = sigma / alpha``.

    Args:
        order: 1 to 4 noise estimates in the extrapolation.
        mode: ``"tab"`` weights by quadrature of the Lagrange basis in t (DEIS, Zhang & Chen 2023,
            eq. 15); ``"ipndm"`` fixed Adams-Bashforth weights that ignore unequal steps (formally
            of order 2 on uneven grids, often excellent at few steps).
    """

    order: int = 3
    mode: str = "tab"
    name: ClassVar[str] = "deis"
    _AB: ClassVar[tuple[tuple[float, ...], ...]] = (
        (1.0,),
        (1.5, -0.5),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2, 3, 4))
        check_choice("mode", self.mode, ("tab", "ipndm"))

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        steps = steps_of(process, levels)
        if bool((steps[0].alpha_t <= 0).any()):
            what = f"{process.type!r} has alpha = 0 at the start"
            raise ValueError(f"deis divides by alpha, and {what}; use dpmpp, unipc or heun")
        return [self._row(process, steps, i) for i in range(len(steps))]

    def _row(self, process: GaussianProcess, steps: Sequence[Step], i: int) -> Row:
        step, count = steps[i], min(self.order, i + 1)
        rho_t, rho_s = step.sigma_t / step.alpha_t, step.sigma_s / step.alpha_s
        if self.mode == "ipndm":
            weights = [(rho_s - rho_t) * w for w in self._AB[count - 1]]
        else:
            nodes = [steps[i - j].t for j in range(count)]
            weights = _lagrange_integrals(process, nodes, rho_t, rho_s)
        a, b = step.freeze(step.alpha_s / step.alpha_t, [step.alpha_s * w for w in weights])
        inverse = torch.where(step.sigma_t > 0, 1 / step.sigma_t, 0.0)
        return Row(step.t, a, b, to_eps=(inverse, -step.alpha_t * inverse))


def _phi(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integrals ``p1``, ``p2``, ``p3`` of ``e^{-(h - u)}`` times 1, u / h and u^2 / (2 h^2).

    They run over u in [0, h].
    """
    p1 = -torch.expm1(-h)
    small = h < 1e-2
    safe = torch.where(small | ~h.isfinite(), torch.ones_like(h), h)
    p2 = 1 - -torch.expm1(-safe) / safe
    p3 = 0.5 - p2 / safe
    series2 = h * (1 / 2 - h * (1 / 6 - h * (1 / 24 - h * (1 / 120 - h * (1 / 720)))))
    series3 = h * (1 / 6 - h * (1 / 24 - h * (1 / 120 - h * (1 / 720 - h * (1 / 5040)))))
    finite = h.isfinite()
    p2 = torch.where(small, series2, torch.where(finite, p2, 1.0))
    return p1, p2, torch.where(small, series3, torch.where(finite, p3, 0.5))


def _lagrange_integrals(
    process: GaussianProcess, nodes: Sequence[Tensor], low: Tensor, high: Tensor
) -> list[Tensor]:
    """``int_low^high l_j(t(rho)) d rho`` for the Lagrange basis on ``nodes`` (levels).

    They are found by Gauss-Legendre quadrature.
    """
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(24))
    shape = (-1, *[1] * low.dim())
    half, middle = 0.5 * (high - low), 0.5 * (high + low)
    t = process.t_from_log_snr(-2 * (middle + half * points.view(shape)).log())
    out = []
    for j, node in enumerate(nodes):
        basis = torch.ones_like(t)
        for k, other in enumerate(nodes):
            if k != j:
                slope = (t - other) / (node - other)
                basis = basis * torch.where(node == other, torch.zeros_like(t), slope)
        out.append(half * (weights.view(shape) * basis).sum(0))
    return out


SOLVERS: dict[str, tuple[type[Solver], dict[str, Any]]] = {
    "ddpm": (DDIM, {"eta": 1.0}),
    **dict.fromkeys(("ddim", "euler"), (DDIM, {})),
    "heun": (Heun, {}),
    "dpmpp_2m": (DPMSolverPP, {"order": 2}),
    "dpmpp_2m_sde": (DPMSolverPP, {"order": 2, "eta": 1.0}),
    "dpmpp_3m": (DPMSolverPP, {"order": 3}),
    "deis": (DEIS, {}),
    "ipndm": (DEIS, {"mode": "ipndm"}),
    "unipc": (UniPC, {}),
    "bespoke": (Bespoke, {}),
}


def make_solver(name: str, **options: Any) -> Solver:
    """A solver by its field name, e.g. ``make_solver("ddim", eta=0.5)``.

    Raises ``ValueError`` for an unknown name or option, with the valid ones.
    """
    check_choice("solver", name, sorted(SOLVERS))
    kind, defaults = SOLVERS[name]
    check_known(options, setting_names(kind), f"solver {name!r}")
    return kind(**{**defaults, **options})
