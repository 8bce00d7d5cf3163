"""Guidance of plans by costs of physical quantities that training knew nothing of.

The cost is asked at the clean estimate, as a plan in physical units. Its slope moves the estimate
as it is (stop-gradient, FlowChef: Patel et al. 2024, arXiv 2412.00100), or pulled back through the
network (DPS: Chung et al. 2023, arXiv 2209.14687).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.guidance.base import Run, Wrapper, detached, differentiable
from diffpolicy.guidance.costs import TINY, Cost
from diffpolicy.settings import check_choice, check_range

COST_MODES = ("estimate", "network")
LAST = 2  # evaluations in which plans are projected


class CostCond(NamedTuple):
    """The condition of a :class:`CostGuidance`: that of its denoiser, and what costs look at.

    Attributes:
        cond: for the denoiser inside.
        obs: raw observations ``[B, To, ...]``, one or by name.
    """

    cond: Any
    obs: Any


class Physical(Protocol):
    """Between plans as a network says them and plans in physical units."""

    closed_form: bool

    def raw(self, plan: Tensor, obs: Any) -> Tensor:
        """The plan in physical units ``[B, H, D']``."""

    def pulled(self, slope: Tensor, plan: Tensor, obs: Any) -> Tensor:
        """A slope with respect to it as one with respect to ``plan`` ``[B, H, D]``."""


class CostGuidance(Wrapper):
    """Clean estimates moved against the slope of costs.

    With L the costs of one kind of step, summed by their weights, and g their slope at the clean
    estimate, the estimate moves by ``-scale length d``. In mode ``"estimate"`` ``d = g``. In mode
    ``"network"`` ``d = J^T g`` with ``J = d x0_hat / d x_t`` by back-propagation: an evaluation
    costs about three then, and other entries of the plan follow those that the cost looks at. The
    length, of every plan its own, is

    ============  ==========================  ===================================
    step          mode ``"estimate"``         mode ``"network"``
    ============  ==========================  ===================================
    ``polyak``    ``2 L / |g|^2``             ``2 L / <g, d>``
    ``unit``      ``spread / rms(d)``         ``spread / rms(d)``
    ``gradient``  ``spread^2``                ``sigma^2 / alpha``
    ============  ==========================  ===================================

    with ``spread = sigma / sqrt(alpha^2 + sigma^2)``, the deviation that is left of data of unit
    variance. So ``"gradient"`` aims at ``p(x0) exp(-L)``: to first order exactly in mode
    ``"network"``, as if the data were white in mode ``"estimate"``. The normalisation per plan of
    the other two, and the ``window``, are the calibrations of EluCD (Ma et al. 2024): at high noise
    an estimate is far from any plan, and the cost of it means little.

    Its ``cond`` is a :class:`CostCond`, so that it stays a pure function and one prepared grid
    serves every observation.

    Args:
        denoiser: any denoiser of plans.
        costs: see :mod:`diffpolicy.guidance.costs`.
        physical: from its plans to physical units.
        scale: factor of every move; 0 is the denoiser alone.
        mode: see above.
        window: lowest and highest level at which estimates are moved.
        iterations: moves per evaluation; in mode ``"network"`` one.
        project: further moves of full Polyak length in the last two evaluations, by the costs of
            that step alone: what later steps violated again is mended in the plan that is executed.
        free: which entries may be moved, bool ``[1, H, D]``; default: all.
        clip: clamp moved estimates to [-1, 1].

    Raises:
        ValueError: settings out of range, or no costs.
    """

    free: Tensor | None

    def __init__(
        self,
        denoiser: BaseDenoiser,
        costs: Sequence[Cost],
        physical: Physical,
        *,
        scale: float = 1.0,
        mode: str = "estimate",
        window: tuple[float, float] = (0.0, 1.0),
        iterations: int = 1,
        project: int = 0,
        free: Tensor | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(denoiser)
        check_choice("mode", mode, COST_MODES)
        check_range("[0, inf)", scale=scale, project=project)
        check_range("[1, inf)", iterations=iterations)
        if not costs:
            raise ValueError("guidance by costs needs at least one cost")
        if project and all(cost.step != "polyak" for cost in costs):
            raise ValueError("project mends costs of step 'polyak'; leave it out, there is none")
        if mode == "network" and iterations != 1:
            raise ValueError("mode='network' back-propagates once an evaluation: iterations=1")
        self.costs, self.physical = nn.ModuleList(costs), physical
        self.scale, self.mode, self.window = float(scale), mode, window
        self.iterations, self.project, self.clip = iterations, project, clip
        self.register_buffer("free", free, persistent=False)

    def inside(self, x_t: Tensor, cond: Any) -> tuple[Tensor, Any]:
        if not isinstance(cond, CostCond):
            form = "CostCond(cond, obs [B, To, ...])"
            raise ValueError(f"this denoiser needs cond={form}; got {type(cond).__name__}")
        return x_t, cond.cond

    def constants(self, t: Tensor) -> tuple[Tensor, ...]:
        """``scale`` in the window, and the lengths of ``unit`` and ``gradient``."""
        low, high = self.window
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = sigma.square() / (alpha.square() + sigma.square())
        gain = variance if self.mode == "estimate" else sigma.square() / alpha.clamp_min(1e-3)
        return self.scale * ((t >= low) & (t <= high)).to(t), variance.sqrt(), gain

    def host_constants(self, t: Tensor) -> list[tuple[Any, ...]]:
        """Moves and projections at every level of a host grid ``[R, ...]``."""
        low, high = self.window
        inside = ((t >= low) & (t <= high)).flatten(1).any(1).tolist()
        first = len(inside) - LAST
        steers = self.scale > 0
        return [
            (self.iterations * (steers and moved), self.project * (row >= first))
            for row, moved in enumerate(inside)
        ]

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Any) -> Denoised:
        scale, spread, gain, moves, projections = constants
        lengths = [one.to(x_t) for one in (scale, spread, gain)]
        if moves and self.mode == "network":
            out = self._through(run, x_t, cond, lengths)
        else:
            out = run(x_t)
            for _ in range(moves):
                out = self._moved(out, cond.obs, lengths)
        for _ in range(projections):
            out = self._moved(out, cond.obs, lengths, project=True)
        return out

    def sloped(
        self, x0_hat: Tensor, obs: Any, only: str | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Weighted costs ``[B]`` and slopes ``[B, H, D]`` of normalised plans, by kind of step.

        ``only`` one kind, if given.
        """
        raw = self.physical.raw(x0_hat, obs)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for cost in self.costs:
            assert isinstance(cost, Cost)
            if only not in (None, cost.step):
                continue
            part = cost.slope(raw, obs)
            if cost.weight != 1:
                part = cost.weight * part[0], cost.weight * part[1]
            if cost.step in found:
                value, slope = found[cost.step]
                part = value + part[0], slope + part[1]
            found[cost.step] = part
        pulled = {
            step: (value, self.physical.pulled(slope, x0_hat, obs))
            for step, (value, slope) in found.items()
        }
        if self.free is None:
            return pulled
        return {s: (v, torch.where(self.free, slope, 0.0)) for s, (v, slope) in pulled.items()}

    def _moved(
        self, out: Denoised, obs: Any, lengths: Sequence[Tensor], *, project: bool = False
    ) -> Denoised:
        slopes = self.sloped(out.x0_hat, obs, only="polyak" if project else None)
        return self._against(out, slopes, lambda g: g, lengths, project=project)

    def _against(
        self,
        out: Denoised,
        slopes: dict[str, tuple[Tensor, Tensor]],
        direction: Callable[[Tensor], Tensor],
        lengths: Sequence[Tensor],
        *,
        project: bool = False,
    ) -> Denoised:
        scale, spread, gain = lengths
        x0_hat = out.x0_hat
        for step, (value, slope) in slopes.items():
            d, length = direction(slope), gain
            if step == "polyak":
                along = (slope * d).sum((1, 2))
                length = 2 * value / along.clamp_min(TINY)  # where nothing is violated: 0 / TINY
                if self.mode == "network":  # a direction that climbs is not taken
                    length = torch.where(along > TINY, length, 0.0)
                length = length[:, None, None]
            elif step == "unit":
                length = spread / d.square().mean((1, 2), keepdim=True).sqrt().clamp_min(TINY)
            x0_hat = torch.addcmul(x0_hat, length if project else scale * length, d, value=-1)
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, out.aux)

    def _through(
        self, run: Run, x_t: Tensor, cond: CostCond, lengths: Sequence[Tensor]
    ) -> Denoised:
        x, recording = (
            differentiable(x_t, "the network, in mode 'network',"),
            torch.is_grad_enabled(),
        )
        with torch.enable_grad():
            out = run(x)

        def back(slope: Tensor) -> Tensor:
            (d,) = torch.autograd.grad(
                out.x0_hat, x, slope, retain_graph=True, create_graph=recording
            )
            return d

        slopes = self.sloped(out.x0_hat if recording else out.x0_hat.detach(), cond.obs)
        return self._against(out if recording else detached(out), slopes, back, lengths)
