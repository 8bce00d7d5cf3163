"""A replay buffer of sequences inside an objective: its rows, their weights, their re-masking.

Weights are self-normalised importance weights, with limits and their effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.learn.cloning.masked import random_masks
from diffpolicy.settings import check_range

Columns = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Shape of a row and type, by name."""


class Replay(nn.Module):
    """Rows of a fixed number of slots, the oldest replaced first; all of it is saved state.

    Args:
        slots: N.
        refresh: rows replaced at a time; divides N.
        every: optimiser steps between replacements.
        columns: what a row holds.

    Raises:
        ValueError: ``refresh`` that does not divide N, or a value below 1.
    """

    cursor: Tensor
    age: Tensor

    def __init__(self, slots: int, refresh: int, every: int, columns: Columns) -> None:
        super().__init__()
        check_replay(slots, refresh, every)
        self.slots, self.refresh, self.every = slots, refresh, every
        self.names = tuple(columns)
        for name, (shape, dtype) in columns.items():
            self.register_buffer(name, torch.zeros(slots, *shape, dtype=dtype))
        self.register_buffer("cursor", torch.tensor(0))
        self.register_buffer("age", torch.tensor(-1))  # steps since the last rows; -1: empty

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def due(self, *, training: bool = True) -> int:
        """How many rows to write now: N when empty, ``refresh`` when old and training, else 0."""
        age = int(self.age)
        if age < 0:
            return self.slots
        return self.refresh if training and age >= self.every else 0

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Replace the oldest rows by these, N or ``refresh`` of them."""
        first = int(self.cursor)
        for name in self.names:
            value = rows[name].detach()
            self[name][first : first + len(value)] = value
        self.cursor.fill_((first + len(value)) % self.slots)
        self.age.zero_()

    def tick(self) -> None:
        """An optimiser step was made."""
        self.age += 1


def check_replay(slots: int, refresh: int, every: int, group_size: int = 1) -> None:
    """Raise ``ValueError`` unless a buffer can be of these sizes."""
    check_range("[1, inf)", buffer=slots, refresh=refresh, refresh_every=every)
    if slots % refresh:
        raise ValueError(f"refresh={refresh} must divide buffer={slots}")
    if refresh % group_size:
        raise ValueError(f"group_size={group_size} must divide refresh={refresh}")


def remask(
    denoiser: MaskedDenoiser, rows: int, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random re-maskings of ``rows`` clean sequences, ``draws`` of each.

    The number k of masks is uniform in 1..L, stratified over the draws of a row. Denoisers that
    depend on the level are told the one with ``m_t = k / L``.

    Returns:
        ``masked`` bool ``[rows * draws, L]``, levels ``[rows * draws, 1, 1]``, and weights
        ``L / k [rows * draws]`` with which the masked log-probability is the likelihood bound
        without bias (the ``1 / t`` of MDLM with its time integral solved).
    """
    u = torch.rand(rows, draws, generator=generator, device=generator.device)
    u = (torch.arange(draws, device=u.device) + u).flatten() / draws
    place = next(denoiser.parameters()).device
    masked, t, weight = random_masks(denoiser, u, generator)
    return masked.to(place), t.to(place), weight.to(place)


def settle(
    log_weight: Tensor,
    *,
    group_size: int | None = None,
    max_weight: float | None = None,
    min_ess: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of mean 1 over each group's entries of a step, and the power they were raised to.

    Args:
        log_weight: ``[N, K]``, unnormalised; ``-inf`` for no entry.
        group_size: rows compared with each other; None: all.
        max_weight: most that a weight can be.
        min_ess: least :func:`effective_fraction`; weights are raised to the largest power up to 1
            that has it.

    Returns:
        ``[N, K]``, 0 where there is no entry, and a 0-dim tensor in (0, 1].
    """
    rows = len(log_weight) if group_size is None else group_size
    groups = log_weight.view(-1, rows, log_weight.shape[1])
    power = log_weight.new_ones(())
    if min_ess is not None and _ess(groups) < min_ess:
        low, high = torch.zeros_like(power), power
        for _ in range(20):  # the effective sample size falls as the power rises
            middle = (low + high) / 2
            enough = _ess(groups * middle) >= min_ess
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        power = low.clamp_min(1e-6)
        groups = groups * power
    weights = _relative(groups)
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
        entries = (groups > -math.inf).sum(1, keepdim=True)
        weights = weights * (entries / weights.sum(1, keepdim=True).clamp_min(1e-30))
    return weights.flatten(0, 1), power


def _relative(groups: Tensor) -> Tensor:
    """``[G, N, K]`` log-weights to weights of mean 1 over entries of the middle dimension."""
    entries = (groups > -math.inf).sum(1, keepdim=True)
    return groups.softmax(1).nan_to_num(0.0) * entries


def effective_fraction(weights: Tensor, log_weight: Tensor) -> Tensor:
    """Effective sample size ``(sum w)^2 / sum w^2`` as a fraction of the entries, ``[G, N, K]``.

    The mean over groups and steps; 1 where all weights are equal.
    """
    entries = (log_weight > -math.inf).sum(1)
    ess = weights.sum(1).square() / weights.square().sum(1).clamp_min(1e-30)
    some = entries > 0
    return (ess[some] / entries[some]).mean()


def _ess(groups: Tensor) -> Tensor:
    return effective_fraction(_relative(groups), groups)


def resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` indices drawn in proportion to ``weights [N]``, in random order.

    Systematic: an entry comes up ``count w`` times, rounded up or down. One of a batch is then
    like any other, as an objective whose losses are averaged needs it.
    """
    device = generator.device
    u = torch.arange(count, device=device) + torch.rand(1, generator=generator, device=device)
    edges = weights.double().cumsum(0)
    at = (u / count).to(edges) * edges[-1]
    drawn = torch.searchsorted(edges, at, right=True).clamp(max=len(weights) - 1)
    return drawn[torch.randperm(count, generator=generator, device=device).to(drawn.device)]
