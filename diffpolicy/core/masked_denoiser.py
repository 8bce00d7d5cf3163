"""Denoisers of masked sequences: probabilities of the clean token at every position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser, Denoised, DenoiserNetwork, GridDenoise
from diffpolicy.core.masking import MaskingProcess, one_hot
from diffpolicy.settings import check_range


class MaskedDenoiser(BaseDenoiser):
    """A network under the parameterisation of MDLM (Sahoo et al. 2024, "SUBS").

    Masks have probability 0 in the clean estimate, and what is revealed is carried over:
    ``x0_hat = x_tokens + x_mask p`` with ``p`` the softmax of the network's output. On relaxed
    states this is the expectation over independent draws from each position's simplex.

    Args:
        network: any network of ``horizon = L`` and ``dim = vocab_size + 1``; its last output
            channel, the mask's, is not used.
        process: the masking process it is trained under.
        vocab_size: V.
        time_free: the network always sees level 0. The optimal denoiser of a masking process does
            not depend on t (Ou et al. 2025), and without it a sampler may let every row advance
            on its own (:func:`diffpolicy.core.reveal.reveal_schedule`).

    Raises:
        ValueError: a network of another size, or a vocabulary of fewer than two tokens.
    """

    process: MaskingProcess  # type: ignore[assignment]

    def __init__(
        self,
        network: nn.Module,
        process: MaskingProcess,
        vocab_size: int,
        *,
        time_free: bool = False,
    ) -> None:
        super().__init__()
        check_range("[2, inf)", vocab_size=vocab_size)
        dim = getattr(network, "dim", vocab_size + 1)
        if dim != vocab_size + 1:
            needed = f"dim={vocab_size + 1}, got {dim=}"
            raise ValueError(f"{vocab_size} tokens and the mask need {needed}")
        if not isinstance(process, MaskingProcess):
            raise ValueError(f"tokens need a masking process, got {type(process).__name__}")
        self.network = network
        self.process = process
        self.vocab_size = vocab_size
        self.time_free = time_free

    @property
    def weight(self) -> Tensor:
        """A parameter, whose type and device states take (a number on the host without one)."""
        return next(self.network.parameters(), torch.zeros(()))

    @property
    def length(self) -> int:
        """L, tokens of a sequence."""
        return int(self.network.horizon)  # type: ignore[arg-type]

    @property
    def mask_id(self) -> int:
        """The token that stands for a mask: ``vocab_size``."""
        return self.vocab_size

    def log_probs(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """``log p(x0_i | x_t)`` at every position, revealed or not, ``[B, L, V]``.

        Args:
            x_t: states ``[B, L, V + 1]``, or hard ones as integer tokens ``[B, L]``.
            t: levels, broadcastable to the state; not looked at if ``time_free``.
            cond: ``[B, C]``.
        """
        if not x_t.is_floating_point() and not getattr(self.network, "takes_tokens", False):
            x_t = one_hot(x_t, self.vocab_size)
        time = torch.zeros((1, 1, 1), device=x_t.device) if self.time_free else t
        return self._run(x_t, self.process.network_time(time), cond)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return masked_answer(x_t, self.log_probs(x_t, t, cond))

    def on_grid(self, t: Tensor, s: Tensor | None = None) -> GridDenoise:
        network: DenoiserNetwork = self.network  # type: ignore[assignment]
        like = self.weight
        rows = t[:1, :1, :1, :1] * 0 if self.time_free else t
        time = self.process.network_time(rows).to(like.device, like.dtype, non_blocking=True)
        embedded: Sequence[Tensor | None] = [None] * len(rows)
        if hasattr(network, "embed_time"):
            embedded = network.embed_time(time.flatten(0, 1)).chunk(len(rows))

        def denoise(row: int, x: Tensor, cond: Tensor | None) -> Denoised:
            at = 0 if self.time_free else row
            known = {} if embedded[at] is None else {"time_emb": embedded[at]}
            return masked_answer(x, self._run(x, time[at], cond, **known))

        return denoise

    def check_t(self, t: Tensor) -> None:
        if t.dim() != 3 or t.shape[1:] != (1, 1):
            got = tuple(t.shape)
            raise ValueError(f"masked sequences take one level per row, t [B, 1, 1]; got {got}")

    def _run(self, x: Tensor, time: Tensor, cond: Tensor | None, **known: Tensor | None) -> Tensor:
        dtype = self.weight.dtype  # tokens come without a type, conditions in the caller's
        x = x.to(dtype) if x.is_floating_point() else x
        cond = None if cond is None else cond.to(dtype)
        output: Tensor = self.network(x, time.to(dtype), cond, **known)
        return self.process.constrained(x, output[..., : self.vocab_size]).log_softmax(-1)


def masked_answer(x_t: Tensor, log_p: Tensor) -> Denoised:
    """The denoiser's answer at ``x_t [B, L, V + 1]`` for clean log-probabilities ``[B, L, V]``."""
    tokens, mask = x_t[..., :-1], x_t[..., -1:]
    clean = torch.addcmul(tokens, mask, log_p.exp())
    return Denoised(torch.nn.functional.pad(clean, (0, 1)), {"log_p": log_p})
