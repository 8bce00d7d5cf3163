"""What the settings of a saved policy meant to the version that wrote them.

A default that has changed since must not change a policy whose file left it out. What is written
now says such settings in full, so a file that lacks them is older.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffpolicy.core.noise import make_process


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a policy with what older files leave out filled in as it was meant.

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


__all__ = ["upgraded"]
