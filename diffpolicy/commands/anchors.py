"""`diffpolicy anchors`: a truncated policy on a trained one, its anchors from demonstrations."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from diffpolicy.commands.options import parse
from diffpolicy.commands.rti import demonstrations_of, new_directory, write_policy
from diffpolicy.settings import from_values

DEFAULTS: dict[str, Any] = {
    "data": None,
    "count": 20,
    "top_m": None,
    "relative_to": None,
    "num_steps": 2,
    "t_start": None,
    "episodes": 60,
    "sources": ["anchors"],
    "rank": "denoising",
    "rank_t": 0.3,
    "continuity": 0.0,
    "choose": "best",
    "seed": 0,
    "threads": None,
}


def help_text() -> str:
    """The text of `diffpolicy anchors --help`."""
    return """\
usage: diffpolicy anchors RUN OUTPUT [data=STORE] [key=value] ...

Truncated diffusion without training: plans start from anchors (k-means over the demonstrations'
plans) noised to t_start, all solved in one batch, and the best is executed. OUTPUT receives the
policy and anchors.json.

    data=STORE            demonstrations; default: the run's own
    count=20              anchors
    top_m=null            offer only the most probable ones of a state (a classifier is fitted)
    relative_to=null      per action dimension the index of the observation it is relative to
    num_steps=2           network evaluations per plan (ranking takes one more)
    t_start=null          level they start from: a number; null: what their quantisation error asks
                          for; chosen: the best on the demonstrations, as `diffpolicy rti` does
    episodes=60           demonstrations used for t_start=chosen
    sources=[\"anchors\"]   guesses that compete: anchors, previous (the last plan), draft
    rank=denoising        how they are ranked: denoising or prior
    rank_t=0.3            level of the evaluation that ranks
    continuity=0          how much the last plan is preferred
    choose=best           execute the best, or with rank=prior draw one by its probability: draw
    seed=0                of the clustering
    threads=null          torch threads

    diffpolicy anchors runs/demo runs/demo_truncated count=64 top_m=8
    diffpolicy eval checkpoint=runs/demo_truncated"""


def run(arguments: Sequence[str]) -> int:
    """Fit the anchors, write the policy, print what they are."""
    options = parse(arguments, ["checkpoint", "output"], DEFAULTS)
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.preflight import pick_device
    from diffpolicy.policies.truncated import Truncated

    began = time.perf_counter()
    output = new_directory(options["output"])
    pick_device("cpu", options["threads"])
    settings = ("t_start", "num_steps", "sources", "rank", "rank_t", "continuity", "choose")
    choose = options["t_start"] == "chosen"
    given = {name: options[name] for name in settings}
    truncated = from_values(Truncated, {**given, "t_start": None} if choose else given)
    relative = options["relative_to"]
    data = demonstrations_of(options)
    policy = DiffusionPolicy.from_pretrained(options["checkpoint"]).with_anchors(
        data,
        truncated=truncated,
        count=options["count"],
        relative_to=None if relative is None else tuple(relative),
        top_m=options["top_m"],
        seed=options["seed"],
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
    write_policy(policy, output, options["checkpoint"], {**extra, "anchors.json": found})
    found["total_s"] = round(time.perf_counter() - began, 1)
    print("RESULT " + json.dumps(found))
    return 0
