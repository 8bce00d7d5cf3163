"""One environment of a pool: what is done to it, and what comes of it.

The serial mode of the pool runs the same :class:`EnvSlot` in the calling process, so both modes
agree exactly. Only gymnasium and numpy are imported: a worker has to start fast and small, and must
never load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.values import as_flag, as_observation, as_reward, as_success, to_native
from diffpolicy.rollout.pool.wire import Message

_EXPERT_STREAM, _NOISE_STREAM = (
    1,
    2,
)  # second words of the seeds of a demonstration's two generators


class Outcome(NamedTuple):
    """What came of a reset or a step of one environment.

    Attributes:
        obs: ``[O]`` float32.
        reward: 0 for a reset.
        terminated: Gymnasium's.
        truncated: Gymnasium's.
        success: the ``is_success`` or ``success`` of ``info`` at this step; None if there is
            neither.
        frame: ``[height, width, 3]`` uint8 if one was asked for and could be drawn.
        note: why no frame could be drawn, else empty.
    """

    obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None
    frame: np.ndarray | None = None
    note: str = ""


class Demonstration(NamedTuple):
    """One whole episode of the environment's scripted expert.

    Attributes:
        seed: of the environment's reset.
        obs: ``[T, O]`` float32, what was seen before each action.
        action: ``[T, A]`` float32, the expert's clean action (what was executed may be noisier).
        reward: ``[T]`` float32.
        terminated: ``[T]`` bool.
        truncated: ``[T]`` bool.
        success: at any step; None if the environment never says.
        final_success: at the last step; None if the environment never says.
    """

    seed: int
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: bool | None
    final_success: bool | None


class EnvSlot:
    """One environment, made when it is first needed and made anew after it raised.

    Args:
        spec: the environment.
        frame_side: longest side of the frames that may be asked for; 0: there will be none. Larger
            pictures are shrunk here, so that they need not travel.
    """

    def __init__(self, spec: EnvSpec, frame_side: int = 0) -> None:
        self._spec = spec
        self._render = frame_side > 0
        self._side = frame_side
        self._env: gym.Env[Any, Any] | None = None
        self._note = ""
        self._done = True

    @property
    def env(self) -> gym.Env[Any, Any]:
        """The environment; with its renderer if that can be had."""
        if self._env is None and self._render:
            try:
                self._env = self._spec.make(render_mode="rgb_array")
            except Exception as error:
                # A score must not be lost to a missing graphics library: go on without frames and
                # say so.
                self._note = f"{type(error).__name__}: {error}"
                self._render = False
        if self._env is None:
            self._env = self._spec.make()
        return self._env

    def make(self) -> None:
        """Makes the environment now, if there is none yet."""
        _ = self.env

    def reset(self, seed: int, frame: bool = False) -> Outcome:
        """Begins the episode of ``seed``."""
        obs, info = self.env.reset(seed=seed)
        self._done = False
        picture, note = self._frame(frame)
        return Outcome(self._checked(obs), 0.0, False, False, as_success(info), picture, note)

    def step(self, action: np.ndarray, frame: bool = False) -> Outcome:
        """Takes ``action [A]``; there is no automatic reset.

        Raises:
            RuntimeError: the episode has ended, or none was begun.
        """
        if self._done:
            raise RuntimeError("step() after the end of an episode; call reset() first")
        space = self.env.action_space
        assert isinstance(space, spaces.Box)
        obs, reward, terminated, truncated, info = self.env.step(to_native(action, space))
        ended = as_flag(terminated, "terminated"), as_flag(truncated, "truncated")
        self._done = any(ended)
        value = as_reward(reward)
        picture, note = self._frame(frame)
        return Outcome(self._checked(obs), value, *ended, as_success(info), picture, note)

    def render(self) -> tuple[np.ndarray | None, str]:
        """A picture ``[height, width, 3]`` uint8, or None and why not."""
        return self._frame(True)

    def expert(self, seed: int, noise: float, beat: Callable[[], None]) -> Demonstration:
        """Runs the environment's scripted expert for the whole episode of ``seed``.

        The clean action is stored; executed is ``clip(clean + N(0, noise^2))``, which shows the
        expert how to recover.

        Args:
            seed: of the reset, and of the generators of the expert and of the noise.
            noise: standard deviation, on the dimensions of the environment's ``expert_noise_mask``
                (default: all).
            beat: called after every step, to show that the worker is alive.
        """
        env = self.env
        expert_action = env.get_wrapper_attr("expert_action")
        mask = np.ones(())
        if env.has_wrapper_attr("expert_noise_mask"):
            mask = np.asarray(env.get_wrapper_attr("expert_noise_mask"), np.float64)
        rng = np.random.default_rng([seed, _EXPERT_STREAM])
        noise_rng = np.random.default_rng([seed, _NOISE_STREAM])
        low, high = _bounds(env)
        outcome = self.reset(seed)
        seen: list[np.ndarray] = []
        taken: list[np.ndarray] = []
        outcomes: list[Outcome] = []
        while not self._done:
            clean = np.clip(np.asarray(expert_action(rng), np.float64), low, high)
            if not np.isfinite(clean).all():
                raise ValueError(f"the expert's action {clean} at step {len(taken)} is not finite")
            executed = np.clip(
                clean + noise * mask * noise_rng.standard_normal(clean.shape), low, high
            )
            seen.append(outcome.obs)
            taken.append(clean.astype(np.float32))
            outcome = self.step(executed)
            outcomes.append(outcome)
            beat()
        says = [one.success for one in outcomes if one.success is not None]
        return Demonstration(
            seed=seed,
            obs=np.stack(seen),
            action=np.stack(taken),
            reward=np.array([one.reward for one in outcomes], np.float32),
            terminated=np.array([one.terminated for one in outcomes]),
            truncated=np.array([one.truncated for one in outcomes]),
            success=any(says) if says else None,
            final_success=outcomes[-1].success,
        )

    def close(self) -> None:
        """Closes the environment; the next use makes it anew."""
        env, self._env = self._env, None
        self._done = True
        if env is not None:
            env.close()

    def _frame(self, wanted: bool) -> tuple[np.ndarray | None, str]:
        if not wanted:
            return None, ""
        if self._render:
            try:
                return _shrink(np.asarray(self.env.render(), np.uint8), self._side), ""
            except Exception as error:
                self._note = f"{type(error).__name__}: {error}"
                self._render = False
        return None, self._note or "the pool was made without frames"

    def _checked(self, obs: Any) -> np.ndarray:
        shape = self.env.observation_space.shape
        assert shape is not None
        return as_observation(obs, shape)


def _shrink(frame: np.ndarray, side: int) -> np.ndarray:
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"expected a picture [height, width, 3], got shape {frame.shape}")
    height, width = frame.shape[:2]
    k = -(-max(height, width) // side)
    if k == 1:
        return frame
    cut = frame[: height // k * k, : width // k * k]
    blocks = cut.reshape(height // k, k, width // k, k, 3)
    small: np.ndarray = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    return small


def _bounds(env: gym.Env[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(env.action_space, spaces.Box)
    return env.action_space.low.astype(np.float64), env.action_space.high.astype(np.float64)


def run_command(
    slot: EnvSlot,
    command: dict[str, Any],
    arrays: dict[str, np.ndarray],
    index: int,
    beat: Callable[[], None],
) -> Message:
    """Carries one command out for one row; the reply as a message."""
    name = command["do"]
    if name == "make":
        slot.make()
        return {}, {}
    if name == "reset":
        return _packed(slot.reset(command["seeds"][index], command["frames"][index]))
    if name == "step":
        return _packed(slot.step(arrays["actions"][index], command["frames"][index]))
    if name == "render":
        frame, note = slot.render()
        return {"note": note}, {} if frame is None else {"frame": frame}
    if name == "expert":
        return _packed(slot.expert(command["seeds"][index], command["noise"], beat))
    raise ValueError(f"unknown command {name!r}")


def _packed(result: Outcome | Demonstration) -> Message:
    items: dict[str, Any] = result._asdict()
    arrays = {name: value for name, value in items.items() if isinstance(value, np.ndarray)}
    return {k: v for k, v in items.items() if k not in arrays}, arrays
