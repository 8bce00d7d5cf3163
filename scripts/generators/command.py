"""`python scripts/generate.py`: datasets of our own in the HDF5 layout of D4RL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import parse, subcommand
from diffpolicy.settings import ConfigError


def help_text() -> str:
    """The text of `python scripts/generate.py --help`."""
    return """\
usage: python scripts/generate.py pointmaze TARGET.hdf5 [key=value] ...
       python scripts/generate.py mujoco TARGET.hdf5 env=HalfCheetah-v4 level=medium [key=value] ...
       python scripts/generate.py rollouts TARGET.hdf5 sources=["medium.hdf5","expert.npz"]

Files in D4RL's HDF5 layout, the same for the same seed. A run that was killed goes on when it is
started again with the same options. Their scores are not comparable with D4RL's tables.

pointmaze  a ball driven from goal to goal, as in maze2d: the last row of every trip is at its goal
           and has reward 1. env=diffpolicy_envs:diffpolicy/PointMazeUMaze-v0 (Medium, Large),
           steps=200000, seed=0, noise=0.1 (of the action), episode_steps=null (the environment's
           limit, after which the ball starts at rest), controller={"kp":5,"kd":1,"speed":4}.
mujoco     level=random, medium, medium-replay or expert, by training an agent of
           Stable-Baselines3: algorithm=sac (or tqc, of sb3-contrib), train_steps=1000000,
           options={} (of the algorithm), device=cpu. Medium is the first checkpoint whose measured
           return is above target_return, or above fraction=0.3333 of expert_return; medium-replay
           is all that was gathered up to there. segment_steps=10000 from checkpoint to checkpoint,
           eval_episodes=5, training=FOLDER shares one training between levels
           (TARGET.training when absent). agent=PATH takes a trained actor instead: an .npz of its
           layers or a .zip of Stable-Baselines3, of which nothing is unpickled.
           steps=100000, seed=0, std_scale=1 (0: deterministic actions), kwargs={},
           max_episode_steps=null.
rollouts   joins files episode by episode: medium-expert is the medium file and the expert's.
           sources: .npz (observations, actions, rewards, terminals, episode_ends) or .hdf5."""


def run(arguments: Sequence[str]) -> int:
    """Dispatch to the subcommand."""
    commands: dict[str, Callable[[Sequence[str]], Path]] = {
        "pointmaze": _pointmaze,
        "mujoco": _mujoco,
        "rollouts": _rollouts,
    }
    _report(subcommand(arguments, commands, "generate")(arguments[1:]))
    return 0


def _report(path: Path) -> None:
    from generators.rollouts import read_rollouts, summary

    arrays, attrs = read_rollouts(path)
    facts = summary(arrays)
    print(
        f"{path}: {facts['steps']} steps, {facts['episodes']} episodes, return "
        f"{facts['return_mean']:.2f} +- {facts['return_std']:.2f}"
    )
    for name in ("trip_length_quantiles", "checkpoint", "sources"):
        if name in attrs:
            print(f"  {name}: {attrs[name]}")


def _pointmaze(arguments: Sequence[str]) -> Path:
    from diffpolicy.rollout.env_spec import EnvSpec
    from generators.pointmaze import MazeRun, generate_pointmaze

    defaults: dict[str, Any] = {
        "env": "diffpolicy_envs:diffpolicy/PointMazeUMaze-v0",
        "steps": 200_000,
        "seed": 0,
        "noise": 0.1,
        "episode_steps": None,
        "controller": {},
        "kwargs": {},
    }
    options = parse(arguments, ["target"], defaults)
    run_ = MazeRun(
        EnvSpec(options["env"], _mapping(options, "kwargs")),
        steps=int(options["steps"]),
        seed=int(options["seed"]),
        noise=float(options["noise"]),
        episode_steps=options["episode_steps"],
        controller=dict(_mapping(options, "controller")),
    )
    return generate_pointmaze(run_, options["target"])


def _rollouts(arguments: Sequence[str]) -> Path:
    from generators.rollouts import generate_rollouts

    options = parse(arguments, ["target"], {"sources": []})
    sources = options["sources"]
    if isinstance(sources, str):  # a.npz, or [a.npz,b.npz] with the quotes eaten by the shell
        sources = [name.strip() for name in sources.strip("[]").split(",") if name.strip()]
    return generate_rollouts(sources, options["target"])


def _mujoco(arguments: Sequence[str]) -> Path:
    from diffpolicy.rollout.env_spec import EnvSpec
    from generators.mujoco import Checkpoint, LevelRun, generate_level
    from generators.training import Training

    defaults: dict[str, Any] = {
        **{"env": None, "kwargs": {}, "max_episode_steps": None, "level": None},
        **{"steps": 100_000, "seed": 0, "std_scale": 1.0, "agent": None, "training": None},
        **{"algorithm": "sac", "train_steps": 1_000_000, "segment_steps": 10_000, "options": {}},
        **{"eval_episodes": 5, "device": "cpu"},
        **{"expert_return": None, "fraction": 1 / 3, "target_return": None},
    }
    options = parse(arguments, ["target"], defaults)
    for name, example in (("env", "HalfCheetah-v4"), ("level", "medium")):
        if options[name] is None:
            raise ConfigError(f"mujoco needs {name}=, for example {name}={example}")
    spec = EnvSpec(options["env"], _mapping(options, "kwargs"), options["max_episode_steps"])
    training = Training(
        spec,
        algorithm=options["algorithm"],
        seed=int(options["seed"]),
        segment_steps=int(options["segment_steps"]),
        eval_episodes=int(options["eval_episodes"]),
        options=_mapping(options, "options"),
        device=options["device"],
    )
    target_return = options["target_return"]
    if target_return is None and options["expert_return"] is not None:
        target_return = float(options["fraction"]) * float(options["expert_return"])
    run_ = LevelRun(
        options["level"],
        training,
        Checkpoint(int(options["train_steps"]), target_return),
        steps=int(options["steps"]),
        std_scale=float(options["std_scale"]),
        agent=options["agent"],
        folder=options["training"],
    )
    return generate_level(run_, options["target"])


def _mapping(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = options[name]
    if not isinstance(value, Mapping):
        raise ConfigError(f'{name} must be a JSON object such as {{"a": 1}}, got {value!r}')
    return value
