"""One environment of a pool: what is done to it, and what comes of it.

The serial mode of the pool runs the same :class:`EnvSlot` in the calling process, so both modes
agree exactly. Only gymnasium and numpy are imported: a worker has to start fast and small, and must
never load torch.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from diffpolicy.data.observation import Obs, ObsFields, from_fields, holds, to_fields
from diffpolicy.rollout.env_spec import EnvSpec, action_ends, obs_fields
from diffpolicy.rollout.pool.shared import Room
from diffpolicy.rollout.pool.values import (
    as_flag,
    as_observation,
    as_record,
    as_reward,
    as_success,
    as_task,
    to_native,
)

# Second words of the seeds of an expert's two generators.
_EXPERT_STREAM, _NOISE_STREAM = 1, 2

Drawn = bool | Literal["end"]
"""Whether a picture is wanted; ``"end"``: only if the step ends the episode."""

Values = Sequence[Any] | np.ndarray
"""An argument of a command, for every row one."""


class Outcome(NamedTuple):
    """What came of a reset or a step of one environment.

    Attributes:
        obs: ``[O]`` float32, or as the environment's fields say. Images of a worker process lie in
            memory that it shares: they stay until the row's next command but one, unless copied.
        reward: 0 for a reset.
        terminated: Gymnasium's.
        truncated: Gymnasium's.
        success: the ``is_success`` or ``success`` of ``info`` at this step; None if there is
            neither.
        frame: ``[height, width, 3]`` uint8 if one was asked for and could be drawn.
        note: why no frame could be drawn, else empty.
        action: the clean action ``[A]`` float32 of a step of the environment's expert, which chose
            it; None for other steps.
        task: the name in ``info["task"]``; None if there is none.
        record: the arrays of ``info["record"]``, which belong to ``obs`` and may be stored beside
            it; None if there are none.
    """

    obs: Obs
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None
    frame: np.ndarray | None = None
    note: str = ""
    action: np.ndarray | None = None
    task: str | None = None
    record: dict[str, np.ndarray] | None = None

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


class Failure(NamedTuple):
    """Why a row has no result.

    Attributes:
        kind: ``"raised"`` (the environment raised), ``"timed out"``, ``"died"`` (the process
            ended), ``"lost"`` (another row of the same process ended it, or it was restarting) or
            ``"gone"`` (it cannot be started any more, so the row has no environment from now on).
        text: the worker's traceback or how its process ended.
    """

    kind: Literal["raised", "timed out", "died", "lost", "gone"]
    text: str

    def __str__(self) -> str:
        """What happened in the first line (of a traceback: the error), then the whole text."""
        text = self.text.strip()
        _, began, after = text.rpartition("Traceback (most recent call last):\n")
        ends = [line for line in after.splitlines() if began and not line.startswith(" ")]
        return f"{self.kind} {ends[0]}\n{text}" if ends else f"{self.kind}: {text}"

    @property
    def blameless(self) -> bool:
        """Whether it says nothing of the episode, which has to be begun again elsewhere."""
        return self.kind in ("lost", "gone")


Result = Outcome | Failure | None
"""What a row answers; None: nothing but that it is done."""


def to_flat(result: Result, rooms: tuple[Room, Room] | None = None) -> dict[str, Any]:
    """A result as values and arrays by name, for a message; :func:`from_flat` undoes it.

    What lies in one of the ``rooms``, which the other side sees as well, is left out: ``room``
    says in which.
    """
    flat = {} if result is None else result._asdict()
    if isinstance(result, Outcome):
        del flat["obs"], flat["record"]
        flat |= to_fields(result.record or {}, "record")
        seen = to_fields(result.obs)
        if rooms is not None:
            name = next(iter(rooms[0]))
            flat["room"] = int(seen[name] is rooms[1][name])
            seen = {name: array for name, array in seen.items() if name not in rooms[0]}
        flat |= seen
    return flat


def from_flat(flat: dict[str, Any], rooms: tuple[Room, Room] | None = None) -> Result:
    """The result that :func:`to_flat` made values of."""
    if "kind" in flat:
        return Failure(**flat)
    own = {name: value for name, value in flat.items() if name in Outcome._fields}
    if rooms is not None and flat:
        flat |= rooms[flat["room"]]
    record = from_fields(flat, "record") if holds(flat, "record") else None
    return Outcome(**{**own, "obs": from_fields(flat), "record": record}) if flat else None


class _Expert:
    """The environment's scripted expert, for one episode."""

    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        self.action = env.get_wrapper_attr("expert_action")
        self.mask = np.ones(())
        if env.has_wrapper_attr("expert_noise_mask"):
            self.mask = np.asarray(env.get_wrapper_attr("expert_noise_mask"), np.float64)
        self.chooses = not isinstance(env.action_space, spaces.Box)
        self.ends = action_ends(env.action_space)
        self.low, self.high = (end.astype(np.float64) for end in self.ends)
        self.rng = np.random.default_rng([seed, _EXPERT_STREAM])
        self.noise = np.random.default_rng([seed, _NOISE_STREAM])

    def choose(self, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """The clean action and the one to execute: ``clip(clean + N(0, noise^2))``.

        Of whole numbers that choose, ``noise`` is how probable a random choice is.
        """
        clean = np.clip(np.asarray(self.action(self.rng), np.float64), self.low, self.high)
        if not np.isfinite(clean).all():
            raise ValueError(f"the expert's action {clean} is not finite")
        if self.chooses:
            other = self.noise.integers(*self.ends, endpoint=True)
            return clean, np.where(self.noise.random(clean.shape) < noise * self.mask, other, clean)
        noisy = clean + noise * self.mask * self.noise.standard_normal(clean.shape)
        return clean, np.clip(noisy, self.low, self.high)


class EnvSlot:
    """One environment, made when it is first needed and made anew after it raised.

    Args:
        spec: the environment.
        frame_side: longest side of the frames that may be asked for; 0: there will be none. Larger
            pictures are shrunk here, so that they need not travel.

    Attributes:
        rooms: where images that are observed are put, in turn; None: in memory of their own.
    """

    def __init__(self, spec: EnvSpec, frame_side: int = 0) -> None:
        self._spec = spec
        self._render = frame_side > 0
        self._side = frame_side
        self._env: gym.Env[Any, Any] | None = None
        self._fields: ObsFields = {}
        self.rooms: tuple[Room, Room] | None = None
        self._turn = 0
        self._note = ""
        self._done = True
        self._seed = 0
        self._expert: _Expert | None = None

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

    def reset(self, seed: int, frame: Drawn = False) -> Outcome:
        """Begin the episode of ``seed``."""
        obs, info = self.env.reset(seed=seed)
        self._fields = obs_fields(self.env.observation_space)
        self._done, self._seed, self._expert = False, seed, None
        picture, note = self.render() if frame is True else (None, "")
        seen = self._seen(obs)
        told: dict[str, Any] = {"task": as_task(info), "record": as_record(info)}
        return Outcome(seen, 0.0, False, False, as_success(info), picture, note, **told)

    def step(self, action: np.ndarray, frame: Drawn = False) -> Outcome:
        """Take ``action [A]``; there is no automatic reset.

        Raises:
            RuntimeError: the episode has ended, or none was begun.
        """
        if self._done:
            raise RuntimeError("step() after the end of an episode; call reset() first")
        native = to_native(action, self.env.action_space)
        obs, reward, terminated, truncated, info = self.env.step(native)
        ended = as_flag(terminated, "terminated"), as_flag(truncated, "truncated")
        self._done = any(ended)
        value = as_reward(reward)
        wanted = self._done if frame == "end" else frame
        picture, note = self.render() if wanted else (None, "")
        seen = self._seen(obs)
        told: dict[str, Any] = {"task": as_task(info), "record": as_record(info)}
        return Outcome(seen, value, *ended, as_success(info), picture, note, **told)

    def expert_step(self, noise: float, frame: Drawn = False) -> Outcome:
        """Take the action of the environment's scripted expert, made noisier.

        The clean action is told; executed is ``clip(clean + N(0, noise^2))``, which shows the
        expert how to recover.

        Args:
            noise: standard deviation, on the dimensions of the environment's ``expert_noise_mask``
                (default: all); of actions that choose, the probability of a random choice.
            frame: as for :meth:`step`.
        """
        if self._expert is None:
            self._expert = _Expert(self.env, self._seed)
        clean, executed = self._expert.choose(noise)
        return self.step(executed, frame)._replace(action=clean.astype(np.float32))

    def _seen(self, obs: Any) -> Obs:
        if self.rooms is None:
            return as_observation(obs, self._fields)
        self._turn = 1 - self._turn
        return as_observation(obs, self._fields, self.rooms[self._turn])

    def render(self) -> tuple[np.ndarray | None, str]:
        """A picture ``[height, width, 3]`` uint8, or None and why not."""
        if self._render:
            try:
                return _shrink(np.asarray(self.env.render(), np.uint8), self._side), ""
            except Exception as error:
                self._note = f"{type(error).__name__}: {error}"
                self._render = False
        return None, self._note or "the pool was made without frames"

    def close(self) -> None:
        """Close the environment; the next use makes it anew."""
        env, self._env = self._env, None
        self._done = True
        if env is not None:
            env.close()


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


_COMMANDS: dict[str, Callable[..., Outcome]] = {
    "reset": EnvSlot.reset,
    "step": EnvSlot.step,
    "expert": EnvSlot.expert_step,
}


def run_command(slot: EnvSlot, name: str, values: Mapping[str, Values], place: int) -> Result:
    """Carry one command out for one row; a slot that raised is closed, and says what it raised.

    Args:
        slot: of the row.
        name: ``"make"``, ``"reset"``, ``"step"`` or ``"expert"``.
        values: arguments of all rows of the command, by name.
        place: of the row among them.
    """
    try:
        if name == "make":
            _ = slot.env
            return None
        own = {key: value[place] for key, value in values.items()}
        return _COMMANDS[name](slot, **own)
    except Exception:
        trace = traceback.format_exc()
        with contextlib.suppress(Exception):  # comes of the error that is being reported
            slot.close()
        return Failure("raised", trace)
