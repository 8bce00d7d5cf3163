"""Rewards learned from measurements: one oracle to tune with, another to judge with.

The two are trained on disjoint halves of the measurements, as in DRAKES (Wang et al. 2025), so that
what a tuned model gains by the first one's errors is not seen by the second.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch
from diffpolicy.networks.heads import make_head
from diffpolicy.sequences.metrics import pearson, spearman
from diffpolicy.sequences.spec import SequenceExamples, at_most
from diffpolicy.sequences.task import SequenceTask, check_tokens, measured, reward_of
from diffpolicy.settings import check_range
from diffpolicy.training.checkpoint import read_bundle, write_bundle
from diffpolicy.training.process import seeded
from diffpolicy.training.saved import Device, Saved, find_bundle, part_of
from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.train import train

ROWS = 1024
# Settings of the trainer that do not change the weights.
_FREE = ("progress", "tensorboard", "log_every", "keep_last", "checkpoint_every", "compile")

UNJUDGED = (
    "There is no held-out oracle, so reward hacking cannot be seen: give a second one "
    "(task.held_out=package.module:Name), or measured values (task.value=COLUMN), from which "
    "one is learned."
)

Reward = Callable[[Tensor], Tensor]  # [B, L, V] -> [B]


class Oracle(Saved, nn.Module):
    """The activity of sequences as a network learned it, in the units of the labels.

    Args:
        network: config of the head, e.g. ``{"type": "sequence_regressor", "length": L,
            "vocab_size": V}``.
        mean: of the labels.
        std: of the labels, which must vary.

    Raises:
        ValueError: a config that is not a head's, or a ``std`` that is not positive.
    """

    FORMAT, WHAT = "diffpolicy-oracle", "oracle"
    mean: Tensor
    std: Tensor

    def __init__(self, network: Mapping[str, Any], *, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        check_range("(0, inf)", std_of_labels=std)
        self.network = make_head(network)
        self.config = dict(network)
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def forward(self, x: Tensor) -> Tensor:
        """The prediction ``[B]`` for soft or hard one-hot ``[B, L, V]``; differentiable in it."""
        normalised: Tensor = self.network(x)
        return normalised * self.std + self.mean

    def frozen(self) -> Self:
        """Self in evaluation mode, without gradients of its weights (those of ``x`` remain)."""
        return self.eval().requires_grad_(False)

    def _files(self, weights: Mapping[str, Tensor] | None = None, **record: Any) -> dict[str, Any]:
        return {
            "config.json": self._config(network=self.config, **record),
            "model.safetensors": dict(weights or self.state_dict()),
        }

    @classmethod
    def _made_of(cls, config: dict[str, Any], files: Mapping[str, Any], device: Device) -> Self:
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

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        target = (batch["label"] - self.oracle.mean) / self.oracle.std
        error = self.oracle.network(batch["tokens"]) - target
        return LossOutput(error.square(), {"bias": error.mean().detach()})


class Oracles(NamedTuple):
    """What to tune with and what to judge with.

    Attributes:
        reward: ``[B, L, V] -> [B]``.
        held_out: the same, learned from other measurements, or the truth; None: there is nothing
            that the reward could be judged by.
        report: per learned oracle its correlations on the half it has not seen (plain values).
    """

    reward: Reward
    held_out: Reward | None
    report: Mapping[str, Any]

    @property
    def columns(self) -> dict[str, Reward | None]:
        """Both by their names in reports."""
        return {"reward": self.reward, "held_out": self.held_out}


def train_oracles(
    task: SequenceTask,
    run_dir: str | os.PathLike[str],
    config: TrainerConfig,
    *,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    surrogate: bool = False,
    overwrite: bool = False,
    device: Device = "cpu",
) -> Oracles:
    """The rewards of a task, learned where it has measurements alone.

    A ``"measured"`` task gets two oracles from disjoint halves. Other tasks know the truth, which
    is then both rewards, or with ``surrogate`` the held-out one beside an oracle learned on half of
    the measurements. A task whose reward is an oracle itself (it has ``held_out``) is judged by
    that, by an oracle learned from half of its measurements, or by nothing. Oracles are kept in
    ``run_dir/reward`` and ``run_dir/held_out``: those that are there with the same settings and
    data are loaded, an interrupted training goes on.

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
        ValueError: ``run_dir`` holds oracles of other settings.
        KeyboardInterrupt: the training was interrupted; run it again to go on.
    """
    found = known_rewards(task, surrogate=surrogate)
    names = [name for name in ("reward", "held_out") if name not in found]
    parts = material(task, seed=seed, surrogate=surrogate)
    if not parts:
        return Oracles(**found, report={})
    sizes = {"length": task.length, "vocab_size": len(task.alphabet)}
    head = {**({"type": "sequence_regressor"} if network is None else network), **sizes}
    report: dict[str, Any] = {}
    for i, name in enumerate(("reward", "held_out")):
        if name not in names:
            continue
        folder = Path(run_dir) / name
        own = replace(config, seed=mix_seed(seed, i, 0x0A) >> 1)
        _settle(head, own, folder, parts[i], parts[1 - i], overwrite, device)
        found[name] = Oracle.load(folder / "oracle", device=device)
        report[name] = read_bundle(folder / "oracle")["config.json"]["report"]
    return Oracles(**found, report=report)


def material(
    task: SequenceTask, *, seed: int = 0, surrogate: bool = False
) -> list[tuple[Any, Any]]:
    """The two halves of the measurements that oracles are learned from; none if none is.

    Raises:
        ValueError: there are no values, no two halves, or values that are all equal.
    """
    if len(known_rewards(task, surrogate=surrogate)) == 2:
        return []
    tokens, labels = measured(task)
    if labels is None:
        raise ValueError(f"{task.name} has no measured values that oracles could be learned from")
    check_tokens(tokens, task.alphabet, task.length, "measurements()")
    parts = [(tokens[rows], labels[rows]) for rows in split_measurements(task, seed)]
    if any(len(np.unique(values)) < 2 for _, values in parts):
        raise ValueError(f"{task.name} has measured values that are all equal: nothing to learn")
    return parts


def judge_note(oracles: Oracles) -> str:
    """What a report says where nothing judges the reward; else empty."""
    return UNJUDGED if oracles.held_out is None else ""


def known_rewards(task: SequenceTask, *, surrogate: bool = False) -> dict[str, Any]:
    """The rewards of a task that are not learned from its measurements, by their names."""
    if task.kind == "measured":
        given = getattr(task, "held_out", None)
        return {} if given is None else {"held_out": given}
    truth = reward_of(task)
    own = {} if surrogate else {"reward": truth}
    judge = getattr(task, "held_out", truth)
    learnable = judge is None and measured(task)[1] is not None
    return own if learnable else {**own, "held_out": judge}


def _settle(
    head: Mapping[str, Any],
    config: TrainerConfig,
    folder: Path,
    known: tuple[Any, Any],
    test: tuple[Any, Any],
    overwrite: bool,
    device: Device,
) -> None:
    """Train the oracle of ``folder`` unless it is there already, begun or whole."""
    digest, done = _digest(head, config, *known), _known_digest(folder / "oracle")
    old = done or _known_digest(folder)
    if old not in (None, digest) and not overwrite:
        raise ValueError(f"{folder} holds an oracle of other settings or data; overwrite it")
    if done == digest:
        return
    labels = np.asarray(known[1], dtype=np.float64)
    made = seeded(config.seed, lambda: Oracle(head, mean=labels.mean(), std=labels.std()))
    oracle = made.to(device)
    order = np.random.default_rng(config.seed).permutation(len(labels))
    val, rest = ([part[rows] for part in known] for rows in np.split(order, [len(labels) // 20]))
    examples = _examples(*rest)
    result = train(
        RegressionLoss(oracle),
        examples,
        at_most(config, examples),
        folder,
        export=lambda state: oracle._files(part_of(state, "oracle"), digest=digest),
        val_source=_examples(*val) if len(val[0]) else None,
        resume=old == digest,
        overwrite=overwrite and old != digest,
    )
    if result.interrupted:
        raise KeyboardInterrupt(f"the oracle in {folder} is not done; run again to go on")
    oracle.frozen()
    report = {"train": correlations(oracle, *rest), "test": correlations(oracle, *test)}
    write_bundle(folder / "oracle", oracle._files(digest=digest, report=report))


def _examples(tokens: Any, labels: Any) -> SequenceExamples:
    values = np.asarray(tokens, dtype=np.int16), np.asarray(labels, dtype=np.float32)
    return SequenceExamples(torch.from_numpy(values[0]), label=torch.from_numpy(values[1]))


def _digest(head: Mapping[str, Any], config: TrainerConfig, tokens: Any, labels: Any) -> str:
    """What decides an oracle's weights, in one text."""
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE}
    state = hashlib.sha256(json.dumps([head, settings], sort_keys=True).encode())
    state.update(np.ascontiguousarray(tokens, dtype=np.int16).tobytes())
    state.update(np.ascontiguousarray(labels, dtype=np.float32).tobytes())
    return state.hexdigest()


def _known_digest(path: Path) -> str | None:
    try:
        folder = find_bundle(path, Oracle.FORMAT, Oracle.WHAT)
    except ValueError:
        return None
    return str(json.loads((folder / "config.json").read_bytes()).get("digest"))


def correlations(oracle: Oracle, tokens: Any, labels: Any) -> dict[str, Any]:
    """How well an oracle ranks sequences: Pearson's and Spearman's correlation with labels."""
    scores = score(oracle, tokens, oracle.config["vocab_size"])
    found = {"pearson": pearson(scores, labels), "spearman": spearman(scores, labels)}
    return {"count": len(scores), **found}


@torch.no_grad()
def score(reward: Reward, tokens: Any, vocab_size: int) -> Any:
    """The reward of integer sequences ``[N, L]``, as a float64 array ``[N]``.

    Args:
        reward: ``[B, L, V] -> [B]``.
        tokens: array or tensor.
        vocab_size: V.
    """
    device = reward.mean.device if isinstance(reward, Oracle) else torch.device("cpu")
    classes = torch.arange(vocab_size, device=device)
    held = torch.as_tensor(tokens).to(device)
    parts = [np.zeros(0)]
    for rows in torch.split(held, ROWS):
        x = (rows.unsqueeze(-1) == classes).float()
        parts.append(reward(x).detach().double().cpu().numpy())
    return np.concatenate(parts)


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
        _, group = np.unique(measured(task)[0], axis=0, return_inverse=True)
        group = group.reshape(-1)
        order = np.random.default_rng(seed).permutation(int(group.max()) + 1)
        first = np.isin(group, order[: len(order) // 2])
        parts = np.flatnonzero(first), np.flatnonzero(~first)
    if not len(parts[0]) or not len(parts[1]) or len(np.intersect1d(*parts)):
        raise ValueError(f"{task.name}: the two halves of its measurements overlap or are empty")
    return parts[0], parts[1]
