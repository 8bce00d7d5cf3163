"""Draw the latencies of a control loop: ``python scripts/executor_figure.py REPORT.json OUT.png``.

REPORT.json is what ``executor.report().to_json`` wrote; OUT's ending says the format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from diffpolicy.extras import need


def draw(axis: Any, name: str, bars: Any, summary: dict[str, float], budget_ms: float) -> None:
    """A histogram with p50, p99 and the budget."""
    lows = [max(low, 8e-6) for low, _, _ in bars]
    widths = [high - low for low, (_, high, _) in zip(lows, bars, strict=True)]
    axis.bar(lows, [count for _, _, count in bars], widths, align="edge", color="tab:blue")
    marks = {"p50": (summary["p50_ms"], "green"), "p99": (summary["p99_ms"], "orange")}
    for label, (value, color) in {**marks, "budget": (budget_ms, "red")}.items():
        if value > 0:
            axis.axvline(value, color=f"tab:{color}", linewidth=1, label=f"{label} {value:.3g} ms")
    axis.set(xscale="log", yscale="log", ylabel="count")
    axis.set_xlabel(f"{name} (ms), n = {summary['count']}")
    axis.grid(alpha=0.3)
    axis.legend()


def main(arguments: list[str]) -> int:
    """Read a report, write a picture."""
    source, target = map(Path, arguments)
    report = json.loads(source.read_text(encoding="utf-8"))
    plans = "plan latency", report["plan_bars"], report["plan_latency"], report["budget_ms"]
    overhead = "tick overhead", report["overhead_bars"], report["tick_overhead"], 0.0
    panels = [panel for panel in (plans, overhead) if panel[1]]
    if not panels:
        raise SystemExit("there is no latency to draw: the loop has had no tick yet")
    # A figure without pyplot: no global state, and never a window.
    size = (7, 2.8 * len(panels) + 0.4)
    figure = need("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        draw(axis, *panel)
    figure.savefig(target, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
