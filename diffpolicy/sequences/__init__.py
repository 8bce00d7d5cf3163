"""Masked sequence models: tasks, the facade that learns and draws, oracles and evaluation."""

from diffpolicy.sequences.designs import designs, tune_sequences, write_designs
from diffpolicy.sequences.evaluate import evaluate_sequences
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import train_oracles
from diffpolicy.sequences.own import FileTask
from diffpolicy.sequences.spec import Draws, SequenceExamples, SequenceSpec, activity_classes
from diffpolicy.sequences.task import SequenceTask, open_task
from diffpolicy.sequences.tuning import tune

__all__ = [
    "Draws",
    "FileTask",
    "SequenceExamples",
    "SequenceModel",
    "SequenceSpec",
    "SequenceTask",
    "activity_classes",
    "designs",
    "evaluate_sequences",
    "open_task",
    "train_oracles",
    "tune",
    "tune_sequences",
    "write_designs",
]
