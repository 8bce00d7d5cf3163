"""The core: noise processes, starts, denoisers, solvers and the one sampling loop.

Needs torch and numpy alone.
"""

from diffpolicy.core.denoiser import AnalyticDenoiser, BaseDenoiser, Denoised, Denoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import (
    Cosine,
    LogLinear,
    MaskingProcess,
    make_masking,
    one_hot,
    to_tokens,
)
from diffpolicy.core.noise import GaussianProcess, NoiseProcess
from diffpolicy.core.processes import (
    EDM,
    DiscreteVP,
    FlowMatching,
    VPCosine,
    VPLinear,
    make_process,
)
from diffpolicy.core.reveal import Ancestral, Relaxation, Scheduled, one_by_one, reveal_schedule
from diffpolicy.core.sampler import PriorSampler, Sampler, Teleport
from diffpolicy.core.sampling import Grid, Trajectory, Transition, prepare, sample
from diffpolicy.core.solvers import DDIM, DEIS, SOLVERS, DPMSolverPP, Heun, UniPC, make_solver
from diffpolicy.core.starts import (
    Ramp,
    Start,
    explicit_levels,
    levels,
    prior_start,
    ramp_start,
    shift_plan,
    truncated_start,
    warm_start,
)
from diffpolicy.core.steps import Solver

__all__ = [
    "DDIM",
    "DEIS",
    "EDM",
    "SOLVERS",
    "AnalyticDenoiser",
    "Ancestral",
    "BaseDenoiser",
    "Cosine",
    "DPMSolverPP",
    "Denoised",
    "Denoiser",
    "DiscreteVP",
    "FlowMatching",
    "GaussianProcess",
    "Grid",
    "Heun",
    "LogLinear",
    "MaskedDenoiser",
    "MaskingProcess",
    "NoiseProcess",
    "PriorSampler",
    "Ramp",
    "Relaxation",
    "Sampler",
    "Scheduled",
    "Solver",
    "Start",
    "Teleport",
    "Trajectory",
    "Transition",
    "UniPC",
    "VPCosine",
    "VPLinear",
    "explicit_levels",
    "levels",
    "make_masking",
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
