"""What methods of distillation share: a student, its frozen teacher, and steps between levels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import Sampler
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.learn.cloning.denoising import LossOutput, mean_over_plan, standard_normal
from diffpolicy.learn.method import Batch, Method, encoded
from diffpolicy.learn.reference import Referenced
from diffpolicy.settings import ranged


@dataclass(frozen=True, kw_only=True)
class Distillation(Method):
    """Settings of all distillations; the student begins with the weights of its teacher.

    Classifier-free guidance of the teacher becomes the student's own, which is then unguided. Its
    warm starts and truncated starts (``rti``, ``truncated``) are not the student's: their levels
    were chosen for the teacher.

    Args:
        draws: levels (and noises) per example, over which its loss is the mean. Observations are
            encoded once for all of them.

    Raises:
        ValueError: a value out of range.
    """

    command: ClassVar[str] = "distill"
    items: ClassVar[str] = "plans"

    draws: int = ranged("[1, inf)", 1)

    def reads(self) -> frozenset[str]:
        return frozenset({"demonstrations"})

    def teacher_sampler(self) -> Sampler:
        """The steps of the teacher that students learn from."""
        raise NotImplementedError(f"{type(self).__name__} defines no teacher_sampler()")

    def student_sampler(self) -> Mapping[str, Any]:
        """How students draw their plans: entries of :class:`~diffpolicy.core.Sampler`."""
        raise NotImplementedError(f"{type(self).__name__} defines no student_sampler()")

    @property
    def student_steps(self) -> int | None:
        """The one number of steps that students are for; None: any."""
        return None

    @property
    def scored_steps(self) -> tuple[int, ...]:
        own = self.student_steps
        return super().scored_steps if own is None else (own,)

    def guidance_of(self, spec: Any) -> float:
        """The scale of the teacher's classifier-free guidance."""
        return float(spec.sampler.guidance_scale)

    def begin(self, policy: Any) -> Any:
        """The student: a copy of its teacher that draws plans in its own way, from pure noise."""
        own = self.student_sampler()
        unset = dict.fromkeys(("t_min", "levels", "teleport", "start_seed")) if own else {}
        sampler = {**unset, **own, "guidance_scale": 1.0}
        sampler = replace(policy.spec.sampler, **sampler)
        how = {"rti": None, "truncated": None, "trained_steps": self.student_steps}
        spec = replace(policy.spec, sampler=sampler, **how)
        if self.guidance_of(policy.spec) != 1:  # what guides once must not guide again
            spec = replace(spec, cond_dropout=0.0)
        weights = copy.deepcopy(policy.denoiser), policy.normalizer, None
        return type(policy)(spec, *weights, copy.deepcopy(policy.heads))


class Noised(NamedTuple):
    """Where steps of a teacher begin.

    Attributes:
        x_t: states ``[B, H, D]``.
        levels: theirs, and those after each step, ``[B, 1, 1]``, falling.
        cond: what the student sees, ``[B, C]``.
        told: what the teacher sees.
    """

    x_t: Tensor
    levels: list[Tensor]
    cond: Tensor | None
    told: Tensor | None


class Taught(Referenced):
    """An objective with a frozen teacher, which is the student as it is when training begins.

    Args:
        denoiser: the student.
        settings: ``draws``.
        guidance_scale: of the teacher's classifier-free guidance; 1: none.
        guidance_t_min: the level at which it ends.
        mask_padding: leave edge-padded positions out.

    Raises:
        ValueError: more steps of the teacher than a discrete process has levels.
    """

    takes_steps: ClassVar[bool] = True  # the teacher, along its paths

    def __init__(
        self,
        denoiser: Denoiser,
        settings: Distillation,
        *,
        guidance_scale: float = 1.0,
        guidance_t_min: float = 0.0,
        mask_padding: bool = False,
    ) -> None:
        super().__init__(denoiser, None, apart=True)
        self.denoiser: Denoiser
        self.settings, self.guidance_scale = settings, guidance_scale
        self.guidance_t_min = guidance_t_min
        self.mask_padding = mask_padding
        self.grid = settings.teacher_sampler().grid(denoiser.process)

    @classmethod
    def of(cls, denoiser: Any, settings: Any, material: Any) -> Any:
        """The objective for what there is to learn from.

        Raises:
            ValueError: a teacher that is for another number of steps than it would take.
        """
        spec, steps = material.spec, settings.teacher_sampler().num_steps
        own = spec.trained_steps
        if own not in (None, steps):
            half = f"halve it once (method=halving method.num_steps={own // 2}), or "
            raise ValueError(
                f"{type(settings).__name__} lets its teacher take {steps} steps with these "
                f"settings, but this one is a student of {own} steps and of no other number: "
                f"{half * (own % 2 == 0)}distill the policy that it was made of"
            )
        if cls.takes_steps:
            if spec.sampler.options.get("variance") == "renoise":
                raise ValueError(
                    f"{type(settings).__name__} lets its teacher take steps along its paths, and "
                    "this one is a student by consistency, which knows where they end alone: "
                    "distill the policy that it was made of"
                )
            warn_of_eps(denoiser)
        return cls(
            denoiser,
            settings,
            guidance_scale=settings.guidance_of(spec),
            guidance_t_min=spec.sampler.guidance_t_min,
            mask_padding=material.data.mask_padding,
        )

    @property
    def teacher(self) -> BaseDenoiser:
        """What the student learns from, guided as the policy before was."""
        assert self.reference is not None
        if self.guidance_scale == 1:
            return self.reference
        how: dict[str, Any] = {"clip": getattr(self.reference, "clip", False)}
        how["t_min"] = self.guidance_t_min
        return ClassifierFreeGuidance(self.reference, self.guidance_scale, **how)

    def noised(self, batch: Batch, generator: torch.Generator, stride: int) -> Noised:
        """Demonstrations at levels of the teacher's grid, with the next ``stride`` levels."""
        x0 = self.repeated(batch["action"])
        levels = drawn_step(self.grid, stride, x0, generator)
        noise = standard_normal(x0.shape, x0, generator)
        x_t = self.denoiser.process.add_noise(x0, levels[0], noise)
        return Noised(x_t, levels, *self.conditions(batch))

    def output(self, error: Tensor, batch: Batch) -> LossOutput:
        """What an objective returns, of squared errors ``[B * draws, H, D]``."""
        loss = mean_over_plan(error.mean(-1), self.valid(batch))
        return LossOutput(self.mean_of_draws(loss), {})

    def conditions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What the student and the teacher see, ``[B * draws, C]``, each by its own encoder."""
        return self.repeated(encoded(self.denoiser, batch)), self.repeated(self.told(batch))

    @torch.no_grad()
    def told(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What the teacher sees, ``[B, C]``."""
        assert self.reference is not None
        return encoded(self.reference, batch)

    def repeated(self, rows: Any) -> Any:
        """Every row ``draws`` times in a row; None stays None."""
        return rows if rows is None else rows.repeat_interleave(self.settings.draws, 0)

    def valid(self, batch: Mapping[str, Tensor]) -> Any:
        """The positions ``[B * draws, H]`` that are learned from; None: all."""
        return self.repeated(batch["valid"]) if self.mask_padding else None

    def mean_of_draws(self, loss: Tensor) -> Tensor:
        """``[B]`` of losses ``[B * draws]``."""
        return loss.view(-1, self.settings.draws).mean(1)


def warn_of_eps(denoiser: Denoiser) -> None:
    """Say so where estimates at the first step, of which a student is made, are ill-conditioned."""
    if denoiser.prediction == "eps":
        warnings.warn(
            "a student of prediction 'eps' divides its error by alpha, which is next to nothing "
            "where its first step begins, and may draw plans in one step that are no better than "
            "its teacher's; train a teacher of prediction 'v' or 'x0' (policy.prediction=v)",
            stacklevel=4,
        )


def drawn_step(grid: Tensor, stride: int, like: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Levels ``[B, 1, 1]`` of ``stride`` steps in a row, begun anywhere on a grid, row by row.

    Args:
        grid: host levels ``[K stride + 1, 1, 1, 1]``, falling to 0.
        stride: steps in a row; what is drawn begins at a multiple of it.
        like: states ``[B, H, D]``, for device and type.
        generator: source of the draws.

    Returns:
        ``stride + 1`` tensors, falling.
    """
    starts = (len(grid) - 1) // stride
    drawn = torch.randint(starts, like.shape[:1], generator=generator, device=generator.device)
    levels = grid.view(-1).to(like.device, like.dtype)
    first = drawn.to(like.device) * stride
    return [levels[first + i].view(-1, 1, 1) for i in range(stride + 1)]


def ddim_move(
    process: GaussianProcess, x_t: Tensor, x0_hat: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0) from ``t`` to ``s``, per row."""
    noise = (x_t - process.alpha(t) * x0_hat) / process.sigma(t)
    return process.alpha(s) * x0_hat + process.sigma(s) * noise


def unclipped(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    """The clean estimate, of which no entry is clamped: there it would have no gradient."""
    c_x, c_out, _, _ = denoiser.coefficients(t)
    return c_x * x_t + c_out * denoiser.raw(x_t, t, cond)
