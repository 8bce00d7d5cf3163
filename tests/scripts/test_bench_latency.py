"""`python scripts/bench.py latency`: its rows, beside a peer's."""

from __future__ import annotations

import json

import pytest

from benches import latency
from diffpolicy.settings import ConfigError


def test_bench_latency_writes_its_rows(tmp_path, capsys, monkeypatch):
    file = tmp_path / "latency.json"
    pytest.importorskip("diffusers", reason="needs diffusers")
    quick = ["seconds=0.1", "backend=none", "peers=true", f"json={file}"]
    overhead = latency.executor_overhead
    monkeypatch.setattr(latency, "executor_overhead", lambda: overhead(50))
    monkeypatch.setattr(latency, "SLOW_MS", 1.0)  # the long rows once
    monkeypatch.setitem(latency.NETWORKS, "mlp", {"type": "mlp", "width": 16, "depth": 1})
    assert latency.run(quick) == 0
    printed = capsys.readouterr().out
    assert "| rti-3 | eager | 3 |" in printed
    assert printed.count("| full-ddpm-100 | eager |") == 1
    assert printed.count("| full-ddpm-100 | diffusers |") == 1
    report = json.loads(file.read_text())
    names = {row["name"] for row in report["rows"]}
    assert {"full-ddpm-100", "full-ddim-10", "ddim-1", "truncated-2", "rti-3"} <= names
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in report["rows"])
    cost = report["executor"]
    assert 0 < cost["p50_ms"] <= cost["p99_ms"] <= cost["max_ms"]
    assert 0 < cost["ticks"] <= 50
    with pytest.raises(ConfigError, match="give checkpoint=RUN"):
        latency.run(["episodes=5"])
