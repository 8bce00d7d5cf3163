"""Tuning a policy by preferences: which objective a method is, and the examples it learns from.

Every method runs in the trainer that behaviour cloning runs in. They differ in their loss and in
what they read: pairs, good and bad items, or demonstrations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.preferences.examples import LabelExamples, PairExamples
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.learn.learning import Learning, examples
from diffpolicy.learn.plan_pairs import check_readable, sizes_of
from diffpolicy.learn.plan_rewards import PlanReward, check_tunable, in_own_units
from diffpolicy.learn.preferences.methods import has_anchor, make_preference, needs, reads
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.sources import ChosenWindows, Executed, Mixed, Turns
from diffpolicy.training.trainer import Source

CLONED = ("demonstrations", "chosen", "both")


@dataclass(frozen=True)
class PreferenceData:
    """What a policy is tuned on; a method reads some of it.

    Args:
        preferences: pairs, rankings or labels over windows of an episode store.
        demonstrations: episodes: of ``bc`` and ``dro``, and the anchor of the others.
        max_episodes: use the first so many demonstrations only.
        reward: of methods with ``online``, ``(action [B, H, A], obs [B, To, O]) -> [B]`` in the
            data's own units.
        observations: of methods with ``online``: episodes whose observations plans are drawn for;
            ``None``: the demonstrations.
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
        max_episodes: int | None = None,
        reward: PlanReward | None = None,
        observations: EpisodeStore | str | os.PathLike[str] | None = None,
        windows: int | None = None,
        mask_padding: bool = False,
    ) -> PreferenceData:
        """The same from paths."""
        if preferences is not None and not isinstance(preferences, PreferenceSet):
            preferences = PreferenceSet.open(preferences)
        stores = [
            EpisodeStore.open(s) if isinstance(s, str | os.PathLike) else s
            for s in (demonstrations, observations)
        ]
        return cls(
            preferences,
            stores[0],
            max_episodes=max_episodes,
            reward=reward,
            observations=stores[1],
            windows=windows,
            mask_padding=mask_padding,
        )


def executed_steps(spec: PolicySpec) -> Tensor:
    """Which positions of a policy's plan are executed, bool ``[H]``."""
    steps = torch.zeros(spec.horizon, dtype=torch.bool)
    steps[spec.n_obs_steps - 1 :][: spec.n_action_steps] = True
    return steps


def preference_objective(
    spec: PolicySpec,
    denoiser: Any,
    normalizer: Normalizer,
    method: Mapping[str, Any],
    data: PreferenceData,
    *,
    seed: int = 0,
) -> tuple[nn.Module, Source]:
    """The objective of a method and the source of its batches.

    Args:
        spec: of the policy.
        denoiser: what is tuned.
        normalizer: of the policy.
        method: ``{"type": "cloning", "data": one of ``CLONED``}``, or see
            :func:`diffpolicy.learn.preferences.methods.make_preference`.
        data: what there is to learn from.
        seed: of the order of demonstrations.

    Raises:
        ValueError: a policy that cannot be tuned so, unknown settings, or data that are missing.
    """
    check_preferable(spec)
    normal = normalizer.to("cpu")
    if method.get("type") == "cloning":
        return _cloning(spec, denoiser, normal, method, data, seed)
    need = reads(method)
    given = dict(method)
    if need == "observations":
        given |= _judgement(spec, denoiser, normalizer, method, data)
    objective = make_preference(given, denoiser)
    check_data(method, data)
    sources: dict[str, Callable[..., Source]] = {
        "pairs": _pairs,
        "labels": _labels,
        "observations": _observations,
        "demonstrations": _demonstrations,
    }
    main: Source = sources[need](spec, normal, data)
    anchor = None
    if need == "observations" and method["type"] == "pso":
        main = Executed(main, executed_steps(spec))
    if has_anchor(method) and data.demonstrations is not None:
        anchor = _demonstrations(spec, normal, data)
    return objective, Mixed(main, anchor, seed=seed, mask_padding=data.mask_padding)


def check_preferable(spec: PolicySpec) -> None:
    """Raise ``ValueError`` unless a policy is one whose cloning and scores are those of a plan.

    Raises:
        ValueError: plans that hold observations or are conditioned on a return, or a policy trained
            at other levels, or from other starts, than these losses look at.
    """
    check_tunable(spec)
    if spec.level_law != "row" or spec.network.get("type") == "anchored":
        raise ValueError(
            "preferences tune policies that were trained at one level per plan, from pure noise on "
            f"(level_law='row', no network of type 'anchored'); this one has level_law="
            f"{spec.level_law!r} and network.type={spec.network.get('type')!r}, whose training is "
            "another. Train it without, tune that, and act with streaming or anchors afterwards"
        )


def check_data(method: Mapping[str, Any], data: PreferenceData) -> None:
    """Raise ``ValueError`` if a method needs data that are missing."""
    need = needs(method)
    if need & {"pairs", "labels"} and data.preferences is None:
        raise ValueError("this method learns from preferences; give data.preferences")
    if "observations" in need and data.observations is None and data.demonstrations is None:
        raise ValueError(
            "plans are drawn for observations: give data.observations or data.demonstrations"
        )
    if "demonstrations" in need and data.demonstrations is None:
        why = "its anchor is" if "observations" in need else "this method learns from"
        raise ValueError(f"{why} demonstrations; give data.demonstrations")


def _judgement(
    spec: PolicySpec,
    denoiser: Any,
    normalizer: Normalizer,
    method: Mapping[str, Any],
    data: PreferenceData,
) -> dict[str, Any]:
    """What methods with ``online`` are told beside their settings."""
    if data.reward is None:
        return {}  # they say what is missing
    found: dict[str, Any] = {"reward": in_own_units(data.reward, spec, normalizer)}
    if method["type"] == "preference":
        found["steps"] = executed_steps(spec).to(next(denoiser.parameters()).device)
    return found


def _cloning(
    spec: PolicySpec,
    denoiser: Any,
    normal: Normalizer,
    method: Mapping[str, Any],
    data: PreferenceData,
    seed: int,
) -> tuple[nn.Module, Source]:
    unknown = sorted(set(method) - {"type", "name", "data"})
    if unknown:
        raise ValueError(f"cloning has no setting {unknown[0]!r}; it has data")
    kind = method.get("data", "demonstrations")
    if kind not in CLONED:
        raise ValueError(f"cloning.data must be one of {CLONED}, got {kind!r}")
    check_data({**method, "data": kind}, data)
    sources: list[Source] = []
    if kind != "demonstrations":
        sources.append(ChosenWindows(_pairs(spec, normal, data)))
    if kind != "chosen":
        sources.append(_demonstrations(spec, normal, data))
    loss = DenoisingLoss(
        denoiser,
        cond_dropout=spec.cond_dropout,
        mask_padding=data.mask_padding or kind != "demonstrations",
    )
    return loss, Turns([Mixed(source, None, seed=seed) for source in sources])


def _demonstrations(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> Source:
    store = data.demonstrations
    assert store is not None  # check_data
    count = min(store.num_episodes, data.max_episodes or store.num_episodes)
    return examples(spec, normal, store, Learning(), list(range(count)))


def _observations(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> Source:
    store = data.observations
    if store is None:
        return _demonstrations(spec, normal, data)
    return examples(spec, normal, store, Learning(), list(range(store.num_episodes)))


def _pairs(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> PairExamples:
    preferences = _preferences(data, spec)
    return PairExamples(preferences, normalizer=normal, windows=data.windows, **sizes_of(spec))


def _labels(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> LabelExamples:
    preferences = _preferences(data, spec)
    return LabelExamples(preferences, normalizer=normal, windows=data.windows, **sizes_of(spec))


def _preferences(data: PreferenceData, spec: PolicySpec) -> PreferenceSet:
    assert data.preferences is not None  # check_data
    check_readable(data.preferences, spec)
    return data.preferences


__all__ = [
    "ChosenWindows",
    "Executed",
    "Mixed",
    "PreferenceData",
    "check_data",
    "check_preferable",
    "preference_objective",
]
