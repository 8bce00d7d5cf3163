"""Guidance of masked sequences by a reward: classifier guidance on log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.masked_denoiser import masked_answer
from diffpolicy.core.masking import MaskingProcess
from diffpolicy.guidance.base import Run, Wrapper, detached, differentiable
from diffpolicy.settings import check_choice

SequenceReward = Callable[[Tensor], Tensor]
REWARD_MODES = ("clean", "state", "exact")
MAX_ROWS = 8192  # sequences handed to the reward at a time by mode "exact"


class RewardGuidance(Wrapper):
    """``log p(x0_i = a | x_t) + scale * change of reward if i were a``, renormalised over a.

    Classifier guidance for masked sequences. Only the laws of tokens move: when a position is
    revealed stays the affair of the process, where discrete guidance in continuous time
    (Nisonoff et al. 2024, TAG) multiplies the rates and so moves both. The modes say how the change
    is found; terms that do not depend on a drop out.

    ``"clean"``: the slope of the reward at the soft clean estimate,
    ``d r(x0_hat) / d x0_hat[i, a]``: first order in the one position. One reward with gradient;
    nothing is back-propagated through the network.

    ``"state"``: the slope with respect to the state, ``d r(x0_hat(x_t)) / d x_t[i, a]`` (TAG's
    first order, and what the guidance baseline of DRAKES differentiates). It adds to ``"clean"``
    what revealing i does to the estimates of all other positions, by back-propagation through the
    network: an evaluation costs about three.

    ``"exact"``: ``r(x0_hat with position i set to a) - r(x0_hat)``, all of them: ``L V + 1``
    rewards per evaluation and no gradient, so the reward may be any function. It equals ``"clean"``
    for linear rewards.

    The aim is ``log E[exp(scale reward) | x_i = a]``, whose derivative by the scale is the mean
    reward under the law tilted by as much. ``order=1`` takes that mean at the law without a tilt,
    for all of the way, which undervalues what the reward makes likely; ``order=2`` takes it half
    way (the midpoint rule): twice the rewards, and closer where positions reinforce each other.

    Answers carry ``aux["log_p"]``, guided, ``aux["log_p_unguided"]`` and ``aux["reward"]``, the
    reward ``[B]`` of the unguided clean estimate; with ``scale = 0`` they are the denoiser's own.

    Args:
        denoiser: any denoiser of masked sequences.
        reward: ``[B, L, V] -> [B]``, of soft one-hots without the mask's channel; rows apart.
        scale: guidance strength; ``1 / kl_weight`` aims at ``p exp(reward / kl_weight)``.
        mode: see above.
        order: 1 or 2, see above; ``"state"`` has the first order alone.

    Raises:
        ValueError: a denoiser of continuous states, an unknown mode or order; when called, a reward
            of another shape or (but in ``"exact"``) without gradient, and
            ``torch.inference_mode()``.
    """

    process: MaskingProcess  # type: ignore[assignment]

    def __init__(
        self,
        denoiser: BaseDenoiser,
        reward: SequenceReward,
        scale: float,
        *,
        mode: str = "clean",
        order: int = 1,
    ) -> None:
        super().__init__(denoiser)
        if not isinstance(denoiser.process, MaskingProcess):
            kind = type(denoiser.process).__name__
            raise ValueError(f"RewardGuidance moves tokens, not {kind} states: use ValueGuidance")
        check_choice("mode", mode, REWARD_MODES)
        check_choice("order", order, (1, 2))
        if order == 2 and mode == "state":
            raise ValueError("order=2 needs mode 'clean' or 'exact'; 'state' has the first alone")
        self.reward, self.scale, self.mode, self.order = reward, float(scale), mode, order

    def reward_calls(self, length: int, vocab_size: int) -> int:
        """Rewards per sequence in one evaluation; those of the gradient modes carry a gradient."""
        if self.scale == 0:
            return 0
        return self.order * (length * vocab_size + 1 if self.mode == "exact" else 1)

    def guide(self, run: Run, x_t: Tensor, cond: Any, *constants: Tensor) -> Denoised:
        if self.scale == 0:
            return run(x_t)
        if self.mode == "state":
            out, value, change = self._state_slope(run, x_t)
        else:
            out = run(x_t)
            value, change = self._changes(out.x0_hat)
        log_p = out.aux["log_p"]
        if self.order == 2:  # the same at the law that is tilted half way there
            half = (log_p + 0.5 * self.scale * change.to(log_p)).log_softmax(-1)
            _, change = self._changes(masked_answer(x_t, half).x0_hat)
        guided = masked_answer(x_t, (log_p + self.scale * change.to(log_p)).log_softmax(-1))
        return Denoised(
            guided.x0_hat, {**out.aux, **guided.aux, "log_p_unguided": log_p, "reward": value}
        )

    def _changes(self, x0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The reward ``[B]`` of an estimate ``[B, L, V + 1]``, and its changes ``[B, L, V]``."""
        if self.mode == "exact":
            return single_site_changes(self.reward, x0_hat[..., :-1])
        recording = torch.is_grad_enabled()
        clean = differentiable(x0_hat, self._what)
        with torch.enable_grad():
            value = reward_of(self.reward, clean[..., :-1])
            slope = _gradient(value, clean, graph=recording)[..., :-1]
        return (value, slope) if recording else (value.detach(), slope)

    def _state_slope(self, run: Run, x_t: Tensor) -> tuple[Denoised, Tensor, Tensor]:
        """The denoiser's answer, the reward of its estimate, and the slope ``[B, L, V]``."""
        recording = torch.is_grad_enabled()
        at = differentiable(x_t, self._what)
        with torch.enable_grad():
            out = run(at)
            value = reward_of(self.reward, out.x0_hat[..., :-1])
            slope = _gradient(value, at, graph=recording)[..., :-1]
        return (out, value, slope) if recording else (detached(out), value.detach(), slope)

    @property
    def _what(self) -> str:
        return f"the reward (mode={self.mode!r}; 'exact' needs no gradient)"


def reward_of(reward: Callable[..., Tensor], x0: Tensor, *given: Any) -> Tensor:
    """``reward(x0, *given)``, checked to be one number per row of ``x0 [B, ...]``.

    Raises:
        ValueError: an answer of another shape.
    """
    value = reward(x0, *given)
    if not isinstance(value, Tensor) or value.shape != x0.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a reward gives a tensor of one number per row, [{len(x0)}]; got {got}")
    return value


def single_site_changes(reward: SequenceReward, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The reward of ``clean [B, L, V]``, and by how much each token at each position changes it.

    Returns:
        ``r(clean)`` ``[B]``, and ``r(clean with row i := one-hot a) - r(clean)`` ``[B, L, V]``.
    """
    batch, length, vocab = clean.shape
    value = reward_of(reward, clean)
    tokens = torch.eye(vocab, dtype=clean.dtype, device=clean.device)[None, :, None, :]
    each = max(1, MAX_ROWS // (vocab * batch))
    found = []
    for first in range(0, length, each):
        positions = torch.arange(first, min(first + each, length), device=clean.device)
        count = len(positions)
        filled = clean.expand(count, vocab, *clean.shape).clone()
        filled[torch.arange(count, device=clean.device), :, :, positions] = tokens
        changed = reward_of(reward, filled.flatten(0, 2)).view(count, vocab, batch)
        found.append(changed.permute(2, 0, 1))
    return value, torch.cat(found, dim=1) - value[:, None, None]


def _gradient(value: Tensor, at: Tensor, *, graph: bool) -> Tensor:
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=graph, allow_unused=True)
    if slope is None:
        raise ValueError("this reward has no gradient; use mode='exact', which needs none")
    return slope
