"""Reward back-propagation: tuning a generator by the gradient of a reward of what it samples.

``loss = -reward(x0) + kl_weight KL(path || path of the reference)`` for sequences (DRAKES, Wang et
al. 2025) and for continuous plans (DRaFT, Clark et al. 2024; AlignProp, Prabhudesai et al. 2023):
the chain differs, the objective does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import hard_one_hot
from diffpolicy.core.reveal import Ancestral, Relaxation, Scheduled
from diffpolicy.core.starts import levels
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, Reward, judged, rows_and_cond
from diffpolicy.learn.reference import Referenced, check_no_dropout
from diffpolicy.learn.reward.chains import chain_with_kl, masked_step_kl, released_step_kl
from diffpolicy.learn.reward.rollouts import all_masked, check_steps, draw_order, start_of
from diffpolicy.learn.reward.sequence_tuning import SequenceMethod
from diffpolicy.settings import check_range, check_settings, one_of, ranged


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


class RewardLoss(Referenced):
    """Reward back-propagation as an objective of the trainer.

    ``forward(batch, generator)`` samples one item per row of the batch, under its ``cond [B, C]``
    or its observations ``obs [B, To, O]``. All noise comes from ``generator``.

    Args:
        denoiser: what is tuned.
        reward: differentiable: of one-hot sequences ``[B, L, V] -> [B]``, or of plans ``[B, H, D]``
            and, if there is one, their condition.
        chain: how items are sampled and how the gradient flows, a :class:`MaskedChain` or a
            :class:`~diffpolicy.learn.reward.plan_chain.PlanChain`: ``run`` samples, ``check``
            refuses other denoisers, and ``kl_problem`` says why there is no divergence.
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
        chain: Any,
        *,
        kl_weight: float,
        kl_warmup: int = 0,
        reference: BaseDenoiser | None = None,
    ) -> None:
        super().__init__(denoiser, reference, apart=True)
        check_range("[0, inf)", kl_weight=kl_weight, kl_warmup=kl_warmup)
        chain.check(denoiser)
        if kl_weight > 0 and chain.kl_problem is not None:
            raise ValueError(chain.kl_problem)
        self._reward = [reward]  # a list: a reward that is a module is not part of this one
        self.chain = chain
        self.kl_weight, self.kl_warmup = float(kl_weight), kl_warmup
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def after_step(self) -> None:
        """Count optimiser steps, for ``kl_warmup``."""
        self.step += 1

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        size, cond = rows_and_cond(self.denoiser, batch)
        reference = self.reference if self.kl_weight > 0 else None
        done = self.chain.run(self.denoiser, reference, size, cond, generator)
        copies = len(done.items) // size
        if isinstance(self.denoiser, MaskedDenoiser):  # rewards are of the sequence alone
            cond = None
        told = None if cond is None else cond.repeat_interleave(copies, 0)
        reward = judged(self._reward[0], done.items, told)
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
        kl: ``"path"``, or ``"drakes_released"``, the formula of the released code (0 unless
            ``joint``).
        kl_steps: how many steps, drawn anew each time, the divergence is estimated from; ``None``:
            all.
        kl_prefix: include the hard steps before the relaxed ones.
        checkpoint: recompute relaxed steps in the backward pass: least memory.
        reference_graph: see :func:`diffpolicy.learn.reward.chains.chain_with_kl`.

    Raises:
        ValueError: values out of range.
    """

    num_steps: int | None = ranged("[1, inf)", None)
    relaxation: Relaxation = field(default_factory=Relaxation)
    joint: bool = False
    straight_through_end: bool = True
    kl: str = one_of("path", "drakes_released")
    kl_steps: int | None = ranged("[1, inf)", None)
    kl_prefix: bool = True
    checkpoint: bool = False
    reference_graph: bool = True
    kl_problem: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.joint and self.num_steps is None:
            raise ValueError("joint=True draws reveals step by step and needs num_steps")

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise ``ValueError`` unless the chain can run with this denoiser."""
        if not isinstance(denoiser, MaskedDenoiser):
            raise ValueError(
                f"sequences need a MaskedDenoiser; for {type(denoiser).__name__} use PlanChain"
            )
        check_steps(denoiser, self.num_steps)

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
        process = denoiser.process
        solver: Ancestral | Scheduled
        if self.joint:
            assert self.num_steps is not None
            start = all_masked(denoiser, size, generator)
            solver, grid = Ancestral(self.relaxation), levels(start, self.num_steps)
        else:
            groups, grid = draw_order(denoiser, size, self.num_steps, generator)
            start = start_of(denoiser, groups)
            solver = Scheduled(groups, self.relaxation)
        count = len(grid) - 1
        chain = denoiser, reference, solver, start, grid
        result = chain_with_kl(
            *chain,
            step_kl=masked_step_kl if self.kl == "path" else released_step_kl(process),
            noise=process.draw_noise((count, *start.x.shape), generator, start.x),
            cond=cond,
            grad_steps=self.relaxation.relaxed_steps,
            kl_steps=None if reference is None else self._chosen(count, generator),
            checkpoint=self.checkpoint,
            reference_graph=self.reference_graph,
        )
        # The chain's estimate is scaled up to all steps; without a prefix only these are meant.
        share = 1 - self._first(count) / count
        x0, kl = result.x0[..., :-1], share * result.kl
        if self.straight_through_end:
            x0 = hard_one_hot(x0.detach()) + (x0 - x0.detach())
        return Finished(x0, kl, {})

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
        """See :class:`RewardLoss`."""
        check_no_dropout(denoiser)
        how: dict[str, Any] = {"kl_weight": self.kl_weight, "kl_warmup": self.kl_warmup}
        return RewardLoss(denoiser, material.reward, self, reference=material.reference, **how)
