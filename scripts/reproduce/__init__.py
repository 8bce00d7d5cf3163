"""Reproductions: published rows of ours by name (studies), and the D4RL table (cells)."""
