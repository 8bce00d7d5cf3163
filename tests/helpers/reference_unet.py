"""The published temporal U-Nets, built independently of ours from their parameter names and shapes.

Plain nested containers carry the names; the forward pass is written with functions. Used to check
the converters.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class Named(nn.Module):
    """A bag of children under given names, such as "0" or "block"."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name.lstrip("_"), child)

    def __getitem__(self, name):
        return self._modules[str(name)]


def conv_unit(i, o, kernel, groups):
    return Named(
        block=Named(_0=nn.Conv1d(i, o, kernel, padding=kernel // 2), _1=nn.GroupNorm(groups, o))
    )


class PublishedUNet(nn.Module):
    """`layout` is "diffusion_policy" or "lerobot"; input [B, T, D], step [B], cond [B, C]."""

    def __init__(
        self, dim, cond_dim, down_dims, *, kernel=5, groups=8, embed=256, scale=True, layout
    ):
        super().__init__()
        self.down_dims, self.embed, self.scale, self.layout = down_dims, embed, scale, layout
        foreign = layout == "diffusion_policy"

        def residual(i, o):
            units = conv_unit(i, o, kernel, groups), conv_unit(o, o, kernel, groups)
            film = Named(_1=nn.Linear(embed + cond_dim, 2 * o if scale else o))
            named = (
                {"blocks": Named(_0=units[0], _1=units[1])}
                if foreign
                else {"conv1": units[0], "conv2": units[1]}
            )
            if i != o:
                named["residual_conv"] = nn.Conv1d(i, o, 1)
            return Named(**named, cond_encoder=film)

        def resample(kind, channels):
            layer = (
                nn.Conv1d(channels, channels, 3, 2, 1)
                if kind == "down"
                else nn.ConvTranspose1d(channels, channels, 4, 2, 1)
            )
            return Named(conv=layer) if foreign else layer

        self.diffusion_step_encoder = Named(
            _1=nn.Linear(embed, 4 * embed), _3=nn.Linear(4 * embed, embed)
        )
        widths = [dim, *down_dims]
        self.down_modules = nn.ModuleList()
        for k, (i, o) in enumerate(pairwise(widths)):
            stage = {"_0": residual(i, o), "_1": residual(o, o)}
            if k < len(down_dims) - 1:
                stage["_2"] = resample("down", o)
            self.down_modules.append(Named(**stage))
        last = down_dims[-1]
        self.mid_modules = nn.ModuleList([residual(last, last), residual(last, last)])
        self.up_modules = nn.ModuleList(
            Named(_0=residual(2 * o, i), _1=residual(i, i), _2=resample("up", i))
            for i, o in reversed(list(pairwise(down_dims)))
        )
        self.final_conv = Named(
            _0=conv_unit(down_dims[0], down_dims[0], kernel, 8), _1=nn.Conv1d(down_dims[0], dim, 1)
        )

    def step_features(self, step):
        half = self.embed // 2
        decay = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angles = step[:, None] * decay[None, :]
        h = torch.cat([angles.sin(), angles.cos()], dim=-1)
        encoder = self.diffusion_step_encoder
        return encoder["3"](F.mish(encoder["1"](h)))

    def unit(self, unit, x):
        block = unit["block"]
        return F.mish(block["1"](block["0"](x)))

    def residual(self, module, x, features):
        children = module._modules
        if self.layout == "diffusion_policy":
            first, second = module["blocks"]["0"], module["blocks"]["1"]
        else:
            first, second = module["conv1"], module["conv2"]
        h = self.unit(first, x)
        film = module["cond_encoder"]["1"](F.mish(features))[:, :, None]
        channels = h.shape[1]
        h = film[:, :channels] * h + film[:, channels:] if self.scale else h + film
        h = self.unit(second, h)
        return h + (children["residual_conv"](x) if "residual_conv" in children else x)

    def resample(self, module, x):
        return (module["conv"] if self.layout == "diffusion_policy" else module)(x)

    def forward(self, x, step, cond=None):
        features = self.step_features(step)
        if cond is not None:
            features = torch.cat([features, cond], dim=-1)
        x = x.permute(0, 2, 1)
        skips = []
        for stage in self.down_modules:
            for k in ("0", "1"):
                x = self.residual(stage[k], x, features)
            skips.append(x)
            if "2" in stage._modules:
                x = self.resample(stage["2"], x)
        for module in self.mid_modules:
            x = self.residual(module, x, features)
        for stage in self.up_modules:
            x = torch.cat([x, skips.pop()], dim=1)
            for k in ("0", "1"):
                x = self.residual(stage[k], x, features)
            x = self.resample(stage["2"], x)
        x = self.final_conv["1"](self.unit(self.final_conv["0"], x))
        return x.permute(0, 2, 1)


def randomise(module, seed=0):
    """Random weights of the usual sizes, and normalisations that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / max(fan, 1) ** 0.5)
    return module
