"""The table tasks: binding of a transcription factor, a protein's fitness, splice sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffpolicy_envs.sequences.multilinear import TableTask, additive_ridge
from diffpolicy_envs.sequences.task import Tokens, check_fraction, load_arrays

DATA = Path(__file__).parent / "data"
SHIPPED_FACTOR = "SIX6_REF_R1"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


class TFBind8(TableTask):
    """Binding of a transcription factor to every DNA 8-mer: E-scores scaled to [0, 1].

    The reward is (E - min E) / (max E - min E) over the 65,536 measured E-scores of a
    protein-binding microarray (Barrera et al., Science 351, 2016). A sequence and its reverse
    complement share a value: split measurements with `split_pairs`, or the split leaks.

    Args:
        table: name of the measurement. ``"SIX6_REF_R1"`` comes with the package.
        file: an .npz with the arrays ``x`` int [65536, 8] (A, C, G, T = 0..3) and
            ``<table>_escore`` float [65536], for other factors; none for the shipped one.
        pretrain_fraction: see `TableTask`; both of a pair are in the training data, or neither.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table is not shipped and no file was given, the file lacks it, or it is
            not a complete table.
    """

    def __init__(
        self,
        table: str = SHIPPED_FACTOR,
        *,
        file: str | Path | None = None,
        pretrain_fraction: float = 0.5,
    ) -> None:
        if file is None and table != SHIPPED_FACTOR:
            raise ValueError(
                f"only {SHIPPED_FACTOR!r} comes with the package, got table={table!r}: give "
                f'file="....npz" with the arrays x int [65536, 8] and {table}_escore float [65536]'
            )
        escore = _shipped_escores() if file is None else _read_escores(file, table)
        reward = (escore - escore.min()) / (escore.max() - escore.min())
        grid = reward.reshape((4,) * 8)
        super().__init__(f"tfbind8_{table}", "ACGT", grid, pretrain_fraction=pretrain_fraction)
        self.escore: NDArray[np.float64] = escore
        """E-scores [65536] in lexicographic order, -0.5 to 0.5."""

    def reverse_complement(self, tokens: ArrayLike) -> Tokens:
        """The other strand [N, L] of sequences [N, L], read in its own direction."""
        return (3 - self.check_tokens(tokens)[:, ::-1]).astype(np.int8)

    def split_pairs(
        self, fraction: float, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A random split of all sequences that never separates a reverse-complement pair.

        Args:
            fraction: share of the 32,896 pairs (a palindrome is its own pair) in the first part,
                above 0 and at most 1.
            seed: seed of the split.

        Returns:
            Sorted row numbers of `measurements`, together all 65,536.
        """
        check_fraction("fraction", fraction)
        partner = self.reverse_complement(self.all_tokens()) @ self._powers
        pair, group = np.unique(np.minimum(np.arange(len(partner)), partner), return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(pair))
        first = np.isin(group.reshape(-1), order[: round(fraction * len(pair))])
        return np.flatnonzero(first), np.flatnonzero(~first)


def _shipped_escores() -> NDArray[np.float64]:
    """E-scores [65536] of SIX6, of which the file holds one of each reverse-complement pair."""
    half = load_arrays(DATA / "six6_ref_r1.npz", ["escore"], "the package's own data")["escore"]
    number = np.arange(4**8)
    partner = sum((3 - number // 4**i % 4) * 4 ** (7 - i) for i in range(8))
    first = np.minimum(number, partner)
    escore: NDArray[np.float64] = half[np.searchsorted(number[number <= partner], first)] * 1e-5
    return escore


def _read_escores(file: str | Path, table: str) -> NDArray[np.float64]:
    """E-scores [65536] of a user's file, put into lexicographic order."""
    key = f"{table}_escore"
    hint = f"a complete 8-mer table: arrays x int [65536, 8] and {key} float [65536]"
    arrays = load_arrays(file, ["x", key], hint)
    tokens, found = arrays["x"].astype(np.int64), arrays[key]
    if tokens.shape != (4**8, 8) or found.shape != (4**8,):
        raise ValueError(f"{str(file)!r} has x {tokens.shape} and {key} {found.shape}, not {hint}")
    index = tokens @ 4 ** np.arange(7, -1, -1)
    if not np.array_equal(np.sort(index), np.arange(4**8)) or not np.isfinite(found).all():
        raise ValueError(f"{str(file)!r} does not hold every 8-mer once with a finite {key}")
    escore = np.empty(4**8)
    escore[index] = found
    return escore


class GB1(TableTask):
    """Fitness of protein G domain B1 at four interacting sites: 20^4 variants (Wu et al. 2016).

    The reward is log(1 + fitness) / log(1 + highest fitness), in [0, 1]: 0 for a dead variant, 0.30
    for the wild type VDGV (fitness 1), 1 for the best (FWAA, 8.76). 149,361 of the 160,000 variants
    were measured. The others are imputed by an additive ridge regression of log(fitness + 0.01) on
    the four letters; on held-out measured variants it correlates 0.68 with the log and 0.62 with
    the reward, and it hardly ever predicts a good variant, so a design among the imputed ones says
    little: see `measured`.

    Args:
        file: an .npz with the arrays ``x`` int [N, 4], ``fitness`` float [N] and ``alphabet`` [20]
            single letters. It does not come with the package; the measurements are the file
            ``splits/gb1/four_mutations_full_data.csv.zip`` of the FLIP benchmark.
        pretrain_fraction: see `TableTask`. Half of the variants are dead (fitness below 0.004), so
            the default is 0.9 (fitness below 0.05).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file was given, or it is another one.
    """

    def __init__(self, file: str | Path | None = None, *, pretrain_fraction: float = 0.9) -> None:
        hint = (
            "an .npz with x int [N, 4], fitness float [N] and alphabet [20], made from the file "
            "splits/gb1/four_mutations_full_data.csv.zip of the FLIP benchmark (Wu et al. 2016)"
        )
        if file is None:
            raise ValueError(f'the GB1 landscape is not shipped: give file="gb1.npz", {hint}')
        arrays = load_arrays(file, ["x", "fitness", "alphabet"], hint)
        fitness = arrays["fitness"].astype(np.float64)
        tokens = _sites(arrays["x"], "".join(arrays["alphabet"]), len(fitness), file, hint)
        seen = np.zeros((20,) * 4, np.bool_)
        seen[tuple(tokens.T)] = True
        table = np.exp(additive_ridge(tokens, np.log(fitness + 0.01), seen)) - 0.01
        table = table.clip(0.0, fitness.max())
        table[tuple(tokens.T)] = fitness
        reward = np.log1p(table) / np.log1p(fitness.max())
        fraction = pretrain_fraction
        super().__init__("gb1", AMINO_ACIDS, reward, pretrain_fraction=fraction, measured=seen)

    @property
    def wild_type(self) -> str:
        """The four letters of the natural protein, V39 D40 G41 V54."""
        return "VDGV"


def _sites(
    x: NDArray[Any], alphabet: str, count: int, file: str | Path, hint: str
) -> NDArray[np.int64]:
    """Tokens [N, 4] in the order of `AMINO_ACIDS`, whatever the file's own order is."""
    if sorted(alphabet) != sorted(AMINO_ACIDS) or x.shape != (count, 4):
        raise ValueError(
            f"{str(file)!r} has x {x.shape}, {count} fitness values and alphabet {alphabet!r}; "
            f"expected {hint}"
        )
    order = np.array([AMINO_ACIDS.index(letter) for letter in alphabet])
    return order[x.astype(np.int64)]


class SpliceSite(TableTask):
    """Strength of 5' splice sites NNN/GYNNNN: log10 PSI scaled to [0, 1] (Wong et al. 2018).

    30,483 of the 32,768 sites with GC or GU at positions 4 and 5 were measured, in the BRCA2 exon
    17 context; the others are imputed by an additive ridge regression (see `measured`). Every other
    9-mer is not a splice site here: not `valid`, with reward 0.

    Args:
        pretrain_fraction: see `TableTask`.
    """

    def __init__(self, *, pretrain_fraction: float = 0.5) -> None:
        path = DATA / "splice_site.npz"
        sites = load_arrays(path, ["log10_psi"], "the package's own data")["log10_psi"]
        psi = np.full((4,) * 9, np.nan)
        for i, second in enumerate((1, 3)):  # C and U
            psi[:, :, :, 2, second] = sites[:, :, :, i]
        allowed = np.zeros(psi.shape, np.bool_)
        allowed[:, :, :, 2, 1::2] = True
        measured = np.isfinite(psi)
        low, high = np.nanmin(psi), np.nanmax(psi)
        guess = additive_ridge(np.argwhere(measured), psi[measured], measured).clip(low, high)
        table = np.where(measured, psi, np.where(allowed, guess, low))
        super().__init__(
            "splice_site",
            "ACGU",
            (table - low) / (high - low),
            pretrain_fraction=pretrain_fraction,
            measured=measured,
            admissible=allowed,
        )
