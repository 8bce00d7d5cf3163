"""`diffpolicy data make` and `data collect`: demonstrations by the environments' own experts."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from diffpolicy.commands.options import Option, options_help, parse
from diffpolicy.extras import installed
from diffpolicy.settings import ConfigError

COLLECT = {
    "env": Option(None, "the environment, such as diffpolicy_envs:diffpolicy/FetchPush-v0"),
    "episodes": Option(200, "how many"),
    "seed": Option(0, "of the first; each later one has the next seed"),
    "noise": Option(0.15, "added to what is executed; the clean action is stored"),
    "keep": Option("success", "or all"),
    "num_workers": Option(None, "processes; 0: none but this one"),
    "kwargs": Option({}, "of the environment"),
    "max_episode_steps": Option(None, "another step limit"),
}
MAKE = {
    "out": Option(None, "the store; null: data/NAME.zarr (with cameras: data/NAME_images.zarr)"),
    "episodes": Option(None, "how many are kept; null: as many as the recipe says"),
    "workers": Option(None, "processes, which change nothing in the set; 0: none but this one"),
    "cameras": Option(
        None, "images beside the vector: {front: 84}, or names of the model's cameras, [corner2]"
    ),
    "size": Option(None, "pixels a side, for a list of cameras; null: 96"),
    "kwargs": Option({}, "of the environment, beside those of the recipe"),
    "base": Option(None, "of a derived set: the store that it is made from"),
}


def help_text() -> str:
    """The part of `diffpolicy data --help` about these two."""
    return f"""\
make     makes a benchmark's data set from nothing, by the recipe of that name: the same values on
         every run, for any number of workers, and after having been killed. A datasheet beside the
         store says how it was made, how good the expert is, and its SHA-256. --list [PATTERN] shows
         what there is.
{options_help(MAKE, " " * 11)}
collect  records demonstrations of the environment's scripted expert; continues an interrupted
         collection.
{options_help(COLLECT, " " * 11)}"""


def make(arguments: Sequence[str]) -> int:
    """Make a data set, or list those that there are."""
    if "--list" in arguments:
        return _list([one for one in arguments if one != "--list"])
    from diffpolicy.rollout.record.datasheet import sheet_path
    from diffpolicy.rollout.record.making import default_path, make_set

    options = parse(arguments, ["name"], MAKE)
    kwargs, path = _with_cameras(options), options["out"]
    if path is None and options["cameras"] is not None:
        path = default_path(f"{options['name']}_images")
    how = {name: options[name] for name in ("episodes", "workers", "base")}
    store = make_set(options["name"], path, kwargs=kwargs, **how)
    assert store.path is not None
    print(f"{store.name}: {store.num_episodes} episodes, {store.num_steps} steps")
    print(sheet_path(store.path, ".md").read_text())
    return 0


def _with_cameras(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the environment that were asked for."""
    kwargs, cameras = options["kwargs"], options["cameras"]
    if not isinstance(kwargs, dict):
        raise ConfigError(f"kwargs is a table: kwargs={{NAME: VALUE}}; got {kwargs!r}")
    if options["size"] is not None and not isinstance(cameras, list):
        raise ConfigError("size is of a list of cameras, cameras=[corner2]; leave it out")
    if cameras is None:
        return kwargs
    if isinstance(cameras, list):
        size = 96 if options["size"] is None else options["size"]
        cameras = {name: {"size": size, "view": name} for name in cameras}
    if not isinstance(cameras, dict) or not cameras:
        raise ConfigError(
            "cameras is a table or a list: cameras={front: 84}, cameras=[corner2]; "
            f"got {cameras!r}"
        )
    return {**kwargs, "cameras": cameras}


def _list(arguments: Sequence[str]) -> int:
    from diffpolicy.rollout.declared import declared

    known = declared()
    pattern = parse(arguments, ["pattern"], {})["pattern"] if arguments else "*"
    pattern = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
    chosen = {n: r for n, r in known.recipes.items() if fnmatch.fnmatchcase(n, pattern)}
    if not chosen:
        raise ConfigError(
            f"no data set matches {pattern!r}; `diffpolicy data make --list` shows all"
        )
    width = max(map(len, chosen))
    print(f"{'name':<{width}}  episodes  minutes      MB  what it is")
    missing: dict[str, int] = {}
    for name, recipe in sorted(chosen.items()):
        lacks = _missing(known, name)
        for command in lacks:
            missing[command] = missing.get(command, 0) + 1
        base = "" if recipe.derived is None else f", made of {recipe.derived} (not counted here)"
        note = f"{base}{' (to be installed)' if lacks else ''}"
        size = f"{recipe.episodes:>8}  {recipe.minutes:>7g}  {recipe.megabytes:>6g}"
        print(f"{name:<{width}}  {size}  {recipe.about}{note}")
    print(f"{len(chosen)} sets; minutes are of one core")
    for command, count in missing.items():
        print(f"{count} of them need: {command}")
    for distribution, why in known.broken.items():
        print(f"what {distribution} declares cannot be read: {why}")
    return 0


def _missing(known: Any, name: str) -> list[str]:
    """The command that installs what a recipe needs, if anything of it is not there."""
    extra, source = known.recipes[name].extra, known.sources[name]
    for module, home in known.homes.items():
        if extra and home == (source, extra) and not installed(module):
            return [home.command]
    return []


def collect(arguments: Sequence[str]) -> int:
    """Record demonstrations of an environment's expert."""
    from diffpolicy.rollout.env_spec import EnvSpec
    from diffpolicy.rollout.pool.supervisor import Workers
    from diffpolicy.rollout.record.experts import collect as record

    options = parse(arguments, ["target"], COLLECT)
    if options["env"] is None:
        raise ConfigError(
            "collect needs env=ID, for example env=diffpolicy_envs:diffpolicy/FetchPush-v0"
        )
    seeds = range(options["seed"], options["seed"] + options["episodes"])
    store = record(
        EnvSpec(options["env"], options["kwargs"], options["max_episode_steps"]),
        seeds,
        options["target"],
        workers=Workers(num_envs=16, num_workers=options["num_workers"]),
        noise=float(options["noise"]),
        keep=options["keep"],
    )
    print(f"{options['target']}: {store.num_episodes} episodes, {store.num_steps} steps")
    return 0
