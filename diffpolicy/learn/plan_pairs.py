"""Pairs of a policy's own plans, compared by what they are worth and kept as preferences.

The offline form of :class:`~diffpolicy.learn.preferences.online.OnlineDPOLoss`: plans are drawn
once, and every method that reads pairs or labels learns from the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import apart, by_store_field, each, from_fields, take, to_fields
from diffpolicy.data.preferences.file import PreferenceFileError, read_contents
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows
from diffpolicy.learn.preferences.online import DrawnPlans, draw_plans
from diffpolicy.networks.base import check_positive
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.settings import from_values, ranged

PlanReward = Callable[[Tensor, Tensor], Tensor]
SOURCE, MADE_BY = "value", "plans"
BLOCK = 256  # observations whose plans are drawn at once


def in_own_units(reward: PlanReward, spec: PolicySpec, normalizer: Normalizer) -> PlanReward:
    """``reward(action [B, H, A], obs [B, To, O])`` in the data's units, for normalised plans."""

    def scored(plan: Tensor, cond: Tensor) -> Tensor:
        history = apart(cond.view(len(cond), spec.n_obs_steps, spec.obs_dim), spec.observed)
        return reward(normalizer.unnormalize("action", plan), normalizer.unnormalize_obs(history))

    return scored


@dataclass(frozen=True, kw_only=True)
class PlanPairs(DrawnPlans):
    """Which observations plans are drawn for, and how; best and worst of them are compared.

    Args:
        every: steps of an episode from one observation to the next.
        **others: see :class:`~diffpolicy.learn.preferences.online.DrawnPlans`.

    Raises:
        ValueError: values out of range.
    """

    every: int = 16
    candidates: int = ranged("[2, inf)", 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(every=self.every)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], spec: PolicySpec) -> Self:
        """From plain values.

        What is not given is the policy's sampler's: solver, steps and spacing (the defaults where
        that one was searched: its weights are for levels and a start of its own). Plans are full
        solves from noise, also of a policy that acts from warm starts or anchors.

        Raises:
            ValueError: unknown settings, values out of range, or a policy that acts with guidance
                or another temperature, with which these plans would not be drawn.
        """
        check_plain(spec)
        given = ("num_steps", "solver", "spacing", "options")
        searched = spec.sampler.solver == "bespoke"
        values = {} if searched else {name: getattr(spec.sampler, name) for name in given}
        if not searched and config.get("solver", values["solver"]) != values["solver"]:
            values["options"] = {}
        return from_values(cls, {**values, **config}, "plans.")


def pair_plans(
    policy: DiffusionPlanner,
    reward: PlanReward,
    episodes: EpisodeStore,
    *,
    store_path: str | Path,
    prefs_path: str | Path,
    settings: PlanPairs,
    seed: int = 0,
    progress: bool = True,
) -> PreferenceSet:
    """The best against the worst of a policy's plans, for observations of stored episodes.

    A plan is stored as an episode of H steps: the observations that it was drawn for, the last of
    which is repeated, since what it would lead to is not known, and its actions. A segment is what
    the policy would carry out of it. Observations whose plans are worth the same make no pair.

    Args:
        policy: draws the plans.
        reward: ``(action [B, H, A], obs [B, To, O]) -> [B]`` in the data's units, higher is better;
            such as a :class:`~diffpolicy.learn.values.PlanValue`.
        episodes: whose observations.
        store_path: of the plans; replaced if it holds plans.
        prefs_path: of the pairs; replaced if it holds such pairs. It is there when it is complete.
        settings: which observations, and how plans are drawn.
        seed: of the noise.
        progress: whether to show a bar.

    Returns:
        The pairs. The ``info`` of each has ``scores``, the values of the two.

    Raises:
        FileExistsError: something else is at one of the paths.
        ValueError: no pair, observations that do not fit the policy, or one that acts otherwise
            than plans are drawn (with guidance, or at another temperature than 1).
    """
    spec, store_path, prefs_path = policy.spec, Path(store_path), Path(prefs_path)
    check_plain(spec)
    check_replaceable(prefs_path)
    rows = _rows(episodes, settings.every)
    windows = Windows(episodes, **spec.sizes, normalizer=policy.normalizer.to("cpu"))
    worth = in_own_units(reward, spec, policy.normalizer)
    noise = torch.Generator(policy.device).manual_seed(seed)
    pairs: list[Pair] = []
    with (
        _new_store(store_path, prefs_path, spec) as store,
        tqdm(total=len(rows), desc="plans", unit="obs", disable=not progress) as bar,
    ):
        for some in torch.split(torch.from_numpy(rows), BLOCK):
            seen = from_fields(windows.gather(some))
            obs = each(lambda array: array.to(policy.device), seen)
            drawn, scores = draw_plans(policy.denoiser, settings, obs, worth, noise)
            which = torch.stack([scores.argmax(1), scores.argmin(1)], 1)
            values = scores.gather(1, which)
            differ = values[:, 0] > values[:, 1]
            plans = drawn[torch.arange(len(some), device=which.device)[:, None], which]
            pairs += _pairs(store.num_episodes, values[differ], spec)
            _append(store, policy.normalizer, take(obs, differ), plans[differ])
            bar.update(len(some))
    if not pairs:
        raise ValueError("no pairs: by this value all plans of an observation are worth the same")
    attrs = {**spec.sizes, "plans": asdict(settings), "seed": seed}
    return _written(pairs, store_path, prefs_path, {"made_by": MADE_BY, **attrs})


def check_plain(spec: PolicySpec) -> None:
    """Raise ``ValueError`` if a policy acts with guidance, or at another temperature than 1."""
    if spec.encoder["type"] != "state":
        raise ValueError(f"plans are judged by what is observed, not by {spec.encoder['type']!r}")
    if spec.representation is not None:
        raise ValueError("own plans are judged as actions: the policy must have no action groups")
    guidance, value, temperature = spec.sampler.guidance_scale, spec.value_scale, spec.temperature
    if guidance != 1 or value != 0 or temperature != 1 or spec.guidance is not None:
        how = f"guidance_scale={guidance}, value_scale={value}, temperature={temperature}"
        how += "" if spec.guidance is None else ", guidance by costs"
        raise ValueError(f"own plans are drawn without guidance at temperature 1, not with {how}")


def check_readable(preferences: PreferenceSet, spec: PolicySpec) -> None:
    """Raise ``ValueError`` if preferences are plans of a policy that plans otherwise.

    Its observations behind the first To are not real ones, and no other window may look at them.
    """
    if preferences.attrs.get("made_by") != MADE_BY:
        return
    theirs = {name: preferences.attrs.get(name) for name in spec.sizes}
    if theirs != spec.sizes:
        own = f"this one has {spec.sizes}; draw its own (plans=...)"
        raise ValueError(f"{preferences.name} holds plans of a policy with {theirs}, {own}")


def check_replaceable(path: Path) -> None:
    """Raise ``FileExistsError`` if something else than pairs of plans is at a path."""
    if not path.exists():
        return
    try:
        maker = read_contents(path).header.attrs.get("made_by")
    except PreferenceFileError:
        maker = None
    if maker != MADE_BY:
        raise FileExistsError(f"{path} holds something else than pairs of plans; move it away")


def _rows(episodes: EpisodeStore, every: int) -> NDArray[np.int64]:
    """Steps ``every / 2``, ``3 every / 2``, ... of each episode, counted over the whole store."""
    ends, lengths = episodes.episode_ends, episodes.episode_lengths
    if not (lengths > every // 2).any():
        raise ValueError(f"no episode reaches step {every // 2}, the first; lower plans.every")
    found = [np.arange(e - n + every // 2, e) for e, n in zip(ends, lengths, strict=True)]
    rows: NDArray[np.int64] = np.concatenate([steps[::every] for steps in found])
    return rows


def _new_store(path: Path, prefs_path: Path, spec: PolicySpec) -> EpisodeStore:
    """An empty store of plans; one that is there is replaced, after the pairs that are of it."""
    if path.exists():
        if not EpisodeStore.open(path).attrs.get("plans"):
            raise FileExistsError(f"{path} holds something else than plans; move it away")
        prefs_path.unlink(missing_ok=True)
    fields = {**by_store_field(spec.observed), "action": FieldSpec((spec.action_dim,), "float32")}
    return EpisodeStore.create(path, fields, attrs={"plans": True}, overwrite=True)


def _pairs(begun: int, values: Tensor, spec: PolicySpec) -> list[Pair]:
    """The pairs of plans that are the next episodes of a store, best and worst in turn."""
    pairs, carried = [], (spec.n_obs_steps - 1, spec.n_action_steps)
    for i, both in enumerate(values.tolist(), begun // 2):
        best, worst = Span(2 * i, *carried), Span(2 * i + 1, *carried)
        info = {"scores": [round(value, 6) for value in both]}
        pairs.append(Pair((best,), (worst,), source=SOURCE, info=info))
    return pairs


def _append(store: EpisodeStore, normalizer: Normalizer, obs: Any, plans: Tensor) -> None:
    """Plans ``[P, 2, H, A]`` for observations ``[P, To, ...]``, each an episode of H steps."""
    if not len(plans):
        return
    horizon = plans.shape[2]

    def held(array: Tensor) -> NDArray[Any]:
        """The observations, the last one held to the end of the plan, once for each of the two."""
        rows = torch.arange(horizon).clamp(max=array.shape[1] - 1)
        return array[:, rows].repeat_interleave(2, dim=0).flatten(0, 1).cpu().numpy()

    arrays = {
        **to_fields(each(held, normalizer.unnormalize_obs(obs))),
        "action": normalizer.unnormalize("action", plans).flatten(0, 2).cpu().numpy(),
    }
    store.extend(arrays, horizon * np.arange(1, 2 * len(plans) + 1))


def _written(
    pairs: list[Pair], store_path: Path, prefs_path: Path, attrs: dict[str, Any]
) -> PreferenceSet:
    """The preference file, there at once or not at all."""
    partial = prefs_path.with_name(f".{prefs_path.name}.partial")
    store = EpisodeStore.open(store_path)
    PreferenceSet.create(partial, store, attrs=attrs, overwrite=True).extend(pairs)
    partial.replace(prefs_path)
    return PreferenceSet.open(prefs_path)
