"""Sequences in files: FASTA and tables in, letters cleaned by one rule, designs out.

The rule for letters. Case does not matter; white space, and the ``*`` that ends a protein, are
taken away. In DNA a ``U`` is a ``T``, in RNA a ``T`` is a ``U``. IUPAC's ambiguity codes (``N``,
``R``, of proteins ``X``, ``B``, ...) are not letters: a sequence that has some is left out and
counted, unless they are to be refused or drawn. Anything else, gaps of an alignment among it, is an
error that names the sequence, the letter and its place.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.files import write_atomic
from diffpolicy.settings import check_choice, near_miss

FASTA = (".fasta", ".fa", ".fna", ".faa", ".ffn", ".fas")
TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}
AMBIGUOUS = ("drop", "refuse", "draw")
_NUCLEIC = {
    **{"R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC"},
    **{"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"},
}
_AMINO = "ACDEFGHIKLMNPQRSTVWY"


class Letters(NamedTuple):
    """An alphabet, and what else files write for its letters.

    Attributes:
        letters: one for each token.
        codes: ambiguity codes, with the letters that each stands for.
        same: letters that are another way to write one of ours.
    """

    letters: str
    codes: Mapping[str, str] = {}
    same: Mapping[str, str] = {}

    def folded(self, text: str) -> str:
        """A text in this alphabet's own case and letters, as far as it has them."""
        text = text.upper() if self.letters == self.letters.upper() else text
        return "".join(self.same.get(letter, letter) for letter in text)


ALPHABETS = {
    "dna": Letters("ACGT", _NUCLEIC, {"U": "T"}),
    "rna": Letters("ACGU", {c: s.replace("T", "U") for c, s in _NUCLEIC.items()}, {"T": "U"}),
    # Selenocysteine and pyrrolysine count as codes of what they are nearest to.
    "protein": Letters(_AMINO, {"B": "DN", "Z": "EQ", "J": "IL", "X": _AMINO, "U": "C", "O": "K"}),
}


class Records(NamedTuple):
    """What a file holds, row by row.

    Attributes:
        names: of the sequences.
        texts: the sequences as they are written.
        values: measured values ``[N]``, nan where there is none; None: no column was asked for.
        groups: what each row belongs to; None: no column was asked for.
    """

    names: list[str]
    texts: list[str]
    values: Any = None
    groups: list[str] | None = None

    def rows(self, kept: Sequence[int]) -> Records:
        """Some of the rows."""
        return Records(
            [self.names[i] for i in kept],
            [self.texts[i] for i in kept],
            None if self.values is None else self.values[list(kept)],
            None if self.groups is None else [self.groups[i] for i in kept],
        )


def read_sequences(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    value: str | None = None,
    group: str | None = None,
) -> Records:
    """Read a FASTA file, or a table with a header, either of them perhaps with ``.gz`` behind.

    Args:
        path: ``.fasta``, ``.fa``, ``.fna``, ``.faa``, ``.ffn`` or ``.fas``; ``.csv``; or, parted by
            tabulators, ``.tsv``, ``.tab`` or ``.txt``.
        column: of a table, where its sequences stand; None: ``sequence`` or ``seq``.
        value: where measured numbers stand; an empty field, or one that is no finite number, is a
            row without a value.
        group: what rows belong to (a family, a batch, a plate).

    Example:
        >>> read_sequences("promoters.csv.gz", value="expression").texts[0]

    Raises:
        ValueError: another kind of file, a column that is not there, or no sequences.
        FileNotFoundError: there is no such file.
    """
    file = Path(path).expanduser()
    suffixes = [s.lower() for s in file.suffixes] or [""]
    packed = suffixes[-1] == ".gz" and len(suffixes) > 1
    kind = suffixes[-2] if packed else suffixes[-1]
    check_choice(f"kind of file of sequences ({file.name}):", kind, (*FASTA, *TABLES))
    raw = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
    text = raw.decode("utf-8-sig")
    if kind in FASTA:
        if value or group or column:
            raise ValueError(
                f"{file} is FASTA and has no columns; give a .csv or .tsv, or leave the columns out"
            )
        found = _fasta(text, file)
    else:
        found = _table(text, file, TABLES[kind], (column, value, group))
    if not found.texts:
        raise ValueError(f"{file} holds no sequences")
    return found


def _fasta(text: str, file: Path) -> Records:
    names: list[str] = []
    parts: list[list[str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare.startswith(">"):
            names.append(bare[1:].strip() or f"sequence_{len(names) + 1}")
            parts.append([])
        elif bare and not bare.startswith(";"):
            if not names:
                raise ValueError(f"{file}, line {number}: FASTA begins with a line '>name'")
            parts[-1].append("".join(bare.split()))
    return Records(names, ["".join(lines) for lines in parts])


def _table(
    text: str, file: Path, delimiter: str, columns: tuple[str | None, str | None, str | None]
) -> Records:
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    heads = [head.strip() for head in reader.fieldnames or ()]
    if not heads:
        raise ValueError(f"{file} is empty; a table begins with the names of its columns")
    reader.fieldnames = heads
    column = columns[0] or next((h for h in heads if h.lower() in ("sequence", "seq")), None)
    if column is None:
        raise ValueError(
            f"{file} has no column 'sequence': say which it is, column=NAME; it has "
            f"{', '.join(heads)}"
        )
    for name in (column, *columns[1:]):
        if name is not None and name not in heads:
            hint = near_miss(name, heads, listing="it has")
            raise ValueError(f"{file} has no column {name!r}{hint}")
    rows = [row for row in reader if (row[column] or "").strip()]
    named = next((h for h in heads if h.lower() in ("name", "id")), None)
    names = [(row[named] if named else None) or f"row_{i}" for i, row in enumerate(rows, 2)]
    texts = ["".join((row[column] or "").split()) for row in rows]
    _, value, group = columns
    values = None if value is None else np.array([_number(row[value]) for row in rows])
    groups = None if group is None else [(row[group] or "").strip() for row in rows]
    return Records(names, texts, values, groups)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def alphabet_of(name: str | None, texts: Sequence[str]) -> Letters:
    """The alphabet of a name (``dna``, ``rna``, ``protein``), or of letters of one's own.

    Without a name: DNA or RNA if nine in ten letters are A, C, G, T, U or N, else protein.

    Raises:
        ValueError: letters that repeat, or fewer than two.
    """
    if name is not None:
        known = ALPHABETS.get(name.lower())
        return Letters(name) if known is None else known
    counts = Counter("".join(texts[:1000]).upper())
    nucleic = sum(counts[letter] for letter in "ACGTUN")
    if nucleic < 0.9 * sum(counts.values()):
        return ALPHABETS["protein"]
    return ALPHABETS["rna" if counts["U"] > counts["T"] else "dna"]


def clean(
    records: Records, alphabet: Letters, *, ambiguous: str = "drop", seed: int = 0
) -> tuple[Records, dict[str, int]]:
    """Sequences in the letters of an alphabet alone, by this module's rule.

    Args:
        records: as they were read.
        alphabet: of :func:`alphabet_of`.
        ambiguous: sequences with ambiguity codes are left out (``"drop"``), refused
            (``"refuse"``), or each code becomes one of its letters, drawn evenly (``"draw"``).
        seed: of these draws.

    Returns:
        What is left, and how many rows were left out or changed, by the reason.

    Raises:
        ValueError: a letter that is neither of the alphabet nor one of its codes, or nothing left.
    """
    check_choice("ambiguous", ambiguous, AMBIGUOUS)
    rng = np.random.default_rng(seed)
    known, texts, kept = set(alphabet.letters), [], []
    counts: Counter[str] = Counter()
    for row, text in enumerate(records.texts):
        plain = alphabet.folded(text.removesuffix("*"))
        strange = set(plain) - known
        unknown = strange - set(alphabet.codes)
        if unknown or not plain or (strange and ambiguous == "refuse"):
            raise ValueError(_refused(records.names[row], plain, unknown or strange, alphabet))
        if strange:
            counts[f"with ambiguity codes, {'drawn' if ambiguous == 'draw' else 'left out'}"] += 1
            if ambiguous == "drop":
                continue
            plain = "".join(_drawn(c, alphabet.codes, rng) for c in plain)
        texts.append(plain)
        kept.append(row)
    if not kept:
        raise ValueError("every sequence has ambiguity codes, so none is left; say ambiguous=draw")
    return records.rows(kept)._replace(texts=texts), dict(counts)


def _drawn(letter: str, codes: Mapping[str, str], rng: np.random.Generator) -> str:
    choices = codes.get(letter)
    return letter if choices is None else choices[int(rng.integers(len(choices)))]


def _refused(name: str, text: str, strange: set[str], alphabet: Letters) -> str:
    if not text:
        return f"sequence {name!r} has no letters"
    place = next(i for i, letter in enumerate(text) if letter in strange)
    letter = text[place]
    if letter in alphabet.codes:
        what = f"an ambiguity code; say ambiguous=drop (leaves {name!r} out) or ambiguous=draw"
    elif letter in "-.":
        what = "a gap: give unaligned sequences, or take its columns out"
    else:
        what = f"none of {alphabet.letters!r}; say alphabet=dna, rna, protein or its letters"
    return f"sequence {name!r} has {letter!r} at position {place + 1}, which is {what}"


def write_fasta(
    path: str | os.PathLike[str], names: Iterable[str], texts: Iterable[str], *, width: int = 70
) -> Path:
    """Write sequences as FASTA, in lines of ``width`` letters; :func:`read_sequences` reads it."""
    lines = []
    for name, text in zip(names, texts, strict=True):
        lines.append(f">{name}")
        lines += [text[i : i + width] for i in range(0, len(text), width)]
    return write_atomic(path, "".join(f"{line}\n" for line in lines))


def write_table(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the same keys as CSV; numbers are written so that they read back the same."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomic(path, buffer.getvalue())
