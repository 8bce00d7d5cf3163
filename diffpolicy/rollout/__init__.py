"""Environments in parallel: evaluation, collection of demonstrations, scores, videos.

- :mod:`~diffpolicy.rollout.spec`: an environment as a value;
- :mod:`~diffpolicy.rollout.vector`: environments in supervised worker processes;
- :mod:`~diffpolicy.rollout.evaluate`: scores of a policy;
- :mod:`~diffpolicy.rollout.collect`: demonstrations of a scripted expert;
- :mod:`~diffpolicy.rollout.scores`: intervals and comparisons;
- :mod:`~diffpolicy.rollout.video`, :mod:`~diffpolicy.rollout.plots`: pictures.

Import from the modules. This package imports nothing itself, because worker processes import it and
must start fast; and ``evaluate`` and ``collect`` are names of a module and of its function, of
which a package can hold only one. Nothing in here imports torch.
"""
