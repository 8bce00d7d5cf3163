"""The core: noise processes, starts, denoisers, solvers and the one sampling loop.

Needs torch and numpy alone.
"""

from diffpolicy.core.denoiser import AnalyticDenoiser, BaseDenoiser, Denoised, Denoiser
from diffpolicy.core.guidance import (
    ClassifierFreeGuidance,
    Guidance,
    Inpaint,
    PrefixCond,
    PrefixGuidance,
)
from diffpolicy.core.layout import Layout
from diffpolicy.core.noise import (
    EDM,
    DiscreteVP,
    FlowMatching,
    GaussianProcess,
    VPCosine,
    VPLinear,
    make_process,
)
from diffpolicy.core.pinning import PinCond, Pinned
from diffpolicy.core.ramp import Ramp
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
    "SOLVERS",
    "AnalyticDenoiser",
    "BaseDenoiser",
    "ClassifierFreeGuidance",
    "DPMSolverPP",
    "Denoised",
    "Denoiser",
    "DiscreteVP",
    "FlowMatching",
    "GaussianProcess",
    "Grid",
    "Guidance",
    "Heun",
    "Inpaint",
    "Layout",
    "PinCond",
    "Pinned",
    "PrefixCond",
    "PrefixGuidance",
    "Ramp",
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
    "make_process",
    "make_solver",
    "prepare",
    "prior_start",
    "ramp_start",
    "sample",
    "shift_plan",
    "truncated_start",
    "warm_start",
]
