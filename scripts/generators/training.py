"""An agent of Stable-Baselines3 trained in segments, each of which starts from what is on disk.

At the start of a segment the random numbers and the environment are set anew from (seed, segment),
so a run that was killed and goes on is the run that was not, bit for bit on one machine. Nothing is
pickled: tensors are safetensors, the gathered steps npz, the rest JSON.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from diffpolicy.rollout.env_spec import EnvSpec, describe
from generators.agents import Actor, actor_weights, load_actor
from generators.collecting import SELECTION_SEEDS, measure
from generators.layout import Arrays, joined
from generators.parts import Parts, episode_seed, write_json

_CLASSES = {"sac": ("stable_baselines3", "SAC", "sb3"), "tqc": ("sb3_contrib", "TQC", "tqc")}
_OPTIMIZERS = ("actor.optimizer", "critic.optimizer", "ent_coef_optimizer")
_BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass(frozen=True)
class Training:
    """What a trained agent depends on, apart from how long it is trained.

    Args:
        env: flat observations and actions.
        algorithm: ``"sac"`` (Haarnoja et al. 2018) or ``"tqc"`` (Kuznetsov et al. 2020).
        seed: of everything.
        segment_steps: environment steps from checkpoint to checkpoint.
        eval_episodes: episodes in which each checkpoint is measured, with sampled actions, on seeds
            from 200,000 on.
        options: arguments of the algorithm's class, by their names there (``learning_starts``,
            ``batch_size``, ``policy_kwargs``); 5,000 random steps come first unless they say
            otherwise.
        device: of the training.

    Raises:
        ValueError: an unknown algorithm, or a number that is not positive.
    """

    env: EnvSpec
    algorithm: str = "sac"
    seed: int = 0
    segment_steps: int = 10_000
    eval_episodes: int = 5
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.algorithm not in _CLASSES:
            raise ValueError(f"algorithm must be one of {sorted(_CLASSES)}, got {self.algorithm!r}")
        for name in ("segment_steps", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        own = {"policy", "env", "seed", "device", "use_sde", "verbose"} & set(self.options)
        if own:
            raise ValueError(f"options cannot hold {sorted(own)}: they are set here")

    def settings(self) -> dict[str, Any]:
        """What every checkpoint depends on, as JSON values."""
        return {
            "env": self.env.to_dict(),
            "algorithm": self.algorithm,
            "seed": self.seed,
            "segment_steps": self.segment_steps,
            "eval_episodes": self.eval_episodes,
            "options": dict(self.options),
        }


class Agent:
    """A training and its folder: ``progress.json``, an actor per checkpoint, state, replay.

    Args:
        training: what to train.
        folder: made if it does not exist; gone on with if it does.

    Raises:
        ImportError: the algorithm's package is not installed; says how to install it.
        ValueError: the folder was begun with other settings, or the options are refused.
    """

    def __init__(self, training: Training, folder: str | os.PathLike[str]) -> None:
        self.training, self.folder = training, Path(folder)
        self._replay = Parts(self.folder / "replay", training.settings())
        self._progress = self.folder / "progress.json"
        self.checkpoints: list[dict[str, Any]] = []
        if self._progress.exists():
            self.checkpoints = json.loads(self._progress.read_text())["checkpoints"]
        # Segments are finished by the progress file: what lies beyond it was cut short.
        self._replay.truncate(max(len(self.checkpoints) - 1, 0))
        self._model: Any = None

    def advance(self, *, progress: bool = True) -> dict[str, Any]:
        """Trains one segment (none at the first call, which measures the random agent).

        Args:
            progress: whether to show a bar.

        Returns:
            The checkpoint: ``index``, ``train_steps``, ``return_mean``, ``return_std``,
            ``episodes``.
        """
        index = len(self.checkpoints)
        if self._model is None:
            self._model = self._load() if index else make_model(self.training)
        model = self._model
        if index:
            self._replay.append(_segment(model, self.training, index - 1, progress))
        actor = Actor(actor_weights(_numpy(model.policy.state_dict())), *_bounds(model))
        actor.save(self.actor_path(index))
        returns = measure(
            self.training.env, actor, SELECTION_SEEDS, self.training.eval_episodes, std_scale=1.0
        )
        checkpoint = {
            "index": index,
            "train_steps": int(model.num_timesteps),
            "return_mean": float(np.mean(returns)),
            "return_std": float(np.std(returns)),
            "episodes": len(returns),
        }
        self._save(model, index)
        self.checkpoints.append(checkpoint)
        counters = {"n_updates": int(model._n_updates), "episodes": int(model._episode_num)}
        write_json(self._progress, {"checkpoints": self.checkpoints, **counters})
        if index:
            self._state_path(index - 1).unlink(missing_ok=True)
        return checkpoint

    def actor_path(self, index: int) -> Path:
        """The file of a checkpoint's actor."""
        return self.folder / f"actor-{index:06d}.npz"

    def actor(self, index: int) -> Actor:
        """A checkpoint's actor."""
        info = describe(self.training.env)
        return load_actor(self.actor_path(index), info.action_low, info.action_high)

    def replay(self, index: int) -> Arrays:
        """All that was gathered up to a checkpoint, as D4RL's arrays.

        Segments end with a time-out. Actions are in the environment's units.
        """
        info = describe(self.training.env)
        segments = [self._replay.read(i) for i in range(index)]
        steps = joined(segments)
        dones, timeouts = steps["dones"] > 0, steps["timeouts"] > 0
        cut = np.zeros(len(dones), np.bool_)
        cut[np.cumsum([len(segment["rewards"]) for segment in segments]) - 1] = True
        terminals = dones & ~timeouts
        low, high = info.action_low, info.action_high
        return {
            "observations": steps["observations"],
            "actions": low + 0.5 * (steps["actions"] + 1) * (high - low),
            "rewards": steps["rewards"],
            "terminals": terminals,
            "timeouts": (dones | cut) & ~terminals,
            "next_observations": steps["next_observations"],
        }

    def _state_path(self, index: int) -> Path:
        return self.folder / f"state-{index:06d}.safetensors"

    def _save(self, model: Any, index: int) -> None:
        from safetensors.torch import save_file

        tensors = {f"policy.{k}": v for k, v in model.policy.state_dict().items()}
        for name, optimizer in _optimizers(model).items():
            for number, entries in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{number}.{k}": v for k, v in entries.items()}
        if model.log_ent_coef is not None:
            tensors["log_ent_coef"] = model.log_ent_coef
        target = self._state_path(index)
        writing = target.with_suffix(".writing")
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, writing)
        writing.replace(target)

    def _load(self) -> Any:
        from safetensors.torch import load_file

        model, last = make_model(self.training), self.checkpoints[-1]
        tensors = load_file(self._state_path(last["index"]), device=str(model.device))
        model.policy.load_state_dict(_below(tensors, "policy"))
        for name, optimizer in _optimizers(model).items():
            state: dict[int, dict[str, Any]] = {}
            for key, value in _below(tensors, name).items():
                number, entry = key.split(".", 1)
                # Adam counts its steps on the host.
                state.setdefault(int(number), {})[entry] = value.cpu() if entry == "step" else value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        if model.log_ent_coef is not None:
            model.log_ent_coef.data.copy_(tensors["log_ent_coef"])
        counters = json.loads(self._progress.read_text())
        model.num_timesteps = last["train_steps"]
        model._n_updates, model._episode_num = counters["n_updates"], counters["episodes"]
        for index in range(len(self._replay)):
            _refill(model.replay_buffer, self._replay.read(index))
        return model


def make_model(training: Training) -> Any:
    """The untrained agent.

    Raises:
        ImportError: the algorithm's package is not installed; says how to install it.
        ValueError: the options are refused.
    """
    package, name, extra = _CLASSES[training.algorithm]
    wanted = f'"diffpolicy[{extra}]"' if extra else "sb3-contrib"
    try:
        algorithm = getattr(importlib.import_module(package), name)
        vector = importlib.import_module("stable_baselines3.common.vec_env")
    except ImportError as error:
        raise ImportError(
            f"{name} is trained with {package}, which cannot be imported ({error}). "
            f"Run: pip install {wanted}"
        ) from error
    # The algorithm writes into its policy_kwargs.
    options = copy.deepcopy({"learning_starts": 5_000, **training.options})
    try:
        model = algorithm(
            "MlpPolicy",
            vector.DummyVecEnv([training.env.make]),
            seed=training.seed,
            device=training.device,
            **options,
        )
    except TypeError as error:
        raise ValueError(f"options {dict(training.options)} are refused: {error}") from error
    if model.replay_buffer.buffer_size < training.segment_steps:
        raise ValueError(
            f"buffer_size {model.replay_buffer.buffer_size} is below segment_steps "
            f"{training.segment_steps}: steps would be lost before they are stored"
        )
    return model


def _segment(model: Any, training: Training, number: int, progress: bool) -> Arrays:
    """Train for a segment; what was gathered in it, in the order of the steps."""
    state = np.random.SeedSequence([training.seed, number, 0x5B3]).generate_state(1)
    model.set_random_seed(int(state[0]))
    model.env.seed(episode_seed(training.seed, number))
    model._last_obs = None  # the next call resets the environment, with that seed
    first, before = model.replay_buffer.pos, model.num_timesteps
    with tqdm(
        total=training.segment_steps,
        desc=f"{training.algorithm} {model.num_timesteps}",
        unit="step",
        disable=not progress,
        leave=False,
    ) as bar:
        model.learn(
            training.segment_steps,
            callback=lambda *_: bar.update() or True,
            reset_num_timesteps=False,
        )
    buffer = model.replay_buffer
    rows = (first + np.arange(model.num_timesteps - before)) % buffer.buffer_size
    return {name: getattr(buffer, name)[rows, 0] for name in _BUFFER}


def _refill(buffer: Any, steps: Arrays) -> None:
    count = len(steps["rewards"])
    rows = (buffer.pos + np.arange(count)) % buffer.buffer_size
    for name in _BUFFER:
        getattr(buffer, name)[rows, 0] = steps[name]
    buffer.full = buffer.full or buffer.pos + count >= buffer.buffer_size
    buffer.pos = (buffer.pos + count) % buffer.buffer_size


def _optimizers(model: Any) -> dict[str, Any]:
    found = {}
    for name in _OPTIMIZERS:
        value = model
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            found[name] = value
    return found


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _numpy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu().numpy() for name, value in state.items()}


def _bounds(model: Any) -> tuple[Any, Any]:
    space = model.action_space
    return np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
