"""What the cameras of a published checkpoint become: an encoder of images with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.data.observation import ObsField
from diffpolicy.networks import from_resnet18_state_dict
from diffpolicy.policies.foreign.common import refuse_unless

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Sight(NamedTuple):
    """What a policy sees, in our terms and in the order of the checkpoint.

    Attributes:
        observations: fields by our names.
        encoder: settings.
        weights: of the encoder, by our names.
        order: how the condition of one step is laid out there: names and sizes. A vector that we
            keep together may be in several places, ``"state/0"``, ``"state/1"``.
    """

    observations: dict[str, ObsField]
    encoder: dict[str, Any]
    weights: dict[str, Tensor]
    order: list[tuple[str, int]]

    def columns(self, n_obs_steps: int) -> Tensor:
        """Where each entry of our condition ``[C]`` is in the checkpoint's."""
        sizes = [size for _, size in self.order]
        every = torch.arange(n_obs_steps * sum(sizes)).view(n_obs_steps, -1)
        places = torch.split(every, sizes, 1)
        parts = {name: part for (name, _), part in zip(self.order, places, strict=True)}
        cameras = sorted(name for name in parts if name in self.observations and self._is(name))
        vectors = [parts[name] for name in sorted(parts) if name not in cameras]
        seen = [parts[name].flatten() for name in cameras]
        return torch.cat([*seen, torch.cat(vectors, 1).flatten()] if vectors else seen)

    def _is(self, name: str) -> bool:
        return self.observations[name].is_image


class Eye(NamedTuple):
    """One camera's network in a checkpoint.

    Attributes:
        backbone: the state dict of a ResNet-18.
        maps: weight and bias of the layer before the spatial softmax; None: the mean of the map.
        head: weight and bias of the linear layer behind it, and a ReLU; None: no layer.
    """

    backbone: Mapping[str, Tensor]
    maps: tuple[Tensor, Tensor] | None = None
    head: tuple[Tensor, Tensor] | None = None

    def converted(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The settings of an encoder ``images``, and the weights of one of its eyes."""
        backbone, weights = from_resnet18_state_dict(self.backbone)
        out = {f"backbone.{name}": value for name, value in weights.items()}
        settings: dict[str, Any] = {"backbone": backbone, "points": None, "dim": None}
        if self.maps is not None:
            out |= {"pool.maps.weight": self.maps[0], "pool.maps.bias": self.maps[1]}
            settings["points"] = self.maps[0].shape[0]
        if self.head is not None:
            out |= {"head.weight": self.head[0], "head.bias": self.head[1]}
            settings |= {"dim": self.head[0].shape[0], "relu": True}
        return settings, out

    @property
    def size(self) -> int:
        """Features of an image."""
        if self.head is not None:
            return self.head[0].shape[0]
        if self.maps is not None:
            return 2 * self.maps[0].shape[0]
        return max(value.shape[0] for value in self.backbone.values() if value.dim() == 4)


def cameras_of(
    eyes: Mapping[str, Eye],
    fields: Mapping[str, ObsField],
    pixels: Mapping[str, Mapping[str, list[float]]],
    crop: Any,
    order: Sequence[tuple[str, int]],
    *,
    shared: bool = False,
) -> Sight:
    """The encoder of a checkpoint's cameras.

    Args:
        eyes: the network of each camera by its name.
        fields: all that is observed.
        pixels: mean and standard deviation per camera, of values in [0, 1].
        crop: ``[h, w]``, or None.
        order: see :class:`Sight`; the sizes of cameras are those of their features.
        shared: the eyes are one.

    Raises:
        ValueError: cameras with networks of different kinds.
    """
    named = sorted(eyes)
    found = [eyes[name].converted() for name in named]
    settings = found[0][0]
    for name, (other, _) in zip(named, found, strict=True):
        refuse_unless(f"the network of camera {name}", other, (settings,))
    encoder = {"type": "images", **settings}
    if crop is not None:
        encoder["crop"] = [int(side) for side in crop]
    if shared:
        encoder["shared"] = True
    if any(set(values) != {0.5} for one in pixels.values() for values in one.values()):
        same = all(one == pixels[named[0]] for one in pixels.values())
        encoder["pixels"] = dict(pixels[named[0]] if same else pixels)
    weights = {
        f"eyes.{place}.{name}": value
        for place, (_, part) in enumerate(found[: 1 if shared else None])
        for name, value in part.items()
    }
    sized = [(name, eyes[name].size if name in eyes else size) for name, size in order]
    return Sight(dict(fields), encoder, weights, sized)


def image_field(shape: Sequence[int]) -> ObsField:
    """The field of a camera whose pictures are ``[C, h, w]`` there.

    Raises:
        ValueError: another shape.
    """
    if len(shape) != 3:
        raise ValueError(f"pictures are [C, h, w], this policy's camera has {list(shape)}")
    channels, height, width = (int(side) for side in shape)
    return ObsField((height, width, channels), "uint8", "image")
