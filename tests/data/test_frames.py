"""Faults of cameras, put into frames of a moving dot before a coloured wall."""

from __future__ import annotations

import numpy as np
import pytest

from diffpolicy.data import EpisodeStore, check_store, format_issue

LENGTH, EPISODES = 40, 8


@pytest.fixture
def scene():
    """Episodes of a dot that wanders; the state says where it is."""
    rng = np.random.default_rng(0)
    rows = LENGTH * EPISODES
    place = rng.integers(0, 20, (rows, 2))
    frames = np.full((rows, 24, 24, 3), (90, 120, 150), np.uint8)
    frames[np.arange(rows), place[:, 0] + 2, place[:, 1] + 2] = (250, 40, 10)
    frames[:, :6] = (200, 60, 30)
    frames[:, 0, 0, 0] = np.arange(rows) % 250  # no two neighbours are the same
    return {
        "obs.camera": frames,
        "obs.place": (place + rng.normal(size=place.shape)).astype(np.float32),
        "action": rng.normal(size=(rows, 2)).astype(np.float32),
    }


def found(arrays):
    ends = np.arange(1, EPISODES + 1) * LENGTH
    return check_store(EpisodeStore.from_arrays(arrays, ends))


def test_sound_frames_raise_no_alarm(scene):
    assert found(scene) == []
    grey = {**scene, "obs.camera": scene["obs.camera"][..., :1]}
    assert found(grey) == []
    assert found({**scene, "obs.camera": scene["obs.camera"][..., 0]}) == []
    unlike = np.random.default_rng(12).integers(0, 255, scene["obs.camera"].shape).astype(np.uint8)
    assert found({**scene, "obs.camera": unlike}) == []  # no two episodes have colours in common


def test_a_camera_that_froze_while_the_robot_moved(scene):
    frames = scene["obs.camera"]
    frames[90:115] = frames[90]
    (issue,) = found(scene)
    assert (issue.field, issue.episode, issue.row) == ("obs.camera", 2, 90)
    assert "in steps 10..34 of the episode, while other observations change" in issue.message
    scene["obs.place"][90:115] = scene["obs.place"][90]  # nothing moved: nothing to see
    assert not [issue for issue in found(scene) if issue.field == "obs.camera"]


def test_a_camera_that_was_always_frozen(scene):
    scene["obs.camera"][:] = scene["obs.camera"][0]
    issues = found(scene)
    assert [issue.episode for issue in issues] == list(range(EPISODES))


@pytest.mark.parametrize(
    ("value", "word"), [(0, "black (level 0"), (255, "white"), (100, "one colour")]
)
def test_frames_without_a_picture(scene, value, word):
    scene["obs.camera"][[45, 47]] = value
    (issue,) = found(scene)
    assert (issue.episode, issue.row) == (1, 45)
    assert "2 of the episode's 40 frames have no picture, first in step 5" in issue.message
    assert word in issue.message


@pytest.mark.parametrize("episodes", [[2, 5], [0], [4, 5, 6, 7]])
def test_red_and_blue_exchanged_in_some_episodes(scene, episodes):
    frames = scene["obs.camera"]
    for i in episodes:
        part = slice(i * LENGTH, (i + 1) * LENGTH)
        frames[part] = frames[part, ..., ::-1]
    (issue,) = found(scene)
    assert f"{len(episodes)} of 8 episodes ({', '.join(map(str, episodes))})" in issue.message


def test_nothing_is_said_of_colours_that_differ_anyway(scene):
    rng = np.random.default_rng(1)
    for i in range(EPISODES):
        scene["obs.camera"][i * LENGTH : (i + 1) * LENGTH, :, :, 2] = rng.integers(0, 255, (24, 24))
    assert found(scene) == []


def test_images_that_are_stored_in_another_way(scene):
    frames = scene["obs.camera"]
    for stored, said in (
        (np.moveaxis(frames, -1, 1), "channels first"),
        (frames.astype(np.float32), "not taken for images, which are bytes"),
        (frames.reshape(len(frames), -1), "looks like an image that was flattened"),
        (np.repeat(frames, 2, axis=-1), "no number of channels"),
    ):
        (issue,) = found({**scene, "obs.camera": stored})
        assert said in format_issue(issue)
