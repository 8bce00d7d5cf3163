"""Meta-World: 50 tasks of one robot arm, alone or several as one environment, with their experts.

The module can be imported without the simulator. Names of tasks are Meta-World's without the
version at their end: ``pick-place`` for ``pick-place-v3``.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.recipes import Recipe
from diffpolicy_envs.simulators import import_benchmark

GROUPS: dict[str, tuple[str, ...]] = {
    "easy": (
        "button-press",
        "button-press-topdown",
        "button-press-topdown-wall",
        "button-press-wall",
        "coffee-button",
        "dial-turn",
        "door-close",
        "door-lock",
        "door-open",
        "door-unlock",
        "drawer-close",
        "drawer-open",
        "faucet-close",
        "faucet-open",
        "handle-press",
        "handle-press-side",
        "handle-pull",
        "handle-pull-side",
        "lever-pull",
        "peg-unplug-side",
        "plate-slide",
        "plate-slide-back",
        "plate-slide-back-side",
        "plate-slide-side",
        "reach",
        "reach-wall",
        "window-close",
        "window-open",
    ),
    "medium": (
        "basketball",
        "bin-picking",
        "box-close",
        "coffee-pull",
        "coffee-push",
        "hammer",
        "peg-insert-side",
        "push-wall",
        "soccer",
        "sweep",
        "sweep-into",
    ),
    "hard": ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back"),
    "very hard": ("disassemble", "pick-place-wall", "shelf-place", "stick-pull", "stick-push"),
}
"""How difficult the tasks are to learn, as papers group them (Seo et al. 2022, and many since)."""

TASKS: tuple[str, ...] = tuple(sorted(name for names in GROUPS.values() for name in names))
"""The 50 tasks."""

SETS = ("MT10", "MT50")
"""The benchmark's own sets of tasks; the number of a task is its place in the benchmark's list."""

# Meta-World's own cameras show a block as three pixels of 84.
CAMERA = {"distance": 1.3, "azimuth": 130.0, "elevation": -30.0, "lookat": (0.0, 0.65, 0.1)}


class MetaWorldEnv(gym.Env[Any, NDArray[np.float32]]):
    """A task of Meta-World, or several of which each episode is one.

    A single task observes Meta-World's 39 numbers: the hand [3] in metres, the opening of its
    gripper in [0, 1], the places and orientations of up to two objects [14] (zeros where there are
    fewer), these 18 of the step before, and the goal [3]. The goal **is observed**, as in the
    benchmark's multi-task sets (MT1, MT10, MT50); the scripted experts need it. Several tasks
    observe a ``Dict``: ``observation``, these numbers, and ``task`` [1], which of the tasks it is.

    Action [4] in [-1, 1]: displacement of the hand in centimetres, and the force that closes the
    gripper. Reward: Meta-World's, 0 to 10. ``info["is_success"]`` is Meta-World's success in this
    step, ``info["task"]`` the name of the task. The benchmark counts an episode as solved if any of
    its 500 steps was a success; it ends here ``after_success`` steps after the first.

    Two things differ from the package's own environments. The objects and the goal are drawn at
    each reset from the whole space of the task, and are a function of its seed (as is the task,
    ``seed % number of tasks``); the package draws from a pool of 50, so that demonstrations and
    evaluation would share theirs. And seven tasks (dial-turn, door-lock, drawer-open, faucet-open,
    lever-pull, window-close, window-open) observe an object at the reset where an earlier draw had
    put it; here it is where it is. The simulation is the package's, bit for bit.

    Args:
        task: a name in `TASKS`, with or without ``-v3``; default, without ``tasks``:
            ``"pick-place"``.
        tasks: instead, several: ``"MT10"``, ``"MT50"`` or names.
        task_vectors: of several tasks a vector for each in place of its number, such as the
            embedding of a sentence: an ``.npy`` file [tasks, D] in the order of the numbers. What
            is observed as ``task`` is then [D].
        after_success: steps that an episode goes on for after its first success.
        render_mode: None or ``"rgb_array"``.
        width: width of the image in pixels.
        height: height of the image in pixels.

    Raises:
        ValueError: an unknown or repeated task, both of ``task`` and ``tasks``, vectors that are
            not one for each of several tasks, or a negative ``after_success``.
        gymnasium.error.DependencyNotInstalled: Meta-World is missing.

    Example:
        >>> env = gym.make("diffpolicy_envs:diffpolicy/MetaWorld-v0", task="door-open")
        >>> env = gym.make("diffpolicy_envs:diffpolicy/MetaWorld-v0", tasks="MT10",
        ...                cameras={"front": 84}, entries=[0, 1, 2, 3])
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "render_fps": 80,
        "packages": ["metaworld", "mujoco"],
        "task_groups": {group: list(names) for group, names in GROUPS.items()},
    }

    def __init__(
        self,
        task: str | None = None,
        render_mode: str | None = None,
        *,
        tasks: str | Sequence[str] | None = None,
        task_vectors: str | None = None,
        after_success: int = 10,
        width: int = 480,
        height: int = 480,
    ) -> None:
        if task is not None and tasks is not None:
            raise ValueError(f"give task or tasks, not both; got {task!r} and {tasks!r}")
        if after_success < 0:
            raise ValueError(f"after_success must be a number of steps, got {after_success}")
        chosen = _names([task or "pick-place"] if tasks is None else tasks)
        self._package = import_benchmark("metaworld", "policies")
        if isinstance(tasks, str):
            members = getattr(self._package.env_dict, f"{tasks}_V3")
            chosen = tuple(name.removesuffix("-v3") for name in members)
        self.tasks, self.render_mode = chosen, render_mode
        self._pictures = {"render_mode": render_mode, "width": width, "height": height}
        self._after_success = after_success
        vector = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.observation_space: gym.Space[Any] = vector
        self._several = tasks is not None
        self._vectors = None if task_vectors is None else _read_vectors(task_vectors, tasks, chosen)
        if self._several:
            said: gym.Space[Any] = gym.spaces.Box(0, len(chosen) - 1, (1,), np.int64)
            if self._vectors is not None:
                said = gym.spaces.Box(-np.inf, np.inf, self._vectors.shape[1:], np.float32)
            self.observation_space = gym.spaces.Dict({"observation": vector, "task": said})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._start(0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see `gymnasium.Env.reset`.

        Args:
            seed: of the episode: its task, its objects and its goal. None: drawn by the generator
                that the last seed made.
            options: none are known.

        Returns:
            The observation, and an info with ``is_success`` and ``task``.
        """
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31)) if seed is None else seed
        self._start(drawn % len(self.tasks))
        self.simulator.seed(drawn)
        self.simulator.reset()
        self._raw = self._refreshed()
        self._left: int | None = None
        return self._observation(), {"is_success": False, "task": self.tasks[self._number]}

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Advance one control step of 0.0125 s; see `gymnasium.Env.step`.

        Args:
            action: [4] in [-1, 1].

        Returns:
            Observation, reward, terminated, truncated, and an info with ``is_success`` and
            ``task``.
        """
        self._raw, reward, _, truncated, info = self.simulator.step(action)
        success = bool(info["success"])
        if self._left is not None:
            self._left -= 1
        elif success:
            self._left = self._after_success
        info = {**info, "is_success": success, "task": self.tasks[self._number]}
        return self._observation(), float(reward), self._left == 0, bool(truncated), info

    @property
    def expert_noise_mask(self) -> NDArray[np.bool_]:
        """Action dimensions [4] a collector may perturb: the displacement, not the gripper."""
        return np.array([True, True, True, False])

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The action of Meta-World's own scripted policy of the task in the current state.

        Args:
            rng: part of the convention for experts; these are deterministic.

        Returns:
            Action [4] in [-1, 1].
        """
        del rng
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its displacements are larger than 1: clipped
            action = np.asarray(self._expert.get_action(self._raw), np.float32)
        return np.clip(action, np.float32(-1), np.float32(1))

    def render(self) -> Any:
        """Draw the scene, uint8 [height, width, 3]; see `gymnasium.Env.render`."""
        if self.render_mode is None:
            raise gym.error.Error('make the environment with render_mode="rgb_array" to draw it')
        return self.simulator.render()

    def close(self) -> None:
        """Free the simulator."""
        self.simulator.close()

    def _start(self, number: int) -> None:
        """Make the simulator and the expert of a task, unless they are there."""
        if getattr(self, "_number", None) == number:
            return
        if hasattr(self, "simulator"):
            self.simulator.close()
        name = f"{self.tasks[number]}-v3"
        # One at a time: it is made in 0.2 s, and fifty of them are a gigabyte.
        simulator = self._package.env_dict.ALL_V3_ENVIRONMENTS[name](**self._pictures)
        # What the package's own goal-observable environments set, but for a pool of goals.
        simulator._partially_observable = False
        simulator.__dict__.pop("sawyer_observation_space", None)  # kept from when it was True
        simulator._set_task_called, simulator._freeze_rand_vec = True, False
        simulator.seeded_rand_vec = True
        settings = {**CAMERA, "lookat": np.asarray(CAMERA["lookat"])}
        simulator.mujoco_renderer.default_cam_config = settings
        self.simulator: Any = simulator
        self._expert = self._package.policies.ENV_POLICY_MAP[name]()
        self._number = number

    def _refreshed(self) -> NDArray[np.float64]:
        """What is observed after a reset [39], with every body where the reset has put it.

        Positions of bodies alone are computed, which a step does anyway before it reads them.
        """
        import mujoco

        simulator = self.simulator
        mujoco.mj_kinematics(simulator.model, simulator.data)
        now = simulator._get_curr_obs_combined_no_goal()
        simulator._prev_obs = now
        return np.hstack((now, now, simulator._get_pos_goal()))

    def _observation(self) -> Any:
        vector = self._raw.astype(np.float32)
        if not self._several:
            return vector
        if self._vectors is not None:
            return {"observation": vector, "task": self._vectors[self._number].copy()}
        return {"observation": vector, "task": np.array([self._number], np.int64)}


def _read_vectors(path: str, tasks: object, names: Sequence[str]) -> NDArray[np.float32]:
    """A vector for each task [tasks, D]."""
    if tasks is None:
        raise ValueError(f"task_vectors={path!r} tell several tasks apart: give tasks, not task")
    try:
        found = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"task_vectors={path!r} is no .npy of numbers: {error}") from None
    if found.ndim != 2 or len(found) != len(names):
        want = f"[{len(names)}, D], one row for each of {', '.join(names[:3])}, ..."
        raise ValueError(f"task_vectors={path!r} has the shape {list(found.shape)}, not {want}")
    vectors: NDArray[np.float32] = found
    return vectors


def _names(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Names of tasks as `TASKS` has them; of a set none, for the package knows them."""
    if isinstance(tasks, str):
        if tasks not in SETS:
            raise ValueError(f"tasks must be one of {SETS} or a list of names, got {tasks!r}")
        return ()
    names = tuple(name.removesuffix("-v3") for name in tasks)
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(TASKS)}"
            raise ValueError(f"Meta-World has no task {name!r}; {hint}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be names, no two alike; got {list(tasks)}")
    return names


def _recipe(about: str, episodes: int, minutes: float, megabytes: float, **kwargs: Any) -> Recipe:
    return Recipe(
        env="diffpolicy_envs:diffpolicy/MetaWorld-v0",
        kwargs=kwargs,
        episodes=episodes,
        noise=0.2,
        about=about,
        licence="simulator and experts: MIT (metaworld), Apache-2.0 (MuJoCo)",
        extra="metaworld",
        minutes=minutes,
        megabytes=megabytes,
    )


RECIPES: dict[str, Recipe] = {
    **{
        f"metaworld/{name}": _recipe(f"Meta-World's {name}, scripted", 50, 0.3, 0.4, task=name)
        for name in TASKS
    },
    "metaworld/mt10": _recipe("Meta-World's MT10, some 50 a task", 500, 3, 4, tasks="MT10"),
    "metaworld/mt50": _recipe("Meta-World's MT50, some 50 a task", 2500, 15, 20, tasks="MT50"),
}
