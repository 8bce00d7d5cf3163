"""Tuning a policy by preferences: which objective a method is, and the examples it learns from.

Every method runs in the trainer that behaviour cloning runs in. They differ in their loss and in
what they read: pairs, good and bad items, or demonstrations.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.preference_examples import LabelExamples, PairExamples
from diffpolicy.data.preferences import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.finetune.denoising import DenoisingLoss
from diffpolicy.finetune.preference_methods import make_preference, reads
from diffpolicy.learning import Learning, examples
from diffpolicy.plan_tuning import PlanReward, check_tunable, in_own_units
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.settings import mix_seed
from diffpolicy.training.trainer import Source

CLONED = ("demonstrations", "chosen", "both")
ROWS = 65_536
"""Least length of a source: an epoch of the trainer holds whole batches only."""


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
            :class:`~diffpolicy.data.preference_examples.PairExamples`); None: all.
    """

    preferences: PreferenceSet | None = None
    demonstrations: EpisodeStore | None = None
    max_episodes: int | None = None
    reward: PlanReward | None = None
    observations: EpisodeStore | None = None
    windows: int | None = None

    @classmethod
    def of(
        cls,
        preferences: PreferenceSet | str | os.PathLike[str] | None = None,
        demonstrations: EpisodeStore | str | os.PathLike[str] | None = None,
        *,
        max_episodes: int | None = None,
        reward: PlanReward | None = None,
        windows: int | None = None,
    ) -> PreferenceData:
        """The same from paths."""
        if preferences is not None and not isinstance(preferences, PreferenceSet):
            preferences = PreferenceSet.open(preferences)
        if demonstrations is not None and not isinstance(demonstrations, EpisodeStore):
            demonstrations = EpisodeStore.open(demonstrations)
        return cls(
            preferences, demonstrations, max_episodes=max_episodes, reward=reward, windows=windows
        )


class Mixed:
    """Examples of a method beside demonstrations: a source of the trainer.

    ``gather`` gives what ``main`` does, and with ``anchor`` also its values under
    ``anchor_<name>``. Row i is example ``i mod len(main)``, and demonstrations in an order of their
    own; few examples are repeated until an epoch has ``ROWS`` rows.
    """

    def __init__(self, main: Source, anchor: Source | None, *, seed: int = 0) -> None:
        self.main, self.anchor = main, anchor
        self.rows = len(main) * -(-ROWS // len(main))
        order = torch.Generator().manual_seed(mix_seed(seed, 0xA2C))
        count = 1 if anchor is None else len(anchor)
        self.order = torch.randperm(self.rows, generator=order) % count

    def __len__(self) -> int:
        return self.rows

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        batch = self.main.gather(indices % len(self.main))
        if self.anchor is not None:
            other = self.anchor.gather(self.order[indices])
            batch |= {f"anchor_{name}": other[name] for name in ("obs", "action")}
        return batch


class Turns:
    """Sources that take turns, each with the same share of an epoch."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.sources) * min(len(source) for source in self.sources)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        turn, row = indices % len(self.sources), indices // len(self.sources)
        parts = [source.gather(row[turn == i]) for i, source in enumerate(self.sources)]
        back = torch.cat([(turn == i).nonzero() for i in range(len(parts))]).flatten().argsort()
        names = set.intersection(*(set(part) for part in parts))
        return {name: torch.cat([part[name] for part in parts])[back] for name in names}


class ChosenWindows:
    """The windows of preferred items, each by itself, for behaviour cloning.

    ``gather`` gives ``obs [B, To, O]``, ``action [B, H, A]`` and ``valid [B, H]``: the positions
    that belong to the item.
    """

    def __init__(self, pairs: PairExamples) -> None:
        self.pairs = pairs
        every = pairs.gather(torch.arange(len(pairs)))
        self.entries = every["chosen_steps"].any(-1).nonzero()

    def __len__(self) -> int:
        return len(self.entries)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        pair, window = self.entries[indices].unbind(1)
        batch, rows = self.pairs.gather(pair), torch.arange(len(indices))
        names = {"obs": "chosen_obs", "action": "chosen_action", "valid": "chosen_steps"}
        return {name: batch[source][rows, window] for name, source in names.items()}


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
            :func:`diffpolicy.finetune.preference_methods.make_preference`.
        data: what there is to learn from.
        seed: of the order of demonstrations.

    Raises:
        ValueError: a policy that cannot be tuned so, unknown settings, or data that are missing.
    """
    check_tunable(spec)
    normal = normalizer.to("cpu")
    if method.get("type") == "cloning":
        return _cloning(spec, denoiser, normal, method, data, seed)
    need = reads(method)
    given = dict(method)
    if need == "observations":
        given |= _judgement(spec, denoiser, normalizer, method, data)
    objective = make_preference(given, denoiser)
    sources = {
        "pairs": _pairs,
        "labels": _labels,
        "observations": _observations,
        "demonstrations": _demonstrations,
    }
    anchor = None
    if method.get("anchor_weight", 0) > 0 and data.demonstrations is not None:
        anchor = _demonstrations(spec, normal, data)
    return objective, Mixed(sources[need](spec, normal, data), anchor, seed=seed)


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
        steps = torch.zeros(spec.horizon, dtype=torch.bool)
        steps[spec.n_obs_steps - 1 :][: spec.n_action_steps] = True
        found["steps"] = steps.to(next(denoiser.parameters()).device)
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
    sources: list[Source] = []
    if kind != "demonstrations":
        sources.append(ChosenWindows(_pairs(spec, normal, data)))
    if kind != "chosen":
        sources.append(_demonstrations(spec, normal, data))
    loss = DenoisingLoss(
        denoiser, cond_dropout=spec.cond_dropout, mask_padding=kind != "demonstrations"
    )
    return loss, Turns([Mixed(source, None, seed=seed) for source in sources])


def _demonstrations(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> Source:
    store = data.demonstrations
    if store is None:
        raise ValueError("this method learns from demonstrations; give data.demonstrations")
    count = min(store.num_episodes, data.max_episodes or store.num_episodes)
    return examples(spec, normal, store, Learning(), list(range(count)))


def _observations(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> Source:
    store = data.observations
    if store is None:
        return _demonstrations(spec, normal, data)
    return examples(spec, normal, store, Learning(), list(range(store.num_episodes)))


def _sizes(spec: PolicySpec) -> dict[str, Any]:
    return {
        "horizon": spec.horizon,
        "n_obs_steps": spec.n_obs_steps,
        "n_action_steps": spec.n_action_steps,
    }


def _pairs(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> PairExamples:
    return PairExamples(_preferences(data), normalizer=normal, windows=data.windows, **_sizes(spec))


def _labels(spec: PolicySpec, normal: Normalizer, data: PreferenceData) -> LabelExamples:
    return LabelExamples(
        _preferences(data), normalizer=normal, windows=data.windows, **_sizes(spec)
    )


def _preferences(data: PreferenceData) -> PreferenceSet:
    if data.preferences is None:
        raise ValueError("this method learns from preferences; give data.preferences")
    return data.preferences


__all__ = ["ChosenWindows", "Mixed", "PreferenceData", "preference_objective"]
