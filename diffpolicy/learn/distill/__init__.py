"""Students that need one or a few evaluations where their teacher needs many."""
