"""What a sequence design task is: an alphabet, a length, data to learn from and a reward.

What a task of your own needs is said by `diffpolicy.sequences.SequenceTask`, and nothing of this
package is among it; `BaseTask` brings the parts that are the same everywhere. Tasks need numpy
alone: torch is imported when a reward of tensors is asked for, and by nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

Tokens = NDArray[np.int8]
Values = NDArray[np.float32]
Kind = Literal["table", "measured", "black_box"]


class BaseTask(ABC):
    """The parts that every task shares: letters and tokens, and checks of both.

    Args:
        name: a short name for tables and file names.
        alphabet: distinct letters, at most 127; tokens are their places 0..V-1.
        length: letters L in a sequence, at least 1.
        kind: ``"table"``: every sequence has a known value, and `reward` is exact and
            differentiable; ``"measured"``: some sequences were measured, there is no reward, and
            oracles are learned from `measurements`; ``"black_box"``: `reward` answers for one-hot
            rows and has no gradient.

    Raises:
        ValueError: a letter is there twice, there are fewer than two, or `length` is below 1.
    """

    def __init__(self, name: str, alphabet: str, length: int, kind: Kind) -> None:
        if not 2 <= len(set(alphabet)) == len(alphabet) <= 127:
            raise ValueError(f"alphabet must be 2 to 127 distinct letters, got {alphabet!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.name = name
        self.alphabet = alphabet
        self.length = length
        self.kind: Kind = kind

    @property
    def vocab_size(self) -> int:
        """Number V of letters."""
        return len(self.alphabet)

    @abstractmethod
    def training_data(self) -> tuple[Tokens, Values | None]:
        """Sequences [N, L] that a generator is trained on, and their values [N] where known."""

    @abstractmethod
    def measurements(self) -> tuple[Tokens, Values]:
        """Sequences [N, L] with a value [N] each, for learning an oracle."""

    @abstractmethod
    def reward(self, x: Tensor) -> Tensor:
        """Reward [B] of one-hot rows [B, L, V]; see ``kind`` for what it means."""

    def scores(self, tokens: ArrayLike) -> Values:
        """Reward of integer sequences, through `reward` unless a task knows a shorter way.

        Args:
            tokens: sequences [N, L], values 0..V-1.

        Returns:
            Rewards [N], float32.

        Raises:
            ValueError: the tokens are not such sequences.
        """
        import torch

        hard = np.eye(self.vocab_size, dtype=np.float32)[self.check_tokens(tokens)]
        with torch.no_grad():
            return self.reward(torch.from_numpy(hard)).numpy().astype(np.float32)

    def valid(self, tokens: ArrayLike) -> NDArray[np.bool_]:
        """Which of the sequences [N, L] are admissible, [N]: all, unless a task says otherwise."""
        return np.ones(len(self.check_tokens(tokens)), dtype=np.bool_)

    def encode(self, sequences: Sequence[str]) -> Tokens:
        """Tokens [N, L] of written sequences.

        Args:
            sequences: strings of L letters of the alphabet.

        Raises:
            ValueError: a sequence has another length or a letter that is not in the alphabet.
        """
        letters = set(self.alphabet)
        for text in sequences:
            if len(text) != self.length or not letters.issuperset(text):
                raise ValueError(
                    f"{self.name} takes sequences of {self.length} letters of {self.alphabet!r}, "
                    f"got {text!r}"
                )
        order = np.argsort(_codes(self.alphabet))
        ranks = np.searchsorted(_codes(self.alphabet)[order], _codes("".join(sequences)))
        return order[ranks].astype(np.int8).reshape(-1, self.length)

    def decode(self, tokens: ArrayLike) -> list[str]:
        """Written form of tokens [N, L], values 0..V-1."""
        letters = np.array(list(self.alphabet))
        return ["".join(row) for row in letters[self.check_tokens(tokens)]]

    def check_tokens(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Tokens as int64 [N, L], after a check of their type, shape and range.

        Raises:
            ValueError: they are no integers, not of shape [N, L], or not in 0..V-1.
        """
        array = np.asarray(tokens)
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != self.length:
            raise ValueError(
                f"{self.name} takes integer tokens [N, {self.length}], got {array.dtype} of shape "
                f"{list(array.shape)}"
            )
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(
                f"tokens of {self.name} are 0..{self.vocab_size - 1} (no mask token), got values "
                f"{array.min()}..{array.max()}"
            )
        return array.astype(np.int64)

    def check_rows(self, x: Tensor) -> None:
        """Refuse anything but float rows [B, L, V].

        Raises:
            ValueError: `x` is of another type or shape.
        """
        if (
            x.ndim != 3
            or x.shape[1:] != (self.length, self.vocab_size)
            or not x.is_floating_point()
        ):
            raise ValueError(
                f"the reward of {self.name} takes float rows [B, {self.length}, {self.vocab_size}] "
                f"(no mask channel), got {x.dtype} of shape {list(x.shape)}"
            )


def _codes(text: str) -> NDArray[np.uint32]:
    """Code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def check_fraction(name: str, value: float) -> None:
    """Refuse a fraction outside (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def load_arrays(path: Any, names: Sequence[str], hint: str) -> dict[str, NDArray[Any]]:
    """Named arrays of an .npz file, without unpickling.

    Args:
        path: the file.
        names: arrays that must be in it.
        hint: what the file should be and where it comes from, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks one of the arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if not missing:
                return {name: archive[name] for name in names}
            found = ", ".join(archive.files)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(path)!r}; expected {hint}") from None
    raise ValueError(f"{str(path)!r} has no array {missing[0]!r}, only {found}; expected {hint}")
