"""Settings of policy gradients on masked sequences, and what each reveal was worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffpolicy.learn.reward.rollouts import MaskedRollout

KLS = ("path", "reward")
BASELINES = ("leave_one_out", "mean", "group")
RATIOS = ("token", "sequence")


@dataclass(frozen=True)
class PolicyGradient:
    """Which policy gradient.

    The objective is ``J = E r - kl_weight KL(path || path of the reference)``; a reveal is an
    action, the state it was made in a state.

    Args:
        kl_weight: in units of reward per nat; 0: the reference is not evaluated.
        kl: how the KL enters. ``"reward"``: the log-ratio of each reveal is a cost (DPOK, Fan et
            al. 2023). ``"path"``: the closed-form KL of each step is a loss, and a cost to the
            reveals before it. The same J; ``"path"`` has less variance.
        baseline: ``"mean"`` over the rows; ``"leave_one_out"`` without the row itself (RLOO),
            which has no bias; ``"group"``: mean over groups of rows that share a condition (GRPO,
            Shao et al. 2024). Each step has its own baseline. The two means hold the row itself,
            which makes the expected gradient ``(n - 1) / n`` of that of J with n rows, the KL's
            part like the reward's.
        group_size: consecutive rows that share a condition, of ``group`` (needed) and
            ``leave_one_out`` (None: the whole batch).
        normalize: divide rewards by their standard deviation in the group (not below 0.001), as
            in GRPO; ``kl_weight`` is then in units of that per nat, so that groups of equal
            rewards are held by the KL as firmly as others.
        ratio: ``"token"``: every reveal has its probability ratio, and only the costs that come
            after it (exact, and less variance). ``"sequence"``: one ratio and return per row.
        clip: of the ratio, to ``[1 - clip, 1 + clip]`` (PPO); with ``epochs`` > 1.
        epochs: updates on the same rollout, which is then part of the objective's state.
        rows: batch size, needed with ``epochs`` > 1.
        num_steps: see :func:`diffpolicy.learn.reward.rollouts.draw_rollout`.
        grad_states: states of each rollout, uniformly drawn, that the gradient passes through in
            an update; None: all. Without bias, cheaper, more variance.

    Raises:
        ValueError: an unknown choice, a value out of range, or a setting that would have no effect.
    """

    kl_weight: float = 0.1
    kl: str = "path"
    baseline: str = "leave_one_out"
    group_size: int | None = None
    normalize: bool = False
    ratio: str = "token"
    clip: float = 0.2
    epochs: int = 1
    rows: int | None = None
    num_steps: int | None = None
    grad_states: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("kl", KLS), ("baseline", BASELINES), ("ratio", RATIOS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, holds, expected in (
            ("kl_weight", self.kl_weight >= 0, "at least 0"),
            ("clip", self.clip > 0, "positive"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("num_steps", self.num_steps is None or self.num_steps >= 1, "at least 1 or None"),
            (
                "grad_states",
                self.grad_states is None or self.grad_states >= 1,
                "at least 1 or None",
            ),
            ("group_size", self.group_size is None or self.group_size >= 2, "at least 2 or None"),
            ("rows", self.rows is None or self.rows >= 1, "at least 1 or None"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")
        self._check_together()

    def share(self, rows: int) -> float:
        """The part of J's gradient that the baseline leaves of it, with batches of ``rows``."""
        return 1.0 if self.baseline == "leave_one_out" else 1 - 1 / (self.group_size or rows)

    def _check_together(self) -> None:
        if self.baseline == "group" and self.group_size is None:
            raise ValueError("baseline='group' needs group_size=N, rows that share a condition")
        if self.baseline == "mean" and self.group_size is not None:
            raise ValueError("group_size has no effect with baseline='mean'; use 'group'")
        if (self.epochs > 1) != (self.rows is not None):
            raise ValueError(
                "epochs > 1 keeps a rollout of rows=<batch size> sequences, and nothing else takes "
                f"rows; got epochs={self.epochs}, rows={self.rows}"
            )
        if self.epochs == 1 and self.clip != PolicyGradient.clip:
            raise ValueError("clip has no effect with epochs=1: the ratio is 1")
        if self.grad_states is not None and self.ratio == "sequence":
            raise ValueError("the ratio of a sequence needs all its states: leave grad_states out")
        if self.kl_weight == 0 and self.kl != PolicyGradient.kl:
            raise ValueError("kl has no effect with kl_weight=0")


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


__all__ = ["Play", "PolicyGradient", "judge"]
