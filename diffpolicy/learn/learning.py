"""What a policy is trained on and with: examples and objective for its layout and heads.

Behaviour cloning, planners and actor-critics share the trainer; they differ in what is built here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.starts import Ramp
from diffpolicy.data.blocks import Ints
from diffpolicy.data.hindsight import HindsightWindows, hindsight_of
from diffpolicy.data.joined import Joined, apart, each_part
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import by_store_field
from diffpolicy.data.returns import returns_to_go, with_fields
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.transitions import Transitions, check_fields
from diffpolicy.data.windows import Windows
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.learn.actor_critic.loss import ActorCriticLoss
from diffpolicy.learn.cloning.anchored import AnchoredLoss
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.learn.cloning.direct import DirectLoss
from diffpolicy.learn.cloning.flow_map import FlowMapLoss, FlowMapObjective
from diffpolicy.learn.cloning.meanflow import MeanFlow
from diffpolicy.learn.cloning.pad import JointLoss
from diffpolicy.learn.cloning.planners import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss
from diffpolicy.learn.cloning.shortcut import Shortcut
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.direct import direct_class
from diffpolicy.policies.imagined import Imagined
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.settings import (
    check_choice,
    check_settings,
    from_values,
    named_settings,
    ranged,
    settings_of,
)
from diffpolicy.training.sources import Source, Weighted

OBJECTIVES: dict[str, type[FlowMapObjective]] = {"meanflow": MeanFlow, "shortcut": Shortcut}
"""What networks of steps are trained by, by the name that configurations give as ``type``."""


@named_settings
@dataclass(frozen=True)
class Learning:
    """How weights are learned, beyond the trainer's settings.

    Args:
        actor_critic: settings of :class:`~diffpolicy.learn.actor_critic.loss.ActorCritic`. Without
            it the denoiser learns by its denoising loss, heads by their own.
        discount: of critics and of the head ``value``, per step; where the policy is conditioned
            on returns, these have their own.
        reward_scale: factor of the rewards that critics see; ``"return_range"``: 1000 over the
            range of the episodes' returns, as in IQL's code for locomotion.
        reward_shift: added to the scaled rewards (-1 on AntMaze).
        first_action_weight: of the first executed action in the denoising loss of planners.
        next_obs_weight: of the next observation likewise.
        imagined_weight: of the error of what is imagined beside that of the actions (layout
            ``"joint"``).
        value_levels: ``"all"`` trains the head ``value`` on noisy plans, for guidance;
            ``"clean"``, to choose among finished plans.
        mask_padding: leave edge-padded positions out of the losses (an actor-critic has a setting
            of its own for that).
        draws: noises per example in the denoising loss, for one encoding of its observation.
        objective: of policies of prediction ``mean_velocity``, what replaces the denoising loss:
            ``{"type": "meanflow"}`` or ``{"type": "shortcut"}`` with the settings of
            :class:`~diffpolicy.learn.cloning.meanflow.MeanFlow` or
            :class:`~diffpolicy.learn.cloning.shortcut.Shortcut`.

    Raises:
        ValueError: values out of range.
    """

    actor_critic: ActorCritic | None = None  # or its plain values
    discount: float = ranged("(0, 1]", 0.99)
    reward_scale: float | str = 1.0
    reward_shift: float = 0.0
    first_action_weight: float = 1.0
    next_obs_weight: float = 1.0
    imagined_weight: float = 1.0
    value_levels: str = "all"
    mask_padding: bool = False
    draws: int = 1
    objective: FlowMapObjective | None = None  # or its plain values

    def __post_init__(self) -> None:
        given: Any = self.actor_critic
        if isinstance(given, Mapping):
            made = settings_of(ActorCritic, given, "actor_critic")
            object.__setattr__(self, "actor_critic", made)
        given = self.objective
        if isinstance(given, Mapping):
            values = dict(given)
            check_choice("learning.objective.type", kind := values.pop("type", None), OBJECTIVES)
            made_of = from_values(OBJECTIVES[kind], values, "learning.objective.")
            object.__setattr__(self, "objective", made_of)
        check_settings(self)
        scale = self.reward_scale
        if isinstance(scale, str) and scale != "return_range":
            raise ValueError(f"reward_scale must be a number or 'return_range', got {scale!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Learning:
        """From JSON values.

        Raises:
            ValueError: unknown entries or values out of range.
        """
        return settings_of(cls, config, "learning")


def check_learning(spec: PolicySpec, learning: Learning) -> None:
    """Raise ``ValueError`` for a policy that cannot be learned so."""
    critics = {"critic", "state_value"} & set(spec.heads)
    if learning.actor_critic is None and critics:
        raise ValueError(f"learning.actor_critic trains the heads {sorted(critics)}; set it")
    if learning.actor_critic is not None and spec.representation is not None:
        raise ValueError(
            "actor-critics learn actions as data hold them, without action groups (policy.actions, "
            "or those of a store whose actions choose)"
        )
    if direct_class(spec) is not None and learning.draws != 1:
        raise ValueError(
            f"learning.draws={learning.draws} is of the noise of denoisers; a network of type "
            f"{spec.network['type']!r} answers in one call: leave it at 1"
        )
    if (spec.prediction == "mean_velocity") != (learning.objective is not None):
        raise ValueError(
            "a policy of prediction 'mean_velocity', and no other, is trained by "
            "learning.objective, {type: meanflow} or {type: shortcut} (algorithm=meanflow and "
            f"algorithm=shortcut say both); got prediction={spec.prediction!r} and "
            f"objective={learning.objective}"
        )
    if learning.actor_critic is not None and learning.objective is not None:
        raise ValueError("learning.actor_critic trains velocities, not steps: leave out objective")
    told = spec.layout, spec.level_law, spec.cond_dropout
    if learning.actor_critic is not None and told != ("action", "row", 0):
        raise ValueError(
            "actor-critics learn plans with layout='action', level_law='row', cond_dropout=0; got "
            + ", ".join(map(repr, told))
        )


class PlanExamples:
    """Windows for plans that hold observations: a source of the trainer.

    ``gather`` gives ``obs [B, H, O]``, ``action [B, H, A]``, ``valid [B, H]``, and where needed
    ``return_to_go [B, H]`` (normalised) and ``return [B, 2]``, ``(1, r)`` of the current step.
    Where observations are imagined it gives what a
    :class:`~diffpolicy.learn.cloning.pad.JointLoss` takes.
    """

    def __init__(
        self,
        windows: Windows | HindsightWindows,
        *,
        conditioned: bool = False,
        imagined: Imagined | None = None,
    ) -> None:
        self.windows, self.conditioned, self.imagined = windows, conditioned, imagined

    def __len__(self) -> int:
        return len(self.windows)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of windows."""
        batch = self.windows.gather(indices)
        if self.conditioned:
            now = batch["return_to_go"][:, self.windows.n_obs_steps - 1]
            batch["return"] = torch.stack([torch.ones_like(now), now], 1)
        if self.imagined is not None:
            stride = self.imagined.stride(self.windows.horizon)
            of_frames = batch["valid"][:, stride - 1 :: stride]
            batch["imagined_valid"] = of_frames.repeat_interleave(stride, 1)
            batch["imagined"] = self.imagined.entries(batch["imagined"])
        return batch


def examples(
    spec: PolicySpec,
    normalizer: Normalizer,
    store: EpisodeStore,
    learning: Learning,
    episodes: Sequence[int],
    *,
    draws: int | None = None,
) -> Source:
    """What the trainer draws its batches from; of joined stores, each by its weight.

    ``draws`` is how many goals in hindsight a window has, see
    :class:`~diffpolicy.data.hindsight.HindsightWindows`; other examples do not depend on it.
    """
    if not isinstance(store, Joined):
        return _examples(spec, normalizer, store, learning, episodes, draws)
    each = {n: normalizer.named(n) if normalizer.others else normalizer for n in store.parts}
    parts = {
        name: _examples(spec, each[name], store, learning, own.tolist(), draws)
        for name, own in apart(store, episodes).items()
    }
    return Weighted(parts, store.weights)


def _examples(
    spec: PolicySpec,
    normalizer: Normalizer,
    store: EpisodeStore,
    learning: Learning,
    episodes: Sequence[int],
    draws: int | None,
) -> Source:
    how: dict[str, Any] = {"horizon": spec.horizon, "n_obs_steps": spec.n_obs_steps}
    how |= {"normalizer": normalizer, "episodes": episodes}
    if learning.actor_critic is not None:
        if hindsight_of(store) is not None:
            raise ValueError(
                "goals in hindsight are for cloning and planners; an actor-critic learns from the "
                "rewards that its data have"
            )
        return Transitions(
            store,
            **how,
            discount=learning.discount,
            reward_scale=reward_scale(store, learning),
            reward_shift=learning.reward_shift,
        )
    how["n_action_steps"] = spec.n_action_steps
    if not spec.plan_layout.pinned:
        names: tuple[str, ...] = (*by_store_field(spec.observed), "action")
        how["actions"] = spec.representation
        if spec.imagined is None:
            return _windows(store, draws, fields=names, **how)
        acts = np.repeat(store.has_actions, store.episode_lengths).astype(np.float32)
        found = {"imagined": spec.imagined.rows(store, normalizer)} | {"has_action": acts}
        names, store = (*names, *found), with_fields(store, found)
        windows = _windows(store, draws, fields=names, **how)
        return PlanExamples(windows, imagined=spec.imagined)
    fields: tuple[str, ...] = ("obs", "action")
    check_constant(spec, store)
    if spec.returns is not None or "value" in spec.heads:
        store = with_fields(store, {"return_to_go": _normalised_returns(spec, store, learning)})
        fields = (*fields, "return_to_go")
    windows = _windows(store, draws, fields=fields, whole=True, **how)
    return PlanExamples(windows, conditioned=spec.returns is not None)


def _windows(
    store: EpisodeStore, draws: int | None, *, whole: bool = False, **how: Any
) -> Windows | HindsightWindows:
    """The windows of a store; where it has goals in hindsight, with these."""
    windows, goals = Windows(store, whole=whole, **how), hindsight_of(store)
    return windows if goals is None else HindsightWindows(windows, goals, whole=whole, draws=draws)


def usable_episodes(spec: PolicySpec, store: EpisodeStore, most: int | None) -> Ints:
    """The first ``most`` episodes (None: all) of each store, without those that have no actions.

    Policies that imagine observations learn from these too.

    Raises:
        ValueError: none is left.
    """
    first = each_part(store, lambda count: range(min(count, most or count)))
    if spec.imagined is not None or not len(first):
        return first
    found = first[store.has_actions[first]]
    for name, own in apart(store, found).items():
        if not len(own):
            count = len(apart(store, first)[name])
            raise ValueError(
                f"none of the {count} episodes of {name or store.name} has actions; "
                "they teach policy.layout=joint beside others that have"
            )
    return found


def check_constant(spec: PolicySpec, store: EpisodeStore) -> None:
    """Raise ``ValueError`` if an entry that ``spec.constant`` names changes within an episode."""
    if not spec.constant:
        return
    changed = np.abs(np.diff(store.read("obs", 0, store.num_steps), axis=0)) > 1e-6
    changed[store.episode_ends[:-1] - 1] = False
    for entry in spec.constant:
        if changed[:, entry].any():
            place = f"row {int(changed[:, entry].argmax())} of {store.name}"
            raise ValueError(f"constant names entry {entry}, which changes in an episode ({place})")


def _normalised_returns(spec: PolicySpec, store: EpisodeStore, learning: Learning) -> Any:
    if spec.returns is not None:
        values = returns_to_go(store, spec.returns.discount)
        return spec.returns.normalize(values).astype(np.float32)
    values = returns_to_go(store, learning.discount)
    return ((values - values.mean()) / max(float(values.std()), 1e-6)).astype(np.float32)


def reward_scale(store: EpisodeStore, learning: Learning) -> float:
    """The factor of rewards, measured where it depends on the data."""
    if not isinstance(learning.reward_scale, str):
        return float(learning.reward_scale)
    check_fields(store)
    reward = store.read("reward", 0, store.num_steps).astype(np.float64).reshape(-1)
    starts = np.concatenate([[0], store.episode_ends[:-1]])
    totals = np.add.reduceat(reward, starts)
    spread = float(totals.max() - totals.min())
    if spread <= 0:
        raise ValueError(f"all returns of {store.name} are alike; give reward_scale as a number")
    return 1000.0 / spread


def objective(policy: DiffusionPlanner, learning: Learning) -> nn.Module:
    """The loss that trains a policy's denoiser and heads.

    Raises:
        ValueError: settings and heads that do not fit together.
    """
    spec, denoiser, heads = policy.spec, policy.denoiser, policy.heads
    check_learning(spec, learning)
    actor_critic = learning.actor_critic
    if actor_critic is not None:
        return ActorCriticLoss(denoiser, cast("Mapping[str, nn.Module]", heads), actor_critic)
    own = _of_network(policy, learning)
    if own is not None:
        return own
    denoising = _denoising(policy, learning)
    if not len(heads):
        return denoising
    losses: dict[str, nn.Module] = {"denoising": denoising}
    if "inverse" in heads:
        losses["inverse"] = InverseDynamicsLoss(heads["inverse"], spec.n_obs_steps)
    if "value" in heads:
        made = heads["value"], denoiser.process, policy.layout, learning.value_levels
        losses["value"] = ValueLoss(*made)
    if "draft" in heads:
        losses["draft"] = DraftLoss(heads["draft"], policy.layout)
    return SumOfLosses(denoiser, heads, losses)


def _denoising(policy: DiffusionPlanner, learning: Learning) -> nn.Module:
    """The loss of the denoiser, whose heads have losses of their own."""
    spec, denoiser = policy.spec, policy.denoiser
    how: dict[str, Any] = {"cond_dropout": spec.cond_dropout, "draws": learning.draws}
    how["mask_padding"] = learning.mask_padding
    if learning.objective is not None:
        return FlowMapLoss(denoiser, learning.objective, **how)
    if spec.imagined is not None:
        weight = learning.imagined_weight
        return JointLoss(denoiser, policy.layout, imagined_weight=weight, **how)
    if spec.layout != "action":
        first = {} if spec.layout == "state" else {"first_action": learning.first_action_weight}
        how["weights"] = policy.layout.weights(**first, next_obs=learning.next_obs_weight)
        how["layout"] = policy.layout
    if spec.level_law == "position":
        how["ramp"] = Ramp(**spec.sizes)
    return DenoisingLoss(denoiser, level_law=spec.level_law, **how)


def _of_network(policy: DiffusionPlanner, learning: Learning) -> nn.Module | None:
    """The loss of a network that is trained in a way of its own; None: it denoises."""
    if policy.spec.network.get("type") == "anchored":
        return _anchored(policy, learning)
    if direct_class(policy.spec) is not None:
        return DirectLoss(policy.denoiser, mask_padding=learning.mask_padding)
    return None


def _anchored(policy: DiffusionPlanner, learning: Learning) -> nn.Module:
    anchors, normalizer = policy.anchors, policy.normalizer
    assert anchors is not None  # checked at construction
    assert policy.spec.truncated is not None
    t_start = policy.spec.truncated.t_start
    return AnchoredLoss(
        policy.denoiser,
        lambda obs, cond: anchors.guesses_normalised(obs, normalizer, cond)[0],
        t_max=anchors.default_t_start(policy.denoiser.process) if t_start is None else t_start,
        mask_padding=learning.mask_padding,
    )
