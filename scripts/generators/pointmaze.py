"""A ball that goes from goal to goal through a maze, as in D4RL's maze2d (Fu et al. 2020).

One continuing run: a goal that is reached is replaced by another, and the maze is reset only at the
time limit. Rows follow D4RL: action, goal and reward belong to the observation of the row, so that
the last row of every trip lies at its goal and has reward 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from diffpolicy.rollout.env_spec import EnvSpec, describe
from generators.layout import NOT_COMPARABLE, Arrays, write_d4rl
from generators.parts import Parts, beside, episode_seed

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CONTROLLER = {"kp": 5.0, "kd": 1.0, "speed": 4.0}
_FIELDS = (
    "observations", "actions", "rewards", "terminals", "timeouts",
    "infos/goal", "infos/qpos", "infos/qvel",
)  # fmt: skip


@dataclass(frozen=True)
class MazeRun:
    """What a run through a maze depends on.

    Args:
        env: a point maze that ships an expert; see :func:`generate_pointmaze`.
        steps: rows at least; the last episode is carried on to a goal.
        seed: of everything. Seeds 0..9 share no start and no noise.
        noise: standard deviation of the Gaussian noise added to the expert's action, in units of
            the action; what is executed (clipped) is stored.
        episode_steps: time limit, after which the ball starts anew and at rest; None takes that of
            the environment. The episode ends with the first goal reached after it.
        trip_steps: most steps from goal to goal before the expert is said to be stuck.
        controller: gains of the expert that differ from kp 5, kd 1 and speed 4 m/s, with which the
            ball goes round corners without stopping; an argument of the environment.

    Raises:
        ValueError: a number that is not positive, or negative noise.
    """

    env: EnvSpec
    steps: int = 200_000
    seed: int = 0
    noise: float = 0.1
    episode_steps: int | None = None
    trip_steps: int = 5_000
    controller: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "controller", {**_CONTROLLER, **self.controller})
        for name in ("steps", "episode_steps", "trip_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if not self.noise >= 0:
            raise ValueError(f"noise must be 0 or more, got {self.noise}")

    def continuing(self) -> EnvSpec:
        """The environment with its goals replaced as they are reached and the run's time limit."""
        kwargs = {"stop_at_goal": False, "new_goals": True, "controller": self.controller}
        return replace(
            self.env,
            kwargs={**self.env.kwargs, **kwargs},
            max_episode_steps=self.limit() + self.trip_steps + 1,
        )

    def limit(self) -> int:
        """The time limit: ``episode_steps``, or the environment's own."""
        return self.episode_steps or describe(self.env).max_episode_steps

    def settings(self) -> dict[str, Any]:
        """What the episodes depend on, as JSON values."""
        return {
            "kind": "pointmaze",
            "env": self.continuing().to_dict(),
            "steps": self.steps,
            "seed": self.seed,
            "noise": self.noise,
            "episode_steps": self.limit(),
            "controller": dict(self.controller),
        }


def generate_pointmaze(run: MazeRun, target: str | Path, *, progress: bool = True) -> Path:
    """Drives the maze's own expert from goal to goal and writes a file in D4RL's layout.

    Fields: ``observations`` ``[T, 4]`` (x, y in m, velocities in m/s), ``actions`` ``[T, 2]``,
    ``rewards`` (1 where the observation is at the row's goal), ``terminals`` (all False),
    ``timeouts`` (where the maze was reset), ``infos/goal`` ``[T, 2]``, ``infos/qpos``,
    ``infos/qvel``. An interrupted run goes on when it is called again: episode ``e`` depends on the
    seed and on ``e`` alone, so the file is the same.

    Args:
        run: environment, size, seed, noise. The environment ships ``expert_action(rng)``,
            ``simulator_state()`` and ``GOAL_ENTRIES``, and takes ``stop_at_goal``, ``new_goals``
            and ``controller``, as ``diffpolicy_envs:diffpolicy/PointMazeUMaze-v0`` does.
        target: the file.
        progress: whether to show a bar.

    Returns:
        The path.

    Raises:
        EnvSpecError: the environment cannot be made.
        FileExistsError: the target exists.
        ValueError: the environment has no such expert, parts were begun with other settings, or
            the expert did not reach a goal in ``trip_steps``.
    """
    path, run = Path(target), replace(run, episode_steps=run.limit())
    spec = run.continuing()
    parts = Parts(beside(path), run.settings())
    labels = describe(spec).labels()
    env = spec.make()
    try:
        for name in ("expert_action", "simulator_state", "GOAL_ENTRIES"):
            if not env.has_wrapper_attr(name):
                raise ValueError(f"{spec.id!r} is no maze with an expert: it has no {name}")
        done = parts.steps()
        with tqdm(
            total=run.steps, initial=done, desc="pointmaze", unit="step", disable=not progress
        ) as bar:
            while done < run.steps:
                episode = _episode(env, run, len(parts), min(run.limit(), run.steps - done))
                parts.append(episode)
                done += len(episode["rewards"])
                bar.update(len(episode["rewards"]))
    finally:
        env.close()
    arrays = parts.joined()
    lengths = trip_lengths(arrays)
    attrs = {
        "env_id": spec.id,
        "env": labels,
        "versions": labels["versions"],
        **{k: v for k, v in run.settings().items() if k not in ("env", "kind")},
        "trips": len(lengths),
        "trip_length_quantiles": _quantiles(lengths),
        "reward_convention": "of the observation in the row: 1 within 0.45 m of infos/goal",
        "note": NOT_COMPARABLE,
    }
    write_d4rl(path, arrays, attrs)
    parts.remove()
    return path


def trip_lengths(arrays: Arrays) -> NDArray[np.int64]:
    """Rows of each trip: from the row after a goal was reached to the one at the next.

    Args:
        arrays: ``rewards`` and ``timeouts`` as :func:`generate_pointmaze` writes them.

    Returns:
        Integers ``[trips]``.
    """
    ends = np.flatnonzero((arrays["rewards"] > 0) | arrays["timeouts"])
    return np.diff(ends, prepend=-1).astype(np.int64)


def _quantiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    values = np.quantile(lengths, QUANTILES)
    return {f"{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}


def _episode(env: gym.Env[Any, Any], run: MazeRun, index: int, steps: int) -> Arrays:
    """One episode: ``steps`` rows, and those to the goal that the ball is then heading for."""
    rng = np.random.default_rng([run.seed, index])
    observation, info = env.reset(seed=episode_seed(run.seed, index))
    while info.get("is_success"):  # a trip needs a way to go
        observation, info = env.reset()
    expert, state = (env.get_wrapper_attr(name) for name in ("expert_action", "simulator_state"))
    first, after = env.get_wrapper_attr("GOAL_ENTRIES")
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    rows: dict[str, list[Any]] = {name: [] for name in _FIELDS}
    arrived, trip = False, 0
    while True:
        clean = expert(rng)
        noise = run.noise * rng.standard_normal(clean.shape)
        action = np.clip(clean + noise, low, high).astype(np.float32)
        values = state()
        row = (
            np.delete(observation, slice(first, after)), action, float(arrived), False, False,
            observation[first:after].copy(), values["qpos"], values["qvel"],
        )  # fmt: skip
        for name, value in zip(_FIELDS, row, strict=True):
            rows[name].append(value)
        if arrived and len(rows["rewards"]) >= steps:
            break
        trip = 1 if arrived else trip + 1
        if trip > run.trip_steps:
            raise ValueError(
                f"the expert did not reach its goal in {run.trip_steps} steps (seed {run.seed}, "
                f"episode {index}); choose smaller noise or other gains"
            )
        observation, reward, _, _, _ = env.step(action)
        arrived = float(reward) > 0
    rows["timeouts"][-1] = True
    kinds = {"rewards": np.float32, "terminals": np.bool_, "timeouts": np.bool_}
    return {name: np.asarray(value, kinds.get(name)) for name, value in rows.items()}
