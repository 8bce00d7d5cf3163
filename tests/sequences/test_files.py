"""Sequences in files: what is written reads back, and one rule for letters."""

import gzip

import numpy as np
import pytest

from diffpolicy.sequences.files import (
    ALPHABETS,
    Records,
    alphabet_of,
    clean,
    read_sequences,
    write_fasta,
    write_table,
)

TEXTS = ["ACGT" * 30, "TTTT" * 30]


def test_fasta_reads_back_from_lines_of_any_width_and_gz(tmp_path):
    path = write_fasta(tmp_path / "a.fasta", ["one x=1", "two"], TEXTS, width=50)
    found = read_sequences(path)
    assert (found.names, found.texts) == (["one x=1", "two"], TEXTS)
    packed = tmp_path / "a.fa.gz"
    packed.write_bytes(gzip.compress(b"; a comment\n" + path.read_bytes()))
    assert read_sequences(packed).texts == TEXTS


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("csv.gz", ",")])
def test_tables_read_back_with_values_and_groups(tmp_path, suffix, delimiter):
    rows = [{"Seq": t, "y": v, "fam": g} for t, v, g in zip(TEXTS, (0.1, 1e-9), "ab", strict=True)]
    text = write_table(tmp_path / "raw.csv", rows).read_text().replace(",", delimiter)
    path = tmp_path / f"table.{suffix}"
    raw = ("﻿" + text).encode()  # as Excel writes it
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    found = read_sequences(path, value="y", group="fam")
    assert found.texts == TEXTS
    assert found.values.tolist() == [0.1, 1e-9]
    assert found.groups == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "how", "message"),
    [
        ("a.fasta", "ACGT\n", {}, "line 1: FASTA begins"),
        ("a.fasta", "\n", {}, "holds no sequences"),
        ("a.fasta", ">a\nAC\n", {"value": "y"}, "has no columns"),
        ("a.csv", "letters\nAC\n", {}, "no column 'sequence'.*column=NAME.*letters"),
        ("a.csv", "seq,yield\nAC,1\n", {"value": "yeld"}, "did you mean 'yield'"),
        ("a.docx", "", {}, "unknown kind of file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, how, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_sequences(tmp_path / name, **how)


def test_the_rule_for_letters():
    dna = ALPHABETS["dna"]
    given = Records(list("abcd"), ["acgu", "ACNN", "ACGT", "TTTT"])
    found, counts = clean(given, dna)
    assert (found.names, found.texts) == (["a", "c", "d"], ["ACGT", "ACGT", "TTTT"])
    assert counts == {"with ambiguity codes, left out": 1}
    drawn = clean(Records(["r"], ["R" * 4000]), dna, ambiguous="draw")[0].texts[0]
    share = drawn.count("A") / 4000
    assert set(drawn) == {"A", "G"}
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 4000)
    assert (
        clean(Records(["p"], ["MKX*"]), ALPHABETS["protein"], ambiguous="draw")[0].texts[0][:2]
        == "MK"
    )
    for text, message in (
        ("ACNN", "'N' at position 3, which is an ambiguity code"),
        ("AC-T", "a gap"),
        ("ACZT", "none of 'ACGT'"),
    ):
        with pytest.raises(ValueError, match=message):
            clean(Records(["x"], [text]), dna, ambiguous="refuse")


def test_the_alphabet_that_letters_suggest():
    assert alphabet_of(None, ["acgtnnry" + "ACGT" * 20]).letters == "ACGT"
    assert alphabet_of(None, ["ACGU"]).letters == "ACGU"
    assert alphabet_of(None, ["MKTAYIAKQR"]).letters == ALPHABETS["protein"].letters
    assert alphabet_of("01", ["0110"]).letters == "01"
