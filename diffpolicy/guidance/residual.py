"""A masked denoiser whose logits stand on a frozen guided model: what tuning starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoised
from diffpolicy.core.masked_denoiser import MaskedDenoiser, masked_answer
from diffpolicy.core.masking import one_hot
from diffpolicy.guidance.reward import RewardGuidance

FEW = 2048  # rows among which equal states are looked for: sampling, not sweeps over all states


class ResidualDenoiser(MaskedDenoiser):
    """``log p = network(x) + tilt(x)``, renormalised: a network beside a frozen tilt by a reward.

    ``tilt`` is what :class:`~diffpolicy.guidance.RewardGuidance` adds to the log-probabilities of
    a frozen model. With the network of that model the answer is the guided one, exactly, and
    tuning has only what guidance gets wrong left to learn. It is a masked denoiser like any other,
    so every way to draw, tune and score takes it.

    The base is no part of the parameters: it is not trained, averaged, nor in ``state_dict``. Its
    gradient by the state flows where the state carries one (reward back-propagation).

    Example:
        >>> base = RewardGuidance(frozen_copy(denoiser), reward, 1 / kl_weight, order=2)
        >>> guided = ResidualDenoiser(denoiser, base)

    Args:
        denoiser: whose network, process and sizes are taken; trained.
        base: guidance of a frozen denoiser, of weights of its own.

    Attributes:
        reward_calls: rows that the base's reward was asked about so far.

    Raises:
        ValueError: a base of a denoiser that has other sizes.
    """

    def __init__(self, denoiser: MaskedDenoiser, base: RewardGuidance) -> None:
        super().__init__(
            denoiser.network, denoiser.process, denoiser.vocab_size, time_free=denoiser.time_free
        )
        inside: Any = base.denoiser
        sizes = [(d.vocab_size, d.length, d.time_free) for d in (denoiser, inside)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the base has vocab_size, length, time_free = {sizes[1]}, the denoiser {sizes[0]}"
            )
        base.requires_grad_(requires_grad=False).eval()
        self._held, self.reward_calls = [base], 0  # in a list: a part of the model, not trained

    @property
    def base(self) -> RewardGuidance:
        """The guidance that the network's logits are added to."""
        return self._held[0]

    def with_reward(self, reward: Callable[[Tensor], Tensor]) -> ResidualDenoiser:
        """The same network and tilt of another reward, or of one that was not saved."""
        base = self.base
        how: dict[str, Any] = {"mode": base.mode, "order": base.order}
        return ResidualDenoiser(self, RewardGuidance(base.denoiser, reward, base.scale, **how))

    def tilt(self, x_t: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        """What the base adds to log-probabilities ``[B, L, V]`` at states ``x_t``."""
        frozen: Any = self.base.denoiser

        def run(x: Tensor) -> Denoised:
            return masked_answer(x, frozen._run(x, time, cond))

        self.reward_calls += len(x_t) * self.base.reward_calls(self.length, self.vocab_size)
        out = self.base.guide(run, x_t, cond)
        log_p: Tensor = out.aux["log_p"]
        return log_p - out.aux.get("log_p_unguided", log_p)

    def _run(self, x: Tensor, time: Tensor, cond: Tensor | None, **known: Tensor | None) -> Tensor:
        log_p = super()._run(x, time, cond, **known)
        x_t = (x if x.is_floating_point() else one_hot(x, self.vocab_size)).to(log_p.dtype)
        moving = torch.is_grad_enabled() and x_t.requires_grad
        with torch.set_grad_enabled(moving):
            if moving or cond is not None or len(time) > 1 or len(x_t) > FEW:
                tilt = self.tilt(x_t, time, cond)
            else:  # chains begin in few states: one reward for each
                states, which = torch.unique(x_t, dim=0, return_inverse=True)
                tilt = self.tilt(states, time, None)[which]
        return (log_p + tilt).log_softmax(-1)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.base._apply(fn, recurse)  # type: ignore[no-untyped-call]  # both move together
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved
