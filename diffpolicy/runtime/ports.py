"""What a loop takes and gives, as named arrays; compiled loops and exported files share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.data.observation import Array, ObsFields, to_fields, zeros
from diffpolicy.settings import check_shape

SEEN = "history"  # an array of observations, or ``history.NAME`` for each of several


class Port(NamedTuple):
    """One input or output; the axis ``"batch"`` is that of the rows."""

    name: str
    axes: tuple[int | str, ...]
    dtype: str = "float32"
    unit: str = ""

    def shape(self, rows: int) -> tuple[int, ...]:
        """The shape of ``rows`` rows."""
        return tuple(rows if isinstance(size, str) else size for size in self.axes)

    def check(self, value: Any, rows: int) -> None:
        """Raise ``ValueError`` unless an array or tensor is ``rows`` rows of this port."""
        check_shape(self.name, value.shape, self.shape(rows))
        if str(value.dtype).removeprefix("torch.") != self.dtype:
            raise ValueError(f"{self.name} must be {self.dtype}, got {value.dtype}")

    def fitted(self, value: Any, rows: int) -> Array:
        """An array in this port's type, refused where it is not one of its shape or not finite."""
        given = np.asarray(value)
        # Numbers become one another where nothing is lost but digits; bytes are images, or nothing.
        if self.dtype != "uint8" and (given.dtype.kind in "fiub"):
            given = given.astype(self.dtype, copy=False)
        self.check(given, rows)
        if given.dtype.kind == "f" and not np.isfinite(given).all():
            raise ValueError(f"{self.name} holds values that are not finite")
        if given.dtype.kind == "i" and (given < 0).any():
            raise ValueError(f"{self.name} must not be negative, got {int(given.min())}")
        return np.ascontiguousarray(given)


def seen_ports(fields: ObsFields, n_obs_steps: int) -> list[Port]:
    """The observations of a loop: one port per field, in the type that policies see."""
    arrays = to_fields(zeros(fields, (n_obs_steps,)), SEEN)
    unit = "environment, oldest first"
    return [Port(k, ("batch", *a.shape), a.dtype.name, unit) for k, a in arrays.items()]


def in_order(ports: Sequence[Port], given: Mapping[str, Any]) -> list[Any]:
    """The values of ports, refused where one is missing or there are more.

    Raises:
        ValueError: other names than those of the ports.
    """
    names = [port.name for port in ports]
    if set(names) != set(given):
        raise ValueError(f"the inputs must hold {names}, got {sorted(given)}")
    return [given[name] for name in names]


def in_groups(
    run: Callable[..., Any], ports: Sequence[Port], values: Sequence[Any], rows: int, size: int
) -> Iterator[tuple[Any, int]]:
    """Results of calls with exactly ``size`` rows each, and how many of these rows are wanted.

    The last group is filled up with copies of the last row.
    """
    if size == rows:
        yield run(*values), rows
        return
    for first in range(0, rows, size):
        index = np.minimum(np.arange(first, first + size), rows - 1)
        part = [
            value[index] if port.axes[0] == "batch" else value[:, index]
            for port, value in zip(ports, values, strict=True)
        ]
        yield run(*part), min(size, rows - first)
