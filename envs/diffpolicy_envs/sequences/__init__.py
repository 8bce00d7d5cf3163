"""Sequence design tasks, each also an environment of one step.

A task by its id, and the same one directly::

    task = gymnasium.make("diffpolicy_envs:diffpolicy/TFBind8-v0").unwrapped.task
    task = TFBind8()

`diffpolicy.sequences.SequenceTask` says what a task of your own must have.
"""

from diffpolicy_envs.sequences.env import SequenceDesignEnv
from diffpolicy_envs.sequences.multilinear import TableTask
from diffpolicy_envs.sequences.promoter import LacPromoter
from diffpolicy_envs.sequences.rna import RNAFolding
from diffpolicy_envs.sequences.tables import GB1, SpliceSite, TFBind8
from diffpolicy_envs.sequences.task import BaseTask

__all__ = [
    "GB1",
    "BaseTask",
    "LacPromoter",
    "RNAFolding",
    "SequenceDesignEnv",
    "SpliceSite",
    "TFBind8",
    "TableTask",
]
