"""Make datasets of our own in the HDF5 layout of D4RL: ``python scripts/generate.py --help``."""

import sys

from diffpolicy.cli import guarded
from generators.command import help_text, run

if __name__ == "__main__":
    sys.exit(guarded("generate", run, help_text))
