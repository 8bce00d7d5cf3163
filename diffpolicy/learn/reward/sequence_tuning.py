"""What objectives of reward tuning on masked sequences share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import one_hot
from diffpolicy.learn.method import Method, Reward, check_rewards
from diffpolicy.learn.reference import Referenced, check_no_dropout
from diffpolicy.learn.reward.replay import Replay, check_replay
from diffpolicy.learn.reward.rollouts import MaskedRollout, draw_rollout
from diffpolicy.settings import check_range


class SequenceMethod(Method):
    """A method that tunes a model of sequences by a reward of its own."""

    items: ClassVar[str] = "sequences"

    def reads(self) -> frozenset[str]:
        """A reward, of own sequences."""
        return frozenset({"reward"})


@dataclass(frozen=True)
class ReplayMethod(SequenceMethod):
    """A method that learns from a buffer of own sequences.

    Args:
        kl_weight: alpha, reward per nat, positive.
        buffer: sequences kept, N.
        refresh: sequences replaced by new ones, the oldest first.
        refresh_every: optimiser steps between that.
        num_steps: see :func:`diffpolicy.learn.reward.rollouts.draw_rollout`.

    Raises:
        ValueError: a value out of range, or sizes that do not divide.
    """

    kl_weight: float = 0.1
    buffer: int = 512
    refresh: int = 128
    refresh_every: int = 1
    num_steps: int | None = None

    def __post_init__(self) -> None:
        check_range("(0, inf)", kl_weight=self.kl_weight)
        check_range("[1, inf)", num_steps=self.num_steps)
        group_size = getattr(self, "group_size", None) or 1
        check_replay(self.buffer, self.refresh, self.refresh_every, group_size)


class SequenceTuning(Referenced):
    """What the objectives of this kind share: who is trained, the frozen reference, the reward.

    Call :meth:`after_step` after every optimiser step.

    Args:
        denoiser: trained.
        reference: the pre-trained one; frozen here, and always in evaluation mode. None: a copy of
            ``denoiser`` as it is now.
        reward: ``[B, L, V] -> [B]`` of hard one-hot sequences (no mask channel), called without
            gradients: anything goes. If it is a module, it is not part of this one.

    Raises:
        ValueError: a reference of other sizes, or one that shares weights with the denoiser.
    """

    denoiser: MaskedDenoiser
    reference: MaskedDenoiser

    def __init__(
        self, denoiser: MaskedDenoiser, reference: MaskedDenoiser | None, reward: Reward
    ) -> None:
        super().__init__(denoiser, reference, apart=True)
        check_no_dropout(denoiser)
        for name, mine, theirs in (
            ("vocab_size", denoiser.vocab_size, self.reference.vocab_size),
            ("length", denoiser.network.horizon, self.reference.network.horizon),
        ):
            if mine != theirs:
                raise ValueError(f"the denoiser has {name}={mine}, the reference {theirs}")
        self._reward = [reward]

    def after_step(self) -> None:
        """Tell the objective that an optimiser step was made."""

    @property
    def length(self) -> int:
        """L."""
        length: int = self.denoiser.network.horizon  # type: ignore[assignment]
        return length

    @property
    def cond_dim(self) -> int:
        """C, 0 if the network takes no condition."""
        return int(getattr(self.denoiser.network, "cond_dim", 0))

    def make_replay(
        self,
        sizes: tuple[int, int, int],
        more: Mapping[str, tuple[Sequence[int], torch.dtype]] | None = None,
    ) -> Replay:
        """A buffer of own sequences, on the denoiser's device.

        ``sizes`` are its rows, how many are replaced at once, and the optimiser steps between.

        Its columns are ``tokens``, ``reward``, ``kl``, ``cond`` where the network takes one, and
        ``more``.
        """
        columns: dict[str, tuple[Sequence[int], torch.dtype]] = {
            "tokens": ((self.length,), torch.long),
            "reward": ((), torch.float32),
            "kl": ((), torch.float32),
            **(more or {}),
        }
        if self.cond_dim:
            columns["cond"] = ((self.cond_dim,), torch.float32)
        replay = Replay(*sizes, columns)
        return replay.to(next(self.denoiser.parameters()).device)

    def evaluations(self, num_steps: int | None) -> int:
        """The most network evaluations that a rollout of so many steps takes.

        Raises:
            ValueError: ``None`` for a denoiser that depends on the level.
        """
        if num_steps is None:
            if not self.denoiser.time_free:
                raise ValueError("a denoiser that depends on the level needs num_steps=K")
            return self.length
        return min(num_steps, self.length) if self.denoiser.time_free else num_steps

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """The reward of clean tokens ``[B, L]``, ``[B]``."""
        clean = one_hot(tokens, self.denoiser.vocab_size)[..., :-1]
        return self.score_soft(clean.to(self.denoiser.weight.dtype))

    @torch.no_grad()
    def score_soft(self, x: Tensor) -> Tensor:
        """The reward of ``x [B, L, V]``, checked for its shape."""
        value = self._reward[0](x)
        check_rewards(value, x)
        return value.to(x)


class ReplayTuning(SequenceTuning):
    """An objective that learns from a buffer of own sequences, which is part of its state.

    ``settings`` are those of a :class:`ReplayMethod`. With ``group_size`` so many new sequences
    share a condition, without it all; with ``drawn_by="reference"`` the reference draws them.
    """

    def __init__(
        self,
        denoiser: MaskedDenoiser,
        reference: MaskedDenoiser | None,
        reward: Reward,
        settings: Any,
    ) -> None:
        super().__init__(denoiser, reference, reward)
        self.settings = settings
        self.evaluations(settings.num_steps)  # refuses what cannot be drawn
        sizes = settings.buffer, settings.refresh, settings.refresh_every
        self.replay = self.make_replay(sizes, self.columns())

    def columns(self) -> Mapping[str, tuple[Sequence[int], torch.dtype]]:
        """Further columns of the buffer."""
        return {}

    def after_step(self) -> None:
        self.replay.tick()

    def refill(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Replace the oldest sequences when it is time, and say how good those kept are."""
        rows = self.replay.due(training=self.training)
        if rows:
            self.replay.write(self.draw(rows, batch, generator))
        return {"reward": self.replay["reward"].mean(), "kl": self.replay["kl"].mean()}

    @torch.no_grad()
    def draw(
        self, rows: int, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """New rows of the buffer."""
        return self.roll_out(rows, batch, generator)[1]

    def roll_out(
        self, rows: int, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[MaskedRollout, dict[str, Tensor]]:
        """Sequences of whoever draws them, and what the buffer keeps of them."""
        by_reference = getattr(self.settings, "drawn_by", "denoiser") == "reference"
        group_size = getattr(self.settings, "group_size", rows) or 1
        rollout = draw_rollout(
            self.reference if by_reference else self.denoiser,
            rows,
            generator=generator,
            num_steps=self.settings.num_steps,
            reference=self.reference,
            cond=shared_cond(batch, rows, group_size),
        )
        new = {"tokens": rollout.tokens, "reward": self.score(rollout.tokens)}
        new["kl"] = rollout.path_kl
        if rollout.cond is not None:
            new["cond"] = rollout.cond
        return rollout, new


def shared_cond(batch: Mapping[str, Tensor], rows: int, group_size: int) -> Tensor | None:
    """Conditions ``[rows, C]`` of which each group of consecutive rows shares one.

    The first conditions of the batch are taken, from the start again if it has too few.
    """
    cond = batch.get("cond")
    if cond is None:
        return None
    return cond[(torch.arange(rows, device=cond.device) // group_size) % len(cond)]
