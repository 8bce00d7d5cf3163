"""Readers of checkpoints that other projects publish."""
