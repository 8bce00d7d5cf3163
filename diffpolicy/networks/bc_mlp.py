"""Behaviour cloning by regression: the condition through an MLP, out comes the plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffpolicy.networks.base import check_positive
from diffpolicy.networks.direct import Direct, Errors, layers, mean_over_valid
from diffpolicy.settings import check_choice


class BCMLP(Direct):
    """A plan regressed on the observation.

    Where the demonstrations do two things, it does what lies between: the mean with ``l2``, the
    median with ``l1``. That is what the other methods are measured against.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C.
        width: Units of a hidden layer.
        depth: Hidden layers.
        loss: ``l2`` (squared) or ``l1`` (absolute error), the mean over the entries of a plan.

    Raises:
        ValueError: A size is not a positive integer, or an unknown loss.

    Example:
        >>> spec = {"network": {"type": "bc_mlp", "loss": "l1"}, **ONE_CALL}
        >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr", spec=spec)
    """

    TYPE = "bc_mlp"

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        width: int = 1024,
        depth: int = 2,
        loss: str = "l2",
    ) -> None:
        super().__init__(horizon, dim, cond_dim)
        check_positive(width=width, depth=depth)
        check_choice("loss", loss, ("l1", "l2"))
        self.width, self.depth, self.loss = width, depth, loss
        self.layers = layers(cond_dim, width, depth)
        self.outward = nn.Linear(width, horizon * dim)

    def plan(
        self, cond: Tensor, noise: Tensor, *, temperature: float = 1.0, likeliest: bool = False
    ) -> Tensor:
        """See :meth:`Direct.plan`; nothing is drawn."""
        out: Tensor = self.outward(self.layers(cond))
        return out.view(-1, self.horizon, self.dim)

    def errors(self, cond: Tensor, plan: Tensor, valid: Tensor, generator: Any) -> Errors:
        """See :meth:`Direct.errors`."""
        difference = self.plan(cond, plan) - plan
        error = difference.square() if self.loss == "l2" else difference.abs()
        return mean_over_valid(error.mean(-1), valid), {}
