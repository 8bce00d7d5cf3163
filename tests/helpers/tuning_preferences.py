"""Problems of preference optimisation whose optimum is known, and batches for its losses."""

from __future__ import annotations

import math

import torch
from torch import nn
from tuning_tables import Table

from diffpolicy.core import Denoiser, LogLinear, MaskedDenoiser, VPCosine
from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.learn.preferences.items import Items
from diffpolicy.sequences.exact import StateSpace


class Pointwise(nn.Module):
    """A network that treats positions one by one: what stands elsewhere cannot matter."""

    def __init__(self, dim=2, horizon=4, cond_dim=3, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.horizon, self.dim, self.cond_dim = horizon, dim, cond_dim
        self.t_kinds = frozenset({"row"})
        self.inward = nn.Parameter(0.5 * torch.randn(dim + 1 + cond_dim, 16, generator=g))
        self.outward = nn.Parameter(0.5 * torch.randn(16, dim, generator=g))

    def forward(self, x, t, cond=None, *, time_emb=None):
        extra = [(t / 1000).expand(len(x), self.horizon, 1)]
        if self.cond_dim:
            extra.append(cond[:, None].expand(-1, self.horizon, -1))
        h = torch.cat([x, *extra], -1) @ self.inward.to(x.dtype)
        return h.tanh() @ self.outward.to(x.dtype)


def pointwise(seed=0, prediction="eps", process=None, **sizes):
    return Denoiser(Pointwise(seed=seed, **sizes), process or VPCosine(), prediction)


def plan_items(count=5, windows=1, horizon=4, dim=2, cond_dim=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = count * windows
    x0 = torch.randn(rows, horizon, dim, generator=g)
    steps = torch.rand(rows, horizon, generator=g) < 0.7
    cond = torch.randn(rows, cond_dim, generator=g) if cond_dim else None
    return Items(x0, cond, steps, torch.arange(count).repeat_interleave(windows), count)


def plan_batch(count=6, windows=2, seed=0, *, single=False):
    """Pairs of segments of plans, or single ones that are good or bad."""
    g = torch.Generator().manual_seed(seed)
    batch = {}
    for prefix in ("",) if single else ("chosen_", "rejected_"):
        batch[f"{prefix}obs"] = torch.randn(count, windows, 1, 3, generator=g)
        batch[f"{prefix}action"] = torch.randn(count, windows, 4, 2, generator=g)
        batch[f"{prefix}steps"] = torch.rand(count, windows, 4, generator=g) < 0.7
    if single:
        batch["good"] = torch.arange(count) % 3 == 0
    return batch


def consistent_denoiser(law, vocab_size, length):
    """The table whose answers are the exact conditionals of a law ``[V^L]`` of sequences.

    Any order of reveals then draws from that law, and the bound of the likelihood is tight.
    """
    space = StateSpace(vocab_size, length)
    tokens = space.states[space.sequences]
    fits = (space.states[:, None] == vocab_size) | (space.states[:, None] == tokens)
    weight = fits.all(-1) * law  # [S, V^L]
    hot = nn.functional.one_hot(tokens, vocab_size).double()
    mass = torch.einsum("sn,nlv->slv", weight.double(), hot)
    network = Table(vocab_size, length)
    with torch.no_grad():
        network.logits[..., :vocab_size] = mass.clamp_min(1e-12).log().float()
    return MaskedDenoiser(network, LogLinear(), vocab_size, time_free=True), space


def labelled_pairs(first, second, reward_first, reward_second, generator):
    """The two of each pair, the one that a Bradley-Terry judge prefers first."""
    chance = (reward_first - reward_second).sigmoid()
    better = torch.rand(chance.shape, generator=generator) < chance
    shape = (-1, *[1] * (first.dim() - 1))
    mask = better.view(shape)
    return torch.where(mask, first, second), torch.where(mask, second, first)


class GaussianDenoiser(BaseDenoiser):
    """The exact denoiser of plans ``[B, 1, 1]`` from ``N(mean, std^2)``, both learnable."""

    def __init__(self, process, mean, std):
        super().__init__()
        self.process = process
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    @property
    def law(self):
        return float(self.mean.detach()), float(self.log_std.detach().exp())

    def forward(self, x_t, t, cond=None):
        alpha, sigma, variance = (
            self.process.alpha(t),
            self.process.sigma(t),
            (2 * self.log_std).exp(),
        )
        gain = alpha * variance / (alpha.square() * variance + sigma.square())
        return Denoised(self.mean + gain * (x_t - alpha * self.mean))


def gaussian_kl(one, other):
    """``KL(one || other)`` of ``(mean, std)`` each."""
    (a, s), (b, r) = one, other
    return math.log(r / s) + (s * s + (a - b) ** 2) / (2 * r * r) - 0.5
