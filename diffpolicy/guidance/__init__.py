"""What wraps a denoiser or steers a chain: conditions, pinned values, rewards, particles.

Needs torch and numpy alone.
"""

from diffpolicy.guidance.base import Guidance, Wrapper
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.guidance.cost_guidance import CostCond, CostGuidance
from diffpolicy.guidance.costs import COSTS, Cost, Dynamics, Limits, Obstacle, Smoothness
from diffpolicy.guidance.layout import Layout
from diffpolicy.guidance.particles import SMC, SVDD, TDS, BestOfN, Drawn
from diffpolicy.guidance.pinned import PinCond, Pinned, PrefixCond, PrefixGuidance
from diffpolicy.guidance.residual import ResidualDenoiser
from diffpolicy.guidance.reward import RewardGuidance
from diffpolicy.guidance.search import (
    PARTICLE_METHODS,
    PathSearch,
    RolloverBudget,
    make_particle_method,
)
from diffpolicy.guidance.value import ValueGuidance, head_value

__all__ = [
    "COSTS",
    "PARTICLE_METHODS",
    "SMC",
    "SVDD",
    "TDS",
    "BestOfN",
    "ClassifierFreeGuidance",
    "Cost",
    "CostCond",
    "CostGuidance",
    "Drawn",
    "Dynamics",
    "Guidance",
    "Layout",
    "Limits",
    "Obstacle",
    "PathSearch",
    "PinCond",
    "Pinned",
    "PrefixCond",
    "PrefixGuidance",
    "ResidualDenoiser",
    "RewardGuidance",
    "RolloverBudget",
    "Smoothness",
    "ValueGuidance",
    "Wrapper",
    "head_value",
    "make_particle_method",
]
