"""Several rewards as one: weighted, subject to floors, and ensembles that distrust themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffpolicy.learn.method import Reward, judged
from diffpolicy.settings import check_range


class Objectives(nn.Module):
    """``sum_k w_k r_k(x) - penalty sum_k max(0, floor_k - r_k(x))``, a reward like any other.

    With weights ``(1, 0)`` and no floor it is the first reward. A floor makes the second one a
    constraint: sequences that fall short pay ``penalty`` per unit, those above pay nothing.
    It has a gradient where its parts have, and is hard where they are.

    Example:
        >>> both = Objectives([activity, stability], weights=(1, 0), floors=(None, 0.5))
        >>> tune(model, oracles._replace(reward=both), {"type": "policy_gradient"}, config, "run")

    Args:
        rewards: each ``[B, L, V] -> [B]``; modules among them are parts of this one.
        weights: one for each.
        floors: one for each, ``None`` where there is none; left out: there are none.
        penalty: reward lost per unit below a floor, positive.

    Raises:
        ValueError: not as many weights or floors as rewards, or a penalty that is not positive.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        floors: Sequence[float | None] | None = None,
        *,
        penalty: float = 10.0,
    ) -> None:
        super().__init__()
        floors = [None] * len(rewards) if floors is None else floors
        check_range("(0, inf)", penalty=penalty)
        if not rewards or not len(rewards) == len(weights) == len(floors):
            got = f"{len(rewards)} rewards, {len(weights)} weights and {len(floors)} floors"
            raise ValueError(f"each reward has a weight, and a floor or None; got {got}")
        self.rewards = list(rewards)
        self.parts = nn.ModuleList([r for r in rewards if isinstance(r, nn.Module)])
        self.weights, self.floors = [float(w) for w in weights], list(floors)
        self.penalty = float(penalty)

    def values(self, x: Tensor) -> Tensor:
        """Every reward by itself, ``[B, K]``."""
        return torch.stack([judged(reward, x) for reward in self.rewards], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for reward, weight, floor in zip(self.rewards, self.weights, self.floors, strict=True):
            if weight == 0 and floor is None:
                continue
            value = judged(reward, x)
            total = total + weight * value if weight else total
            if floor is not None:
                total = total - self.penalty * (floor - value).clamp_min(0)
        return total


class Pessimistic(nn.Module):
    """``mean - pessimism * standard deviation`` of an ensemble: unsure is worth less.

    Where oracles of the same measurements disagree, no measurement stands behind what they say, and
    a reward that is tuned to is soon there.

    Args:
        members: two or more rewards ``[B, L, V] -> [B]``, such as oracles of different seeds.
        pessimism: standard deviations (of the members, uncorrected) that are taken off.

    Raises:
        ValueError: fewer than two members, or a negative pessimism.
    """

    def __init__(self, members: Sequence[Reward], pessimism: float = 1.0) -> None:
        super().__init__()
        check_range("[2, inf)", members=len(members))
        check_range("[0, inf)", pessimism=pessimism)
        self.members, self.pessimism = list(members), float(pessimism)
        self.parts = nn.ModuleList([m for m in members if isinstance(m, nn.Module)])

    def forward(self, x: Tensor) -> Tensor:
        values = torch.stack([judged(member, x) for member in self.members])
        spread = (values.var(0, correction=0) + 1e-12).sqrt()  # a slope where all agree, too
        return values.mean(0) - self.pessimism * spread
