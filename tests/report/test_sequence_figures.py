"""Pictures of reward tuning: they exist, say what they should, and are the same every time."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from diffpolicy.report import sequence_figures as plots
from diffpolicy.report.figures import read_metrics
from diffpolicy.report.sequence_figures import (
    information,
    plot_curves,
    plot_front,
    plot_logo,
    standing_warning,
)

MEDIA = r'pip install "diffpolicy\[media\]"'
ROWS = [
    {"method": "pathwise", "setting": weight, "seed": seed, "kl": 2 - weight, "reward": 0.8 + seed}
    for weight in (0.1, 0.5)
    for seed in (0, 1, 2)
]


@pytest.fixture
def metrics(tmp_path):
    """Twelve evaluations; the held-out reward falls after the sixth. Batches in between."""
    lines = ["step,loss,reward,eval/reward,eval/reward_q25,eval/reward_q75,eval/held_out,eval/kl"]
    for i in range(12):
        held_out = min(i, 6) - max(0, i - 6) / 2
        lines += [f"{100 * i},1.0,9.0,{i},{i - 1},{i + 1},{held_out},nan"]
        lines += [f"{100 * i + 50},1.0,9.0,,,,,"]
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def size():
    image = pytest.importorskip("PIL.Image")

    def of(path):
        with image.open(path) as opened:
            return opened.size

    return of


def without_matplotlib(monkeypatch):
    real = importlib.import_module

    def refuse(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)


def some_profile(length: int, letters: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(letters, 0.3), length)


# ------------------------------------------------------------------ curves


def test_curves_are_of_evaluations_where_there_are_any(metrics):
    curves = read_metrics(metrics, first="eval/")
    assert curves["reward"] == ([100.0 * i for i in range(12)], list(range(12)))
    assert curves["reward_q25"][1][0] == -1
    assert curves["held_out"][1][5:9] == [5, 6, 5.5, 5]
    assert "kl" not in curves  # not a finite number in it
    metrics.write_text("step,reward\n1,0.5\n2,\n3,oops\n")
    assert read_metrics(metrics, first="eval/") == {"reward": ([1], [0.5])}


def test_the_warning_that_stands_at_the_end():
    steps = [10.0 * i for i in range(12)]
    rising = [float(i) for i in range(12)]
    falls = [min(i, 6) - max(0, i - 6) / 2 for i in range(12)]
    recovers = [*falls[:9], 6.0, 7.0, 8.0]
    found = standing_warning({"reward": (steps, rising), "held_out": (steps, falls)})
    assert found is not None
    assert found["step"] == 100  # smoothed, 1.25 below the peak: over a tenth of the rise since 0
    assert "since evaluation 6" in found["message"]
    for held_out in (recovers, rising):
        assert standing_warning({"reward": (steps, rising), "held_out": (steps, held_out)}) is None
    assert standing_warning({"reward": (steps, rising)}) is None


def test_curves_are_drawn(metrics, tmp_path, size):
    one = plot_curves(metrics, tmp_path / "out" / "one.png")
    metrics.write_text(metrics.read_text().replace("nan", "1.5"))
    two = plot_curves(metrics, tmp_path / "out" / "two.png", title="demo")
    assert size(two)[0] == size(one)[0] == 840
    assert 300 < size(one)[1] < size(two)[1] < 900  # with the divergence there are two panels
    assert sorted(p.name for p in one.parent.iterdir()) == ["one.png", "two.png"]


# ------------------------------------------------------------------ front


def test_front_depends_on_the_data_alone(tmp_path, size):
    pictures = [
        plot_front(rows, tmp_path / f"{i}.png", optimum=optimum, title="demo").read_bytes()
        for i, (rows, optimum) in enumerate(
            [
                (ROWS, ()),
                (ROWS, ()),
                (ROWS[:4], ()),
                (ROWS, [(0, 0.1), (1, 0.9)]),
                ([*ROWS, {"method": "best of 8", "kl": None, "reward": 1.0}], ()),
            ]
        )
    ]
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4
    assert size(tmp_path / "0.png") == (840, 600)


def test_front_joins_medians(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: drawn.update(axis=figure.axes[0])
    )
    best = [{"method": "best of 8", "seed": s, "kl": None, "reward": 1.0 + s} for s in range(3)]
    undefined = {"method": "broken", "kl": 1.0, "reward": math.nan}
    plot_front([*ROWS, *best, undefined], tmp_path / "a.png", optimum=[(1, 0.9), (0, 0.1)])
    lines = {line.get_label(): line for line in drawn["axis"].lines}
    assert lines["pathwise"].get_xydata().tolist() == [[1.5, 1.8], [1.9, 1.8]]
    assert set(lines["best of 8 (no KL)"].get_ydata()) == {2.0}
    assert lines["optimum"].get_xydata().tolist() == [[0, 0.1], [1, 0.9]]
    points = [line for line in drawn["axis"].lines if line.get_label().startswith("_")]
    assert [len(line.get_xydata()) for line in points] == [6]
    assert not any("broken" in label for label in lines)


# ------------------------------------------------------------------ logos


def test_information_of_known_laws():
    p = [[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]]
    assert information(p).tolist() == [2, 0, 1]


def test_letters_are_as_tall_as_their_information(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.update(axes=figure.axes))
    p = np.array([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0.25, 0.75]])
    plot_logo({"tuned": p}, tmp_path / "a.png", alphabet="ACGT")
    (axis,) = drawn["axes"]
    boxes = [patch.get_path().get_extents() for patch in axis.patches]
    bits = 2 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)
    found = sorted((round(b.y0, 6), round(b.y1, 6)) for b in boxes)
    expected = [(0, 2), (0, 0.25 * bits), (0.25 * bits, bits)]
    np.testing.assert_allclose(found, sorted(expected), atol=1e-5)
    assert sorted(round((b.x0 + b.x1) / 2) for b in boxes) == [1, 3, 3]
    assert axis.get_ylim() == (0, 2)
    assert axis.get_title(loc="left") == "tuned"


def test_long_sequences_are_wrapped(tmp_path, size):
    names = ("pre-trained", "tuned")
    eight = {name: some_profile(8, 4, seed) for seed, name in enumerate(names)}
    long = {name: some_profile(45, 4, seed) for seed, name in enumerate(names)}
    short_size = size(plot_logo(eight, tmp_path / "8.png", alphabet="ACGT"))
    long_size = size(plot_logo(long, tmp_path / "45.png", alphabet="ACGT", title="promoter"))
    assert 300 < short_size[0] < long_size[0] < 1400
    assert short_size[1] < long_size[1] < 800  # four rows in place of two


def test_logos_depend_on_the_data_alone(tmp_path):
    def picture(name, seed, alphabet):
        p = {"tuned": some_profile(4, len(alphabet), seed)}
        return plot_logo(p, tmp_path / name, alphabet=alphabet).read_bytes()

    same = [picture(f"{i}.png", 0, "ACGU") for i in range(2)]
    assert same[0] == same[1] != picture("2.png", 1, "ACGU")
    for alphabet in ("ACDEFGHIKLMNPQRSTVWY", "XYZ-", "ab "):  # a blank has no ink of its own
        assert len(picture("other.png", 0, alphabet)) > 1000


# ------------------------------------------------------------------ bad input


def test_missing_matplotlib_says_what_to_install(monkeypatch, metrics, tmp_path):
    without_matplotlib(monkeypatch)
    for draw in (
        lambda: plot_curves(metrics, tmp_path / "a.png"),
        lambda: plot_front(ROWS, tmp_path / "a.png"),
        lambda: plot_logo({"tuned": some_profile(4, 4)}, tmp_path / "a.png", alphabet="ACGT"),
    ):
        with pytest.raises(ImportError, match=MEDIA):
            draw()
    assert not (tmp_path / "a.png").exists()


def test_bad_input(metrics, tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="no row has a number as its reward"):
        plot_front([{"method": "a", "kl": 1.0, "reward": None}], path)
    with pytest.raises(ValueError, match=r"ends in \.png, got .*a\.svg"):
        plot_front(ROWS, tmp_path / "a.svg")
    good = some_profile(4, 4)
    for profiles, message in (
        ({}, "at least one profile"),
        ({"a": good, "b": good[:3]}, r"'b' must be \[4, 4\].*got \[3, 4\]"),
        ({"a": good[:, :3]}, r"'a' must be \[4, 4\]"),
        ({"a": 2 * good}, "'a' must be frequencies that sum to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_logo(profiles, path, alphabet="ACGT")
    metrics.write_text("step,loss\n1,0.5\n")
    with pytest.raises(ValueError, match="none of the columns"):
        plot_curves(metrics, path)
    metrics.write_text("loss\n1\n")
    with pytest.raises(ValueError, match="first column is not 'step'"):
        plot_curves(metrics, path)
    assert not path.exists()
