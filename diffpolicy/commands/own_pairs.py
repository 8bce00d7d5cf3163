"""What a policy's tuning learns from: pairs of its own rollouts, and a judge of its own plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.collecting import Collecting
from diffpolicy.commands.runs import trainer_settings
from diffpolicy.commands.stores import env_spec
from diffpolicy.commands.train import make_workers
from diffpolicy.commands.tuning_folder import PLAN_PAIRS, PLANS, PREFERENCES, ROLLOUTS, VALUE
from diffpolicy.config import PolicyTuningConfig, TrainConfig
from diffpolicy.settings import ConfigError, check_choice, check_known, check_range, setting_names

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.learn.values import PlanValue
    from diffpolicy.rollout.record.steps import DenseReward
    from diffpolicy.training.settings import TrainerConfig

REWARDS = ("store", "dense")
JUDGE_TRAINER = {"steps": 2500, "batch_size": 512, "lr": 1e-3, "weight_decay": 1e-2}
OF_POLICY = ("obs_dim", "action_dim", "n_obs_steps", "n_action_steps")


def check(
    config: PolicyTuningConfig, base: TrainConfig, policy: DiffusionPolicy, *, judged: bool
) -> None:
    """Find what is wrong with collecting and judging before anything runs.

    Raises:
        ConfigError: unknown settings, or values out of range.
        ValueError: likewise.
    """
    from diffpolicy.learn.plan_pairs import PlanPairs

    if config.collect is not None:
        Collecting.of(config.collect, "collect.")
        for number in range(config.rounds):
            rollout_seeds(config, number)
    longest = base.env.max_episode_steps
    if judged and (policy.spec.observations or policy.spec.encoder["type"] != "state"):
        raise ConfigError(
            "a judge takes the observation as one vector; tune this policy by comparisons of its "
            "rollouts (judge=null plans=null), or one of flat observations"
        )
    if judged:
        new_judge(config, policy)
        dense_reward(config, base)
        longest = _longest(config) or longest
    if config.plans is not None:
        every = PlanPairs.from_config(config.plans, policy.spec).every
        if longest is not None and every // 2 >= longest:
            raise ConfigError(
                f"plans.every={every} begins at step {every // 2}, and no episode is longer than "
                f"{longest}; lower it"
            )


def _longest(config: PolicyTuningConfig) -> int | None:
    """The longest of given rollouts, which must hold what a judge learns from."""
    from diffpolicy.data.preferences.set import PreferenceSet

    if config.preferences is None:
        return None
    store = PreferenceSet.open(config.preferences).store
    if "reward" not in store.fields:
        raise ConfigError(
            f"{store.name} holds no rewards for judge to learn from; to use these preferences as "
            "they are, give judge=null plans=null"
        )
    return int(store.episode_lengths.max())


def rollout_seeds(config: PolicyTuningConfig, number: int) -> range:
    """The environment seeds of a round: others for every seed of the tuning and round.

    Raises:
        ConfigError: they are not those to learn from.
    """
    how = Collecting.of(config.collect or {}, "collect.")
    first = how.seed + (config.rounds * config.seed + number) * how.episodes
    seeds = range(first, first + how.episodes)
    if seeds.stop > 100_000 or first < 0:
        raise ConfigError(
            f"rollouts to learn from use environment seeds below 100,000: round {number} of "
            f"seed={config.seed} would use {seeds}; lower collect.seed or collect.episodes"
        )
    return seeds


def make(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    folder: Path,
    number: int,
    *,
    judged: bool,
) -> dict[str, Any] | None:
    """What a round learns from, made where it is not there yet.

    Args:
        config: of the tuning.
        base: of the run that it began from.
        policy: the newest one.
        folder: of the round.
        number: of the round.
        judged: whether the policy's own plans are judged.

    Returns:
        Entries of :class:`~diffpolicy.learn.material.TuningData`: comparisons as they are or of own
        plans (``plans``), or the value of plans as the reward. ``None`` if it was stopped.
    """
    if not judged:
        return {"preferences": _collected(config, base, policy, folder, number, compared=True)}
    path = (config.judge or {}).get("path")
    given = path is not None and config.preferences is None and config.collect is None
    rollouts = None
    if not given:
        rollouts = _collected(config, base, policy, folder, number, compared=False).store
    value = _judge(config, base, policy, rollouts, folder)
    if value is None:
        return None
    if config.plans is None:
        return {"reward": value, "observations": rollouts}
    assert rollouts is not None  # pairs of plans are of their observations
    return {"preferences": _plans(config, policy, value, rollouts, folder)}


def _collected(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    folder: Path,
    number: int,
    *,
    compared: bool,
) -> PreferenceSet:
    """The comparisons of a round: a file, or pairs from rollouts of the newest policy.

    Rollouts that are not compared have an empty set, whose store holds them.
    """
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.record.branches import collect_rollouts

    if config.preferences is not None:
        return PreferenceSet.open(config.preferences)
    if any((folder / name).exists() for name in ("checkpoints", VALUE)):
        # Training has begun: what it learns from stays as it is.
        if not compared:
            return PreferenceSet(EpisodeStore.open(folder / ROLLOUTS))
        if (folder / PREFERENCES).exists():
            return PreferenceSet.open(folder / PREFERENCES)
    settings = Collecting.of(config.collect or {}, "collect.").settings(config.seed)
    seeds = rollout_seeds(config, number)
    folder.mkdir(parents=True, exist_ok=True)
    return collect_rollouts(
        policy,
        env_spec(base),
        seeds,
        store_path=folder / ROLLOUTS,
        prefs_path=folder / PREFERENCES if compared else None,
        settings=settings,
        workers=make_workers(config.evaluation, 1_000_000),
    )


def new_judge(
    config: PolicyTuningConfig, policy: DiffusionPolicy
) -> tuple[PlanValue, TrainerConfig]:
    """A value of plans, untrained unless it is read, and the settings of its trainer.

    Raises:
        ConfigError: unknown settings, or values out of range.
        ValueError: likewise.
    """
    from diffpolicy.learn.values import PlanValue, PlanValueSpec

    values = dict(config.judge or {})
    own = [name for name in setting_names(PlanValueSpec) if name not in OF_POLICY]
    check_known(values, [*own, "path", "reward", "pessimism", "trainer"], "judge")
    path, reward = values.pop("path", None), values.pop("reward", "store")
    pessimism, trainer = values.pop("pessimism", 1.0), values.pop("trainer", None) or {}
    check_choice("judge.reward", reward, REWARDS)
    check_range("[0, inf)", **{"judge.pessimism": pessimism})
    if not isinstance(trainer, dict):
        raise ConfigError(f"judge.trainer must be a group of settings, got {trainer!r}")
    settings = trainer_settings({**JUDGE_TRAINER, **trainer}, config.seed, "judge.trainer.")
    try:
        if path is not None:
            value = PlanValue.from_pretrained(path, device=policy.device)
            check_judge(value, policy, path)
        else:
            value = PlanValue.for_policy(policy, seed=config.seed, **values)
    except TypeError as error:
        raise ConfigError(f"judge: {error}") from None
    value.pessimism = float(pessimism)
    return value, settings


def check_judge(value: PlanValue, policy: DiffusionPolicy, path: object) -> None:
    """Raise ``ConfigError`` unless a value judges plans such as a policy makes."""
    for name in OF_POLICY:
        own, of_policy = getattr(value.spec, name), getattr(policy, name)
        fits = own <= of_policy if name.startswith("n_") else own == of_policy
        if not fits:
            raise ConfigError(
                f"{path} values plans with {name}={own}, and this policy acts with {of_policy}; "
                "give the value of a tuning of this policy, or leave n_action_steps as it was"
            )


def dense_reward(config: PolicyTuningConfig, base: TrainConfig) -> DenseReward | None:
    """What the judge is told of steps; ``None``: what they earned.

    Raises:
        ValueError: the environment has no dense reward.
    """
    from diffpolicy.rollout.record.steps import DenseReward

    dense = (config.judge or {}).get("reward") == "dense"
    return DenseReward(env_spec(base)) if dense else None


def _judge(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    rollouts: EpisodeStore | None,
    folder: Path,
) -> PlanValue | None:
    """The value of plans, learned from rollouts unless it is read; ``None`` if it was stopped.

    Learning goes on where an earlier call in ``folder`` was stopped.
    """
    from diffpolicy.training.run_files import has_run

    value, settings = new_judge(config, policy)
    if (config.judge or {}).get("path") is not None:
        return value
    assert rollouts is not None
    place = folder / VALUE
    value.learn(dense_reward(config, base), rollouts, settings, place, resume=has_run(place))
    assert value.last_training is not None
    return None if value.last_training.interrupted else value


def _plans(
    config: PolicyTuningConfig,
    policy: DiffusionPolicy,
    value: PlanValue,
    rollouts: EpisodeStore,
    folder: Path,
) -> PreferenceSet:
    """Pairs of the policy's own plans; those that are there are complete."""
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.learn.plan_pairs import PlanPairs, pair_plans

    assert config.plans is not None
    if (folder / PLAN_PAIRS).exists():
        return PreferenceSet.open(folder / PLAN_PAIRS)
    return pair_plans(
        policy,
        value,
        rollouts,
        store_path=folder / PLANS,
        prefs_path=folder / PLAN_PAIRS,
        settings=PlanPairs.from_config(config.plans, policy.spec),
        seed=config.seed,
    )
