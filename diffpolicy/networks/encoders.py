"""Encoders: from normalised observations to the condition ``[B, C]`` that networks are given.

One with weights is part of its denoiser: trained, saved and loaded with it. One of one's own is a
subclass of :class:`Encoder`, named by where it is: ``policy.encoder.type=mypackage.vision:Mine``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpolicy.networks.backbones import Eye
from diffpolicy.networks.registry import class_of, construct
from diffpolicy.settings import check_range, check_shape, from_values, named_settings


class Field(Protocol):
    """What an encoder is told of an array that it is given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one step of one row."""

    @property
    def is_image(self) -> bool:
        """Whether it is a grid of bytes, ``[h, w, C]`` or ``[h, w]``."""

    @property
    def role(self) -> str:
        """What it is for: ``state``, ``image``, ``task`` or ``goal``."""

    @property
    def is_id(self) -> bool:
        """Whether it says which of several tasks is meant, as one integer."""


Fields = Field | Mapping[str, Any]
"""One field, or fields by name."""


class Encoder(nn.Module):
    """What encoders are: made with ``(fields, n_obs_steps, **settings)``, called with observations.

    Attributes:
        cond_dim: C.
    """

    cond_dim: int

    def forward(self, obs: Any) -> Tensor:
        """The condition ``[B, C]`` of observations ``[B, To, ...]``: one tensor, or by name."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(obs)")


@named_settings
@dataclass(frozen=True)
class Tasks:
    """How the field whose role is ``task`` enters the condition; its newest step alone does.

    Args:
        count: how many tasks there are, where the field is their number; default: as many as the
            training data say.
        dim: size of what enters. A number is looked up in a learned table (default 16); a vector,
            such as the embedding of a sentence, passes through a learned layer (default: as it is).

    Raises:
        ValueError: sizes below 1.
    """

    count: int | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        check_range("[1, inf)", count=self.count, dim=self.dim)


class StateEncoder(Encoder):
    """Vectors side by side, the oldest step first; what is learned is the part of a task alone.

    Args:
        fields: what is observed in a step: one vector, or vectors by name.
        n_obs_steps: To.
        tasks: see :class:`Tasks`.

    Raises:
        ValueError: a field that is no vector, several tasks, settings of a task where there is
            none, or numbers of tasks without their count.
    """

    # Of the class, so that an encoder without tasks is described as it always was.
    task = ""

    def __init__(
        self, fields: Fields, n_obs_steps: int, tasks: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(fields) if isinstance(fields, Mapping) else ()
        each = fields if isinstance(fields, Mapping) else {"obs": fields}
        for name, field in each.items():
            if len(field.shape) != 1:
                raise ValueError(
                    f"the encoder 'state' takes vectors, {name!r} has the shape "
                    f"{list(field.shape)}; choose or write another encoder"
                )
        told = [name for name in self.names if each[name].role == "task"]
        settings = from_values(Tasks, tasks or {}, "encoder.tasks.")
        if len(told) > 1 or (tasks and not told):
            raise ValueError(f"encoder.tasks is of one field whose role is task; there are {told}")
        size = self._tell(told[0], each[told[0]], settings) if told else 0
        vectors = [field.shape[0] for name, field in each.items() if name not in told]
        self.cond_dim = n_obs_steps * sum(vectors) + size

    def _tell(self, name: str, field: Any, tasks: Tasks) -> int:
        """Make the part of the field ``name``, and say the size of what it makes."""
        self.task, self.names = name, tuple(one for one in self.names if one != name)
        if field.is_id:
            if tasks.count is None:
                raise ValueError(
                    f"{name!r} is the number of a task: say how many there are, encoder.tasks.count"
                )
            self.told: nn.Module = nn.Embedding(tasks.count, tasks.dim or 16)
            return tasks.dim or 16
        if tasks.count is not None:
            raise ValueError(f"encoder.tasks.count is for integers [1], {name!r} is {field}")
        size = int(field.shape[0])
        self.told = nn.Identity() if tasks.dim is None else nn.Linear(size, tasks.dim)
        return tasks.dim or size

    def forward(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """``[B, C]``, C = To times the sum of the vectors' sizes, then the task's part.

        Raises:
            ValueError: the number of a task that is not there (on a CPU).
        """
        if not isinstance(obs, Mapping):
            return obs.flatten(1)
        parts = [obs[name] for name in self.names]
        seen = [torch.cat(parts, dim=-1).flatten(1)] if parts else []
        if self.task:
            seen.append(self._looked_up(obs[self.task][:, -1]))
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=1)

    def _looked_up(self, task: Tensor) -> Tensor:
        if not isinstance(self.told, nn.Embedding):
            out: Tensor = self.told(task)
            return out
        try:
            out = self.told(task[:, 0].long())
        except IndexError:
            raise ValueError(
                f"{self.task!r} must be in 0 .. {self.told.num_embeddings - 1}, got "
                f"{int(task.min())} .. {int(task.max())}"
            ) from None
        return out


class ImageEncoder(Encoder):
    """Each image through a convolutional backbone, beside the vectors as they are.

    An image is cropped, at random in training (one place per row and camera, for all its steps) and
    in the middle otherwise, scaled to [-1, 1], and its map of features summarised by the places of
    K points and a linear layer. Random places come from torch's global generator, which the trainer
    makes a function of (seed, step).

    Args:
        fields: what is observed in a step, by name or a single image.
        n_obs_steps: To.
        backbone: ``{"type": ..., settings}``, of :data:`diffpolicy.networks.backbones.BACKBONES`,
            or ``package.module:Class`` of a module ``(channels, settings)`` with ``out_channels``.
        dim: features per image and step; None: those of the map, without a linear layer.
        points: K of the spatial softmax; None: the mean of the map instead.
        relu: cut features below 0 off, as robomimic does.
        crop: the share of each side that is kept, in (0, 1], or the sides in pixels ``[h, w]``.
        shared: one backbone for all cameras, rather than one for each.
        jitter: largest change of brightness and contrast in training, as a share of the range.
        pixels: what images are normalised by, of values in [0, 1]: ``{"mean": [C], "std": [C]}``,
            or such a mapping for each camera by name; default: 0.5 both, to [-1, 1].
        tasks: of a field whose role is ``task``, see :class:`Tasks`.

    Raises:
        ValueError: no image, cameras of different channels with ``shared``, settings out of range,
            or a backbone whose map is a single pixel (or none) of such images.

    Example:
        >>> settings = {"type": "images", "backbone": {"type": "resnet18"}, "crop": 0.875}
        >>> encoder = make_encoder(settings, {"camera": ObsField((96, 96, 3), "uint8", "image")}, 2)
    """

    # Of the class where they are not set, so that earlier runs are described as they were.
    pixels: Mapping[str, tuple[Any, Any]] = {}

    def __init__(
        self,
        fields: Fields,
        n_obs_steps: int,
        backbone: Mapping[str, Any] | None = None,
        dim: int | None = 64,
        points: int | None = 32,
        relu: bool = False,
        crop: float | Sequence[int] = 1.0,
        shared: bool = False,
        jitter: float = 0.0,
        pixels: Mapping[str, Any] | None = None,
        tasks: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_range("[0, 1)", jitter=jitter)
        check_range("[1, inf)", dim=dim)
        named = fields if isinstance(fields, Mapping) else {"": fields}
        self.cameras = {name: one.shape for name, one in named.items() if one.is_image}
        vectors = {name: one for name, one in named.items() if not one.is_image}
        if not self.cameras:
            raise ValueError(
                f"the encoder 'images' needs an image, there are {sorted(named)}; "
                "policy.encoder={type: state} takes vectors"
            )
        self.crop, self.jitter = crop, jitter
        for name in self.cameras:
            self._check_crop(name)
        if tasks and not vectors:
            raise ValueError("encoder.tasks is of a field whose role is task; there is none")
        self.vectors = StateEncoder(vectors, n_obs_steps, tasks) if vectors else None
        channels = {name: _channels(shape) for name, shape in self.cameras.items()}
        if shared and len(set(channels.values())) > 1:
            some = sorted(set(channels.values()))
            raise ValueError(f"cameras of {some} channels cannot share a backbone")
        if pixels:
            self.pixels = _affine(pixels, channels)
        config = {"type": "cnn", **(backbone or {})}
        eyes = [
            Eye(config, c, points, dim, relu)
            for c in list(channels.values())[: 1 if shared else None]
        ]
        self.eyes = nn.ModuleList(eyes)
        for place, (name, shape) in enumerate(self.cameras.items()):
            eyes[min(place, len(eyes) - 1)].check(name, channels[name], self._sides(shape))
        beside = 0 if self.vectors is None else self.vectors.cond_dim
        self.cond_dim = n_obs_steps * eyes[0].out_dim * len(self.cameras) + beside

    def _sides(self, shape: tuple[int, ...]) -> list[int]:
        """The sides ``[h', w']`` of a camera's images that are kept."""
        if isinstance(self.crop, Sequence):
            return [int(side) for side in self.crop]
        return [max(1, round(self.crop * side)) for side in shape[:2]]

    def _check_crop(self, name: str) -> None:
        if not isinstance(self.crop, Sequence):
            check_range("(0, 1]", crop=self.crop)
            return
        sides, most = self._sides(()), self.cameras[name][:2]
        if len(sides) != 2 or not all(1 <= a <= b for a, b in zip(sides, most, strict=True)):
            raise ValueError(f"crop must be a share, or within {list(most)} of {name!r}: {sides}")

    def forward(self, obs: Any) -> Tensor:
        """``[B, C]``: the features of every camera, the oldest step first, then the vectors."""
        named = obs if isinstance(obs, Mapping) else {"": obs}
        seen = []
        for place, name in enumerate(self.cameras):
            eye = self.eyes[min(place, len(self.eyes) - 1)]
            images = self._prepared(named[name], name)
            rows, steps = images.shape[:2]
            found = eye(images.flatten(0, 1))
            seen.append(found.reshape(rows, steps * found.shape[1]))  # rows stay free in a trace
        if self.vectors is not None:
            seen.append(self.vectors(named))
        return torch.cat(seen, dim=1)

    def _prepared(self, images: Tensor, name: str) -> Tensor:
        """Cropped, scaled images ``[B, To, C, h', w']``, of bytes ``[B, To, h, w(, C)]``."""
        shape = self.cameras[name]
        if len(shape) == 2:
            images = images.unsqueeze(-1)
        # An axis -1 breaks ONNX.
        images = self._cropped(images, shape, self._sides(shape)).permute(0, 1, 4, 2, 3)
        weight = next(self.eyes.parameters())
        images = images.to(weight.dtype) / 127.5 - 1
        if self.training and self.jitter:
            contrast, brightness = self.jitter * (
                2 * torch.rand(2, len(images), 1, 1, 1, 1, device=images.device) - 1
            )
            images = (images * (1 + contrast) + brightness).clamp(-1, 1)
        if name in self.pixels:
            scale, offset = (
                torch.tensor(one, dtype=images.dtype, device=images.device).view(-1, 1, 1)
                for one in self.pixels[name]
            )
            images = images * scale + offset
        return images

    def _cropped(self, images: Tensor, shape: tuple[int, ...], sides: list[int]) -> Tensor:
        """A part of ``sides`` of images ``[B, To, h, w, C]``: at random when training."""
        # Of the declared shape: in a trace the sides of a tensor are tensors, which round() is not.
        spare = [shape[axis] - sides[axis] for axis in range(2)]
        if not any(spare):
            return images
        if not self.training:
            y, x = (round(one / 2) for one in spare)
            return images[:, :, y : y + sides[0], x : x + sides[1]]
        # One place per row: its steps are cropped alike, so that what moves is seen to move. Drawn
        # on the host, and copied slice by slice: indexing pixels takes ten times as long.
        ys, xs = (torch.randint(one + 1, (len(images),)).tolist() for one in spare)
        parts = [
            row[:, y : y + sides[0], x : x + sides[1]]
            for row, y, x in zip(images, ys, xs, strict=True)
        ]
        return torch.stack(parts)


def _channels(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) > 2 else 1


def _affine(
    pixels: Mapping[str, Any], channels: Mapping[str, int]
) -> dict[str, tuple[list[float], list[float]]]:
    """By camera what makes of [-1, 1] what has the mean and standard deviation that are given."""
    each = pixels if set(pixels) == set(channels) else dict.fromkeys(channels, pixels)
    found = {}
    for name, values in each.items():
        if set(values) != {"mean", "std"}:
            raise ValueError(
                "encoder.pixels must hold mean and std of all cameras, or such for each of "
                f"{sorted(channels)}; got {sorted(values)}"
            )
        for part, numbers in values.items():
            check_shape(f"encoder.pixels.{part} of {name!r}", [len(numbers)], [channels[name]])
        check_range("(0, inf)", **{f"std_{i}": value for i, value in enumerate(values["std"])})
        pairs = list(zip(values["mean"], values["std"], strict=True))
        found[name] = [0.5 / std for _, std in pairs], [(0.5 - mean) / std for mean, std in pairs]
    return found


ENCODERS: dict[str, type[Encoder]] = {"state": StateEncoder, "images": ImageEncoder}


def encoder_class(name: object) -> type[Encoder]:
    """The class of a key of ``ENCODERS``, or of ``package.module:Class``.

    Raises:
        ValueError: what :func:`~diffpolicy.networks.registry.class_of` refuses.
    """
    return class_of(ENCODERS, name, "encoder type", Encoder)


def make_encoder(config: Mapping[str, Any], fields: Fields, n_obs_steps: int) -> Encoder:
    """Build an encoder from plain values.

    Args:
        config: "type" (see :func:`encoder_class`) and the class' own arguments.
        fields: what is observed in a step, for the class.
        n_obs_steps: To, likewise.

    Raises:
        ValueError: Unknown type, unknown or missing key, or fields that it cannot take.
    """
    given = {"fields": fields, "n_obs_steps": n_obs_steps}
    made: Encoder = construct(ENCODERS, {**config, **given}, "encoder", Encoder)
    return made
