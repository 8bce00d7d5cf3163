"""Guidance and constraints as wrapper denoisers: same face.

So every start and solver works with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise
from diffpolicy.core.masked_denoiser import masked_answer
from diffpolicy.core.noise import GaussianProcess


class _Wrapper(BaseDenoiser):
    def __init__(self, denoiser: BaseDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process

    def check_t(self, t: Tensor) -> None:
        self.denoiser.check_t(t)


class ClassifierFreeGuidance(_Wrapper):
    """``x0 = x0_u + scale (x0_c - x0_u)`` (Ho & Salimans 2022), an extrapolation of estimates.

    Of masked sequences it extrapolates log-probabilities.

    Both branches run as one batch. ``scale = 1`` is the conditional model alone and costs one
    branch.

    Args:
        denoiser: trained with condition dropout.
        scale: guidance strength w, 0 unconditional, 1 conditional, above 1 sharper.
        null_cond: the condition ``[C]`` that training used for "none" (zeros unless given).
        clip: clamp the guided estimate to [-1, 1].
    """

    null_cond: Tensor | None

    def __init__(
        self,
        denoiser: BaseDenoiser,
        scale: float,
        *,
        null_cond: Tensor | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(denoiser)
        self.scale = float(scale)
        self.clip = clip
        self.register_buffer("null_cond", null_cond, persistent=False)

    def _guided(
        self, run: Callable[[Tensor, Tensor], Denoised], x: Tensor, cond: Tensor | None
    ) -> Denoised:
        branches = self.branches(cond)
        if self.scale == 1.0:
            return run(x, branches)
        both = run(torch.cat([x, x]), branches)
        conditional, unconditional = both.x0_hat.chunk(2)
        if "log_p" in both.aux:  # tokens: the same line on log-probabilities, then renormalised
            log_p, log_u = both.aux["log_p"].chunk(2)
            return masked_answer(x, torch.lerp(log_u, log_p, self.scale).log_softmax(-1))
        x0_hat = torch.lerp(unconditional, conditional, self.scale)
        aux = {name: value.chunk(2)[0] for name, value in both.aux.items()}
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, aux)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._guided(lambda x, c: self.denoiser(x, _match(t, x), c), x_t, cond)

    def on_grid(self, t: Tensor) -> GridDenoise:
        return _BranchesOnGrid(self, t)

    def branches(self, cond: Tensor | None) -> Tensor:
        """The conditions that the denoiser inside is run with, ``[B or 2 B, C]``."""
        if cond is None:
            raise ValueError("classifier-free guidance needs cond [B, C]; got None")
        if self.scale == 1.0:
            return cond
        if self.null_cond is None:
            return torch.cat([cond, torch.zeros_like(cond)])
        return torch.cat([cond, self.null_cond.to(cond).expand_as(cond)])


class _BranchesOnGrid:
    """Both branches at the levels of a grid; precomputed modulations pass through."""

    def __init__(self, guidance: ClassifierFreeGuidance, t: Tensor) -> None:
        self._guidance = guidance
        if guidance.scale != 1.0 and t.shape[1] > 1:
            t = torch.cat([t, t], dim=1)
        self._inner = guidance.denoiser.on_grid(t)

    def modulations(self, x: Tensor, cond: Tensor | None) -> Sequence[Tensor] | None:
        inner = getattr(self._inner, "modulations", None)
        if inner is None:
            return None
        branches = self._guidance.branches(cond)
        rows = x if self._guidance.scale == 1.0 else torch.cat([x, x])
        films: Sequence[Tensor] | None = inner(rows, branches)
        return films

    def __call__(
        self, row: int, x: Tensor, cond: Tensor | None, film: Tensor | None = None
    ) -> Denoised:
        extra = () if film is None else (film,)
        return self._guidance._guided(lambda y, c: self._inner(row, y, c, *extra), x, cond)


class Guidance(_Wrapper):
    """Moves every clean estimate along a user's direction.

    That is ``x0_hat + scale * direction(x0_hat, t, cond)``.

    ``direction`` is for instance the gradient of a value, cost or classifier at the clean estimate,
    ``[B, H, D]``. It gets the levels ``t`` in the dtype and on the device of the estimate.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        direction: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(denoiser)
        self.direction = direction
        self.scale = scale

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._moved(self.denoiser(x_t, t, cond), t, cond)

    def on_grid(self, t: Tensor) -> GridDenoise:
        inner, rows = self.denoiser.on_grid(t), self.placed(t).unbind(0)
        return lambda row, x, cond: self._moved(inner(row, x, cond), rows[row], cond)

    def _moved(self, out: Denoised, t: Tensor, cond: Tensor | None) -> Denoised:
        direction = self.direction(out.x0_hat, t.to(out.x0_hat), cond).to(out.x0_hat)
        return Denoised(out.x0_hat + self.scale * direction, out.aux)


class Inpaint(_Wrapper):
    """Known entries of the clean sample are given: ``x0_hat = where(known, values, x0_hat)``.

    The state's known entries then follow ``alpha values + sigma noise`` exactly (with a
    deterministic solver), and end at ``values``. Broadcasts; ``torch.where`` keeps the loop free of
    host synchronisation.

    Args:
        denoiser: the denoiser of the free entries.
        known: bool, broadcastable to ``[B, H, D]``.
        values: normalised clean values, broadcastable to ``[B, H, D]``.
    """

    known: Tensor
    values: Tensor

    def __init__(self, denoiser: BaseDenoiser, known: Tensor, values: Tensor) -> None:
        super().__init__(denoiser)
        if known.dtype != torch.bool:
            raise ValueError(f"known must be a bool tensor, got {known.dtype}")
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("values", values, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._filled(self.denoiser(x_t, t, cond))

    def on_grid(self, t: Tensor) -> GridDenoise:
        inner = self.denoiser.on_grid(t)
        return lambda row, x, cond: self._filled(inner(row, x, cond))

    def _filled(self, out: Denoised) -> Denoised:
        values = self.values.to(out.x0_hat)
        return Denoised(torch.where(self.known, values, out.x0_hat), out.aux)


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


class PrefixGuidance(_Wrapper):
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
        if mode not in PREFIX_MODES:
            raise ValueError(f"unknown mode {mode!r}; expected one of {PREFIX_MODES}")
        if not max_weight > 0:
            raise ValueError(f"max_weight must be positive, got {max_weight}")
        self.mode, self.max_weight = mode, float(max_weight)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Denoised:
        given = _prefix_cond(cond)
        gain = prefix_gain(self.process, t, self.max_weight)
        return self.guide(lambda x: self.denoiser(x, t, given.cond), x_t, gain, given)

    def on_grid(self, t: Tensor) -> GridDenoise:
        return _PrefixOnGrid(self, t)

    def guide(
        self, run: Callable[[Tensor], Denoised], x_t: Tensor, gain: Tensor, given: PrefixCond
    ) -> Denoised:
        """The guided answer at ``x_t``, where ``run`` is the denoiser at that level."""
        given = PrefixCond(given.cond, given.prefix.to(x_t), given.weight.to(x_t))
        if self.mode == "soft":
            out = run(x_t)
            moved = torch.lerp(out.x0_hat, given.prefix, given.weight)
            # Not lerp alone: the prefix may hold anything (even nan) where nothing follows it.
            return Denoised(torch.where(given.weight > 0, moved, out.x0_hat), out.aux)
        out, pull = _pulled(run, x_t, given)
        x0_hat = torch.addcmul(out.x0_hat, gain.to(x_t), pull)
        return Denoised(torch.where(given.weight >= 1, given.prefix, x0_hat), out.aux)


def prefix_gain(process: GaussianProcess, t: Tensor, max_weight: float) -> Tensor:
    """``sigma min(max_weight, (alpha^2 + sigma^2) / (alpha sigma))`` at levels ``t``."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return torch.minimum(max_weight * sigma, (alpha.square() + sigma.square()) / alpha)


def _pulled(
    run: Callable[[Tensor], Denoised], x_t: Tensor, given: PrefixCond
) -> tuple[Denoised, Tensor]:
    """The denoiser's answer, and ``J^T W (prefix - x0_hat)`` ``[B, H, D]``."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "mode='jacobian' differentiates through the network: call it under torch.no_grad(), "
            "not torch.inference_mode()"
        )
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
        out = run(x)
        distance = given.prefix - out.x0_hat
        error = torch.where(given.weight > 0, given.weight * distance, torch.zeros_like(distance))
        if not recording:
            error = error.detach()
        (pull,) = torch.autograd.grad(out.x0_hat, x, error, create_graph=recording)
    if recording:
        return out, pull
    return Denoised(out.x0_hat.detach(), {k: v.detach() for k, v in out.aux.items()}), pull


class _PrefixOnGrid:
    """A guided denoiser at the levels of a grid; precomputed modulations pass through."""

    def __init__(self, guidance: PrefixGuidance, t: Tensor) -> None:
        self._guidance, self._inner = guidance, guidance.denoiser.on_grid(t)
        gain = prefix_gain(guidance.process, t, guidance.max_weight)
        self._gain = guidance.placed(gain).unbind(0)

    def modulations(self, x: Tensor, cond: Any) -> Sequence[Tensor] | None:
        inner = getattr(self._inner, "modulations", None)
        films: Sequence[Tensor] | None = (
            None if inner is None else inner(x, _prefix_cond(cond).cond)
        )
        return films

    def __call__(self, row: int, x: Tensor, cond: Any, film: Tensor | None = None) -> Denoised:
        given = _prefix_cond(cond)
        extra = () if film is None else (film,)
        return self._guidance.guide(
            lambda y: self._inner(row, y, given.cond, *extra), x, self._gain[row], given
        )


def _prefix_cond(cond: Any) -> PrefixCond:
    if not isinstance(cond, PrefixCond):
        raise ValueError(
            "prefix guidance needs cond=PrefixCond(cond, prefix [B, H, D], weight [B, H, 1]); got "
            f"{type(cond).__name__}"
        )
    return cond


def _match(t: Tensor, x: Tensor) -> Tensor:
    """Levels for a batch stacked twice: shared levels broadcast, per-row ones are stacked too."""
    return t if t.shape[0] in (1, x.shape[0]) else torch.cat([t, t])
