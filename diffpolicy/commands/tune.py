"""`diffpolicy tune`: policies and sequence models tuned by a reward.

usage: diffpolicy tune [group=choice] [key=value] ...
       diffpolicy tune compare RUN [RUN ...] output=DIR [baseline=METHOD]

Tunes a sequence model of `diffpolicy train task=...` so that its sequences have a high reward and
stay probable under it; or, with method=none, only draws under guidance. For instance

    diffpolicy train experiment=tfbind8
    diffpolicy tune experiment=tfbind8_drakes
    diffpolicy tune experiment=tfbind8_drakes method=none guidance=smc run_dir=runs/smc

Or tunes a policy of `diffpolicy train` so that its plans are worth more, by back-propagating
through its sampling chain the value that a judge gives them. The judge (judge.KEY) is learned from
the policy's own rollouts (collect.KEY), or an earlier tuning has left it:

    diffpolicy tune pretrained=runs/demo method=draft_k collect.episodes=50 judge.reward=store
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpolicy.commands import tuning


def help_text() -> str:
    """This module's own text, and what both commands have in common."""
    return tuning.help_of(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Tune by a reward."""
    return tuning.run("tune", arguments)
