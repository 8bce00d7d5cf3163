"""Losses and estimators; needs torch and numpy alone. Loops (rollouts.

Data collection) are passed in.
"""

from diffpolicy.finetune.actor_critic import ActorCriticLoss
from diffpolicy.finetune.algorithms import ALGORITHMS, ActorCritic
from diffpolicy.finetune.denoising import DenoisingLoss, LossOutput, denoising_error
from diffpolicy.finetune.planning import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss

__all__ = [
    "ALGORITHMS",
    "ActorCritic",
    "ActorCriticLoss",
    "DenoisingLoss",
    "DraftLoss",
    "InverseDynamicsLoss",
    "LossOutput",
    "SumOfLosses",
    "ValueLoss",
    "denoising_error",
]
