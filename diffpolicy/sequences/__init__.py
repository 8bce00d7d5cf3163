"""Masked sequence models: tasks, the facade that learns and draws, oracles and evaluation."""

from diffpolicy.sequences.evaluate import Evaluation, evaluate_sequences, path_kl
from diffpolicy.sequences.exact import ExactLaw, StateSpace, exact_scores
from diffpolicy.sequences.guided import GuidedDraws, draw_guided
from diffpolicy.sequences.metrics import hacking_warning
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import Oracle, Oracles, train_oracles
from diffpolicy.sequences.spec import Draws, SequenceExamples, SequenceSpec, activity_classes
from diffpolicy.sequences.task import SequenceTask, open_task
from diffpolicy.sequences.tuning import Tuned, tune

__all__ = [
    "Draws",
    "Evaluation",
    "ExactLaw",
    "GuidedDraws",
    "Oracle",
    "Oracles",
    "SequenceExamples",
    "SequenceModel",
    "SequenceSpec",
    "SequenceTask",
    "StateSpace",
    "Tuned",
    "activity_classes",
    "draw_guided",
    "evaluate_sequences",
    "exact_scores",
    "hacking_warning",
    "open_task",
    "path_kl",
    "train_oracles",
    "tune",
]
