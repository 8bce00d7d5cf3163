"""Masking processes: how a sequence of tokens becomes all masks as `t` goes from 0 to 1.

A state is a float ``x [B, L, D]`` with ``D = vocab_size + 1``: a point of the simplex per position,
the mask in the last channel. Hard states are one-hot; relaxed ones (Gumbel-softmax) are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffpolicy.core.noise import NoiseProcess
from diffpolicy.settings import check_choice, check_range, settings_of


class MaskingProcess(NoiseProcess):
    """Absorbing-state diffusion: every token is masked on its own, with probability ``m_t``.

    See Austin et al. 2021, and Sahoo et al. 2024 (MDLM). All methods take and return tensors of any
    shape, elementwise.
    """

    type: ClassVar[str]

    def mask_probability(self, t: Tensor) -> Tensor:
        """``m_t``, rising from 0 at ``t = 0``."""
        raise TypeError(f"{type(self).__name__} must define mask_probability")

    def weight(self, t: Tensor) -> Tensor:
        """``m'_t / m_t``: of the masked cross-entropy in the continuous-time bound."""
        raise TypeError(f"{type(self).__name__} must define weight")

    @property
    def random_prior(self) -> bool:
        """Whether :meth:`prior` looks at the values of its noise, and not at its shape alone."""
        return False

    def free(self, masked: Tensor, tokens: Tensor) -> Tensor:
        """``masked`` bool ``[B, L]`` without those positions of tokens that are never masked."""
        return masked

    def filled(self, known: Tensor, like: Tensor) -> Tensor:
        """Make states of masks as ``like [B, L, D]``, with what is known ``[B, L]`` in place."""
        return self.prior(like)

    def constrained(self, x: Tensor, logits: Tensor) -> Tensor:
        """The logits ``[B, L, V]`` of clean tokens at ``x``, without what cannot be."""
        return logits

    def log_length(self, tokens: Tensor) -> Tensor:
        """Log-probability of the lengths of tokens ``[N, L]``, ``[N]``: 0 where there is one."""
        return torch.zeros(len(tokens), device=tokens.device)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.mask_probability(t)

    def reveal(self, t: Tensor, s: Tensor) -> Tensor:
        """``(m_t - m_s) / m_t``: probability that a masked position is revealed from t to s."""
        masked = self.mask_probability(t)
        return (masked - self.mask_probability(s)) / masked

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x0`` ``[B, L, D]`` with each position masked with probability ``m_t``; always hard.

        ``noise`` is Gumbel, so that a soft ``x0`` is sampled from in the same draw.
        """
        masked = self.mask_probability(t).to(x0.dtype)
        law = (1 - masked) * x0
        law = torch.cat([law[..., :-1], law[..., -1:] + masked.expand_as(law[..., -1:])], dim=-1)
        return hard_one_hot(law.log() + noise)

    def draw_noise(
        self, shape: Sequence[int], generator: torch.Generator | None, like: Tensor
    ) -> Tensor:
        """Standard Gumbel: the argmax of log-probabilities plus it is a draw from them.

        Computed in float64, because float32 truncates its tails, which acts as a lower temperature.
        """
        race = torch.empty(tuple(shape), dtype=torch.float64, device=like.device)
        return -race.exponential_(generator=generator).log().to(like.dtype)

    def prior(self, noise: Tensor) -> Tensor:
        """All masks; ``noise`` gives the shape."""
        return torch.nn.functional.pad(torch.zeros_like(noise[..., :-1]), (0, 1), value=1.0)

    def restart(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        at_prior = (t >= 1).to(x0.device, non_blocking=True)
        noised = self.add_noise(x0, t.to(x0.device, x0.dtype, non_blocking=True), noise)
        return torch.where(at_prior, self.prior(noise), noised)


@dataclass(frozen=True)
class LogLinear(MaskingProcess):
    """``m_t = (1 - eps) t``: the log-linear noise of MDLM, masking linear in t.

    Published models use ``eps = 0.001``; 0 makes ``t = 1`` all masks exactly.
    """

    eps: float = 0.0
    type: ClassVar[str] = "masked_loglinear"

    def __post_init__(self) -> None:
        check_range("[0, 1)", eps=self.eps)

    def mask_probability(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t


@dataclass(frozen=True)
class Cosine(MaskingProcess):
    """``m_t = cos(pi (1 - t) / 2)``: few reveals while most is masked (Chang et al. 2022)."""

    type: ClassVar[str] = "masked_cosine"

    def mask_probability(self, t: Tensor) -> Tensor:
        return (0.5 * math.pi * t).sin()  # the same, and exactly 0 at t = 0

    def weight(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi / (0.5 * math.pi * t).tan()


MASKING: Mapping[str, type[MaskingProcess]] = {p.type: p for p in (LogLinear, Cosine)}


def make_masking(config: Mapping[str, Any] | str) -> MaskingProcess:
    """Build a masking process from ``{"type": name, **parameters}`` or from its name alone.

    Raises:
        ValueError: unknown name or parameter, with the valid ones.
    """
    values: dict[str, Any] = {"type": config} if isinstance(config, str) else dict(config)
    name = values.pop("type", None)
    check_choice("masking process", name, sorted(MASKING))
    return settings_of(MASKING[name], values, f"masking process {name!r}")


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """The hard state ``[..., vocab_size + 1]``, float32, of integer tokens (``vocab_size``: mask).

    Reads nothing from the device.
    """
    classes = torch.arange(vocab_size + 1, device=tokens.device)
    return (tokens.unsqueeze(-1) == classes).to(torch.float32)


def to_tokens(x: Tensor) -> Tensor:
    """The most probable token of every position ``[B, L]``; ``vocab_size`` where masked."""
    return x.argmax(-1)


def hard_one_hot(scores: Tensor) -> Tensor:
    """One-hot of the largest entry of the last dimension, in the dtype of ``scores``."""
    best = scores.argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, best, 1.0)
