"""Episodes recorded: of experts, of repeats, of branches to compare."""
