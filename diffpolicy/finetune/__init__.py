"""Losses and estimators; needs torch and numpy alone.

Loops (rollouts, data collection) are passed in.
"""

from diffpolicy.finetune.actor_critic import ActorCriticLoss
from diffpolicy.finetune.adapters import (
    adapters_off,
    add_adapters,
    has_adapters,
    merge_adapters,
    merged_state,
)
from diffpolicy.finetune.adjoint import probability_flow
from diffpolicy.finetune.advantages import PolicyGradient
from diffpolicy.finetune.algorithms import ALGORITHMS, ActorCritic
from diffpolicy.finetune.denoising import DenoisingLoss, LossOutput, denoising_error
from diffpolicy.finetune.few_step import FewStep
from diffpolicy.finetune.items import Items
from diffpolicy.finetune.labelled import Labelled, LabelledLoss
from diffpolicy.finetune.masked import MaskedDenoisingLoss, elbo, masked_cross_entropy
from diffpolicy.finetune.methods import METHODS, make_tuning
from diffpolicy.finetune.own_plans import OwnPlans, OwnPlansLoss
from diffpolicy.finetune.pairwise import PairwiseLoss
from diffpolicy.finetune.pairwise_losses import Pairwise
from diffpolicy.finetune.plan_chain import PlanChain
from diffpolicy.finetune.planning import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss
from diffpolicy.finetune.policy_gradient import PolicyGradientLoss
from diffpolicy.finetune.preference import PreferenceLoss
from diffpolicy.finetune.preference_losses import Preference, feedback_loss, preference_loss
from diffpolicy.finetune.preference_methods import make_preference
from diffpolicy.finetune.ranking import Ranking, RankingLoss
from diffpolicy.finetune.reward import RewardLoss
from diffpolicy.finetune.reward_chains import MaskedChain
from diffpolicy.finetune.rollouts import MaskedRollout, draw_rollout
from diffpolicy.finetune.scores import DenoisingScore, MaskedScore, make_score
from diffpolicy.finetune.stepwise import Stepwise, StepwiseLoss
from diffpolicy.finetune.weighted import WeightedDenoising, WeightedDenoisingLoss

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
