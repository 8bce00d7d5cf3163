"""Preference optimisation: tuning a generator on what is better and worse, or good and bad.

One objective for continuous plans and for masked sequences: a loss of
:mod:`diffpolicy.learn.preferences.formulas` on scores of
:mod:`diffpolicy.learn.preferences.scores`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masking import MaskingProcess
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, Method
from diffpolicy.learn.preferences.formulas import (
    Preference,
    feedback_loss,
    named_errors,
    preference_loss,
)
from diffpolicy.learn.preferences.items import Draw, Items, batch_items, joined, pair_items
from diffpolicy.learn.preferences.online import DRAWN_BY, OnlineDPOLoss, OwnPlans
from diffpolicy.learn.preferences.scores import (
    DenoisingScore,
    MaskedScore,
    Score,
    default_score,
    drawn_error,
)
from diffpolicy.learn.reference import Referenced
from diffpolicy.learn.reward.sequence_tuning import ReplayMethod, ReplayTuning
from diffpolicy.settings import one_of, ranged


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
        reference: the pre-trained denoiser, where the loss looks at one; frozen here, and always in
            evaluation mode. None: the
            denoiser with its adapters off (:mod:`diffpolicy.learn.adapters`) if it has any, else
            a copy of it as it is now.

    Raises:
        ValueError: a score that does not fit, dropout, or a reference that shares weights with the
            denoiser.
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

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
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

    def _pairs(self, batch: Batch, generator: torch.Generator) -> tuple[LossOutput, Tensor]:
        """The loss of pairs, and the errors of the chosen items ``[B]``."""
        chosen, rejected = pair_items(self.denoiser, batch, masked=self.masked)
        draw = self.score.draw(self.denoiser, chosen, generator).twice()
        both = joined(chosen, rejected)
        policy, reference = self._scores(both, draw)
        pair = () if reference is None else reference.chunk(2)
        out = preference_loss(self.settings, *policy.chunk(2), *pair)
        errors = self.score.error(both, policy).chunk(2)
        metrics = {**out.metrics, **named_errors(("chosen", "rejected"), errors)}
        if reference is not None:
            others = self.score.error(both, reference).chunk(2)
            metrics |= named_errors(("chosen", "rejected"), others, "_reference")
        return LossOutput(out.loss, metrics), errors[0]

    def _feedback(self, batch: Batch, generator: torch.Generator) -> tuple[LossOutput, Tensor]:
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
        metrics = {**out.metrics, **named_errors(("good", "bad"), [s * error for s in shares])}
        metrics |= named_errors(("good", "bad"), [s * other for s in shares], "_reference")
        return LossOutput(out.loss, metrics), shares[0] * error

    def _scores(self, items: Items, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Scores of what is tuned, and of the reference if the loss looks at them."""
        policy = self.score(self.denoiser, items, draw)
        if not self.settings.needs_reference:
            return policy, None
        with self.as_reference() as reference:
            return policy, self.score(reference, items, draw)


def _share(members: Tensor) -> Tensor:
    """Weights ``[B]`` whose mean with values is that of the members alone; 0 if there are none."""
    return members * (len(members) / members.sum().clamp_min(1))


# ------------------------------------------------------------------ own sequences


@dataclass(frozen=True)
class SequenceDPO(Preference, ReplayMethod):
    """Which preference loss, who draws the sequences, and how they are labelled.

    The settings of the loss are those of
    :class:`~diffpolicy.learn.preferences.formulas.Preference`, ``kl_beta`` in nats, and those of
    the buffer :class:`~diffpolicy.learn.reward.sequence_tuning.ReplayMethod`'s.

    Two sequences are labelled by a Bradley-Terry model, ``P(1 above 2) = sigmoid((r_1 - r_2) / s)``
    with ``s = kl_weight / kl_beta``: the optimum of ``dpo`` is then ``p_ref exp(r / kl_weight)``,
    that of reward tuning, as far as the average over few masks stands for the log-likelihood; its
    variance makes the loss more cautious. ``kto`` reads single sequences that are good with chance
    ``sigmoid((r - mean) / s)``.

    Args:
        draws: masks of each pair that its scores are averaged over.
        drawn_by: ``"denoiser"``: the present one, so that comparisons follow it (online).
            ``"reference"``: comparisons of the pre-trained model's sequences alone.

    Raises:
        ValueError: an unknown choice, or a value out of range.
    """

    command: ClassVar[str] = "prefer"

    draws: int = ranged("[1, inf)", 4)
    drawn_by: str = one_of(*DRAWN_BY)

    def __post_init__(self) -> None:
        ReplayMethod.__post_init__(self)

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`SequenceDPOLoss`."""
        return SequenceDPOLoss(denoiser, material.reference, material.reward, self)

    @property
    def label_scale(self) -> float:
        """s, in units of the reward."""
        return self.kl_weight / self.kl_beta


class SequenceDPOLoss(ReplayTuning):
    """A preference loss on labelled sequences from a replay buffer (see :class:`SequenceDPO`).

    ``forward(batch, generator)`` takes ``index [B]`` and optionally ``cond [B, C]``; B pairs (or
    sequences, for ``kto``) are compared. Sequences, pairs, labels and masks come from
    ``generator``; the buffer is part of the state, and of one process. With conditions both
    sequences of a pair have the same one.

    Metrics: those of :class:`PreferenceLoss`, ``reward`` (mean of the buffer) and ``kl`` (of those
    who drew it to the reference, path, nats).

    Args:
        denoiser: trained.
        reference: frozen; None: a copy of ``denoiser`` as it is now.
        reward: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
        settings: which.

    Raises:
        ValueError: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
    """

    def prepare(self) -> None:
        super().prepare()
        looked_at = self.reference if self.settings.needs_reference else None
        score = MaskedScore(draws=self.settings.draws)
        loss = PreferenceLoss(self.denoiser, self.settings, score, reference=looked_at)
        self._loss = [loss]  # a list: its denoisers are those of this module

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        kept = self.refill(batch, generator)
        size = len(batch["index"])
        paired = self.settings.paired
        labelled = self.pairs(size, generator) if paired else self.labels(size, generator)
        out = self._loss[0](labelled, generator)
        return LossOutput(out.loss, {**kept, **out.metrics})

    def pairs(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``size`` pairs of the buffer with their labels, as a batch of the loss."""
        first = self._picked(size, generator)
        other = self._picked(size, generator)
        one, reward, cond = self.kept(first)
        if cond is not None:  # a partner under the same condition, or the sequence itself
            same = (self.replay["cond"][other] == cond).all(1)
            other = torch.where(same, other, first)
        two, less, _ = self.kept(other)
        wins = self._drawn(reward - less, generator).unsqueeze(1)
        batch = {"chosen": torch.where(wins, one, two), "rejected": torch.where(wins, two, one)}
        return batch if cond is None else {**batch, "cond": cond}

    def labels(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``size`` sequences of the buffer, good or bad."""
        tokens, reward, cond = self.kept(self._picked(size, generator))
        good = self._drawn(reward - self.replay["reward"].mean(), generator)
        batch = {"tokens": tokens, "good": good}
        return batch if cond is None else {**batch, "cond": cond}

    def _picked(self, size: int, generator: torch.Generator) -> Tensor:
        most, place = self.replay.slots, self.replay["reward"].device
        return torch.randint(most, (size,), generator=generator, device=generator.device).to(place)

    def _drawn(self, lead: Tensor, generator: torch.Generator) -> Tensor:
        """Whether a label says that what leads by so much is the better, bool ``[size]``."""
        u = torch.rand(len(lead), generator=generator, device=generator.device)
        return u.to(lead.device) < torch.sigmoid(lead / self.settings.label_scale)
