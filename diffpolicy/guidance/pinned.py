"""Plans some entries of which are known: exactly (planners), or as a plan to go on from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.guidance.base import Run, Wrapper, detached, differentiable
from diffpolicy.settings import check_choice, check_range


class PinCond(NamedTuple):
    """The condition of a :class:`Pinned` denoiser: that of the one inside, and what is known.

    Attributes:
        cond: ``[B, C]``, or None for an unconditional network.
        values: ``[B, H, D]`` normalised clean values; what they hold at unknown entries does not
            matter.
    """

    cond: Any
    values: Tensor


class Pinned(Wrapper):
    """A denoiser of the unknown entries of a plan, given the known ones.

    The denoiser inside sees ``where(known, values, x_t)`` and its answer is
    ``where(known, values, x0_hat)``. A network trained so (the loss with a
    :class:`~diffpolicy.guidance.layout.Layout` does it) models ``p(unknown | known)`` exactly;
    inpainting, which shows a network of the joint law noised known entries, is an approximation
    between the levels.

    Its ``cond`` is a :class:`PinCond`, so that it stays a pure function and one prepared grid
    serves every observation. The known entries of the sampled state end at ``values`` exactly with
    solvers whose last step goes to level 0.

    Args:
        denoiser: of plans whose known entries are clean; may itself be a wrapper (classifier-free
            or value guidance), which then sees the network's own input.
        known: bool ``[1, H, D]``.

    Raises:
        ValueError: ``known`` is not such a tensor.
    """

    known: Tensor

    def __init__(self, denoiser: BaseDenoiser, known: Tensor) -> None:
        super().__init__(denoiser)
        if known.dtype != torch.bool or known.dim() != 3 or known.shape[0] != 1:
            got = f"{known.dtype} {list(known.shape)}"
            raise ValueError(f"known must be a bool tensor [1, H, D], got {got}")
        self.register_buffer("known", known, persistent=False)

    def inside(self, x_t: Tensor, cond: Any) -> tuple[Tensor, Any]:
        _check_kind(cond, PinCond, "PinCond(cond, values [B, H, D])")
        return self._filled(x_t, cond), cond.cond

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Tensor) -> Denoised:
        out = run(x_t)
        return Denoised(self._filled(out.x0_hat, cond), out.aux)

    def _filled(self, x: Tensor, given: PinCond) -> Tensor:
        return torch.where(self.known, given.values.to(x), x)


class PrefixCond(NamedTuple):
    """The condition of a :class:`PrefixGuidance`: that of its denoiser, and what to follow.

    Attributes:
        cond: ``[B, C]``, for the denoiser inside.
        prefix: clean plan to follow ``[B, H, D]``; its entries where ``weight`` is 0 do not matter.
        weight: how closely ``[B, H, 1]``, from 0 (free) to 1 (frozen).
    """

    cond: Tensor | None
    prefix: Tensor
    weight: Tensor


PREFIX_MODES = ("soft", "jacobian")


class PrefixGuidance(Wrapper):
    """Plans that go on from a given one: real-time chunking (Black, Galliker & Levine 2025).

    Its ``cond`` is a :class:`PrefixCond`, so that it stays a pure function and one prepared grid
    serves every prefix. In both modes, entries of weight 1 are the prefix's in every clean
    estimate, hence exactly so in the sample, and entries of weight 0 are guided only through the
    others.

    ``"soft"``: ``x0_hat + W (prefix - x0_hat)``, an inpainting with a soft mask.

    ``"jacobian"``: the paper's guidance (eq. 2 to 4, after PiGDM, Song et al. 2023),
    ``x0_hat + k J^T W (prefix - x0_hat)`` with ``J = d x0_hat / d x_t`` by back-propagation through
    the network: one evaluation then costs about three. The paper's flow (``tau``: 0 noise, 1 clean)
    adds ``min(beta, (1 - tau) / (tau r^2)) J^T W (...)`` to the velocity, with
    ``r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2)``. In any process, after scaling ``x_t`` to
    ``alpha + sigma = 1``, that is ``k = sigma min(beta, (alpha^2 + sigma^2) / (alpha sigma))`` on
    the clean estimate: ``min(beta sigma, 1 / alpha)`` if variance-preserving. Published code
    records the network's output before ``x_t`` requires a gradient, so that its J is the identity;
    here it is not.

    Args:
        denoiser: any denoiser.
        mode: see above.
        max_weight: the clip ``beta`` of ``"jacobian"`` (5 in the paper).

    Raises:
        ValueError: an unknown mode or a ``max_weight`` that is not positive.
    """

    def __init__(
        self, denoiser: BaseDenoiser, mode: str = "soft", *, max_weight: float = 5.0
    ) -> None:
        super().__init__(denoiser)
        check_choice("mode", mode, PREFIX_MODES)
        check_range("(0, inf)", max_weight=max_weight)
        self.mode, self.max_weight = mode, float(max_weight)

    def inside(self, x_t: Tensor, cond: Any) -> tuple[Tensor, Any]:
        _check_kind(cond, PrefixCond, "PrefixCond(cond, prefix [B, H, D], weight [B, H, 1])")
        return x_t, cond.cond

    def constants(self, t: Tensor) -> tuple[Tensor, ...]:
        return (prefix_gain(self.process, t, self.max_weight),)

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Tensor) -> Denoised:
        self.inside(x_t, cond)  # refuses another condition before it is looked into
        prefix, weight = cond.prefix.to(x_t), cond.weight.to(x_t)
        if self.mode == "soft":
            out = run(x_t)
            moved = torch.lerp(out.x0_hat, prefix, weight)
            # Not lerp alone: the prefix may hold anything (even nan) where nothing follows it.
            return Denoised(torch.where(weight > 0, moved, out.x0_hat), out.aux)
        out, pull = _pulled(run, x_t, prefix, weight)
        x0_hat = torch.addcmul(out.x0_hat, constants[0].to(x_t), pull)
        return Denoised(torch.where(weight >= 1, prefix, x0_hat), out.aux)


def _check_kind(cond: Any, kind: type[Any], form: str) -> None:
    if not isinstance(cond, kind):
        raise ValueError(f"this denoiser needs cond={form}; got {type(cond).__name__}")


def prefix_gain(process: GaussianProcess, t: Tensor, max_weight: float) -> Tensor:
    """``sigma min(max_weight, (alpha^2 + sigma^2) / (alpha sigma))`` at levels ``t``."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return torch.minimum(max_weight * sigma, (alpha.square() + sigma.square()) / alpha)


def _pulled(run: Run, x_t: Tensor, prefix: Tensor, weight: Tensor) -> tuple[Denoised, Tensor]:
    """The denoiser's answer, and ``J^T W (prefix - x0_hat)`` ``[B, H, D]``."""
    x, recording = differentiable(x_t, "the network, in mode 'jacobian',"), torch.is_grad_enabled()
    with torch.enable_grad():
        out = run(x)
        distance = prefix - out.x0_hat
        error = torch.where(weight > 0, weight * distance, torch.zeros_like(distance))
        error = error if recording else error.detach()
        (pull,) = torch.autograd.grad(out.x0_hat, x, error, create_graph=recording)
    return out if recording else detached(out), pull
