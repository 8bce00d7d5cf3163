"""From a file of one's own to designs: the task, its oracles, and what is written."""

import csv
import sys

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy.sequences import FileTask, SequenceModel, designs, tune_sequences, write_designs
from diffpolicy.sequences.files import read_sequences
from diffpolicy.sequences.neighbours import Compared
from diffpolicy.sequences.oracles import Oracles, judge_note, split_measurements, train_oracles
from diffpolicy.training.settings import TrainerConfig

LETTERS = np.array(list("ACGT"))


class CountG(nn.Module):
    def forward(self, x):
        return x[..., 2].sum(1)


class Flat(nn.Module):
    def forward(self, x):
        return x.argmax(-1).float().sum(1)


def count_g(texts):
    assert all(set(text) <= set("ACGT") for text in texts)
    return [text.count("G") for text in texts]


@pytest.fixture
def table(tmp_path):
    """300 sequences of 12 letters around 30 parents, two of each ten with a value missing."""
    rng = np.random.default_rng(0)
    parents = rng.integers(0, 4, (30, 12)).repeat(10, 0)
    tokens = np.where(rng.random((300, 12)) < 0.1, rng.integers(0, 4, (300, 12)), parents)
    texts = ["".join(LETTERS[row]) for row in tokens]
    rows = [
        {"sequence": t, "y": "" if i % 5 == 0 else t.count("G") + 0.1, "family": i // 10}
        for i, t in enumerate(texts)
    ]
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_an_oracle_of_strings_is_a_black_box_and_a_module_is_not(table):
    strings, module = FileTask(table, count_g), FileTask(table, CountG())
    assert (strings.kind, module.kind, strings.length) == ("black_box", "table", 12)
    x = torch.eye(4)[torch.from_numpy(strings.training_data()[0][:50]).long()]
    assert torch.equal(strings.reward(x), module.reward(x))
    x.requires_grad_()
    assert torch.equal(
        torch.autograd.grad(module.reward(x).sum(), x)[0], torch.eye(4)[2].expand_as(x)
    )


def test_halves_share_no_family_or_nothing_alike(table):
    task = FileTask(table, value="y", identity=0.75)
    tokens, values = task.measurements()
    assert len(tokens) == len(values) == 240
    assert values.tolist() == pytest.approx(((tokens == 2).sum(1) + 0.1).tolist())
    for seed in range(3):
        first, second = split_measurements(task, seed)
        a, b = (Compared(tokens[rows], 4) for rows in (first, second))
        assert (a.distances(b) > 0.25 * 12).all()
    task = FileTask(table, value="y", group="family")
    families = np.array([i // 10 for i in range(300) if i % 5])
    first, second = split_measurements(task, 0)
    assert len(first) + len(second) == 240
    assert not set(families[first]) & set(families[second])


def test_what_judges_the_oracle(table, tmp_path, quick):
    settings = quick(30)
    alone = train_oracles(FileTask(table, count_g), tmp_path / "a", settings)
    assert alone.held_out is None
    assert "hacking cannot be seen" in judge_note(alone)
    both = train_oracles(FileTask(table, count_g, held_out=CountG()), tmp_path / "b", settings)
    assert both.held_out is not None
    assert not judge_note(both)
    task = FileTask(table, count_g, value="y", identity=0.75)
    learned = train_oracles(task, tmp_path / "c", settings)
    assert list(learned.report) == ["held_out"]  # from half of the values, tested on the other
    assert learned.reward == task._rewards[0] or callable(learned.reward)
    measured = train_oracles(FileTask(table, value="y", identity=0.75), tmp_path / "d", settings)
    assert list(measured.report) == ["reward", "held_out"]


def test_designs_are_valid_different_sorted_and_read_back(table, tmp_path):
    task = FileTask(table, count_g, fixed={0: "GG"}, forbidden=("CCC",))
    model = SequenceModel.for_task(task, spec={"network": {"type": "mlp", "width": 8}})
    pinned = model.pinned(task.fixed)
    drawn = pinned.draw(400, generator=torch.Generator().manual_seed(0))
    oracles = Oracles(task.reward, lambda x: -task.reward(x), {})
    rows = designs(torch.cat([drawn, drawn]), task, oracles, pinned, elbo_draws=2)
    texts = [row["sequence"] for row in rows]
    assert len(set(texts)) == len(texts)
    assert set(texts) == {t for t in pinned.decode(drawn) if "CCC" not in t}
    assert all(text.startswith("GG") for text in texts)
    rewards = [row["reward"] for row in rows]
    assert rewards == sorted(rewards, reverse=True) == [t.count("G") for t in texts]
    assert [row["held_out"] for row in rows] == [-r for r in rewards]
    known = ["".join(LETTERS[row]) for row in task.training_data()[0]]
    apart = [min(sum(a != b for a, b in zip(t, k, strict=True)) for k in known) for t in texts]
    assert [row["distance"] for row in rows] == apart
    fasta, written = write_designs(tmp_path, rows)
    assert read_sequences(fasta).texts == texts
    found = read_sequences(written, value="log_likelihood")
    assert found.texts == texts
    assert found.values.tolist() == [row["log_likelihood"] for row in rows]
    assert found.names == [row["name"] for row in rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says what a good sequence is"),
        ({"oracle": "no_such_module:f"}, "oracle=no_such_module:f"),
        ({"oracle": lambda texts: 1.0}, "one finite number per sequence"),
        ({"oracle": count_g, "fixed": {9: "GATC"}}, "does not fit into 12"),
        ({"oracle": count_g, "length": 11}, "no sequence of length=11.*are 12"),
        ({"value": "y", "identity": 0.1, "oracle": count_g}, None),
        ({"value": "Y"}, "did you mean|has no column"),
        ({"oracle": Flat()}, "oracle is a torch module without a gradient.*wrap it"),
        ({"oracle": nn.Linear(5, 1)}, r"oracle failed.*\[2, 12, 4\].*RuntimeError"),
        (
            {"oracle": count_g, "forbidden": ["GAXTC"]},
            "forbidden 'GAXTC' must be letters of 'ACGT'",
        ),
    ],
)
def test_what_is_wrong_is_said(table, settings, message):
    if message is None:
        task = FileTask(table, **settings)
        with pytest.raises(ValueError, match=r"largest of 1 groups.*raise identity=0.1"):
            task.halves(0)
        return
    with pytest.raises(ValueError, match=message):
        FileTask(table, **settings)


def test_what_is_fixed_and_forbidden_is_read_like_the_sequences(table):
    task = FileTask(table, count_g, fixed={0: "gu"}, forbidden="ccc")
    assert (task.template, task.forbidden) == ("GT" + 10 * ".", ("CCC",))
    assert task.valid(np.array([[2, 3] * 6, [2, 3] + [1] * 10, [0] * 12])).tolist() == [1, 0, 0]


def test_tuning_starts_from_guidance_and_is_saved_with_an_oracle_that_is_named(
    table, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "own_oracles", sys.modules[__name__])
    quick = TrainerConfig(steps=2, batch_size=16, progress=False)
    how = {"pretraining": quick, "tuning": quick, "draws": 16, "fixed": {0: "AC"}}
    found = tune_sequences(table, "own_oracles:CountG", run_dir=tmp_path / "a", **how)
    assert found.model.spec.base["stored"] == {"type": "own", "oracle": "own_oracles:CountG"}
    loaded = SequenceModel.from_pretrained(tmp_path / "a" / "tuned")
    drawn = [m.draw(8, generator=torch.Generator().manual_seed(0)) for m in (loaded, found.model)]
    assert torch.equal(*drawn)
    monkeypatch.delitem(sys.modules, "own_oracles")  # what files name is not what a user chose
    with pytest.raises(ValueError, match="trust_env=own_oracles"):
        SequenceModel.from_pretrained(tmp_path / "a" / "tuned").draw(1)
    plain = tune_sequences(table, CountG(), run_dir=tmp_path / "b", base="none", **how)
    assert plain.model.spec.base is None
    with pytest.raises(ValueError, match="set base=none"):
        tune_sequences(table, count_g, run_dir=tmp_path / "c", base="reward_guidance", **how)


def test_from_python_with_sequences_of_different_lengths(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "mine.fasta"
    texts = ["AC" + "".join(LETTERS[rng.integers(0, 4, n)]) for n in (4, 6) * 60]
    path.write_text("".join(f">{i}\n{t}\n" for i, t in enumerate(texts)))
    quick = TrainerConfig(steps=8, batch_size=32, progress=False)
    found = tune_sequences(
        path, count_g, run_dir=tmp_path / "run", held_out=CountG(), pretraining=quick,
        tuning=quick, draws=64, fixed={0: "AC"},
    )  # fmt: skip
    assert {len(row["sequence"]) for row in found.designs} == {6, 8}
    assert all(row["sequence"].startswith("AC") for row in found.designs)
    assert [row["held_out"] for row in found.designs] == [row["reward"] for row in found.designs]
    loaded = SequenceModel.from_pretrained(tmp_path / "run" / "tuned")
    again = loaded.decode(loaded.draw(32))
    assert all(text.startswith("AC") and len(text) in (6, 8) for text in again)
    assert torch.equal(loaded.encode(again)[:, -1] == 4, torch.tensor([len(t) < 8 for t in again]))
    with pytest.raises(ValueError, match="position 7 is fixed, and sequences of 6 letters"):
        FileTask(path, count_g, fixed={-1: "A"})
