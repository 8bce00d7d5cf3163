"""A reward that is known for every sequence: a table, extended to soft one-hot rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffpolicy_envs.sequences.task import BaseTask, Tokens, Values, check_fraction

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TableTask(BaseTask):
    """A reward that is a table over all V^L sequences, extended multilinearly to soft ones.

    For rows x_1..x_L on the simplex the reward is the expectation of the table under independent
    letters, sum over s of table[s] prod_i x_i[s_i]. On one-hot rows that is the look-up, and the
    gradient with respect to x_i[v] is the table's value with letter v put at position i.

    Args:
        name: for tables and file names.
        alphabet: V distinct letters.
        table: rewards [V, ..., V] with L axes, finite.
        pretrain_fraction: `training_data` holds the sequences with a reward at or below this
            quantile of the measured ones, in (0, 1].
        measured: [V, ..., V], which values were measured; all by default.
        admissible: [V, ..., V], which sequences are `valid`; all by default.

    Raises:
        ValueError: an array has another shape, a reward is not finite, or the fraction is not
            in (0, 1].
    """

    def __init__(
        self,
        name: str,
        alphabet: str,
        table: ArrayLike,
        *,
        pretrain_fraction: float = 0.5,
        measured: ArrayLike | None = None,
        admissible: ArrayLike | None = None,
    ) -> None:
        values = np.asarray(table, dtype=np.float64)
        super().__init__(name, alphabet, max(values.ndim, 1), "table")
        check_fraction("pretrain_fraction", pretrain_fraction)
        if values.shape != (len(alphabet),) * values.ndim or not np.isfinite(values).all():
            raise ValueError(
                f"the table of {name} must be finite, with axes of length {len(alphabet)}, got "
                f"shape {list(values.shape)} with {(~np.isfinite(values)).sum()} values not finite"
            )
        masks = [
            np.ones(values.shape, np.bool_) if m is None else m for m in (measured, admissible)
        ]
        known, allowed = (np.asarray(mask, dtype=np.bool_) for mask in masks)
        if known.shape != values.shape or allowed.shape != values.shape:
            raise ValueError(f"measured and admissible must have the table's shape {values.shape}")
        self.pretrain_fraction = pretrain_fraction
        self._values = values.reshape(-1)
        self._known, self._allowed = known.reshape(-1), allowed.reshape(-1)
        self._powers = len(alphabet) ** np.arange(self.length - 1, -1, -1, dtype=np.int64)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def table(self) -> Tensor:
        """Rewards of all sequences, float32 [V, ..., V] on the CPU; axis i is position i."""
        import torch

        flat = torch.from_numpy(self._values).to(torch.float32)
        return flat.reshape((self.vocab_size,) * self.length)

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which values were measured, [V, ..., V]; the others are imputed."""
        return self._known.reshape((self.vocab_size,) * self.length).copy()

    def all_tokens(self) -> Tokens:
        """Every sequence [V^L, L] in lexicographic order, which is that of the flattened table."""
        number = np.arange(len(self._values))[:, None]
        return (number // self._powers % self.vocab_size).astype(np.int8)

    def best(self) -> tuple[str, float]:
        """The first sequence with the highest reward, and that reward."""
        index = int(np.where(self._allowed, self._values, -np.inf).argmax())
        return self.decode(self.all_tokens()[index : index + 1])[0], float(self._values[index])

    def training_data(self) -> tuple[Tokens, Values]:
        """Measured sequences [N, L] up to the `pretrain_fraction` quantile, and rewards [N]."""
        known = self._known & self._allowed
        threshold = np.quantile(self._values[known], self.pretrain_fraction)
        keep = known & (self._values <= threshold)
        return self.all_tokens()[keep], self._values[keep].astype(np.float32)

    def measurements(self) -> tuple[Tokens, Values]:
        """All measured sequences [N, L] in lexicographic order, and their rewards [N]."""
        keep = self._known & self._allowed
        return self.all_tokens()[keep], self._values[keep].astype(np.float32)

    def valid(self, tokens: ArrayLike) -> NDArray[np.bool_]:
        allowed: NDArray[np.bool_] = self._allowed[self.check_tokens(tokens) @ self._powers]
        return allowed

    def scores(self, tokens: ArrayLike) -> Values:
        """Rewards [N] of tokens [N, L] by look-up, float32."""
        values: Values = self._values[self.check_tokens(tokens) @ self._powers].astype(np.float32)
        return values

    def reward(self, x: Tensor) -> Tensor:
        """Multilinear reward of hard or soft rows, differentiable and exact.

        The table is contracted as a matrix between the outer products of the two halves of the
        rows: one matrix product, on one thread about 1 ms for 256 sequences of the 4^8 table, and
        2 ms for the gradient. On one-hot rows all other terms are exact zeros.

        Args:
            x: rows [B, L, V] on any device; half precision is computed in float32.

        Returns:
            Rewards [B].

        Raises:
            ValueError: `x` is of another type or shape.
        """
        import torch

        self.check_rows(x)
        rows = x if x.dtype == torch.float64 else x.to(torch.float32)
        split = self.length // 2
        with torch.autocast(x.device.type, enabled=False):
            left, right = _outer(rows[:, :split]), _outer(rows[:, split:])
            matrix = self._copy(rows.device, rows.dtype).reshape(left.shape[1], right.shape[1])
            return ((left @ matrix) * right).sum(dim=1)

    def _copy(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The flat table on a device, kept for the next call."""
        import torch

        if (device, dtype) not in self._copies:
            # A table made under inference mode could not take part in a graph afterwards.
            with torch.inference_mode(False):
                table = torch.from_numpy(self._values).to(device, dtype)
            self._copies[device, dtype] = table
        return self._copies[device, dtype]


def _outer(rows: Tensor) -> Tensor:
    """Outer product [B, V^k] of k rows [B, k, V]; ones [B, 1] for k = 0."""
    product = rows.new_ones(len(rows), 1)
    for i in range(rows.shape[1]):
        product = (product[:, :, None] * rows[:, None, i]).flatten(1)
    return product


def additive_ridge(
    tokens: NDArray[np.int64], target: NDArray[np.float64], seen: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Additive ridge regression (penalty 1) of values [N] on letters [N, L], for the whole grid.

    A letter that never occurs contributes nothing.
    """
    size, length = seen.shape[0], tokens.shape[1]
    hot = np.eye(size, dtype=np.float32)[tokens].reshape(len(tokens), -1)
    gram = (hot.T @ hot).astype(np.float64) + np.eye(size * length)
    weight = np.linalg.solve(gram, hot.T.astype(np.float64) @ (target - target.mean()))
    terms = weight.reshape(length, size)
    grid = np.full(seen.shape, target.mean())
    for i, term in enumerate(terms):
        grid += term.reshape([-1 if axis == i else 1 for axis in range(length)])
    return grid
