"""What `diffpolicy tune` and `diffpolicy prefer` share: kinds of run, help, comparison.

settings of policies (also method, collect, judge, plans, trainer and evaluation.KEY):
$plans

settings of sequence models (also method.KEY, base.KEY, guidance.KEY, trainer.KEY):
$sequences

Sequences of your own, in one command: task=custom task.sequences=FILE (FASTA, CSV or TSV, perhaps
.gz) with task.oracle=package.module:Name, or task.value=COLUMN of measured values, from which
oracles are then learned. The generator is trained first, as pretrain.KEY say (what `diffpolicy
train` takes: pretrain.trainer.steps=2000, pretrain.network=mlp), or once with `diffpolicy train
task=custom ...`; designs are in RUN/designs.fasta and RUN/designs.csv. Also task.held_out, .value,
.column, .group, .identity, .alphabet, .length, .ambiguous, .fixed={0: GGATCC, -6: GAATTC} and
.forbidden=[GAATTC]; with pretrained=RUN, task.KEY stand in place of what that run was told.
report.KEY is what the report costs: chains=512 for the divergence, elbo_draws=16 for likelihoods,
exact=true, kmer=3, top_fraction=0.01.

$groups

collect.KEY: kind, episodes, seed, noise_seed, repeats, points, every, branches, lookahead,
common_noise, score, discount, after_end, pairs, min_gap and span are those of `diffpolicy data
prefs collect`. The collect.episodes=50 starts, from env seed collect.seed=50000 on, are others for
every seed and round; noise_seed is the tuning's seed unless it is given.

judge.KEY: path=RUN/value, a value that an earlier tuning has left; or reward=store (what rollouts
earned) or dense (the environment's dense_reward); lookahead=16 steps whose rewards count,
discount=1, width=128, depth=2, members=5, layer_norm=true; trainer.KEY. pessimism=1 standard
deviations over the members are taken off.
plans.KEY: every=16 steps of an episode from one observation to the next, candidates=16 plans for
each; num_steps, solver, options and spacing are the policy's sampler's unless they are given.
With preferences=FILE nothing is collected, and judge and plans of an experiment are left out unless
some judge.KEY or plans.KEY is given: the judge then learns from the rollouts of that file.

--print-config shows the composed configuration and stops; --multirun seed=0,1,2 runs them all.
Results: RUN/report.md with pictures, report.json, metrics.csv, checkpoints/; of sequence models
also designs.fasta and designs.csv; of policies also
policy/, rollouts.zarr and preferences.jsonl (pairs of rollouts) where there were collected, value/
of a judge, and plans.zarr and plans.jsonl (with rounds=N, what is of one round in RUN/round_K).
The last line printed is `RESULT {json}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffpolicy.commands import sweep
from diffpolicy.commands.options import groups_help, helped, indented
from diffpolicy.commands.runs import print_config
from diffpolicy.config import PolicyTuningConfig, SequenceTuningConfig, load_run
from diffpolicy.config_compose import config_dir, is_setting, keys_given
from diffpolicy.settings import ConfigError


def help_of(intro: str | None) -> str:
    """The help of a tuning command: what it is for, then what both have in common."""
    settings = {name: settings_of(name) for name in ("plans", "sequences")}
    shared = str(__doc__).split("\n\n", 1)[1]
    return helped(
        f"{intro}\n{shared}", **settings, groups=groups_help(("method", "base", "guidance"))
    )


def settings_of(kind: str) -> str:
    """The settings of tunings of ``"plans"`` or ``"sequences"``, as their YAML file says them."""
    return indented((config_dir() / f"tuning_{kind}.yaml").read_text().split("\n", 1)[1])


def run(command: str, arguments: Sequence[str]) -> int:
    """Compose the configuration and tune."""
    if arguments and arguments[0] == "compare":
        return compare(command, arguments[1:])
    if sweep.asked(arguments):
        return sweep.multirun(command, arguments, lambda one: run(command, one))
    overrides = [a for a in arguments if a != "--print-config"]
    config = load_run(command, overrides)
    if len(overrides) < len(arguments):
        return print_config(config)
    if isinstance(config, PolicyTuningConfig):
        from diffpolicy.commands.tune_plans import tune_plans

        return tune_plans(config)
    from diffpolicy.commands.tune_sequences import tune_sequences

    assert isinstance(config, SequenceTuningConfig)
    if config.task is not None and "pretrained" not in keys_given(overrides):
        from diffpolicy.commands.own_sequences import begin

        status = begin(config, overrides)
        if status:
            return status
    return tune_sequences(config)


def compare(command: str, arguments: Sequence[str]) -> int:
    """`compare RUN... output=DIR`, of sequence models or of policies.

    Raises:
        ConfigError: no runs, or options of something else.
    """
    runs = [a for a in arguments if not is_setting(a)]
    options = keys_given(arguments)
    if not runs or not {"output"} <= set(options) <= {"output", "baseline"}:
        raise ConfigError(
            f"usage: diffpolicy {command} compare RUN [RUN ...] output=DIR [baseline=METHOD]"
        )
    if of_policies(runs[0]):
        from diffpolicy.report.compare import compare_tunings

        print(compare_tunings(runs, **options).read_text())
        return 0
    if "baseline" in options:
        raise ConfigError("baseline=METHOD is of policies; leave it out")
    from diffpolicy.report.compare import compare_report

    print(compare_report(runs, options["output"]).read_text())
    return 0


def of_policies(run: str) -> bool:
    """Whether the report of a run is of a policy's tuning."""
    from diffpolicy.report.tuning import FORMAT

    file = Path(run) / "report.json" if Path(run).is_dir() else Path(run)
    return file.is_file() and json.loads(file.read_text()).get("format") == FORMAT
