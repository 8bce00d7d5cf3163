"""The D4RL table: cells of dataset and algorithm, run and tabulated."""
