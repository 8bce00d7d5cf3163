"""Cloning: denoising losses, and what planners learn beside them."""
