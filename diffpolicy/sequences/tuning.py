"""Tuning a pre-trained sequence model by a reward, with the same trainer as everything else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from diffpolicy.learn.material import SequenceMaterial
from diffpolicy.learn.method import Method
from diffpolicy.learn.methods import method_of
from diffpolicy.sequences.base import Base
from diffpolicy.sequences.evaluate import path_kl
from diffpolicy.sequences.metrics import hacking_warning
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import UNJUDGED, Oracles, Reward, score
from diffpolicy.sequences.spec import Drawing, Draws
from diffpolicy.sequences.task import SequenceTask
from diffpolicy.settings import ConfigError, check_choice, settings_of
from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.trainer import Evaluate, Running

HACKING = ("warn", "stop")  # what to do when the training reward rises and the held-out one falls


class Tuned(NamedTuple):
    """A tuned model and how it went.

    Attributes:
        model: with the last (averaged) weights.
        interrupted: whether it was stopped before its last step.
        train_s: seconds.
        reward_calls: sequences that were given to the reward, in this process, those of the base
            among them.
    """

    model: SequenceModel
    interrupted: bool
    train_s: float
    reward_calls: int


def tune(
    pretrained: SequenceModel,
    oracles: Oracles,
    method: Method | Mapping[str, Any],
    config: TrainerConfig,
    run_dir: str | os.PathLike[str],
    *,
    base: Mapping[str, Any] | None = None,
    hacking: str = "warn",
    eval_draws: int = 256,
    num_steps: int | None = None,
    **run: Unpack[Running],
) -> Tuned:
    """Tune a copy of ``pretrained``, which is the reference of the divergence.

    At every evaluation of the trainer, rewards of both oracles and the path KL are logged.

    Args:
        pretrained: left as it is. One with classes is tuned unconditionally.
        oracles: the reward, and the one that is only watched.
        method: a method of sequences, or values for
            :func:`diffpolicy.learn.methods.make_method`.
        config: of the trainer; ``batch_size`` is how many sequences an update draws.
        run_dir: metrics and checkpoints.
        base: tune from ``pretrained`` guided by the reward instead of from itself: settings of
            :class:`~diffpolicy.sequences.base.Base`, whose ``scale`` is 1 / kl_weight of the method
            unless given. The reward must have a gradient at soft sequences (but for
            ``mode="exact"``). None: no base.
        hacking: ``"stop"``: end the run at the evaluation from which on the reward rises while the
            held-out one falls (:func:`~diffpolicy.sequences.metrics.hacking_warning`; of a reward
            that is held out itself it never does). ``"warn"``: go on; reports tell.
        eval_draws: sequences of an evaluation.
        num_steps: of their chains; ``None``: one position at a time.
        **run: ``resume`` and ``overwrite`` of :class:`~diffpolicy.training.trainer.Trainer`.

    Raises:
        ValueError: unknown settings, or ones that do not fit.
    """
    check_hacking(hacking, oracles.held_out)
    made = method_of(method, items="sequences")
    model, reward = _begun(pretrained, oracles, made, base), _Counted(oracles.reward)
    material = SequenceMaterial(reward, pretrained.copy().denoiser, config.batch_size)
    objective = made.objective(model.denoiser, material).to(model.device)
    blank = model.expand_cond(None, 1)
    source = Draws(max(65_536, config.batch_size), None if blank is None else blank[0].cpu())
    watch = _watch(pretrained, oracles, eval_draws, num_steps, config.seed)
    run["evaluate"] = watch if hacking == "warn" else _alarmed(watch)
    model.fit(objective, source, config, run_dir, **run)
    training = model.last_training
    assert training is not None
    calls = reward.calls + getattr(model.denoiser, "reward_calls", 0)
    return Tuned(model, training.interrupted, training.train_s, calls)


def _begun(
    pretrained: SequenceModel, oracles: Oracles, method: Method, base: Mapping[str, Any] | None
) -> SequenceModel:
    """What is tuned, as it is before the first update."""
    if base is None:
        return pretrained.copy()
    settings = base_settings(base, getattr(method, "kl_weight", 0.0))
    return pretrained.with_base(oracles.reward, **asdict(settings))


def check_hacking(hacking: str, judge: object) -> None:
    """Raise unless there is a judge, the held-out reward, of hacking that is to stop a run."""
    check_choice("hacking", hacking, HACKING)
    if hacking == "stop" and judge is None:
        raise ConfigError(f"hacking=stop cannot be: {UNJUDGED}")


def base_of(base: Mapping[str, Any], task: SequenceTask, kl_weight: float) -> dict[str, Any] | None:
    """The settings of the base that tuning for a task starts from; ``None``: there is none.

    Args:
        base: ``type``, and settings of :class:`~diffpolicy.sequences.base.Base`: ``"none"``,
            ``"reward_guidance"``, or ``"auto"``, which is that wherever it can be.
        task: whether its reward has a gradient.
        kl_weight: of the method; 0 says no scale.

    Raises:
        ValueError: an unknown type, or guidance by a reward without gradient.
    """
    settings = dict(base)
    kind = settings.pop("type", None)
    check_choice("base.type", kind, ("auto", "none", "reward_guidance"))
    black_box = task.kind == "black_box"
    if kind == "none" or (kind == "auto" and (black_box or kl_weight == 0)):
        return None
    if black_box:
        raise ConfigError(
            f"{task.name} has a reward of hard sequences without gradient: set base=none"
        )
    base_settings(settings, kl_weight)
    return settings


def base_settings(base: Mapping[str, Any], kl_weight: float) -> Base:
    """The settings of a base; a ``scale`` that is missing or None is ``1 / kl_weight``.

    Raises:
        ValueError: unknown settings or ones out of range, or a weight of 0 that says no scale.
    """
    settings = {key: value for key, value in base.items() if value is not None}
    if "scale" not in settings:
        if not kl_weight > 0:
            raise ValueError(f"kl_weight={kl_weight} says no scale of the base: give base.scale")
        settings["scale"] = 1 / kl_weight
    return settings_of(Base, settings, "base")


def _watch(
    pretrained: SequenceModel, oracles: Oracles, draws: int, num_steps: int | None, seed: int
) -> Evaluate:
    """What is measured of every checkpoint, on the same noise each time."""

    def watch(path: Path, step: int) -> Mapping[str, float]:
        model = SequenceModel.load(path, device=pretrained.device)
        if model.spec.base is not None:
            model = model.with_reward(oracles.reward)
        generator = torch.Generator(model.device).manual_seed(mix_seed(seed, 0xE7A1))
        how: Drawing = {"num_steps": num_steps, "generator": generator}
        tokens, vocab_size = model.draw(draws, **how).cpu(), model.spec.vocab_size
        kl = path_kl(model, pretrained, draws, **how)
        rewards = {
            f"eval/{name}": float(score(oracle, tokens, vocab_size).mean())
            for name, oracle in oracles.columns.items()
            if oracle is not None
        }
        return {**rewards, "eval/kl": float(kl.mean())}

    return watch


def _alarmed(watch: Evaluate) -> Evaluate:
    """The same evaluation, which ends the run when the reward is being hacked."""
    rewards: list[float] = []
    held_out: list[float] = []

    def evaluate(path: Path, step: int) -> Mapping[str, float]:
        row = watch(path, step)
        rewards.append(row["eval/reward"])
        held_out.append(row["eval/held_out"])
        return {**row, "stop": float(hacking_warning(rewards, held_out) is not None)}

    return evaluate


class _Counted:
    """A reward, and how many sequences it was asked about."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.calls = reward, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        return self.reward(x)
