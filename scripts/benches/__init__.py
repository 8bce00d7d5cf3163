"""Speed as ratios, both sides measured in turn in one process."""
