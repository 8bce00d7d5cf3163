"""Prediction with action: one denoiser of what will be seen and what is done."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.guidance.layout import Layout
from diffpolicy.learn.cloning.denoising import (
    DenoisingLoss,
    LossOutput,
    check_level_law,
    clean_plan,
    drop_cond,
    mean_over_plan,
    squared_error,
    standard_normal,
)
from diffpolicy.settings import check_choice, check_range

SAME, ALONE = 0.25, 0.25  # shares of the examples


class JointLoss(DenoisingLoss):
    """The denoising loss of plans of layout ``"joint"`` (PAD, Guo et al. 2024).

    ``action error + imagined_weight * imagined error``, each the mean over its own entries, so that
    pixels do not outweigh actions by their number.

    The two parts have levels of their own (Bao et al. 2023, UniDiffuser): the same one for
    a quarter of the examples (``SAME``), on which both are drawn together; pure noise in place of
    what is imagined for another (``ALONE``), on which actions are drawn alone; and independent ones
    for the rest. Where an episode has no actions, these are pure noise, and have no loss.

    ``forward(batch, generator)`` takes what :class:`DenoisingLoss` takes, ``imagined [B, H, F]``,
    and optionally ``has_action [B, H]`` (the same of all positions) and ``imagined_valid [B, H]``,
    which with ``mask_padding`` is to ``imagined`` what ``valid`` is to ``action``.

    Args:
        denoiser: what is trained.
        layout: of kind ``"joint"``.
        cond_dropout: fraction of examples whose condition is zeroed.
        mask_padding: leave edge-padded positions out.
        imagined_weight: see above; 0: it is not learned.
        draws: levels and noises per example, see :class:`DenoisingLoss`.

    Raises:
        ValueError: settings out of range, another layout, or a network that takes no level per
            part.
    """

    imagines: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        layout: Layout,
        *,
        cond_dropout: float = 0.0,
        mask_padding: bool = False,
        imagined_weight: float = 1.0,
        draws: int = 1,
    ) -> None:
        check_choice("layout of a JointLoss", layout.kind, ("joint",))
        check_level_law("dim", denoiser, None)
        check_range("[0, inf)", imagined_weight=imagined_weight)
        how = {"cond_dropout": cond_dropout, "mask_padding": mask_padding, "draws": draws}
        super().__init__(denoiser, layout=layout, **how)  # type: ignore[arg-type]
        self.imagined_weight = imagined_weight
        imagines = torch.arange(layout.dim) < layout.parts[0]
        self.register_buffer("imagines", imagines.view(1, 1, -1), persistent=False)

    def draw_levels(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        """Levels ``[count, 1, D]``, of one value in each part, on the generator's device."""
        # One call each: within a call, the entries of a row share their stratum.
        action, imagined = (
            self.denoiser.process.sample_t((count, 1, 1), generator) for _ in range(2)
        )
        coin = torch.rand(count, 1, 1, generator=generator, device=generator.device)
        alone = (coin >= SAME) & (coin < SAME + ALONE)
        imagined = torch.where(coin < SAME, action, imagined)
        imagined = torch.where(alone, 1.0, imagined)
        return torch.where(self.imagines.to(generator.device), imagined, action)

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        x0, cond = clean_plan(batch, self.layout, self.denoiser)
        x0, cond = self.repeated(x0), self.repeated(cond)
        t = self.draw_levels(len(x0), x0.shape[2], generator).to(x0.device, x0.dtype)
        noise = standard_normal(tuple(x0.shape), x0, generator)
        cond = drop_cond(cond, self.cond_dropout, generator)
        masks = batch if self.mask_padding else {}
        valid, seen = (self.repeated(masks.get(name)) for name in ("valid", "imagined_valid"))
        acts = self.repeated(batch.get("has_action"))
        if acts is not None:
            unknown = ~(self.imagines | acts.bool()[:, :1, None])
            x0, t = x0.masked_fill(unknown, 0.0), t.masked_fill(unknown, 1.0)
            valid = acts.bool() if valid is None else valid & acts.bool()
        error, _, _ = squared_error(self.denoiser, x0, t, noise, cond)
        assert self.layout is not None
        imagined, action = torch.split(error, list(self.layout.parts), dim=-1)
        of_imagined = mean_over_plan(imagined.mean(-1), seen)
        of_action = mean_over_plan(action.mean(-1), valid)
        metrics = {"imagined": of_imagined.detach().mean(), "action": of_action.detach().mean()}
        return LossOutput(
            self.mean_of_draws(of_action + self.imagined_weight * of_imagined), metrics
        )
