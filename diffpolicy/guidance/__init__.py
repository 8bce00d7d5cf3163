"""What wraps a denoiser or steers a chain: conditions, pinned values, rewards, particles.

Needs torch and numpy alone.
"""

from diffpolicy.guidance.base import Guidance, Wrapper
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.guidance.layout import Layout
from diffpolicy.guidance.particles import (
    PARTICLE_METHODS,
    SMC,
    SVDD,
    TDS,
    BestOfN,
    Drawn,
    make_particle_method,
)
from diffpolicy.guidance.pinned import PinCond, Pinned, PrefixCond, PrefixGuidance
from diffpolicy.guidance.residual import ResidualDenoiser
from diffpolicy.guidance.reward import RewardGuidance
from diffpolicy.guidance.value import ValueGuidance, head_value

__all__ = [
    "PARTICLE_METHODS",
    "SMC",
    "SVDD",
    "TDS",
    "BestOfN",
    "ClassifierFreeGuidance",
    "Drawn",
    "Guidance",
    "Layout",
    "PinCond",
    "Pinned",
    "PrefixCond",
    "PrefixGuidance",
    "ResidualDenoiser",
    "RewardGuidance",
    "ValueGuidance",
    "Wrapper",
    "head_value",
    "make_particle_method",
]
