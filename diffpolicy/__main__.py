"""``python -m diffpolicy`` is the command line."""

import sys

from diffpolicy.cli import main

if __name__ == "__main__":
    sys.exit(main())
