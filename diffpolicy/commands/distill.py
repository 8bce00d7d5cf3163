"""`diffpolicy distill`: a student that draws a plan in one or a few evaluations.

usage: diffpolicy distill [RUN] [group=choice] [key=value] ...
       diffpolicy distill compare RUN [RUN ...] output=DIR [baseline=METHOD]

The policy of a run (or pretrained=RUN) is the teacher; the student begins with its weights, learns
from the teacher's demonstrations or plans, and is a policy like any other: `eval`, `rti`, `export`,
`serve`. Warm starts and truncated starts of the teacher are not the student's (`rti` and `anchors`
choose them anew). Both are scored on the same episodes with each of nfe=[1,2,4,10] steps, a student
of method=halving with its own number alone.

    diffpolicy distill runs/demo                       # rectified: one evaluation, or more
    diffpolicy distill runs/demo method=consistency run_dir=runs/consistent
    diffpolicy distill runs/demo method=halving method.num_steps=4 run_dir=runs/four
    diffpolicy distill runs/four method=halving method.num_steps=2 run_dir=runs/two
    diffpolicy distill runs/cfg method=guided method.guidance_scale=2 run_dir=runs/one_call

settings (also method, trainer and evaluation.KEY; collect, judge, plans and rounds are of `tune`):
$plans

$groups

--print-config shows the composed configuration and stops; --multirun seed=0,1,2 runs them all.
Results: RUN/report.md with pictures, report.json, metrics.csv, checkpoints/, policy/. The last line
printed is `RESULT {json}`.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpolicy.commands import tuning
from diffpolicy.commands.options import groups_help, helped
from diffpolicy.config_compose import is_setting


def help_text() -> str:
    """This module's own text with the settings of policies."""
    settings = tuning.settings_of("plans")
    return helped(__doc__, plans=settings, groups=groups_help(("method", "trainer")))


def run(arguments: Sequence[str]) -> int:
    """Distill the policy of a run."""
    named = [i for i, one in enumerate(arguments) if one[:1] != "-" and not is_setting(one)]
    if named and arguments[0] != "compare":
        arguments = list(arguments)
        arguments[named[0]] = f"pretrained={arguments[named[0]]}"
    return tuning.run("distill", arguments)
