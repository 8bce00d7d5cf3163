"""How OGBench's manipulation data are recorded: the wheel's oracles, one random task after another.

Settings and order of the draws are those of the script that recorded the published files, with two
differences: every episode has a seed of its own, and its random actions follow from it as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.base import Action, Info
from diffpolicy_envs.ogbench.simulator import ManipulationEnv, family, make_simulator

Style = Literal["play", "noisy"]
STYLES = ("play", "noisy")
STEPS = 1001

_KINDS = {"cube": ("cube",), "scene": ("cube", "button", "drawer", "window"), "puzzle": ("button",)}
# How probable it is that a cube goes onto another: drawn for each episode from these bounds.
_STACKING = {"single": (0.0, 0.0), "double": (0.0, 0.25), "triple": (0.05, 0.35)}
_STACKING |= {"quadruple": (0.1, 0.5)}
_NOISE = 0.1  # of the play data's plans; of noisy data the largest of the actions' noise
_SMOOTHING = 0.5  # in steps, of the noise on plans
_MIN_NORM = 0.4  # the shortest way that a closed-loop oracle goes in one step, in metres
_NOISE_SHAPE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
RANDOM = {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}
"""Share of random actions in noisy data, by the kind of environment."""


class Oracles:
    """The expert of one episode: an oracle of the wheel, and the next when its task is done.

    Args:
        simulator: of `make_simulator`, in its mode for collecting, just reset.
        name: of the environment.
        style: ``"play"``: plans with smooth noise, followed open loop; ``"noisy"``: closed loop,
            with Gaussian noise on the actions and some that are random.
        info: the simulator's, from its reset.
        seed: of all draws of the episode.
    """

    def __init__(self, simulator: Any, name: str, style: Style, info: Info, seed: int) -> None:
        # The oracles draw from NumPy's global generator, which is of this kind.
        self._draws = np.random.RandomState(seed)
        self._simulator, self._noisy = simulator, style == "noisy"
        self._oracles = make_oracles(simulator, name, style)
        self._random = RANDOM[family(name)] if self._noisy else 0.0
        self._stacking = 0.5
        if family(name) == "cube":
            low, high = _STACKING[name.removeprefix("cube-")]
            self._stacking = self._draws.uniform(low, high) if high > 0 else 0.0
        noise = self._draws.uniform(0, _NOISE) if self._noisy else 0.0
        self._scale = noise * _NOISE_SHAPE
        self._begin(info)

    def action(self, info: Info) -> NDArray[np.float64]:
        """The next action [5].

        Args:
            info: the simulator's, from its last step. At the first step of a new task it is still
                about the old one, and the published data's closed-loop oracles believed it.
        """
        if self._oracle.done:
            self._begin(self._simulator.set_new_target(p_stack=self._stacking)[1])
        if self._draws.rand() < self._random:
            return self._draws.uniform(-1, 1, 5)
        action = np.array(self._oracle.select_action(None, info))
        if self._noisy:
            action = action + self._draws.normal(0, self._scale, 5)
        clipped: NDArray[np.float64] = np.clip(action, -1, 1)
        return clipped

    def _begin(self, info: Info) -> None:
        self._oracle = self._oracles[info["privileged/target_task"]]
        with _global_draws(self._draws):
            self._oracle.reset(None, info)


class OGBenchCollectEnv(ManipulationEnv):
    """An OGBench environment in which random tasks follow each other, for recording data.

    ``expert_action`` does them as the published data's oracles did. An episode is a success, at
    its last step alone, if it is fit to be kept: in ``scene`` the published data leave out those in
    which the cube goes where a camera would not see it. The reward is 1 while the task of the
    moment is done. ``info["record"]`` has ``qpos``, ``qvel`` and (but for cubes)
    ``button_states`` of the observation, as the published files have them.

    Args:
        name: such as ``"cube-single"``, ``"scene"`` or ``"puzzle-3x3"``.
        style: ``"play"`` or ``"noisy"``, see `Oracles`.
        steps: length of an episode.
        render_mode: None or ``"rgb_array"``.

    Raises:
        ValueError: an unknown name or style, or no steps.
        gymnasium.error.DependencyNotInstalled: ogbench is missing.

    Example:
        >>> env = gym.make("diffpolicy_envs:diffpolicy/OGBenchCollect-v0", name="scene")
        >>> env.reset(seed=0)
        >>> env.step(env.get_wrapper_attr("expert_action")(np.random.default_rng(0)))
    """

    def __init__(
        self,
        name: str = "cube-single",
        style: Style = "play",
        steps: int = STEPS,
        render_mode: str | None = None,
    ) -> None:
        if style not in STYLES:
            raise ValueError(f'style must be "play" or "noisy", got {style!r}')
        if steps < 1:
            raise ValueError(f"an episode needs at least one step, got steps={steps}")
        simulator, _ = make_simulator(name, mode="data_collection", terminate_at_goal=False)
        self._name, self._style = name, style
        self._info: Info = {}
        self._expert: Oracles | None = None
        self._fit = True
        super().__init__(simulator, steps, render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        self._expert, self._fit = None, True
        observation, self._info = super().reset(seed=seed, options=options)
        return observation, self._told()

    def step(self, action: Action) -> tuple[Any, float, bool, bool, Info]:
        observation, reward, terminated, truncated, self._info = super().step(action)
        return observation, reward, terminated, truncated, self._told()

    def expert_action(self, rng: np.random.Generator) -> Action:
        """The action [5] that the published data's oracles would take, their noise included.

        Args:
            rng: of the episode; all draws follow from the one that is made at its first step.
        """
        if self._expert is None:
            seed = int(rng.integers(2**32))
            self._expert = Oracles(self.simulator, self._name, self._style, self._info, seed)
        return self._expert.action(self._info).astype(np.float32)

    def _told(self) -> Info:
        record = {key: self._info[key].astype(np.float32) for key in ("qpos", "qvel")}
        if "button_states" in self._info:
            record["button_states"] = self._info["button_states"].astype(np.int64)
        return {"is_success": self._info["is_success"], "record": record}

    def _success(self, info: Any) -> bool:
        """Whether the episode is over and fit to be kept; its last observation is not stored."""
        over = self._steps == self.max_episode_steps
        if family(self._name) == "scene" and self._steps and self._fit:
            self._fit = _in_view(info["prev_qpos"][14:17])
        return over and self._fit


def _in_view(cube: NDArray[np.float64]) -> bool:
    """Whether the cube of ``scene`` [x, y, z] is on the table or in the drawer."""
    _, y, z = cube
    in_drawer = 0.06 <= z <= 0.08
    return bool(y < 0.29 and (y > -0.3 or in_drawer))


def make_oracles(simulator: Any, name: str, style: Style) -> dict[str, Any]:
    """The wheel's oracles for an environment, by the kind of task, with the published settings."""
    way = "plan" if style == "play" else "markov"
    closed = {"gripper_always_closed": True} if family(name) == "puzzle" else {}
    settings: dict[str, Any] = {"min_norm": _MIN_NORM}
    if style == "play":
        settings = {"noise": _NOISE, "noise_smoothing": _SMOOTHING}
    oracles = {}
    for kind in _KINDS[family(name)]:
        module = import_module(f"ogbench.manipspace.oracles.{way}.{kind}_{way}")
        maker = getattr(module, f"{kind}_{way}_oracle".title().replace("_", ""))
        oracles[kind] = maker(env=simulator, **settings, **closed)
    return oracles


@contextlib.contextmanager
def _global_draws(stream: np.random.RandomState) -> Iterator[None]:
    """Make NumPy's global generator go on where ``stream`` is, and put it back afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.set_state(stream.get_state())  # noqa: NPY002
    try:
        yield
    finally:
        stream.set_state(np.random.get_state())  # noqa: NPY002
        np.random.set_state(before)  # noqa: NPY002
