"""What critics learn: targets and errors of temporal differences, and Q as an actor's objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def expectile_error(difference: Tensor, expectile: float) -> Tensor:
    """Asymmetric square ``|tau - 1(u < 0)| u^2`` (Kostrikov et al. 2022, eq. 5), elementwise.

    Its minimiser over a constant v, with ``u = x - v``, is the tau-expectile of x: the mean for tau
    = 0.5, the maximum for tau -> 1.

    Args:
        difference: u, of any shape.
        expectile: tau in (0, 1).
    """
    weight = (expectile - (difference < 0).to(difference.dtype)).abs()
    return weight * difference.square()


def td_error(values: Tensor, target: Tensor) -> Tensor:
    """Squared error of every critic of an ensemble, summed over them.

    Args:
        values: ``[M, B]``.
        target: ``[B]``, no gradient flows into it.

    Returns:
        ``[B]``.
    """
    return (values - target.detach()).square().sum(0)


def best_of_candidates(values: Tensor, candidates: int) -> Tensor:
    """Max-Q backup: each critic's best candidate, then the least of the critics.

    Kumar et al. 2019, as Diffusion-QL uses it (Wang et al. 2023, appendix D).

    Args:
        values: ``[M, B * N]``, the N candidates of a row next to each other.
        candidates: N.

    Returns:
        ``[B]``.
    """
    return values.view(len(values), -1, candidates).amax(-1).amin(0)


def value_for_actor(critic: nn.Module, cond: Tensor, plan: Tensor) -> Tensor:
    """The critics' values ``[M, B]`` with a gradient to the plan and none to their weights."""
    weights = {name: value.detach() for name, value in critic.named_parameters()}
    values: Tensor = torch.func.functional_call(critic, weights, (cond, plan))
    return values


def normalized_value(values: Tensor, generator: torch.Generator) -> Tensor:
    """Q in units of its own size, so that one weight of it serves every scale of reward.

    Of a twin critic a coin per batch decides which is raised; the other's mean absolute value is
    the unit (Wang et al. 2023, section 3.2; the coin is in the authors' code).

    Args:
        values: ``[M, B]``.
        generator: tosses the coin.

    Returns:
        ``[B]``.
    """
    members = len(values)
    member = torch.randint(members, (1,), generator=generator, device=generator.device)
    member = member.to(values.device)
    unit = values.detach().index_select(0, (member + 1) % members).abs().mean()
    return values.index_select(0, member).squeeze(0) / unit.clamp_min(1e-6)
