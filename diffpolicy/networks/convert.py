"""Weights published in other layouts, renamed to ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Where each residual block keeps its two convolution blocks and its modulation.
_DIFFUSION_POLICY = {"first": "blocks.0", "second": "blocks.1"}
_LEROBOT = {"first": "conv1", "second": "conv2"}


def from_diffusion_policy_state_dict(
    state: Mapping[str, Tensor], *, horizon: int, n_groups: int = 8
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a ``ConditionalUnet1D`` of Diffusion Policy (global conditioning only).

    Args:
        state: Its state dict, names starting at the U-Net (``down_modules.0.0...``). The input and
            output layout, [B, H, D], is ours.
        horizon: H; the weights do not tell it.
        n_groups: Groups of its normalisations; the weights do not tell this either.

    Returns:
        A config for ``make_network`` and the state dict of the network it makes.

    Raises:
        ValueError: Names or shapes that are not such a network's.
    """
    if any(name.startswith("local_cond_encoder.") for name in state):
        raise ValueError("this U-Net has local conditioning (local_cond_encoder), UNet1D has none")
    return _convert(state, _DIFFUSION_POLICY, ".conv", horizon, n_groups)


def from_lerobot_state_dict(
    state: Mapping[str, Tensor], *, horizon: int, n_groups: int = 8
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a ``DiffusionConditionalUnet1d`` of LeRobot.

    Args:
        state: Its state dict, names starting at the U-Net (``down_modules.0.0.conv1...``).
        horizon: H; the weights do not tell it.
        n_groups: Groups of its normalisations; the weights do not tell this either.

    Returns:
        A config for ``make_network`` and the state dict of the network it makes.

    Raises:
        ValueError: Names or shapes that are not such a network's.
    """
    return _convert(state, _LEROBOT, "", horizon, n_groups)


def from_resnet18_state_dict(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert torchvision's ResNet-18 without its classifier.

    Batch normalisation is folded into the convolutions, which is exact for its kept statistics.

    Args:
        state: its state dict, by torchvision's names (``layer1.0.conv1.weight``) or by the numbers
            of a sequence of its children (``4.0.conv1.weight``).

    Returns:
        A config of a backbone and the state dict of the module it makes.

    Raises:
        ValueError: names or shapes that are not such a network's.
    """
    numbers = {"0": "conv1", "1": "bn1", **{str(4 + k): f"layer{1 + k}" for k in range(4)}}
    named = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if not name.endswith("num_batches_tracked"):
            named[f"{numbers.get(first, first)}.{rest}"] = value
    source, out = _Source(named), {}
    width = named["conv1.weight"].shape[0] if "conv1.weight" in named else 0
    folded = "bn1.running_mean" in named
    pairs = [("conv1", "bn1")]
    for block in (f"layer{1 + k}.{j}" for k in range(4) for j in range(2)):
        pairs += [(f"{block}.conv{n}", f"{block}.bn{n}") for n in (1, 2)]
        if f"{block}.downsample.0.weight" in named:
            pairs.append((f"{block}.downsample.0", f"{block}.downsample.1"))
    for conv, norm in pairs:
        kernel = source.take(f"{conv}.weight").clone()
        gain, bias = source.take(f"{norm}.weight").clone(), source.take(f"{norm}.bias").clone()
        if folded:
            mean, variance = (source.take(f"{norm}.running_{what}") for what in ("mean", "var"))
            gain = gain * (variance + 1e-5).rsqrt()
            out[f"{conv}.weight"] = kernel * gain[:, None, None, None]
            out[f"{conv}.bias"] = bias - mean * gain
        else:
            out |= {f"{conv}.weight": kernel, f"{norm}.weight": gain, f"{norm}.bias": bias}
    source.check_used_up("ResNet18")
    return {"type": "resnet18", "width": width, "norm": "none" if folded else "group"}, out


def _convert(
    state: Mapping[str, Tensor], blocks: Mapping[str, str], resample: str, horizon: int, groups: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    source = _Source(state)
    levels = len({n.split(".")[1] for n in state if n.startswith("down_modules.")})
    if not levels:
        got = f"it starts with {sorted(state)[:3]}"
        raise ValueError(
            f"no down_modules.* among the names (a prefix before them is left?); {got}"
        )
    out: dict[str, Tensor] = {}
    for ours, theirs in _plain_layers(levels, resample):
        source.copy(theirs, ours, out)
    films = []
    for ours, theirs in _residual_blocks(levels):
        for part, name in blocks.items():
            source.copy(f"{theirs}.{name}.block.0", f"{ours}.{part}.conv", out)
            source.copy(f"{theirs}.{name}.block.1", f"{ours}.{part}.norm", out)
        if f"{theirs}.residual_conv.weight" in state:
            source.copy(f"{theirs}.residual_conv", f"{ours}.skip", out)
        films.append(f"{theirs}.cond_encoder.1")
    for kind in ("weight", "bias"):
        out[f"film.{kind}"] = torch.cat([source.take(f"{name}.{kind}") for name in films])
    source.check_used_up()
    return _config(state, blocks, levels, horizon, groups), out


def _config(
    state: Mapping[str, Tensor], blocks: Mapping[str, str], levels: int, horizon: int, groups: int
) -> dict[str, Any]:
    convs = [state[f"down_modules.{i}.0.{blocks['first']}.block.0.weight"] for i in range(levels)]
    film = state["down_modules.0.0.cond_encoder.1.weight"]
    embed = state["diffusion_step_encoder.3.weight"].shape[0]
    down_dims = [conv.shape[0] for conv in convs]
    return {
        "type": "unet1d",
        "horizon": horizon,
        "dim": convs[0].shape[1],
        "cond_dim": film.shape[1] - embed,
        "down_dims": down_dims,
        "kernel_size": convs[0].shape[2],
        "n_groups": groups,
        "diffusion_step_embed_dim": embed,
        "cond_predict_scale": film.shape[0] == 2 * down_dims[0],
    }


def _plain_layers(levels: int, resample: str) -> Iterator[tuple[str, str]]:
    """(our name, their name) of the layers outside the residual blocks."""
    yield "time.first", "diffusion_step_encoder.1"
    yield "time.second", "diffusion_step_encoder.3"
    yield "final.conv", "final_conv.0.block.0"
    yield "final.norm", "final_conv.0.block.1"
    yield "outward", "final_conv.1"
    for i in range(levels - 1):
        yield f"shrink.{i}", f"down_modules.{i}.2{resample}"
        yield f"grow.{i}", f"up_modules.{i}.2{resample}"


def _residual_blocks(levels: int) -> Iterator[tuple[str, str]]:
    """(our name, their name) of the residual blocks, in the order they run."""
    down = [(f"down.{i}", f"down_modules.{i}") for i in range(levels)]
    up = [(f"up.{i}", f"up_modules.{i}") for i in range(levels - 1)]
    for ours, theirs in [*down, ("middle", "mid_modules"), *up]:
        yield from ((f"{ours}.{j}", f"{theirs}.{j}") for j in range(2))


class _Source:
    """A state dict that notices what is missing and what was left."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.left = dict(state)

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ValueError(f"{name!r} is missing: incomplete, or of another architecture")
        return self.left.pop(name).detach()

    def copy(self, theirs: str, ours: str, out: dict[str, Tensor]) -> None:
        for kind in ("weight", "bias"):
            out[f"{ours}.{kind}"] = self.take(f"{theirs}.{kind}").clone()

    def check_used_up(self, where: str = "UNet1D") -> None:
        if self.left:
            some = sorted(self.left)[:3]
            raise ValueError(f"{len(self.left)} tensors have no place in {where}, such as {some}")
