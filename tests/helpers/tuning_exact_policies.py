"""Policies whose denoiser is that of a known law, with few numbers to learn."""

from __future__ import annotations

import torch
from torch import nn
from tuning_tables import sequences, table_denoiser

from diffpolicy.core import Denoiser, make_process
from diffpolicy.sequences.exact import StateSpace


class Posterior(nn.Module):
    """``E[x0 | x_t]`` of ``N(mean, std^2)`` under flow matching, shifted by the condition."""

    t_kinds = frozenset({"row"})

    def __init__(self, mean=0.0, std=0.5, *, horizon=1, dim=1):
        super().__init__()
        self.horizon, self.dim = horizon, dim
        self.mean = nn.Parameter(torch.full((horizon, dim), mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def embed_time(self, t):
        return t

    def forward(self, x, t, cond=None, *, time_emb=None):
        t = t.view(-1, 1, 1) / 1000
        mean = self.mean if cond is None else self.mean + cond[:, :1, None]
        alpha, variance = 1 - t, (2 * self.log_std).exp()
        gain = variance * alpha / (variance * alpha.square() + t.square())
        return mean + gain * (x - alpha * mean)


class Shifts(nn.Module):
    """``x0_hat = shift`` of the level, one of ``num_steps``, whatever the state."""

    t_kinds = frozenset({"row"})

    def __init__(self, num_steps, *, horizon=1, dim=1):
        super().__init__()
        self.horizon, self.dim = horizon, dim
        self.shift = nn.Parameter(torch.zeros(num_steps, horizon, dim, dtype=torch.float64))
        self.seen = []

    def embed_time(self, t):
        return t

    def forward(self, x, t, cond=None, *, time_emb=None):
        count = len(self.shift)
        self.seen += t.flatten().tolist()
        row = ((1 - t.flatten() / 1000) * count).round().long().clamp(0, count - 1)
        return self.shift[row].expand(x.shape)


def gaussian_policy(mean=0.0, std=0.5, **settings):
    return Denoiser(Posterior(mean, std, **settings), make_process("flow"), "x0")


def shift_policy(num_steps, **settings):
    return Denoiser(Shifts(num_steps, **settings), make_process("flow"), "x0")


def table_of(law):
    """The masked denoiser whose conditionals are those of a law ``[8]`` of 3 tokens of 2."""
    denoiser, every = table_denoiser(dtype=torch.float64), sequences(2, 3)
    logits = torch.zeros_like(denoiser.network.logits)
    for index, state in enumerate(StateSpace(2, 3).states):
        agrees = ((state == 2) | (state == every)).all(1)
        for position in range(3):
            for token in range(2):
                chance = law[agrees & (every[:, position] == token)].sum()
                logits[index, position, token] = chance.clamp_min(1e-30).log()
    denoiser.network.logits.data = logits
    return denoiser
