"""What `tfbind8_table.py` tries per method: settings in the words of the command line."""

from __future__ import annotations

from typing import NamedTuple

RELAXED = "method.relaxation.relaxed_steps=4"


class Candidate(NamedTuple):
    """One way to run a method; ``kl_factor`` times the weight that is scored is trained with."""

    method: str
    label: str
    overrides: tuple[str, ...]
    kl_factor: float = 1.0

    @property
    def share(self) -> int:
        """Rewards of a sequence: its own, and those of the slope at each of its eight states."""
        orders = [o.removeprefix("base.order=") for o in self.overrides if "base.order=" in o]
        return 1 + 8 * int(orders[0]) if orders else 1


def candidates() -> list[Candidate]:
    """What is tried per method: four ways each, one of them at 1.15 times the KL weight.

    Those on a base have one way each.
    """
    soft = (
        "method=drakes",
        "method.relaxation.straight_through=false",
        "method.relaxation.backward=gumbel",
    )
    reinmax = ("method=drakes", "method.relaxation.backward=reinmax")
    probabilities = ("method=drakes", "method.relaxation.backward=probabilities")
    gumbel = "method.relaxation.gumbel_temperature"
    ess, group = "method.min_ess", "method.group_size"
    fast, slow = "trainer.lr=5e-3", "trainer.lr=2e-3"
    gradient = ("method=policy_gradient",)
    # An intermediate value costs a reward each: fewer sequences for as many rewards.
    vidd = ("method=vidd", "method.buffer=1008", "method.refresh=28")
    # Comparisons alone, labelled by chance as the reward says. PSO draws two chains for each row.
    dpo = ("method=sequence_dpo",)
    pso = ("method=sequence_pso",)
    twice = ("base=reward_guidance", "base.order=2")
    return [
        Candidate("drakes_base", "fast", (*probabilities, *twice, "trainer.lr=3e-3")),
        Candidate("policy_gradient_base", "fast", (*gradient, *twice, "trainer.lr=3e-3")),
        Candidate("drakes", "probabilities", (*probabilities, fast)),
        Candidate("drakes", "probabilities-kl1.15", (*probabilities, fast), 1.15),
        Candidate("drakes", "reinmax", (*reinmax, fast)),
        Candidate("drakes", "reinmax-kl1.15", (*reinmax, fast), 1.15),
        Candidate("wdce", "ess0.1", ("method=wdce", f"{ess}=0.1", fast)),
        Candidate("wdce", "ess0.1-kl1.15", ("method=wdce", f"{ess}=0.1", fast), 1.15),
        Candidate("wdce", "ess0.3", ("method=wdce", f"{ess}=0.3", fast)),
        Candidate("wdce", "ess0.1-slow", ("method=wdce", f"{ess}=0.1", slow)),
        Candidate("policy_gradient", "fast", (*gradient, fast)),
        Candidate("policy_gradient", "fast-kl1.15", (*gradient, fast), 1.15),
        Candidate("policy_gradient", "faster", (*gradient, "trainer.lr=1e-2")),
        Candidate("policy_gradient", "slow", (*gradient, slow)),
        Candidate("sdpo", "8", ("method=sdpo", f"{group}=8", fast)),
        Candidate("sdpo", "8-kl1.15", ("method=sdpo", f"{group}=8", fast), 1.15),
        Candidate("sdpo", "32", ("method=sdpo", f"{group}=32", fast)),
        Candidate("sdpo", "32-slow", ("method=sdpo", f"{group}=32", slow)),
        Candidate("drakes_gumbel", "0.3", (*soft, f"{gumbel}=0.3", fast)),
        Candidate("drakes_gumbel", "0.3-kl1.15", (*soft, f"{gumbel}=0.3", fast), 1.15),
        Candidate("drakes_gumbel", "0.6", (*soft, f"{gumbel}=0.6", fast)),
        Candidate("drakes_gumbel", "0.3-last4", (*soft, f"{gumbel}=0.3", RELAXED, fast)),
        Candidate("vidd", "all", (*vidd, fast)),
        Candidate("vidd", "all-kl1.15", (*vidd, fast), 1.15),
        Candidate("vidd", "ess0.3", (*vidd, f"{ess}=0.3", fast)),
        Candidate("vidd", "all-slow", (*vidd, slow)),
        Candidate("dpo", "own", (*dpo, fast)),
        Candidate("dpo", "own-draws8", (*dpo, "method.draws=8", fast)),
        Candidate("dpo", "own-beta0.3", (*dpo, "method.kl_beta=0.3", fast)),
        Candidate("dpo", "own-slow", (*dpo, slow)),
        Candidate("pso", "path", (*pso, fast)),
        Candidate("pso", "path-beta0.3", (*pso, "method.kl_beta=0.3", fast)),
        Candidate("pso", "step", (*pso, "method.compare=step", fast)),
        Candidate("pso", "path-slow", (*pso, slow)),
    ]
