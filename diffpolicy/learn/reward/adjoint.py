"""The probability-flow ODE of a Gaussian chain, differentiated in memory that steps do not fill.

For tuning a sampler end to end at 50 steps and more, or with adaptive steps: the adjoint method of
AdjointDPM (Pan et al. 2024, arXiv 2307.10711). With few steps ordinary autograd through
:func:`diffpolicy.core.sampling.sample`, with ``checkpoint=True`` if memory is short, is simpler,
faster and exact.

Coordinates: with ``c`` the process's ODE scale (``alpha``; 1 for flow matching), ``z = x / c`` and
``rho = sigma / c``, the flow is ``dz / drho = (z - x0_hat) / rho``, which for ``c = alpha`` is the
noise estimate: the linear part of the ODE is integrated exactly and nothing is singular at the
prior. At ``rho = 0`` the quotient is 0 / 0, so the ODE is integrated down to the last level above 0
and the step from there to clean is the exponential one, ``x0 = x0_hat`` (DDIM's). That step has an
error of order ``rho^2`` at its level, whatever the method before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffpolicy.core.denoiser import BaseDenoiser, t_kind
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.starts import Start
from diffpolicy.learn.reward.runge_kutta import METHODS, Driver, State, Tableau, runge_kutta_step

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
ADJOINTS = ("continuous", "discrete", "none")


def probability_flow(
    denoise: BaseDenoiser,
    start: Start,
    levels: Tensor,
    *,
    method: str = "rk4",
    cond: Tensor | None = None,
    adjoint: str = "continuous",
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> Tensor:
    """Solve the probability-flow ODE from ``start`` down ``levels``, with gradients.

    Gradients reach the parameters of ``denoise`` that require them (as a module registers them),
    ``start.x`` and ``cond``; tensors that a denoiser merely closes over get none. ``denoise`` must
    be a function of its inputs alone, because the backward pass evaluates it again.

    Args:
        denoise: ``(x_t, t, cond) -> Denoised``, of a Gaussian process. No dropout.
        start: a state ``[B, H, D]`` and its level, one for all rows or one per row, above 0.
        levels: host grid ``[K + 1, 1 or B, 1, 1]`` from :func:`diffpolicy.core.starts.levels`,
            descending. A last level of 0 is reached by the step to clean. ``"karras"`` and
            ``"log_snr"`` spacings put the level before it at a given ``t_min`` whatever K is; with
            spacing ``"t"`` it approaches 0 like 1 / K, which bounds the order of convergence.
        method: ``"euler"`` (DDIM on the same grid), ``"midpoint"`` and ``"rk4"`` take one step per
            interval, 1, 2 and 4 evaluations; ``"dopri5"`` as many as the tolerances ask for, at 7
            each, and reads the error from the device at every step: a grid of two intervals,
            ``levels(start, 2, spacing="karras", process=process, t_min=1e-3)``, is enough for it.
        cond: condition ``[B, C]``.
        adjoint: ``"continuous"`` integrates state, gradient and parameters' gradient back up the
            grid (Chen et al. 2018, algorithm 1): the memory of one state and one evaluation, and
            the gradient of the ODE, which differs from that of the discrete chain by the method's
            error. ``"discrete"`` stores the state of every step, never an activation, and replays
            the steps in reverse: the exact gradient of the chain (with dopri5: of its steps, taken
            as given). ``"none"``: ordinary autograd.
        rtol: relative tolerance of dopri5.
        atol: absolute one, in units of the plan; for the gradient in units of its largest entry.
            Each row of the batch is held to them, the parameters' gradient is not tested.

    Returns:
        ``[B, H, D]`` at the last level.

    Raises:
        ValueError: an unknown method or adjoint, tolerances out of range, another kind of process,
            levels per position or dimension, a grid that does not begin at the start or descend
            to 0 or above, a ``cond`` that is no tensor, dropout in training mode.
        RuntimeError: in inference mode, or if dopri5 finds no step that meets the tolerances.
    """
    _check_options(method, adjoint, rtol, atol)
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "probability_flow cannot record a gradient in inference mode: call it under "
            "torch.no_grad() if none is wanted, not torch.inference_mode()"
        )
    _check_inputs(denoise, start, levels, cond)
    flow = _Flow(denoise, levels, METHODS[method], rtol, atol)
    if adjoint == "none":
        return flow.finish(flow.down(start.x / flow.scale(0, start.x), cond), cond)
    parameters = tuple(p for p in denoise.parameters() if p.requires_grad)
    result: Tensor = _Adjoint.apply(flow, adjoint, start.x, cond, *parameters)  # type: ignore[no-untyped-call]
    return result


class _Step(NamedTuple):
    """A step that was taken: from ``w`` to ``w + dw`` of an interval of the grid."""

    interval: int
    w: float
    dw: float


class _Flow:
    """The ODE on a grid; in each interval ``rho = rho_0 + w width`` with ``w`` from 0 to 1.

    A scalar variable, so that rows at different levels advance together.
    """

    def __init__(
        self, denoise: BaseDenoiser, levels: Tensor, tableau: Tableau, rtol: float, atol: float
    ) -> None:
        process = denoise.process
        assert isinstance(process, GaussianProcess)
        self.denoise, self.process, self.tableau = denoise, process, tableau
        self.rtol, self.atol = rtol, atol
        self.skew, self.levels = _skew(process), levels
        self.to_clean = bool((levels[-1] == 0).all())
        self.rho = process.sigma(levels) / process.ode_scale(levels)
        self.count = len(levels) - 1 - self.to_clean  # intervals of the ODE proper

    def scale(self, index: int, like: Tensor) -> Tensor:
        """``c`` at a level of the grid."""
        scale = self.process.ode_scale(self.levels[index])
        return scale.to(like.device, like.dtype, non_blocking=True)

    def slope(self, interval: int, w: float, z: Tensor, cond: Tensor | None) -> Tensor:
        """``dz / dw = width (z - x0_hat) / rho``."""
        low, high = self.rho[interval], self.rho[interval + 1]
        rho = low + w * (high - low)
        # sigma / alpha is rho / (1 - skew rho): c = alpha + skew sigma.
        log_snr = 2 * ((1 - self.skew * rho).clamp_min(0).log() - rho.log())
        t = self.process.t_from_log_snr(log_snr).clamp(max=1.0)
        host = torch.stack([t, self.process.ode_scale(t), (high - low) / rho])
        t, scale, gain = host.to(z.device, non_blocking=True).unbind(0)
        x0_hat = self.denoise(scale.to(z.dtype) * z, t, cond).x0_hat
        slope: Tensor = gain.to(z.dtype) * (z - x0_hat)
        return slope

    def down(
        self,
        z: Tensor,
        cond: Tensor | None,
        record: Callable[[_Step, Tensor], None] | None = None,
    ) -> Tensor:
        """The state at the end of the ODE proper; ``record`` sees every step and its ``z``."""
        driver = Driver(self.tableau, self.rtol, (self.atol,))
        for interval in range(self.count):
            field = _PlainField(self, interval, cond)

            def kept(w: float, dw: float, state: State, interval: int = interval) -> None:
                if record is not None:
                    record(_Step(interval, w, dw), state[0])

            (z,) = driver.cross(field, (z,), (0.0, 1.0), kept)
        return z

    def finish(self, z: Tensor, cond: Tensor | None) -> Tensor:
        """From the end of the ODE proper to the last level, in the coordinates of the plan."""
        x = self.scale(self.count, z) * z
        if not self.to_clean:
            return x
        t = self.levels[-2].to(z.device, non_blocking=True)
        x0_hat: Tensor = self.denoise(x, t, cond).x0_hat
        return x0_hat


class _PlainField:
    """The flow itself; state ``(z,)``."""

    def __init__(self, flow: _Flow, interval: int, cond: Tensor | None) -> None:
        self._flow, self._interval, self._cond = flow, interval, cond

    def __call__(self, w: float, state: State, weight: float) -> State:
        return (self._flow.slope(self._interval, w, state[0], self._cond),)

    def settle(self, *, accepted: bool) -> None:
        """Nothing waits for the verdict."""


class _Totals:
    """Gradients of ``cond`` and the parameters, summed up over evaluations."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.sums: list[Tensor | None] = [None] * len(inputs)

    def add(self, parts: Sequence[Tensor | None], factor: float = 1.0) -> None:
        for i, part in enumerate(parts):
            if part is None:
                continue
            total = self.sums[i]
            self.sums[i] = part * factor if total is None else total.add_(part, alpha=factor)

    def through(
        self, function: Callable[[Tensor], Tensor], z: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Value of ``function`` at ``z``, and ``a`` times its derivatives by ``z`` and inputs."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = function(z)
            first, *rest = torch.autograd.grad(value, (z, *self.inputs), a, allow_unused=True)
        return value.detach(), torch.zeros_like(z) if first is None else first, tuple(rest)


class _AdjointField:
    """Flow and adjoint; state ``(z, a)`` with ``a = dL / dz`` and ``da / dw = -a dF / dz``.

    The gradients of inputs are quadratures, ``dI / dw = -a dF / d input``: they feed nothing back,
    so a stage adds its share and is forgotten.
    """

    def __init__(self, flow: _Flow, interval: int, cond: Tensor | None, totals: _Totals) -> None:
        self._flow, self._interval, self._cond = flow, interval, cond
        self._totals, self._pending = totals, _Totals(totals.inputs)

    def __call__(self, w: float, state: State, weight: float) -> State:
        slope, by_z, rest = self._totals.through(
            lambda z: self._flow.slope(self._interval, w, z, self._cond), *state
        )
        if weight != 0:
            self._pending.add(rest, -weight)
        return slope, -by_z

    def settle(self, *, accepted: bool) -> None:
        if accepted:
            self._totals.add(self._pending.sums)
        self._pending = _Totals(self._totals.inputs)


class _Adjoint(torch.autograd.Function):
    """The whole chain as one operation; see :func:`probability_flow`."""

    @staticmethod
    def forward(
        ctx: Any, flow: _Flow, adjoint: str, x: Tensor, cond: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.flow, ctx.adjoint, ctx.steps = flow, adjoint, []
        states: list[Tensor] = []

        def record(step: _Step, z: Tensor) -> None:
            if adjoint == "discrete":
                ctx.steps.append(step)
                states.append(z)

        device = x.device.type
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        with _autocast(device, ctx.autocast):
            z = flow.down(x / flow.scale(0, x), cond, record)
            result = flow.finish(z, cond)
        # Saved even where not read again: a parameter changed before backward is then an error.
        ctx.save_for_backward(z, cond, *states, *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flow: _Flow = ctx.flow
        z, cond, *rest = ctx.saved_tensors
        count = len(ctx.steps)
        states, parameters = rest[:count], rest[count:]
        needed = ctx.needs_input_grad[3:]
        if cond is not None:
            cond = cond.detach().requires_grad_(needed[0])
        inputs = [v for v, n in zip((cond, *parameters), needed, strict=True) if n]
        totals = _Totals(inputs)
        with _autocast(grad.device.type, ctx.autocast):
            _, a, parts = totals.through(lambda z: flow.finish(z, cond), z, grad)
            totals.add(parts)
            if ctx.adjoint == "discrete":
                a = _replay(list(zip(ctx.steps, states, strict=True)), a, flow, cond, totals)
            else:
                a = _up(z, a, flow, cond, totals)
        sums = iter(totals.sums)
        by_x = a / flow.scale(0, a) if ctx.needs_input_grad[2] else None
        return (None, None, by_x, *(next(sums) if n else None for n in needed))


def _autocast(device: str, mode: tuple[bool, torch.dtype]) -> torch.autocast:
    """Autocast as it is in the forward pass, but for its cache of weights.

    With it, some versions of torch hand weights that were cast without a graph, as they are in the
    flow's forward pass, to whatever is evaluated beside it.
    """
    return torch.autocast(device, mode[1], enabled=mode[0], cache_enabled=False)


def _up(z: Tensor, a: Tensor, flow: _Flow, cond: Tensor | None, totals: _Totals) -> Tensor:
    """``a`` at the start: state and adjoint integrated back from the end of the ODE proper."""
    largest = a.abs().amax((1, 2), keepdim=True)
    floor = flow.atol * torch.where(largest > 0, largest, torch.ones_like(largest))
    driver = Driver(flow.tableau, flow.rtol, (flow.atol, floor))
    for interval in reversed(range(flow.count)):
        field = _AdjointField(flow, interval, cond, totals)
        z, a = driver.cross(field, (z, a), (1.0, 0.0))
    return a


def _replay(
    steps: Sequence[tuple[_Step, Tensor]],
    a: Tensor,
    flow: _Flow,
    cond: Tensor | None,
    totals: _Totals,
) -> Tensor:
    """``a`` at the start: every step again with a graph, the last first."""
    for (interval, w, dw), state in reversed(steps):
        field = _PlainField(flow, interval, cond)

        def step(z: Tensor, field: _PlainField = field, w: float = w, dw: float = dw) -> Tensor:
            return runge_kutta_step(field, w, dw, (z,), flow.tableau)[0][0]

        _, a, parts = totals.through(step, state, a)
        totals.add(parts)
    return a


def _skew(process: GaussianProcess) -> float:
    """``k`` of a process whose ODE scale is ``alpha + k sigma``; that is what makes ``t(rho)``."""
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    skew = (process.ode_scale(t) - process.alpha(t)) / process.sigma(t)
    if abs(float(skew[0] - skew[1])) > 1e-9:
        raise ValueError(
            f"the ODE scale of {process.type!r} is not alpha + k sigma for any k; its ode_scale "
            "must be, for t to be known at every rho"
        )
    return float(skew[0])


def _check_options(method: str, adjoint: str, rtol: float, atol: float) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {sorted(METHODS)}")
    if adjoint not in ADJOINTS:
        raise ValueError(f"unknown adjoint {adjoint!r}; expected one of {ADJOINTS}")
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol and atol must be positive, got {rtol} and {atol}")


def _check_inputs(denoise: BaseDenoiser, start: Start, levels: Tensor, cond: Any) -> None:
    if not isinstance(denoise.process, GaussianProcess):
        raise ValueError(
            "the probability-flow ODE is that of a Gaussian process, not of "
            f"{type(denoise.process).__name__}"
        )
    if t_kind(start.t) != "row" or levels.dim() != 4 or levels.shape[1:] != start.t.shape:
        raise ValueError(
            "levels must be per row: start.t [1, 1, 1] or [B, 1, 1] and a grid [K + 1, *start.t's "
            f"shape], got {list(start.t.shape)} and {list(levels.shape)}; sample() takes finer ones"
        )
    if len(levels) < 2 or not torch.equal(levels[0], start.t):
        raise ValueError(
            "levels[0] differs from start.t: derive the grid with levels(start, num_steps)"
        )
    last = levels[-1]
    if bool((levels[:-1] <= 0).any() | (levels[1:] > levels[:-1]).any() | (last < 0).any()) or (
        bool((last == 0).any()) and not bool((last == 0).all())
    ):
        raise ValueError(
            "levels must descend, be above 0 before the last, and there all be 0 or all above it"
        )
    if cond is not None and not isinstance(cond, Tensor):
        raise ValueError(f"cond must be a tensor [B, C] or None, got {type(cond).__name__}")
    if any(isinstance(m, DROPOUT) and m.training and m.p > 0 for m in denoise.modules()):
        raise ValueError(
            "dropout makes another ODE of every evaluation; call denoise.eval() (gradients still "
            "reach the parameters) or set p=0"
        )
