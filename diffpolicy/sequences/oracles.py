"""Rewards learned from measurements: one oracle to tune with, another to judge with.

The two are trained on disjoint halves of the measurements, as in DRAKES (Wang et al. 2025), so that
what a tuned model gains by the first one's errors is not seen by the second.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.networks.heads import make_head
from diffpolicy.sequences.metrics import pearson, spearman
from diffpolicy.sequences.task import SequenceTask, check_tokens
from diffpolicy.training.checkpoint import read_bundle, write_bundle
from diffpolicy.training.policy_files import find_bundle
from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.trainer import Trainer

FORMAT, VERSION = "diffpolicy-oracle", 1
ROWS = 1024
# Settings of the trainer that do not change the weights.
_FREE = ("progress", "tensorboard", "log_every", "keep_last", "checkpoint_every", "compile")

Reward = Callable[[Tensor], Tensor]  # [B, L, V] -> [B]


class Oracle(nn.Module):
    """The activity of sequences as a network learned it, in the units of the labels.

    Args:
        network: config of the head, e.g. ``{"type": "sequence_regressor", "length": L,
            "vocab_size": V}``.
        mean: of the labels.
        std: of the labels, positive.

    Raises:
        ValueError: a config that is not a head's, or a ``std`` that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Mapping[str, Any], *, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(
                f"the labels of an oracle must vary: their std must be positive, got {std}"
            )
        self.network = make_head(network)
        self.config = dict(network)
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def normalised(self, x: Tensor) -> Tensor:
        """The prediction in units of the labels' spread ``[B]``."""
        out: Tensor = self.network(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The prediction ``[B]`` for soft or hard one-hot ``[B, L, V]``; differentiable in it."""
        return self.normalised(x) * self.std + self.mean

    def frozen(self) -> Self:
        """Self in evaluation mode, without gradients of its weights (those of ``x`` remain)."""
        return self.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike[str], **record: Any) -> Path:
        """Write the oracle as a directory: ``config.json`` with ``record``, and its weights."""
        return write_bundle(path, self._files(self.state_dict(), record))

    def _files(self, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
        config = {"format": FORMAT, "version": VERSION, "network": self.config, **record}
        return {"config.json": config, "model.safetensors": dict(weights)}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """Read an oracle (or the newest one of its training run), frozen; verifies every hash.

        Raises:
            ValueError: not an oracle, or a damaged file.
        """
        files = read_bundle(find_bundle(path, FORMAT, "oracle"))
        config = files["config.json"]
        if config.get("version") != VERSION:
            raise ValueError(f"{path} is not a diffpolicy oracle of version {VERSION}")
        oracle = cls(config["network"])
        oracle.load_state_dict(files["model.safetensors"])
        return oracle.to(device).frozen()


class RegressionLoss(nn.Module):
    """Squared error of an oracle on labels, in units of their spread.

    ``forward(batch, generator)`` takes ``tokens`` int64 ``[B, L]`` and ``label [B]``.
    """

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.oracle = oracle

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        target = (batch["label"] - self.oracle.mean) / self.oracle.std
        error = self.oracle.normalised(batch["tokens"]) - target
        return LossOutput(error.square(), {"bias": error.mean().detach()})


class LabelledSequences:
    """Sequences with labels as a source of the trainer.

    Args:
        tokens: integers ``[N, L]``.
        labels: ``[N]``.
    """

    def __init__(self, tokens: Any, labels: Any) -> None:
        self.tokens = torch.as_tensor(np.asarray(tokens, dtype=np.int16))
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.tokens)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        return {"tokens": self.tokens[indices].long(), "label": self.labels[indices]}


class Oracles(NamedTuple):
    """What to tune with and what to judge with.

    Attributes:
        reward: ``[B, L, V] -> [B]``.
        held_out: the same, learned from other measurements, or the truth.
        report: per learned oracle its correlations on the half it has not seen (plain values).
    """

    reward: Reward
    held_out: Reward
    report: Mapping[str, Any]


def train_oracles(
    task: SequenceTask,
    run_dir: str | os.PathLike[str],
    config: TrainerConfig,
    *,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    surrogate: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
) -> Oracles:
    """The rewards of a task, learned where it has measurements alone.

    A ``"measured"`` task gets two oracles from disjoint halves. Other tasks know the truth, which
    is then both rewards, or with ``surrogate`` the held-out one beside an oracle learned on half of
    the measurements. Oracles are kept in ``run_dir/reward`` and ``run_dir/held_out``: those that
    are there with the same settings and data are loaded, an interrupted training goes on.

    Args:
        task: what the measurements are from.
        run_dir: where oracles are kept.
        config: settings of the trainer; its seed is not used.
        seed: of the halves, the initial weights and the order of data.
        network: config of the head without sizes; ``None``: ``{"type": "sequence_regressor"}``.
        surrogate: of a task that knows the truth: tune with a learned oracle all the same.
        overwrite: replace oracles of other settings.
        device: where they live.

    Raises:
        ValueError: ``run_dir`` holds oracles of other settings; ``surrogate`` of a measured task.
        KeyboardInterrupt: the training was interrupted; run it again to go on.
    """
    if task.kind != "measured" and not surrogate:
        return Oracles(task.reward, task.reward, {})
    if task.kind == "measured" and surrogate:
        raise ValueError(f"{task.name} has no true reward, so its oracles are learned anyway")
    tokens, labels = task.measurements()
    check_tokens(tokens, task.alphabet, task.length, "measurements()")
    halves = split_measurements(task, seed)
    names = ("reward", "held_out") if task.kind == "measured" else ("reward",)
    sizes = {"length": task.length, "vocab_size": len(task.alphabet)}
    head = {**({"type": "sequence_regressor"} if network is None else network), **sizes}
    found: dict[str, Oracle] = {}
    report: dict[str, Any] = {}
    for i, name in enumerate(names):
        settings = {
            **asdict(config),
            "betas": list(config.betas),
            "seed": mix_seed(seed, i, 0x0A) >> 1,
        }
        job = _Job(head, {k: v for k, v in settings.items() if k not in _FREE}, device)
        here, there = halves[i], halves[1 - i]
        found[name], report[name] = _oracle(
            job,
            TrainerConfig(**{**asdict(config), "seed": settings["seed"]}),
            Path(run_dir) / name,
            (tokens[here], labels[here]),
            (tokens[there], labels[there]),
            overwrite,
        )
    return Oracles(found["reward"], found.get("held_out", task.reward), report)


class _Job(NamedTuple):
    """What decides an oracle's weights beside its data, and where they go."""

    network: Mapping[str, Any]
    settings: Mapping[str, Any]
    device: str | torch.device

    def digest(self, tokens: Any, labels: Any) -> str:
        text = json.dumps([self.network, self.settings], sort_keys=True)
        state = hashlib.sha256(text.encode())
        state.update(np.ascontiguousarray(tokens, dtype=np.int16).tobytes())
        state.update(np.ascontiguousarray(labels, dtype=np.float32).tobytes())
        return state.hexdigest()


def _oracle(
    job: _Job,
    config: TrainerConfig,
    run_dir: Path,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    overwrite: bool,
) -> tuple[Oracle, Any]:
    """The oracle kept in ``run_dir``, trained if it is not there, and its report."""
    digest, final = job.digest(*train), run_dir / "oracle"
    old = _known_digest(final) or _known_digest(run_dir)
    if old not in (None, digest) and not overwrite:
        raise ValueError(
            f"{run_dir} holds an oracle of other settings or data; choose another directory or "
            "overwrite it"
        )
    if _known_digest(final) == digest:
        report = read_bundle(final)["config.json"]["report"]
        return Oracle.load(final, device=job.device), report
    labels = np.asarray(train[1], dtype=np.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        oracle = Oracle(job.network, mean=labels.mean(), std=labels.std()).to(job.device)
    order = np.random.default_rng(config.seed).permutation(len(labels))
    val, rest = np.split(order, [len(labels) // 20])
    objective = RegressionLoss(oracle)

    def export(state: Mapping[str, Tensor]) -> dict[str, Any]:
        weights = {k.removeprefix("oracle."): v for k, v in state.items()}
        return oracle._files(weights, {"digest": digest})

    trainer = Trainer(
        objective,
        LabelledSequences(train[0][rest], train[1][rest]),
        config,
        run_dir,
        export=export,
        val_source=LabelledSequences(train[0][val], train[1][val]) if len(val) else None,
        resume=old == digest,
        overwrite=overwrite and old != digest,
    )
    result = trainer.fit()
    if result.interrupted:
        raise KeyboardInterrupt(f"the oracle in {run_dir} is not done; run again to go on")
    objective.load_state_dict(result.ema)
    oracle.frozen()
    report = {
        "train": correlations(oracle, train[0][rest], train[1][rest]),
        "test": correlations(oracle, *test),
    }
    oracle.save(final, digest=digest, report=report)
    return oracle, report


def _known_digest(path: Path) -> str | None:
    try:
        config = json.loads((find_bundle(path, FORMAT, "oracle") / "config.json").read_text())
    except ValueError:
        return None
    return str(config.get("digest"))


def correlations(reward: Reward, tokens: Any, labels: Any) -> dict[str, Any]:
    """How well a reward ranks sequences: Pearson's and Spearman's correlation with labels."""
    scores = score(reward, tokens)
    found = {"pearson": pearson(scores, labels), "spearman": spearman(scores, labels)}
    return {"count": len(scores), **found}


@torch.no_grad()
def score(reward: Reward, tokens: Any, vocab_size: int | None = None) -> Any:
    """The reward of integer sequences ``[N, L]``, as a float64 array ``[N]``.

    Args:
        reward: ``[B, L, V] -> [B]``.
        tokens: array or tensor.
        vocab_size: V; of an :class:`Oracle` it is known.
    """
    device = torch.device("cpu")
    if isinstance(reward, Oracle):
        vocab_size, device = int(reward.config["vocab_size"]), reward.mean.device
    if vocab_size is None:
        raise ValueError("give vocab_size to score sequences with a plain function")
    classes = torch.arange(vocab_size, device=device)
    held = torch.as_tensor(tokens).to(device)
    parts = [
        reward((rows.unsqueeze(-1) == classes).float()).detach().double().cpu().numpy()
        for rows in torch.split(held, ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def split_measurements(task: SequenceTask, seed: int) -> tuple[Any, Any]:
    """Row numbers of two disjoint halves of ``measurements()``.

    As the task itself splits them (``halves(seed)``, or ``split_pairs(0.5, seed)``); else at
    random, without separating copies of a sequence.

    Raises:
        ValueError: the task's halves overlap, or one is empty.
    """
    own = cast("Any", task)
    if hasattr(task, "halves"):
        parts = own.halves(seed)
    elif hasattr(task, "split_pairs"):
        parts = own.split_pairs(0.5, seed)
    else:
        _, group = np.unique(task.measurements()[0], axis=0, return_inverse=True)
        group = group.reshape(-1)
        order = np.random.default_rng(seed).permutation(int(group.max()) + 1)
        first = np.isin(group, order[: len(order) // 2])
        parts = np.flatnonzero(first), np.flatnonzero(~first)
    if not len(parts[0]) or not len(parts[1]) or len(np.intersect1d(*parts)):
        raise ValueError(f"{task.name}: the two halves of its measurements overlap or are empty")
    return parts[0], parts[1]


__all__ = [
    "LabelledSequences",
    "Oracle",
    "Oracles",
    "RegressionLoss",
    "correlations",
    "score",
    "split_measurements",
    "train_oracles",
]
