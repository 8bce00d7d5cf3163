"""Plans under costs: what a policy's settings say of them, and its plans in physical units."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.data.action_groups import Representation
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import each, zeros
from diffpolicy.guidance.cost_guidance import COST_MODES, CostGuidance
from diffpolicy.guidance.costs import COSTS, Cost
from diffpolicy.networks.registry import class_of, construct
from diffpolicy.policies.base import Array
from diffpolicy.policies.boundary import now_of
from diffpolicy.policies.plan_loop import Condition, GuidedCondition, PinnedCondition
from diffpolicy.settings import check_known, check_settings, named_settings, one_of, ranged

if TYPE_CHECKING:
    from diffpolicy.policies.diffusion import DiffusionPlanner
    from diffpolicy.policies.spec import PolicySpec


@named_settings
@dataclass(frozen=True)
class Costs:
    """How a policy's plans are kept from costs, whatever they start from.

    Args:
        costs: each ``{"type": ..., settings}``: a key of
            :data:`~diffpolicy.guidance.costs.COSTS` or ``package.module:Class``, a subclass of
            :class:`~diffpolicy.guidance.costs.Cost`.
        scale: factor of every move; 0: costs judge plans (``selection.verifier``) and move none.
        mode: ``"estimate"`` moves the clean estimate itself, ``"network"`` what the network makes
            of the noisy plan, at three times the price.
        window: lowest and highest noise level at which plans are moved.
        iterations: moves per network evaluation.
        project: further moves in the last two evaluations that undo what is still violated.

    Raises:
        ValueError: settings out of range, unknown costs, or settings that they do not have.

    Example:
        >>> sphere = {"type": "obstacle", "dims": [0, 1, 2], "center": [1.3, 0.7, 0.5]}
        >>> sphere |= {"radius": 0.05, "gain": 0.031, "start": [0, 1, 2], "push": "lateral"}
        >>> safe = policy.with_guidance(sphere, project=3)
    """

    costs: tuple[Mapping[str, Any], ...] = ()
    scale: float = ranged("[0, inf)", 1.0)
    mode: str = one_of(*COST_MODES)
    window: tuple[float, float] = (0.0, 1.0)
    iterations: int = ranged("[1, inf)", 1)
    project: int = ranged("[0, inf)", 0)

    def __post_init__(self) -> None:
        check_settings(self)
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(f"window is (lowest, highest) level in [0, 1], got {self.window}")
        self.make()

    def make(self) -> list[Cost]:
        """The costs.

        Raises:
            ValueError: as above.
        """
        if not self.costs:
            raise ValueError(
                "guidance needs costs, such as costs=[{type: limits, dims: [0], high: [0.5]}]"
            )
        for config in self.costs:
            kind = class_of(COSTS, config.get("type"), "cost type", Cost)
            bases = (base for base in kind.__mro__ if issubclass(base, Cost))
            known = {name for base in bases for name in inspect.signature(base).parameters}
            check_known(set(config) - {"type"}, sorted(known - {"how"}), f"cost {config['type']!r}")
        return [construct(COSTS, config, "cost", Cost) for config in self.costs]

    @property
    def closed_form(self) -> bool:
        """Whether nothing is differentiated automatically."""
        return self.mode == "estimate" and all(cost.closed_form for cost in self.make())


class PhysicalPlans:
    """A policy's plans as its costs see them: in data units, actions as the environment takes them.

    Actions are neither rounded nor brought within bounds, so that a cost sees what is wrong. Plans
    that hold observations have these first; imagined ones stay normalised.

    Args:
        spec: of the policy.
        normalizer: its.
        device: where its weights are.

    Raises:
        ValueError: actions that choose, which have no slope.
    """

    def __init__(
        self, spec: PolicySpec, normalizer: Normalizer, device: torch.device | str
    ) -> None:
        self.says: Representation | None = spec.representation
        if self.says is not None and any(g.choices is not None for g in self.says.groups):
            raise ValueError("guidance moves plans of numbers; actions that choose have no slope")
        self.closed_form = self.says is None
        self.normalizer = normalizer.to(device)
        seen = spec.plan_layout.parts[0]
        parts = [torch.zeros(2, 0)]
        if spec.plan_layout.pinned:
            parts.append(_affine(normalizer, "obs", spec.obs_dim))
        elif seen:
            parts.append(torch.tensor([[0.0], [1.0]]).expand(2, seen))
        if spec.layout != "state":
            if self.says is not None:  # these are translated as a whole
                parts.append(torch.tensor([[0.0], [1.0]]).expand(2, spec.planned_dim))
            else:
                parts.append(_affine(normalizer, "action", spec.planned_dim))
        self.offset, self.factor = torch.cat(parts, 1).to(device).unbind(0)
        self._seen = seen

    def raw(self, plan: Tensor, obs: Any) -> Tensor:
        """The plan ``[n, H, ...]`` in physical units; ``obs`` are raw ``[n, To, ...]``."""
        out = torch.addcmul(self.offset.to(plan), plan, self.factor.to(plan))
        if self.says is None:
            return out
        entries = self.normalizer.unnormalize("action", plan[..., self._seen :])
        entries = self.says.absolute(entries, each(torch.as_tensor, now_of(obs)))
        return torch.cat([out[..., : self._seen], self.says.actions(entries)], -1)

    def pulled(self, slope: Tensor, plan: Tensor, obs: Any) -> Tensor:
        """A slope with respect to :meth:`raw` as one with respect to ``plan``: the chain rule."""
        if self.says is None:
            return slope * self.factor.to(slope)
        with torch.enable_grad():
            at = plan.detach().requires_grad_()
            (pulled,) = torch.autograd.grad(self.raw(at, obs), at, slope)
        return pulled


def _affine(normalizer: Normalizer, field: str, dim: int) -> Tensor:
    """``raw = offset + factor * normalised`` of a field, ``[2, dim]``."""
    offset = normalizer.to("cpu").unnormalize(field, torch.zeros(dim))
    return torch.stack([offset, normalizer.to("cpu").unnormalize(field, torch.ones(dim)) - offset])


def kept_from_costs(planner: DiffusionPlanner, denoiser: BaseDenoiser) -> CostGuidance:
    """A policy's denoiser, with its other guidance, under the costs of ``spec.guidance``."""
    spec, settings = planner.spec, planner.spec.guidance
    assert settings is not None
    like = next(planner.denoiser.parameters())
    guidance = CostGuidance(
        denoiser,
        [cost.to(like.device, like.dtype) for cost in settings.make()],
        PhysicalPlans(spec, planner.normalizer, planner.device),
        scale=settings.scale,
        mode=settings.mode,
        window=settings.window,
        iterations=settings.iterations,
        project=settings.project,
        free=~planner.layout.known.to(planner.device) if planner.layout.pinned else None,
        clip=spec.clip,
    )
    _try_out(planner, guidance)
    return guidance


def _try_out(planner: DiffusionPlanner, guidance: CostGuidance) -> None:
    """Ask every cost once, so that one that does not fit says so before an episode begins."""
    obs = planner.on_device(zeros(planner.observed, (1, planner.n_obs_steps)))
    plan = torch.zeros(1, planner.horizon, planner.layout.dim, device=planner.device)
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            guidance.sloped(plan, obs)
    except (IndexError, KeyError, TypeError, RuntimeError) as error:
        entries = guidance.physical.raw(plan, obs).shape[-1]
        raise ValueError(
            f"a cost does not fit plans of {entries} entries a step and observations "
            f"{planner.observed}: {type(error).__name__}: {error}"
        ) from error


@torch.no_grad()
def plan_costs(planner: DiffusionPlanner, history: Any, plans: Array) -> Array:
    """The weighted sum ``[n]`` of a policy's costs, of plans as it remembers them.

    Args:
        planner: the policy, with ``guidance``.
        history: raw observations ``[n, To, ...]``, one or by name, or
            :class:`~diffpolicy.policies.plan_loop.Encoded`.
        plans: normalised ``[n, H, P]``.
    """
    seen = planner.on_device(history) if not hasattr(history, "seen") else history.seen
    plan = torch.from_numpy(plans[..., : planner.layout.dim])
    said = planner.boundary.relative(plan, each(lambda one: one.cpu(), now_of(seen)))
    guidance = planner.costs
    assert guidance is not None
    raw = guidance.physical.raw(said.to(planner.device), seen)
    costs = [cost.weight * cost(raw, seen) for cost in guidance.costs]
    out: Array = torch.stack(costs).sum(0).cpu().numpy()
    return out


def check_closed_form(planner: DiffusionPlanner) -> None:
    """Raise ``ValueError`` where costs need automatic differentiation, or more than a graph has."""
    settings = planner.spec.guidance
    if settings is None:
        return
    if not settings.closed_form or planner.spec.representation is not None:
        raise ValueError(
            "guidance that differentiates (mode='network', a cost without a slope() of its own, "
            "action groups) runs on backend='eager' alone; compiled loops and files cannot"
        )
    if next(planner.denoiser.encoder.parameters(), None) is not None:
        raise ValueError(
            "costs look at raw observations and an encoder with weights is compiled apart from "
            "them: run guidance of such a policy on backend='eager'"
        )


def condition_of(planner: DiffusionPlanner) -> Condition:
    """What a planner's denoiser is told, the raw observations beside it where costs read them."""
    told = Condition(planner.normalizer, planner.denoiser.encoder, planner.observed)
    if planner.layout.pinned:
        returns = planner.spec.returns
        wanted = () if returns is None else (1.0, returns.target)
        told = PinnedCondition(planner.normalizer, planner.layout, wanted).to(planner.device)
    return told if planner.spec.guidance is None else GuidedCondition(told)
