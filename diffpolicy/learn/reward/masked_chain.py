"""Chains that :class:`~diffpolicy.learn.reward.pathwise.RewardLoss` draws masked sequences by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import hard_one_hot
from diffpolicy.core.reveal import Ancestral, Relaxation, Scheduled
from diffpolicy.core.starts import levels, prior_start
from diffpolicy.learn.reference import check_no_dropout
from diffpolicy.learn.reward.chains import chain_with_kl, masked_step_kl, released_step_kl
from diffpolicy.learn.reward.pathwise import Finished, RewardLoss
from diffpolicy.learn.reward.rollouts import draw_order
from diffpolicy.learn.reward.sequence_tuning import SequenceMethod
from diffpolicy.settings import check_choice, check_range


@dataclass(frozen=True)
class MaskedChain:
    """Masked sequences with relaxed last steps (DRAKES).

    Args:
        num_steps: K; ``None``: one position at a time (time-free denoisers), the exact law of
            infinitely many steps.
        relaxation: temperature, relaxed steps, straight-through.
        joint: draw whether a position is revealed together with its token, relaxed alike, as DRAKES
            does; otherwise reveal times are drawn beforehand, stay hard, and cost no evaluations.
            What moves is the mask's share, ``x_tokens + x_mask drawn``. The released code keeps
            ``(1 - x_mask) x`` instead, which leaves mask in the final state, treats positions as
            revealed or not by their largest entry, and stops at ``t = 1e-5``.
        straight_through_end: the reward sees the hard sequence (DRAKES); otherwise the relaxed one.
        kl: ``"path"``, or ``"drakes_released"``, the formula of the released code.
        kl_steps: how many steps, drawn anew each time, the divergence is estimated from; ``None``:
            all.
        kl_prefix: include the hard steps before the relaxed ones.
        checkpoint: recompute relaxed steps in the backward pass: least memory.
        reference_graph: see :func:`diffpolicy.learn.reward.chains.chain_with_kl`.

    Raises:
        ValueError: values out of range.
    """

    num_steps: int | None = None
    relaxation: Relaxation = field(default_factory=Relaxation)
    joint: bool = False
    straight_through_end: bool = True
    kl: str = "path"
    kl_steps: int | None = None
    kl_prefix: bool = True
    checkpoint: bool = False
    reference_graph: bool = True

    def __post_init__(self) -> None:
        check_range("[1, inf)", num_steps=self.num_steps, kl_steps=self.kl_steps)
        check_choice("kl", self.kl, ("path", "drakes_released"))
        if self.joint and self.num_steps is None:
            raise ValueError("joint=True draws reveals step by step and needs num_steps")
        if self.kl == "drakes_released" and not self.joint:
            raise ValueError("kl='drakes_released' belongs to joint=True, whose masks are relaxed")

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise ``ValueError`` unless the chain can run with this denoiser."""
        if not isinstance(denoiser, MaskedDenoiser):
            raise ValueError(
                f"this chain is of masked sequences; for {type(denoiser).__name__} use PlanChain"
            )
        if self.num_steps is None and not denoiser.time_free:
            raise ValueError(
                "revealing one position at a time needs a time_free denoiser; set num_steps"
            )

    def run(
        self,
        denoiser: BaseDenoiser,
        reference: BaseDenoiser | None,
        size: int,
        cond: Tensor | None,
        generator: torch.Generator,
    ) -> Finished:
        """Sample ``size`` sequences ``[size, L, V]``, one-hot or relaxed."""
        assert isinstance(denoiser, MaskedDenoiser)
        process, length = denoiser.process, int(denoiser.network.horizon)  # type: ignore[arg-type]
        shape = (size, length, denoiser.vocab_size + 1)
        like = torch.zeros(shape, device=generator.device, dtype=denoiser.weight.dtype)
        start = prior_start(process, like)
        solver: Ancestral | Scheduled
        if self.joint:
            assert self.num_steps is not None
            solver, grid = Ancestral(self.relaxation), levels(start, self.num_steps)
        else:
            groups, grid = draw_order(denoiser, size, self.num_steps, generator)
            solver = Scheduled(groups, self.relaxation)
        count = len(grid) - 1
        noise = process.draw_noise((count, *like.shape), generator, like)
        result = chain_with_kl(
            denoiser,
            reference,
            solver,
            start,
            grid,
            step_kl=masked_step_kl if self.kl == "path" else released_step_kl(process),
            noise=noise,
            cond=cond,
            grad_steps=self.relaxation.relaxed_steps,
            kl_steps=None if reference is None else self._chosen(count, generator),
            checkpoint=self.checkpoint,
            reference_graph=self.reference_graph,
        )
        # The chain's estimate is scaled up to all steps; without a prefix only these are meant.
        share = 1 - self._first(count) / count
        return Finished(self._items(result.x0), share * result.kl, {})

    def _first(self, count: int) -> int:
        """The first step whose divergence counts."""
        soft = self.relaxation.relaxed_steps
        return 0 if self.kl_prefix or soft is None else max(0, count - soft)

    def _chosen(self, count: int, generator: torch.Generator) -> list[int] | None:
        first = self._first(count)
        steps = range(first, count)
        if self.kl_steps is None or self.kl_steps >= len(steps):
            return None if first == 0 else list(steps)
        order = torch.randperm(len(steps), generator=generator, device=generator.device)
        return [steps[i] for i in order[: self.kl_steps].tolist()]

    def _items(self, x0: Tensor) -> Tensor:
        tokens = x0[..., :-1]
        if not self.straight_through_end:
            return tokens
        hard = hard_one_hot(tokens.detach())
        return hard + (tokens - tokens.detach())


@dataclass(frozen=True)
class Pathwise(MaskedChain, SequenceMethod):
    """Reward back-propagation through the chain with a path KL (DRAKES).

    The settings of the chain are those of :class:`MaskedChain`.

    Args:
        kl_weight: of the path divergence from the pre-trained model, in units of reward.
        kl_warmup: optimiser steps over which it rises linearly from 0.
    """

    kl_weight: float = 0.1
    kl_warmup: int = 0

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """See :class:`~diffpolicy.learn.reward.pathwise.RewardLoss`."""
        check_no_dropout(denoiser)
        return RewardLoss(
            denoiser,
            material.reward,
            self,
            kl_weight=self.kl_weight,
            kl_warmup=self.kl_warmup,
            reference=material.reference,
        )
