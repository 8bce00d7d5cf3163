"""Continuous plans sampled with a graph, for :class:`~diffpolicy.learn.reward.pathwise.RewardLoss`.

Tunes a diffusion policy by a differentiable critic or simulator: DRaFT-K and DRaFT-LV (Clark et al.
2024, arXiv 2309.17400) and AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.solvers import DDIM
from diffpolicy.core.starts import explicit_levels, prior_start, truncated_start
from diffpolicy.learn.method import Method, plan_shape
from diffpolicy.learn.reward.chains import chain_with_kl, differentiable_chain, gaussian_step_kl
from diffpolicy.learn.reward.pathwise import Finished, RewardLoss
from diffpolicy.settings import check_range, check_shape, one_of, ranged

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
        truncation: ``"fixed"``, as ``grad_steps`` says, or their number is drawn for every batch,
            whatever it says: ``"uniform"`` from 1 to all, or ``"gaussian"``. AlignProp detaches the
            network's answer in the evaluations before; nothing that requires a gradient is left in
            them, so this is the same.
        spread: of ``"gaussian"``: mean and standard deviation of the share of the evaluations with
            a graph. AlignProp: 8 and 5 of 50.
        renoise: n of DRaFT-LV: plans are sampled without a graph, noised n times to the last level
            and denoised in one step with a graph, which alone has one then; their rewards are
            averaged. 0: off.
        checkpoint: recompute evaluations with a graph in the backward pass: least memory.
        kl_weight: of the path divergence from the denoiser as it is now, in units of reward.
        kl_warmup: optimiser steps over which ``kl_weight`` rises linearly from 0.

    Raises:
        ValueError: values out of range.
    """

    grad_steps: int | None = None
    truncation: str = one_of("fixed", "uniform", "gaussian")
    spread: tuple[float, float] = (0.16, 0.1)
    renoise: int = ranged("[0, inf)", 0)
    checkpoint: bool = False
    kl_weight: float = 0.0
    kl_warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(f"[1, {self.make().nfe(self.num_steps)}]", grad_steps=self.grad_steps)
        check_shape("spread (mean, standard deviation)", (len(self.spread),), (2,))
        check_range("(0, 1]", mean_of_spread=self.spread[0])
        check_range("(0, inf)", std_of_spread=self.spread[1])

    @classmethod
    def draft_k(cls, k: int = 1, **settings: Any) -> Self:
        """DRaFT-K: the gradient of the last ``k`` evaluations."""
        return cls(**{"grad_steps": k, **settings})

    @classmethod
    def draft_lv(cls, n: int = 2, **settings: Any) -> Self:
        """DRaFT-LV: the last step's gradient, averaged over ``n`` draws of its noise."""
        return cls(**{"renoise": n, **settings})

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
        plan_shape(denoiser)  # refuses one that does not tell

    def run(
        self,
        denoiser: BaseDenoiser,
        reference: BaseDenoiser | None,
        size: int,
        cond: Tensor | None,
        generator: torch.Generator,
    ) -> Finished:
        """Sample ``size`` plans ``[size, H, D]``; with ``renoise`` ``[size n, H, D]``."""
        weight = next(denoiser.parameters(), torch.zeros(()))
        shape, place = (size, *plan_shape(denoiser)), generator.device
        like = torch.zeros(shape, device=place, dtype=weight.dtype)
        process, solver = denoiser.process, self.make()
        start = prior_start(process, process.draw_noise(like.shape, generator, like))
        grid = self.grid(process, start)
        count, noise = solver.nfe(self.num_steps), None
        if solver.stochastic:
            noise = process.draw_noise((count, *like.shape), generator, like)
        steps = 0 if self.renoise else self._drawn_steps(count, generator)
        how: dict[str, Any] = {"noise": noise, "cond": cond, "checkpoint": self.checkpoint}
        chain = denoiser, reference, solver, start, grid
        done = chain_with_kl(*chain, step_kl=gaussian_step_kl, grad_steps=steps, **how)
        if self.renoise:  # copies of each plan, from the last level before clean, [B n, H, D]
            copies = done.x0.detach().repeat_interleave(self.renoise, 0)
            noise = process.draw_noise(copies.shape, generator, copies)
            start = truncated_start(process, copies, grid[-2], noise)
            how["cond"] = None if cond is None else cond.repeat_interleave(self.renoise, 0)
            # The step to clean of a stochastic solver adds no noise, but takes some.
            how["noise"] = torch.zeros_like(copies)[None] if solver.stochastic else None
            last = explicit_levels(start, [0.0])
            return Finished(differentiable_chain(denoiser, solver, start, last, **how), done.kl, {})
        metrics = {}
        if self.truncation != "fixed":
            metrics["grad_steps"] = like.new_tensor(float(count if steps is None else steps))
        return Finished(done.x0, done.kl, metrics)

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
