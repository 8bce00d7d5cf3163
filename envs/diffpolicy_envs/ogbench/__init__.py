"""OGBench's manipulation tasks: data made from nothing, and the benchmark's evaluation.

Needs the simulator (``pip install "diffpolicy[ogbench]"``) when an environment is made, not before.
"""

from __future__ import annotations

from diffpolicy_envs.ogbench.recipes import RECIPES
from diffpolicy_envs.ogbench.relabel import relabel

__all__ = ["RECIPES", "relabel"]
