"""Actors of Stable-Baselines3 as plain arrays: a ReLU network whose Gaussian goes through tanh."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from generators.parts import write_npz

Vector = NDArray[np.float32]
Weights = dict[str, NDArray[np.float32]]

_LOG_STD = (-20.0, 2.0)  # to which SAC and TQC clip the logarithm of the standard deviation
_HIDDEN = re.compile(r"latent_pi\.(\d+)\.weight")
_HEADS = ("mu.weight", "mu.bias", "log_std.weight", "log_std.bias")


@dataclass(frozen=True)
class Actor:
    """The squashed Gaussian policy of SAC and TQC (Haarnoja et al. 2018, appendix C), in numpy.

    ``h = relu(W h + b)`` through the layers ``latent_pi``, then
    ``a = tanh(mu(h) + std_scale * exp(clip(log_std(h), -20, 2)) * eps)``, stretched from [-1, 1] to
    the bounds.

    Args:
        weights: arrays named as Stable-Baselines3's actor names them: ``latent_pi.<i>.weight``
            ``[out, in]`` and ``.bias``, ``mu.*`` and ``log_std.*``.
        low: ``[A]`` lower bounds of the action.
        high: ``[A]`` upper bounds.

    Raises:
        ValueError: an array is missing, or shapes do not fit one another or the bounds.
    """

    weights: Weights
    low: Vector
    high: Vector

    def __post_init__(self) -> None:
        missing = [n for n in self._names() if n not in self.weights]
        if missing or not self._hidden():
            raise ValueError(
                f"no actor of SAC or TQC: {missing or 'latent_pi'} missing among "
                f"{sorted(self.weights)}"
            )
        size = None
        for name in [n for n in self._names() if n.endswith("weight") and "log_std" not in n]:
            shape = self.weights[name].shape
            if len(shape) != 2 or (size is not None and shape[1] != size):
                raise ValueError(f"{name} has shape {shape}, expected [out, {size or 'in'}]")
            size = shape[0]
        if size != len(self.low):
            raise ValueError(f"the actor has {size} actions, the environment {len(self.low)}")

    @property
    def obs_dim(self) -> int:
        """Length of the observations that it takes."""
        return int(self.weights[f"latent_pi.{self._hidden()[0]}.weight"].shape[1])

    def act(
        self, observation: NDArray[np.floating], rng: np.random.Generator, std_scale: float = 1.0
    ) -> Vector:
        """One action.

        Args:
            observation: ``[O]``.
            rng: of the noise; drawn from even at scale 0.
            std_scale: factor of the policy's standard deviation; 0 is deterministic.

        Returns:
            ``[A]`` float32 within the bounds.
        """
        h = observation.astype(np.float32)
        for index in self._hidden():
            h = np.maximum(self._linear(f"latent_pi.{index}", h), 0)
        mean = self._linear("mu", h)
        std = np.exp(np.clip(self._linear("log_std", h), *_LOG_STD))
        noise = rng.standard_normal(len(self.low)).astype(np.float32)
        squashed = np.tanh(mean + np.float32(std_scale) * std * noise)
        return np.clip(
            self.low + 0.5 * (squashed + 1) * (self.high - self.low), self.low, self.high
        ).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the arrays as ``.npz``, whole or not at all; :func:`load_actor` reads them."""
        write_npz(path, self.weights)

    def _linear(self, name: str, value: Vector) -> Vector:
        return self.weights[f"{name}.weight"] @ value + self.weights[f"{name}.bias"]

    def _hidden(self) -> list[int]:
        found = (_HIDDEN.fullmatch(name) for name in self.weights)
        return sorted(int(match.group(1)) for match in found if match)

    def _names(self) -> list[str]:
        layers = [f"latent_pi.{i}.{kind}" for i in self._hidden() for kind in ("weight", "bias")]
        return [*layers, *_HEADS]


def load_actor(path: str | os.PathLike[str], low: Vector, high: Vector) -> Actor:
    """Reads an actor; no object is unpickled.

    Args:
        path: an ``.npz`` of the actor's arrays, or a ``.zip`` that Stable-Baselines3 saved. Of the
            zip only the tensors in ``policy.pth`` are read, with ``torch.load(weights_only=True)``;
            layers and sizes follow from their names and shapes.
        low: ``[A]`` lower bounds of the environment's action.
        high: ``[A]`` upper bounds.

    Returns:
        The actor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, an agent of another algorithm, or another action size.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no agent at {file}")
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            weights = {name: arrays[name].astype(np.float32) for name in arrays.files}
    elif file.suffix == ".zip":
        weights = _from_zip(file)
    else:
        raise ValueError(f"{file.name}: expected an .npz of an actor's arrays or an SB3 .zip")
    return _build(weights, low, high, file.name)


def actor_weights(state: Mapping[str, NDArray[np.floating]]) -> Weights:
    """The actor's arrays out of those of a whole policy, their prefix ``actor.`` removed."""
    return {
        name.removeprefix("actor."): np.asarray(value, np.float32)
        for name, value in state.items()
        if name.startswith("actor.")
    }


def _from_zip(path: Path) -> Weights:
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("policy.pth"))
        state = torch.load(content, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path.name} is no agent of Stable-Baselines3: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"policy.pth of {path.name} holds more than tensors, which is not unpickled: {error}"
        ) from error
    return actor_weights({name: value.numpy() for name, value in state.items()})


def _build(weights: Weights, low: Vector, high: Vector, source: str) -> Actor:
    if "log_std" in weights:
        raise ValueError(
            f"{source} explores with state-dependent noise (use_sde=True), which is not read; "
            "export its mean network as latent_pi, mu and log_std arrays"
        )
    try:
        return Actor(weights, low, high)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
