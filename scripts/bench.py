"""Speed as ratios, measured side by side in one run: ``python scripts/bench.py --help``."""

import sys

from benches.sampling import help_text, run
from diffpolicy.cli import guarded

if __name__ == "__main__":
    sys.exit(guarded("bench", run, help_text))
