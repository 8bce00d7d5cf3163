"""Designed sequences as files: those that are valid, each once, the best first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffpolicy.learn.method import Method
from diffpolicy.learn.methods import method_of
from diffpolicy.sequences.files import write_fasta, write_table
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.neighbours import Compared, nearest
from diffpolicy.sequences.oracles import Oracles, score, train_oracles
from diffpolicy.sequences.own import FileTask
from diffpolicy.sequences.task import SequenceTask, pad_of, valid_rows
from diffpolicy.sequences.tuning import base_of, tune
from diffpolicy.training.settings import TrainerConfig

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
    known, pad = np.unique(task.training_data()[0], axis=0), pad_of(task)
    apart = nearest(Compared(held, size, pad), Compared(known, size, pad))
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


class Designed(NamedTuple):
    """What :func:`tune_sequences` leaves.

    Attributes:
        designs: as :func:`designs` gives them; also in ``run_dir/designs.csv`` and ``.fasta``.
        model: the tuned model, which draws more: ``model.draw(100)``.
        oracles: the rewards; ``oracles.held_out`` is None where nothing judges the oracle.
    """

    designs: list[dict[str, Any]]
    model: SequenceModel
    oracles: Oracles


def tune_sequences(
    sequences: str | os.PathLike[str],
    oracle: Any = None,
    *,
    run_dir: str | os.PathLike[str],
    held_out: Any = None,
    method: Method | Mapping[str, Any] | None = None,
    pretraining: TrainerConfig | None = None,
    tuning: TrainerConfig | None = None,
    base: str = "auto",
    draws: int = 640,
    **task: Any,
) -> Designed:
    """Train a generator on a file of sequences, tune it by an oracle, and write its designs.

    What ``diffpolicy tune task=custom task.sequences=...`` does, without its report.

    Example:
        >>> found = tune_sequences("mine.fasta", oracle, run_dir="runs/mine", fixed={0: "GGATCC"})
        >>> found.designs[0]["sequence"]

    Args:
        sequences: the file.
        oracle: see :class:`~diffpolicy.sequences.own.FileTask`; None: oracles are learned from the
            values of the column ``value``.
        run_dir: receives ``designs.fasta``, ``designs.csv`` and the runs ``pretrained``,
            ``oracles`` and ``tuned``, which must not be there yet.
        held_out: another oracle, which only judges.
        method: of :mod:`diffpolicy.learn.methods`; None: ``policy_gradient``, which any oracle can
            be used with.
        pretraining: of the generator; None: 4000 steps.
        tuning: of the tuning; None: 500 steps.
        base: what tuning starts from: ``"auto"`` (the model guided by the reward where that has a
            gradient), ``"reward_guidance"`` or ``"none"``.
        draws: sequences drawn, of which the valid ones are the designs.
        **task: further settings of :class:`~diffpolicy.sequences.own.FileTask`.

    Raises:
        ValueError: a file, oracle or setting that does not fit, or runs that are there already.
        KeyboardInterrupt: the training was interrupted.
    """
    folder = Path(run_dir)
    own = FileTask(sequences, oracle, held_out=held_out, **task)
    way = method_of({"type": "policy_gradient"} if method is None else method, items="sequences")
    begin = base_of({"type": base}, own, getattr(way, "kl_weight", 0.0))
    spec = {"network": {"type": "sequence_cnn"}}
    pretrained = SequenceModel.for_task(own, spec=spec)
    how = TrainerConfig(steps=4000, lr=2e-3) if pretraining is None else pretraining
    pretrained.learn(own.training_data()[0], how, folder / "pretrained")
    learned = TrainerConfig(steps=1000, lr=2e-3, weight_decay=1e-2, progress=how.progress)
    oracles = train_oracles(own, folder / "oracles", learned)
    pretrained = pretrained.pinned(own.fixed)
    trainer = TrainerConfig(steps=500, lr=1e-3, ema_power=None) if tuning is None else tuning
    tuned = tune(pretrained, oracles, way, trainer, folder / "tuned", base=begin)
    if tuned.interrupted:
        raise KeyboardInterrupt("the tuning was interrupted")
    generator = torch.Generator().manual_seed(trainer.seed)
    rows = designs(tuned.model.draw(draws, generator=generator), own, oracles, pretrained)
    write_designs(folder, rows)
    return Designed(rows, tuned.model, oracles)
