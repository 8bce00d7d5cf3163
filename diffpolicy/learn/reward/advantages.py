"""What each reveal of a masked rollout was worth, for policy gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from diffpolicy.learn.reward.rollouts import MaskedRollout

if TYPE_CHECKING:
    from diffpolicy.learn.reward.policy_gradient import PolicyGradient


class Play(NamedTuple):
    """A rollout and what its reveals were worth; all without a graph but what ``rollout`` holds.

    Attributes:
        rollout: B sequences.
        reward: ``[B]``.
        advantage: of each reveal ``[B, L]``.
        kl: ``[B]``, path KL to the reference, nats.
    """

    rollout: MaskedRollout
    reward: Tensor
    advantage: Tensor
    kl: Tensor


def judge(
    rollout: MaskedRollout, reward: Tensor, settings: PolicyGradient
) -> tuple[Tensor, Tensor]:
    """Advantages ``[B, L]`` of reveals, and the KL ``[B]``.

    A reveal's return is the reward less the costs that it can still change: those of later
    evaluations, and its own log-ratio. Tokens of one evaluation are independent given its state, so
    what else it reveals is not among them.
    """
    size, count = len(reward), rollout.nfe
    if settings.normalize:
        rows = settings.group_size or size
        spread = reward.view(-1, rows).std(1, correction=0).clamp_min(1e-3)
        reward = reward / spread.repeat_interleave(rows)
    zeros = reward.new_zeros(size, count)
    own, later, kl = zeros.new_zeros(rollout.tokens.shape), zeros, reward.new_zeros(size)
    at_step = zeros  # cost that each evaluation adds to its own return
    if settings.kl_weight > 0:
        assert rollout.log_reference is not None
        assert rollout.step_kl is not None
        kl = rollout.path_kl.detach()
        costs = settings.kl_weight * rollout.step_kl.detach()
        if settings.kl == "reward":
            own = settings.kl_weight * (rollout.log_p.detach() - rollout.log_reference)
            own = own.to(zeros.dtype)
            costs = at_step = zeros.scatter_add(1, rollout.groups, own)
        later = costs.flip(1).cumsum(1).flip(1) - costs
        total = reward - costs.sum(1)
    else:
        total = reward
    if settings.ratio == "sequence":
        advantage = (total - _baseline(total.unsqueeze(1), settings).squeeze(1)).unsqueeze(1)
        advantage = advantage.expand_as(own)
    else:
        steps = reward.unsqueeze(1) - later
        base = _baseline(steps - at_step, settings)
        advantage = (steps - base).gather(1, rollout.groups) - own
    return advantage, kl


def _baseline(returns: Tensor, settings: PolicyGradient) -> Tensor:
    """What returns ``[B, K]`` are compared with, the same shape."""
    rows = len(returns) if settings.group_size is None else settings.group_size
    groups = returns.view(-1, rows, returns.shape[1])
    total = groups.sum(1, keepdim=True)
    if settings.baseline == "leave_one_out":
        base = (total - groups) / (rows - 1)
    else:
        base = (total / rows).expand_as(groups)
    return base.reshape(returns.shape)


__all__ = ["Play", "judge"]
