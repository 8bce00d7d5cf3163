"""Plans that hold observations: conditioning on returns, and the heads that planners need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.processes import make_process
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.guidance.pinned import Pinned
from diffpolicy.guidance.value import ValueGuidance, head_value
from diffpolicy.policies.base import Array
from diffpolicy.policies.direct import OneCall, direct_class
from diffpolicy.settings import check_range, check_settings, check_shape, named_settings, ranged

if TYPE_CHECKING:
    from diffpolicy.data.normalize import Normalizer
    from diffpolicy.policies.anchors import Anchors
    from diffpolicy.policies.spec import PolicySpec


@named_settings
@dataclass(frozen=True)
class Returns:
    """Conditioning on a return (Ajay et al. 2023, section 3.2).

    The network is told ``(1, r)`` with the discounted return-to-go of the window's current step,
    ``r = (R - low) / (high - low)``, or ``(0, 0)`` where classifier-free guidance drops it.

    Args:
        target: the r that is asked for when acting; 1 is the best of the data.
        discount: per step, in (0, 1]; below 1 the return-to-go does not fade as an episode goes on.
        low: return that is r = 0; ``None``: the least of the data.
        high: return that is r = 1; ``None``: the largest of the data.

    Raises:
        ValueError: a discount out of range, or ``low`` not below ``high``.
    """

    target: float = 1.0
    discount: float = ranged("(0, 1]", 0.99)
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"returns.low must be below high, got {self.low} and {self.high}")

    def normalize(self, value: Array) -> Array:
        """Return r for discounted returns ``value``."""
        assert self.low is not None
        assert self.high is not None
        out: Array = (value - self.low) / (self.high - self.low)
        return out


def check_planning(spec: PolicySpec) -> None:
    """Raise ``ValueError`` unless layout, heads and what uses them fit together."""
    layout = spec.plan_layout
    if not layout.pinned and (spec.returns is not None or spec.goal):
        raise ValueError("returns and goal need layout 'trajectory' or 'state'")
    planning = sorted({"inverse", "value", "draft"} & set(spec.heads))
    if not layout.pinned and planning:
        raise ValueError(f"the heads {planning} need layout 'trajectory' or 'state'")
    if layout.kind != "action" and (spec.grippers or spec.level_law != "row"):
        has = "neither grippers nor levels finer than one per plan"
        raise ValueError(f"plans of layout {spec.layout!r} have {has} (level_law='row')")
    check_range("[0, inf)", temperature=spec.temperature, value_scale=spec.value_scale)
    if layout.pinned and spec.cond_dropout > 0 and spec.returns is None:
        raise ValueError("cond_dropout drops the return: set returns, or cond_dropout=0")
    _check_heads(spec)


def _check_heads(spec: PolicySpec) -> None:
    """The heads that settings need, and what the heads' own settings must not say."""
    for name, config in spec.heads.items():
        if config.get("type") == "draft" and "returns" in config:
            raise ValueError("a head draft is told of returns exactly if the policy is: leave out")
        if config.get("type") == "value" and config.get("cond_dim", 0):
            raise ValueError(f"the head {name} judges plans alone: leave out cond_dim")
    if spec.selection is not None and spec.selection.verifier == "cost" and spec.guidance is None:
        raise ValueError("selection.verifier='cost' needs guidance.costs; their scale may be 0")
    many = spec.selection is not None and spec.selection.num_candidates > 1
    if many and spec.rti is not None and not spec.rti.renoise:
        raise ValueError("without rti.renoise all warm candidates are the same plan: set it")
    if many and spec.sampler.start_seed is not None:
        raise ValueError("with sampler.start_seed all candidates are the same plan: set it to null")
    sources = () if spec.truncated is None else spec.truncated.sources
    written = "autoregressive" in sources
    needs = {
        "inverse": (spec.layout == "state" or written, "actions between states come from"),
        "value": (spec.value_scale > 0, "value_scale > 0 is the gradient of"),
        "draft": (written, "the source 'autoregressive' is"),
        "critic or value": (
            spec.selection is not None and spec.selection.verifier == "head",
            "selection scores plans with",
        ),
    }
    for name, (needed, why) in needs.items():
        if needed and not set(name.split(" or ")) & set(spec.heads):
            raise ValueError(f"{why} a head {name}; heads has {sorted(spec.heads)}")


_SIZES = {
    "inverse": ("obs_dim", "action_dim"),
    "value": ("horizon", "dim", "clean_time"),
    "q_ensemble": ("cond_dim", "horizon", "action_dim"),
    "state_value": ("cond_dim",),
    "draft": ("obs_dim", "horizon", "n_obs_steps", "returns", "constant"),
}


def head_config(spec: PolicySpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a head; sizes that it leaves out are the policy's."""
    named = {
        name: getattr(spec, name) for name in ("obs_dim", "action_dim", "horizon", "n_obs_steps")
    }
    values: dict[str, Any] = {
        **named,
        "cond_dim": spec.make_encoder().cond_dim,
        "dim": spec.plan_layout.dim,
        "clean_time": float(make_process(spec.process).network_time(torch.zeros(()))),
        "returns": spec.returns is not None,
        "constant": list(spec.constant),
    }
    return {**{name: values[name] for name in _SIZES.get(str(config.get("type")), ())}, **config}


def check_anchors(spec: PolicySpec, anchors: Anchors | None) -> None:
    """Raise ``ValueError`` unless truncated settings have the anchors they need."""
    settings = spec.truncated
    trained = spec.network.get("type") == "anchored"
    if trained and (settings is None or settings.rank != "confidence"):
        raise ValueError("a network of type 'anchored' needs truncated with rank 'confidence'")
    if settings is None:
        return
    if settings.rank == "confidence" and not trained:
        raise ValueError("rank 'confidence' needs a network of type 'anchored'")
    if spec.layout != "action" and (anchors is not None or "anchors" in settings.sources):
        others = "the sources 'autoregressive', 'previous' or 'draft', and give t_start"
        raise ValueError(f"anchors are plans of actions, not of {spec.layout!r}: use {others}")
    if anchors is None and ("anchors" in settings.sources or settings.t_start is None):
        fix = "fit them (`diffpolicy anchors`), or give t_start and other sources"
        raise ValueError(f"truncated plans start from anchors; {fix}")
    if anchors is not None:
        check_shape("the anchors", anchors.plans.shape, ("M", spec.horizon, spec.planned_dim))


def guided(
    spec: PolicySpec, denoiser: Denoiser, heads: nn.ModuleDict, known: Tensor, *, quiet: bool
) -> BaseDenoiser:
    """The denoiser with guidance, and with the known entries of its plans pinned.

    Args:
        spec: of the policy.
        denoiser: its own.
        heads: of which ``value`` guides.
        known: which entries of a plan are, bool ``[1, H, D]``.
        quiet: for a deterministic loop.
    """
    inner: BaseDenoiser = denoiser
    if direct_class(spec) is not None:
        return OneCall(denoiser, spec.temperature, likeliest=quiet)
    if spec.sampler.guidance_scale != 1:
        scale, t_min = spec.sampler.guidance_scale, spec.sampler.guidance_t_min
        inner = ClassifierFreeGuidance(inner, scale, clip=spec.clip, t_min=t_min)
    if spec.value_scale > 0:
        value = head_value(heads["value"], denoiser.process)
        inner = ValueGuidance(inner, value, spec.value_scale, clip=spec.clip)
    return Pinned(inner, known) if spec.plan_layout.pinned else inner


def noise_factor(spec: PolicySpec, kind: str) -> float:
    """The factor of the noise of a loop; networks that answer in one call scale it themselves."""
    return 1.0 if kind == "rank" or direct_class(spec) is not None else spec.temperature


def with_actions(heads: Any, states: Tensor) -> Tensor:
    """States ``[n, H, O]`` with the actions between them behind, ``[n, H, O + A]``.

    The last state has no successor; its action is the one before it.
    """
    between = states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)
    actions = heads["inverse"](*between).view(len(states), states.shape[1] - 1, -1)
    return torch.cat([states, torch.cat([actions, actions[:, -1:]], 1)], 2)


def written(spec: PolicySpec, heads: Any, normalizer: Normalizer, history: Tensor) -> Tensor:
    """Plans ``[n, H, D]`` that the head ``draft`` writes state by state (Huang et al. 2024)."""
    seen = normalizer.normalize("obs", history)
    wanted = None if spec.returns is None else seen.new_full((len(seen), 1), spec.returns.target)
    states: Tensor = heads["draft"].rollout(seen, wanted)
    return states if spec.layout == "state" else with_actions(heads, states)
