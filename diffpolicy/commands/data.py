"""`diffpolicy data`: info, check, convert, filter, split, merge; demonstrations; preferences."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands import demonstrations, prefs
from diffpolicy.commands.options import Option, options_help, parse, subcommand
from diffpolicy.config_compose import is_setting
from diffpolicy.settings import ConfigError

CHECK = {
    "action_low": Option(None, "least value of each action dimension, as a list"),
    "action_high": Option(None, "largest value of each action dimension"),
}
# Which episodes and rows, for every format.
WHICH = {
    "overwrite": Option(False, "replace the store that is at TARGET"),
    "max_episodes": Option(None, "so many at the most"),
    "exclude": Option(
        None,
        "episodes, as for keep, or failed_check: all that cannot be stored or that `data check` "
        "would name",
    ),
    "keep": Option(
        None,
        "one of these, or a list of them: 3, 3..7, demo_3 (the text of an attribute), success=true "
        "or length<50 (a condition on one; quote it for the shell), mask:train (a filter key of "
        "robomimic's, a split of LeRobot's, or a flag of each episode)",
    ),
    "allow_missing": Option(False, "read chunks that are not there as zeros"),
}
KEPT = {"fields": Option(None, "only these fields, [obs,action]"), "overwrite": WHICH["overwrite"]}
FILTER = {name: WHICH[name] for name in ("exclude", "keep", "max_episodes")} | KEPT
SPLIT = {
    "keep": Option(None, "the episodes of OUT_A, as above; those of OUT_B are the others"),
    "fraction": Option(None, "or the share of them that OUT_A gets, drawn by the seed"),
    "seed": Option(0, "of that draw"),
    **KEPT,
}
FIELDS = {
    "format": Option(
        "auto", "minari or lerobot for an id of theirs; lerobot also writes a store of ours as one"
    ),
    "env": Option(
        None,
        "pass the observation through this environment's own observation_from_state, so that the "
        "data hold what the policy will see (of D4RL's data it is only recorded)",
    ),
    "obs": Option(
        None,
        "NAME, or a list [a,b] that is concatenated, but for images; null: cameras and state, "
        "found by their names. By name: obs.camera=img obs.hand=state[:2]",
    ),
    "action": Option(None, "likewise"),
    "task": Option(
        "auto",
        "what fills obs.task with ids of instructions: a field, or what is said of each episode; "
        "auto: LeRobot's column, where it tells several apart; null: nothing",
    ),
    "task_encoder": Option(
        None, "makes vectors of them: MODULE:FUNCTION, or sentence-transformers/NAME"
    ),
    "fields": Option({}, "others, {reward: rewards, img: img}"),
}
D4RL = {
    "format": FIELDS["format"],
    "env": FIELDS["env"],
    "transforms": Option(
        [],
        "antmaze_reward (r - 1), reward_scale:X, reward_shift:X, normalize_reward (1000 / (max - "
        "min) of the returns), split_goals[:RADIUS] (one episode for each infos/goal, which is "
        "appended to obs)",
    ),
    "extras": Option([], "further fields, [infos/qpos,...]"),
    "keep_partial": Option(True, "keep the unfinished episode at the end of the file"),
    "data_dir": Option(None, "where the file of the id is"),
    "dataset": Option(None, "the id of a file that was renamed"),
    "max_episode_steps": Option(
        None,
        "the step limit of the environment of a file of your own without timeouts and "
        "next_observations",
    ),
}
LEROBOT = {
    "format": FIELDS["format"],
    "fps": Option(None, "steps a second, where the store does not say"),
    "lossless": Option(False, "keep every pixel, in films that fewer players show"),
    "overwrite": WHICH["overwrite"],
}


def help_text() -> str:
    """Return the text of `diffpolicy data --help`."""
    return f"""\
usage: diffpolicy data info STORE [--update-statistics]
       diffpolicy data check STORE [action_low=[...]] [action_high=[...]]
       diffpolicy data convert SOURCE TARGET [key=value] ...
       diffpolicy data filter STORE OUT [key=value] ...
       diffpolicy data split STORE OUT_A OUT_B keep=EPISODES | fraction=0.8 [key=value] ...
       diffpolicy data merge STORE STORE ... OUT [fields=[...]] [overwrite=true]
       diffpolicy data d4rl [PATTERN] [data_dir=DIR]
       diffpolicy data make NAME [out=STORE] [key=value] ... | --list [PATTERN]
       diffpolicy data collect TARGET env=ID [episodes=200] [key=value] ...
       diffpolicy data prefs collect | import | info | render | serve ...

info     fields, episodes, lengths and statistics; --update-statistics computes them anew.
check    looks at every value; names episode, row and fix for what is wrong. Exit status 1 if
         there are errors.
{options_help(CHECK, " " * 11)}
convert  makes a store from a Diffusion Policy replay buffer (zarr, directory or zip), a robomimic
         or D4RL HDF5 file, a Minari (HDF5) or LeRobot (Parquet) dataset, an npz file of arrays with
         episode_ends or of OGBench, or an id of D4RL's, Minari's or LeRobot's. What is left out is
         said, and so is what is doubtful.
{options_help(FIELDS | WHICH, " " * 11)}
         A D4RL id or file has settled fields; in place of obs, action and fields it takes
{options_help({n: o for n, o in D4RL.items() if n not in FIELDS}, " " * 11)}
         A store of ours is written as a LeRobot dataset of version 3.0 by format=lerobot and
{options_help({n: o for n, o in LEROBOT.items() if n not in FIELDS | WHICH}, " " * 11)}
         An interrupted conversion begins anew. For example
           diffpolicy data convert pusht_lowdim.zarr.zip data/pusht.zarr obs=state \\
             env=diffpolicy_envs:diffpolicy/PushT-v0
           diffpolicy data convert pusht_image.zarr.zip data/images.zarr obs.image=img \\
             obs.agent_pos=state[:2]
           diffpolicy data convert data/images.zarr pusht_lerobot format=lerobot fps=10
           diffpolicy data convert hopper-medium-v2 data/hopper.zarr
           diffpolicy data convert mine.hdf5 data/mine.zarr max_episode_steps=50
filter   makes a store of some episodes of another, bit for bit; what is left out is said, and kept
         in its attributes.
{options_help(FILTER, " " * 11)}
split    divides the episodes of a store over two.
{options_help(SPLIT, " " * 11)}
merge    makes a store of all episodes of several, which must have the same fields. For example
           diffpolicy data filter demos.zarr good.zarr 'exclude=[failed_check,length<20,3]'
           diffpolicy data split demos.zarr train.zarr test.zarr fraction=0.9
           diffpolicy data merge monday.zarr tuesday.zarr week.zarr
d4rl     the D4RL datasets whose id contains PATTERN (or matches it, with * and ?): file name, step
         limit, returns that score 0 and 100, and where the file is. Files belong into
         $D4RL_DATASET_DIR or ~/.d4rl/datasets; the d4rl package is not needed.
{demonstrations.help_text()}
prefs    preferences between stored segments: pairs from rollouts, labels of people, side-by-side
         clips, and a page to label on.

{prefs.help_text()}"""


def help_for(arguments: Sequence[str]) -> str:
    """Return what the help says of the subcommand that ``arguments`` begin with, or all of it."""
    name, text = arguments[0], help_text()
    if name == "prefs":
        return prefs.help_text()
    usage, _, rest = text.partition("\n\n")
    ways = [
        line[7:] for line in usage.split("\n") if line[7:].startswith(f"diffpolicy data {name} ")
    ]
    # A part begins with its name; what follows is indented.
    parts = re.split(r"\n(?=\S)", rest)
    found = [part for part in parts if part.split(maxsplit=1)[:1] == [name]]
    return "usage: " + "\n       ".join(ways) + "\n\n" + found[0] if found else text


def run(arguments: Sequence[str]) -> int:
    """Dispatch to the subcommand."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "info": _info,
        "check": _check,
        "convert": _convert,
        "filter": _filter,
        "split": _split,
        "merge": _merge,
        "d4rl": _d4rl,
        "make": demonstrations.make,
        "collect": demonstrations.collect,
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

    options = parse(arguments, ["store"], CHECK)
    if not Path(options["store"]).exists():
        raise ConfigError(f"no store at {options['store']}")
    issues = check_store(options.pop("store"), **options)
    for issue in issues:
        print(format_issue(issue))
    errors = sum(issue.severity == "error" for issue in issues)
    print(f"{errors} errors, {len(issues) - errors} warnings" if issues else "no issues found")
    return int(errors > 0)


def _convert(arguments: Sequence[str]) -> int:
    names = ["source", "target"]
    named = [a for a in arguments if a.removeprefix("--").startswith("obs.")]
    rest = [a for a in arguments if a not in named]
    options = parse(rest, names, FIELDS | D4RL | WHICH | LEROBOT)
    # Once more, as the options of the other kind of source are none of this one's.
    if options["format"] == "lerobot" and _is_zarr(options["source"]):
        return _written(parse(arguments, names, LEROBOT))
    if _is_d4rl(options["source"], options["format"]):
        store = _converted_d4rl(parse(arguments, names, D4RL | WHICH))
    else:
        options = parse(rest, names, FIELDS | WHICH)
        observed = dict.fromkeys(a.removeprefix("--").partition("=")[0] for a in named)
        store = _converted(options, parse(named, [], observed))
    for text in store.attrs.get("notes", ()):
        print(text)
    return _print_made(store)


def _print_made(*stores: Any) -> int:
    for store in stores:
        shapes = {name: field.shape for name, field in store.fields.items()}
        print(f"{store.name}: {store.num_episodes} episodes, {store.num_steps} steps, {shapes}")
        kinds = ("left_out", "unread", "left_out_episodes")
        lacks = {kind: list(store.attrs[kind]) for kind in kinds if kind in store.attrs}
        lacks |= {k: [*v[:8], f"{len(v) - 8} more"] for k, v in lacks.items() if len(v) > 9}
        print(f"left out: {json.dumps(lacks) if lacks else 'nothing'}")
    return 0


def _filter(arguments: Sequence[str]) -> int:
    from diffpolicy.data.remaking import filtered

    options = parse(arguments, ["store", "out"], FILTER)
    return _print_made(filtered(options.pop("store"), options.pop("out"), **options))


def _split(arguments: Sequence[str]) -> int:
    from diffpolicy.data.remaking import halved

    options = parse(arguments, ["store", "out_a", "out_b"], SPLIT)
    places = [options.pop(name) for name in ("store", "out_a", "out_b")]
    return _print_made(*halved(*places, **options))


def _merge(arguments: Sequence[str]) -> int:
    from diffpolicy.data.remaking import merged

    stores = [a for a in arguments if not is_setting(a)]
    if len(stores) < 3:
        raise ConfigError("merge takes two stores at least, and behind them the one to make")
    options = parse([a for a in arguments if is_setting(a)], [], KEPT)
    return _print_made(merged(stores[:-1], stores[-1], **options))


def _is_zarr(source: str) -> bool:
    from diffpolicy.data.formats.replay_zarr import ReplayBuffer

    path = Path(source)
    return path.suffix == ".zarr" or (path.exists() and ReplayBuffer.matches(path))


def _written(options: dict[str, Any]) -> int:
    from diffpolicy.data.formats.lerobot_writer import write_lerobot

    how = {name: options[name] for name in ("fps", "lossless", "overwrite")}
    made = write_lerobot(_open(options["source"]), options["target"], **how)
    print(f"{made.path}: {made.episodes} episodes, {made.steps} steps, {made.fps:g} a second")
    for name, quality in made.psnr.items():
        print(f"{name}: {quality:.2f} dB")
    print(f"left out: {json.dumps(dict(made.left_out)) if made.left_out else 'nothing'}")
    return 0


def _converted(options: dict[str, Any], observed: dict[str, Any]) -> Any:
    from diffpolicy.data.conversion import convert

    if not isinstance(options["fields"], dict):
        raise ConfigError(
            f"fields is a table: fields={{NAME: [SOURCE, SOURCE]}}; got {options['fields']!r}"
        )
    main = {name: options[name] for name in ("obs", "action") if options[name] is not None}
    return convert(
        options["source"],
        options["target"],
        format=options["format"],
        fields=options["fields"] | main | observed,
        transform=_observation_of(options["env"]),
        attrs={"env_id": options["env"]} if options["env"] else {},
        **{name: options[name] for name in ("task", "task_encoder", *WHICH)},
    )


def _converted_d4rl(options: dict[str, Any]) -> Any:
    from diffpolicy.data.d4rl.file import load_d4rl

    for name in ("transforms", "extras"):
        if not isinstance(options[name], list):
            raise ConfigError(f"{name} is a list: {name}=[{options[name]}]")
    how = ("data_dir", "dataset", "transforms", "keep_partial", "max_episode_steps")
    with load_d4rl(options["source"], **{name: options[name] for name in how}) as file:
        return file.to_store(
            options["target"],
            extras=options["extras"],
            attrs={"env_id": options["env"]} if options["env"] else {},
            **{name: options[name] for name in WHICH},
        )


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

    name = "observation_from_state"
    with contextlib.closing(EnvSpec(env_id).make()) as env:
        return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None
