"""Encoders, a backbone, a network and a method as a user has them in a package of his own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from diffpolicy.learn.cloning.denoising import Cloning
from diffpolicy.networks.encoders import Encoder, StateEncoder
from diffpolicy.networks.mlp import MLP


class Blind(StateEncoder):
    """The vectors alone, whatever there is to see."""

    def __init__(self, fields, n_obs_steps):
        super().__init__({k: f for k, f in fields.items() if not f.is_image}, n_obs_steps)


class Bright(Encoder):
    """How bright every image is, through a layer; any further settings are its own."""

    def __init__(self, fields, n_obs_steps, width=4, **more):
        super().__init__()
        self.layer, self.cond_dim, self.more = nn.Linear(n_obs_steps, width), width, more

    def forward(self, obs):
        images = torch.stack([one.float() for one in obs.values() if one.dtype == torch.uint8])
        return self.layer(images.mean((0, 3, 4, 5)) / 255)


class Sees(nn.Module):
    """A backbone that keeps what it was given."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels, self.weight = channels, nn.Parameter(torch.ones(1))
        self.given = []

    def forward(self, given):
        self.given.append(given.detach())
        return given * self.weight


class Plain(MLP):
    """A network of one's own."""

    def __init__(self, horizon, dim, cond_dim):
        super().__init__(horizon, dim, cond_dim, width=8, depth=1)


@dataclass(frozen=True)
class Mine(Cloning):
    """A method of one's own, with a setting of its own."""

    margin: float = 0.5


class Nothing:
    """No subclass of anything."""
