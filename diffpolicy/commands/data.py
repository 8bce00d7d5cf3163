"""`diffpolicy data`: info, check, convert or collect episode stores; D4RL; preferences."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands import prefs
from diffpolicy.commands.options import parse, subcommand
from diffpolicy.config import ConfigError


def help_text() -> str:
    """The text of `diffpolicy data --help`."""
    return """\
usage: diffpolicy data info STORE [--update-statistics]
       diffpolicy data check STORE [action_low=[...]] [action_high=[...]]
       diffpolicy data convert SOURCE TARGET [key=value] ...
       diffpolicy data d4rl [PATTERN] [data_dir=DIR]
       diffpolicy data collect TARGET env=ID [episodes=200] [key=value] ...
       diffpolicy data prefs collect | import | info | render | serve ...

info     fields, episodes, lengths and statistics; --update-statistics computes them anew.
check    looks at every value; names episode, row and fix for what is wrong. Exit status 1 if
         there are errors.
convert  makes a store from a Diffusion Policy replay buffer (zarr, directory or zip), a robomimic
         or D4RL HDF5 file, a Minari (HDF5) or LeRobot (Parquet) dataset, an npz file of arrays with
         episode_ends, or an id of D4RL's, Minari's or LeRobot's (the last two with format=minari,
         format=lerobot). What is left out is said, and so is what is doubtful. The store appears
         when it is complete; an interrupted conversion begins anew.
         Options: format=auto, overwrite=false.
         Fields: obs=NAME and action=NAME, or lists that are concatenated, obs=[a,b]; others with
         fields={reward: rewards, img: img}.
         Episodes: max_episodes=null; exclude=[3,7], exclude=failed_check (all that cannot be stored
         or that `data check` would name) or exclude=mask:NAME; keep=mask:train (a filter key of
         robomimic's, a split of LeRobot's, or a flag of each episode such as success) or
         keep=[0,1]. allow_missing=true reads chunks that are not there as zeros.
         With env=ID the observation is passed through that environment's own
         observation_from_state, so that the data hold what the policy will see:
           diffpolicy data convert pusht_lowdim.zarr.zip data/pusht.zarr obs=state \
             env=diffpolicy_envs:diffpolicy/PushT-v0
         With a D4RL id or file the fields are settled, env=ID is only recorded, and there are the
         options transforms=[...], extras=[infos/qpos,...], keep_partial=true, data_dir=DIR (of the
         id), dataset=ID (of a file that was renamed), and max_episode_steps=N, the step limit of
         the environment of a file of your own without timeouts and next_observations:
           diffpolicy data convert hopper-medium-v2 data/hopper.zarr
           diffpolicy data convert mine.hdf5 data/mine.zarr max_episode_steps=50
         Transforms: antmaze_reward (r - 1), reward_scale:X, reward_shift:X, normalize_reward
         (1000 / (max - min) of the returns), split_goals[:RADIUS] (one episode for each
         infos/goal, which is appended to obs).
d4rl     the D4RL datasets whose id contains PATTERN (or matches it, with * and ?): file name, step
         limit, returns that score 0 and 100, and where the file is. Files belong into
         $D4RL_DATASET_DIR or ~/.d4rl/datasets; the d4rl package is not needed.
collect  records demonstrations of the environment's scripted expert; continues an interrupted
         collection. Options: seed=0, noise=0.15 (executed; the clean action is stored),
         keep=success (or all), num_workers=null.
prefs    preferences between stored segments: pairs from rollouts, labels of people, side-by-side
         clips, and a page to label on.

""" + prefs.help_text()


def run(arguments: Sequence[str]) -> int:
    """Dispatch to the subcommand."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "info": _info,
        "check": _check,
        "convert": _convert,
        "d4rl": _d4rl,
        "collect": _collect,
        "prefs": prefs.run,
    }
    return subcommand(arguments, commands, "data")(arguments[1:])


def _open(path: str) -> Any:
    from diffpolicy.data.store import EpisodeStore

    if not Path(path).exists():
        raise ConfigError(f"no store at {path}")
    return EpisodeStore.open(path)


def _info(arguments: Sequence[str]) -> int:
    from diffpolicy.data.reader import info

    plain = [a for a in arguments if a != "--update-statistics"]
    store = _open(parse(plain, ["store"], {})["store"])
    if len(plain) < len(arguments):
        with type(store).open(store.path, "a") as writable:
            writable.finalize()
        store = type(store).open(store.path)
    print(json.dumps(info(store), indent=1, default=str))
    return 0


def _check(arguments: Sequence[str]) -> int:
    from diffpolicy.data.check import check_store, format_issue

    options = parse(arguments, ["store"], {"action_low": None, "action_high": None})
    if not Path(options["store"]).exists():
        raise ConfigError(f"no store at {options['store']}")
    issues = check_store(
        options["store"], action_low=options["action_low"], action_high=options["action_high"]
    )
    for issue in issues:
        print(format_issue(issue))
    errors = sum(issue.severity == "error" for issue in issues)
    print(f"{errors} errors, {len(issues) - errors} warnings" if issues else "no issues found")
    return int(errors > 0)


# What only D4RL's files take.
_D4RL_OPTIONS: dict[str, Any] = {
    "transforms": [],
    "extras": [],
    "keep_partial": True,
    "data_dir": None,
    "dataset": None,
    "max_episode_steps": None,
}
# Which episodes and rows, for every format.
_WHICH: dict[str, Any] = {
    "max_episodes": None,
    "exclude": None,
    "keep": None,
    "allow_missing": False,
    "overwrite": False,
}
_LISTS = ("obs", "action", "fields", "transforms", "extras", "exclude", "keep")


def _convert(arguments: Sequence[str]) -> int:
    from diffpolicy.data.conversion import convert

    defaults: dict[str, Any] = {
        "format": "auto",
        "obs": None,
        "action": None,
        "fields": {},
        "env": None,
        **_WHICH,
        **_D4RL_OPTIONS,
    }
    options = parse(arguments, ["source", "target"], defaults)
    options |= {name: flow_value(options[name]) for name in _LISTS}
    if not isinstance(options["fields"], dict):
        raise ConfigError(
            f"fields is a table: fields={{NAME: [SOURCE, SOURCE]}}; got {options['fields']!r}"
        )
    if _is_d4rl(options["source"], options["format"]):
        return _convert_d4rl(options)
    needless = [name for name, value in _D4RL_OPTIONS.items() if options[name] != value]
    if needless:
        raise ConfigError(f"{', '.join(needless)}: only for D4RL; {options['source']} is none")
    fields: dict[str, Any] = dict(options["fields"])
    fields |= {n: options[n] for n in ("obs", "action") if options[n] is not None}
    attrs: Mapping[str, Any] = {"env_id": options["env"]} if options["env"] else {}
    store = convert(
        options["source"],
        options["target"],
        format=options["format"],
        fields=fields,
        transform=_observation_of(options["env"]),
        attrs=attrs,
        **{name: options[name] for name in _WHICH},
    )
    _print_store(options["target"], store)
    return 0


def flow_value(value: Any) -> Any:
    """A list or table as `--help` writes it, `[a,b]` or `{a: [b,c]}`, without JSON's quotes.

    Raises:
        ConfigError: It begins like one, but is none.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:  # the grammar of every other list at the command line
        return OverridesParser.create().parse_override(f"value={value}").value()
    except HydraException:
        raise ConfigError(
            f"{value} is no list or table; write [a,b] or {{a: [b,c]}}, in quotes for the shell"
        ) from None


def _print_store(target: str, store: Any) -> None:
    shapes = {name: field.shape for name, field in store.fields.items()}
    print(f"{target}: {store.num_episodes} episodes, {store.num_steps} steps, {shapes}")


def _is_d4rl(source: str, format: str) -> bool:
    """Whether to read `source` as a D4RL file, or as the id of one."""
    from diffpolicy.data.d4rl.catalogue import DATASETS
    from diffpolicy.data.formats import get_format

    if format != "auto" or not Path(source).exists():
        # A word that is no file may be meant for an id: the error then names the nearest ones.
        word = len(Path(source).parts) == 1 and not Path(source).suffix
        near = difflib.get_close_matches(source, DATASETS, n=1, cutoff=0.75) if word else []
        return format == "d4rl" or (format == "auto" and bool(near))
    if Path(source).suffix not in (".hdf5", ".h5"):
        return False
    return get_format("auto", Path(source))[0] == "d4rl"


def _convert_d4rl(options: Mapping[str, Any]) -> int:
    from diffpolicy.data.d4rl.file import load_d4rl

    for name in ("obs", "action", "fields"):
        if options[name]:
            raise ConfigError(
                f"{name}={options[name]}: D4RL files say what 'obs' and 'action' are; leave it. "
                "Further fields: extras=[infos/qpos]"
            )
    for name in ("transforms", "extras"):
        if not isinstance(options[name], list):
            raise ConfigError(f"{name} is a list: {name}=[{options[name]}]")
    how = ("data_dir", "dataset", "transforms", "keep_partial", "max_episode_steps")
    with load_d4rl(options["source"], **{name: options[name] for name in how}) as file:
        store = file.to_store(
            options["target"],
            extras=options["extras"],
            attrs={"env_id": options["env"]} if options["env"] else {},
            **{name: options[name] for name in _WHICH},
        )
    for text in store.attrs["notes"]:
        print(text)
    _print_store(options["target"], store)
    return 0


def _d4rl(arguments: Sequence[str]) -> int:
    from diffpolicy.data.d4rl.catalogue import DATASETS, lookup
    from diffpolicy.data.d4rl.location import datasets_dir, scan

    named = bool(arguments) and "=" not in arguments[0]
    options = parse(arguments[named:], [], {"data_dir": None})
    pattern = arguments[0] if named else "*"
    pattern = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
    chosen = [info for name, info in DATASETS.items() if fnmatch.fnmatchcase(name, pattern)]
    if not chosen:
        lookup(arguments[0])
    found = {path.name: path for path in reversed(scan(options["data_dir"]))}
    width = max(len(info.id) for info in chosen)
    print(f"{'id':<{width}}  steps  {'score 0':>12}  {'score 100':>12}  file")
    for info in chosen:
        scores = [
            f"{r:12.6g}" if r is not None else f"{'-':>12}" for r in (info.ref_min, info.ref_max)
        ]
        place = str(found.get(info.file, f"{info.file} (not found)"))
        print(f"{info.id:<{width}}  {info.max_episode_steps:>5}  {'  '.join(scores)}  {place}")
    here = sum(info.file in found for info in chosen)
    print(f"{len(chosen)} datasets, {here} of them in {datasets_dir(options['data_dir'])}")
    return 0


def _observation_of(env_id: str | None) -> Any:
    """The environment's map from recorded states to observations, if it has one."""
    if env_id is None:
        return None
    from diffpolicy.rollout.env_spec import EnvSpec

    env = EnvSpec(env_id).make()
    try:
        return env.get_wrapper_attr("observation_from_state")
    except AttributeError:
        return None
    finally:
        env.close()


def _collect(arguments: Sequence[str]) -> int:
    from diffpolicy.rollout.env_spec import EnvSpec
    from diffpolicy.rollout.pool.workers import Workers
    from diffpolicy.rollout.record.experts import collect

    defaults: dict[str, Any] = {
        "env": None,
        "episodes": 200,
        "seed": 0,
        "noise": 0.15,
        "keep": "success",
        "num_workers": None,
        "kwargs": {},
        "max_episode_steps": None,
    }
    options = parse(arguments, ["target"], defaults)
    if options["env"] is None:
        raise ConfigError(
            "collect needs env=ID, for example env=diffpolicy_envs:diffpolicy/FetchPush-v0"
        )
    seeds = range(options["seed"], options["seed"] + options["episodes"])
    store = collect(
        EnvSpec(options["env"], options["kwargs"], options["max_episode_steps"]),
        seeds,
        options["target"],
        workers=Workers(num_envs=16, num_workers=options["num_workers"]),
        noise=float(options["noise"]),
        keep=options["keep"],
    )
    print(f"{options['target']}: {store.num_episodes} episodes, {store.num_steps} steps")
    return 0
