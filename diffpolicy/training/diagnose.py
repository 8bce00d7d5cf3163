"""Where a value that is not finite came from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """Training met a value that is not finite; the message names the step and the culprit."""


def explain_non_finite(
    step: int, batch: Mapping[str, Tensor], indices: Tensor, losses: Tensor, objective: nn.Module
) -> str:
    """One sentence: the batch entry, the loss rows or the gradient at fault, in that order.

    Args:
        step: optimiser step (from 0).
        batch: what the objective was given.
        indices: rows of the source that the batch holds.
        losses: the objective's answer ``[B]``.
        objective: its parameters hold the gradients.
    """
    start = f"training stopped at step {step}: "
    for name, value in batch.items():
        bad = _rows(value)
        if bad:
            rows = indices[bad].tolist()[:10]
            return (
                f"{start}batch entry {name!r} is not finite in source rows {rows}; check the data"
            )
    for name, parameter in objective.named_parameters():
        if not torch.isfinite(parameter).all():
            return start + f"parameter {name!r} is not finite; lower the learning rate"
    bad = _rows(losses)
    if bad:
        rows = indices[bad].tolist()[:10]
        return f"{start}the loss is not finite for source rows {rows} of a finite batch"
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    named = [n for n, grad in gradients.items() if not torch.isfinite(grad).all()]
    return f"{start}the gradient of {named[:5]} is not finite; lower the learning rate"


def _rows(value: Tensor) -> list[int]:
    if not value.is_floating_point():
        return []
    finite = torch.isfinite(value).reshape(len(value), -1).all(1)
    found: list[int] = torch.nonzero(~finite).flatten().tolist()
    return found


NO_GRADIENT = (
    "the loss does not depend on the trainable weights, so nothing would be learned. What it is "
    "computed by (a reward, for instance) must be differentiable operations of torch alone, with "
    "no .detach(), .numpy(), .item(), no_grad, argmax or comparison in between"
)


class Movement:
    """Warn of a loss whose gradient begins as zero.

    It may do so rightly: comparisons that all tie, positions that are all masked.
    """

    FIRST = 3

    def __init__(self) -> None:
        self._idle = 0

    def check(self, step: int, norm: Tensor) -> None:
        """Warn if the norm of the gradient was 0 at each of the first steps."""
        if self._idle == step < self.FIRST and not norm.item():
            self._idle += 1
            if self._idle == self.FIRST:
                text = f"the gradient of the first {self.FIRST} steps is exactly zero"
                warnings.warn(
                    f"{text}; if it stays so, {NO_GRADIENT}", RuntimeWarning, stacklevel=2
                )
