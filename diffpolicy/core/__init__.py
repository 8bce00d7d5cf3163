"""The core: noise processes, starts, denoisers, solvers and the one sampling loop.

Needs torch and numpy alone.
"""

from diffpolicy.core.classifier import RewardGuidance
from diffpolicy.core.denoiser import AnalyticDenoiser, BaseDenoiser, Denoised, Denoiser
from diffpolicy.core.guidance import (
    ClassifierFreeGuidance,
    Guidance,
    Inpaint,
    PrefixCond,
    PrefixGuidance,
)
from diffpolicy.core.layout import Layout
from diffpolicy.core.masked import MaskedDenoiser
from diffpolicy.core.masking import (
    Cosine,
    LogLinear,
    MaskingProcess,
    make_masking,
    one_hot,
    to_tokens,
)
from diffpolicy.core.noise import (
    EDM,
    DiscreteVP,
    FlowMatching,
    GaussianProcess,
    NoiseProcess,
    VPCosine,
    VPLinear,
    make_process,
)
from diffpolicy.core.particles import (
    PARTICLE_METHODS,
    SMC,
    SVDD,
    TDS,
    BestOfN,
    Drawn,
    make_particle_method,
)
from diffpolicy.core.pinning import PinCond, Pinned
from diffpolicy.core.ramp import Ramp
from diffpolicy.core.reveal import (
    Ancestral,
    Relaxation,
    Scheduled,
    one_by_one,
    reveal_schedule,
)
from diffpolicy.core.sampling import Grid, Trajectory, Transition, prepare, sample
from diffpolicy.core.solvers import (
    DDIM,
    DEIS,
    SOLVERS,
    DPMSolverPP,
    Heun,
    Solver,
    UniPC,
    make_solver,
)
from diffpolicy.core.starts import (
    Start,
    explicit_levels,
    levels,
    prior_start,
    ramp_start,
    shift_plan,
    truncated_start,
    warm_start,
)
from diffpolicy.core.value_guidance import ValueGuidance, head_value

__all__ = [
    "DDIM",
    "DEIS",
    "EDM",
    "PARTICLE_METHODS",
    "SMC",
    "SOLVERS",
    "SVDD",
    "TDS",
    "AnalyticDenoiser",
    "Ancestral",
    "BaseDenoiser",
    "BestOfN",
    "ClassifierFreeGuidance",
    "Cosine",
    "DPMSolverPP",
    "Denoised",
    "Denoiser",
    "DiscreteVP",
    "Drawn",
    "FlowMatching",
    "GaussianProcess",
    "Grid",
    "Guidance",
    "Heun",
    "Inpaint",
    "Layout",
    "LogLinear",
    "MaskedDenoiser",
    "MaskingProcess",
    "NoiseProcess",
    "PinCond",
    "Pinned",
    "PrefixCond",
    "PrefixGuidance",
    "Ramp",
    "Relaxation",
    "RewardGuidance",
    "Scheduled",
    "Solver",
    "Start",
    "Trajectory",
    "Transition",
    "UniPC",
    "VPCosine",
    "VPLinear",
    "ValueGuidance",
    "explicit_levels",
    "head_value",
    "levels",
    "make_masking",
    "make_particle_method",
    "make_process",
    "make_solver",
    "one_by_one",
    "one_hot",
    "prepare",
    "prior_start",
    "ramp_start",
    "reveal_schedule",
    "sample",
    "shift_plan",
    "to_tokens",
    "truncated_start",
    "warm_start",
]
