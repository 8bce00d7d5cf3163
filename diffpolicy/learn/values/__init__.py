"""Rewards learned from preferences: of single steps, and of plans by what they lead to."""

from diffpolicy.learn.values.learning import PreferenceLearning, RewardSpec
from diffpolicy.learn.values.plans import PlanValue, PlanValueSpec
from diffpolicy.learn.values.reward import RewardModel

__all__ = ["PlanValue", "PlanValueSpec", "PreferenceLearning", "RewardModel", "RewardSpec"]
