"""Preference optimisation: tuning a generator on what is better and worse, or good and bad.

One objective for continuous plans and for masked sequences: a loss of
:mod:`diffpolicy.learn.preferences.formulas` on scores of
:mod:`diffpolicy.learn.preferences.scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masking import MaskingProcess
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Method
from diffpolicy.learn.preferences.formulas import Preference, feedback_loss, preference_loss
from diffpolicy.learn.preferences.items import Draw, Items, batch_items, joined, pair_items
from diffpolicy.learn.preferences.online import OnlineDPOLoss, OwnPlans
from diffpolicy.learn.preferences.scores import DenoisingScore, Score, default_score, drawn_error
from diffpolicy.learn.reference import Referenced


@dataclass(frozen=True)
class DPO(Preference, Method):
    """Diffusion-DPO, IPO, KTO or a margin, on given comparisons of plans or on those of own plans.

    The settings of the loss are those of
    :class:`~diffpolicy.learn.preferences.formulas.Preference`.

    Args:
        score: how plans are scored; None: as the defaults say.
        online: compare the policy's own plans by a reward, drawn so, in place of given pairs.
    """

    command: ClassVar[str] = "prefer"
    items: ClassVar[str] = "plans"

    score: DenoisingScore | None = None
    online: OwnPlans | None = None

    def reads(self) -> frozenset[str]:
        """Pairs, labels, or what is needed to compare own plans."""
        if self.online is not None:
            return frozenset({"observations", "reward"})
        return frozenset({"pairs" if self.paired else "labels"})

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """See :class:`PreferenceLoss`."""
        loss = PreferenceLoss(denoiser, self, self.score)
        if self.online is None:
            return loss
        steps = material.steps.to(next(denoiser.parameters()).device)
        return OnlineDPOLoss(loss, self.online, reward=material.reward, steps=steps)


class PreferenceLoss(Referenced):
    """Preference optimisation as an objective of the trainer.

    ``forward(batch, generator)`` takes a batch of

    - pairs of plans: ``chosen_obs [B, W, To, O]``, ``chosen_action [B, W, H, A]``, ``chosen_steps
      [B, W, H]`` (bool: positions that are scored) and the same of ``rejected_``, with W windows
      per segment, whose scores add up; windows of padding have no steps;
    - pairs of sequences: ``chosen [B, L]`` and ``rejected [B, L]``, optionally ``cond [B, C]``;
    - for ``loss="kto"``, single items: ``obs``, ``action`` and ``steps``, or ``tokens``, of the
      same shapes, and ``good [B]``, bool.

    Plans are normalised; their condition is the observation. ``steps`` may be left out: all
    positions count. With ``anchor_weight`` the batch may hold demonstrations, ``anchor_obs [B, To,
    O]`` and ``anchor_action [B, H, A]``, or ``anchor_tokens [B, L]`` (and ``anchor_cond [B, C]``);
    without them, or with ``anchor="chosen"``, the chosen (good) items are the anchor, at no further
    cost; with ``anchor="both"`` both are.

    Levels and noise come from ``generator`` alone, and chosen and rejected, tuned and reference
    denoiser share them, window by window. Scores of the reference build no graph.

    Metrics: ``accuracy``, ``gap`` and ``saturated`` of the loss; ``error_chosen`` and
    ``error_rejected`` (``error_good``, ``error_bad``), per entry, and with ``_reference`` the
    reference's: a gap that grows while both errors grow is the well-known way in which these losses
    go wrong; ``anchor``, its error.

    Args:
        denoiser: what is tuned.
        settings: which loss; None: the defaults.
        score: how items are scored; None: the default one of the denoiser's kind.
        reference: the pre-trained denoiser; frozen here, and always in evaluation mode. None: the
            denoiser with its adapters off (:mod:`diffpolicy.learn.adapters`) if it has any, else
            a copy of it as it is now.

    Raises:
        ValueError: a score that does not fit, dropout, a reference that shares weights with the
            denoiser, or one that the loss does not look at.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        settings: Preference | None = None,
        score: Score | None = None,
        *,
        reference: BaseDenoiser | None = None,
    ) -> None:
        settings = settings or Preference()
        super().__init__(denoiser, reference, needed=settings.needs_reference)
        self.settings = settings
        self.score = default_score(denoiser) if score is None else score
        for each in (denoiser, *([] if reference is None else [reference])):
            self.score.check(each)
        self.masked = isinstance(denoiser.process, MaskingProcess)

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        if self.settings.paired:
            out, anchors = self._pairs(batch, generator)
        else:
            out, anchors = self._feedback(batch, generator)
        if self.settings.anchor_weight == 0:
            return out
        demonstrations = batch_items(self.denoiser, batch, "anchor", masked=self.masked)
        if demonstrations is not None and self.settings.anchor != "chosen":
            error = drawn_error(self.score, self.denoiser, demonstrations, generator)
            anchors = error + anchors if self.settings.anchor == "both" else error
        metrics = {**out.metrics, "anchor": anchors.detach().mean()}
        return LossOutput(out.loss + self.settings.anchor_weight * anchors, metrics)

    def _pairs(
        self, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[LossOutput, Tensor]:
        """The loss of pairs, and the errors of the chosen items ``[B]``."""
        chosen, rejected = pair_items(self.denoiser, batch, masked=self.masked)
        draw = self.score.draw(self.denoiser, chosen, generator).twice()
        both = joined(chosen, rejected)
        policy, reference = self._scores(both, draw)
        pair = () if reference is None else reference.chunk(2)
        out = preference_loss(self.settings, *policy.chunk(2), *pair)
        errors = self.score.error(both, policy).chunk(2)
        metrics = {**out.metrics, **_named(("chosen", "rejected"), errors)}
        if reference is not None:
            others = self.score.error(both, reference).chunk(2)
            metrics |= _named(("chosen", "rejected"), others, "_reference")
        return LossOutput(out.loss, metrics), errors[0]

    def _feedback(
        self, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[LossOutput, Tensor]:
        """The loss of single items, and the errors of the good ones, with mean as theirs."""
        items = batch_items(self.denoiser, batch, "", masked=self.masked)
        if items is None or "good" not in batch:
            wanted = "tokens and good" if self.masked else "obs, action and good"
            raise ValueError(f"loss='kto' needs a batch with {wanted}; got {sorted(batch)}")
        good = batch["good"].bool()
        draw = self.score.draw(self.denoiser, items, generator)
        policy, reference = self._scores(items, draw)
        assert reference is not None
        out = feedback_loss(self.settings, policy, reference, good)
        error, other = (self.score.error(items, found) for found in (policy, reference))
        shares = _share(good), _share(~good)
        metrics = {**out.metrics, **_named(("good", "bad"), [s * error for s in shares])}
        metrics |= _named(("good", "bad"), [s * other for s in shares], "_reference")
        return LossOutput(out.loss, metrics), shares[0] * error

    def _scores(self, items: Items, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Scores of what is tuned, and of the reference if the loss looks at them."""
        policy = self.score(self.denoiser, items, draw)
        if not self.settings.needs_reference:
            return policy, None
        with self.as_reference() as reference:
            return policy, self.score(reference, items, draw)


def _named(sides: tuple[str, str], errors: Sequence[Tensor], suffix: str = "") -> dict[str, Tensor]:
    """Mean errors of the two sides, by the names of their metrics."""
    named = zip(sides, errors, strict=True)
    return {f"error_{side}{suffix}": error.detach().mean() for side, error in named}


def _share(members: Tensor) -> Tensor:
    """Weights ``[B]`` whose mean with values is that of the members alone; 0 if there are none."""
    return members * (len(members) / members.sum().clamp_min(1))
