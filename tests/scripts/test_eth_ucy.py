from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy.data import Normalizer
from pedestrians.scenes import (
    FOLDS,
    fold_scenes,
    pedestrian_frame,
    read_scenes,
    split,
    to_frame,
    to_world,
    trajectories,
    windows,
)

DATA = Path(__file__).parents[3] / "shared" / "data" / "eth_ucy" / "eth_ucy_raw.npz"


def walk(person, first, count, *, start=(0.0, 0.0), velocity=(0.4, 0.0), step=10):
    t = np.arange(count)
    place = np.asarray(start) + t[:, None] * np.asarray(velocity)
    return np.column_stack([step * (first + t), np.full(count, person), place])


def test_windows_are_runs_of_twenty_consecutive_frames():
    gap = walk(3, 0, 40)
    gap = np.delete(gap, 19, axis=0)  # 19 frames, a gap, 20 frames
    scene = np.concatenate([walk(1, 5, 22), walk(2, 0, 19), gap])
    scene = np.random.default_rng(0).permutation(scene)
    runs, label = windows(scene)
    assert label.tolist() == [[1, 12], [1, 13], [1, 14], [3, 27]]
    np.testing.assert_allclose(np.diff(runs[..., 0], axis=1), 0.4)
    assert runs[1, 0, 0] == pytest.approx(0.4)


def test_heading_is_that_of_the_last_displacement_and_of_observations_alone():
    observed = np.zeros((3, 8, 2))
    observed[0, :, 1] = np.arange(8) * 0.5  # north
    observed[1, :7, 0] = np.minimum(np.arange(7), 4) * 0.5  # east, then stands
    observed[1, 7, 0] = 2.0
    frame = pedestrian_frame(observed)
    assert frame[0].tolist() == pytest.approx([0, 3.5, math.pi / 2])
    assert frame[1].tolist() == pytest.approx([2, 0, 0])
    assert frame[2].tolist() == [0, 0, 0]


def test_frames_invert_and_keep_distances():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 20, 2))
    frame = pedestrian_frame(points[:, :8])
    local = to_frame(points, frame)
    np.testing.assert_allclose(to_world(local, frame), points, atol=1e-12)
    np.testing.assert_allclose(local[:, 7], 0, atol=1e-12)
    assert (local[:, 7, 0] - local[:, 6, 0] > 0).all()
    np.testing.assert_allclose(local[:, 6, 1], 0, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(local, axis=1), axis=-1),
        np.linalg.norm(np.diff(points, axis=1), axis=-1),
    )


def test_straight_walkers_look_alike_whatever_their_direction():
    scene = np.concatenate(
        [
            walk(i, 0, 20, start=(i, -i), velocity=(0.4 * math.cos(i), 0.4 * math.sin(i)))
            for i in range(6)
        ]
    )
    data = trajectories({"square": scene}, ["square"])
    expected = 0.4 * torch.arange(1, 13)
    assert data.future.shape == (6, 12, 2)
    torch.testing.assert_close(data.future[..., 0], expected.expand(6, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.future[..., 1], torch.zeros(6, 12), atol=1e-5, rtol=0)


@pytest.fixture
def two_squares():
    scenes = {
        "a": np.concatenate([walk(1, 0, 25), walk(2, 0, 21, velocity=(0.0, 0.3))]),
        "b": np.concatenate([walk(i, 0, 22, velocity=(0.1 * i, 0.2)) for i in range(8)]),
    }
    return trajectories(scenes, ["a", "b"], mirror=True)


def test_source_mirrors_and_normalises(two_squares):
    data = two_squares
    assert len(data) == 2 * (6 + 2 + 8 * 3)
    half = len(data) // 2
    batch = data.gather(torch.tensor([7, 7 + half]))
    assert batch["obs"].shape == (2, 8, 2)
    torch.testing.assert_close(batch["obs"][1], batch["obs"][0] * torch.tensor([1.0, -1.0]))
    assert torch.equal(batch["action"][0], data.future[7])
    assert data.locate(7) == data.locate(7 + half) == (1, 8)
    statistics = data.statistics()
    assert statistics["action"]["mean"][1] == pytest.approx(0, abs=1e-12)
    normalizer = Normalizer.fit(statistics, {"obs": "gaussian", "action": "gaussian"})
    from dataclasses import replace

    scaled = replace(data, normalizer=normalizer).gather(torch.arange(len(data)))
    flat = scaled["action"].flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat[:, 0].std(), torch.tensor(1.0), atol=1e-2, rtol=0)


def test_split_is_by_pedestrian(two_squares):
    train, val = split(two_squares, 0.3, seed=0)
    assert len(train) + len(val) == len(two_squares)
    assert not set(train.episode.tolist()) & set(val.episode.tolist())
    assert len(val.episode.unique()) == 3
    again = split(two_squares, 0.3, seed=0)[1]
    assert torch.equal(again.episode, val.episode)


def test_no_fold_trains_on_its_own_place():
    names = dict.fromkeys(
        ["biwi_eth", "crowds_zara01", "crowds_zara02", "students001", "students003", "uni_examples"]
    )
    for fold, out in FOLDS.items():
        train, held_out = fold_scenes(names, fold)
        assert held_out == out
        assert not set(train) & set(out)
    assert "uni_examples" not in fold_scenes(names, "univ")[0]
    assert "uni_examples" in fold_scenes(names, "eth")[0]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"unknown fold 'hotell'; expected one of \['eth'"):
        fold_scenes({}, "hotell")
    with pytest.raises(ValueError, match=r"unknown scenes \['x'\]; the file holds \['a'\]"):
        trajectories({"a": walk(1, 0, 20)}, ["x"])
    with pytest.raises(ValueError, match=r"no pedestrian of \['a'\] is present in 20"):
        trajectories({"a": walk(1, 0, 19)}, ["a"])
    with pytest.raises(FileNotFoundError):
        read_scenes(tmp_path / "none.npz")
    np.savez(tmp_path / "bad.npz", a=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"rows \[frame, pedestrian, x, y\], got shape \[3, 2\]"):
        read_scenes(tmp_path / "bad.npz")
    (tmp_path / "biwi_hotel.txt").write_text("0\t1.0\t1.41\t-5.68\n10\t1.0\t1.4\t-5.6\n")
    assert read_scenes(tmp_path / "biwi_hotel.txt")["biwi_hotel"].shape == (2, 4)


@pytest.mark.skipif(not DATA.exists(), reason="shared/data/eth_ucy is not here")
def test_published_counts():
    """The numbers of test sequences that the literature gives for these scenes."""
    scenes = read_scenes(DATA)
    counts = {name: len(windows(scene)[0]) for name, scene in scenes.items()}
    assert counts["biwi_eth"] == 364
    assert counts["crowds_zara01"] == 2356
    assert counts["crowds_zara02"] == 5910
    assert counts["students001"] + counts["students003"] == 24334
