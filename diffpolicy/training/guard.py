"""Stop on the first non-finite number, and say where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Output(Protocol):
    """What an objective returns: `loss` [B], one per example, and 0-dim `metrics`."""

    @property
    def loss(self) -> Tensor:
        """Loss per example [B]."""

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """0-dim tensors to log, averaged over the interval between two rows."""


class Culprit(NamedTuple):
    """Where a non-finite number was found first.

    Attributes:
        kind: "batch", "parameter", "loss", "gradient" or "unknown".
        name: batch key or parameter name; empty for the loss.
        rows: rows of the batch concerned (at most 8).
        indices: the same rows as indices of the source.
    """

    kind: str
    name: str
    rows: tuple[int, ...]
    indices: tuple[int, ...]


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity; the update was not made and nothing of it was saved.

    Attributes:
        step: the update (0-based) that could not be made.
        culprit: where the number was found.
    """

    def __init__(self, step: int, culprit: Culprit, message: str) -> None:
        super().__init__(f"non-finite numbers at step {step}: {message}")
        self.step, self.culprit = step, culprit


def probe(batch: Mapping[str, Tensor], loss: Tensor, grad_norm: Tensor) -> Tensor:
    """A 0-dim tensor that is 0 when batch, mean loss and gradient norm are finite, else NaN.

    It costs one sum per batch entry and no host synchronisation.
    """
    total = loss.detach().float() * 0.0 + grad_norm.float() * 0.0
    for value in batch.values():
        if value.is_floating_point():
            # A mean cannot overflow where the values are finite, as a sum could.
            total = total + value.mean(dtype=torch.float32) * 0.0
    return total


class Sentinel:
    """Reads probes on the host: at once on a CPU; on a GPU one step later, without a wait.

    In the late mode the optimiser is handed the flag on the device (`found_inf`, as gradient scalers
    do) and skips the update itself, so the parameters are still those from before the bad step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, late: bool) -> None:
        self.late = late
        self._optimizer = optimizer
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def submit(self, step: int, value: Tensor) -> int | None:
        """Hand in the probe of `step`; returns a step known by now to be bad, or None."""
        if not self.late:
            return step if value.item() != 0.0 else None
        bad = self.flush()
        found = (value != 0.0).float()
        self._optimizer.found_inf = found  # type: ignore[attr-defined]
        on_host = found.to("cpu", non_blocking=True)
        event = None
        if found.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, on_host, event)
        return bad

    def flush(self) -> int | None:
        """Wait for the probe still under way; returns its step if it is bad."""
        if self._pending is None:
            return None
        step, value, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        return step if value.item() != 0.0 else None


def diagnose(
    step: int,
    objective: nn.Module,
    batch: Mapping[str, Tensor],
    indices: Tensor,
    evaluate: Callable[[], Output],
) -> NonFiniteError:
    """Do a bad step again, slowly, and name what went wrong first.

    Args:
        step: the bad update.
        objective: its gradients are overwritten.
        batch: the step's batch.
        indices: [B] its indices into the source.
        evaluate: the step's forward pass, with the noise that it had.
    """
    for key, value in batch.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return _rows_error(step, "batch", key, value, indices)
    for name, parameter in objective.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return _named_error(step, "parameter", name, parameter,
                                "the weights were loaded or initialised with it")  # fmt: skip
    objective.zero_grad(set_to_none=True)
    loss = evaluate().loss
    if not bool(torch.isfinite(loss).all()):
        return _rows_error(step, "loss", "", loss.detach(), indices)
    loss.mean().backward()
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return _named_error(step, "gradient", name, parameter.grad,
                                "batch and loss are finite; a smaller lr or a square root or "
                                "division at 0 in the objective are the usual causes")  # fmt: skip
    return NonFiniteError(
        step,
        Culprit("unknown", "", (), ()),
        "doing the step again gave finite numbers (another rank's batch, an overflow of the total "
        "gradient norm, or an objective that changes from call to call)",
    )


def _rows_error(
    step: int, kind: str, name: str, value: Tensor, indices: Tensor
) -> NonFiniteError:
    bad = (~torch.isfinite(value)).reshape(len(value), -1)
    rows = bad.any(dim=1).nonzero().flatten().tolist()
    sources = [int(indices[row]) for row in rows]
    first = value[rows[0]].reshape(-1)[bad[rows[0]]][0].item()
    what = f"batch[{name!r}]" if kind == "batch" else "the loss"
    hint = (
        "check the data (`diffpolicy data check`)"
        if kind == "batch"
        else "the batch is finite, so the objective made it"
    )
    message = (
        f"{what} is {first} in {len(rows)} of {len(value)} rows: rows {_some(rows)}, indices of the "
        f"source {_some(sources)}; {hint}"
    )
    return NonFiniteError(step, Culprit(kind, name, tuple(rows[:8]), tuple(sources[:8])), message)


def _named_error(step: int, kind: str, name: str, value: Tensor, hint: str) -> NonFiniteError:
    bad = int((~torch.isfinite(value)).sum())
    what = f"{kind} {name!r}" if kind == "parameter" else f"the gradient of {name!r}"
    message = f"{what} has {bad} non-finite of {value.numel()} entries; {hint}"
    return NonFiniteError(step, Culprit(kind, name, (), ()), message)


def _some(values: Sequence[int]) -> str:
    return str(list(values[:8]))[:-1] + (", ...]" if len(values) > 8 else "]")
