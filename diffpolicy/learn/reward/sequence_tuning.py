"""What objectives of reward tuning on masked sequences share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import one_hot
from diffpolicy.learn.method import Batch, Method, Reward, check_sizes, judged
from diffpolicy.learn.reference import Referenced, check_no_dropout
from diffpolicy.learn.reward.replay import Columns, Replay, check_replay
from diffpolicy.learn.reward.rollouts import MaskedRollout, check_steps, draw_rollout
from diffpolicy.settings import ranged


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

    kl_weight: float = ranged("(0, inf)", 0.1)
    buffer: int = 512
    refresh: int = 128
    refresh_every: int = 1
    num_steps: int | None = ranged("[1, inf)", None)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        settings: of the method.

    Raises:
        ValueError: a reference of other sizes, or one that shares weights with the denoiser.
            Of objectives with settings also ones that do not fit the denoiser.
    """

    denoiser: MaskedDenoiser
    reference: MaskedDenoiser

    def __init__(
        self,
        denoiser: MaskedDenoiser,
        reference: MaskedDenoiser | None,
        reward: Reward,
        settings: Any = None,
    ) -> None:
        super().__init__(denoiser, reference, apart=True)
        check_no_dropout(denoiser)
        theirs: Any = self.reference
        sizes = {"vocab_size": theirs.vocab_size, "length": theirs.length}
        check_sizes("the denoiser", denoiser, "the reference", **sizes)
        self.settings, self._reward = settings, [reward]
        self.prepare()

    def prepare(self) -> None:
        """Refuse settings that do not fit, and make the buffers that they ask for."""

    def after_step(self) -> None:
        """Tell the objective that an optimiser step was made."""

    @property
    def cond_dim(self) -> int:
        """C, 0 if the network takes no condition."""
        return int(getattr(self.denoiser.network, "cond_dim", 0))

    def make_replay(self, sizes: tuple[int, int, int], more: Columns) -> Replay:
        """A buffer of own sequences, on the denoiser's device.

        ``sizes`` are its rows, how many are replaced at once, and the optimiser steps between.

        Its columns are ``tokens``, ``reward``, ``kl``, ``cond`` where the network takes one, and
        ``more``.
        """
        number: tuple[tuple[int, ...], torch.dtype] = (), torch.float32
        tokens = (self.denoiser.length,), torch.long
        columns: dict[str, Any] = {"tokens": tokens, "reward": number, "kl": number, **more}
        if self.cond_dim:
            columns["cond"] = (self.cond_dim,), torch.float32
        return Replay(*sizes, columns).to(next(self.denoiser.parameters()).device)

    def evaluations(self, num_steps: int | None) -> int:
        """The most network evaluations that a rollout of so many steps takes.

        Raises:
            ValueError: ``None`` for a denoiser that depends on the level.
        """
        check_steps(self.denoiser, num_steps)
        steps = self.denoiser.length if num_steps is None else num_steps
        return min(steps, self.denoiser.length) if self.denoiser.time_free else steps

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """The reward of clean tokens ``[B, L]``, ``[B]``."""
        clean = one_hot(tokens, self.denoiser.vocab_size)[..., :-1]
        return self.score_soft(clean.to(self.denoiser.weight.dtype))

    @torch.no_grad()
    def score_soft(self, x: Tensor) -> Tensor:
        """The reward of ``x [B, L, V]``, checked for its shape."""
        return judged(self._reward[0], x).to(x)


class ReplayTuning(SequenceTuning):
    """An objective that learns from a buffer of own sequences, which is part of its state.

    ``settings`` are those of a :class:`ReplayMethod`. With ``group_size`` so many new sequences
    share a condition, without it all; with ``drawn_by="reference"`` the reference draws them.
    """

    def prepare(self) -> None:
        settings = self.settings
        check_steps(self.denoiser, settings.num_steps)
        sizes = settings.buffer, settings.refresh, settings.refresh_every
        self.replay = self.make_replay(sizes, self.columns())

    def columns(self) -> Columns:
        """Further columns of the buffer."""
        return {}

    def kept(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, rewards and conditions (``None``: it has none) of rows of the buffer."""
        cond = self.replay["cond"][rows] if self.cond_dim else None
        return self.replay["tokens"][rows], self.replay["reward"][rows], cond

    def after_step(self) -> None:
        self.replay.tick()

    def refill(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Replace the oldest sequences when it is time, and say how good those kept are."""
        rows = self.replay.due(training=self.training)
        if rows:
            self.replay.write(self.draw(rows, batch, generator))
        return {"reward": self.replay["reward"].mean(), "kl": self.replay["kl"].mean()}

    @torch.no_grad()
    def draw(self, rows: int, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """New rows of the buffer."""
        return self.roll_out(rows, batch, generator)[1]

    def roll_out(
        self, rows: int, batch: Batch, generator: torch.Generator
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
        reward = self.score(rollout.tokens)
        new = {"tokens": rollout.tokens, "reward": reward, "kl": rollout.path_kl}
        if rollout.cond is not None:
            new["cond"] = rollout.cond
        return rollout, new


def shared_cond(batch: Batch, rows: int, group_size: int) -> Tensor | None:
    """Conditions ``[rows, C]`` of which each group of consecutive rows shares one.

    The first conditions of the batch are taken, from the start again if it has too few.
    """
    cond = batch.get("cond")
    if cond is None:
        return None
    return cond[(torch.arange(rows, device=cond.device) // group_size) % len(cond)]
