"""A masked sequence model as plain values, how it is drawn from, and its training examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import MaskingProcess, make_masking, to_tokens
from diffpolicy.core.sampling import Transition
from diffpolicy.core.templated import Templated
from diffpolicy.networks.base import check_positive
from diffpolicy.networks.registry import sized_network
from diffpolicy.sequences.task import MASK_LETTER, check_alphabet
from diffpolicy.settings import check_choice, check_range, check_settings, check_shape, ranged
from diffpolicy.training.settings import TrainerConfig

FREE = "."  # a position of a template that is not fixed


@dataclass(frozen=True)
class SequenceSpec:
    """Everything about a masked sequence model but its weights: plain values, stored as JSON.

    Args:
        alphabet: one letter per token.
        length: L.
        cond_dim: size C of the condition; 0: unconditional. With ``label_quantiles``, their number
            plus one (filled in if 0).
        network: ``{"type": ..., sizes}`` for :func:`diffpolicy.networks.make_network`.
        process: for :func:`diffpolicy.core.make_masking`.
        time_free: the network does not see the noise level.
        cond_dropout: fraction of examples trained without their condition.
        label_quantiles: rising quantiles in (0, 1) of the labels, which divide training sequences
            into classes; the condition is then the one-hot class.
        env_id: the task it was trained for, if known.
        fixed: letters that every sequence has, ``.`` where it is free, ``[L]``; empty: none.
        lengths: ``(length, weight)`` of the lengths that sequences have; empty: all have L. With
            them the last letter of the alphabet is a pad, which fills up what is shorter.
        base: what its logits stand on beside the network, the values of a
            :class:`~diffpolicy.sequences.base.Base`; :meth:`SequenceModel.with_base` makes them.

    Raises:
        ValueError: values out of range, or that do not fit together.
    """

    alphabet: str
    length: int
    cond_dim: int = 0
    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "sequence_cnn"})
    process: Mapping[str, Any] = field(default_factory=lambda: {"type": "masked_loglinear"})
    time_free: bool = True
    cond_dropout: float = ranged("[0, 1)", 0.0)
    label_quantiles: tuple[float, ...] = ()
    env_id: str | None = None
    fixed: str = ""
    lengths: tuple[tuple[int, float], ...] = ()
    base: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        check_alphabet(self.alphabet)
        check_positive(length=self.length)
        object.__setattr__(self, "fixed", template(self.fixed, self.length, self.alphabet))
        pairs = tuple((int(n), float(weight)) for n, weight in self.lengths)
        object.__setattr__(self, "lengths", pairs)
        object.__setattr__(self, "label_quantiles", tuple(self.label_quantiles))
        if self.label_quantiles:
            check_quantiles(self.label_quantiles)
            classes = len(self.label_quantiles) + 1
            check_choice("cond_dim", self.cond_dim, (0, classes))
            object.__setattr__(self, "cond_dim", classes)

    @property
    def vocab_size(self) -> int:
        """V, the number of letters."""
        return len(self.alphabet)

    def training_cond(self, count: int, labels: Any, cond: Tensor | None) -> Tensor | None:
        """Make the condition ``[N, C]`` of training sequences from their labels, or check it.

        Args:
            count: N.
            labels: ``[N]``, or ``None``.
            cond: the condition itself, or ``None``.

        Raises:
            ValueError: both, or neither where one is needed, or another shape.
        """
        if labels is not None:
            if cond is not None or not self.label_quantiles:
                how = "through spec.label_quantiles, e.g. (0.9,) for the top decile"
                raise ValueError(f"labels become a condition {how}; give either labels or cond")
            cond = activity_classes(labels, self.label_quantiles)
        if cond is None:
            if self.cond_dim:
                raise ValueError(
                    f"cond_dim={self.cond_dim} of this model: give labels or cond [N, C]"
                )
            return None
        check_shape("the condition", cond.shape, (count, self.cond_dim))
        return cond.float()

    def make_denoiser(self) -> MaskedDenoiser:
        """A denoiser with freshly initialised weights.

        Raises:
            ValueError: with a base, which is a trained model.
        """
        if self.base is not None:
            raise ValueError("a base is a trained model: train one without, then with_base(reward)")
        network = sized_network(self.network, self.length, self.vocab_size + 1, self.cond_dim)
        process = self.make_process()
        return MaskedDenoiser(network, process, self.vocab_size, time_free=self.time_free)

    def make_process(self) -> MaskingProcess:
        """The masking process, which leaves alone what is fixed, and what is behind an end."""
        process = make_masking(self.process)
        if not self.fixed and not self.lengths:
            return process
        tokens = dict(zip(self.alphabet, range(self.vocab_size), strict=True))
        text = self.fixed or FREE * self.length
        fixed = tuple(tokens.get(letter, self.vocab_size) for letter in text)
        law = [0.0] * (self.length + 1) if self.lengths else []
        for n, weight in self.lengths:
            check_range(f"[1, {self.length}]", length=n)
            law[n] += weight
        return Templated(process, self.vocab_size, fixed, tuple(law))

    def pinned(self, fixed: Mapping[int, str] | str) -> SequenceSpec:
        """The same with other fixed letters, see :func:`template`."""
        return replace(self, fixed=template(fixed, self.length, self.alphabet))


def template(fixed: Mapping[int, str] | str, length: int, alphabet: str) -> str:
    """Letters that are fixed, as a text of all positions with ``.`` where one is free.

    Args:
        fixed: such a text; or letters by the position that they begin at, from 0, negative from the
            end, ``.`` among them for a free position.
        length: L.
        alphabet: the letters that there are.

    Returns:
        A text of L, or an empty one where nothing is fixed.

    Example:
        >>> template({1: "AC", -1: "G"}, 6, "ACGT")
        '.AC..G'

    Raises:
        ValueError: letters outside the alphabet or the sequence, or two for one position.
    """
    parts = {0: fixed} if isinstance(fixed, str) else dict(fixed)
    if isinstance(fixed, str) and fixed and len(fixed) != length:
        raise ValueError(f"fixed={fixed!r} has {len(fixed)} positions, expected {length}")
    found = [FREE] * length
    for begin, text in parts.items():
        first = begin + length if begin < 0 else begin
        if not 0 <= first <= length - len(text):
            raise ValueError(f"fixed {text!r} at {begin} does not fit into {length} positions")
        for i, letter in enumerate(text, first):
            check_choice(f"letter in fixed {text!r}:", letter, (*alphabet, FREE))
            if FREE not in (letter, found[i]) and letter != found[i]:
                raise ValueError(f"position {i} is fixed twice, as {found[i]!r} and {letter!r}")
            found[i] = letter if letter != FREE else found[i]
    return "" if found == [FREE] * length else "".join(found)


def fixed_letters(text: str) -> dict[int, str]:
    """The letters of a :func:`template` by their positions."""
    return {i: letter for i, letter in enumerate(text) if letter != FREE}


# ------------------------------------------------------------------ drawing

ROWS = 512  # sequences drawn or scored at once: bounds the memory of the noise


class Drawing(TypedDict, total=False):
    """How sequences are drawn from a model; every entry may be left out.

    Attributes:
        num_steps: steps from all masks to none; ``None``: one position at a time, the exact law of
            a ``time_free`` model.
        cond: ``[C]`` or ``[N, C]``; left out, a model with ``cond_dropout`` is drawn from
            unconditionally.
        generator: of the draws, on the model's device; the global one when absent.
        guidance: strength of classifier-free guidance; needs ``cond_dropout``.
    """

    num_steps: int | None
    cond: Tensor | None
    generator: torch.Generator | None
    guidance: float | None


class Chain(NamedTuple):
    """A batch of sequences drawn together, and how.

    Attributes:
        x0: final states ``[B, L, V + 1]``.
        groups: the evaluation that revealed each position ``[B, L]``; of positions that were not
            masked, without meaning.
        transitions: of the loop, if recorded.
    """

    x0: Tensor
    groups: Tensor
    transitions: tuple[Transition, ...]


def tokens_of(chains: Iterable[Chain]) -> Tensor:
    """Join the sequences that chains have ended with, int64 ``[N, L]``."""
    return torch.cat([to_tokens(chain.x0) for chain in chains])


# ------------------------------------------------------------------ letters and examples


class Letters:
    """What a sequence model has in common with its spec: sequences as strings."""

    spec: SequenceSpec

    def encode(self, sequences: Sequence[str]) -> Tensor:
        """Tokens int64 ``[N, L]`` of strings.

        Raises:
            ValueError: a letter outside the alphabet, or a string of another length.
        """
        token = {letter: i for i, letter in enumerate(self.spec.alphabet)}
        length, fewer = self.spec.length, bool(self.spec.lengths)
        for text in sequences:
            if not (0 < len(text) <= length if fewer else len(text) == length):
                most = "at most " * fewer
                raise ValueError(f"{text!r} has {len(text)} letters, expected {most}{length}")
            for letter in text:
                check_choice(f"letter in {text!r}:", letter, token)
        pad = self.spec.alphabet[-1]
        rows = [[token[letter] for letter in text.ljust(length, pad)] for text in sequences]
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.spec.length)

    def decode(self, tokens: Tensor) -> list[str]:
        """Strings of tokens ``[N, L]``; masks become ``_``, pads are left out."""
        letters = self.spec.alphabet + MASK_LETTER
        texts = ["".join(letters[i] for i in row) for row in torch.as_tensor(tokens).tolist()]
        return [text.rstrip(letters[-2]) for text in texts] if self.spec.lengths else texts


class SequenceExamples:
    """Sequences as a source of the trainer.

    ``gather`` gives ``tokens`` int64 ``[B, L]`` and, where they are known, ``cond [B, C]`` and
    ``label [B]``.

    Args:
        tokens: integers ``[N, L]``.
        cond: ``[N, C]`` or None.
        label: ``[N]`` or None.

    Raises:
        ValueError: not as many conditions or labels as sequences.
    """

    def __init__(self, tokens: Tensor, cond: Tensor | None = None, label: Any = None) -> None:
        self.tokens = tokens
        self.known = {k: v for k, v in {"cond": cond, "label": label}.items() if v is not None}
        for name, value in self.known.items():
            check_shape(f"{name} of the sequences", value.shape[:1], (len(tokens),))

    def __len__(self) -> int:
        return len(self.tokens)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        known = {name: value[indices] for name, value in self.known.items()}
        return {"tokens": self.tokens[indices].long(), **known}


def at_most(config: TrainerConfig, examples: SequenceExamples) -> TrainerConfig:
    """Settings with batches of no more examples than there are: files may be small."""
    return replace(config, batch_size=min(config.batch_size, len(examples)))


class Draws:
    """The source of objectives that draw their own sequences, as reward tuning does.

    ``gather`` gives ``index`` int64 ``[B]`` and, with a condition, ``cond [B, C]``.

    Args:
        count: rows, at least the trainer's batch size; it only decides how long an epoch is.
        cond: the condition ``[C]`` that all are drawn under, or None.

    Raises:
        ValueError: a count below 1, or a condition of another shape.
    """

    def __init__(self, count: int = 65_536, cond: Tensor | None = None) -> None:
        check_range("[1, inf)", count=count)
        if cond is not None:
            check_shape("cond", cond.shape, ("C",))
        self.count, self.cond = count, cond

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        rows = len(indices)
        cond = {} if self.cond is None else {"cond": self.cond.expand(rows, -1)}
        return {"index": indices, **cond}


def activity_classes(labels: Any, quantiles: Sequence[float]) -> Tensor:
    """One-hot class ``[N, len(quantiles) + 1]`` of each label, lowest class first.

    Args:
        labels: ``[N]``.
        quantiles: rising, in (0, 1); ``(0.9,)``: whether a label is in the top decile.

    Raises:
        ValueError: quantiles out of order or range, or labels that are not finite numbers.
    """
    check_quantiles(quantiles)
    values = np.asarray(labels, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"labels must be finite numbers [N], got {list(values.shape)}")
    cuts = np.quantile(values, list(quantiles))
    index = np.searchsorted(cuts, values, side="left")  # a label equal to a cut is below it
    return torch.eye(len(quantiles) + 1)[torch.from_numpy(index)]


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Raise ``ValueError`` unless quantiles rise within (0, 1)."""
    rising = all(a < b for a, b in pairwise(quantiles))
    if not len(quantiles) or not rising or not 0 < quantiles[0] <= quantiles[-1] < 1:
        raise ValueError(f"quantiles must rise within (0, 1), got {list(quantiles)}")
