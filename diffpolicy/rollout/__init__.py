"""Environments in parallel: evaluation, collection of demonstrations, scores, videos.

- :mod:`~diffpolicy.rollout.env_spec`: an environment as a value;
- :mod:`~diffpolicy.rollout.pool.workers`: environments in supervised worker processes;
- :mod:`~diffpolicy.rollout.evaluate`: scores of a policy;
- :mod:`~diffpolicy.rollout.record.experts`: demonstrations of a scripted expert;
- :mod:`~diffpolicy.rollout.intervals`: intervals and comparisons;
- :mod:`~diffpolicy.rollout.record.branches`: rollouts to compare, from one observation or one
  start;
- :mod:`~diffpolicy.rollout.record.pairing`: pairs of them, by return, success or a function of
  yours;
- :mod:`~diffpolicy.rollout.labelling.clips`, :mod:`~diffpolicy.rollout.labelling.page`:
  side-by-side clips, and the page that a person answers on;
- :mod:`~diffpolicy.report.tuning`: a tuned policy against the one before, and tunings
  beside each other;
- :mod:`~diffpolicy.rollout.video`, :mod:`~diffpolicy.report.figures`: pictures.

Import from the modules. This package imports nothing itself, because worker processes import it and
must start fast; and ``evaluate`` and ``collect`` are names of a module and of its function, of
which a package can hold only one. Nothing in here imports torch.
"""
