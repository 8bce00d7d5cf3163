"""A replay buffer of sequences inside an objective, and re-masking of what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.learn.cloning.masked import random_masks


class Replay(nn.Module):
    """Rows of a fixed number of slots, the oldest replaced first; all of it is saved state.

    Args:
        slots: N.
        refresh: rows replaced at a time; divides N.
        every: optimiser steps between replacements.
        columns: shape of a row and type, by name.

    Raises:
        ValueError: ``refresh`` that does not divide N, or a value below 1.
    """

    cursor: Tensor
    age: Tensor

    def __init__(
        self,
        slots: int,
        refresh: int,
        every: int,
        columns: Mapping[str, tuple[Sequence[int], torch.dtype]],
    ) -> None:
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
    if min(slots, refresh, every) < 1:
        raise ValueError(
            "buffer, refresh and refresh_every must be at least 1, got "
            f"{slots}, {refresh} and {every}"
        )
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


__all__ = ["Replay", "check_replay", "remask"]
