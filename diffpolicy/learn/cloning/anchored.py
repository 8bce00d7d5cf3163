"""The loss of trained truncated diffusion: which anchor is right, and what it should become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.noise import stratified
from diffpolicy.data.observation import from_fields
from diffpolicy.learn.cloning.denoising import LossOutput, standard_normal
from diffpolicy.learn.method import Batch, encoded
from diffpolicy.settings import check_choice, check_range

Guesses = Callable[[Any, Tensor | None], Tensor]


class AnchoredLoss(nn.Module):
    """Truncated diffusion as DiffusionDrive trains it (Liao et al. 2025, eq. 5).

    All anchors of a state are noised with one level ``t`` in (0, t_max]. The anchor nearest to the
    demonstrated plan is the positive: the denoiser is to turn its noised version into the plan, and
    the confidence head is to tell it from the others. The anchors are diffused, not the plan, so
    the denoised positive is the mean (``l2``) or median (``l1``) of the plans its anchor stands
    for, and sampling stays in this anchored region: start there (``solve_guesses``).

    ``forward(batch, generator)`` takes ``obs [B, To, O]``, ``action [B, H, A]`` (both normalised)
    and optionally ``valid [B, H]``.

    Args:
        denoiser: with a network of type ``anchored``.
        guesses: the anchors, ``[M, H, A]`` normalised, or for anchors that depend on the state a
            function to ``[B, M, H, A]`` from ``obs`` and the condition that it is encoded to.
        t_max: highest level trained, in (0, 1]; at least the level that sampling starts at.
        class_weight: of the classification loss, a mean over the anchors.
        recon_weight: of the reconstruction loss, a mean over the coordinates.
        classification: ``focal`` (sigmoid, alpha 0.25, gamma 2, as published) or ``bce``, whose
            confidences are calibrated: the sigmoid of a logit is the anchor's probability.
        reconstruction: ``l1`` (as published) or ``l2``.
        negatives: wrong anchors scored per example, drawn anew each time and weighted so that the
            expected loss stays the same; None: all. Fewer make a step cheaper.
        mask_padding: leave positions out that ``valid`` says are padding.

    Raises:
        ValueError: a setting out of range, or a network without a confidence head.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guesses: Tensor | Guesses,
        *,
        t_max: float,
        class_weight: float = 10.0,
        recon_weight: float = 8.0,
        classification: str = "focal",
        reconstruction: str = "l1",
        negatives: int | None = None,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if not hasattr(denoiser.network, "cascade"):
            name = type(denoiser.network).__name__
            raise ValueError(f"AnchoredLoss needs a network of type 'anchored', got {name}")
        check_choice("classification", classification, ("focal", "bce"))
        check_choice("reconstruction", reconstruction, ("l1", "l2"))
        check_range("(0, 1]", t_max=t_max)
        check_range("[1, inf)", negatives=negatives)
        check_range("[0, inf)", class_weight=class_weight)
        check_range("(0, inf)", recon_weight=recon_weight)
        self.denoiser = denoiser
        self.anchors: Tensor | None
        self.register_buffer("anchors", guesses if isinstance(guesses, Tensor) else None)
        self._guesses = None if isinstance(guesses, Tensor) else guesses
        self.t_max, self.negatives, self.mask_padding = t_max, negatives, mask_padding
        self.class_weight, self.recon_weight = class_weight, recon_weight
        self.classification, self.reconstruction = classification, reconstruction

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        plan = batch["action"]
        count, horizon, _ = plan.shape
        masked = self.mask_padding and "valid" in batch
        weight = batch["valid"].to(plan.dtype) if masked else plan.new_ones(count, horizon)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        cond = encoded(self.denoiser, batch)
        guess = self._guess(batch, cond)
        distance = (guess - plan[:, None]).square().mean(-1).mul(weight[:, None]).sum(-1)
        guess, scale = self._chosen(guess, distance.argmin(1), generator)  # the positive is first
        answers = self._answers(guess, cond, generator)
        target = torch.zeros(guess.shape[:2], device=plan.device, dtype=plan.dtype)
        target[:, 0] = 1
        wrong, away = plan.new_zeros(count), plan.new_zeros(count)
        for x0_hat, logit in answers:
            wrong = wrong + (self._classify(logit, target) * scale).mean(1)
            error = x0_hat - plan
            error = error.abs() if self.reconstruction == "l1" else error.square()
            away = away + (error.mean(-1) * weight).sum(1)
        loss = self.class_weight * wrong + self.recon_weight * away
        found = (answers[-1][1].argmax(1) == 0).to(plan.dtype).mean()
        metrics = {"classification": wrong.mean(), "reconstruction": away.mean(), "found": found}
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def _guess(self, batch: Batch, cond: Tensor | None) -> Tensor:
        plan = batch["action"]
        if self._guesses is not None:
            with torch.no_grad():
                return self._guesses(from_fields(batch), cond)
        assert self.anchors is not None  # one of the two is there
        return self.anchors.expand(len(plan), *self.anchors.shape)

    def _chosen(
        self, guess: Tensor, positive: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The positive and the negatives to score, and the weight of each: ``[B, 1 + k, H, A]``."""
        count, many = guess.shape[:2]
        kept = many - 1 if self.negatives is None else min(self.negatives, many - 1)
        keys = torch.rand(count, many, generator=generator, device=generator.device)
        keys = keys.to(guess.device).scatter(1, positive[:, None], 2.0)
        chosen = keys.topk(kept + 1, dim=1).indices  # rand() < 1: the positive is the first
        scale = torch.full((kept + 1,), (many - 1) / max(1, kept), device=guess.device)
        scale[0] = 1.0
        index = chosen[..., None, None].expand(-1, -1, *guess.shape[2:])
        # A mean over kept + 1 anchors below; the loss is a mean over all of them.
        return guess.gather(1, index), scale * (kept + 1) / many

    def _answers(
        self, guess: Tensor, cond: Tensor | None, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Per stage the denoised positive ``[B, H, A]`` and the logits ``[B, 1 + k]``."""
        denoiser, (count, many) = self.denoiser, guess.shape[:2]
        t = self._levels(count, generator).to(guess)
        noise = standard_normal(guess.shape, guess, generator)
        x_t = denoiser.process.add_noise(guess, t[..., None], noise).flatten(0, 1)
        rows = t.repeat_interleave(many, dim=0)
        if cond is not None:
            cond = cond.repeat_interleave(many, dim=0)
        c_x, c_out, c_in, time = denoiser.coefficients(rows)
        network: Any = denoiser.network
        found = []
        for output, logit in network.cascade(c_in * x_t, time, cond):
            x0_hat = torch.addcmul(c_x * x_t, c_out, output).view(guess.shape)
            found.append((x0_hat[:, 0], logit.view(count, many)))
        return found

    def _levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Stratified uniform in (0, t_max], on the knots of a discrete process, ``[B, 1, 1]``."""
        t = self.t_max * stratified((count, 1, 1), generator)
        snapped = self.denoiser.process.snap(t)
        return torch.where(snapped > 0, snapped, t)

    def _classify(self, logit: Tensor, target: Tensor) -> Tensor:
        plain = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        if self.classification == "bce":
            return plain
        probability = logit.sigmoid()
        miss = torch.where(target > 0, 1 - probability, probability)
        return torch.where(target > 0, 0.25, 0.75) * miss.square() * plain
