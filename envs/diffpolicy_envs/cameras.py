"""Cameras in MuJoCo: what a simulator's own observation lacks, drawn into the observation."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

VIEW = ("distance", "azimuth", "elevation", "lookat")
"""Entries of MuJoCo's free camera."""
FRONT = "front"
"""The camera that looks as the environment's own pictures do, unless the model has one so named."""


def make(
    home: str | None = None,
    env_id: str | None = None,
    *,
    cameras: Mapping[str, Any] | None = None,
    entries: Sequence[int] | None = None,
    **kwargs: Any,
) -> gym.Env[Any, Any]:
    """Make an environment, and give it cameras if any are asked for.

    Args:
        home: ``module:Class`` of the environment.
        env_id: instead, the id of an environment with MuJoCo inside.
        cameras: see `CameraEnv`; None: the environment as it is.
        entries: likewise.
        kwargs: of the environment itself.

    Example:
        >>> gym.make("diffpolicy_envs:diffpolicy/FetchPush-v0", cameras={"front": 84})
        >>> gym.make("diffpolicy_envs:diffpolicy/Cameras-v0", env_id="Hopper-v5",
        ...          cameras={"track": 64})

    Raises:
        ValueError: neither a home nor an id, or what `CameraEnv` refuses.
        gymnasium.error.Error: nothing can be drawn here.
    """
    if (home is None) == (env_id is None):
        raise ValueError('cameras need an environment to be in: env_id="Hopper-v5", for example')
    if cameras and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported: in a moment
    creator: Any = gym.make if home is None else load_env_creator(home)
    env: gym.Env[Any, Any] = creator(**kwargs, **({"id": env_id} if home is None else {}))
    if cameras is None and entries is None:
        return env
    try:
        return CameraEnv(env, cameras or {}, entries)
    except BaseException:
        env.close()
        raise


def place_goal(simulator: Any) -> None:
    """Put the goal marker of gymnasium-robotics' arms where the goal is.

    Their own `render` runs mj_forward to move it, and so changes what the next step starts from: an
    episode that is looked at would take another course than one that is not (centimetres after 40
    steps). Only the marker's place is needed.
    """
    if "target0" in {simulator.model.site(i).name for i in range(simulator.model.nsite)}:
        simulator.data.site("target0").xpos[:] = simulator.goal


class CameraEnv(gym.ObservationWrapper[Any, Any, Any]):
    """An environment with MuJoCo inside that also observes what cameras see.

    A vector becomes the entry ``observation`` of a ``Dict``, a ``Dict`` keeps its entries; every
    camera adds its name: uint8 [height, width, 3]. Images are drawn without shadows, reflections
    and smoothing, which take ten times as long without a graphics card, and drawing them does not
    touch the simulation.

    Args:
        env: the environment.
        cameras: by name a size: pixels a side, ``[height, width]``, or a mapping with ``size`` and,
            to look from elsewhere, ``view`` (a camera of the model) or any of ``distance``,
            ``azimuth``, ``elevation`` and ``lookat`` (of a free one). Of size alone, a camera with
            the name of one of the model's looks from there, ``front`` as the environment's own
            pictures.
        entries: of the vector that is still observed, those that stay; None: all; empty: no vector.
            What a camera is to show, a policy should not be told.

    Raises:
        ValueError: no MuJoCo, no camera, a name that is taken, or settings that are none.
        gymnasium.error.Error: nothing can be drawn here.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        cameras: Mapping[str, Any],
        entries: Sequence[int] | None = None,
    ) -> None:
        super().__init__(env)
        if not isinstance(cameras, Mapping):
            raise ValueError(f'cameras are sizes by name, {{"front": 84}}; got {cameras!r}')
        if not cameras:
            raise ValueError('entries are chosen beside cameras: give cameras={"front": 84}')
        self.simulator: Any = _simulator(env)
        space = env.observation_space
        named = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"observation": space}
        self._entries = None if entries is None else np.asarray(entries, np.int64)
        if self._entries is not None:
            vector = named.pop("observation", None)
            known = np.arange(vector.shape[0] if isinstance(vector, gym.spaces.Box) else 0)
            if not isinstance(vector, gym.spaces.Box) or not np.isin(self._entries, known).all():
                raise ValueError(f"entries must be some of the observation's; it is {vector}")
            if len(self._entries):
                low, high = vector.low[self._entries], vector.high[self._entries]
                named["observation"] = gym.spaces.Box(low, high, dtype=vector.dtype.type)
        taken = sorted(set(named) & set(cameras))
        if taken:
            raise ValueError(f"cameras cannot be called {taken}: the environment observes these")
        self._cameras = {name: self._camera(name, value) for name, value in cameras.items()}
        for name, (size, _) in self._cameras.items():
            named[name] = gym.spaces.Box(0, 255, (*size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(named)
        self._renderers: dict[tuple[int, int], Any] = {}
        self._draw_from(self.simulator)

    def observation(self, observation: Any) -> dict[str, Any]:
        """What the environment observes, and an image of every camera."""
        seen = dict(observation) if isinstance(observation, Mapping) else {}
        if not seen:
            seen["observation"] = observation
        if self._entries is not None:
            vector = seen.pop("observation")[self._entries]
            seen |= {"observation": vector} if len(vector) else {}
        simulator = _simulator(self.env)
        if simulator is not self.simulator:  # an episode of another task, with another model
            self._draw_from(simulator)
        place_goal(self.simulator)
        for name, (size, camera) in self._cameras.items():
            renderer = self._renderers[size]
            renderer.update_scene(self.simulator.data, camera)
            _plain(renderer.scene)
            seen[name] = renderer.render()
        return seen

    def render(self) -> Any:
        """Draw the scene as the environment does; see `gymnasium.Env.render`."""
        viewer = getattr(getattr(self.simulator, "mujoco_renderer", None), "viewer", None)
        if viewer is not None:  # it takes for granted that nobody else draws
            viewer.make_context_current()
        return super().render()

    def close(self) -> None:
        """Free the renderers and the environment."""
        self._free()
        super().close()

    def _free(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    def _draw_from(self, simulator: Any) -> None:
        """Make the renderers of a simulator's model, one of each size."""
        self._free()
        self.simulator = simulator
        for size in {size for size, _ in self._cameras.values()}:
            self._renderers[size] = _renderer(simulator.model, size)

    def _camera(self, name: str, value: Any) -> tuple[tuple[int, int], Any]:
        """The size of a camera's images, and the camera: of the model (a number) or a free one."""
        import mujoco

        settings = dict(value) if isinstance(value, Mapping) else {"size": value}
        known = ("size", "view", *VIEW)
        if "size" not in settings or set(settings) - set(known):
            raise ValueError(f"camera {name!r} takes a size and any of {known[1:]}; got {value!r}")
        size = settings.pop("size")
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"camera {name!r} needs a size of pixels or [height, width]: {size!r}")
        model = self.simulator.model
        there = {model.camera(i).name: i for i in range(model.ncam)}
        view = _view(name, settings, there)
        if view is not None:
            return sides, view
        camera = mujoco.MjvCamera()
        mujoco.mjv_defaultFreeCamera(model, camera)
        renderer = getattr(self.simulator, "mujoco_renderer", None)
        usual = dict(getattr(renderer, "default_cam_config", None) or {})
        for key, entry in {**usual, **settings}.items():
            if key == "lookat":
                camera.lookat[:] = entry
            else:
                setattr(camera, key, entry)
        return sides, camera


def _view(name: str, settings: dict[str, Any], there: Mapping[str, int]) -> int | None:
    """The camera of the model that is meant; None: a free one."""
    view = settings.pop("view", None)
    if view is not None and settings:
        raise ValueError(f"camera {name!r} looks from {view!r}: leave {sorted(settings)} out")
    view = view or (None if settings else name)
    if view is None or (view == FRONT and FRONT not in there):
        return None
    if view not in there:
        known = [*sorted(filter(None, there)), FRONT]
        close = difflib.get_close_matches(str(view), known, n=1)
        near = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"camera {name!r}: the model has the views {known}, got {view!r}{near} A camera with a "
            "name of your own says its view, or any of " + ", ".join(VIEW)
        )
    return there[view]


def _simulator(env: gym.Env[Any, Any]) -> Any:
    """The part of an environment that has MuJoCo's ``model`` and ``data``."""
    part: Any = env.unwrapped
    while part is not None and not (hasattr(part, "model") and hasattr(part, "data")):
        names = ("simulator", "point_env", "ant_env", "robot_env")
        inner = next((getattr(part, name) for name in names if hasattr(part, name)), None)
        part = getattr(inner, "unwrapped", inner)
    if part is None:
        raise ValueError(f"{env} has no MuJoCo inside (model and data), so it has no cameras")
    return part


def _renderer(model: Any, size: tuple[int, int]) -> Any:
    import mujoco
    from mujoco import gl_context

    # Where nothing can be drawn both are deleted half made, and complain of what they have not got.
    for part in (mujoco.Renderer, getattr(gl_context, "GLContext", None)):
        for name in ("_context", "_gl_context", "_mjr_context"):
            if part is not None and not hasattr(part, name):
                setattr(part, name, None)
    smooth = model.vis.quality.offsamples
    model.vis.quality.offsamples = 0  # read when a renderer is made; the environment's own keeps it
    try:
        return mujoco.Renderer(model, *size)
    except ValueError:  # larger than the model's frame buffer, and says so
        raise
    except Exception as error:  # every graphics library raises its own
        raise gym.error.Error(
            f"cameras need MuJoCo to draw, which fails here: {type(error).__name__}: {error}. "
            'Without a screen set MUJOCO_GL=egl or osmesa; "diffpolicy doctor" says which works'
        ) from error
    finally:
        model.vis.quality.offsamples = smooth


def _plain(scene: Any) -> None:
    import mujoco

    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        scene.flags[flag] = 0
