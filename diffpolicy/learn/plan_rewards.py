"""Tuning a policy by a differentiable reward of its plans: a critic, or a simulator."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.trainer import Source

PlanReward = Callable[[Tensor, Tensor], Tensor]


class Conditions:
    """The observations of a source of windows: what plans are sampled for.

    ``gather`` gives ``index`` int64 ``[B]`` and ``cond [B, To * O]``, normalised.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        return {"index": indices, "cond": self.source.gather(indices)["obs"].flatten(1)}


def in_own_units(reward: PlanReward, spec: PolicySpec, normalizer: Normalizer) -> PlanReward:
    """``reward(action [B, H, A], obs [B, To, O])`` in the data's units, for normalised plans."""

    def scored(plan: Tensor, cond: Tensor) -> Tensor:
        history = cond.view(len(cond), spec.n_obs_steps, spec.obs_dim)
        return reward(
            normalizer.unnormalize("action", plan), normalizer.unnormalize("obs", history)
        )

    return scored


def check_tunable(spec: PolicySpec) -> None:
    """Raise ``ValueError`` unless plans of actions are sampled from observations alone."""
    if spec.layout != "action" or spec.returns is not None:
        raise ValueError(
            "tune samples plans of actions given observations; this policy has "
            f"layout={spec.layout!r}, returns={spec.returns}. Use RewardLoss on its denoiser"
        )
