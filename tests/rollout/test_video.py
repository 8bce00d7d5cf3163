from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffpolicy import DiffusionPolicy
from diffpolicy.data import EpisodeStore
from diffpolicy.rollout import video
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import VideoOptions, evaluate
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.results import EpisodeVideo
from diffpolicy.rollout.video import (
    beside,
    choose_gl_backend,
    contact_sheet,
    save_media,
    write_mp4,
)

GREEN, RED, GREY = (46, 160, 67), (218, 54, 51), (128, 128, 128)


def _videos(height=40, width=30):
    frames = np.zeros((7, height, width, 3), np.uint8)
    frames[...] = (30 * np.arange(7))[:, None, None, None]
    return [
        EpisodeVideo(0, True, frames),
        EpisodeVideo(1, False, frames[:3]),
        EpisodeVideo(2, None, frames[:1]),
    ]


def test_contact_sheet_shows_key_frames_and_outcomes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = contact_sheet(tmp_path / "deep" / "sheet.png", _videos(), columns=3)
    with image.open(path) as opened:
        sheet = np.asarray(opened)
    row = 16 + 40 + 8
    assert sheet.shape == (3 * row, 3 * 38, 3)
    for index, colour in enumerate((GREEN, RED, GREY)):
        assert tuple(sheet[index * row + 16, 5]) == colour
    centres = [sheet[16 + 24, 19 + 38 * column, 0] for column in range(3)]
    assert centres == [0, 90, 180]  # first, middle and last frame
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_a_picture_stands_beside_its_frame_in_whole_pixels():
    frame = np.full((6, 4, 3), 9, np.uint8)
    picture = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, 2)
    both = beside(frame, picture)
    assert both.shape == (6, 10, 3)
    assert (both[:, :4] == 9).all()
    np.testing.assert_array_equal(both[:, 4:, 0], np.kron([[0, 1], [2, 3]], np.ones((3, 3))))
    assert np.array_equal(beside(frame, None), frame)


def test_a_film_shows_what_was_imagined():
    """The picture of a plan that was made for the step before, and black at the reset."""
    rng = np.random.default_rng(0)
    store = EpisodeStore.from_arrays(
        {
            "obs": rng.normal(size=(20, 3)),
            "action": rng.normal(size=(20, 2)),
            "image": np.full((20, 8, 8, 3), 255, np.uint8),
        },
        [20],
    )
    spec = {
        "layout": "joint",
        "imagined": {"field": "image", "size": 4, "predict": "joint"},
        "network": {"type": "modalities", "base": {"type": "mlp", "width": 8}, "width": 8},
        "prediction": "x0",
        "horizon": 4,
        "n_action_steps": 2,
        "sampler": {"num_steps": 2},
    }
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    options = {"workers": Workers(num_envs=2, num_workers=0), "progress": False}
    env = EnvSpec("rollout_fake_envs:rollout_fakes/Point-v0")
    film = evaluate(policy, env, [3, 4], video=VideoOptions(episodes=1), **options).videos[0]
    assert film.frames.shape[1:] == (64, 128, 3)
    assert not film.frames[0, :, 64:].any()
    assert film.frames[1:, :, 64:].any(axis=(1, 2, 3)).all()
    plain = {"imagined": {**spec["imagined"], "predict": "action"}}
    alone = DiffusionPolicy.from_dataset(store, spec={**spec, **plain})
    film = evaluate(alone, env, [3], video=VideoOptions(episodes=1), **options).videos[0]
    assert film.frames.shape[1:] == (64, 64, 3)


@pytest.mark.parametrize("size", [(40, 30), (41, 33)])
def test_mp4_holds_every_frame(tmp_path, size):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_mp4(tmp_path / "film.mp4", _videos(*size), fps=10)
    width, height = size[1] + 8 + size[1] % 2, size[0] + 8 + size[0] % 2
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    assert len(frames) == 7 + 3 + 1
    first = frames[0]
    assert first[1, 10, 1] > first[1, 10, 0] + 40  # a green border


def test_what_cannot_be_written_becomes_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    media = save_media(tmp_path, _videos())
    assert [path.name for path in media.paths] == ["contact_sheet.png"]
    assert 'pip install "diffpolicy[media]"' in media.notes[0]
    assert save_media(tmp_path, []).notes == ("no pictures: no frame was drawn",)
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet(tmp_path / "x.png", [])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        contact_sheet(tmp_path / "x.png", _videos(), columns=0)


@pytest.fixture
def no_gl(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that the test's changes are undone
    return monkeypatch


def test_the_first_backend_that_works_is_chosen(no_gl):
    no_gl.setattr(video, "_why_not", lambda name, _: None if name == "osmesa" else "broken")
    choice = choose_gl_backend()
    assert choice.backend == os.environ["MUJOCO_GL"] == "osmesa"
    no_gl.setenv("MUJOCO_GL", "egl")  # a wish is the only candidate
    assert choose_gl_backend().backend is None


def test_without_a_backend_the_packages_are_named(no_gl):
    no_gl.setattr(video.ctypes.util, "find_library", lambda _: None)
    choice = choose_gl_backend()
    assert choice.backend is None
    for package in ("libegl1", "libegl-mesa0", "libgl1-mesa-dri", "libosmesa6"):
        assert package in choice.message
    assert os.environ["MUJOCO_GL"] == "disable"
    assert "MUJOCO_GL=disable" in choose_gl_backend().message


@pytest.mark.mujoco
def test_the_real_choice_draws_or_says_why(no_gl):
    pytest.importorskip("mujoco")
    choice = choose_gl_backend()
    assert choice.backend in ("egl", "osmesa", None)
    assert choice.backend is not None or "apt-get install" in choice.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(self, *args, **more):
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x")

    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(image.Image, "save", full)
    with pytest.raises(OSError, match=r"No space left.*sheet\.png"):
        contact_sheet(tmp_path / "sheet.png", _videos())
    assert list(tmp_path.iterdir()) == []
