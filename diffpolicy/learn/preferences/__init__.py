"""Tuning by comparisons: DPO, PSO, DRO and their online forms."""
