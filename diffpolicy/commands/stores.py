"""Where a run's episodes come from: a store, an expert that records them, or a D4RL file."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffpolicy.config import TrainConfig
from diffpolicy.files import write_json
from diffpolicy.settings import ConfigError, check_choice, settings_of

if TYPE_CHECKING:
    from diffpolicy.data.d4rl.transforms import Transform
    from diffpolicy.data.hindsight import Hindsight
    from diffpolicy.data.store import EpisodeStore
    from diffpolicy.rollout.env_spec import EnvSpec
    from diffpolicy.rollout.results import EvalResult

_log = logging.getLogger("diffpolicy.data")


def open_store(config: TrainConfig) -> EpisodeStore:
    """Open the demonstrations, with goals where the config says so; see :func:`_opened`."""
    return with_goals(_opened(config), config.data.goals)


def with_goals(store: EpisodeStore, goals: Any) -> EpisodeStore:
    """Return a store as ``data.goals`` says that it is observed; see :func:`hindsight`."""
    from diffpolicy.data.hindsight import relabelled

    made = hindsight(goals)
    return store if made is None else relabelled(store, made)


def hindsight(goals: Any) -> Hindsight | None:
    """The goals that ``data.goals`` asks for.

    Args:
        goals: None, ``"hindsight"``, or ``{"type": "hindsight"}`` with its settings.

    Raises:
        ConfigError: something else, or a setting that there is not.
        ValueError: shares that do not add up to 1.
    """
    from diffpolicy.data.hindsight import Hindsight

    if goals is None:
        return None
    values = {"type": goals} if isinstance(goals, str) else goals
    if not isinstance(values, Mapping) or "type" not in values:
        raise ConfigError(
            "data.goals is hindsight, or {type: hindsight} with its settings: "
            f"'data.goals={{type: hindsight, geom_sample: true}}'; got {goals!r}"
        )
    check_choice("data.goals", values["type"], ("hindsight",))
    given = {name: value for name, value in values.items() if name != "type"}
    return settings_of(Hindsight, given, "data.goals")


def _opened(config: TrainConfig) -> EpisodeStore:
    """Open the demonstrations, collected first when the config says how and they are not there."""
    from diffpolicy.data.store import EpisodeStore

    if config.data.path is None:
        return mixed_store(config.data.mix)
    path, collect = Path(config.data.path), config.data.collect
    if config.data.d4rl is not None:
        return d4rl_store(config.data.d4rl, path, tuple(config.data.transforms))
    if config.data.transforms:
        raise ConfigError("data.transforms are applied when a file is read: give data.d4rl")
    if collect is None:
        if not path.exists():
            raise ConfigError(
                f"no episode store at {path}. Make one with `diffpolicy data convert SOURCE "
                f"{path}` or `diffpolicy data make NAME out={path}` (`diffpolicy data make --list` "
                f"has the names), by `diffpolicy data collect {path} env={config.env.id}`, or give "
                "data.path=..."
            )
        return EpisodeStore.open(path)
    from diffpolicy.rollout.pool.supervisor import Workers
    from diffpolicy.rollout.record.experts import collect as collect_demonstrations

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


def mixed_store(mix: Sequence[Any]) -> EpisodeStore:
    """Open the stores of ``data.mix`` as one.

    Raises:
        ConfigError: a part that is not there, or has a setting that there is not.
        ValueError: stores whose fields differ.
    """
    from diffpolicy.data.joined import mixture

    store = mixture(mix)
    shares = [weight / sum(store.weights) for weight in store.weights]
    for (name, part), share in zip(store.parts.items(), shares, strict=True):
        size = f"{part.num_episodes} episodes, {part.num_steps} steps"
        print(f"data.mix: {name}, {size}, {share:.1%} of each batch")
    return cast("EpisodeStore", store)


def d4rl_store(source: str, path: Path, transforms: tuple[str, ...]) -> EpisodeStore:
    """Open the store made of a D4RL dataset or file, which is kept at ``path`` for the next run.

    Raises:
        ConfigError: no such dataset, or a store at ``path`` that was made of something else. (One
            that was made of an earlier state of the same file is set aside, and made anew.)
    """
    from diffpolicy.data.d4rl.file import load_d4rl
    from diffpolicy.data.d4rl.location import find_dataset
    from diffpolicy.data.d4rl.transforms import parse_transforms
    from diffpolicy.data.store import EpisodeStore

    asked = parse_transforms(transforms)
    try:
        found = find_dataset(source)
    except FileNotFoundError as error:
        if not path.exists():  # else the store may be all that is left of it
            raise ConfigError(
                f"{error}. Data of our own experiments (maze2d_*, sb3_*) are made by "
                "`python scripts/generate.py`, see the comment in the experiment's file"
            ) from None
        found = None
    if path.exists():
        store = EpisodeStore.open(path)
        _check_made_of(store, source, asked)
        if found is None or _is_of(store, found):
            return store
        store.close()
        _set_aside(path, found)
    assert found is not None
    try:
        with load_d4rl(found, transforms=transforms) as file:
            return file.to_store(path)
    except ValueError as error:  # such as ends that nothing tells, or episodes to be left out
        raise ConfigError(
            f"{error}. Here the options are those of the file alone; to give others make the store "
            f"first: `diffpolicy data convert {found} {path} ...`, and train on it with "
            f"data.d4rl=null data.transforms=[] data.path={path}"
        ) from error


def _check_made_of(store: EpisodeStore, source: str, asked: Sequence[Transform]) -> None:
    """Make sure that a store was made of this source, of all of it, and in this way."""
    from diffpolicy.data.d4rl.transforms import parse_transforms

    attrs, path = store.attrs, store.name
    if any(attrs.get(name) for name in ("max_episodes", "left_out_episodes", "made_of")):
        raise ConfigError(
            f"{path} was made of a part of {attrs.get('file')!r}. To train on it as it is, set "
            "data.d4rl=null data.transforms=[]; or give another data.path"
        )
    is_same = {source, Path(source).name} & {attrs.get("dataset"), attrs.get("file")}
    if not is_same or tuple(parse_transforms(attrs.get("transforms", []))) != asked:
        wanted = [name if value is None else f"{name}:{value:g}" for name, value in asked]
        raise ConfigError(
            f"{path} was made of {attrs.get('file')!r} with the transforms "
            f"{attrs.get('transforms')}, not of {source!r} with {wanted}; give another data.path, "
            "or remove it"
        )


def _is_of(store: EpisodeStore, file: Path) -> bool:
    """Whether a store was made of a file as it is now."""
    known = store.attrs.get("file_sha256")
    if known is not None:
        with file.open("rb") as stream:
            return bool(known == hashlib.file_digest(stream, "sha256").hexdigest())
    same = store.attrs.get("file_bytes") == file.stat().st_size
    if same:
        _log.warning(
            f"{store.name} was made by an earlier version, which kept no digest of {file}: that "
            "the file is the same is known by its size alone. Remove the store to have it made anew"
        )
    return same


def _set_aside(path: Path, file: Path) -> None:
    """Give way to a store of the file as it is now; the old one may be all that is left of it."""
    places = (path.with_name(f"{path.stem}.old{n}{path.suffix}") for n in itertools.count(1))
    aside = next(place for place in places if not place.exists())
    path.rename(aside)
    _log.warning(
        f"{file} has changed since {path} was made of it: the store is made anew, and the old one "
        f"is kept as {aside}"
    )


def env_spec(config: TrainConfig) -> EnvSpec:
    """Return the environment of a run."""
    from diffpolicy.rollout.env_spec import EnvSpec

    return EnvSpec(config.env.id, config.env.kwargs, config.env.max_episode_steps)


def d4rl_score(
    attrs: Mapping[str, Any], rows: int | None, env: EnvSpec, result: EvalResult, folder: Path
) -> dict[str, Any]:
    """Return D4RL's score of an evaluation and what it depends on; nothing for other data.

    Args:
        attrs: of the store that was trained on.
        rows: of that store; ``None`` if it is no longer there.
        env: what was rolled out.
        result: of the rollouts.
        folder: where ``score.json`` goes, which says more.
    """
    from diffpolicy.data.d4rl.catalogue import DATASETS, doubts
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
        doubts=doubts(info, rows),
    )
    write_json(folder / "score.json", found)
    label = found["label"]
    ends = [found["score"][end] for end in ("low", "high")]
    return {
        "normalized_score": round(found["score"]["value"], 2),
        "normalized_score_95": [None if end is None else round(end, 2) for end in ends],
        "dataset": label["dataset"],
        "env": label["env"]["id"],
        "references": label["references"]["source"],
        "comparable": label["comparable"],
        **({} if label["comparable"] else {"comparable_not": label["note"]}),
    }
