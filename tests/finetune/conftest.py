"""Makes the helper modules of this directory importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for finetune_tilted_mixture
