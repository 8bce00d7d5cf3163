"""The reference that a tuned denoiser is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import torch
from torch import nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.learn.adapters import adapters_off, has_adapters

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
D = TypeVar("D", bound=BaseDenoiser)


def frozen_copy(denoiser: D) -> D:
    """A copy in evaluation mode whose parameters take no gradient: the reference of a tuning."""
    return copy.deepcopy(denoiser).requires_grad_(requires_grad=False).eval()


def dropout_of(module: nn.Module) -> float:
    """The share of its inputs that one layer drops in training mode."""
    share = module.p if isinstance(module, DROPOUT) else getattr(module, "dropout", 0.0)
    return float(share) if isinstance(share, int | float) else 0.0


def check_no_dropout(denoiser: nn.Module) -> None:
    """Raise ``ValueError`` if two evaluations at the same noise may differ."""
    for module in denoiser.modules():
        if (share := dropout_of(module)) > 0:
            what = f"dropout={share} in {type(module).__name__}"
            raise ValueError(f"{what} makes comparisons random; pre-train with dropout=0")


class Referenced(nn.Module):
    """An objective that compares a denoiser with its frozen, pre-trained self.

    Args:
        denoiser: what is tuned.
        reference: frozen here, and always in evaluation mode; None: the denoiser with its adapters
            off (:mod:`diffpolicy.learn.adapters`) if it has any, else a copy of it as it is now.
        needed: whether the objective looks at a reference at all; if not, it has none.
        apart: chains evaluate the two in turns, so that the reference always has weights of its
            own, and dropout does no harm.

    Raises:
        ValueError: dropout, or a reference that shares weights with the denoiser.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        reference: BaseDenoiser | None,
        *,
        needed: bool = True,
        apart: bool = False,
    ) -> None:
        super().__init__()
        if not needed:
            reference = None
        elif reference is None and (apart or not has_adapters(denoiser)):
            reference = frozen_copy(denoiser)
        elif reference is not None:
            own = {id(p) for p in reference.parameters()}
            if any(id(p) in own for p in denoiser.parameters()):
                raise ValueError("the reference shares weights with the denoiser; give a copy")
            reference.requires_grad_(requires_grad=False).eval()
        for each in (denoiser, reference):
            if each is not None and not apart:
                check_no_dropout(each)
        self.denoiser, self.reference = denoiser, reference

    def train(self, mode: bool = True) -> Self:
        """Training mode, of all but frozen parts: the reference, copies of the denoiser."""
        super().train(mode)
        for part in self.children():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
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
