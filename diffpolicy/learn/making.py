"""What policies are made of: sizes, normaliser and anchors of a store, or all that files hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.data.fields import check_vector
from diffpolicy.data.joined import Joined
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import (
    ObsField,
    by_store_field,
    each,
    obs_fields,
    of_store,
    store_field,
)
from diffpolicy.data.returns import returns_to_go
from diffpolicy.data.statistics import action_statistics
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows, said_statistics
from diffpolicy.networks.backbones import weights_follow
from diffpolicy.networks.encoders import encoder_class
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.changes import check_same_weights, merged_config, upgraded
from diffpolicy.policies.imagined import shaped
from diffpolicy.policies.planners import Returns
from diffpolicy.policies.recorded import observation_step
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.training.checkpoint import read_bundle
from diffpolicy.training.saved import FORMAT, VERSION


def fitted_spec(
    store: EpisodeStore,
    spec: Mapping[str, Any],
    normalize: Mapping[str, str],
    *,
    per_store: bool = False,
) -> tuple[PolicySpec, Normalizer]:
    """The full spec of a policy for a store, and its normaliser.

    Args:
        store: fields ``obs [T, O]`` (or several ``obs.NAME``) and ``action [T, A]``, with
            statistics.
        spec: entries other than the two dimensions.
        normalize: mode per field; ``minmax`` where none is given. ``obs`` is that of all
            ``obs.NAME`` that have none of their own.
        per_store: fit a normaliser to each of several stores, and act by the first one's.

    Raises:
        ValueError: a missing field or statistics, or settings that do not fit together.
    """
    seen = obs_fields(store)
    absent = [name for name in (*(seen or ["obs"]), "action") if name not in store.fields]
    if absent:
        has = f"no field {absent[0]!r} (it has {sorted(store.fields)})"
        how = "convert it with `diffpolicy data convert ... obs=FIELD action=FIELD`"
        raise ValueError(f"store {store.name} has {has}; {how}")
    known = {**spec, **observed(store), "action_dim": store.fields["action"].shape[0]}
    if known.get("actions") is None:
        known["actions"] = store.attrs.get("action_groups", ())
    if not known["observations"]:
        known.setdefault("observation_step", observation_step(store))
    if known.get("level_law") == "position":
        known["trained_action_steps"] = known.get("n_action_steps", PolicySpec.n_action_steps)
    ids = [name for name, field in by_store_field(of_store(store)).items() if field.is_id]
    counts = [int(store.statistics[name]["max"][0]) + 1 for name in ids]
    count = max(counts[0], len(store.attrs.get("tasks") or ())) if ids else 0
    known["encoder"] = with_task_count(known.get("encoder"), count)
    if known.get("imagined") is not None:
        known["imagined"] = shaped(known["imagined"], store)
    full = PolicySpec.from_config(known)
    if full.returns is not None:
        full = replace(full, returns=fitted_returns(full.returns, store))
    vectors = [k for k, f in by_store_field(full.observed).items() if not f.is_image]
    modes: dict[str, Any] = dict.fromkeys(vectors, normalize.get("obs", "minmax"))
    for name in () if full.imagined is None else full.imagined.vectors:
        modes.setdefault(name, "minmax")
    modes |= {"action": "minmax", **{k: v for k, v in normalize.items() if k != "obs"}}
    modes |= dict.fromkeys(ids, "identity")
    if per_store:
        if not isinstance(store, Joined):
            raise ValueError("a normaliser for each store needs several: give a list of stores")
        parts = cast("dict[str, EpisodeStore]", store.parts)
        fitted = {name: _fitted_normalizer(full, part, modes) for name, part in parts.items()}
        return full, Normalizer.of_each(fitted)
    return full, _fitted_normalizer(full, store, modes)


def _fitted_normalizer(
    full: PolicySpec, store: EpisodeStore, modes: Mapping[str, Any]
) -> Normalizer:
    actions = action_statistics(store)
    if full.representation is not None:
        check_choices(full, actions, store.name)
        # Of the observations those alone that actions are relative to: no images.
        states = {store_field(group.obs) for group in full.actions if group.of}
        acting = {"fields": (*states, "action"), "episodes": np.flatnonzero(store.has_actions)}
        actions = said_statistics(_windows(full, store, **acting))
    normalizer = Normalizer.fit({**store.statistics, "action": actions}, modes)
    for gripper in full.planned_grippers:
        if gripper.mode == "scale":
            normalizer = normalizer.scaled("action", gripper.dim, 1 / gripper.factor)
    return normalizer


def with_task_count(encoder: Mapping[str, Any] | None, count: int) -> dict[str, Any]:
    """The encoder's settings with how many tasks there are, if it asks and they do not say."""
    given = dict(encoder or {})
    kind = encoder_class(given.get("type", "state"))
    if count == 0 or "tasks" not in inspect.signature(kind).parameters:
        return given
    return {**given, "tasks": {"count": count, **(given.get("tasks") or {})}}


def observed(store: Any) -> dict[str, Any]:
    """Entries of the spec that say what is observed, of a store or what has ``fields`` like one."""
    fields = of_store(store)
    if isinstance(fields, ObsField) and fields.is_image:
        fields = {"": fields}
    if isinstance(fields, Mapping):
        total = sum(field.size for field in fields.values() if not field.is_image)
        return {"obs_dim": total, "observations": {k: asdict(f) for k, f in fields.items()}}
    check_vector("obs", fields.shape, store.name)
    return {"obs_dim": fields.size, "observations": {}}


def fitted_returns(returns: Returns, store: EpisodeStore) -> Returns:
    """The range of returns that r = 0 and r = 1 stand for, from the data where it is not given."""
    if returns.low is not None and returns.high is not None:
        return returns
    found = returns_to_go(store, returns.discount)
    low = float(found.min()) if returns.low is None else returns.low
    high = float(found.max()) if returns.high is None else returns.high
    if not low < high:
        raise ValueError(f"no policy can be told returns that are all {high} ({store.name})")
    return replace(returns, low=low, high=high)


def fit_anchors(
    spec: PolicySpec,
    store: EpisodeStore,
    normalizer: Normalizer,
    denoiser: Denoiser,
    *,
    trained: bool = True,
    **options: Any,
) -> Anchors:
    """Anchors over the windows of a store, for plans of the shape that ``spec`` says.

    Args:
        spec: of the policy.
        store: demonstrations.
        normalizer: the policy's.
        denoiser: the policy's, whose encoder says what a state is.
        trained: its weights stay as they are.
        options: of ``Anchors.fit``.

    Raises:
        ValueError: settings that do not fit, such as the most probable anchors (``top_m``) of
            states that an encoder is still to learn.
    """
    learned = any(True for _ in denoiser.encoder.parameters())
    if learned and not trained and options.get("top_m") is not None:
        raise ValueError(
            f"top_m={options['top_m']} asks which anchors are probable where the encoder "
            f"{spec.encoder['type']!r} sees something, and that is not trained yet: leave it out "
            "(all anchors compete), or train first and then `diffpolicy anchors RUN OUTPUT top_m=`"
        )
    if normalizer.others:
        raise ValueError("anchors are plans in one normaliser's units; this policy has several")
    if spec.representation is not None and options.get("relative_to") is not None:
        raise ValueError(
            "relative_to is for plans of actions as they are; this policy's action groups say what "
            "its plans, and so its anchors, are relative to: leave it out"
        )
    how = {"normalizer": normalizer.to("cpu"), "episodes": np.flatnonzero(store.has_actions)}
    encoder, where = denoiser.encoder, next(denoiser.parameters()).device

    @torch.no_grad()
    def encode(obs: Any) -> Tensor:
        told: Tensor = encoder(each(lambda one: one.to(where), obs))
        return told.cpu()

    was = encoder.training
    encoder.eval()  # images are cut in the middle
    anchors = Anchors.fit(_windows(spec, store, **how), normalizer, encode=encode, **options)
    encoder.train(was)
    return anchors


def _windows(spec: PolicySpec, store: EpisodeStore, **how: Any) -> Windows:
    """All windows of a store, for plans as a policy says them."""
    return Windows(store, **spec.sizes, actions=spec.representation, **how)


def check_choices(spec: PolicySpec, actions: Mapping[str, Any], name: str) -> None:
    """Raise ``ValueError`` if actions with these statistics are none of a group's choices."""
    ends = [actions[end] for end in ("min", "max")]
    for group in spec.actions:
        low, high = (end[group.dims[0]] for end in ends)
        if group.choices and not group.first <= low <= high < group.first + group.choices:
            raise ValueError(
                f"dimension {group.dims[0]} of the actions of {name} runs from {low:g} to "
                f"{high:g}; choices={group.choices} and first={group.first} do not cover it"
            )


def read_policy(
    path: Path, changes: Mapping[str, Any]
) -> tuple[PolicySpec, Denoiser, Normalizer, Anchors | None, nn.ModuleDict]:
    """The parts of a policy that was saved, on the CPU, every hash verified.

    Args:
        path: the directory.
        changes: see :meth:`diffpolicy.DiffusionPolicy.load`.

    Raises:
        ValueError: not a policy, a damaged file, or settings that do not fit.
    """
    changes = dict(changes)
    chosen = changes.pop("normalizer", None)
    files = read_bundle(path)
    if "config.json" not in files:
        raise ValueError(
            f"{path} is no policy; DiffusionPolicy.from_pretrained finds that of a run"
        )
    config = upgraded(files["config.json"])
    if config.pop("format", None) != FORMAT or config.pop("version", None) != VERSION:
        raise ValueError(f"{path} is not a diffpolicy policy of version {VERSION}")
    parts = config.pop("normalizer"), files["normalizer.safetensors"]
    anchors, stored = None, config.pop("anchors", None)
    if stored is not None:
        anchors = Anchors.from_parts(stored, files["anchors.safetensors"])
    spec = PolicySpec.from_config(config)
    with weights_follow():
        denoiser, heads = spec.make_denoiser(), spec.make_heads()
    denoiser.load_state_dict(files["model.safetensors"])
    if len(heads):
        heads.load_state_dict(files["heads.safetensors"])
    if changes:
        changed = PolicySpec.from_config(merged_config(config, changes))
        check_same_weights(spec, {f.name: getattr(changed, f.name) for f in fields(changed)})
        spec = changed
    normalizer = Normalizer.from_parts(*parts)
    if chosen is not None:
        normalizer = normalizer.named(chosen)
    return spec, denoiser, normalizer, anchors, heads
