"""The reference that a tuned denoiser is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.learn.adapters import adapters_off, has_adapters
from diffpolicy.learn.preferences.scores import check_no_dropout
from diffpolicy.learn.reward.pathwise import frozen_copy


class Referenced(nn.Module):
    """An objective that compares a denoiser with its frozen, pre-trained self.

    Args:
        denoiser: what is tuned.
        reference: frozen here, and always in evaluation mode; None: the denoiser with its adapters
            off (:mod:`diffpolicy.learn.adapters`) if it has any, else a copy of it as it is now.
        needed: whether the objective looks at a reference at all; if not, it makes none.

    Raises:
        ValueError: dropout, a reference that shares weights with the denoiser, or one that the
            objective does not look at.
    """

    def __init__(
        self, denoiser: BaseDenoiser, reference: BaseDenoiser | None, *, needed: bool = True
    ) -> None:
        super().__init__()
        check_no_dropout(denoiser)
        if reference is None and needed and not has_adapters(denoiser):
            reference = frozen_copy(denoiser)
        elif reference is not None:
            if not needed:
                raise ValueError("these settings look at no reference; leave reference=None")
            _check_separate(denoiser, reference)
            check_no_dropout(reference)
        self.denoiser, self.reference = denoiser, reference
        if reference is not None:
            reference.requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode, of all but the reference."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    @contextmanager
    def as_reference(self) -> Iterator[BaseDenoiser]:
        """The reference, within a block without gradients."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
            else:
                with adapters_off(self.denoiser):
                    yield self.denoiser


def _check_separate(denoiser: BaseDenoiser, reference: BaseDenoiser) -> None:
    own = {id(p) for p in reference.parameters()}
    if any(id(p) in own for p in denoiser.parameters()):
        raise ValueError(
            "the reference shares weights with the denoiser; give it its own, "
            "reference=frozen_copy(denoiser), or None"
        )


__all__ = ["Referenced"]
