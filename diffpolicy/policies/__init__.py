"""Policies as values: observations and memory in, actions and memory out."""
