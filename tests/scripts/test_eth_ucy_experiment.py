from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pedestrians.arms import Settings
from pedestrians.study import draw, parse_settings, run, table

TINY = Settings(steps=8, batch_size=16, width=16, depth=1)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Two scenes of pedestrians who walk straight or turn."""
    rng = np.random.default_rng(0)
    scenes = {}
    for name in ("biwi_eth", "crowds_zara01"):
        rows = []
        for person in range(12):
            turn = rng.choice([-0.1, 0.0, 0.1])
            heading = rng.uniform(0, 6) + turn * np.arange(30)
            steps = rng.uniform(0.2, 0.6) * np.stack([np.cos(heading), np.sin(heading)], -1)
            place = np.cumsum(steps, axis=0)
            rows.append(np.column_stack([10 * np.arange(30), np.full(30, person), place]))
        scenes[name] = np.concatenate(rows)
    path = tmp_path_factory.mktemp("crowd") / "crowd.npz"
    np.savez(path, **scenes)
    return path


@pytest.fixture(scope="module")
def finished(crowd, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "result.json"
    return output, run([crowd], output, folds=["eth"], seeds=[0], settings=TINY, examples=20)


def test_every_arm_is_scored(finished):
    output, report = finished
    assert json.loads(output.read_text()) == report
    assert set(report["cells"]) == {"eth/vanilla/0", "eth/truncated/0"}
    row = report["summary"]["eth"]
    assert [row[arm]["nfe"]["mean"] for arm in ("ddim", "ddpm", "truncated")] == [20, 20, 2]
    for arm in row.values():
        assert 0 < arm["min_ade"]["mean"] < arm["min_fde"]["mean"] + 10
        assert 0 <= arm["footprint_diversity"]["mean"] < 1
    assert set(report["summary"]["difference"]) == {"eth/0"}
    assert table(report).count("\n") == 7  # heading, three arms, and their means


def test_finished_cells_are_not_trained_again(crowd, finished, monkeypatch):
    output, report = finished
    monkeypatch.setattr("pedestrians.study.TRAINERS", {"vanilla": None, "truncated": None})
    assert run([crowd], output, folds=["eth"], seeds=[0], settings=TINY, examples=20) == report
    with pytest.raises(ValueError, match=r"made with other settings \(steps\)"):
        run([crowd], output, folds=["eth"], settings=replace(TINY, steps=9), examples=20)
    with pytest.raises(ValueError, match="unknown fold"):
        run([crowd], output, folds=["hotell"], settings=TINY)


def test_picture_of_the_modes(finished, tmp_path):
    pytest.importorskip("matplotlib", reason="the media extra is not installed")
    draw(finished[1], tmp_path / "modes.png")
    assert (tmp_path / "modes.png").stat().st_size > 1000


def test_settings_from_texts():
    settings = parse_settings({"steps": "7", "top_m": "3", "reconstruction": "l2"})
    assert (settings.steps, settings.top_m, settings.reconstruction) == (7, 3, "l2")
    with pytest.raises(ValueError, match=r"unknown settings \['step'\]"):
        parse_settings({"step": "7"})
