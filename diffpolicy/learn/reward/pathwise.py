"""Reward back-propagation: tuning a generator by the gradient of a reward of what it samples.

``loss = -reward(x0) + kl_weight KL(path || path of the reference)`` for sequences (DRAKES, Wang et
al. 2025) and for continuous plans (DRaFT, Clark et al. 2024; AlignProp, Prabhudesai et al. 2023):
the chain differs, the objective does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Reward, check_rewards, rows_and_cond
from diffpolicy.learn.reference import Referenced
from diffpolicy.settings import check_range


class Finished(NamedTuple):
    """What a chain hands to the reward.

    Attributes:
        items: samples with a graph ``[N, ...]``, N a multiple of the batch (copies of a row are
            next to each other).
        kl: ``[B]``.
        metrics: 0-dim tensors to log.
    """

    items: Tensor
    kl: Tensor
    metrics: Mapping[str, Tensor]


class RewardChain(Protocol):
    """A way to sample with a graph; see ``masked_chain`` and ``plan_chain``.

    A chain that cannot run with a reference has an attribute ``kl_problem``: why not, and what to
    do; ``None``: it can.
    """

    def run(
        self,
        denoiser: BaseDenoiser,
        reference: BaseDenoiser | None,
        size: int,
        cond: Tensor | None,
        generator: torch.Generator,
    ) -> Finished:
        """Sample ``size`` items."""

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise ``ValueError`` unless the chain can run with this denoiser."""


class RewardLoss(Referenced):
    """Reward back-propagation as an objective of the trainer.

    ``forward(batch, generator)`` samples one item per row of the batch, under its ``cond [B, C]``
    or its observations ``obs [B, To, O]``. All noise comes from ``generator``.

    Args:
        denoiser: what is tuned.
        reward: differentiable: of one-hot sequences ``[B, L, V] -> [B]``, or of plans ``[B, H, D]``
            and, if there is one, their condition.
        chain: how items are sampled and how the gradient flows.
        kl_weight: of the path divergence to the reference, in units of reward; 0 leaves the
            reference out.
        kl_warmup: steps over which ``kl_weight`` rises linearly from 0.
        reference: frozen here, and always in evaluation mode; ``None``: a copy of ``denoiser`` as
            it is now.

    Raises:
        ValueError: weights out of range, a chain that does not fit, or a reference that shares
            weights with the denoiser.
    """

    step: Tensor

    def __init__(
        self,
        denoiser: BaseDenoiser,
        reward: Reward,
        chain: RewardChain,
        *,
        kl_weight: float,
        kl_warmup: int = 0,
        reference: BaseDenoiser | None = None,
    ) -> None:
        super().__init__(denoiser, reference, apart=True)
        check_range("[0, inf)", kl_weight=kl_weight, kl_warmup=kl_warmup)
        chain.check(denoiser)
        problem = getattr(chain, "kl_problem", None) if kl_weight > 0 else None
        if problem is not None:
            raise ValueError(problem)
        self._reward = [reward]  # a list: a reward that is a module is not part of this one
        self.chain = chain
        self.kl_weight, self.kl_warmup = float(kl_weight), kl_warmup
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def after_step(self) -> None:
        """Count optimiser steps, for ``kl_warmup``."""
        self.step += 1

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        size, cond = rows_and_cond(self.denoiser, batch)
        reference = self.reference if self.kl_weight > 0 else None
        done = self.chain.run(self.denoiser, reference, size, cond, generator)
        copies = len(done.items) // size
        # Rewards of sequences are of the sequence alone.
        given = () if cond is None or isinstance(self.denoiser, MaskedDenoiser) else (cond,)
        reward = self._reward[0](done.items, *(c.repeat_interleave(copies, 0) for c in given))
        check_rewards(reward, done.items)
        if done.items.requires_grad and not reward.requires_grad:
            raise ValueError(
                "this reward has no gradient, so nothing would be learned: compute it in torch "
                "alone (no .detach(), .numpy() or comparison), or take a method that needs none: "
                "policy_gradient or weighted for sequences, prefer(...) for policies"
            )
        reward = reward.view(size, copies).mean(1)
        warm = (self.step / self.kl_warmup).clamp(max=1) if self.kl_warmup else 1.0
        weight = self.kl_weight * warm
        metrics = {"reward": reward.detach().mean(), "kl": done.kl.detach().mean(), **done.metrics}
        return LossOutput(weight * done.kl - reward, metrics)
