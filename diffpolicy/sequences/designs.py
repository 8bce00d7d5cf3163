"""Designed sequences as files: those that are valid, each once, the best first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy.sequences.files import write_fasta, write_table
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.neighbours import Compared, nearest
from diffpolicy.sequences.oracles import Oracles, score
from diffpolicy.sequences.task import SequenceTask, valid_rows

FILES = ("designs.fasta", "designs.csv")
_FIGURES = ("reward", "held_out", "log_likelihood", "distance")


def designs(
    tokens: Any,
    task: SequenceTask,
    oracles: Oracles,
    reference: SequenceModel,
    *,
    elbo_draws: int = 16,
) -> list[dict[str, Any]]:
    """What there is to say about each valid sequence, the highest reward first.

    Args:
        tokens: ``[N, L]``, drawn from a tuned or guided model; copies count once.
        task: says which are valid, and what the training sequences are.
        oracles: the rewards.
        reference: the pre-trained model, whose likelihood tells how natural a sequence is.
        elbo_draws: sets of masks per sequence for that.

    Returns:
        Of each ``name``, ``sequence`` (letters), ``reward``, ``held_out`` (empty without a held-out
        oracle), ``log_likelihood`` (a bound, nats, under the pre-trained model) and ``distance``,
        edits to the nearest training sequence.
    """
    held = np.unique(torch.as_tensor(tokens).cpu().numpy(), axis=0)
    held = held[valid_rows(task, held)]
    if not len(held):
        return []
    size = len(task.alphabet)
    reward = score(oracles.reward, held, size)
    order = np.argsort(-reward, kind="stable")
    held, reward = held[order], reward[order]
    judged: Any = [""] * len(held)
    if oracles.held_out is not None:
        judged = score(oracles.held_out, held, size).tolist()
    bound = reference.log_likelihood(torch.from_numpy(held), draws=elbo_draws).tolist()
    apart = nearest(
        Compared(held, size), Compared(np.unique(task.training_data()[0], axis=0), size)
    )
    texts = reference.decode(torch.from_numpy(held))
    digits = len(str(len(texts)))
    names = [f"design_{i:0{digits}d}" for i in range(1, len(texts) + 1)]
    keys = ("name", "sequence", *_FIGURES)
    columns = names, texts, reward.tolist(), judged, bound, apart.tolist()
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def write_designs(folder: str | os.PathLike[str], rows: list[dict[str, Any]]) -> list[Path]:
    """Write ``designs.csv``, and ``designs.fasta`` with the figures in the lines of names."""
    heads = []
    for row in rows:
        figures = [f"{k}={_short(v)}" for k, v in row.items() if k in _FIGURES and v != ""]
        heads.append(" ".join([row["name"], *figures]))
    fasta, table = (Path(folder) / name for name in FILES)
    write_fasta(fasta, heads, [row["sequence"] for row in rows])
    return [fasta, write_table(table, rows)]


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
