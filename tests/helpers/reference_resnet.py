"""ResNet-18 as torchvision publishes it, computed independently from its names and shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def shapes(width=64, channels=3, *, batch=False):
    """Names and shapes without the classifier, with a normalisation's statistics if ``batch``."""
    out = {}

    def conv(name, norm, before, wide, size):
        out[f"{name}.weight"] = (wide, before, size, size)
        parts = ("weight", "bias", *(("running_mean", "running_var") if batch else ()))
        out.update({f"{norm}.{part}": (wide,) for part in parts})
        if batch:
            out[f"{norm}.num_batches_tracked"] = ()

    conv("conv1", "bn1", channels, width, 7)
    before = width
    for stage in range(4):
        wide = width * 2**stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            conv(f"{name}.conv1", f"{name}.bn1", before, wide, 3)
            conv(f"{name}.conv2", f"{name}.bn2", wide, wide, 3)
            if block == 0 and stage > 0:
                conv(f"{name}.downsample.0", f"{name}.downsample.1", before, wide, 1)
            before = wide
    return out


def weights(seed=0, **options):
    """Random weights of those shapes; every path carries signal."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes(**options).items():
        drawn = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            drawn = torch.tensor(7)
        elif name.endswith("running_var"):
            drawn = 0.5 + drawn.abs()
        elif drawn.dim() == 4:
            drawn = drawn * (2 / drawn[0].numel()) ** 0.5
        elif name.endswith("weight"):
            drawn = 1 + 0.3 * drawn
        else:
            drawn = 0.3 * drawn
        out[name] = drawn
    return out


def numbered(state):
    """The same under the names of a sequence of the network's children."""
    out = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        out[f"{CHILDREN.index(first)}.{rest}"] = value
    return out


def forward(state, x):
    """The map ``[N, 8W, h/32, w/32]``."""

    def norm(name, x):
        gain, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if f"{name}.running_mean" in state:
            kept = state[f"{name}.running_mean"], state[f"{name}.running_var"]
            return F.batch_norm(x, *kept, gain, bias)
        return F.group_norm(x, len(gain) // 16, gain, bias)

    x = F.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(norm("bn1", x)), 3, 2, 1)
    for stage in range(4):
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            stride = 2 if stage and not block else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(F.relu(norm(f"{name}.bn1", y)), state[f"{name}.conv2.weight"], padding=1)
            y = norm(f"{name}.bn2", y)
            if f"{name}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = norm(f"{name}.downsample.1", x)
            x = F.relu(x + y)
    return x


def keypoints(maps):
    """Expected places ``[N, 2K]`` of the softmax of maps ``[N, K, h, w]``, one by one."""
    height, width = maps.shape[-2:]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    out = []
    for image in maps:
        for one in image:
            mass = (one - one.max()).exp()
            mass = mass / mass.sum()
            out += [(mass * x).sum(), (mass * y).sum()]
    return torch.stack(out).view(len(maps), -1)
