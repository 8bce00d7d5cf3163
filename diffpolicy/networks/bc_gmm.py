"""Behaviour cloning by a mixture density network (Bishop 1994): BC-GMM of robomimic."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import check_positive
from diffpolicy.networks.direct import Direct, Errors, layers
from diffpolicy.settings import check_range


class BCGMM(Direct):
    """A mixture of K diagonal Gaussians over the whole plan, trained by its likelihood.

    A component is a whole plan, so that a draw does not change its mind within one. robomimic's
    mixture is over the action of a single step, which this is with ``horizon=1``. Means are not
    squashed by tanh: the policy's ``clip`` keeps plans in the range of the data.

    When acting, a component is drawn by its weight, then the plan from it with ``temperature``
    times its standard deviation. 0 takes the component's mean (what robomimic calls low-noise
    evaluation); ``deterministic=True`` takes the mean of the heaviest component.

    Args:
        horizon: H.
        dim: D.
        cond_dim: C.
        width: Units of a hidden layer.
        depth: Hidden layers.
        components: K.
        min_std: Added to the standard deviations, in units of normalised actions; without it the
            likelihood of an entry that the data do not vary has no bound.

    Raises:
        ValueError: A size is not a positive integer, or ``min_std`` is not above 0.

    Example:
        >>> spec = {"network": {"type": "bc_gmm", "components": 5}, "temperature": 0.0, **ONE_CALL}
        >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr", spec=spec)
    """

    TYPE = "bc_gmm"
    DRAWS = True

    def __init__(
        self,
        horizon: int,
        dim: int,
        cond_dim: int = 0,
        *,
        width: int = 1024,
        depth: int = 2,
        components: int = 5,
        min_std: float = 1e-2,
    ) -> None:
        super().__init__(horizon, dim, cond_dim)
        check_positive(width=width, depth=depth, components=components)
        check_range("(0, inf)", min_std=min_std)
        self.width, self.depth = width, depth
        self.components, self.min_std = components, min_std
        self.layers = layers(cond_dim, width, depth)
        self.outward = nn.Linear(width, components * (1 + 2 * horizon * dim))

    def mixture(self, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the mixture of every row.

        Args:
            cond: ``[B, C]``.

        Returns:
            Logarithms of the weights ``[B, K]``, means and standard deviations ``[B, K, H, D]``.
        """
        size = self.horizon * self.dim
        out = self.outward(self.layers(cond)).view(-1, self.components, 1 + 2 * size)
        logits, means, widths = out.split([1, size, size], dim=-1)
        shape = (-1, self.components, self.horizon, self.dim)
        stds = F.softplus(widths) + self.min_std
        return logits.squeeze(-1).log_softmax(-1), means.view(shape), stds.view(shape)

    def log_likelihood(self, cond: Tensor, plan: Tensor, valid: Tensor) -> Tensor:
        """Return the log-density ``[B]`` of plans ``[B, H, D]``, of the positions that count.

        Positions that do not are integrated out, which a diagonal Gaussian does by leaving them.
        """
        log_weights, means, stds = self.mixture(cond)
        z = (plan.unsqueeze(1) - means) / stds
        each = -0.5 * z.square() - stds.log() - 0.5 * math.log(2 * math.pi)
        counted = each.sum(-1) * valid.unsqueeze(1).to(each.dtype)
        return torch.logsumexp(log_weights + counted.sum(-1), dim=1)

    def plan(
        self, cond: Tensor, noise: Tensor, *, temperature: float = 1.0, likeliest: bool = False
    ) -> Tensor:
        """See :meth:`Direct.plan`."""
        log_weights, means, stds = self.mixture(cond)
        if likeliest:
            return _taken(means, log_weights.argmax(1))
        chosen, rest = drawn(log_weights.exp(), noise.flatten(1))
        if temperature == 0:
            return _taken(means, chosen)
        fresh = torch.cat([normal_of(rest).unsqueeze(1), noise.flatten(1)[:, 1:]], dim=1)
        return _taken(means, chosen) + temperature * _taken(stds, chosen) * fresh.view_as(noise)

    def errors(self, cond: Tensor, plan: Tensor, valid: Tensor, generator: Any) -> Errors:
        """See :meth:`Direct.errors`: minus the log-likelihood per entry that counts, in nats."""
        entries = (valid.sum(-1) * self.dim).clamp_min(1)
        return -self.log_likelihood(cond, plan, valid) / entries, {}


def drawn(weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a component with the first entry of standard normal noise, and say what is left of it.

    That entry becomes a uniform number u, which falls into the stretch of one component. Where in
    this stretch it falls is uniform again, and independent of the choice.

    Args:
        weights: ``[B, K]``, which sum to 1.
        noise: standard normal ``[B, N]``.

    Returns:
        The component ``[B]``, and the uniform number ``[B]`` that is left.
    """
    u = 0.5 * (1 + torch.erf(noise[:, 0] / math.sqrt(2)))
    ends = weights.cumsum(1)
    chosen = (u.unsqueeze(1) > ends[:, :-1]).sum(1)  # the last takes what rounding leaves
    width = weights.gather(1, chosen.unsqueeze(1)).squeeze(1)
    begin = ends.gather(1, chosen.unsqueeze(1)).squeeze(1) - width
    return chosen, (u - begin) / width.clamp_min(torch.finfo(u.dtype).tiny)


def normal_of(uniform: Tensor) -> Tensor:
    """Return the standard normal number of a uniform one, within 5 of 0 as float32 allows.

    Raises:
        ValueError: in a graph that ONNX is to hold, which knows no inverse of erf.
    """
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "ONNX cannot draw from a Gaussian of a bc_gmm: take a component's mean (temperature=0) "
            "or that of the heaviest (deterministic=True), or keep backend='eager'"
        )
    inside = uniform.clamp(3e-7, 1 - 3e-7)
    return math.sqrt(2) * torch.erfinv(2 * inside - 1)


def _taken(each: Tensor, chosen: Tensor) -> Tensor:
    """Of ``[B, K, H, D]`` the entries ``[B, H, D]`` of each row's own component."""
    index = chosen.view(-1, 1, 1, 1).expand(-1, 1, each.shape[2], each.shape[3])
    return each.gather(1, index).squeeze(1)
