"""Other settings for trained weights: which a policy may take, and how stored ones are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffpolicy.policies.spec import PolicySpec

OF_WEIGHTS = (
    *("obs_dim", "action_dim", "horizon", "n_obs_steps", "network", "process", "prediction"),
    *("cond_dropout", "level_law", "trained_action_steps", "trained_steps", "layout", "goal"),
    *("constant", "heads", "observations", "encoder", "actions"),
)
"""Entries of a policy's spec that its weights were made or trained for."""


def check_same_weights(spec: PolicySpec, changes: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if entries of a spec cannot be these with the weights that there are."""
    wrong = [n for n in OF_WEIGHTS if changes.get(n, getattr(spec, n)) != getattr(spec, n)]
    before, after = (
        {gripper for gripper in grippers if gripper.mode == "scale"}
        for grippers in (spec.grippers, changes.get("grippers", spec.grippers))
    )
    if before != after:
        wrong.append("a gripper of mode 'scale'")
    if spec.network.get("type") == "anchored" and spec.truncated is not None:
        other = changes.get("truncated", spec.truncated)
        if other is None or other.t_start != spec.truncated.t_start:
            wrong.append("the level that a network of type 'anchored' starts from")
    imagined = changes.get("imagined", spec.imagined)
    if imagined is not None and spec.imagined is not None:
        imagined = replace(imagined, predict=spec.imagined.predict)
    if imagined != spec.imagined:
        wrong.append("what is imagined")
    if (changes.get("returns", spec.returns) is None) != (spec.returns is None):
        wrong.append("whether plans are conditioned on returns")
    if wrong:
        raise ValueError(f"{wrong[0]} belongs to the weights; train a policy with another one")


_OF_GRID = ("solver", "num_steps", "spacing", "t_min")


def merged_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values with others; groups of settings are merged."""
    merged = dict(config)
    for name, value in changes.items():
        if not isinstance(value, Mapping):
            merged[name] = value
            continue
        if not value:
            continue
        kept = dict(config.get(name) or {})
        if name == "sampler" and "solver" in value:
            kept["options"] = {}  # they belong to the old solver
        if any(value.get(n, kept.get(n)) != kept.get(n) for n in _OF_GRID):
            kept.pop("levels", None)  # of another grid
            kept.pop("teleport", None)
        merged[name] = {**kept, **value}
        if name in ("rti", "truncated"):  # a plan begins in one way or the other
            merged["truncated" if name == "rti" else "rti"] = None
    return merged
