"""`diffpolicy prefer`: policies and sequence models tuned by comparisons.

usage: diffpolicy prefer [group=choice] [key=value] ...
       diffpolicy prefer compare RUN [RUN ...] output=DIR [baseline=METHOD]

Tunes a policy of `diffpolicy train` (or of an earlier tuning) by comparisons, which are a
preference file (`diffpolicy data prefs`), pairs from the policy's own rollouts (collect.KEY),
judged by the environment's rewards, or pairs of its own plans (plans.KEY), judged by what they lead
to (judge.KEY); or by its demonstrations (bc, dro). The policy before is the reference, and is
scored on the same episodes.

    diffpolicy train experiment=pusht_40
    diffpolicy prefer experiment=pusht_dpo
    diffpolicy prefer experiment=pusht_dpo method=bc run_dir=runs/pusht_bc

Or tunes a sequence model by comparisons of its own sequences, which its task's reward labels:

    diffpolicy prefer experiment=tfbind8_dpo
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpolicy.commands import tuning


def help_text() -> str:
    """This module's own text, and what both commands have in common."""
    return tuning.help_of(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Tune by comparisons."""
    return tuning.run("prefer", arguments)
