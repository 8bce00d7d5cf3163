"""The datasets of a reproduction: what they are called, what their data hold, and a toy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.commands.stores import env_spec, open_store
from diffpolicy.config import TrainConfig, load_train
from diffpolicy.config_compose import group_choices
from diffpolicy.data.d4rl.catalogue import DATASETS
from diffpolicy.settings import ConfigError

if TYPE_CHECKING:
    from diffpolicy.data.store import EpisodeStore

TOY_STEPS = 20
_TOY_EPISODES = 12


@dataclass(frozen=True)
class Dataset:
    """A dataset and the overrides of `diffpolicy train` that stand for it.

    Attributes:
        name: as it was asked for: a D4RL id or an experiment.
        d4rl: the D4RL id; None where the data are none of D4RL's.
        overrides: of `diffpolicy train`.
        problem: why nothing can be trained or evaluated on it.
    """

    name: str
    d4rl: str | None
    overrides: tuple[str, ...]
    problem: str | None = None


def resolve(name: str) -> Dataset:
    """What a name stands for.

    A D4RL id is its experiment where there is one (``d4rl_hopper_medium_expert``); any other is
    made of the id and the environment of `diffpolicy.rollout.d4rl.evaluation_env`.

    Raises:
        ConfigError: neither an id nor an experiment, with the nearest names.
    """
    experiments = group_choices()["experiment"]
    if name in experiments:
        overrides = (f"experiment={name}",)
        source = load_train(overrides).data.d4rl
        return Dataset(name, source if source in DATASETS else None, overrides)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, [*DATASETS, *experiments], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"{name!r} is neither a D4RL id nor an experiment{hint}")
    experiment = "d4rl_" + name.rpartition("-v")[0].replace("-", "_")
    if experiment in experiments and load_train([f"experiment={experiment}"]).data.d4rl == name:
        return Dataset(name, name, (f"experiment={experiment}",))
    try:
        return Dataset(name, name, _generic(name))
    except (ValueError, OSError, ImportError) as error:
        return Dataset(name, name, (), str(error))


def _generic(name: str) -> tuple[str, ...]:
    from diffpolicy.rollout.d4rl import evaluation_env

    overrides = ["data=d4rl", "env=hopper", f"data.d4rl={name}", f"name={name}"]
    columns: Sequence[int] = ()
    if name.startswith("maze2d"):
        overrides.append("data.transforms=[split_goals]")  # the environment observes the goal
    if name.startswith("ant-"):  # its environment depends on what the file holds
        columns = open_store(load_train(overrides)).attrs.get("constant_obs_columns", ())
    env = evaluation_env(name, constant_columns=columns).env
    steps = "null" if env.max_episode_steps is None else env.max_episode_steps
    overrides += [f"env.name={name}", f"env.id={quoted(env.id)}", f"env.max_episode_steps={steps}"]
    return (*overrides, *(f"++env.kwargs.{k}={quoted(v)}" for k, v in env.kwargs.items()))


def quoted(value: Any) -> str:
    """A value as an override writes it."""
    return json.dumps(value)


@cache
def _settings() -> dict[str, Any]:
    text = files("diffpolicy.data.d4rl").joinpath("settings.json").read_text("utf-8")
    return dict(json.loads(text))


def settings_of(dataset: str, algorithm: str) -> dict[str, Any]:
    """Settings of an algorithm for a dataset or experiment, as overrides; most have none."""
    return dict(_settings()["settings"].get(algorithm, {}).get(dataset, {}))


def settings_sources() -> dict[str, str]:
    """Where `settings_of` were taken from, by algorithm."""
    return dict(_settings()["sources"])


def facts_of(dataset: Dataset, store: EpisodeStore | None) -> dict[str, Any]:
    """What the data hold, for the fractions of the table, as JSON values.

    Returns are undiscounted sums of untransformed rewards over whole episodes. ``expert_return`` is
    the mean of the best source where the file names its sources with their mean returns, as
    `python scripts/generate.py rollouts` does; else of the best episodes, see `best_episodes`.
    """
    facts: dict[str, Any] = {"d4rl": dataset.d4rl, "mean_return": None}
    if store is None or "reward" not in store.fields:
        return facts
    scale, shift = store.attrs.get("reward_scale", 1.0), store.attrs.get("reward_shift", 0.0)
    reward = store.read("reward", 0, store.num_steps).astype(np.float64).reshape(-1)
    starts = np.concatenate([[0], store.episode_ends[:-1]])
    returns = np.add.reduceat((reward - shift) / scale, starts)
    whole = np.array([not attrs.get("partial", False) for attrs in store.episode_attrs])
    if not whole.any():
        return facts
    best, rule = best_episodes(returns[whole], dataset.name)
    named = _best_source(store)
    expert, rule = (float(best.mean()), rule) if named is None else named
    return facts | {
        "episodes": int(whole.sum()),
        "mean_return": float(returns[whole].mean()),
        "expert_return": expert,
        "expert_rule": rule,
        "transforms": list(store.attrs.get("transforms", [])),
        "reward_scale": scale,
        "reward_shift": shift,
    }


def best_episodes(returns: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """The returns ``[n]`` of the best episodes, and the rule that chose them.

    In sets called medium-expert those above the midpoint between the least and the largest return:
    nearly all of the expert's, and some of the medium agent's where its returns spread widely, so
    that the mean is rather low. In others the better half.
    """
    if "medium_expert" in name.replace("-", "_"):
        middle = (returns.min() + returns.max()) / 2
        return returns[returns >= middle], "episodes above the midpoint of the returns' range"
    return returns[returns >= np.median(returns)], "the better half of the episodes"


def _best_source(store: EpisodeStore) -> tuple[float, str] | None:
    """Mean return of the best of the sources that the data were joined from, if they say so."""
    sources = store.attrs.get("metadata", {}).get("sources", [])
    try:
        best = max(sources, key=lambda source: float(source["return_mean"]))
    except (ValueError, KeyError, TypeError):  # no sources, or somebody else's note of that name
        return None
    return float(best["return_mean"]), f"the episodes of {best['file']}"


@dataclass(frozen=True)
class Toy:
    """A whole run at toy size: random data, tiny networks, a few steps.

    Attributes:
        folder: receives the data.
        files: of every dataset, once it was asked for.
    """

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def overrides(self, config: TrainConfig, dataset: str) -> list[str]:
        """What makes a configuration small, and read data that are made here."""
        file = self.files.get(dataset)
        if file is None:
            file = self.files[dataset] = self.folder / f"toy_{dataset}.hdf5"
            if not file.exists():
                make_toy(file, config)
        small = [
            *(f"trainer.{name}={value}" for name, value in _TOY_TRAINER.items()),
            f"data.d4rl={quoted(str(file))}",
            f"data.path={quoted(str(file.with_suffix('.zarr')))}",
            "data.transforms=[]",
            f"env.max_episode_steps={TOY_STEPS}",
            *("evaluation.episodes=2", "evaluation.num_envs=2", "evaluation.num_workers=0"),
            *("device=cpu", "threads=1"),
        ]
        if config.network["type"] == "unet1d":
            small += ["network.down_dims=[8,16]", "policy.horizon=8", "sampler.num_steps=3"]
        else:
            small += ["network.width=16", "network.depth=1"]
        if config.policy.get("selection"):
            small.append("policy.selection.num_candidates=2")
        if "value" in config.policy.get("heads", {}):
            small.append("policy.heads.value.base.down_dims=[8,16]")
        return small


_TOY_TRAINER: Mapping[str, Any] = {
    "steps": 4,
    "batch_size": 16,
    "warmup_steps": 1,
    "log_every": 2,
    "checkpoint_every": 4,
    "progress": "false",
}


def make_toy(path: Path, config: TrainConfig) -> Path:
    """Writes noise in D4RL's layout, of the shapes that the environment has.

    Raises:
        ImportError: h5py is not installed.
    """
    from diffpolicy.rollout.env_spec import describe
    from generators.layout import write_d4rl

    info = describe(env_spec(config))
    rows = _TOY_EPISODES * TOY_STEPS
    rng = np.random.default_rng(0)
    ends = np.arange(1, rows + 1) % TOY_STEPS == 0
    level = np.repeat(rng.uniform(0.5, 2.0, _TOY_EPISODES), TOY_STEPS)
    arrays = {
        "observations": rng.normal(size=(rows, info.obs_dim)),
        "actions": rng.uniform(-0.99, 0.99, (rows, info.action_dim)),
        "rewards": level + 0.1 * rng.normal(size=rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": ends,
    }
    return write_d4rl(path, arrays, {"algorithm": "noise, to test the program"})
