"""What a policy's tuning learns from: pairs of its own rollouts, and a judge of its own plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.commands.collecting import Collecting
from diffpolicy.commands.stores import env_spec
from diffpolicy.commands.train import make_workers
from diffpolicy.commands.train_sequences import trainer_settings
from diffpolicy.commands.tuning_folder import PLAN_PAIRS, PLANS, PREFERENCES, ROLLOUTS, VALUE
from diffpolicy.config import ConfigError, TrainConfig
from diffpolicy.config_policy_tuning import PolicyTuningConfig

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.learn.values import PlanValue
    from diffpolicy.rollout.record.steps import DenseReward
    from diffpolicy.training.settings import TrainerConfig

REWARDS = ("store", "dense")
SCORING = ("score", "discount", "after_end", "pairs", "min_gap", "span")  # of pairs of rollouts
JUDGE_TRAINER = {"steps": 2500, "batch_size": 512, "lr": 1e-3, "weight_decay": 1e-2}
OF_POLICY = ("obs_dim", "action_dim", "n_obs_steps", "n_action_steps")


def check_rollouts(config: PolicyTuningConfig, base: TrainConfig, policy: DiffusionPolicy) -> None:
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
    if config.judge is not None:
        new_judge(config, policy)
        dense_reward(config, base)
        _check_scoring(config.collect or {})
        longest = _check_store(config) or longest
    if config.plans is not None:
        every = PlanPairs.from_config(config.plans, policy.spec).every
        if longest is not None and every // 2 >= longest:
            raise ConfigError(
                f"plans.every={every} begins at step {every // 2}, and no episode is longer than "
                f"{longest}; lower it"
            )


def _check_scoring(collect: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for settings of pairs of rollouts, where there are none."""
    usual = Collecting()
    idle = [n for n in SCORING if collect.get(n, getattr(usual, n)) != getattr(usual, n)]
    if idle:
        raise ConfigError(
            f"collect.{idle[0]} has no effect: with judge own plans are compared, not rollouts"
        )


def _check_store(config: PolicyTuningConfig) -> int | None:
    """The longest of given rollouts, which must hold what a judge learns from.

    Raises:
        ConfigError: they do not.
    """
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


def collected(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    folder: Path,
    number: int,
) -> PreferenceSet | None:
    """The comparisons of a round: a file, or pairs from rollouts of the newest policy.

    With a judge rollouts are not compared: the set is empty, and its store holds them.
    """
    from diffpolicy.data.preferences.set import PreferenceSet
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.record.branches import collect_rollouts

    if config.preferences is not None:
        return PreferenceSet.open(config.preferences)
    if config.collect is None:
        return None
    begun = any((folder / name).exists() for name in ("checkpoints", VALUE))
    if begun and config.judge is not None:  # what is learned from stays as it is
        return PreferenceSet(EpisodeStore.open(folder / ROLLOUTS))
    if begun and (folder / PREFERENCES).exists():
        return PreferenceSet.open(folder / PREFERENCES)
    settings = Collecting.of(config.collect, "collect.").settings(config.seed)
    seeds = rollout_seeds(config, number)
    folder.mkdir(parents=True, exist_ok=True)
    return collect_rollouts(
        policy,
        env_spec(base),
        seeds,
        store_path=folder / ROLLOUTS,
        prefs_path=None if config.judge is not None else folder / PREFERENCES,
        settings=settings,
        workers=make_workers(config.evaluation, 1_000_000),
    )


def new_judge(
    config: PolicyTuningConfig, policy: DiffusionPolicy
) -> tuple[PlanValue, TrainerConfig]:
    """An untrained value of plans, and the settings of its trainer.

    Raises:
        ConfigError: unknown settings, or values out of range.
        ValueError: likewise.
    """
    from diffpolicy.learn.values import PlanValue, PlanValueSpec
    from diffpolicy.settings import check_known, setting_names

    values = dict(config.judge or {})
    trainer = values.pop("trainer", None) or {}
    pessimism = values.pop("pessimism", 1.0)
    reward = values.pop("reward", "store")
    if reward not in REWARDS:
        raise ConfigError(
            f"judge.reward must be one of {list(REWARDS)} (what the rollouts earned, or the "
            f"environment's dense_reward), got {reward!r}"
        )
    if not isinstance(trainer, dict):
        raise ConfigError(f"judge.trainer must be a group of settings, got {trainer!r}")
    if isinstance(pessimism, bool) or not isinstance(pessimism, int | float) or pessimism < 0:
        raise ConfigError(f"judge.pessimism must be a number, 0 or more, got {pessimism!r}")
    own = [name for name in setting_names(PlanValueSpec) if name not in OF_POLICY]
    check_known(values, [*own, "reward", "pessimism", "trainer"], "judge")
    settings = trainer_settings({**JUDGE_TRAINER, **trainer}, config.seed, "judge.trainer.")
    try:
        value = PlanValue.for_policy(policy, seed=config.seed, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"judge: {error}") from None
    value.pessimism = float(pessimism)
    return value, settings


def dense_reward(config: PolicyTuningConfig, base: TrainConfig) -> DenseReward | None:
    """What the judge is told of steps; ``None``: what they earned.

    Raises:
        ValueError: the environment has no dense reward.
    """
    from diffpolicy.rollout.record.steps import DenseReward

    if (config.judge or {}).get("reward", "store") == "store":
        return None
    return DenseReward(env_spec(base))


def judged(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    preferences: PreferenceSet | None,
    folder: Path,
) -> dict[str, Any] | None:
    """What there is to learn from: comparisons as they are, or by a value learned from rollouts.

    Learning of the value goes on where an earlier call in ``folder`` was stopped.

    Returns:
        Entries of :class:`~diffpolicy.learn.preference_data.PreferenceData`: the preferences, which
        are of the policy's own plans with ``plans``; or the value, for methods with ``online``.
        ``None`` if it was stopped.
    """
    from diffpolicy.training.run_files import has_run

    if config.judge is None or preferences is None:
        return {"preferences": preferences}
    value, settings = new_judge(config, policy)
    rollouts = preferences.store
    place = folder / VALUE
    value.learn(dense_reward(config, base), rollouts, settings, place, resume=has_run(place))
    assert value.last_training is not None
    if value.last_training.interrupted:
        return None
    if config.plans is None:
        return {"preferences": None, "reward": value, "observations": rollouts}
    return {"preferences": _plans(config, policy, value, rollouts, folder)}


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


__all__ = ["check_rollouts", "collected", "dense_reward", "judged", "new_judge", "rollout_seeds"]
