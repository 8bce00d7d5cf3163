"""Tuning by a reward: gradients through the chain, policy gradients, weighted regression."""
