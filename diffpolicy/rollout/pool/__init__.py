"""Environments in supervised worker processes."""
