"""`diffpolicy tune` from a file of one's own to designs, in one command."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import pytest

from diffpolicy import cli
from diffpolicy.commands import train_sequences
from diffpolicy.sequences.files import read_sequences

SMALL = [
    *("pretrain.network.width=8", "pretrain.trainer.steps=20"),
    *("pretrain.draws=16", "pretrain.report.elbo_draws=1", "threads=1"),
    *("pretrain.oracles.trainer.steps=20", "pretrain.oracles.trainer.progress=false"),
    *("pretrain.trainer.progress=false", "trainer.progress=false", "trainer.batch_size=16"),
    *("trainer.steps=4", "eval_draws=8", "draws=32", "report.chains=8", "report.elbo_draws=2"),
]
ORACLE = """
def count_g(texts):
    return [text.count("G") for text in texts]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with sequences, a table and a module, as a user has them."""
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("acgt", k=8)) for _ in range(90)]
    (tmp_path / "mine.fasta").write_text("".join(f">s{i}\n{t}\n" for i, t in enumerate(texts)))
    with (tmp_path / "measured.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["seq", "activity", "plate"])
        rows.writerows([t, t.count("g") + drawn.random(), i % 6] for i, t in enumerate(texts))
    (tmp_path / "own_oracle.py").write_text(ORACLE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_oracle", None)


def tune(*arguments: str) -> int:
    return cli.main(["tune", "task=custom", *SMALL, *arguments])


def test_from_fasta_to_designs_by_a_black_box(own, capsys, monkeypatch):
    task = ["task.sequences=mine.fasta", "task.oracle=own_oracle:count_g"]
    fixed = ["task.fixed={0:GA,-1:T}", "task.forbidden=[CCC]"]
    assert tune(*task) == 1  # the default method back-propagates
    assert "choose policy_gradient" in capsys.readouterr().err
    assert tune(*task, *fixed, "method=policy_gradient") == 0
    out = capsys.readouterr().out
    assert "mine.fasta: 90 of 90 sequences, 8 of ACGT" in out
    assert "hacking cannot be seen" in out
    run = own / "runs" / "tuned"
    found = read_sequences(run / "designs.csv", value="reward")
    assert found.texts == read_sequences(run / "designs.fasta").texts
    assert all(t.startswith("GA") and t.endswith("T") and "CCC" not in t for t in found.texts)
    assert found.values.tolist() == [t.count("G") for t in found.texts]
    report = json.loads((run / "report.json").read_text())
    assert report["designs"] == len(found.texts)
    assert report["after"]["held_out"] is None
    assert "hacking cannot be seen" in (run / "report.md").read_text()

    # The generator is there now: another tuning begins with it, whatever its oracle and letters.
    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train_sequences, "_report", never)
    guided = ["method=none", "guidance=best_of_n", "run_dir=runs/guided"]
    assert tune(*task, *guided, "task.held_out=own_oracle:count_g") == 0
    assert "held-out" not in capsys.readouterr().out
    assert tune(*task, *guided, "pretrain.trainer.lr=1e-2", "overwrite=true") == 1
    assert "other settings (trainer.lr)" in capsys.readouterr().err
    (own / "mine.fasta").write_text(">a\nACGTACGT\n>b\nACGTACGA\n")
    assert tune(*task, *guided, "overwrite=true") == 1
    assert "other settings (the sequences)" in capsys.readouterr().err


def test_measured_values_make_oracles_and_stored_code_is_not_run(own, capsys):
    task = ["task.sequences=measured.tsv", "task.value=activity", "task.group=plate"]
    assert tune(*task, "method=drakes", "method.relaxation.relaxed_steps=2") == 0
    report = json.loads((own / "runs" / "measured" / "report.json").read_text())
    assert list(report["oracles"]) == ["reward", "held_out"]
    again = ["tune", *SMALL[-9:], "pretrained=runs/measured", "method=policy_gradient"]
    oracle = ["task.oracle=own_oracle:count_g", "run_dir=runs/by_oracle"]
    assert cli.main([*again, *oracle]) == 0  # the same generator, by another oracle
    run = own / "runs" / "by_oracle"
    kept = json.loads((run / "report.json").read_text())
    assert kept["after"]["held_out"] is not None  # learned from the values
    sys.modules.pop("own_oracle")
    capsys.readouterr()
    assert cli.main(["resume", str(run)]) == 1  # what a file says is not what a user chose
    assert "trust_env=own_oracle" in capsys.readouterr().err
    assert cli.main(["resume", str(run), "trust_env=own_oracle"]) == 0


def test_a_task_that_is_not_said(own, capsys):
    (own / "prot.fa").write_text(">p\nHEAGAWGHEE\n")
    (own / "none.csv").write_text("")
    (own / "one.csv").write_text("seq,y\n" + "ACGT,1\n" * 9)
    (own / "flat.csv").write_text("seq,y\n" + "ACGT,1\nTTTT,1\nGGGG,1\nCCCC,1\n")
    box = ["task.sequences=mine.fasta", "task.oracle=own_oracle:count_g"]
    any_box = [*box, "method=policy_gradient"]
    for arguments, message in (
        ([*any_box, "method.bogus=1"], "unknown key 'policy_gradient.bogus'"),
        ([*any_box, "run_dir=runs/mine"], "runs/mine is where the generator is kept"),
        ([*any_box, "report.chain=8"], "did you mean 'report.chains'"),
        ([*any_box, "base=reward_guidance"], "set base=none"),
        ([*any_box, "hacking=stop"], "hacking=stop cannot be: There is no held-out oracle"),
        ([*box, "method=none", "guidance=best_of_n", "base=reward_guidance"], "method=none"),
        (["task.sequences=prot.fa", "task.alphabet=dna", *any_box[1:]], "'E' at position 2"),
        (["task.sequences=one.csv", "task.value=y"], "two halves that share nothing"),
        (["task.sequences=flat.csv", "task.value=y"], "values that are all equal"),
        (["task.sequences=none.csv", "task.value=y"], "is empty"),
        ([], "task.sequences=FILE"),
        (["task.sequences=nowhere.fa", "task.oracle=own_oracle:count_g"], "nowhere.fa"),
        (["task.sequences=mine.fasta", "task.orcale=own_oracle:count_g"], "did you mean 'oracle'"),
    ):
        assert tune(*arguments) == 1
        assert message in capsys.readouterr().err
        assert not (own / "runs").exists()  # before anything was trained
