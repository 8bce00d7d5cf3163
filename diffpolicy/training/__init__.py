"""Training: one trainer for every loss, weight averages, checkpoints, metrics."""
