"""Masking some of whose positions are known beforehand: fixed letters, and the ends of sequences.

What is known is never masked, so a chain begins with it in place and reveals the rest around it:
exact conditioning of a masked model, whose answers are laws given whatever has been revealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from diffpolicy.core.masking import MaskingProcess, one_hot
from diffpolicy.settings import check_range

NEVER = -1e6  # a logit whose probability is exactly 0, and whose differences are no nan


@dataclass(frozen=True)
class Templated(MaskingProcess):
    """A masking process that leaves known positions alone.

    Args:
        inner: the process of all other positions.
        vocab_size: V, the pad among them.
        fixed: the token of every position ``[L]``; ``vocab_size`` where it is free.
        lengths: weights of the lengths 0 to L; empty: all sequences have L tokens. With them, token
            ``V - 1`` is a pad, which fills what is behind a sequence's end and stands nowhere else.
            A chain draws its length first, then tokens given it: no training of the denoiser moves
            the law of lengths.

    Raises:
        ValueError: tokens or weights that do not fit, or a fixed position that some length lacks.
    """

    inner: MaskingProcess
    vocab_size: int
    fixed: tuple[int, ...]
    lengths: tuple[float, ...] = ()
    type: ClassVar[str] = "templated"

    def __post_init__(self) -> None:
        letters, count = self.vocab_size - bool(self.lengths), len(self.fixed) + 1
        for i, token in enumerate(self.fixed):
            if token != self.vocab_size:
                check_range(f"[0, {letters})", **{f"fixed[{i}]": token})
        if not self.lengths:
            return
        if len(self.lengths) != count or min(self.lengths) < 0 or not any(self.lengths):
            raise ValueError(f"lengths must be {count} weights, not all 0")
        last = max((i for i, t in enumerate(self.fixed) if t != self.vocab_size), default=-1)
        shortest = next(n for n, weight in enumerate(self.lengths) if weight)
        if last >= shortest:
            raise ValueError(f"position {last} is fixed, and sequences of {shortest} lack it")

    @property
    def random_prior(self) -> bool:
        """Whether starts differ, in their lengths."""
        return bool(self.lengths)

    def alpha(self, t: Tensor) -> Tensor:
        return self.inner.alpha(t)

    def mask_probability(self, t: Tensor) -> Tensor:
        return self.inner.mask_probability(t)

    def weight(self, t: Tensor) -> Tensor:
        return self.inner.weight(t)

    def known(self, tokens: Tensor) -> Tensor:
        """Which positions of tokens ``[..., L]`` are never masked, bool."""
        fixed = _fixed(self.fixed, tokens.device) < self.vocab_size
        ends = tokens == self.vocab_size - 1 if self.lengths else torch.zeros_like(fixed)
        return fixed | ends

    def free(self, masked: Tensor, tokens: Tensor) -> Tensor:
        return masked & ~self.known(tokens)

    def filled(self, known: Tensor, like: Tensor) -> Tensor:
        """States of masks ``[B, L, V + 1]`` with what is known in place, bool ``[B, L]``."""
        fixed = _fixed(self.fixed, like.device)
        pad = fixed.new_full((), self.vocab_size - 1)
        held = torch.where(fixed < self.vocab_size, fixed, pad)
        return one_hot(torch.where(known, held, self.vocab_size), self.vocab_size).to(like)

    def prior(self, noise: Tensor) -> Tensor:
        """Masks and what is known; lengths are drawn by the Gumbel ``noise [B, L, V + 1]``."""
        known = _fixed(self.fixed, noise.device) < self.vocab_size
        known = known.expand(len(noise), -1)
        if self.lengths:
            law = torch.tensor(self.lengths, device=noise.device, dtype=noise.dtype).log()
            drawn = (law + noise.flatten(1)[:, : len(law)]).argmax(1, keepdim=True)
            known = known | (torch.arange(noise.shape[1], device=noise.device) >= drawn)
        return self.filled(known, noise)

    def restart(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        fixed = _fixed(self.fixed, x0.device)
        held = fixed < self.vocab_size
        x0 = torch.where(held.unsqueeze(-1), one_hot(fixed, self.vocab_size).to(x0), x0)
        known = self.known(x0.argmax(-1)).unsqueeze(-1)
        return torch.where(known, x0, self.inner.restart(x0, t, noise))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        known = self.known(x0.argmax(-1)).unsqueeze(-1)
        return torch.where(known, x0, self.inner.add_noise(x0, t, noise))

    def constrained(self, x: Tensor, logits: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` by which fixed tokens are certain, and pads are where they stand.

        Args:
            x: states ``[B, L, V + 1]``, or tokens ``[B, L]``.
            logits: of the clean token at every position.
        """
        fixed = _fixed(self.fixed, x.device)
        token = torch.arange(self.vocab_size, device=x.device)
        certain = (fixed < self.vocab_size).unsqueeze(-1)
        allowed = ~certain | (token == fixed.unsqueeze(-1))
        if self.lengths:
            pad = token == self.vocab_size - 1
            ends = x[..., -2] > 0.5 if x.is_floating_point() else x == self.vocab_size - 1
            allowed = allowed & (pad == ends.unsqueeze(-1))
            certain = certain | ends.unsqueeze(-1)
        # What is certain has the same logits whatever the network says: no gradient, and no drift.
        logits = torch.where(certain, torch.zeros_like(logits), logits)
        return torch.where(allowed, logits, torch.full_like(logits, NEVER))

    def log_length(self, tokens: Tensor) -> Tensor:
        """Log-probability of the lengths of tokens ``[N, L]``, ``[N]``."""
        if not self.lengths:
            return torch.zeros(len(tokens), device=tokens.device)
        law = torch.tensor(self.lengths, dtype=torch.float64, device=tokens.device)
        ends = (tokens != self.vocab_size - 1).sum(1)
        return (law / law.sum()).log()[ends].float()

    def starts(self) -> tuple[Tensor, Tensor]:
        """Every state that chains begin with, tokens ``[S, L]``, and its probability ``[S]``."""
        fixed, size = torch.tensor(self.fixed), len(self.fixed)
        if not self.lengths:
            return fixed[None], torch.ones(1, dtype=torch.float64)
        law = torch.tensor(self.lengths, dtype=torch.float64)
        rows = law.nonzero().squeeze(1)
        beyond = torch.arange(size) >= rows[:, None]
        return torch.where(beyond, self.vocab_size - 1, fixed), law[rows] / law.sum()


@lru_cache(maxsize=64)
def _fixed(fixed: Sequence[int], device: torch.device) -> Tensor:
    """The tokens of a template on a device, copied there once."""
    return torch.tensor(fixed, device=device)
