"""Rewards learned from preferences: of single steps, and of plans by what they lead to."""

from __future__ import annotations

from diffpolicy.reward_model.learning import PreferenceLearning
from diffpolicy.reward_model.model import RewardModel, RewardSpec
from diffpolicy.reward_model.plans import PlanValue, PlanValueSpec

__all__ = ["PlanValue", "PlanValueSpec", "PreferenceLearning", "RewardModel", "RewardSpec"]
