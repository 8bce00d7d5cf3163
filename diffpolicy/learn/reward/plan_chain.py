"""Continuous plans sampled with a graph, for :class:`~diffpolicy.learn.reward.pathwise.RewardLoss`.

Tunes a diffusion policy by a differentiable critic or simulator: DRaFT-K and DRaFT-LV (Clark et al.
2024, arXiv 2309.17400), AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739), and the adjoint of
the probability-flow ODE (AdjointDPM, Pan et al. 2024, arXiv 2307.10711).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.solvers import DDIM, Solver, make_solver
from diffpolicy.core.starts import explicit_levels, prior_start, truncated_start
from diffpolicy.learn.reward.adjoint import ADJOINTS, DROPOUT, probability_flow
from diffpolicy.learn.reward.chains import chain_with_kl, differentiable_chain
from diffpolicy.learn.reward.path_kl import gaussian_step_kl
from diffpolicy.learn.reward.pathwise import Finished
from diffpolicy.learn.reward.runge_kutta import METHODS
from diffpolicy.settings import check_choice, check_range

TRUNCATIONS = ("fixed", "uniform", "gaussian")
GRADIENTS = ("autograd", "adjoint")
ADJOINT_OPTIONS = ("method", "adjoint", "rtol", "atol")

# By name, for configs: fields that differ from the defaults.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "draft_k": {"grad_steps": 1},
    "draft_lv": {"grad_steps": 1, "renoise": 2},
    "alignprop": {"truncation": "gaussian", "options": {"eta": 1.0}, "checkpoint": True},
    "adjoint": {"gradient": "adjoint", "spacing": "karras"},
}


@dataclass(frozen=True, kw_only=True)
class PlanChain(Sampler):
    """Plans sampled from pure noise, and through which evaluations the gradient flows.

    A divergence to a reference (``kl_weight`` above 0) exists for steps that add noise and have no
    memory: ``ddpm``, or ``ddim`` with ``eta`` above 0. It is that of the paths up to the last step,
    which adds none.

    Args:
        solver: as ``num_steps`` and ``spacing``, see :class:`diffpolicy.core.Sampler`.
        options: of the solver; with ``gradient="adjoint"`` those of
            :func:`~diffpolicy.learn.reward.adjoint.probability_flow` (method, adjoint, rtol, atol).
        grad_steps: how many of the last evaluations carry a graph (DRaFT-K); ``None``: all.
        truncation: ``"fixed"``, as ``grad_steps`` says, or their number is drawn for every batch:
            ``"uniform"`` from 1 to all, or ``"gaussian"``. AlignProp detaches the network's answer
            in the evaluations before; nothing that requires a gradient is left in them, so this is
            the same.
        spread: of ``"gaussian"``: mean and standard deviation of the share of the evaluations with
            a graph. AlignProp: 8 and 5 of 50.
        renoise: n of DRaFT-LV: plans are sampled without a graph, noised n times to the last level
            and denoised in one step with a graph; their rewards are averaged. 0: off.
        gradient: ``"autograd"``, or ``"adjoint"``: the probability-flow ODE, in memory that does
            not grow with the steps.
        checkpoint: recompute evaluations with a graph in the backward pass: least memory.
        shape: ``[H, D]`` of a plan; ``None``: that of the denoiser's network.

    Raises:
        ValueError: values out of range, or that make no sense together.
    """

    grad_steps: int | None = None
    truncation: str = "fixed"
    spread: tuple[float, float] = (0.16, 0.1)
    renoise: int = 0
    gradient: str = "autograd"
    checkpoint: bool = False
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("truncation", self.truncation, TRUNCATIONS)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_range("[0, inf)", renoise=self.renoise)
        if self.shape is not None and (len(self.shape) != 2 or min(self.shape) < 1):
            raise ValueError(f"shape must be [H, D] of a plan, got {self.shape}")
        if self.gradient == "adjoint":
            self._check_adjoint()
        else:
            self._check_truncation()

    def _check_truncation(self) -> None:
        nfe = self.make().nfe(self.num_steps)
        if self.grad_steps is not None and not 1 <= self.grad_steps <= nfe:
            raise ValueError(
                f"grad_steps must be from 1 to the chain's {nfe} evaluations, or null for all; got "
                f"{self.grad_steps}"
            )
        if self.truncation != "fixed" and (self.grad_steps is not None or self.renoise):
            raise ValueError(
                f"truncation={self.truncation!r} draws grad_steps itself; leave grad_steps null "
                "and renoise 0"
            )
        if self.truncation == "gaussian":
            mean, std = self.spread
            if not (0 < mean <= 1 and std > 0):
                raise ValueError(
                    "spread is a mean in (0, 1] and a standard deviation above 0, as shares of the "
                    f"chain; got {self.spread}"
                )
        if self.renoise and self.grad_steps != 1:
            raise ValueError(
                f"renoise={self.renoise} differentiates the last step alone; set grad_steps=1"
            )

    def _check_adjoint(self) -> None:
        if self.grad_steps is not None or self.truncation != "fixed" or self.renoise:
            raise ValueError(
                "gradient='adjoint' differentiates the whole ODE; leave out grad_steps, truncation "
                "and renoise, or set gradient='autograd'"
            )
        if self.checkpoint:
            raise ValueError(
                "gradient='adjoint' stores no activations, there is nothing to checkpoint; leave "
                "out checkpoint"
            )
        if self.solver != "ddim":
            raise ValueError(
                f"gradient='adjoint' solves the ODE with options={{'method': ...}}, not with "
                f"solver={self.solver!r}; leave out solver"
            )
        unknown = sorted(set(self.options) - set(ADJOINT_OPTIONS))
        if unknown:
            raise ValueError(
                f"gradient='adjoint' has no option {unknown[0]!r}; it has {ADJOINT_OPTIONS}"
            )
        for name, known in (("method", sorted(METHODS)), ("adjoint", ADJOINTS)):
            if name in self.options and self.options[name] not in known:
                raise ValueError(
                    f"unknown {name} {self.options[name]!r}; expected one of {tuple(known)}"
                )

    @classmethod
    def draft_k(cls, k: int = 1, **settings: Any) -> Self:
        """DRaFT-K: the gradient of the last ``k`` evaluations."""
        return cls(**{**PRESETS["draft_k"], "grad_steps": k, **settings})

    @classmethod
    def draft_lv(cls, n: int = 2, **settings: Any) -> Self:
        """DRaFT-LV: the last step's gradient, averaged over ``n`` draws of its noise."""
        return cls(**{**PRESETS["draft_lv"], "renoise": n, **settings})

    @classmethod
    def alignprop(cls, **settings: Any) -> Self:
        """AlignProp: stochastic DDIM, checkpointed, truncated at random."""
        return cls(**{**PRESETS["alignprop"], **settings})

    @classmethod
    def adjoint(cls, **settings: Any) -> Self:
        """AdjointDPM: the adjoint of the probability-flow ODE."""
        return cls(**{**PRESETS["adjoint"], **settings})

    @property
    def kl_problem(self) -> str | None:
        """Why these paths have no divergence to a reference's, and what to do; ``None``: ok."""
        if self.gradient == "autograd":
            solver = self.make()
            if isinstance(solver, DDIM) and solver.stochastic:
                return None
        return (
            "paths have a divergence to the reference's only if steps add noise and have no memory:"
            " use solver='ddpm' (or 'ddim' with options={'eta': ...} above 0) and "
            "gradient='autograd', or set kl_weight=0"
        )

    def check(self, denoiser: BaseDenoiser) -> None:
        """Raise ``ValueError`` unless the chain can run with this denoiser."""
        if not isinstance(denoiser.process, GaussianProcess):
            raise ValueError(
                f"this chain is of continuous plans; for {type(denoiser.process).__name__} use "
                "MaskedChain"
            )
        self._shape(denoiser)
        if self.gradient == "adjoint" and any(
            isinstance(m, DROPOUT) and m.p > 0 for m in denoiser.modules()
        ):
            raise ValueError(
                "dropout makes another ODE of every evaluation; build the network with dropout=0, "
                "or set gradient='autograd'"
            )

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
        process = denoiser.process
        start = prior_start(process, process.draw_noise(like.shape, generator, like))
        if self.gradient == "adjoint":
            grid = replace(self, t_min=1e-3).grid(process, start)  # where its integration ends
            x0 = probability_flow(denoiser, start, grid, cond=cond, **self.options)
            return Finished(x0, like.new_zeros(size), {})
        solver = self.make()
        grid, count, noise = self.grid(process, start), solver.nfe(self.num_steps), None
        if solver.stochastic:
            noise = process.draw_noise((count, *like.shape), generator, like)
        steps = 0 if self.renoise else self._drawn_steps(count, generator)
        kl = like.new_zeros(size)
        if reference is None:
            x0 = differentiable_chain(
                denoiser,
                solver,
                start,
                grid,
                noise=noise,
                cond=cond,
                grad_steps=steps,
                checkpoint=self.checkpoint,
            )
        else:
            assert noise is not None  # kl_problem
            x0, kl, _, _ = chain_with_kl(
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

    def make(self, *, deterministic: bool = False) -> Solver:
        """The solver; with ``gradient="adjoint"`` the options are not a solver's, but the ODE's."""
        if self.gradient == "adjoint":
            return make_solver(self.solver)
        return super().make(deterministic=deterministic)

    def _shape(self, denoiser: BaseDenoiser) -> tuple[int, int]:
        network = getattr(denoiser, "network", None)
        found = getattr(network, "horizon", None), getattr(network, "dim", None)
        if self.shape is None and None in found:
            raise ValueError(
                f"{type(denoiser).__name__} has no network that tells the shape of a plan; give "
                "shape=(H, D)"
            )
        if self.shape is not None and None not in found and tuple(self.shape) != found:
            raise ValueError(f"the network makes plans {found}, the chain has shape={self.shape}")
        height, width = found if self.shape is None else self.shape
        return int(height), int(width)  # type: ignore[arg-type]


def plan_chain(name: str, **settings: Any) -> PlanChain:
    """A chain of ``PRESETS`` by name with some settings changed, for configs.

    Raises:
        ValueError: an unknown name, or settings that a chain does not have or take.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown plan chain {name!r}; expected one of {sorted(PRESETS)}")
    known = list(PlanChain.__dataclass_fields__)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"a plan chain has no setting {unknown[0]!r}; it has {', '.join(known)}")
    return replace(PlanChain(**PRESETS[name]), **settings)
