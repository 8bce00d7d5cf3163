"""Comparisons as data: records, files, sets, training examples."""
