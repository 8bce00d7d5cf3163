"""Learning: methods by name, their losses and estimators, and what they read."""

from diffpolicy.learn.adapters import add_adapters, merge_adapters
from diffpolicy.learn.cloning.denoising import Cloning, DenoisingLoss, LossOutput, denoising_error
from diffpolicy.learn.method import Method
from diffpolicy.learn.methods import METHODS, make_method
from diffpolicy.learn.preferences.dpo import DPO, PreferenceLoss
from diffpolicy.learn.preferences.dro import DRO, DROLoss
from diffpolicy.learn.preferences.formulas import Preference
from diffpolicy.learn.preferences.online import OwnPlans
from diffpolicy.learn.preferences.pso import PSO, PSOLoss, SequencePSO
from diffpolicy.learn.preferences.scores import DenoisingScore, MaskedScore
from diffpolicy.learn.preferences.sequence_dpo import SequenceDPO
from diffpolicy.learn.reward.masked_chain import MaskedChain, Pathwise
from diffpolicy.learn.reward.pathwise import RewardLoss
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.learn.reward.policy_gradient import PolicyGradient
from diffpolicy.learn.reward.stepwise import Stepwise
from diffpolicy.learn.reward.weighted import WeightedDenoising

__all__ = [
    "DPO",
    "DRO",
    "METHODS",
    "PSO",
    "Cloning",
    "DROLoss",
    "DenoisingLoss",
    "DenoisingScore",
    "LossOutput",
    "MaskedChain",
    "MaskedScore",
    "Method",
    "OwnPlans",
    "PSOLoss",
    "Pathwise",
    "PlanChain",
    "PolicyGradient",
    "Preference",
    "PreferenceLoss",
    "RewardLoss",
    "SequenceDPO",
    "SequencePSO",
    "Stepwise",
    "WeightedDenoising",
    "add_adapters",
    "denoising_error",
    "make_method",
    "merge_adapters",
]
