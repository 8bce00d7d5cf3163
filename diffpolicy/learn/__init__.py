"""Learning: methods by name, their losses and estimators, and what they read."""

from diffpolicy.learn.actor_critic.algorithms import ALGORITHMS, ActorCritic
from diffpolicy.learn.actor_critic.loss import ActorCriticLoss
from diffpolicy.learn.adapters import (
    adapters_off,
    add_adapters,
    has_adapters,
    merge_adapters,
    merged_state,
)
from diffpolicy.learn.cloning.denoising import Cloning, DenoisingLoss, LossOutput, denoising_error
from diffpolicy.learn.cloning.masked import MaskedDenoisingLoss, elbo, masked_cross_entropy
from diffpolicy.learn.cloning.planners import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss
from diffpolicy.learn.method import Method
from diffpolicy.learn.methods import METHODS, make_method
from diffpolicy.learn.preferences.dpo import DPO, PreferenceLoss
from diffpolicy.learn.preferences.dro import DRO, DROLoss
from diffpolicy.learn.preferences.few_step import FewStep
from diffpolicy.learn.preferences.formulas import Preference, feedback_loss, preference_loss
from diffpolicy.learn.preferences.online import OnlineDPOLoss, OwnPlans
from diffpolicy.learn.preferences.pso import PSO, PSOLoss, SequencePSO
from diffpolicy.learn.preferences.scores import DenoisingScore, MaskedScore, make_score
from diffpolicy.learn.preferences.sequence_dpo import SequenceDPO, SequenceDPOLoss
from diffpolicy.learn.reward.masked_chain import MaskedChain, Pathwise
from diffpolicy.learn.reward.pathwise import RewardLoss
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.learn.reward.policy_gradient import PolicyGradient, PolicyGradientLoss
from diffpolicy.learn.reward.rollouts import MaskedRollout, draw_rollout
from diffpolicy.learn.reward.stepwise import Stepwise, StepwiseLoss
from diffpolicy.learn.reward.weighted import WeightedDenoising, WeightedDenoisingLoss

__all__ = [
    "ALGORITHMS",
    "DPO",
    "DRO",
    "METHODS",
    "PSO",
    "ActorCritic",
    "ActorCriticLoss",
    "Cloning",
    "DROLoss",
    "DenoisingLoss",
    "DenoisingScore",
    "DraftLoss",
    "FewStep",
    "InverseDynamicsLoss",
    "LossOutput",
    "MaskedChain",
    "MaskedDenoisingLoss",
    "MaskedRollout",
    "MaskedScore",
    "Method",
    "OnlineDPOLoss",
    "OwnPlans",
    "PSOLoss",
    "Pathwise",
    "PlanChain",
    "PolicyGradient",
    "PolicyGradientLoss",
    "Preference",
    "PreferenceLoss",
    "RewardLoss",
    "SequenceDPO",
    "SequenceDPOLoss",
    "SequencePSO",
    "Stepwise",
    "StepwiseLoss",
    "SumOfLosses",
    "ValueLoss",
    "WeightedDenoising",
    "WeightedDenoisingLoss",
    "adapters_off",
    "add_adapters",
    "denoising_error",
    "draw_rollout",
    "elbo",
    "feedback_loss",
    "has_adapters",
    "make_method",
    "make_score",
    "masked_cross_entropy",
    "merge_adapters",
    "merged_state",
    "preference_loss",
]
