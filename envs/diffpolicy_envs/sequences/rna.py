"""RNA folding: a true black box, computed by dynamic programming over secondary structures."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import ArrayLike

from diffpolicy_envs.sequences.task import BaseTask, Tokens, Values

if TYPE_CHECKING:
    from torch import Tensor

PRIOR_SIZE = 20_000
"""Random sequences in the training data."""


class Fold(NamedTuple):
    """The most stable secondary structure of a sequence.

    Attributes:
        structure: dot-bracket string of L characters.
        energy: free energy in kcal/mol at 37 degrees C; 0 for the open chain, never above.
    """

    structure: str
    energy: float


class RNAFolding(BaseTask):
    """Design of RNA by its minimum-free-energy (MFE) structure.

    Without a target the reward is -MFE / L in kcal/mol for each nucleotide: 0 for a sequence that
    does not fold, about 0.1 for a random one of 30 nt, 0.8 and more for one long GC hairpin. That
    hairpin is the whole optimum, so this reward alone is hacked at once: keep to the prior (a KL
    term), or give a target.

    Args:
        target: dot-bracket string with at least one pair, or None.
        length: nucleotides L; with a target it is the target's, and need not be given. 30 without.
        engine: ``"vienna"`` (ViennaRNA), ``"seqfold"``, or ``"auto"``: the first of the two that is
            installed. Their energies differ (correlation 0.93 on random sequences of 12 to 60 nt;
            seqfold charges helices side by side as a multiloop, so targets of several stems need
            ViennaRNA): name the engine with a result.
        score: with a target, ``"pairs"``: the F1 score of the base pairs; ``"positions"``: the
            share of positions with the target's character, denser and easier to please.
        gc_content: probability of G or C at each position of the training data, in (0, 1).
        seed: seed of the training data.

    Raises:
        gymnasium.error.DependencyNotInstalled: the engine is missing.
        ValueError: the target is unbalanced or without a pair, its length differs from `length`,
            or another argument is out of its range.
    """

    def __init__(
        self,
        target: str | None = None,
        length: int | None = None,
        engine: Literal["auto", "vienna", "seqfold"] = "auto",
        *,
        score: Literal["pairs", "positions"] = "pairs",
        gc_content: float = 0.5,
        seed: int = 0,
    ) -> None:
        if target is not None and length not in (None, len(target)):
            raise ValueError(f"length={length}, but the target has {len(target)} positions")
        if score not in ("pairs", "positions"):
            raise ValueError(f'score must be "pairs" or "positions", got {score!r}')
        if not 0.0 < gc_content < 1.0:
            raise ValueError(f"gc_content must lie between 0 and 1, got {gc_content}")
        size = len(target) if target is not None else 30 if length is None else length
        super().__init__("rna_folding", "ACGU", size, "black_box")
        if target is not None and not base_pairs(target):
            raise ValueError(f"the target needs at least one base pair, got {target!r}")
        self.target = target
        self.score = score
        self.gc_content = gc_content
        self.seed = seed
        self.engine, self._fold = _engine(engine)
        self._rewards: Values | None = None

    def fold(self, sequence: str) -> Fold:
        """MFE structure of one sequence of the task's length, letters A, C, G, U."""
        self.encode([sequence])
        return self._fold(sequence)

    def training_data(self) -> tuple[Tokens, None]:
        """20,000 random sequences [20000, L] with the task's GC content, without values.

        There is no natural data set behind this task: the prior is made up, each position drawn on
        its own.
        """
        gc, at = self.gc_content / 2, (1 - self.gc_content) / 2
        rng = np.random.default_rng(self.seed)
        drawn = rng.choice(4, size=(PRIOR_SIZE, self.length), p=[at, gc, gc, at])
        return drawn.astype(np.int8), None

    def measurements(self) -> tuple[Tokens, Values]:
        """The training data with rewards [20000]; the first call folds all of it.

        That takes about 10 s at 30 nt, and 1 min at 50.
        """
        tokens, _ = self.training_data()
        if self._rewards is None:
            self._rewards = self.scores(tokens)
        return tokens, self._rewards.copy()

    def scores(self, tokens: ArrayLike) -> Values:
        """Rewards [N] of tokens [N, L], float32; copies of a sequence are folded once."""
        rows, inverse = np.unique(self.check_tokens(tokens), axis=0, return_inverse=True)
        values = [self._score(self._fold(text)) for text in self.decode(rows)]
        return np.array(values, dtype=np.float32)[inverse.reshape(-1)]

    def reward(self, x: Tensor) -> Tensor:
        """Rewards of one-hot rows, computed on the CPU and without a gradient.

        Args:
            x: one-hot rows [B, L, V], not part of a graph.

        Returns:
            Rewards [B] on the device of `x`, float32.

        Raises:
            ValueError: a row is soft, or `x` requires a gradient that does not exist.
        """
        import torch

        self.check_rows(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the folding reward has no gradient: use a method that needs none, back-propagate "
                "through an oracle learned from measurements(), or pass x.detach()"
            )
        rows = x.detach().float().cpu()
        tokens = rows.argmax(dim=-1)
        hard = torch.nn.functional.one_hot(tokens, self.vocab_size)
        if not torch.allclose(rows, hard.float(), atol=1e-3):
            raise ValueError("the folding reward takes one-hot rows, got soft ones: draw letters")
        return torch.from_numpy(self.scores(tokens.numpy())).to(x.device)

    def _score(self, fold: Fold) -> float:
        """Reward of a folded sequence."""
        if self.target is None:
            return abs(fold.energy) / self.length
        if self.score == "positions":
            same = sum(a == b for a, b in zip(fold.structure, self.target, strict=True))
            return same / self.length
        found, wanted = base_pairs(fold.structure), base_pairs(self.target)
        return 2 * len(found & wanted) / (len(found) + len(wanted))


def base_pairs(structure: str) -> frozenset[tuple[int, int]]:
    """Pairs (i, j), i < j, of a dot-bracket string.

    Raises:
        ValueError: it is unbalanced, or has other characters than ``(``, ``)`` and ``.``.
    """
    opened: list[int] = []
    pairs = set()
    for j, character in enumerate(structure):
        if character == "(":
            opened.append(j)
        elif character == ")" and opened:
            pairs.add((opened.pop(), j))
        elif character != ".":
            raise ValueError(f"not a balanced dot-bracket string at position {j}: {structure!r}")
    if opened:
        raise ValueError(f"not a balanced dot-bracket string: {structure!r} leaves one open")
    return frozenset(pairs)


def _engine(name: str) -> tuple[str, Callable[[str], Fold]]:
    """The engine's own name and its fold function."""
    loaders = {"vienna": _vienna, "seqfold": _seqfold}
    if name not in ("auto", *loaders):
        raise ValueError(f'engine must be "auto", "vienna" or "seqfold", got {name!r}')
    for candidate in loaders if name == "auto" else (name,):
        try:
            return candidate, loaders[candidate]()
        except ImportError:
            continue
    if name == "vienna":
        raise DependencyNotInstalled("ViennaRNA is not installed. Run: pip install ViennaRNA")
    raise DependencyNotInstalled(
        'no RNA folding engine is installed. Run: pip install "diffpolicy[rna]"'
    )


def _vienna() -> Callable[[str], Fold]:
    """ViennaRNA, with its standard parameters (37 degrees C, dangles 2)."""
    engine = importlib.import_module("RNA")

    def fold(sequence: str) -> Fold:
        structure, energy = engine.fold(sequence)
        return Fold(str(structure), min(float(energy), 0.0))

    return fold


def _seqfold() -> Callable[[str], Fold]:
    """The seqfold package at 37 degrees C."""
    engine = importlib.import_module("seqfold")

    def fold(sequence: str) -> Fold:
        parts = engine.fold(sequence, 37.0)
        energy = float(sum(part.e for part in parts))
        # It always answers with some structure, with an infinite or positive energy where none is
        # stable; the open chain has energy 0.
        if not math.isfinite(energy) or energy >= 0.0:
            return Fold("." * len(sequence), 0.0)
        structure = ["."] * len(sequence)
        for part in parts:
            if len(part.ij) == 1:  # more are the branches of a multiloop, which follow on their own
                i, j = part.ij[0]
                structure[i], structure[j] = "(", ")"
        return Fold("".join(structure), energy)

    return fold
