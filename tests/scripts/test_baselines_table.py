"""The study of baselines: pairs by seed and episode, and no one else's scores."""

from __future__ import annotations

import numpy as np
import pytest

import baselines
import metaworld_table
from diffpolicy.settings import ConfigError


def cell(name, algorithm, seed, episodes):
    return {"set": name, "algorithm": algorithm, "seed": seed, "episodes": episodes}


def test_differences_are_paired_by_seed_and_episode():
    ours, theirs = [1] * 40 + [0] * 10, [1] * 10 + [0] * 40
    cells = [cell("a", "diffusion", seed, ours) for seed in (0, 1)]
    cells += [cell("a", "bc_mlp", 0, theirs), cell("a", "act", 1, ours), cell("b", "act", 0, ours)]
    rows = {(row["set"], row["baseline"]): row for row in baselines.compared(cells)}
    assert list(rows) == [("a", "bc_mlp"), ("a", "act")]  # of b there is no diffusion
    mlp, act = rows.values()
    assert mlp["seeds"] == act["seeds"] == 1
    assert mlp["difference"]["value"] == pytest.approx(0.6)
    assert (mlp["better"], act["better"]) == ("diffusion", None)
    assert act["difference"]["value"] == 0
    cells += [cell("a", "bc_mlp", 1, list(1 - np.array(ours)))]
    mlp = baselines.compared(cells)[0]
    assert (mlp["seeds"], mlp["difference"]["n"]) == (2, 100)


def test_what_is_done_is_not_run_again_and_is_of_these_settings(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(metaworld_table, "command_line", lambda words: ran.append(words) or 0)
    run = tmp_path / "run"
    args = ("experiment=metaworld", "reach", tmp_path / "x.zarr", run, 0)
    settings = {"trainer.steps": 5, "trainer.eval_every": None, "algorithm": "act"}
    metaworld_table.train(*args, settings)
    assert ran[-1][:2] == ["train", "experiment=metaworld"]
    assert {"trainer.eval_every=null", "algorithm=act"} <= set(ran[-1])
    run.mkdir()
    (run / "config.yaml").write_text("trainer: {steps: 5, eval_every: null}")
    metaworld_table.train(*args, settings)
    assert ran[-1] == ["resume", str(run)]
    (run / "eval.json").touch()
    metaworld_table.train(*args, settings)
    assert len(ran) == 2
    with pytest.raises(ConfigError, match=r"has trainer.steps=5, not 6; give another runs=FOLDER"):
        metaworld_table.train(*args, settings | {"trainer.steps": 6})
