"""Losses and estimators; needs torch and numpy alone. Loops (rollouts.

Data collection) are passed in.
"""

from diffpolicy.finetune.denoising import DenoisingLoss, LossOutput, denoising_error

__all__ = ["DenoisingLoss", "LossOutput", "denoising_error"]
