"""Reports: tables, figures and comparisons of runs."""

from diffpolicy.report.compare import compare_report, compare_tunings
from diffpolicy.report.sequences import TuningResult, write_report
from diffpolicy.report.tuning import write_tuning_report

__all__ = [
    "TuningResult",
    "compare_report",
    "compare_tunings",
    "write_report",
    "write_tuning_report",
]
