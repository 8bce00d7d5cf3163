"""Reports on one run and on several: their figures are those that went in."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy.report.compare import compare_report
from diffpolicy.report.sequences import FORMAT, TuningResult, write_report
from diffpolicy.report.tables import method_statistics, method_table, plain, read_report, text
from diffpolicy.sequences.exact import exact_scores


def spread(median: float) -> dict[str, float]:
    return {
        "median": median,
        "q25": median - 0.125,
        "q75": median + 0.25,
        "mean": median + 0.0625,
    }


def row(reward: float, kl: float | None, **more) -> dict:
    kind = None if kl is None else "path"
    return {
        "count": 640,
        "reward": spread(reward),
        "held_out": spread(reward - 0.5),
        "kl": kl,
        "kl_kind": kind,
        "kl_standard_error": None if kl is None else 0.05,
        "valid": 1.0,
        **more,
    }


PROFILES = {
    "pre-trained": np.full((4, 4), 0.25),
    "tuned": np.eye(4),
    "top of the data": np.roll(np.eye(4), 1, axis=0),
}


def result(method: str = "pathwise", seed: int = 0, **changes) -> TuningResult:
    values = {
        "task": "counting",
        "method": method,
        "seed": seed,
        "before": row(1.0, 0.0),
        "after": row(2.0 + seed, 1.5),
        "alphabet": "ACGT",
        "profiles": PROFILES,
        "settings": {"command": "diffpolicy finetune experiment=counting", "kl_weight": 0.1},
        "cost": {"updates": 100, "nfe": 8, "reward_calls": 64_000, "wall_s": 12.5},
        "best": [{"sequence": "ACGT", "reward": 2.5, "held_out": 1.25}],
        **changes,
    }
    return TuningResult(**values)


def lines_of(text: str) -> dict[str, str]:
    """Lines of tables by their first cell."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def hide_matplotlib(monkeypatch):
    real = importlib.import_module

    def refuse(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.fixture
def no_pictures(monkeypatch):
    """matplotlib cannot be imported: most tests are about words."""
    hide_matplotlib(monkeypatch)


# ------------------------------------------------------------------ tables


def test_a_table_of_known_numbers():
    rows = [
        {
            "method": "pathwise",
            "seed": seed,
            "reward": spread(reward),
            "kl": reward / 2,
            "exact": {"progress": reward / 10},
            "nfe": 8,
            "reward_calls": 64_000,
            "wall_s": 10.5 + seed,
        }
        for seed, reward in enumerate([1.0, 2.0, 4.0])
    ]
    rows += [{"method": "best of 8", "seed": 0, "reward": spread(3.0), "kl": None, "exact": None}]
    columns = {"reward": "reward", "kl": "KL", "exact.progress": "G"}
    assert method_table(rows, columns) == (
        "| method | seeds | reward | KL | G | NFE | reward calls | wall s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| pathwise | 3 | 2.000 [1.500, 3.000] | 1.000 [0.750, 1.500] | 0.200 [0.150, 0.300] "
        "| 8 | 64,000 | 11.500 |\n"
        "| best of 8 | 1 | 3.000 |  |  |  |  |  |\n"
    )


def test_settings_of_a_method_have_lines_of_their_own():
    rows = [
        {"method": "a|b", "setting": weight, "kl": kl}
        for weight, kls in (("kl_weight=0.1", (1.0, None)), ("kl_weight=0.5", (0.5, 0.25)))
        for kl in kls
    ]
    table = method_table(rows, {"kl": "KL"})
    assert "| a\\|b, kl_weight=0.1 | 2 | 1.000 (1 of 2) |" in table
    found = method_statistics(rows, ["kl"])
    assert found["a|b, kl_weight=0.1"]["kl"]["std"] is None
    assert found["a|b, kl_weight=0.5"]["kl"]["values"] == [0.5, 0.25]
    assert found["a|b, kl_weight=0.5"]["kl"]["mean"] == 0.375


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (0, "0"),
        (64_000, "64,000"),
        (1.0, "1.000"),
        (-261.25, "-261.2"),
        (12_345.6, "12,346"),
        (0.00123, "0.0012"),
        (0.0, "0"),
        (True, "True"),
        ("ACGT", "ACGT"),
    ],
)
def test_numbers_in_cells(value, expected):
    assert text(value) == expected


# ------------------------------------------------------------------ one run


def test_a_report_says_what_was_reached(no_pictures, tmp_path):
    law = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    scores = exact_scores(law, torch.full((3,), 1 / 3), torch.tensor([1.0, 0.0, 0.0]), 0.1)
    after = row(2.0, 1.5, kmer_correlation=None, entropy=float("nan"))
    report = write_report(tmp_path, result(after=after, exact=scores._asdict()))
    path = tmp_path / "report.json"
    assert report == read_report(path, FORMAT)
    assert report["after"]["reward"] == spread(2.0)
    assert report["after"]["entropy"] is None
    assert report["exact"]["progress"] == scores.progress
    assert report["profiles"]["tuned"] == np.eye(4).tolist()
    assert report["warning"] is None
    assert "NaN" not in path.read_text()
    lines = lines_of((tmp_path / "report.md").read_text())
    assert lines["reward, training oracle"].endswith(
        "| 1.000 [0.875, 1.250] | 2.000 [1.875, 2.250] |"
    )
    assert lines["KL, nats"].endswith(
        "| 0.000 +- 0.050 (path) | 1.500 +- 0.050 (path) |".replace("0.000", "0")
    )
    assert lines["k-mer correlation"].endswith("|  |  |")
    assert lines["reward calls"] == "| reward calls | 64,000 |"
    assert lines["progress"] == f"| progress | {scores.progress:.3f} |"
    assert lines["ACGT"] == "| ACGT | 2.500 | 1.250 |"
    assert "diffpolicy finetune experiment=counting" in (tmp_path / "report.md").read_text()


def test_a_report_goes_without_pictures(no_pictures, tmp_path):
    report = write_report(tmp_path, result())
    assert report["pictures"] == []
    assert len(report["notes"]) == 1
    assert 'pip install "diffpolicy[media]"' in report["notes"][0]
    assert report["notes"][0] in (tmp_path / "report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_hacked_reward_heads_the_report(tmp_path):
    rows = [f"{100 * i},{i},{min(i, 4) - max(0, i - 4)},{i / 4}" for i in range(9)]
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("\n".join(["step,eval/reward,eval/held_out,eval/kl", *rows]) + "\n")
    report = write_report(tmp_path, result())
    assert report["warning"]["step"] == 700
    assert "the reward is being hacked" in report["warning"]["message"]
    words = (tmp_path / "report.md").read_text()
    assert "**Since update 700**: the reward is being hacked" in words
    assert report["pictures"] == ["logo.png", "curves.png"]
    for name in report["pictures"]:
        assert f"]({name})" in words
        assert (tmp_path / name).stat().st_size > 2000


def test_a_metrics_file_without_rows_is_only_noted(no_pictures, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n")
    report = write_report(tmp_path, result())
    assert report["warning"] is None
    assert any("has no rows" in note for note in report["notes"])


# ------------------------------------------------------------------ several runs


def test_a_comparison_over_seeds(no_pictures, tmp_path):
    runs = []
    for method, kl, exact in (("pathwise", 1.5, True), ("best of 8", None, False)):
        for seed in range(3):
            law = {"progress": 0.25 * seed, "reward": 5.0, "kl": 2.0, "objective_reference": 1.125}
            runs.append(tmp_path / f"{method}_{seed}")
            write_report(
                runs[-1],
                result(method, seed, after=row(2.0 + seed, kl), exact=law if exact else None),
            )
    # A file is as good as the directory that holds it.
    out = compare_report([runs[0] / "report.json", *runs[1:]], tmp_path / "out").parent
    report = json.loads((out / "report.json").read_text())
    assert list(report["methods"]) == ["pre-trained", "pathwise", "best of 8"]
    assert report["methods"]["pathwise"]["reward"]["values"] == [2.0, 3.0, 4.0]
    assert report["methods"]["best of 8"]["kl"] is None
    points = {p["method"]: (p["kl"], p["reward"]) for p in report["front"] if p["seed"] == 0}
    # Exact figures where there are any, else the mean: 2 + 1/16.
    assert points == {
        "pre-trained": (0.0, 1.125),
        "pathwise": (2.0, 5.0),
        "best of 8": (None, 2.0625),
    }
    words = (out / "report.md").read_text()
    lines = lines_of(words)
    assert lines["pathwise"].startswith(
        "| pathwise | 3 | 0.250 [0.125, 0.375] | 5.000 [5.000, 5.000] | 3.000 [2.500, 3.500] |"
    )
    assert lines["best of 8"].startswith("| best of 8 | 3 |  |  | 3.000 [2.500, 3.500] |")
    assert "KL (pre-trained, pathwise): of paths, an upper bound" in words


def test_pictures_of_a_comparison(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        hide_matplotlib(patch)
        runs = [tmp_path / str(kl) for kl in (1.5, 1.0)]
        for run, kl in zip(runs, (1.5, 1.0), strict=True):
            write_report(run, result(after=row(2.0, kl)))
    written = [compare_report([run], run / "out").parent for run in runs]
    fronts, logos = ([folder / name for folder in written] for name in ("front.png", "logo.png"))
    assert fronts[0].read_bytes() != fronts[1].read_bytes()
    assert logos[0].read_bytes() == logos[1].read_bytes()
    assert "![front](front.png)" in (written[0] / "report.md").read_text()


def test_warnings_of_runs_are_told(no_pictures, tmp_path):
    report, path = write_report(tmp_path, result()), tmp_path / "report.json"
    path.write_text(json.dumps({**report, "warning": {"step": 300, "message": "hacked"}}))
    compare_report([path], tmp_path / "out")
    words = (tmp_path / "out" / "report.md").read_text()
    assert "**Warning**, pathwise, seed 0, update 300: hacked." in words


# ------------------------------------------------------------------ bad input


def test_bad_results(tmp_path):
    with pytest.raises(ValueError, match=r"profile 'tuned' must be \[4, 2\]"):
        result(alphabet="AB", profiles={"tuned": np.eye(4)})
    with pytest.raises(ValueError, match=r"value\.settings\.task is object"):
        write_report(tmp_path, result(settings={"task": object()}))
    assert not list(tmp_path.iterdir())
    values = {"a": np.float32(0.5), "b": (1, float("inf")), "c": Path("x"), "d": torch.ones(2)}
    assert plain(values) == {"a": 0.5, "b": [1, None], "c": "x", "d": [1.0, 1.0]}


def test_bad_comparisons(no_pictures, tmp_path):
    first, other = tmp_path / "a", tmp_path / "b"
    write_report(first, result())
    with pytest.raises(ValueError, match="no reports to compare"):
        compare_report([], tmp_path / "out")
    with pytest.raises(ValueError, match="two reports are of 'pathwise' with seed 0"):
        compare_report([first, first], tmp_path / "out")
    write_report(other, result(seed=1, task="other"))
    with pytest.raises(ValueError, match=r"runs of one task.*\['counting', 'other'\]"):
        compare_report([first, other], tmp_path / "out")
    with pytest.raises(ValueError, match=r"no report at .*c.report\.json"):
        compare_report([tmp_path / "c" / "report.json"], tmp_path / "out")
    together = compare_report([first], tmp_path / "out").parent
    with pytest.raises(ValueError, match=r"'diffpolicy-finetune-report-comparison' of version 1"):
        compare_report([together], tmp_path / "again")
