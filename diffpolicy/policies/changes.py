"""Other settings for trained weights: which a policy may take, and how stored ones are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffpolicy.core.processes import make_process
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
            if kept.get("solver") == "bespoke":  # weights of a searched sampler are for its grid
                kept.pop("solver")
                kept["options"] = {}
        merged[name] = {**kept, **value}
        if name in ("rti", "truncated"):  # a plan begins in one way or the other
            merged["truncated" if name == "rti" else "rti"] = None
    return merged


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a policy with what older files leave out filled in as it was meant.

    A default that has changed since must not change a policy whose file left it out. What is
    written now says such settings in full, so a file that lacks them is older.

    Args:
        config: entries of a ``config.json``, or of a run's ``config.yaml``.

    Returns:
        A copy that says the betas of ``ddpm_linear``, which were Ho et al.'s for any number of
        steps, and where the grids of ``log_snr`` and ``karras`` have their last level, which was at
        1e-3 also with two steps and with training levels further apart.
    """
    values = dict(config)
    process = values.get("process")
    if isinstance(process, Mapping) and process.get("type") == "ddpm_linear":
        values["process"] = {"beta_start": 1e-4, "beta_end": 0.02, **process}
    for name in ("sampler", "rti", "truncated"):
        part = values.get(name)
        if not isinstance(part, Mapping) or "t_min" in part or part.get("spacing", "t") == "t":
            continue
        if (
            part.get("num_steps") == 2
            or make_process(values.get("process", "vp_cosine")).first_level > 1e-3
        ):
            values[name] = {**part, "t_min": 1e-3}
    return values
