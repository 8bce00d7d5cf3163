"""`diffpolicy anchors`: a truncated policy on a trained one, its anchors from demonstrations.

usage: diffpolicy anchors RUN OUTPUT [data=STORE] [key=value] ...

Truncated diffusion without training: plans start from anchors (k-means over the demonstrations'
plans) noised to t_start, all solved in one batch, and the best is executed. OUTPUT receives the
policy and anchors.json.

$options

    diffpolicy anchors runs/demo runs/demo_truncated count=64 top_m=8
    diffpolicy eval checkpoint=runs/demo_truncated
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.options import Option, helped, options_help
from diffpolicy.commands.rti import derive
from diffpolicy.settings import from_values

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.rti import Derived
    from diffpolicy.data.joined import Stored

OPTIONS = {
    "data": Option(None, "store of demonstrations; null: the run's own"),
    "count": Option(20, "anchors"),
    "top_m": Option(
        None, "offer only the most probable ones of a state (a classifier is fitted); null: all"
    ),
    "relative_to": Option(
        None, "per action dimension the index of the observation that it is relative to"
    ),
    "num_steps": Option(2, "network evaluations per plan (ranking takes one more)"),
    "t_start": Option(
        None,
        "level they start from: a number; null: what their quantisation error asks for; chosen: "
        "the best on the demonstrations, as `diffpolicy rti` does",
    ),
    "episodes": Option(60, "demonstrations used for t_start=chosen"),
    "sources": Option(
        ["anchors"], "guesses that compete: anchors, previous (the last plan), draft"
    ),
    "rank": Option("denoising", "how they are ranked: denoising or prior"),
    "rank_t": Option(0.3, "level of the evaluation that ranks"),
    "continuity": Option(0.0, "how much the last plan is preferred"),
    "choose": Option(
        "best", "execute the best, or with rank=prior draw one by its probability: draw"
    ),
    "seed": Option(0, "of the clustering"),
    "threads": Option(None, "torch threads"),
}


def help_text() -> str:
    """This module's own text."""
    return helped(__doc__, options=options_help(OPTIONS))


def run(arguments: Sequence[str]) -> int:
    """Fit the anchors, write the policy, print what they are."""
    return derive(arguments, OPTIONS, _truncated_starts)


def _truncated_starts(policy: DiffusionPolicy, data: Stored, options: dict[str, Any]) -> Derived:
    from diffpolicy.policies.truncated import Truncated

    names = ("num_steps", "sources", "rank", "rank_t", "continuity", "choose")
    choose, relative = options["t_start"] == "chosen", options["relative_to"]
    t_start = None if choose else options["t_start"]
    policy = policy.with_anchors(
        data,
        truncated=from_values(Truncated, {"t_start": t_start, **{n: options[n] for n in names}}),
        relative_to=None if relative is None else tuple(relative),
        **{name: options[name] for name in ("count", "top_m", "seed")},
    )
    files: dict[str, Any] = {}
    if choose:
        policy, report = policy.choose_truncated(
            data, episodes=options["episodes"], seed=options["seed"]
        )
        files["levels.json"] = report.to_json()
        print(report.table())
    anchors = policy.anchors
    assert anchors is not None
    found = {
        "anchors": len(anchors.plans),
        "error": round(anchors.error, 4),
        "position_error": [round(v, 4) for v in anchors.position_error.tolist()],
        "default_t_start": anchors.default_t_start(policy.denoiser.process),
        "t_start": float(policy.loop("guesses").levels[0]),
        "nfe": policy.nfe,
    }
    return policy, {**files, "anchors.json": found}, found
