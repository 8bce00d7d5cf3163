"""What a method learns from: stores of episodes, preferences and rewards, and the batches of them.

Every method runs in the trainer that behaviour cloning runs in. They differ in their loss and in
what they read: pairs, good and bad items, demonstrations, or a reward of plans that are drawn.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.data.joined import open_store
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import from_fields
from diffpolicy.data.preferences.examples import LabelExamples, PairExamples
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.adapters import add_adapters, merge_adapters
from diffpolicy.learn.learning import Learning, examples, usable_episodes
from diffpolicy.learn.method import READABLE, Method
from diffpolicy.learn.methods import method_of
from diffpolicy.learn.plan_pairs import PlanReward, check_readable, in_own_units
from diffpolicy.policies.direct import refuse_direct
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.sources import ChosenWindows, Mixed, Source, Turns, in_any_order
from diffpolicy.training.weights import unchanged_on_error

P = TypeVar("P", bound=Any)


@dataclass(frozen=True)
class TuningData:
    """What a policy is tuned on; a method reads some of it.

    Args:
        preferences: pairs, rankings or labels over windows of an episode store.
        demonstrations: episodes: of ``cloning`` and ``dro``, and the anchor of the others.
        max_episodes: use the first so many demonstrations only.
        reward: of methods that draw plans, ``(action [B, H, A], obs [B, To, O]) -> [B]`` in the
            data's own units: a critic, a model of the dynamics, or a simulator; differentiable for
            those that back-propagate it.
        observations: episodes whose observations plans are drawn for; ``None``: the demonstrations.
        windows: at most so many windows of a segment in one example (see
            :class:`~diffpolicy.data.preferences.examples.PairExamples`); None: all.
        mask_padding: leave edge-padded positions of demonstrations out, where these are cloned:
            what the policy was trained with (``learning.mask_padding``).
    """

    preferences: PreferenceSet | None = None
    demonstrations: EpisodeStore | None = None
    max_episodes: int | None = None
    reward: PlanReward | None = None
    observations: EpisodeStore | None = None
    windows: int | None = None
    mask_padding: bool = False

    @classmethod
    def of(
        cls,
        preferences: PreferenceSet | str | os.PathLike[str] | None = None,
        demonstrations: EpisodeStore | str | os.PathLike[str] | None = None,
        *,
        observations: EpisodeStore | str | os.PathLike[str] | None = None,
        **others: Any,
    ) -> TuningData:
        """The same from paths; ``others`` are the other arguments of the class."""
        if preferences is not None and not isinstance(preferences, PreferenceSet):
            preferences = PreferenceSet.open(preferences)
        demonstrations, observations = (
            None if store is None else open_store(store) for store in (demonstrations, observations)
        )
        return cls(preferences, demonstrations, observations=observations, **others)


@dataclass(frozen=True)
class PlanMaterial:
    """The data of a tuning as one policy sees them, normalised.

    Args:
        spec: of the policy.
        normalizer: of the policy.
        data: what there is to learn from.
        seed: of the order of demonstrations.
    """

    spec: PolicySpec
    normalizer: Normalizer
    data: TuningData
    seed: int = 0

    @property
    def reward(self) -> PlanReward:
        """``(plans [B, H, A], cond [B, To * O]) -> [B]``, of normalised plans and observations.

        Raises:
            ValueError: the data have none.
        """
        reward: PlanReward = self._given("reward")
        return in_own_units(reward, self.spec, self.normalizer)

    @property
    def steps(self) -> Tensor:
        """Which positions of a plan are executed, bool ``[H]``."""
        steps = torch.zeros(self.spec.horizon, dtype=torch.bool)
        steps[self.spec.n_obs_steps - 1 :][: self.spec.n_action_steps] = True
        return steps

    def pairs(self) -> PairExamples:
        """Chosen and rejected segments."""
        return PairExamples(self._preferences(), **self._windows())

    def labels(self) -> LabelExamples:
        """Segments that are good or bad."""
        return LabelExamples(self._preferences(), **self._windows())

    def chosen(self) -> Source:
        """The windows of chosen segments, each by itself."""
        return ChosenWindows(self.pairs())

    def demonstrations(self) -> Source:
        """Windows of the demonstrations."""
        return self._of_episodes(self._given("demonstrations"), self.data.max_episodes)

    def observations(self) -> Source:
        """Windows of the episodes whose observations plans are drawn for."""
        if self.data.observations is None:
            return self.demonstrations()
        return self._of_episodes(self.data.observations, None)

    def mixed(self, main: Source, *, demonstrations: bool = False) -> Source:
        """Examples, with demonstrations beside them if these are wanted and there are some."""
        wanted = demonstrations and self.data.demonstrations is not None
        anchor = self.demonstrations() if wanted else None
        return Mixed(main, anchor, seed=self.seed, mask_padding=self.data.mask_padding)

    def in_turns(self, *sources: Source) -> Source:
        """As many examples of each source."""
        return Turns([Mixed(source, None, seed=self.seed) for source in sources])

    def source(self, method: Method) -> Source:
        """The first that a method reads, of pairs, labels, observations and demonstrations."""
        found = [name for name in READABLE[:-1] if name in method.reads()]
        if not found:
            raise ValueError(f"{type(method).__name__}.reads() names none of {READABLE[:-1]}")
        main: Source = getattr(self, found[0])()
        if method.command == "tune" and found[0] == "observations":
            return Conditions(main, self.spec.make_encoder())
        return self.mixed(main, demonstrations=method.clones_demonstrations)

    def check(self, method: Method) -> None:
        """Raise ``ValueError`` if a method cannot tune this policy, or lacks data."""
        check_policy(self.spec, method)
        fields = {"pairs": "preferences", "labels": "preferences"}
        for name in sorted(method.reads(), reverse=True):
            if name != "observations" or self.data.demonstrations is None:
                self._given(fields.get(name, name))

    def _given(self, name: str) -> Any:
        value = getattr(self.data, name)
        if value is None:
            raise ValueError(
                f"this method needs {name}, which is not given: TuningData({name}=...)"
            )
        return value

    def _preferences(self) -> PreferenceSet:
        found: PreferenceSet = self._given("preferences")
        check_readable(found, self.spec)
        return found

    def _windows(self) -> dict[str, Any]:
        normal = self.normalizer.to("cpu")
        return {"normalizer": normal, "windows": self.data.windows, **self.spec.sizes}

    def _of_episodes(self, store: EpisodeStore, most: int | None) -> Source:
        episodes = usable_episodes(self.spec, store, most).tolist()
        source = examples(self.spec, self.normalizer.to("cpu"), store, Learning(), episodes)
        return in_any_order(source, self.seed)


@dataclass(frozen=True)
class SequenceMaterial:
    """What a sequence model is tuned by.

    Args:
        reward: of one-hot sequences ``[B, L, V] -> [B]``; differentiable for ``pathwise``.
        reference: the pre-trained denoiser; ``None``: a copy of the one that is tuned, as it is.
        batch_size: rows of an update.
    """

    reward: Callable[[Tensor], Tensor]
    reference: MaskedDenoiser | None = None
    batch_size: int = 64


class Conditions:
    """The observations of a source of windows: what plans are sampled for.

    ``gather`` gives ``index`` int64 ``[B]`` and ``cond [B, To * O]``, normalised.
    """

    def __init__(self, source: Source, encoder: nn.Module | None = None) -> None:
        self.source, self.encoder = source, encoder or nn.Flatten(1)

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        return {"index": indices, "cond": self.encoder(from_fields(self.source.gather(indices)))}


def check_policy(spec: PolicySpec, method: Method) -> None:
    """Raise ``ValueError`` unless a policy is one that a method can tune.

    Raises:
        ValueError: plans that hold observations or are conditioned on a return, or a policy trained
            at other levels, or from other starts, than losses of comparisons look at.
    """
    said_otherwise = spec.representation is not None and method.command != "distill"
    if spec.layout != "action" or spec.returns is not None or said_otherwise:
        got = f"layout={spec.layout!r}, returns={spec.returns}, actions={spec.actions}"
        raise ValueError(f"tuning takes plans of actions as they are, given no more, not {got}")
    tuned = method.command == "tune" or "reward" in method.reads()
    if spec.encoder["type"] != "state" and tuned:
        raise ValueError(
            f"rewards judge states, which the encoder {spec.encoder['type']!r} does not tell; tune "
            "this policy by preferences"
        )
    if spec.prediction == "mean_velocity":
        raise ValueError(
            f"{type(method).__name__} trains estimates of single levels; this policy learned whole "
            "steps (prediction 'mean_velocity'), which would stay as they are. It draws plans in "
            "one evaluation without a student; to be tuned, train one of prediction 'velocity'"
        )
    law, network = spec.level_law, spec.network.get("type")
    if method.command != "tune" and (law != "row" or network == "anchored"):
        raise ValueError(
            f"{type(method).__name__} is for policies of one level per plan, from pure noise on, "
            f"not {law!r} or {network!r}; tune one without, and act with streaming or anchors "
            "afterwards"
        )


def check_fits(
    method: Method, spec: PolicySpec, normalizer: Normalizer, denoiser: Any, data: TuningData
) -> None:
    """Raise ``ValueError`` if a method cannot tune a denoiser, before there are any data.

    Args:
        method: which.
        spec: of the policy.
        normalizer: of the policy.
        denoiser: left as it is.
        data: what there is so far; where a reward is missing another stands in.
    """
    check_policy(spec, method)
    if data.reward is None:
        data = replace(data, reward=_sum_of_actions)
    method.objective(copy.deepcopy(denoiser), PlanMaterial(spec, normalizer, data))


def tuned(
    policy: P,
    command: str,
    method: Method | Mapping[str, Any],
    data: TuningData,
    config: TrainerConfig,
    run_dir: str | os.PathLike[str],
    adapters: Mapping[str, Any] | None = None,
    **how: Any,
) -> P:
    """Tune a policy by a method; if that fails, nothing has changed.

    Args:
        policy: a :class:`diffpolicy.DiffusionPolicy`.
        command: ``"tune"``, ``"prefer"`` or ``"distill"``.
        method: of that command, or its plain values.
        data: what there is to learn from.
        config: of the trainer.
        run_dir: where metrics and checkpoints go.
        adapters: tune these few weights alone; they are merged at the end.
        how: further arguments of :meth:`diffpolicy.DiffusionPolicy.fit`.

    Returns:
        What was tuned: the policy, or the student that the method made of it.

    Raises:
        ValueError: a policy that the method cannot tune, or data that lack what it reads.
    """
    made = method_of(method, command, items="plans")
    refuse_direct(policy.spec, f"{command} by {type(made).__name__}")
    material = PlanMaterial(policy.spec, policy.normalizer, data, config.seed)
    material.check(made)
    policy = made.begin(policy)
    denoiser = policy.denoiser
    with unchanged_on_error(denoiser, policy.heads):
        if adapters is not None:
            add_adapters(denoiser, adapters)
        objective, source = made.objective(denoiser, material), made.source(material)
        policy.fit(objective, source, config, run_dir, about={"method": made}, **how)
        if adapters is not None:
            merge_adapters(denoiser)
            denoiser.eval()
    return policy


def _sum_of_actions(action: Tensor, obs: Tensor) -> Tensor:
    return action.flatten(1).sum(1)
