"""Losses and estimators; needs torch and numpy alone.

Loops (rollouts, data collection) are passed in.
"""

from diffpolicy.finetune.actor_critic import ActorCriticLoss
from diffpolicy.finetune.adjoint import probability_flow
from diffpolicy.finetune.advantages import PolicyGradient
from diffpolicy.finetune.algorithms import ALGORITHMS, ActorCritic
from diffpolicy.finetune.denoising import DenoisingLoss, LossOutput, denoising_error
from diffpolicy.finetune.masked import MaskedDenoisingLoss, elbo, masked_cross_entropy
from diffpolicy.finetune.methods import METHODS, make_tuning
from diffpolicy.finetune.plan_chain import PlanChain
from diffpolicy.finetune.planning import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss
from diffpolicy.finetune.policy_gradient import PolicyGradientLoss
from diffpolicy.finetune.reward import RewardLoss
from diffpolicy.finetune.reward_chains import MaskedChain
from diffpolicy.finetune.rollouts import MaskedRollout, draw_rollout
from diffpolicy.finetune.stepwise import Stepwise, StepwiseLoss
from diffpolicy.finetune.weighted import WeightedDenoising, WeightedDenoisingLoss

__all__ = [
    "ALGORITHMS",
    "METHODS",
    "ActorCritic",
    "ActorCriticLoss",
    "DenoisingLoss",
    "DraftLoss",
    "InverseDynamicsLoss",
    "LossOutput",
    "MaskedChain",
    "MaskedDenoisingLoss",
    "MaskedRollout",
    "PlanChain",
    "PolicyGradient",
    "PolicyGradientLoss",
    "RewardLoss",
    "Stepwise",
    "StepwiseLoss",
    "SumOfLosses",
    "ValueLoss",
    "WeightedDenoising",
    "WeightedDenoisingLoss",
    "denoising_error",
    "draw_rollout",
    "elbo",
    "make_tuning",
    "masked_cross_entropy",
    "probability_flow",
]
