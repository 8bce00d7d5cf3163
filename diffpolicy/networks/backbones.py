"""Backbones: from images ``[N, C, h, w]`` to maps of features ``[N, F, h', w']``.

An encoder of images (:class:`diffpolicy.networks.encoders.ImageEncoder`) crops and scales images,
gives them to one of these and summarises the map. A kind of one's own is a module with
``out_channels`` and a line ``BACKBONES["mine"] = Mine``; ``policy.encoder.backbone={type: mine}``
chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffpolicy.settings import check_range


class SmallCNN(nn.Module):
    """A few strided convolutions: what trains on a CPU in minutes.

    Args:
        channels: C of the images.
        widths: output channels of each convolution. The first two halve the image's sides.

    Raises:
        ValueError: no convolution.
    """

    def __init__(self, channels: int, widths: Sequence[int] = (32, 64, 64, 64)) -> None:
        super().__init__()
        check_range("[1, inf)", convolutions=len(widths))
        layers: list[nn.Module] = []
        for place, width in enumerate(widths):
            size, stride = (5, 2) if place == 0 else (3, 2 if place == 1 else 1)
            layers += [nn.Conv2d(channels, width, size, stride, size // 2), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers[:-1])  # the map keeps its sign
        self.out_channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """A map ``[N, F, h', w']``."""
        out: Tensor = self.layers(images)
        return out


class SpatialSoftmax(nn.Module):
    """Where in the image each feature is: the mean place of a softmax over the map.

    Finn et al. 2016, "Deep spatial autoencoders", eq. 1; robomimic and Diffusion Policy put it
    behind their backbones. A 1 x 1 convolution makes the K maps whose places are taken.

    Args:
        channels: F of the map.
        points: K.
    """

    def __init__(self, channels: int, points: int = 32) -> None:
        super().__init__()
        check_range("[1, inf)", points=points)
        self.maps = nn.Conv2d(channels, points, 1)
        self.out_dim = 2 * points

    def forward(self, features: Tensor) -> Tensor:
        """Places ``[N, 2K]``, x and y of a point after each other, in [-1, 1] from edge to edge."""
        maps = self.maps(features).float()  # half precision would be a pixel off
        height, width = maps.shape[-2:]
        mass = maps.flatten(2).softmax(-1).unflatten(2, (height, width))
        x = torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)
        y = torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
        # The marginals first: a sum over one axis and a product with the places on the other.
        places = torch.stack([(mass.sum(2) * x).sum(-1), (mass.sum(3) * y).sum(-1)], -1)
        return places.flatten(1).to(features.dtype)


BACKBONES: dict[str, type[nn.Module]] = {"cnn": SmallCNN}
