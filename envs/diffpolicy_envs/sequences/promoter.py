"""Mutated lac promoters with measured activity: no table, so oracles are learned (Kinney 2010)."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffpolicy_envs.sequences.task import BaseTask, Tokens, Values

if TYPE_CHECKING:
    from torch import Tensor

DATA = Path(__file__).parent / "data" / "lac_promoter.csv.gz"
WILD_TYPE = "AATTAATGTGAGTTAGCTCACTCATTAGGCACCCCAGGCTTTACACTTTATGCTTCCGGCTCGTATGTTGTGTGG"


class LacPromoter(BaseTask):
    """E. coli lac promoters of 75 bp: 50,518 mutants, 11.5 % of the bases changed on average.

    The activity of a sequence is the mean of the expression bins 0..9 in which its reads were found
    (Kinney et al., PNAS 107, 2010). There is about one read for each sequence, so a single label is
    very noisy (for the wild type: bins 8 and 9) and only a function fitted to thousands of them
    means something: learn an oracle on one of the `halves` to design with and one on the other
    to judge with. A reward of new sequences does not exist here.
    """

    def __init__(self) -> None:
        super().__init__("lac_promoter", "ACGT", 75, "measured")
        with gzip.open(DATA, "rt", newline="") as file:
            next(rows := csv.reader(file))  # set, ct_0 .. ct_9, x
            columns = list(zip(*rows, strict=True))
        bins = np.array(columns[1:11], dtype=np.float64).T
        self._tokens = self.encode(columns[11])
        self._activity = (bins @ np.arange(10.0) / bins.sum(axis=1)).astype(np.float32)
        self._reads = bins.sum(axis=1).astype(np.int64)

    @property
    def wild_type(self) -> str:
        """The unmutated promoter; also the most frequent base at every position."""
        return WILD_TYPE

    @property
    def reads(self) -> NDArray[np.int64]:
        """Reads [N] behind each of the `measurements`, 1 to 3: weights for a fit."""
        reads: NDArray[np.int64] = self._reads.copy()
        return reads

    def training_data(self) -> tuple[Tokens, Values]:
        """All sequences [50518, 75] with their activity [50518]."""
        return self.measurements()

    def measurements(self) -> tuple[Tokens, Values]:
        """All sequences [50518, 75] and their mean bin [50518], 0 to 9.

        The source's training, validation and test sets are merged.
        """
        return self._tokens.copy(), self._activity.copy()

    def halves(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Two disjoint random halves of the measurements, for two independent oracles.

        Copies of a sequence are never separated.

        Args:
            seed: seed of the split.

        Returns:
            Sorted row numbers of `measurements`, together all of them.
        """
        rows = np.ascontiguousarray(self._tokens).view(f"V{self.length}").reshape(-1)
        _, group = np.unique(rows, return_inverse=True)
        order = np.random.default_rng(seed).permutation(group.max() + 1)
        first = np.isin(group, order[: len(order) // 2])
        return np.flatnonzero(first), np.flatnonzero(~first)

    def reward(self, x: Tensor) -> Tensor:
        """There is none.

        Raises:
            RuntimeError: always, with what to do instead.
        """
        raise RuntimeError(
            "lac_promoter has measurements and no reward: learn an oracle from measurements() "
            "(halves(seed) separates the one to design with from the one to judge with), and give "
            "it to the environment as oracle=... if you need one there"
        )
