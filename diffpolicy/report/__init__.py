"""Reports: tables, figures and comparisons of runs."""

from diffpolicy.report.sequence_comparison import compare_report
from diffpolicy.report.sequences import TuningResult, write_report

__all__ = [
    "TuningResult",
    "compare_report",
    "write_report",
]
