"""Preference losses on a denoiser's own sequences, which a reward labels as an annotator would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Reward
from diffpolicy.learn.preferences.dpo import PreferenceLoss
from diffpolicy.learn.preferences.formulas import Preference
from diffpolicy.learn.preferences.online import DRAWN_BY
from diffpolicy.learn.preferences.scores import MaskedScore
from diffpolicy.learn.reward.sequence_tuning import ReplayMethod, ReplayTuning
from diffpolicy.settings import check_choice, check_range


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

    draws: int = 4
    drawn_by: str = "denoiser"

    def __post_init__(self) -> None:
        Preference.__post_init__(self)
        ReplayMethod.__post_init__(self)
        check_choice("drawn_by", self.drawn_by, DRAWN_BY)
        check_range("[1, inf)", draws=self.draws)

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

    Metrics: those of :class:`~diffpolicy.learn.preferences.dpo.PreferenceLoss`, ``reward`` (mean of
    the buffer) and ``kl`` (of those who drew it to the reference, path, nats).

    Args:
        denoiser: trained.
        reference: frozen; None: a copy of ``denoiser`` as it is now.
        reward: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
        settings: which.

    Raises:
        ValueError: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
    """

    def __init__(
        self,
        denoiser: MaskedDenoiser,
        reference: MaskedDenoiser | None,
        reward: Reward,
        settings: SequenceDPO,
    ) -> None:
        super().__init__(denoiser, reference, reward, settings)
        looked_at = self.reference if settings.needs_reference else None
        score = MaskedScore(draws=settings.draws)
        loss = PreferenceLoss(denoiser, settings, score, reference=looked_at)
        self._loss = [loss]  # a list: its denoisers are those of this module

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
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
        cond = self.replay["cond"][first] if self.cond_dim else None
        if cond is not None:  # a partner under the same condition, or the sequence itself
            same = (self.replay["cond"][other] == cond).all(1)
            other = torch.where(same, other, first)
        reward = self.replay["reward"]
        chance = torch.sigmoid((reward[first] - reward[other]) / self.settings.label_scale)
        wins = (self._uniform(size, generator) < chance).unsqueeze(1)
        one, two = self.replay["tokens"][first], self.replay["tokens"][other]
        batch = {"chosen": torch.where(wins, one, two), "rejected": torch.where(wins, two, one)}
        return batch if cond is None else {**batch, "cond": cond}

    def labels(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``size`` sequences of the buffer, good or bad."""
        rows = self._picked(size, generator)
        reward = self.replay["reward"]
        chance = torch.sigmoid((reward[rows] - reward.mean()) / self.settings.label_scale)
        good = self._uniform(size, generator) < chance
        batch = {"tokens": self.replay["tokens"][rows], "good": good}
        return {**batch, "cond": self.replay["cond"][rows]} if self.cond_dim else batch

    def _picked(self, size: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(
            self.replay.slots, (size,), generator=generator, device=generator.device
        )
        return rows.to(self.replay["reward"].device)

    def _uniform(self, size: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(size, generator=generator, device=generator.device)
        return u.to(self.replay["reward"].device)
