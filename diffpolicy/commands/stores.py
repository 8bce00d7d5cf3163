"""Where a run's episodes come from: a store, an expert that records them, or a D4RL file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpolicy.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.results import EvalResult
    from diffpolicy.rollout.spec import EnvSpec


def open_store(config: TrainConfig) -> EpisodeStore:
    """The demonstrations, collected first when the config says how and they are not there yet."""
    from diffpolicy.data.store import EpisodeStore

    path, collect = Path(config.data.path), config.data.collect
    if config.data.d4rl is not None:
        return d4rl_store(config.data.d4rl, path, tuple(config.data.transforms))
    if config.data.transforms:
        raise ConfigError("data.transforms are applied when a file is read: give data.d4rl")
    if collect is None:
        if not path.exists():
            raise ConfigError(
                f"no episode store at {path}. Make one with `diffpolicy data convert SOURCE "
                f"{path}` or `diffpolicy data collect {path} env={config.env.id}`, "
                "or give data.path=..."
            )
        return EpisodeStore.open(path)
    from diffpolicy.rollout.collect import collect as collect_demonstrations
    from diffpolicy.rollout.vector import Workers

    seeds = range(collect.seed, collect.seed + collect.episodes)
    if seeds.stop > 100_000:
        raise ConfigError(f"demonstrations use environment seeds below 100,000, got {seeds}")
    workers = Workers(
        num_envs=16, num_workers=config.evaluation.num_workers, timeout=config.evaluation.timeout
    )
    store = collect_demonstrations(
        env_spec(config), seeds, path, workers=workers, noise=collect.noise
    )
    extra = [a.get("seed") for a in store.episode_attrs if a.get("seed") not in seeds]
    if extra:
        raise ConfigError(
            f"{path} holds {len(extra)} demonstrations of other seeds than {seeds} (e.g. "
            f"{extra[0]}); give another data.path, or data.collect=null to train on all of them"
        )
    return store


def d4rl_store(source: str, path: Path, transforms: tuple[str, ...]) -> EpisodeStore:
    """The store made of a D4RL dataset or file, which is kept at ``path`` for the next run.

    Raises:
        ConfigError: no such dataset, or a store at ``path`` that was made of something else.
    """
    from diffpolicy.data.d4rl import find_dataset, load_d4rl, parse_transforms
    from diffpolicy.data.store import EpisodeStore

    asked = parse_transforms(transforms)
    try:
        if not path.exists():
            with load_d4rl(source, transforms=transforms) as file:
                file.to_store(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error}. Data of our own experiments (maze2d_*, sb3_*) are made by `diffpolicy "
            "generate`; its --help and the comment in the experiment's file say how"
        ) from None
    store = EpisodeStore.open(path)
    size = store.attrs.get("file_bytes")
    with contextlib.suppress(FileNotFoundError):  # the store may be all that is left of it
        size = find_dataset(source).path.stat().st_size
    if store.attrs.get("file_bytes") != size or store.attrs.get("max_episodes"):
        raise ConfigError(
            f"{path} was made of another version, or a part, of {source}; remove it to have it "
            "made anew, or give another data.path"
        )
    made_of = {store.attrs.get("dataset"), store.attrs.get("file")}
    applied = parse_transforms(store.attrs.get("transforms", []))
    if applied != asked or not {source, Path(source).name} & made_of:
        raise ConfigError(
            f"{path} was made of {store.attrs.get('file')!r} with the transforms "
            f"{store.attrs.get('transforms')}, not of {source!r} with {list(transforms)}; give "
            "another data.path, or remove it"
        )
    return store


def env_spec(config: TrainConfig) -> EnvSpec:
    """The environment of a run."""
    from diffpolicy.rollout.spec import EnvSpec

    return EnvSpec(config.env.id, config.env.kwargs, config.env.max_episode_steps)


def d4rl_score(
    attrs: Mapping[str, Any], env: EnvSpec, result: EvalResult, folder: Path
) -> dict[str, Any]:
    """D4RL's score of an evaluation and what it depends on; empty if the data are not D4RL's.

    Args:
        attrs: of the store that was trained on.
        env: what was rolled out.
        result: of the rollouts.
        folder: where ``score.json`` goes, which says more.
    """
    from diffpolicy.data.d4rl import DATASETS
    from diffpolicy.rollout.d4rl import score

    dataset = attrs.get("dataset")
    returns = [e.episode_return for e in result.episodes if e.error is None]
    info = DATASETS.get(str(dataset))
    if info is None or info.ref_min is None or not returns:
        return {}
    found = score(
        info.id,
        returns,
        environment=env,
        transforms=attrs.get("transforms", ()),
        versions=result.env["versions"],
        constant_columns=attrs.get("constant_obs_columns", ()),
    )
    (folder / "score.json").write_text(json.dumps(found, indent=1) + "\n")
    label = found["label"]
    return {
        "normalized_score": round(found["score"]["value"], 2),
        "normalized_score_95": [
            None if found["score"][k] is None else round(found["score"][k], 2)
            for k in ("low", "high")
        ],
        "dataset": label["dataset"],
        "env": label["env"]["id"],
        "references": label["references"]["source"],
        "comparable": label["comparable"],
    }
