"""Random, medium, medium-replay and expert data of a trained agent, named by measured returns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpolicy.rollout.env_spec import describe
from generators.agents import load_actor
from generators.collecting import collect_into
from generators.layout import NOT_COMPARABLE, write_d4rl
from generators.parts import Parts, beside
from generators.rollouts import summary
from generators.training import Agent, Training

LEVELS = ("random", "medium", "medium-replay", "expert")


@dataclass(frozen=True)
class Checkpoint:
    """Which checkpoint of a training the data come from.

    Args:
        train_steps: most steps of training; the expert is the checkpoint after them.
        target_return: medium is the first checkpoint whose measured mean return is above it. D4RL
            takes about a third of the expert's.

    Raises:
        ValueError: ``train_steps`` is negative.
    """

    train_steps: int = 1_000_000
    target_return: float | None = None

    def __post_init__(self) -> None:
        if self.train_steps < 0:
            raise ValueError(f"train_steps must be 0 or more, got {self.train_steps}")


@dataclass(frozen=True)
class LevelRun:
    """What a dataset of an agent depends on.

    Args:
        level: ``"random"`` (the untrained agent), ``"medium"``, ``"medium-replay"`` (all that was
            gathered up to the medium checkpoint) or ``"expert"``. With ``agent`` a label alone.
        training: environment, algorithm and seed.
        checkpoint: which of its checkpoints.
        steps: rows at least; only whole episodes are stored. Not used by medium-replay.
        std_scale: factor of the policy's standard deviation; 0 is deterministic.
        agent: a trained actor to take instead, see
            :func:`~generators.agents.load_actor`.
        folder: of the training, to share it between levels; None: ``TARGET.training``.

    Raises:
        ValueError: an unknown level, one that needs a target return or a training and has none, or
            numbers out of range.
    """

    level: str
    training: Training
    checkpoint: Checkpoint
    steps: int = 100_000
    std_scale: float = 1.0
    agent: str | os.PathLike[str] | None = None
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.level == "medium-expert":
            raise ValueError(
                "medium-expert is the medium file and the expert's: make both, then run `python "
                "scripts/generate.py rollouts TARGET.hdf5 sources=[medium.hdf5,expert.hdf5]`"
            )
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {list(LEVELS)}, got {self.level!r}")
        if self.agent is not None and self.level in ("random", "medium-replay"):
            raise ValueError(f"level={self.level} comes from a training; leave agent out")
        chosen = self.agent is None and self.level.startswith("medium")
        if chosen and self.checkpoint.target_return is None:
            raise ValueError(
                f"{self.level} is named by a measured return: give target_return=, or "
                "expert_return= (what level=expert measured) and fraction="
            )
        if self.steps < 1 or not self.std_scale >= 0:
            raise ValueError(
                f"steps must be at least 1 and std_scale 0 or more, got {self.steps} and "
                f"{self.std_scale}"
            )


def generate_level(run: LevelRun, target: str | Path, *, progress: bool = True) -> Path:
    """Trains or loads an agent and writes its episodes in D4RL's layout.

    Fields: ``observations``, ``actions``, ``rewards``, ``terminals``, ``timeouts``,
    ``next_observations``, and MuJoCo's ``infos/qpos`` and ``infos/qvel`` (not of a replay). The
    file's attributes hold the measured return of its episodes, their number, the training and the
    checkpoint. Training and collecting go on where they stopped when called again.

    Args:
        run: what to make.
        target: the file.
        progress: whether to show bars.

    Returns:
        The path.

    Raises:
        FileExistsError: the target exists.
        ImportError: the algorithm's package or h5py is not installed.
        ValueError: no checkpoint reached the target return; parts or training were begun with
            other settings; the agent does not fit the environment.
    """
    path = Path(target)
    folder = beside(path)
    labels = describe(run.training.env).labels()
    attrs: dict[str, Any] = {
        "level": run.level,
        "env_id": run.training.env.id,
        "env": labels,
        "versions": labels["versions"],
        "seed": run.training.seed,
        "note": NOT_COMPARABLE,
    }
    agent, parts = None, None
    if run.agent is None:
        training_folder = run.folder or path.with_name(path.name + ".training")
        agent = Agent(run.training, training_folder)
        chosen = choose(agent, run, progress=progress)
        attrs |= {"training": run.training.settings(), "checkpoint": chosen}
        attrs |= {"train_steps": chosen["train_steps"]}
        if run.level.startswith("medium"):
            attrs["target_return"] = float(run.checkpoint.target_return or 0.0)
    else:
        attrs["agent"] = Path(run.agent).name
    if agent is not None and run.level == "medium-replay":
        if not chosen["index"]:
            raise ValueError(
                "the untrained agent is above the target return already, so there is no replay; "
                "give a higher target_return"
            )
        arrays = agent.replay(chosen["index"])
    else:
        parts = Parts(folder, {**_collecting(run), "checkpoint": attrs.get("checkpoint")})
        actor = _actor(run, agent, attrs)
        collect_into(
            parts,
            run.training.env,
            actor,
            steps=run.steps,
            seed=run.training.seed,
            std_scale=run.std_scale,
            progress=progress,
        )
        arrays = parts.joined()
        attrs["std_scale"] = run.std_scale
    write_d4rl(path, arrays, {**attrs, **summary(arrays)})
    if parts is not None:
        parts.remove()
    return path


def choose(agent: Agent, run: LevelRun, *, progress: bool = True) -> dict[str, Any]:
    """Trains as far as the level needs, and says which checkpoint is meant.

    Args:
        agent: the training; checkpoints it has already are used.
        run: level and target.
        progress: whether to show a bar.

    Returns:
        The checkpoint, as :meth:`~generators.training.Agent.advance` gives it.

    Raises:
        ValueError: no checkpoint within ``train_steps`` is above the target return.
    """
    wanted, index, best = run.checkpoint, 0, float("-inf")
    while True:
        if index == len(agent.checkpoints):
            agent.advance(progress=progress)
        checkpoint = agent.checkpoints[index]
        reached = checkpoint["train_steps"] >= wanted.train_steps
        best = max(best, checkpoint["return_mean"])
        if run.level == "random" or (run.level == "expert" and reached):
            return checkpoint
        target = wanted.target_return
        if run.level != "expert" and target is not None and checkpoint["return_mean"] > target:
            return checkpoint
        if reached:
            raise ValueError(
                f"no checkpoint within {wanted.train_steps} steps is above the target return "
                f"{target:g}; the best measured {best:.1f}. Train longer (the training is kept in "
                f"{agent.folder}) or give a lower target."
            )
        index += 1


def _actor(run: LevelRun, agent: Agent | None, attrs: dict[str, Any]) -> Any:
    if agent is not None:
        return agent.actor(attrs["checkpoint"]["index"])
    assert run.agent is not None
    info = describe(run.training.env)
    return load_actor(run.agent, info.action_low, info.action_high)


def _collecting(run: LevelRun) -> dict[str, Any]:
    return {
        "kind": "mujoco",
        "level": run.level,
        "env": run.training.env.to_dict(),
        "seed": run.training.seed,
        "steps": run.steps,
        "std_scale": run.std_scale,
        "agent": None if run.agent is None else Path(run.agent).name,
        "training": run.training.settings() if run.agent is None else None,
    }
