"""Demonstrations by a trained agent from a file: Adroit by DAPG's, Gymnasium's MuJoCo by SB3's.

No weights come with this package. A file is an ``.npz`` of plain arrays, of one of two kinds:

- DAPG (Rajeswaran et al. 2018): ``W0 [h, O]``, ``b0``, ``W1``, ``b1``, ... of tanh layers, the last
  without tanh, and ``in_shift``, ``in_scale``, ``out_shift``, ``out_scale``. The published policies
  are pickles, which nothing here opens: whoever trusts them writes their arrays down once.
- SAC and TQC of Stable-Baselines3: ``latent_pi.0.weight [h, O]``, ``latent_pi.0.bias``, ... of ReLU
  layers, and ``mu.weight``, ``mu.bias``, whose tanh is the action, as ``python scripts/generate.py
  mujoco`` leaves them in its folder of the training.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.recipes import Recipe
from diffpolicy_envs.simulators import import_robotics

Floats = NDArray[np.floating[Any]]
Arrays = Mapping[str, Floats]


class AgentEnv(gym.Env[Any, Any]):
    """An environment of another package whose expert is an agent from a file.

    Spaces, rewards, ``terminated`` and what ``info`` says are that environment's.

    Args:
        env_id: of the environment, whose observation and action are vectors.
        agent: the ``.npz`` file, see the module.
        max_episode_steps: the step limit; None: the one that the environment is registered with.
        render_mode: None or ``"rgb_array"``.

    Raises:
        gymnasium.error.DependencyNotInstalled: the simulator is missing.
        ValueError: no file, or one whose arrays are no agent of this environment.

    Example:
        >>> env = gym.make("diffpolicy_envs:diffpolicy/Agent-v0",
        ...                env_id="gymnasium_robotics:AdroitHandDoor-v1", agent="dapg_door.npz")
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array"],
        "packages": ["gymnasium-robotics", "mujoco"],
    }

    def __init__(
        self,
        env_id: str,
        agent: str | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if env_id.startswith("gymnasium_robotics:"):
            import_robotics(fetch=False)
        if agent is None or not Path(agent).is_file():
            raise ValueError(
                f"the demonstrations of {env_id} are an agent's: 'kwargs={{agent: FILE.npz}}' says "
                f"where its weights are (docs/guide.md, Data from nothing); got {agent!r}"
            )
        given: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
        made = gym.make(env_id, disable_env_checker=True, **given)
        registered = made.spec.max_episode_steps if made.spec else None
        self.max_episode_steps = max_episode_steps or registered
        self.simulator, self.render_mode = made.unwrapped, render_mode
        self.observation_space = self.simulator.observation_space
        self.action_space = self.simulator.action_space
        self._agent = read_agent(Path(agent))
        self._observation: Any = np.zeros(self.observation_space.shape or (), np.float64)
        self._steps = 0
        wanted = self.observation_space.shape, self.action_space.shape
        if self._agent.shapes != wanted:
            raise ValueError(
                f"{agent} takes and gives vectors {self._agent.shapes}, but {env_id} {wanted}"
            )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see `gymnasium.Env.reset`."""
        super().reset(seed=seed)
        self._steps = 0
        self._observation, info = self.simulator.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Advance one control step; see `gymnasium.Env.step`."""
        self._observation, reward, terminated, truncated, info = self.simulator.step(action)
        self._steps += 1
        over = self.max_episode_steps is not None and self._steps >= self.max_episode_steps
        return self._observation, float(reward), bool(terminated), bool(truncated or over), info

    def expert_action(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The agent's mean action for what was observed last, within the bounds.

        Args:
            rng: part of the convention for experts; the mean is deterministic.
        """
        del rng
        space: Any = self.action_space
        action = self._agent(self._observation)
        if not isinstance(self._agent, DAPG):  # in [-1, 1], stretched to the bounds
            action = space.low + 0.5 * (action + 1) * (space.high - space.low)
        clipped: NDArray[np.float32] = np.clip(action, space.low, space.high).astype(np.float32)
        return clipped

    def render(self) -> Any:
        """Draw the scene; see `gymnasium.Env.render`."""
        return self.simulator.render()

    def close(self) -> None:
        """Free the simulator."""
        self.simulator.close()


class DAPG:
    """``W_n tanh(... tanh(W_0 x + b_0)) + b_n`` of the shifted and scaled observation."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.layers = sum(name.startswith("W") for name in arrays)
        self.shapes = arrays["W0"].shape[1:], arrays[f"W{self.layers - 1}"].shape[:1]

    def __call__(self, observation: Floats) -> Floats:
        """The mean action [A] for an observation [O]."""
        own = self.arrays
        h = (observation - own["in_shift"]) / (own["in_scale"] + 1e-8)
        for k in range(self.layers - 1):
            h = np.tanh(own[f"W{k}"] @ h + own[f"b{k}"])
        last = self.layers - 1
        return (own[f"W{last}"] @ h + own[f"b{last}"]) * own["out_scale"] + own["out_shift"]


class SquashedGaussian:
    """The mean of SAC's and TQC's actors: ``tanh(mu(relu(... relu(W_0 x + b_0))))``."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        names = (f"latent_pi.{k}" for k in itertools.count(0, 2))  # between them the activations
        self.layers = [*itertools.takewhile(lambda name: f"{name}.weight" in arrays, names)]
        self.shapes = arrays["latent_pi.0.weight"].shape[1:], arrays["mu.weight"].shape[:1]

    def __call__(self, observation: Floats) -> Floats:
        """The mean action [A] in [-1, 1] for an observation [O]."""
        own, h = self.arrays, observation
        for name in self.layers:
            h = np.maximum(own[f"{name}.weight"] @ h + own[f"{name}.bias"], 0)
        return np.tanh(own["mu.weight"] @ h + own["mu.bias"])


def read_agent(path: Path) -> DAPG | SquashedGaussian:
    """Read an agent; nothing is unpickled.

    Raises:
        ValueError: no file of arrays, or arrays that are no agent's.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name].astype(np.float64) for name in file.files}
    except (ValueError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz of plain arrays: {error}") from None
    for kind, needed in (
        (DAPG, ("W0", "b0", "in_shift", "in_scale", "out_shift", "out_scale")),
        (SquashedGaussian, ("latent_pi.0.weight", "latent_pi.0.bias", "mu.weight", "mu.bias")),
    ):
        if all(name in arrays for name in needed):
            return kind(arrays)
    raise ValueError(f"{path} holds no agent of DAPG, SAC or TQC: it has {sorted(arrays)}")


def _recipe(env_id: str, about: str, licence: str, **more: Any) -> Recipe:
    limit = more.pop("limit", None)
    kwargs = {"env_id": env_id} | ({} if limit is None else {"max_episode_steps": limit})
    return Recipe(
        env="diffpolicy_envs:diffpolicy/Agent-v0",
        kwargs=kwargs,
        about=f"{about}; by an agent whose weights you have, 'kwargs={{agent: FILE.npz}}'",
        licence=f"simulator: {licence}, Apache-2.0 (MuJoCo); the agent has its own",
        **more,
    )


def _adroit(name: str, about: str, limit: int = 200) -> Recipe:
    env_id = f"gymnasium_robotics:AdroitHand{name}-v1"
    costs = {"episodes": 200, "minutes": 200 * limit / 600 / 60, "megabytes": limit / 20}
    costs["minutes"] = round(costs["minutes"], 1)
    return _recipe(
        env_id, about, "MIT (gymnasium-robotics)", extra="robotics", limit=limit, **costs
    )


def _mujoco(name: str) -> Recipe:
    costs = {"episodes": 100, "minutes": 1, "megabytes": 10}
    about = f"Gymnasium's {name}-v5"
    return _recipe(f"{name}-v5", about, "MIT (gymnasium)", extra="mujoco", keep="all", **costs)


RECIPES: dict[str, Recipe] = {
    "adroit/door": _adroit("Door", "a hand turns a latch and opens a door"),
    "adroit/hammer": _adroit("Hammer", "a hand drives a nail in"),
    "adroit/pen": _adroit("Pen", "a hand turns a pen as it is shown", 100),
    "adroit/relocate": _adroit("Relocate", "a hand brings a ball to a place in the air"),
    "mujoco/halfcheetah": _mujoco("HalfCheetah"),
    "mujoco/hopper": _mujoco("Hopper"),
    "mujoco/walker2d": _mujoco("Walker2d"),
}
"""Demonstrations by agents."""
