"""Datasets that we make, in the HDF5 layout of D4RL, from fixed seeds.

- :mod:`~diffpolicy.rollout.generate.layout`: what such a file holds, written at once;
- :mod:`~diffpolicy.rollout.generate.parts`: episodes on disk while a file grows, to go on after a
  kill;
- :mod:`~diffpolicy.rollout.generate.pointmaze`: a ball that goes from goal to goal;
- :mod:`~diffpolicy.rollout.generate.rollouts`: files joined into one, such as medium-expert;
- :mod:`~diffpolicy.rollout.generate.collecting`: episodes of an actor, measured or recorded;
- :mod:`~diffpolicy.rollout.generate.agents`: Stable-Baselines3 actors as plain arrays;
- :mod:`~diffpolicy.rollout.generate.training`: such an agent, trained;
- :mod:`~diffpolicy.rollout.generate.mujoco`: random, medium, medium-replay and expert.

Their scores are never D4RL's: every file says so in its attributes.
"""
