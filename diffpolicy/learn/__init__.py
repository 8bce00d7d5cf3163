"""Losses and estimators; needs torch and numpy alone.

Loops (rollouts, data collection) are passed in.
"""

from diffpolicy.learn.actor_critic.algorithms import ALGORITHMS, ActorCritic
from diffpolicy.learn.actor_critic.loss import ActorCriticLoss
from diffpolicy.learn.adapters import (
    adapters_off,
    add_adapters,
    has_adapters,
    merge_adapters,
    merged_state,
)
from diffpolicy.learn.cloning.denoising import DenoisingLoss, LossOutput, denoising_error
from diffpolicy.learn.cloning.masked import MaskedDenoisingLoss, elbo, masked_cross_entropy
from diffpolicy.learn.cloning.planners import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss
from diffpolicy.learn.preferences.dpo import PreferenceLoss
from diffpolicy.learn.preferences.dro import Ranking, RankingLoss
from diffpolicy.learn.preferences.few_step import FewStep
from diffpolicy.learn.preferences.formulas import Preference, feedback_loss, preference_loss
from diffpolicy.learn.preferences.items import Items
from diffpolicy.learn.preferences.methods import make_preference
from diffpolicy.learn.preferences.online import OwnPlans, OwnPlansLoss
from diffpolicy.learn.preferences.online_sequences import Labelled, LabelledLoss
from diffpolicy.learn.preferences.pso import PairwiseLoss
from diffpolicy.learn.preferences.pso_formulas import Pairwise
from diffpolicy.learn.preferences.scores import DenoisingScore, MaskedScore, make_score
from diffpolicy.learn.reward.adjoint import probability_flow
from diffpolicy.learn.reward.advantages import PolicyGradient
from diffpolicy.learn.reward.masked_chain import MaskedChain
from diffpolicy.learn.reward.methods import METHODS, make_tuning
from diffpolicy.learn.reward.pathwise import RewardLoss
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.learn.reward.policy_gradient import PolicyGradientLoss
from diffpolicy.learn.reward.rollouts import MaskedRollout, draw_rollout
from diffpolicy.learn.reward.stepwise import Stepwise, StepwiseLoss
from diffpolicy.learn.reward.weighted import WeightedDenoising, WeightedDenoisingLoss

__all__ = [
    "ALGORITHMS",
    "METHODS",
    "ActorCritic",
    "ActorCriticLoss",
    "DenoisingLoss",
    "DenoisingScore",
    "DraftLoss",
    "FewStep",
    "InverseDynamicsLoss",
    "Items",
    "Labelled",
    "LabelledLoss",
    "LossOutput",
    "MaskedChain",
    "MaskedDenoisingLoss",
    "MaskedRollout",
    "MaskedScore",
    "OwnPlans",
    "OwnPlansLoss",
    "Pairwise",
    "PairwiseLoss",
    "PlanChain",
    "PolicyGradient",
    "PolicyGradientLoss",
    "Preference",
    "PreferenceLoss",
    "Ranking",
    "RankingLoss",
    "RewardLoss",
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
    "make_preference",
    "make_score",
    "make_tuning",
    "masked_cross_entropy",
    "merge_adapters",
    "merged_state",
    "preference_loss",
    "probability_flow",
]
