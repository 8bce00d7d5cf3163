"""Backbones: from images ``[N, C, h, w]`` to maps of features ``[N, F, h', w']``.

An encoder of images (:class:`diffpolicy.networks.encoders.ImageEncoder`) crops and scales images,
gives them to one of these and summarises the map. A kind of one's own is a module with
``out_channels`` and a line ``BACKBONES["mine"] = Mine``; ``policy.encoder.backbone={type: mine}``
chooses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.extras import need
from diffpolicy.networks.registry import construct
from diffpolicy.settings import check_choice, check_range, check_shape

NORMS = ("group", "none")


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


class ResNet18(nn.Module):
    """ResNet-18 without its classifier (He et al. 2016, table 1), as in Diffusion Policy.

    Its map has a 32nd of the image's sides. The parameters have torchvision's names.

    Args:
        channels: C of the images.
        width: output channels W of the first convolution; the stages have W, 2W, 4W and 8W.
        norm: ``"group"``, groups of 16 channels (Wu & He 2018): batch statistics and averaged
            weights do not go together; ``"none"``, convolutions with a bias, which is what batch
            normalisation of weights that were trained elsewhere becomes.

    Raises:
        ValueError: an unknown norm, or a width that is no multiple of 16.
    """

    def __init__(self, channels: int, width: int = 64, norm: str = "group") -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        if width < 16 or width % 16:
            raise ValueError(f"width must be a multiple of 16, got {width}")
        self.conv1, self.bn1 = _conv(channels, width, 7, 2, norm), _norm(width, norm)
        self.pool = nn.MaxPool2d(3, 2, 1)
        before = width
        for stage in range(4):
            wide = width << stage
            blocks = _Block(before, wide, 1 + (stage > 0), norm), _Block(wide, wide, 1, norm)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            before = wide
        self.out_channels = before

    def forward(self, images: Tensor) -> Tensor:
        """A map ``[N, 8W, h/32, w/32]``, not negative."""
        x: Tensor = self.pool(F.relu(self.bn1(self.conv1(images))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, fig. 2)."""

    def __init__(self, before: int, wide: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, wide, 3, stride, norm), _norm(wide, norm)
        self.conv2, self.bn2 = _conv(wide, wide, 3, 1, norm), _norm(wide, norm)
        self.downsample = nn.Sequential()
        if before != wide:
            self.downsample = nn.Sequential(_conv(before, wide, 1, stride, norm), _norm(wide, norm))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = out + self.downsample(x)
        return F.relu(out)


def _conv(before: int, wide: int, size: int, stride: int, norm: str) -> nn.Conv2d:
    made = nn.Conv2d(before, wide, size, stride, size // 2, bias=norm == "none")
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def _norm(wide: int, norm: str) -> nn.Module:
    return nn.Identity() if norm == "none" else nn.GroupNorm(wide // 16, wide)


_own_weights: ContextVar[bool] = ContextVar("own_weights", default=True)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Within, backbones download no weights of their own: those of a saved policy follow."""
    token = _own_weights.set(False)
    try:
        yield
    finally:
        _own_weights.reset(token)


class Timm(nn.Module):
    """The last map of features of any model of the package timm that has such maps.

    Args:
        channels: C of the images.
        name: timm's, such as ``"efficientnet_lite0"``; ``timm.list_models()`` says them all.
        pretrained: begin with published weights, downloaded once. They expect images of a mean and
            a standard deviation: ``policy.encoder.pixels``.
        frozen: keep these weights, and batch statistics, as they are.

    Raises:
        ImportError: timm, or a torchvision that fits this torch, is not installed.
        ValueError: no such model, or one that has no maps of features.
    """

    def __init__(
        self, channels: int, name: str, pretrained: bool = False, frozen: bool = False
    ) -> None:
        super().__init__()
        own = pretrained and _own_weights.get()
        try:
            timm = need("timm")
        except ImportError as error:
            raise ImportError(
                f"{error}. It needs torchvision as it was built beside torch {torch.__version__}: "
                "of the same release, from the same place. Without it encoder=resnet18 and "
                "encoder=cnn work"
            ) from error
        try:
            self.network = timm.create_model(
                name, pretrained=own, in_chans=channels, features_only=True
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"timm has no backbone {name!r} with maps: {error}") from error
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)
        self.out_channels = int(self.network.feature_info.channels()[-1])

    def train(self, mode: bool = True) -> Timm:
        super().train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """A map ``[N, F, h', w']``."""
        out: Tensor = self.network(images)[-1]
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


class MeanPool(nn.Module):
    """The mean of each feature over the map.

    Args:
        channels: F of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_dim = channels

    def forward(self, features: Tensor) -> Tensor:
        """Means ``[N, F]``."""
        return features.mean((2, 3))


BACKBONES: dict[str, type[nn.Module]] = {"cnn": SmallCNN, "resnet18": ResNet18, "timm": Timm}


class Eye(nn.Module):
    """One camera's network: backbone, places of points or means, a linear layer."""

    relu = False

    def __init__(
        self,
        config: Mapping[str, Any],
        channels: int,
        points: int | None,
        dim: int | None,
        relu: bool,
    ) -> None:
        super().__init__()
        self.backbone = construct(
            BACKBONES, {**config, "channels": channels}, "backbone", nn.Module
        )
        size = self.backbone.out_channels
        self.pool = MeanPool(size) if points is None else SpatialSoftmax(size, points)
        self.head = nn.Identity() if dim is None else nn.Linear(self.pool.out_dim, dim)
        if relu:
            self.relu = relu
        # As images come; a CPU is faster so.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def check(self, name: str, channels: int, sides: Sequence[int]) -> None:
        """Raise ``ValueError`` where the map of ``[C, h, w]`` is none, or has no places to tell."""
        found = self.backbone.eval()(torch.zeros(1, channels, *sides))
        self.backbone.train()
        what = f"the map of the backbone of {name!r}, of images {list(sides)},"
        check_shape(what, found.shape, (1, self.backbone.out_channels, "h", "w"))
        if isinstance(self.pool, SpatialSoftmax) and found.shape[2:].numel() == 1:
            raise ValueError(
                f"{what} is a single pixel, whose place says nothing: policy.encoder.points=null "
                "takes the features instead of their places; or larger images, another backbone"
            )

    @property
    def out_dim(self) -> int:
        """Features of an image."""
        return int(getattr(self.head, "out_features", self.pool.out_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[N, dim]`` of images ``[N, C, h, w]``."""
        out: Tensor = self.head(self.pool(self.backbone(images)))
        return F.relu(out) if self.relu else out
