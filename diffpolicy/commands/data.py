"""`diffpolicy data`: info, check, convert or collect episode stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import parse
from diffpolicy.config import ConfigError


def help_text() -> str:
    """The text of `diffpolicy data --help`."""
    return """\
usage: diffpolicy data info STORE [--update-statistics]
       diffpolicy data check STORE [action_low=[...]] [action_high=[...]]
       diffpolicy data convert SOURCE TARGET [obs=FIELD] [action=FIELD] [env=ID] [key=value] ...
       diffpolicy data collect TARGET env=ID [episodes=200] [key=value] ...

info     fields, episodes, lengths and statistics; --update-statistics computes them anew.
check    looks at every value; names episode, row and fix for what is wrong. Exit status 1 if
         there are errors.
convert  makes a store from a Diffusion Policy replay buffer (zarr, directory or zip) or a robomimic
         HDF5 file. Options: format=auto, max_episodes=null, overwrite=false; obs and action name
         source fields (a list concatenates). With env=ID the observation is passed through that
         environment's own observation_from_state, so that the data hold what the policy will see:
           diffpolicy data convert pusht_lowdim.zarr.zip data/pusht.zarr obs=state \\
             env=diffpolicy_envs:diffpolicy/PushT-v0
collect  records demonstrations of the environment's scripted expert; continues an interrupted
         collection. Options: seed=0, noise=0.15 (executed; the clean action is stored),
         keep=success (or all), num_workers=null."""


def run(arguments: Sequence[str]) -> int:
    """Dispatch to the subcommand."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "info": _info,
        "check": _check,
        "convert": _convert,
        "collect": _collect,
    }
    if not arguments or arguments[0] not in commands:
        raise ConfigError(f"expected one of {sorted(commands)}; see `diffpolicy data --help`")
    return commands[arguments[0]](arguments[1:])


def _open(path: str) -> Any:
    from diffpolicy.data.store import EpisodeStore

    if not Path(path).exists():
        raise ConfigError(f"no store at {path}")
    return EpisodeStore.open(path)


def _info(arguments: Sequence[str]) -> int:
    from diffpolicy.data.check import info

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


def _convert(arguments: Sequence[str]) -> int:
    from diffpolicy.data.conversion import convert

    defaults: dict[str, Any] = {
        "format": "auto",
        "obs": None,
        "action": None,
        "env": None,
        "max_episodes": None,
        "overwrite": False,
    }
    options = parse(arguments, ["source", "target"], defaults)
    fields: dict[str, Any] = {n: options[n] for n in ("obs", "action") if options[n] is not None}
    attrs: Mapping[str, Any] = {"env_id": options["env"]} if options["env"] else {}
    store = convert(
        options["source"],
        options["target"],
        format=options["format"],
        fields=fields,
        transform=_observation_of(options["env"]),
        max_episodes=options["max_episodes"],
        attrs=attrs,
        overwrite=bool(options["overwrite"]),
    )
    shapes = {name: field.shape for name, field in store.fields.items()}
    print(f"{options['target']}: {store.num_episodes} episodes, {store.num_steps} steps, {shapes}")
    return 0


def _observation_of(env_id: str | None) -> Any:
    """The environment's map from recorded states to observations, if it has one."""
    if env_id is None:
        return None
    from diffpolicy.rollout.spec import EnvSpec

    env = EnvSpec(env_id).make()
    try:
        return env.get_wrapper_attr("observation_from_state")
    except AttributeError:
        return None
    finally:
        env.close()


def _collect(arguments: Sequence[str]) -> int:
    from diffpolicy.rollout.collect import collect
    from diffpolicy.rollout.spec import EnvSpec
    from diffpolicy.rollout.vector import Workers

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
