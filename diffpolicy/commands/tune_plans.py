"""`diffpolicy tune` and `diffpolicy prefer` of a policy: a tuned policy, and a report beside it."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands import own_pairs
from diffpolicy.commands.lineage import lineage, pretraining
from diffpolicy.commands.preflight import check_environment, check_writable, pick_device
from diffpolicy.commands.runs import (
    one_writer,
    print_result,
    stopped,
    trainer_settings,
    write_config,
)
from diffpolicy.commands.stores import env_spec, mixed_store, with_goals
from diffpolicy.commands.train import make_workers, validator
from diffpolicy.commands.tuning_folder import check_free, clear, trained_policy
from diffpolicy.config import PolicyTuningConfig, TrainConfig
from diffpolicy.settings import ConfigError

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.learn.material import TuningData
    from diffpolicy.learn.method import Method
    from diffpolicy.rollout.results import EvalResult


@one_writer
def tune_plans(config: PolicyTuningConfig, *, resume: bool = False) -> int:
    """Run one tuning, from the pre-trained policy to a report.

    Returns:
        Exit status: 0 done, 130 stopped (and to be continued with ``resume``).

    Raises:
        ConfigError: settings that cannot be used; nothing is written then.
        ValueError: likewise.
    """
    began = time.perf_counter()
    run_dir = Path(config.run_dir)
    _check_alone(config)
    _check_read(config)
    if not resume and not config.overwrite:
        check_free(config)
    check_writable(run_dir)
    base = pretraining(config.pretrained)
    device = pick_device(config.device, config.threads)
    policy = _load(config.pretrained, device)
    run = _Run(config, base, _demonstrations(config, base), resume)
    run.check(policy)
    check_environment(base.env, config.evaluation)
    if config.overwrite and not resume:
        clear(run_dir, _inputs(config, run.demonstrations))
    write_config(config)
    if not run.rollouts and (config.collect or config.preferences):
        print(f"{config.method_name} reads demonstrations alone: nothing is collected or compared")
    trained = []
    with ExitStack() as stack:
        base.evaluation = config.evaluation
        validate = validator(base, stack, device)
        for number in range(run.rounds):
            folder = run_dir if run.rounds == 1 else run_dir / f"round_{number}"
            finished = run.round(policy, folder, number, validate)
            if finished is None:
                return stopped(run_dir)
            policy, training = finished
            trained.append(training)
    policy.save(run_dir / "policy")
    nfe = config.nfe or run.method.scored_steps
    scores = {
        "before": _scores(config, base, config.pretrained, device, nfe),
        "after": _scores(config, base, str(run_dir / "policy"), device, nfe),
    }
    _report(config, base, trained, scores, began)
    return 0


@dataclass(frozen=True)
class _Run:
    """What the rounds of a tuning have in common."""

    config: PolicyTuningConfig
    base: TrainConfig
    demonstrations: EpisodeStore | None
    resume: bool

    @property
    def method(self) -> Method:
        from diffpolicy.learn.methods import method_of

        return method_of(self.config.method, self.config.run, items="plans")

    @property
    def judged(self) -> bool:
        """Whether a value of plans is needed: as the reward, or to compare own plans."""
        reads = self.method.reads()
        paired = bool(reads & {"pairs", "labels"}) and self.config.plans is not None
        return "reward" in reads or paired

    @property
    def rollouts(self) -> bool:
        """Whether the method reads anything that comes from rollouts or a preference file."""
        return self.judged or bool(self.method.reads() & {"pairs", "labels"})

    @property
    def rounds(self) -> int:
        return self.config.rounds if self.rollouts else 1

    def check(self, policy: DiffusionPolicy) -> None:
        """Find what is wrong with the settings before anything runs."""
        from diffpolicy.learn.adapters import add_adapters
        from diffpolicy.learn.material import TuningData, check_fits

        config, method = self.config, self.method
        trainer_settings(config.trainer, config.seed)
        check_fits(method, policy.spec, policy.normalizer, policy.denoiser, TuningData())
        nothing = self.rollouts and config.preferences is None and config.collect is None
        valued = (config.judge or {}).get("path") is not None and config.plans is None
        if nothing and not (self.judged and valued):
            raise ConfigError(
                f"{config.method_name} learns from what the policy does: give preferences=FILE, or "
                "collect={...} to make pairs from its rollouts"
            )
        if self.judged and config.judge is None:
            raise ConfigError(
                f"{config.method_name} judges the policy's own plans: give judge={{reward: store}}"
                ", or judge.path=RUN/value of an earlier tuning"
            )
        both, reads = config.method.get("anchor") == "both", method.reads()
        rollouts = config.collect is not None or config.preferences is not None
        drawn_for = "observations" in reads and not rollouts  # those of the demonstrations
        if self.demonstrations is None and (both or drawn_for or "demonstrations" in reads):
            other = ", or method.anchor=chosen" if both else ""
            raise ConfigError(
                f"{config.method_name} learns from demonstrations, and those of the pre-trained "
                f"run are not there; give demonstrations=STORE{other}"
            )
        if self.rollouts:
            own_pairs.check(config, self.base, policy, judged=self.judged)
        if config.adapters is not None:
            add_adapters(copy.deepcopy(policy.denoiser), config.adapters)

    def round(
        self, policy: DiffusionPolicy, folder: Path, number: int, validate: Any
    ) -> tuple[DiffusionPolicy, dict[str, Any]] | None:
        """The best checkpoint by the validation score; ``None`` if it was stopped."""
        from diffpolicy.learn.material import tuned
        from diffpolicy.training.run_files import has_run

        config = self.config
        data = self._data(policy, folder, number)
        if data is None:
            return None
        training = tuned(
            policy,
            config.run,
            self.method,
            data,
            trainer_settings(config.trainer, config.seed),
            folder,
            config.adapters,
            evaluate=validate,
            resume=self.resume and has_run(folder),
        ).last_training
        assert training is not None
        if training.interrupted:
            return None
        summary: dict[str, Any] = {
            "steps": training.step,
            "train_s": training.train_s,
            "score": training.best_score,
        }
        if data.preferences is not None:
            summary["preferences"] = data.preferences.summary()
        return _load(str(trained_policy(folder)), policy.device), summary

    def _data(self, policy: DiffusionPolicy, folder: Path, number: int) -> TuningData | None:
        """What there is to learn from in a round; ``None`` if making it was stopped."""
        from diffpolicy.learn.learning import Learning
        from diffpolicy.learn.material import TuningData

        found: dict[str, Any] | None = {}
        if self.rollouts:
            found = own_pairs.make(
                self.config, self.base, policy, folder, number, judged=self.judged
            )
        if found is None:
            return None
        return TuningData(
            demonstrations=self.demonstrations,
            max_episodes=self.base.data.max_episodes,
            windows=self.config.windows,
            mask_padding=Learning.from_config(self.base.learning).mask_padding,
            **found,
        )


def _report(
    config: PolicyTuningConfig,
    base: TrainConfig,
    trained: list[dict[str, Any]],
    scores: dict[str, dict[str, EvalResult]],
    began: float,
) -> None:
    """Write the report and say the most important of it in a line."""
    from diffpolicy.report.tuning import write_tuning_report

    train_s = sum(t["train_s"] for t in trained)
    wall_s = time.perf_counter() - began
    report = write_tuning_report(
        Path(config.run_dir),
        method=config.method_name,
        task=base.env.name,
        seed=config.seed,
        score=base.env.score,
        scores=scores,
        training={"rounds": trained, "train_s": train_s, "wall_s": wall_s},
        settings=asdict(config),
    )
    short = {
        "task": config.name,
        "method": report["method"],
        "train_s": round(train_s, 1),
        "before": {n: round(s["value"], 4) for n, s in report["before"].items()},
        "after": {n: round(s["value"], 4) for n, s in report["after"].items()},
        "difference_95": {
            n: [None if d[k] is None else round(d[k], 4) for k in ("value", "low", "high")]
            for n, d in report["difference"].items()
        },
    }
    print_result(short, began)


def _check_alone(config: PolicyTuningConfig) -> None:
    """Raise ``ConfigError`` under torchrun: every process would collect and score for itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"policies are tuned by one process, and this is one of {os.environ['WORLD_SIZE']} "
            f"(WORLD_SIZE): start `diffpolicy {config.run}` without torchrun"
        )


def _check_read(config: PolicyTuningConfig) -> None:
    """Raise ``ConfigError`` if a distillation is given what no distillation looks at."""
    unread = ("preferences", "collect", "judge", "plans", "windows")
    given = [name for name in unread if getattr(config, name) is not None]
    given += ["rounds"] * (config.rounds != 1)
    if config.run == "distill" and given:
        raise ConfigError(
            f"`diffpolicy distill` learns from its teacher and the demonstrations alone, in one "
            f"round, without {', '.join(given)}: leave them out, or distill its student once more"
        )


def _load(path: str, device: Any, **changes: Any) -> DiffusionPolicy:
    from diffpolicy.api import DiffusionPolicy

    return DiffusionPolicy.from_pretrained(path, device=device, **changes)


def _demonstrations(config: PolicyTuningConfig, base: TrainConfig) -> EpisodeStore | None:
    from diffpolicy.data.store import EpisodeStore

    if config.demonstrations is None and base.data.mix:
        with suppress(FileNotFoundError):  # they may be gone, and not be needed
            return with_goals(mixed_store(base.data.mix), base.data.goals)
        return None
    path = Path(config.demonstrations or str(base.data.path))
    if path.exists():
        return with_goals(EpisodeStore.open(path), base.data.goals)
    if config.demonstrations is not None:
        raise ConfigError(f"no episode store at {path}; give demonstrations=STORE")
    return None


def _inputs(config: PolicyTuningConfig, demonstrations: EpisodeStore | None) -> dict[str, Path]:
    """What the run is to read, by the name of its setting."""
    from diffpolicy.data.preferences.set import PreferenceSet

    found = {"pretrained": Path(config.pretrained)}
    found |= {f"the run before {run}": of for run, of in pairwise(lineage(config.pretrained))}
    path = (config.judge or {}).get("path")
    found |= {} if path is None else {"judge.path": Path(path)}
    if config.preferences is not None:
        file = Path(config.preferences)
        store = PreferenceSet.open(file).store
        found |= {"preferences": file, "the store of preferences": Path(str(store.path))}
    if demonstrations is not None:
        parts = getattr(demonstrations, "parts", {"": demonstrations})
        found |= {f"demonstrations {n}".strip(): Path(str(p.path)) for n, p in parts.items()}
    return found


def _scores(
    config: PolicyTuningConfig, base: TrainConfig, path: str, device: Any, nfe: Sequence[int]
) -> dict[str, EvalResult]:
    """The policy scored on the test seeds, by number of sampling steps."""
    from diffpolicy.rollout.evaluate import evaluate

    settings = config.evaluation
    return {
        str(num_steps): evaluate(
            _load(path, device, sampler={"num_steps": num_steps}),
            env_spec(base),
            range(settings.seed, settings.seed + settings.episodes),
            workers=make_workers(settings, settings.episodes),
            plan_batch=settings.plan_batch,
            success_threshold=base.env.success_threshold,
        )
        for num_steps in (nfe if settings.episodes else ())
    }
