"""Encoders: from normalised observations to the condition ``[B, C]`` that networks are given.

One with weights is part of its denoiser: trained, saved and loaded with it. A kind of one's own is
a subclass of :class:`Encoder` with a line ``ENCODERS["mine"] = Mine``;
``policy.encoder={type: mine}`` chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpolicy.networks.backbones import BACKBONES, SpatialSoftmax
from diffpolicy.networks.registry import construct
from diffpolicy.settings import check_range


class Field(Protocol):
    """What an encoder is told of an array that it is given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one step of one row."""

    @property
    def is_image(self) -> bool:
        """Whether it is a grid of bytes, ``[h, w, C]`` or ``[h, w]``."""


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


class StateEncoder(Encoder):
    """Vectors side by side, the oldest step first; it has no weights.

    Args:
        fields: what is observed in a step: one vector, or vectors by name.
        n_obs_steps: To.

    Raises:
        ValueError: a field that is no vector.
    """

    def __init__(self, fields: Fields, n_obs_steps: int) -> None:
        super().__init__()
        self.names = tuple(fields) if isinstance(fields, Mapping) else ()
        each = fields if isinstance(fields, Mapping) else {"obs": fields}
        for name, field in each.items():
            if len(field.shape) != 1:
                raise ValueError(
                    f"the encoder 'state' takes vectors, {name!r} has the shape "
                    f"{list(field.shape)}; choose or write another encoder"
                )
        self.cond_dim = n_obs_steps * sum(field.shape[0] for field in each.values())

    def forward(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor:
        """``[B, C]``, C = To times the sum of the vectors' sizes."""
        if isinstance(obs, Mapping):
            obs = torch.cat([obs[name] for name in self.names], dim=-1)
        return obs.flatten(1)


class ImageEncoder(Encoder):
    """Each image through a convolutional backbone, beside the vectors as they are.

    An image is cropped, at random in training (one place per row and camera, for all its steps) and
    in the middle otherwise, scaled to [-1, 1], and its map of features summarised by the places of
    K points and a linear layer. Random places come from torch's global generator, which the trainer
    makes a function of (seed, step).

    Args:
        fields: what is observed in a step, by name or a single image.
        n_obs_steps: To.
        backbone: ``{"type": ..., settings}``, of :data:`diffpolicy.networks.backbones.BACKBONES`.
        dim: features per image and step.
        points: K of the spatial softmax.
        crop: the share of each side that is kept, in (0, 1].
        shared: one backbone for all cameras, rather than one for each.
        jitter: largest change of brightness and contrast in training, as a share of the range.

    Raises:
        ValueError: no image, cameras of different channels with ``shared``, or settings out of
            range.
    """

    def __init__(
        self,
        fields: Fields,
        n_obs_steps: int,
        backbone: Mapping[str, Any] | None = None,
        dim: int = 64,
        points: int = 32,
        crop: float = 1.0,
        shared: bool = False,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        check_range("(0, 1]", crop=crop)
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
        self.vectors = StateEncoder(vectors, n_obs_steps) if vectors else None
        channels = {shape[2] if len(shape) > 2 else 1 for shape in self.cameras.values()}
        if shared and len(channels) > 1:
            raise ValueError(f"cameras of {sorted(channels)} channels cannot share a backbone")
        config = {"type": "cnn", **(backbone or {})}
        self.eyes = nn.ModuleList(
            _Eye(config, shape[2] if len(shape) > 2 else 1, points, dim)
            for shape in (list(self.cameras.values())[:1] if shared else self.cameras.values())
        )
        beside = 0 if self.vectors is None else self.vectors.cond_dim
        self.cond_dim = n_obs_steps * dim * len(self.cameras) + beside

    def forward(self, obs: Any) -> Tensor:
        """``[B, C]``: the features of every camera, the oldest step first, then the vectors."""
        named = obs if isinstance(obs, Mapping) else {"": obs}
        seen = []
        for place, name in enumerate(self.cameras):
            eye = self.eyes[min(place, len(self.eyes) - 1)]
            images = self._prepared(named[name], self.cameras[name])
            rows, steps = images.shape[:2]
            found = eye(images.flatten(0, 1))
            seen.append(found.reshape(rows, steps * found.shape[1]))  # rows stay free in a trace
        if self.vectors is not None:
            seen.append(self.vectors(named))
        return torch.cat(seen, dim=1)

    def _prepared(self, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Cropped images ``[B, To, C, h', w']`` in [-1, 1], of bytes ``[B, To, h, w(, C)]``."""
        if len(shape) == 2:
            images = images.unsqueeze(-1)
        sides = [max(1, round(self.crop * side)) for side in shape[:2]]
        images = self._cropped(images, sides).permute(0, 1, 4, 2, 3)  # an axis -1 breaks ONNX
        weight = next(self.eyes.parameters())
        images = images.to(weight.dtype) / 127.5 - 1
        if self.training and self.jitter:
            contrast, brightness = self.jitter * (
                2 * torch.rand(2, len(images), 1, 1, 1, 1, device=images.device) - 1
            )
            images = (images * (1 + contrast) + brightness).clamp(-1, 1)
        return images

    def _cropped(self, images: Tensor, sides: list[int]) -> Tensor:
        """A part of ``sides`` of images ``[B, To, h, w, C]``: at random when training."""
        spare = [images.shape[axis + 2] - sides[axis] for axis in range(2)]
        if not any(spare):
            return images
        if not self.training:
            y, x = (one // 2 for one in spare)
            return images[:, :, y : y + sides[0], x : x + sides[1]]
        # One place per row: its steps are cropped alike, so that what moves is seen to move. Drawn
        # on the host, and copied slice by slice: indexing pixels takes ten times as long.
        ys, xs = (torch.randint(one + 1, (len(images),)).tolist() for one in spare)
        parts = [
            row[:, y : y + sides[0], x : x + sides[1]]
            for row, y, x in zip(images, ys, xs, strict=True)
        ]
        return torch.stack(parts)


class _Eye(nn.Module):
    """One camera's network: backbone, places of points, a linear layer."""

    def __init__(self, config: Mapping[str, Any], channels: int, points: int, dim: int) -> None:
        super().__init__()
        self.backbone = construct(BACKBONES, {**config, "channels": channels}, "backbone")
        self.pool = SpatialSoftmax(self.backbone.out_channels, points)
        self.head = nn.Linear(self.pool.out_dim, dim)
        # As images come; a CPU is faster so.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[N, dim]`` of images ``[N, C, h, w]``."""
        out: Tensor = self.head(self.pool(self.backbone(images)))
        return out


ENCODERS: dict[str, type[Encoder]] = {"state": StateEncoder, "images": ImageEncoder}


def make_encoder(config: Mapping[str, Any], fields: Fields, n_obs_steps: int) -> Encoder:
    """Build an encoder from plain values.

    Args:
        config: "type" (a key of ``ENCODERS``) and the class' own arguments.
        fields: what is observed in a step, for the class.
        n_obs_steps: To, likewise.

    Raises:
        ValueError: Unknown type, unknown or missing key, or fields that it cannot take.
    """
    given = {"fields": fields, "n_obs_steps": n_obs_steps}
    made: Encoder = construct(ENCODERS, {**config, **given}, "encoder")
    return made
