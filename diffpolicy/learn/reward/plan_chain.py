"""Continuous plans sampled with a graph, for :class:`~diffpolicy.learn.reward.pathwise.RewardLoss`.

Tunes a diffusion policy by a differentiable critic or simulator: DRaFT-K and DRaFT-LV (Clark et al.
2024, arXiv 2309.17400) and AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.solvers import DDIM
from diffpolicy.core.starts import explicit_levels, prior_start, truncated_start
from diffpolicy.core.steps import Solver
from diffpolicy.learn.method import Method, plan_shape
from diffpolicy.learn.reward.chains import chain_with_kl, differentiable_chain, gaussian_step_kl
from diffpolicy.learn.reward.pathwise import Finished, RewardLoss
from diffpolicy.settings import check_choice, check_range

KL_PROBLEM = (
    "paths have a divergence to the reference's only if steps add noise and have no memory: use "
    "solver='ddpm' (or 'ddim' with options={'eta': ...} above 0), or set kl_weight=0"
)


@dataclass(frozen=True, kw_only=True)
class PlanChain(Sampler, Method):
    """Plans sampled from pure noise, and through which evaluations the reward's gradient flows.

    A divergence to a reference (``kl_weight`` above 0) exists for steps that add noise and have no
    memory: ``ddpm``, or ``ddim`` with ``eta`` above 0. It is that of the paths up to the last step,
    which adds none.

    Args:
        solver: as ``num_steps``, ``options`` and ``spacing``, see :class:`diffpolicy.core.Sampler`.
        grad_steps: how many of the last evaluations carry a graph (DRaFT-K); ``None``: all.
        truncation: ``"fixed"``, as ``grad_steps`` says, or their number is drawn for every batch:
            ``"uniform"`` from 1 to all, or ``"gaussian"``. AlignProp detaches the network's answer
            in the evaluations before; nothing that requires a gradient is left in them, so this is
            the same.
        spread: of ``"gaussian"``: mean and standard deviation of the share of the evaluations with
            a graph. AlignProp: 8 and 5 of 50.
        renoise: n of DRaFT-LV: plans are sampled without a graph, noised n times to the last level
            and denoised in one step with a graph; their rewards are averaged. 0: off.
        checkpoint: recompute evaluations with a graph in the backward pass: least memory.
        shape: ``[H, D]`` of a plan; ``None``: that of the denoiser's network.
        kl_weight: of the path divergence from the denoiser as it is now, in units of reward.
        kl_warmup: optimiser steps over which ``kl_weight`` rises linearly from 0.

    Raises:
        ValueError: values out of range, or that make no sense together.
    """

    command: ClassVar[str] = "tune"
    items: ClassVar[str] = "plans"

    grad_steps: int | None = None
    truncation: str = "fixed"
    spread: tuple[float, float] = (0.16, 0.1)
    renoise: int = 0
    checkpoint: bool = False
    shape: tuple[int, int] | None = None
    kl_weight: float = 0.0
    kl_warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("truncation", self.truncation, ("fixed", "uniform", "gaussian"))
        check_range("[0, inf)", renoise=self.renoise)
        if self.shape is not None and (len(self.shape) != 2 or min(self.shape) < 1):
            raise ValueError(f"shape must be [H, D] of a plan, got {self.shape}")
        nfe = self.make().nfe(self.num_steps)
        check_range(f"[1, {nfe}]", grad_steps=self.grad_steps)
        if self.truncation != "fixed" and (self.grad_steps is not None or self.renoise):
            raise ValueError(
                f"truncation={self.truncation!r} draws grad_steps itself; leave it null"
            )
        if len(self.spread) != 2 or not (0 < self.spread[0] <= 1 and self.spread[1] > 0):
            raise ValueError(
                f"spread is a mean in (0, 1] and a positive standard deviation, got {self.spread}"
            )
        if self.renoise and self.grad_steps != 1:
            raise ValueError(
                f"renoise={self.renoise} differentiates the last step alone; set grad_steps=1"
            )

    @classmethod
    def draft_k(cls, k: int = 1, **settings: Any) -> Self:
        """DRaFT-K: the gradient of the last ``k`` evaluations."""
        return cls(**{"grad_steps": k, **settings})

    @classmethod
    def draft_lv(cls, n: int = 2, **settings: Any) -> Self:
        """DRaFT-LV: the last step's gradient, averaged over ``n`` draws of its noise."""
        return cls(**{"grad_steps": 1, "renoise": n, **settings})

    @classmethod
    def alignprop(cls, **settings: Any) -> Self:
        """AlignProp: stochastic DDIM, checkpointed, truncated at random."""
        chain = {"truncation": "gaussian", "options": {"eta": 1.0}, "checkpoint": True}
        return cls(**{**chain, **settings})

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """See :class:`~diffpolicy.learn.reward.pathwise.RewardLoss`."""
        weight, warmup = self.kl_weight, self.kl_warmup
        return RewardLoss(denoiser, material.reward, self, kl_weight=weight, kl_warmup=warmup)

    @property
    def kl_problem(self) -> str | None:
        """Why these paths have no divergence to a reference's, and what to do; ``None``: ok."""
        solver = self.make()
        return None if isinstance(solver, DDIM) and solver.stochastic else KL_PROBLEM

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise ``ValueError`` unless the chain can run with this denoiser."""
        if not isinstance(denoiser.process, GaussianProcess):
            raise ValueError(
                f"this chain is of continuous plans; for {type(denoiser.process).__name__} use "
                "MaskedChain"
            )
        self._shape(denoiser)

    def run(
        self,
        denoiser: BaseDenoiser,
        reference: BaseDenoiser | None,
        size: int,
        cond: Tensor | None,
        generator: torch.Generator,
    ) -> Finished:
        """Sample ``size`` plans ``[size, H, D]``; with ``renoise`` ``[size n, H, D]``.

        Raises:
            ValueError: a reference, where paths have no divergence to it.
        """
        if reference is not None and self.kl_problem is not None:
            raise ValueError(self.kl_problem)
        weight = next(denoiser.parameters(), torch.zeros(()))
        like = torch.zeros(
            (size, *self._shape(denoiser)), device=generator.device, dtype=weight.dtype
        )
        process, solver = denoiser.process, self.make()
        start = prior_start(process, process.draw_noise(like.shape, generator, like))
        grid = self.grid(process, start)
        count, noise = solver.nfe(self.num_steps), None
        if solver.stochastic:
            noise = process.draw_noise((count, *like.shape), generator, like)
        steps = 0 if self.renoise else self._drawn_steps(count, generator)
        x0, kl, _ = chain_with_kl(
            denoiser,
            reference,
            solver,
            start,
            grid,
            step_kl=gaussian_step_kl,
            noise=noise,
            cond=cond,
            grad_steps=steps,
            checkpoint=self.checkpoint,
        )
        if self.renoise:
            x0 = self._denoised_again(denoiser, solver, x0, grid, cond, generator)
        metrics = {}
        if self.truncation != "fixed":
            metrics["grad_steps"] = like.new_tensor(float(count if steps is None else steps))
        return Finished(x0, kl, metrics)

    def _denoised_again(
        self,
        denoiser: BaseDenoiser,
        solver: Solver,
        x0: Tensor,
        grid: Tensor,
        cond: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """``renoise`` copies of each plan, from the last level before clean, ``[B n, H, D]``."""
        copies = x0.detach().repeat_interleave(self.renoise, 0)
        process = denoiser.process
        noise = process.draw_noise(copies.shape, generator, copies)
        start = truncated_start(process, copies, grid[-2], noise)
        last = None
        if solver.stochastic:  # its step to clean adds none, but takes one
            last = torch.zeros_like(copies)[None]
        return differentiable_chain(
            denoiser,
            solver,
            start,
            explicit_levels(start, [0.0]),
            noise=last,
            cond=None if cond is None else cond.repeat_interleave(self.renoise, 0),
            checkpoint=self.checkpoint,
        )

    def _drawn_steps(self, count: int, generator: torch.Generator) -> int | None:
        """How many of the last evaluations carry a graph; ``None``: all."""
        if self.truncation == "fixed":
            return self.grad_steps
        device = generator.device
        if self.truncation == "uniform":
            drawn = torch.randint(1, count + 1, (), generator=generator, device=device).item()
        else:
            mean, std = self.spread
            z = torch.randn((), generator=generator, device=device).item()
            drawn = round(count * (mean + std * z))
        return int(min(count, max(1, drawn)))

    def _shape(self, denoiser: BaseDenoiser) -> tuple[int, int]:
        if self.shape is None:
            return plan_shape(denoiser)
        network = getattr(denoiser, "network", None)
        found = getattr(network, "horizon", None), getattr(network, "dim", None)
        if None not in found and tuple(self.shape) != found:
            raise ValueError(f"the network makes plans {found}, the chain has shape={self.shape}")
        return self.shape
