"""A task of one's own sequences: a file, and an oracle or measured values that say what is good."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.masking import one_hot
from diffpolicy.sequences.files import Letters, Records, alphabet_of, clean, read_sequences
from diffpolicy.sequences.neighbours import Compared, clusters, split_groups
from diffpolicy.sequences.spec import fixed_letters, template
from diffpolicy.sequences.task import Labels, Tokens, check_alphabet, pad_of
from diffpolicy.settings import ConfigError, check_settings, load_named, one_of, ranged

Oracle = Callable[[Any], Any]
PAD = "-"  # behind the end of sequences that differ in length


@dataclass(eq=False)
class FileTask:
    """A :class:`~diffpolicy.sequences.task.SequenceTask` made of a file, as ``task.KEY=...`` say.

    An oracle that is a torch module is given one-hot sequences ``[B, L, V]``, letters in the order
    of the alphabet, and must be differentiable in them. Where sequences differ in length, L is the
    longest, and the last channel, of the letter ``-``, fills up the others. Any other oracle is
    called with a list of strings and answers with as many numbers: a black box, which no method
    that back-propagates can use. A class is made first, without arguments. What an oracle has as
    ``valid`` (a list of strings to as many booleans) is asked too.

    Example:
        >>> task = FileTask("promoters.fasta", lambda texts: [t.count("G") for t in texts])
        >>> task.kind, task.length

    Args:
        sequences: FASTA, CSV or TSV (see :func:`~diffpolicy.sequences.files.read_sequences`).
        oracle: what sequences are worth, or ``"package.module:Name"`` of it; None: two oracles are
            learned from the measured values.
        held_out: another oracle, which only judges; None: one is learned from the measured values,
            and without any there is none.
        alphabet: ``dna``, ``rna``, ``protein`` or letters; None: as the file's letters suggest.
        length: keep sequences of so many letters alone; None: all, and where they differ designs
            have the lengths of the file, in the same proportions.
        column: of a table, where its sequences stand; None: ``sequence`` or ``seq``.
        value: where its measured values stand.
        group: what rows belong to: halves of the measurements share none of these groups.
        identity: without groups, no two sequences of different halves are at least so alike.
        ambiguous: what becomes of sequences with ambiguity codes, see
            :mod:`~diffpolicy.sequences.files`.
        fixed: letters that every design has, by their position from 0, negative from the end:
            ``{0: "GGATCC", -6: "GAATTC"}``; a ``.`` in them is free.
        forbidden: motifs that no valid design has, such as restriction sites; one, or a list.
        name: for reports; None: that of the file.
        seed: of letters that are drawn for ambiguity codes.

    Raises:
        ValueError: a file that cannot be read so, or nothing that says what is good.
    """

    sequences: str | os.PathLike[str]
    oracle: Oracle | str | None = None
    held_out: Any = None
    alphabet: Any = None
    length: Any = None
    column: str | None = None
    value: str | None = None
    group: str | None = None
    identity: float = ranged("(0, 1]", 0.8)
    ambiguous: str = one_of("drop", "refuse", "draw")
    fixed: Mapping[int, str] = field(default_factory=dict)
    forbidden: Any = ()
    name: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        path = Path(self.sequences).expanduser()
        self.name = self.name or path.name.split(".")[0]
        columns = {"column": self.column, "value": self.value, "group": self.group}
        records = read_sequences(path, **columns)
        letters = alphabet_of(self.alphabet, records.texts)
        self.read = {"file": path.name, "rows": len(records.texts)}
        records, changed = clean(records, letters, ambiguous=self.ambiguous, seed=self.seed)
        records = self._of_length(records, changed)
        self.fixed = {at: letters.folded(text) for at, text in self.fixed.items()}
        self.forbidden = motifs(self.forbidden, letters)
        self._hold(records, letters.letters)
        self._values, self._groups = records.values, records.groups
        self._measured = np.flatnonzero(np.isfinite(self._all_values()))
        missing = len(records.texts) - len(self._measured)
        if self.value is not None and missing:
            changed["without a value: they train the generator alone"] = missing
        self._split: dict[int, tuple[Any, Any]] = {}  # minutes, of a large file
        self._open_oracles()
        digest = hashlib.sha256("\n".join(records.texts).encode()).hexdigest()[:16]
        self.read |= {"sequences": len(records.texts), "alphabet": self.alphabet}
        self.read |= {"length": self.length, "shortest": min(map(len, records.texts))}
        self.read |= {"sha256": digest, "left out or changed": changed}

    def _hold(self, records: Records, letters: str) -> None:
        """Keep the sequences as tokens, with a pad where they differ in length."""
        sizes = Counter(map(len, records.texts))
        self.alphabet, self.length = letters, max(sizes)
        self.lengths: tuple[tuple[int, float], ...] = ()
        if len(sizes) > 1:
            if PAD in letters:
                raise ValueError(f"{PAD!r} fills up shorter sequences, so it can be no letter")
            self.alphabet += PAD
            self.lengths = tuple((n, sizes[n] / len(records.texts)) for n in sorted(sizes))
        check_alphabet(self.alphabet)
        self._tokens = as_tokens([t.ljust(self.length, PAD) for t in records.texts], self.alphabet)
        self.template = template(self.fixed, self.length, letters)
        last = max(fixed_letters(self.template), default=-1)
        if last >= min(sizes):
            raise ValueError(
                f"position {last} is fixed, and sequences of {min(sizes)} letters lack it: fix "
                "positions that all have (counted from the beginning), or say length="
            )

    def _of_length(self, records: Records, changed: dict[str, int]) -> Records:
        """The rows of the length that was asked for, if one was."""
        if self.length is None:
            return records
        kept = [i for i, text in enumerate(records.texts) if len(text) == self.length]
        if not kept:
            found = Counter(map(len, records.texts)).most_common(3)
            raise ValueError(
                f"{self.sequences} holds no sequence of length={self.length}; the most frequent "
                f"lengths are {', '.join(str(n) for n, _ in found)}"
            )
        if len(kept) < len(records.texts):
            other = f"of another length than {self.length}, left out"
            changed[other] = len(records.texts) - len(kept)
        return records.rows(kept)

    def _all_values(self) -> Any:
        if self._values is None:
            return np.full(len(self._tokens), np.nan)
        return self._values

    def _open_oracles(self) -> None:
        """Make the rewards, and see that they answer as they should."""
        given = open_oracle(self.oracle, "oracle"), open_oracle(self.held_out, "held_out")
        if given[0] is None and not len(self._measured):
            raise ValueError(
                "nothing says what a good sequence is: give oracle=package.module:Name, or a table "
                "with measured values and value=COLUMN"
            )
        self.kind = "measured"
        if given[0] is not None:
            self.kind = "table" if isinstance(given[0], nn.Module) else "black_box"
        self._valid = getattr(given[0], "valid", None)
        made = [as_reward(oracle, self.alphabet) for oracle in given]
        rows = one_hot(torch.from_numpy(self._tokens[:2]).long(), len(self.alphabet))[..., :-1]
        for name, reward in zip(("oracle", "held_out"), made, strict=True):
            if reward is not None:
                check_answer(name, reward, rows, sloped=name == "oracle" and self.kind == "table")
        self._rewards = made
        self.held_out = made[1]

    def training_data(self) -> tuple[Tokens, Labels | None]:
        """All sequences ``[N, L]``, and their values if all have one."""
        whole = len(self._measured) == len(self._tokens)
        return self._tokens, self._values.astype(np.float32) if whole else None

    def measurements(self) -> tuple[Tokens, Labels | None]:
        """The sequences that have a value, with it; all of them where there are no values."""
        rows = self._measured
        if not len(rows):
            return self._tokens, None
        return self._tokens[rows], self._values[rows].astype(np.float32)

    def halves(self, seed: int) -> tuple[Any, Any]:
        """Row numbers of two halves of the measurements that share no group, or nothing alike.

        Raises:
            ValueError: too few groups or clusters for two halves.
        """
        if seed not in self._split:
            self._split[seed] = self._halved(seed)
        return self._split[seed]

    def _halved(self, seed: int) -> tuple[Any, Any]:
        rows = self._measured
        if self._groups is not None:
            group = np.unique([self._groups[i] for i in rows], return_inverse=True)[1].reshape(-1)
            advice = f"choose another column than group={self.group}"
        else:
            tokens = self._tokens[rows]
            alike = Compared(tokens, len(self.alphabet), pad_of(self))
            group = clusters(alike, self.identity)
            advice = (
                f"raise identity={self.identity} (1 separates equal sequences alone), or name "
                "a column with group="
            )
        try:
            return split_groups(group, seed)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; {advice}") from None

    def reward(self, x: Tensor) -> Tensor:
        """What the oracle says of one-hot sequences ``[B, L, V]``, ``[B]``."""
        if self._rewards[0] is None:
            raise RuntimeError(f"{self.name} has measured values and no oracle; learn one of them")
        answer: Tensor = self._rewards[0](x)
        return answer

    def valid(self, tokens: Tokens) -> Any:
        """Which sequences have what is fixed, nothing that is forbidden, and the oracle's leave."""
        texts = as_texts(tokens, self.alphabet)
        held = fixed_letters(self.template).items()
        good = [
            all(text[i] == letter for i, letter in held)
            and not any(motif in text for motif in self.forbidden)
            for text in texts
        ]
        found = np.array(good, dtype=bool)
        if self._valid is not None and len(texts):
            found &= np.asarray(self._valid(texts), dtype=bool)
        return found


def open_oracle(oracle: Any, option: str) -> Any:
    """An oracle by its name, or as it is; classes are made without arguments.

    Raises:
        ValueError: nothing of that name, or what cannot be called.
    """
    if isinstance(oracle, str):
        here = os.getcwd()
        added = here not in sys.path  # a script of the user's own, beside its data
        sys.path[:0] = [here] * added
        try:
            oracle = load_named(option, oracle)
        finally:
            if added:
                sys.path.remove(here)
    if isinstance(oracle, type):
        oracle = oracle()
    if oracle is not None and not callable(oracle):
        raise ConfigError(f"{option} must be callable, got {type(oracle).__name__}")
    return oracle


def as_reward(oracle: Any, alphabet: str) -> Callable[[Tensor], Tensor] | None:
    """An oracle as a reward of one-hot sequences ``[B, L, V] -> [B]``."""
    if oracle is None:
        return None
    if isinstance(oracle, nn.Module):
        oracle.eval().requires_grad_(False)
        weight = next(oracle.parameters(), None)

        def judged(x: Tensor) -> Tensor:
            answer: Tensor = oracle(x if weight is None else x.to(weight.device, weight.dtype))
            return answer.to(x)

        return judged

    def asked(x: Tensor) -> Tensor:
        texts = as_texts(x.detach().argmax(-1).cpu().numpy(), alphabet)
        return torch.as_tensor(np.asarray(oracle(texts), dtype=np.float64)).to(x)

    return asked


def check_answer(
    option: str, reward: Callable[[Tensor], Tensor], rows: Tensor, *, sloped: bool = False
) -> None:
    """Raise ``ValueError`` unless a reward answers with one finite number for each of ``rows``.

    Args:
        option: the setting that names it, for messages.
        reward: what is asked.
        rows: one-hot ``[B, L, V]``.
        sloped: it must have a gradient by them, too.
    """
    at = rows.clone().requires_grad_(sloped)
    try:
        answer = reward(at)
    except Exception as error:
        raise ValueError(
            f"{option} failed when it was asked about {len(rows)} sequences (a torch module is "
            f"given one-hot {list(rows.shape)}, anything else a list of strings): "
            f"{type(error).__name__}: {error}"
        ) from error
    if answer.shape != rows.shape[:1] or not bool(torch.isfinite(answer).all()):
        got = f"{list(answer.shape)}: {answer.flatten()[:4].tolist()}"
        raise ValueError(
            f"{option} must answer with one finite number per sequence, [{len(rows)}]; got {got}. "
            "A torch module is given one-hot [B, L, V], anything else a list of strings"
        )
    if sloped and not answer.requires_grad:
        raise ValueError(
            f"{option} is a torch module without a gradient by the one-hot sequences that it is "
            "given; wrap it in a function of a list of strings, which needs none"
        )


def motifs(given: Any, letters: Letters) -> tuple[str, ...]:
    """Motifs in an alphabet's own letters; a text is one motif.

    Raises:
        ValueError: an empty one, or a letter that no sequence has, so that it would never be found.
    """
    found = tuple(letters.folded(motif) for motif in ([given] if isinstance(given, str) else given))
    for motif in found:
        if not motif or set(motif) - set(letters.letters):
            raise ValueError(f"forbidden {motif!r} must be letters of {letters.letters!r}")
    return found


def as_tokens(texts: list[str], alphabet: str) -> Tokens:
    """Tokens int8 ``[N, L]`` of sequences of one length whose letters are known."""
    codes = np.full(128, -1, dtype=np.int8)
    codes[[ord(letter) for letter in alphabet]] = np.arange(len(alphabet))
    return codes[np.frombuffer("".join(texts).encode(), dtype=np.uint8)].reshape(len(texts), -1)


def as_texts(tokens: Any, alphabet: str) -> list[str]:
    """Strings of tokens ``[N, L]``, without pads."""
    letters = np.array(list(alphabet))
    return ["".join(row).rstrip(PAD) for row in letters[np.asarray(tokens)]]
