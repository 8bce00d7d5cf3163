"""Denoisers that are tables, one free row of logits per partially masked sequence."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from diffpolicy.core import LogLinear, MaskedDenoiser, levels, prior_start
from diffpolicy.learn.reward.rollouts import MaskedRollout, at_reveal, state_log_probs, step_kl


class Table(nn.Module):
    """Logits of every state; with ``cond_dim``, shifted by the first condition times a table."""

    def __init__(self, vocab_size, length, *, seed=0, scale=1.0, cond_dim=0, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shape = ((vocab_size + 1) ** length, length, vocab_size + 1)
        self.horizon, self.dim, self.cond_dim = length, vocab_size + 1, cond_dim
        self.logits = nn.Parameter(scale * torch.randn(shape, generator=g).to(dtype))
        self.register_buffer("place", (vocab_size + 1) ** torch.arange(length - 1, -1, -1))
        self.rows = 0

    def forward(self, x, t, cond=None):
        self.rows += len(x)
        out = self.logits[(x.argmax(-1) * self.place).sum(-1)]
        return out if cond is None else out * (1 + cond[:, :1, None])


def table_denoiser(vocab_size=2, length=3, *, time_free=True, **settings):
    network = Table(vocab_size, length, **settings)
    return MaskedDenoiser(network, LogLinear(), vocab_size, time_free=time_free)


def rollout_of(denoiser, reference, tokens, groups, nfe):
    """The rollout that drew ``tokens`` in the order ``groups``."""
    start = prior_start(denoiser.process, torch.zeros(1, tokens.shape[1], denoiser.vocab_size + 1))
    bare = MaskedRollout(
        tokens, groups, nfe, levels(start, nfe), denoiser.vocab_size, torch.empty(0)
    )
    log_p, other = (state_log_probs(d, bare) for d in (denoiser, reference))
    return bare._replace(
        log_p=at_reveal(log_p, bare),
        log_reference=at_reveal(other, bare).detach(),
        step_kl=step_kl(log_p, other.detach(), bare),
    )


def all_paths(vocab_size, length, num_steps=None):
    """All orders with all sequences: tokens, groups ``[P, L]`` and the orders' law ``[P]``.

    ``num_steps=None``: one position an evaluation. A number: each in any of so many, evenly.
    """
    orders = (
        list(itertools.permutations(range(length)))
        if num_steps is None
        else list(itertools.product(range(num_steps), repeat=length))
    )
    sequences = list(itertools.product(range(vocab_size), repeat=length))
    pairs = list(itertools.product(orders, sequences))
    groups, tokens = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
    return tokens, groups, torch.full((len(pairs),), 1 / len(orders), dtype=torch.float64)


def sequences(vocab_size, length):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


class Multilinear(Table):
    """A table that relaxed states interpolate: logits are the mean over draws of each position."""

    def forward(self, x, t, cond=None):
        x = x.to(self.logits.dtype)
        weights = x[:, 0]
        for i in range(1, x.shape[1]):
            weights = (weights.unsqueeze(-1) * x[:, i].unsqueeze(1)).flatten(1)
        return (weights @ self.logits.flatten(1)).view(len(x), *self.logits.shape[1:])


def multilinear_denoiser(vocab_size=2, length=3, *, process=None, time_free=True, **settings):
    network = Multilinear(vocab_size, length, **{"dtype": torch.float64, **settings})
    return MaskedDenoiser(network, process or LogLinear(), vocab_size, time_free=time_free)


class TableReward:
    """A reward for every sequence, interpolated in the same way."""

    def __init__(self, vocab_size, length, *, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.values = torch.randn(vocab_size**length, generator=g, dtype=torch.float64)

    def __call__(self, x):
        weights = x[:, 0]
        for i in range(1, x.shape[1]):
            weights = (weights.unsqueeze(-1) * x[:, i].unsqueeze(1)).flatten(1)
        return weights.double() @ self.values
