"""What a sweep makes of its arguments; the runs are stubs."""

from __future__ import annotations

import pytest

from diffpolicy.commands.sweep import multirun
from diffpolicy.config_compose import given_text, keys_given

STORE = ["data=store", "data.path=demos.zarr"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def folders(*arguments: str) -> list[str]:
    """The directories of a sweep's runs."""
    seen: list[str] = []

    def run(overrides):
        seen.append(given_text(keys_given(overrides)["run_dir"]))
        return 0

    assert multirun("train", ["-m", *STORE, *arguments], run) == 0
    return seen


def test_every_run_has_a_directory_of_its_own():
    assert folders("seed=0,1") == ["runs/${name}_seed0", "runs/${name}_seed1"]
    assert folders("seed=0,1", "run_dir=mine") == ["mine_seed0", "mine_seed1"]
    assert folders("trainer.lr=1e-3,1e-4", "seed=3") == [
        "runs/${name}_lr0.001_seed3",
        "runs/${name}_lr0.0001_seed3",
    ]
    assert folders("name='a b','c d'") == ["runs/${name}_namea-b", "runs/${name}_namec-d"]


def test_a_run_that_is_stopped_stops_the_sweep():
    seen = []

    def run(overrides):
        seen.append(overrides)
        return 130

    with pytest.raises(KeyboardInterrupt):
        multirun("train", ["-m", *STORE, "seed=0,1,2"], run)
    assert len(seen) == 1


def test_a_run_that_fails_does_not_stop_the_others(capsys):
    seen = []

    def run(overrides):
        seen.append(overrides)
        if len(seen) == 1:
            raise ValueError("no such thing")
        return 0

    assert multirun("train", ["-m", *STORE, "seed=0,1"], run) == 1
    assert len(seen) == 2
    assert "no such thing" in capsys.readouterr().err
