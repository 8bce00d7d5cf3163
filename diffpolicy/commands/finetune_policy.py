"""`diffpolicy finetune` of a policy: comparisons in, a tuned policy and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.lineage import pretraining
from diffpolicy.commands.one_writer import one_writer
from diffpolicy.commands.policy_rollouts import collected, judged
from diffpolicy.commands.preflight import check_environment, check_writable, pick_device
from diffpolicy.commands.stores import env_spec
from diffpolicy.commands.train import make_workers, validator
from diffpolicy.commands.train_sequences import trainer_settings, write_config
from diffpolicy.commands.tuning_checks import check_alone, check_tuning, inputs
from diffpolicy.commands.tuning_folder import check_free, clear, trained_policy
from diffpolicy.config import ConfigError, TrainConfig
from diffpolicy.config_policy_tuning import (
    PolicyTuningConfig,
    leave_out_unread,
    load_policy_tuning,
    method_name,
)

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.results import EvalResult


def run_policy(arguments: Sequence[str]) -> int:
    """Compose the configuration and tune."""
    overrides = [a for a in arguments if a != "--print-config"]
    config = load_policy_tuning(overrides)
    left_out = leave_out_unread(config, overrides)
    if len(overrides) < len(arguments):
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        return 0
    if left_out:
        print(left_out)
    return finetune_policy(config)


@one_writer
def finetune_policy(config: PolicyTuningConfig, *, resume: bool = False) -> int:
    """Run one tuning, from the pre-trained policy to a report.

    Returns:
        Exit status: 0 done, 130 stopped (and to be continued with ``resume``).

    Raises:
        ConfigError: settings that cannot be used; nothing is written then.
        ValueError: likewise.
    """
    began = time.perf_counter()
    check_alone()
    run_dir = Path(config.run_dir)
    if not resume and not config.overwrite:
        check_free(config)
    check_writable(run_dir)
    base = pretraining(config.pretrained)
    device = pick_device(config.device, config.threads)
    demonstrations = _demonstrations(config, base)
    policy = _load(config.pretrained, device)
    check_tuning(config, base, policy, demonstrations)
    check_environment(base.env, config.evaluation)
    if config.overwrite and not resume:
        clear(run_dir, inputs(config, demonstrations))
    write_config(run_dir, config)
    trained = []
    with ExitStack() as stack:
        validate = validator(_evaluated(config, base), stack, device)
        run = _Run(config, base, demonstrations, validate, resume)
        for number in range(config.rounds):
            folder = run_dir if config.rounds == 1 else run_dir / f"round_{number}"
            finished = run.round(policy, folder, number)
            if finished is None:
                print(f"stopped; continue with `diffpolicy resume {run_dir}`")
                return 130
            policy, training = finished
            trained.append(training)
    policy.save(run_dir / "policy")
    scores = {
        "before": _scores(config, base, config.pretrained, device),
        "after": _scores(config, base, str(run_dir / "policy"), device),
    }
    _report(config, base, trained, scores, began)
    return 0


def _report(
    config: PolicyTuningConfig,
    base: TrainConfig,
    trained: list[dict[str, Any]],
    scores: dict[str, dict[str, EvalResult]],
    began: float,
) -> None:
    """Write the report and say the most important of it in a line."""
    from diffpolicy.report.tuning import write_tuning_report

    wall_s = time.perf_counter() - began
    train_s = sum(t["train_s"] for t in trained)
    report = write_tuning_report(
        Path(config.run_dir),
        method=config.method or method_name(config),
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
        "total_s": round(wall_s, 1),
    }
    print("RESULT " + json.dumps(short))


@dataclass(frozen=True)
class _Run:
    """What the rounds of a tuning have in common."""

    config: PolicyTuningConfig
    base: TrainConfig
    demonstrations: EpisodeStore | None
    validate: Any
    resume: bool

    def round(
        self, policy: DiffusionPolicy, folder: Path, number: int
    ) -> tuple[DiffusionPolicy, dict[str, Any]] | None:
        """The best checkpoint by the validation score; ``None`` if it was stopped."""
        from diffpolicy.training.run_files import has_run

        config = self.config
        preferences = collected(config, self.base, policy, folder, number)
        found = judged(config, self.base, policy, preferences, folder)
        if found is None:
            return None
        policy.prefer(
            self._data(found),
            config.preference,
            trainer_settings(config.trainer, config.seed),
            folder,
            adapters=config.adapters,
            evaluate=self.validate,
            resume=self.resume and has_run(folder),
        )
        training = policy.last_training
        assert training is not None
        if training.interrupted:
            return None
        summary: dict[str, Any] = {
            "steps": training.step,
            "train_s": training.train_s,
            "score": training.best_score,
        }
        if found["preferences"] is not None:
            summary["preferences"] = found["preferences"].summary()
        return _load(str(trained_policy(folder)), policy.device), summary

    def _data(self, found: dict[str, Any]) -> Any:
        from diffpolicy.learn.learning import Learning
        from diffpolicy.learn.material import TuningData

        return TuningData(
            demonstrations=self.demonstrations,
            max_episodes=self.base.data.max_episodes,
            windows=self.config.windows,
            mask_padding=Learning.from_config(self.base.learning).mask_padding,
            **found,
        )


def of_policies(run: str) -> bool:
    """Whether the report of a run is of a policy's tuning."""
    from diffpolicy.report.tuning import FORMAT

    file = Path(run) / "report.json" if Path(run).is_dir() else Path(run)
    return file.is_file() and json.loads(file.read_text()).get("format") == FORMAT


def _load(path: str, device: Any) -> DiffusionPolicy:
    from diffpolicy.api import DiffusionPolicy

    return DiffusionPolicy.from_pretrained(path, device=device)


def _demonstrations(config: PolicyTuningConfig, base: TrainConfig) -> EpisodeStore | None:
    from diffpolicy.data.store import EpisodeStore

    path = Path(config.demonstrations or base.data.path)
    if path.exists():
        return EpisodeStore.open(path)
    if config.demonstrations is not None:
        raise ConfigError(f"no episode store at {path}; give demonstrations=STORE")
    return None


def _evaluated(config: PolicyTuningConfig, base: TrainConfig) -> TrainConfig:
    """The pre-trained run's configuration with this tuning's rollouts."""
    base.evaluation = config.evaluation
    return base


def _scores(
    config: PolicyTuningConfig, base: TrainConfig, path: str, device: Any
) -> dict[str, EvalResult]:
    """The policy scored on the test seeds, by number of sampling steps."""
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.rollout.evaluate import evaluate

    settings = config.evaluation
    found = {}
    for num_steps in config.nfe if settings.episodes else ():
        policy = DiffusionPolicy.from_pretrained(
            path, device=device, sampler={"num_steps": num_steps}
        )
        found[str(num_steps)] = evaluate(
            policy,
            env_spec(base),
            range(settings.seed, settings.seed + settings.episodes),
            workers=make_workers(settings, settings.episodes),
            plan_batch=settings.plan_batch,
            success_threshold=base.env.success_threshold,
        )
    return found


__all__ = ["finetune_policy", "of_policies", "run_policy"]
