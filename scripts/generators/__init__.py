"""Datasets that we make, in the HDF5 layout of D4RL, from fixed seeds.

Their scores are never D4RL's: every file says so in its attributes.
"""
