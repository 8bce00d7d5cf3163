"""Policies whose sampling is one network call: behaviour cloning by regression, mixtures, ACT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, Denoiser, GridDenoise
from diffpolicy.networks.direct import Direct
from diffpolicy.networks.registry import network_class

if TYPE_CHECKING:
    from diffpolicy.policies.spec import PolicySpec

ONE_CALL: Mapping[str, Any] = {
    "prediction": "x0",
    "process": {"type": "flow"},
    "sampler": {"solver": "ddim", "num_steps": 1},
}
"""Entries of the spec of such a policy: asked once, of pure noise, for the clean plan.

Example:
    >>> spec = {"network": {"type": "act"}, "horizon": 16, **ONE_CALL}
    >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr", spec=spec)
"""


def direct_class(spec: PolicySpec) -> type[Direct] | None:
    """The class of a policy's network if that answers in one call, else None."""
    kind = network_class(spec.network.get("type"))
    return kind if issubclass(kind, Direct) else None


def draws_in_one_call(spec: PolicySpec) -> bool:
    """Whether plans are drawn in one call; a deterministic loop is then of other arithmetic."""
    kind = direct_class(spec)
    return kind is not None and kind.DRAWS


def check_direct(spec: PolicySpec) -> None:
    """Raise ``ValueError`` if a network that answers in one call is asked for more than that."""
    kind = direct_class(spec)
    if kind is None:
        return
    name, sampler = spec.network["type"], spec.sampler
    once = sampler.solver == "ddim" and sampler.num_steps == 1
    if spec.prediction != "x0" or spec.process.get("type") != "flow" or not once:
        raise ValueError(
            f"a network of type {name!r} answers in one call: it needs prediction='x0', "
            f"process='flow' and sampler ddim in 1 step (diffpolicy.policies.direct.ONE_CALL; "
            "algorithm=bc_mlp, bc_gmm and act say so on the command line); got "
            f"{spec.prediction!r}, {spec.process.get('type')!r}, {sampler.solver} in "
            f"{sampler.num_steps} steps"
        )
    foreign = {
        "rti": spec.rti is not None,
        "truncated": spec.truncated is not None,
        f"level_law={spec.level_law!r}": spec.level_law != "row",
        "cond_dropout": spec.cond_dropout > 0,
        f"layout={spec.layout!r}": spec.layout != "action",
        "heads": bool(spec.heads),
        "guidance": spec.guidance is not None,
        f"temperature={spec.temperature}": spec.temperature != 1 and not kind.DRAWS,
    }
    found = [name for name, used in foreign.items() if used]
    if found:
        raise ValueError(
            f"a network of type {name!r} answers in one call and has no use for "
            f"{', '.join(found)}; leave out, or train a denoiser (network.type=mlp, ...)"
        )


def refuse_direct(spec: PolicySpec, what: str) -> None:
    """Raise ``ValueError`` if a policy has no noise levels, which ``what`` needs."""
    if direct_class(spec) is not None:
        raise ValueError(
            f"{what} works on the noise levels of a denoiser; a network of type "
            f"{spec.network['type']!r} answers in one call. Train a policy with network.type=mlp, "
            "unet1d or transformer"
        )


class OneCall(BaseDenoiser):
    """A denoiser whose network answers in one call, as it acts.

    Args:
        denoiser: the policy's.
        temperature: of draws.
        likeliest: rather than draws.
    """

    def __init__(self, denoiser: Denoiser, temperature: float, *, likeliest: bool) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.temperature, self.likeliest = temperature, likeliest

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return self._answer(x_t, cond)

    def on_grid(self, t: Tensor, s: Tensor | None = None) -> GridDenoise:
        return lambda row, x, cond: self._answer(x, cond)

    def _answer(self, noise: Tensor, cond: Tensor | None) -> Denoised:
        network = self.denoiser.network
        assert isinstance(network, Direct)
        assert cond is not None
        how = {"temperature": self.temperature, "likeliest": self.likeliest}
        plan = network.plan(cond, noise, **how)  # type: ignore[arg-type]
        return Denoised(torch.clamp(plan, -1, 1) if self.denoiser.clip else plan)
