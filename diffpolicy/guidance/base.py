"""What wraps a denoiser: it has a denoiser's face, so that every start and solver takes it.

A wrapper says what it hands to the denoiser inside and what it makes of the answer. How that runs
at single levels and on the prepared levels of a grid is the same for all and stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, GridDenoise

Run = Callable[[Tensor], Denoised]  # the denoiser inside, at one level


class Wrapper(BaseDenoiser):
    """A denoiser around another one; subclasses define :meth:`guide`.

    Args:
        denoiser: the one inside, which may be a wrapper too.
    """

    def __init__(self, denoiser: BaseDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Any) -> Denoised:
        """The guided answer at ``x_t``.

        Args:
            run: the answer of the denoiser inside for a state, under its part of ``cond``.
            x_t: ``[B, H, D]``.
            cond: what the wrapper was given.
            constants: those of the level, then its host constants.
        """
        raise TypeError(f"{type(self).__name__} must define guide")

    def inside(self, x_t: Tensor, cond: Any) -> tuple[Tensor, Any]:
        """The state and the condition that the denoiser inside is given."""
        return x_t, cond

    def inside_levels(self, t: Tensor) -> Tensor:
        """The levels that the denoiser inside is given, for levels ``[..., B or 1, 1, 1]``."""
        return t

    def constants(self, t: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`guide` needs of levels ``t``, computed once for a grid."""
        return ()

    def host_constants(self, t: Tensor) -> list[tuple[Any, ...]]:
        """What :meth:`guide` needs beside them of each level of a host grid ``[R, ...]``."""
        return [()] * len(t)

    def encode(self, obs: Any) -> Tensor:
        return self.denoiser.encode(obs)

    def check_t(self, t: Tensor) -> None:
        self.denoiser.check_t(t)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Denoised:
        def run(x: Tensor) -> Denoised:
            state, told = self.inside(x, cond)
            out: Denoised = self.denoiser(state, self.inside_levels(t), told)
            return out

        return self.guide(run, x_t, cond, *self.constants(t), *self.host_constants(t[None])[0])

    def on_grid(self, t: Tensor, s: Tensor | None = None) -> GridDenoise:
        return WrapperOnGrid(self, t, s)


class WrapperOnGrid:
    """A wrapper at the levels of a grid; precomputed modulations pass through.

    Attributes:
        alike: all levels have the same arithmetic, with other constants.
    """

    alike = True

    def __init__(self, wrapper: Wrapper, t: Tensor, s: Tensor | None) -> None:
        self._wrapper = wrapper
        end = None if s is None else wrapper.inside_levels(s)
        self._inner = wrapper.denoiser.on_grid(wrapper.inside_levels(t), end)
        self._columns = [wrapper.placed(c).unbind(0) for c in wrapper.constants(t)]
        self._host = wrapper.host_constants(t)
        self.alike = type(self).alike and getattr(self._inner, "alike", True)
        self.alike &= all(host == self._host[0] for host in self._host)

    def modulations(self, x: Tensor, cond: Any) -> Sequence[Tensor] | None:
        inner: Callable[..., Sequence[Tensor]] | None = getattr(self._inner, "modulations", None)
        return None if inner is None else inner(*self._wrapper.inside(x, cond))

    def __call__(self, row: int, x: Tensor, cond: Any, film: Tensor | None = None) -> Denoised:
        extra = () if film is None else (film,)

        def run(state: Tensor) -> Denoised:
            state, told = self._wrapper.inside(state, cond)
            return self._inner(row, state, told, *extra)

        constants = [column[row] for column in self._columns]
        return self._wrapper.guide(run, x, cond, *constants, *self._host[row])


class Guidance(Wrapper):
    """``x0_hat + scale * direction(x0_hat, t, cond)``: a move of every clean estimate.

    ``direction`` is for instance the gradient of a value, cost or classifier at the clean estimate,
    ``[B, H, D]``. It gets the levels ``t`` in the dtype and on the device of the estimate.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        direction: Callable[[Tensor, Tensor, Any], Tensor],
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(denoiser)
        self.direction, self.scale = direction, scale

    def constants(self, t: Tensor) -> tuple[Tensor, ...]:
        return (t,)

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Tensor) -> Denoised:
        x0_hat, aux = run(x_t)
        direction = self.direction(x0_hat, constants[0].to(x0_hat), cond).to(x0_hat)
        return Denoised(x0_hat + self.scale * direction, aux)


def differentiable(x: Tensor, what: str) -> Tensor:
    """``x`` as something to differentiate for, in any gradient mode.

    It is part of the caller's graph exactly if gradients are enabled.

    Raises:
        ValueError: in inference mode, which cannot differentiate ``what``.
    """
    if torch.is_inference_mode_enabled():
        fix = "call it under torch.no_grad(), not torch.inference_mode()"
        raise ValueError(f"{what} is differentiated: {fix}")
    return x if torch.is_grad_enabled() and x.requires_grad else x.detach().requires_grad_()


def detached(out: Denoised) -> Denoised:
    """The same answer without a graph."""
    return Denoised(out.x0_hat.detach(), {name: value.detach() for name, value in out.aux.items()})
