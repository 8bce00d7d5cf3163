"""Learning: methods by name, their losses and estimators, and what they read."""

from diffpolicy.learn.cloning.denoising import DenoisingLoss, LossOutput, denoising_error
from diffpolicy.learn.method import Method
from diffpolicy.learn.methods import METHODS, make_method
from diffpolicy.learn.preferences.dpo import DPO, PreferenceLoss
from diffpolicy.learn.preferences.dro import DRO
from diffpolicy.learn.preferences.formulas import Preference
from diffpolicy.learn.preferences.pso import PSO
from diffpolicy.learn.preferences.scores import DenoisingScore, MaskedScore
from diffpolicy.learn.reward.pathwise import MaskedChain, RewardLoss
from diffpolicy.learn.reward.plan_chain import PlanChain

__all__ = [
    "DPO",
    "DRO",
    "METHODS",
    "PSO",
    "DenoisingLoss",
    "DenoisingScore",
    "LossOutput",
    "MaskedChain",
    "MaskedScore",
    "Method",
    "PlanChain",
    "Preference",
    "PreferenceLoss",
    "RewardLoss",
    "denoising_error",
    "make_method",
]
