from __future__ import annotations

import pytest

from diffpolicy.report.figures import plot_curve, read_metrics

CSV = """step,loss,val_loss,eval/success,eval/success_low,eval/success_high,note
1,1.0,,,,,a
2,0.5,0.7,0.2,0.1,0.4,b
3,0.25,nan,,,,c
4,0.1,0.2,0.9,0.8,0.97,d
"""


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(CSV)
    return path


def test_reads_what_is_there(metrics):
    columns = read_metrics(metrics)
    assert columns["loss"] == ([1, 2, 3, 4], [1.0, 0.5, 0.25, 0.1])
    assert columns["val_loss"] == ([2, 4], [0.7, 0.2])
    assert columns["success"] == ([2, 4], [0.2, 0.9])
    assert "note" not in columns


def test_draws_one_or_two_panels(metrics, tmp_path):
    image = pytest.importorskip("PIL.Image")
    heights = []
    for name, more in (("both", {"title": "demo"}), ("loss", {"score": "absent"})):
        path = plot_curve(metrics, tmp_path / "out" / f"{name}.png", **more)
        with image.open(path) as opened:
            heights.append(opened.height)
    assert heights[0] > heights[1] > 200
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_bad_input(metrics, tmp_path):
    with pytest.raises(ValueError, match=r"none of the columns.*success"):
        plot_curve(metrics, tmp_path / "a.png", losses=("nothing",), score="absent")
    metrics.write_text("loss\n1\n")
    with pytest.raises(ValueError, match="first column is not 'step'"):
        plot_curve(metrics, tmp_path / "a.png")
