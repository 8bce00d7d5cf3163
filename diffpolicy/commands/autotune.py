"""`diffpolicy autotune`: a sampler of a few evaluations, searched for a trained policy.

usage: diffpolicy autotune RUN [OUTPUT] [nfe=4] [key=value] ...

The policy plans for recorded observations with many steps; levels and weights of nfe steps are
fitted to these plans on half of the episodes, and compared with every solver with a name on the
other half (no rollouts, no training). The searched sampler is kept if it is nearer to the many
steps than the best of those, which is kept otherwise. OUTPUT (RUN_nfe4 unless given) receives the
policy with it, and autotune.json: what was measured.

$options

    diffpolicy autotune runs/demo nfe=4
    diffpolicy eval checkpoint=runs/demo_nfe4
    diffpolicy rti runs/demo_nfe4 runs/demo_nfe4_rti     # warm starts after a quick first plan
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.options import Option, helped, options_help, parse
from diffpolicy.commands.rti import derive
from diffpolicy.config_compose import is_setting

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.rti import Derived
    from diffpolicy.data.joined import Stored

OPTIONS = {
    "nfe": Option(4, "network evaluations per plan"),
    "data": Option(None, "store of demonstrations; null: the run's own"),
    "episodes": Option(60, "demonstrations used, half for the search and half to judge"),
    "pairs": Option(128, "observations with noise in each half"),
    "teacher_steps": Option(100, "steps of the teacher, DPM-Solver++ 2M; no more than levels"),
    "start_noise": Option(
        0,
        "draws of start noise, of which the one is kept that suits the sampler best: this makes "
        "the policy deterministic; 0: plans start from fresh noise",
    ),
    "seed": Option(0, "of the choice of episodes and of the noise"),
    "threads": Option(None, "torch threads"),
}


def help_text() -> str:
    """This module's own text."""
    return helped(__doc__, options=options_help(OPTIONS))


def run(arguments: Sequence[str]) -> int:
    """Search, write the policy, print the table."""
    words = [a for a in arguments if not is_setting(a)]
    named = {a.removeprefix("--").partition("=")[0] for a in arguments if is_setting(a)}
    if "output" not in named and len(words) + ("checkpoint" in named) < 2:
        given = parse(arguments, ["checkpoint"], OPTIONS)
        arguments = [*arguments, f"output={given['checkpoint'].rstrip('/')}_nfe{given['nfe']}"]
    return derive(arguments, OPTIONS, _searched)


def _searched(policy: DiffusionPolicy, data: Stored, options: dict[str, Any]) -> Derived:
    from diffpolicy.core.sampler import PriorSampler

    teacher = PriorSampler(solver="dpmpp_2m", num_steps=options.pop("teacher_steps"))
    tuned, report = policy.autotune(data, teacher=teacher, **options)
    print(report.table())
    found = {"nfe": report.nfe, "ratio": round(report.ratio, 3)}
    found |= {"held_out": report.kept.held_out, "best_named": report.named[0].held_out}
    return tuned, {"autotune.json": report.to_json()}, found
