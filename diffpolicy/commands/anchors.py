"""`diffpolicy anchors`: a truncated policy on a trained one, its anchors from demonstrations."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from diffpolicy.commands.options import Option, options_help, parse
from diffpolicy.commands.rti import demonstrations_of, new_directory, write_policy

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
    """Return the text of `diffpolicy anchors --help`."""
    return f"""\
usage: diffpolicy anchors RUN OUTPUT [data=STORE] [key=value] ...

Truncated diffusion without training: plans start from anchors (k-means over the demonstrations'
plans) noised to t_start, all solved in one batch, and the best is executed. OUTPUT receives the
policy and anchors.json.

{options_help(OPTIONS)}

    diffpolicy anchors runs/demo runs/demo_truncated count=64 top_m=8
    diffpolicy eval checkpoint=runs/demo_truncated"""


def run(arguments: Sequence[str]) -> int:
    """Fit the anchors, write the policy, print what they are."""
    options = parse(arguments, ["checkpoint", "output"], OPTIONS)
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import pick_device
    from diffpolicy.policies.truncated import Truncated

    began = time.perf_counter()
    checkpoint, output = options["checkpoint"], new_directory(options["output"])
    pick_device("cpu", options["threads"])
    names = ("num_steps", "sources", "rank", "rank_t", "continuity", "choose")
    choose, relative = options["t_start"] == "chosen", options["relative_to"]
    t_start = None if choose else options["t_start"]
    truncated = Truncated.from_config({"t_start": t_start, **{n: options[n] for n in names}})
    data = demonstrations_of(checkpoint, options["data"])
    policy = DiffusionPolicy.from_pretrained(checkpoint).with_anchors(
        data,
        truncated=truncated,
        relative_to=None if relative is None else tuple(relative),
        **{name: options[name] for name in ("count", "top_m", "seed")},
    )
    extra: dict[str, Any] = {}
    if choose:
        policy, report = policy.choose_truncated(
            data, episodes=options["episodes"], seed=options["seed"]
        )
        extra["levels.json"] = report.to_json()
        print(report.table())
    assert policy.anchors is not None
    found = {
        "anchors": len(policy.anchors.plans),
        "error": round(policy.anchors.error, 4),
        "position_error": [round(v, 4) for v in policy.anchors.position_error.tolist()],
        "default_t_start": policy.anchors.default_t_start(policy.denoiser.process),
        "t_start": float(policy.loop("guesses").levels[0]),
        "nfe": policy.nfe,
    }
    write_policy(policy, output, checkpoint, {**extra, "anchors.json": found})
    found["total_s"] = round(time.perf_counter() - began, 1)
    print("RESULT " + json.dumps(found))
    return 0
