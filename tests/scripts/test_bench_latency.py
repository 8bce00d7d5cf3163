"""`python scripts/bench.py latency`: a row for every way to draw plans. Nothing is timed."""

import json

import pytest

from benches.sampling import help_text, run
from diffpolicy.cli import guarded


def test_bench_latency_writes_its_rows(tmp_path, capsys):
    file = tmp_path / "latency.json"
    pytest.importorskip("diffusers", reason="needs diffusers")
    quick = ["seconds=0.1", "backend=none", "peers=true", f"json={file}"]
    assert run(["latency", *quick]) == 0
    printed = capsys.readouterr().out
    assert "| rti-3 | eager | 3 |" in printed
    assert printed.count("| full-ddpm-100 | eager |") == 1
    assert printed.count("| full-ddpm-100 | diffusers |") == 1
    report = json.loads(file.read_text())
    names = {row["name"] for row in report["rows"]}
    assert {"full-ddpm-100", "full-ddim-10", "ddim-1", "truncated-2", "rti-3"} <= names
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in report["rows"])
    assert guarded("bench", run, help_text, ["latency", "episodes=5"]) == 1
    assert "give checkpoint=RUN" in capsys.readouterr().err
