"""Pictures of rollouts: a film, a contact sheet, and a graphics backend that needs no screen.

Nothing here may cost a score: every function says why a picture could not be made instead of ending
an evaluation.
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffpolicy.data.observation import Obs, to_fields
from diffpolicy.extras import installed, need
from diffpolicy.files import atomic_file
from diffpolicy.settings import check_range

if TYPE_CHECKING:
    from diffpolicy.rollout.results import EpisodeVideo

_PACKAGES = {"egl": "libegl1 libegl-mesa0 libgl1-mesa-dri", "osmesa": "libosmesa6"}
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa", "glfw": "GL"}
# A scene of one sphere: the cheapest proof that a context can be made and drawn into.
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 2"/><geom size=".2"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().max() > 0
"""
GREEN, RED, GREY = (46, 160, 67), (218, 54, 51), (128, 128, 128)


class GlChoice(NamedTuple):
    """The graphics backend for MuJoCo.

    Attributes:
        backend: ``"egl"``, ``"osmesa"``, ``"glfw"``, or None: no picture can be drawn.
        message: one sentence for the user; with None it names the packages to install.
    """

    backend: str | None
    message: str


def choose_gl_backend(timeout: float = 60.0) -> GlChoice:
    """Find a backend that MuJoCo can draw with, and set ``MUJOCO_GL`` for it.

    Call it before mujoco is imported; workers inherit the choice. Each candidate is tried in a
    process of its own, because a broken one can crash. A ``MUJOCO_GL`` that is set already is the
    only candidate. Without a display the candidates are EGL, then OSMesa; with one, GLFW comes
    last. If none works ``MUJOCO_GL`` is set to ``disable``, with which MuJoCo imports and simulates
    without drawing.

    Args:
        timeout: seconds a candidate may take.
    """
    wish = os.environ.get("MUJOCO_GL", "").lower()
    if wish in ("disable", "disabled", "off", "false", "0"):
        return GlChoice(None, f"no pictures, because MUJOCO_GL={wish}")
    candidates = [wish] if wish else ["egl", "osmesa"]
    if not wish and os.environ.get("DISPLAY"):
        candidates.append("glfw")
    reasons = []
    for backend in candidates:
        reason = _why_not(backend, timeout)
        if reason is None:
            os.environ["MUJOCO_GL"] = backend
            return GlChoice(backend, f"MuJoCo draws with {backend}")
        reasons.append(f"{backend}: {reason}")
    os.environ["MUJOCO_GL"] = "disable"
    packages = " or ".join(f"apt-get install {names}" for names in _PACKAGES.values())
    return GlChoice(
        None,
        f"no pictures: MuJoCo cannot draw here ({'; '.join(reasons)}). On Debian and Ubuntu: "
        f"{packages}. Everything else works without them.",
    )


def _why_not(backend: str, timeout: float) -> str | None:
    """One line that says why a backend does not work; None if it does."""
    library = _LIBRARIES.get(backend)
    if library is not None and ctypes.util.find_library(library) is None:
        return f"the library lib{library} is not installed"
    if importlib.util.find_spec("mujoco") is None:
        return None  # nothing to try it with: the library is all that can be asked for
    environment = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", _PROBE]
    how: dict[str, Any] = {"timeout": timeout, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, env=environment, check=False, **how)
    except subprocess.TimeoutExpired:
        return f"drawing took more than {timeout:.0f} s"
    # Errors while a half-made context is being freed follow the one that matters.
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    errors.append(f"drawing ended with exit code {done.returncode}")
    return errors[0][:200] if done.returncode else None


def images_of(obs: Obs) -> list[np.ndarray]:
    """The images ``[H, W, 3]`` uint8 in one observation, in its order."""
    arrays = to_fields(obs).values()
    return [_rgb(array) for array in arrays if shows(array.shape, str(array.dtype))]


def shows(shape: Sequence[int], dtype: str) -> bool:
    """Whether rows are images of bytes, ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``."""
    return dtype == "uint8" and (len(shape) == 2 or (len(shape) == 3 and _channels(shape) >= 0))


def _channels(shape: Sequence[int]) -> int:
    """The axis of the channels of three; -1: none can be."""
    return next((axis for axis in (2, 0) if shape[axis] in (1, 3, 4)), -1)


def _rgb(image: np.ndarray) -> np.ndarray:
    whole = image[..., None] if image.ndim == 2 else np.moveaxis(image, _channels(image.shape), -1)
    return whole.repeat(3, axis=2) if whole.shape[2] == 1 else whole[..., :3]


def write_mp4(path: str | Path, videos: Sequence[EpisodeVideo], *, fps: int = 20) -> Path:
    """Write the episodes one after the other, each in a frame of green (success) or red.

    Args:
        path: of the film.
        videos: at least one, of one picture size.
        fps: pictures per second.

    Raises:
        ImportError: imageio or its ffmpeg is missing (with the pip command).
        ValueError: there are no pictures.
    """
    imageio = need("imageio.v2")
    need("imageio_ffmpeg")
    _require_pictures(videos)
    # H.264 wants even sides; padding below sees to it, so nothing must be rescaled.
    codec = {"codec": "libx264", "macro_block_size": 2, "quality": 8}
    with atomic_file(path, ".mp4") as file, imageio.get_writer(file, fps=fps, **codec) as writer:
        for video in videos:
            for frame in video.frames:
                writer.append_data(_judged(frame, video.success))
    return Path(path)


def contact_sheet(path: str | Path, videos: Sequence[EpisodeVideo], *, columns: int = 6) -> Path:
    """Write one picture: a row per episode, key frames from left to right.

    The frames are evenly spaced and include the first and the last; the border is green for a
    success, red for a failure and grey where the task does not say.

    Args:
        path: of the PNG.
        videos: at least one.
        columns: key frames per episode.

    Raises:
        ImportError: pillow is missing (with the pip command).
        ValueError: there are no pictures, or fewer than one column.
    """
    image_module, draw_module = need("PIL.Image"), need("PIL.ImageDraw")
    _require_pictures(videos)
    check_range("[1, inf)", columns=columns)
    rows = []
    for video in videos:
        picks = np.linspace(0, len(video.frames) - 1, columns).round().astype(int)
        cells = _judged(video.frames[picks], video.success)
        strip = image_module.fromarray(np.concatenate(list(cells), axis=1))
        label = image_module.new("RGB", (strip.width, 16), (255, 255, 255))
        ends = {True: "success", False: "failure", None: ""}[video.success]
        text = f"seed {video.seed}  {ends}  {len(video.frames)} frames"
        draw_module.Draw(label).text((4, 2), text, fill=(0, 0, 0))
        rows.append(np.concatenate([np.asarray(label), np.asarray(strip)]))
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    with atomic_file(path, ".png") as partial:
        image_module.fromarray(np.concatenate(padded)).save(partial)
    return Path(path)


def can_film() -> bool:
    """Whether the packages that write films and pictures are installed (the extra media)."""
    return all(map(installed, ("imageio", "imageio_ffmpeg", "PIL")))


class Media(NamedTuple):
    """What was written, and why something was not."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def save_media(directory: str | Path, videos: Sequence[EpisodeVideo], *, fps: int = 20) -> Media:
    """Write ``rollouts.mp4`` and ``contact_sheet.png``; what cannot be written becomes a note."""
    paths: list[Path] = []
    notes: list[str] = []
    folder = Path(directory)
    if not videos:
        return Media((), ("no pictures: no frame was drawn",))
    write_film = functools.partial(write_mp4, fps=fps)
    for name, write in (("rollouts.mp4", write_film), ("contact_sheet.png", contact_sheet)):
        try:
            paths.append(write(folder / name, videos))
        except Exception as error:
            # A missing codec or a full disk must not take the scores with it.
            notes.append(f"no {folder / name}: {error}")
    return Media(tuple(paths), tuple(notes))


def _require_pictures(videos: Sequence[EpisodeVideo]) -> None:
    if not videos or any(len(video.frames) == 0 for video in videos):
        raise ValueError("there are no pictures to write")


def framed(frames: np.ndarray, colour: Sequence[int], border: int = 4) -> np.ndarray:
    """Pictures ``[..., height, width, 3]`` in a frame of a colour, with sides of even length."""
    height, width = frames.shape[-3:-1]
    shape = (*frames.shape[:-3], height + 2 * border + height % 2, width + 2 * border + width % 2)
    out = np.empty((*shape, 3), np.uint8)
    out[:] = colour
    out[..., border : border + height, border : border + width, :] = frames
    return out


def beside(frame: np.ndarray | None, *pictures: np.ndarray | None) -> np.ndarray:
    """A frame with small pictures on its right, each as high as the frame is, in whole pixels.

    Args:
        frame: uint8 ``[height, width, 3]``; None: the pictures stand alone, as high as the highest.
        pictures: uint8 ``[h, w, 3]``; None: there is none.
    """
    parts = [] if frame is None else [frame]
    there = [picture for picture in pictures if picture is not None]
    height = max(map(len, there)) if frame is None else len(frame)
    for picture in there:
        rows = np.arange(height) * len(picture) // height
        columns = np.arange(height * picture.shape[1] // len(picture)) * len(picture) // height
        parts.append(picture[rows][:, columns])
    return np.concatenate(parts, axis=1)


def _judged(frames: np.ndarray, success: bool | None) -> np.ndarray:
    return framed(frames, {True: GREEN, False: RED, None: GREY}[success])
