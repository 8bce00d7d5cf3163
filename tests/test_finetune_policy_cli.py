"""`diffpolicy finetune` of a policy: from comparisons to a report, on Pendulum."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffpolicy import DiffusionPolicy, cli
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.tuning_report import read_tuning_report

ENV = ["env.id=Pendulum-v1", "env.name=pendulum", "env.score=return", "env.max_episode_steps=20"]
FEW = ["evaluation.val_episodes=2", "evaluation.episodes=3", "evaluation.num_workers=0"]
QUICK = ["trainer.progress=false", "trainer.batch_size=16", "trainer.warmup_steps=1", "threads=1"]
COLLECT = ["collect.seeds=2", "collect.points=2", "collect.branches=3", "collect.lookahead=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a policy that was trained on actions at random."""
    folder = tmp_path_factory.mktemp("pendulum")
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (120, 3)).astype(np.float32)
    action = rng.uniform(-2, 2, (120, 1)).astype(np.float32)
    ends = np.arange(20, 121, 20)
    EpisodeStore.from_arrays({"obs": obs, "action": action}, ends, path=folder / "demos.zarr")
    shape = ["policy.horizon=6", "policy.n_action_steps=4", "network.width=16", "network.depth=1"]
    where = ["data=store", f"data.path={folder / 'demos.zarr'}", f"run_dir={folder / 'run'}"]
    steps = ["trainer.steps=5"]
    assert cli.main(["train", *ENV, *where, *shape, *FEW, *QUICK, *steps]) == 0
    return folder


def tuned(trained: Path, run: Path, *extra: str) -> int:
    where = [f"pretrained={trained / 'run'}", f"run_dir={run}", "nfe=[1,4]"]
    steps = [] if any("trainer.steps" in e for e in extra) else ["trainer.steps=4"]
    return cli.main(["finetune", *where, *FEW, *QUICK, *steps, *extra])


def result_of(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1].removeprefix("RESULT "))


def test_rollouts_become_pairs_and_pairs_a_report(trained, tmp_path, capsys):
    run = tmp_path / "dpo"
    assert tuned(trained, run, "preference=dpo", *COLLECT) == 0
    result = result_of(capsys.readouterr().out)
    assert result["method"] == "dpo"
    assert set(result["before"]) == set(result["after"]) == {"1", "4"}
    report = read_tuning_report(run)
    assert report["seeds"] == [300_000, 300_001, 300_002]
    assert len(report["episodes"]["after"]["4"]) == 3
    assert report["training"]["rounds"][0]["preferences"]["pairs"] > 0
    assert {"score_by_nfe.png", "curves.png"} <= {p.name for p in run.glob("*.png")}
    assert "difference" in (run / "report.md").read_text()
    assert (run / "preferences.jsonl").is_file()
    DiffusionPolicy.from_pretrained(run)
    assert tuned(trained, run, "preference=dpo", *COLLECT) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_own_plans_are_compared_by_what_rollouts_led_to(trained, tmp_path):
    run = tmp_path / "online"
    rollouts = ["collect.type=episodes", "collect.seeds=3", "collect.episodes=2"]
    judge = ["judge={lookahead: 5, members: 2, width: 16, trainer: {steps: 5, batch_size: 8}}"]
    online = ["preference=dpo", "preference.online={candidates: 2, num_steps: 2}"]
    few = ["evaluation.episodes=0", "evaluation.val_episodes=0"]
    assert tuned(trained, run, *online, *rollouts, *judge, *few) == 0
    assert (run / "value" / "checkpoints").is_dir()
    assert "reward" in (run / "metrics.csv").read_text().splitlines()[0]
    assert tuned(trained, tmp_path / "other", *online, *rollouts, *few) == 1


def test_rounds_tune_the_newest_policy(trained, tmp_path, capsys):
    run = tmp_path / "rounds"
    extra = ["preference=dpo", "rounds=2", *COLLECT, "adapters={type: lora, rank: 2}"]
    assert tuned(trained, run, *extra) == 0
    seeds = [
        {a["seed"] for a in EpisodeStore.open(run / f"round_{n}" / "rollouts.zarr").episode_attrs}
        for n in range(2)
    ]
    assert seeds[0].isdisjoint(seeds[1])
    assert len(read_tuning_report(run)["training"]["rounds"]) == 2


@pytest.mark.parametrize("method", ["bc", "dro"])
def test_demonstrations_are_those_of_the_run(method, trained, tmp_path):
    assert tuned(trained, tmp_path / method, f"preference={method}") == 0


@pytest.mark.parametrize("method", ["ipo", "kto", "margin", "pso", "sft"])
def test_other_methods_read_a_preference_file(method, trained, tmp_path, rollouts):
    file = rollouts / "preferences.jsonl"
    extra = [f"preference={method}", f"preferences={file}", "evaluation.episodes=0"]
    assert tuned(trained, tmp_path / method, *extra, "evaluation.val_episodes=0") == 0


@pytest.fixture(scope="module")
def rollouts(trained, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("rollouts") / "run"
    none = ["evaluation.episodes=0", "evaluation.val_episodes=0"]
    assert tuned(trained, run, "preference=dpo", *COLLECT, *none) == 0
    return run


def test_runs_are_compared_by_episode(trained, tmp_path, capsys, rollouts):
    runs = []
    for method in ("bc", "sft"):
        for seed in (1, 2):
            runs.append(str(tmp_path / f"{method}_{seed}"))
            extra = [f"preference={method}", f"seed={seed}"]
            if method == "sft":
                extra.append(f"preferences={rollouts / 'preferences.jsonl'}")
            assert tuned(trained, Path(runs[-1]), *extra) == 0
    capsys.readouterr()
    output = tmp_path / "compared"
    assert cli.main(["finetune", "compare", *runs, f"output={output}"]) == 0
    text = capsys.readouterr().out
    assert "| before | 2 |" in text
    assert "minus bc" in text
    rows = {r["method"]: r for r in json.loads((output / "report.json").read_text())["rows"]}
    scores = [read_tuning_report(r)["after"]["4"]["value"] for r in runs]
    assert rows["sft"]["score"]["4"]["value"] == pytest.approx(np.mean(scores[2:]))
    gap = rows["sft"]["minus_baseline"]["4"]["value"]
    assert gap == pytest.approx(np.mean(scores[2:]) - np.mean(scores[:2]))
    assert rows["bc"]["minus_baseline"] == {}
    assert cli.main(["finetune", "compare", runs[0], runs[0], f"output={output}"]) == 1
    assert "two reports are of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["preference=dpo"], "learns from preferences"),
        (["preference=dpo", "preferences=a.jsonl", *COLLECT], "not both"),
        (["preference=dpo", "rounds=2"], "need collect"),
        (["preference=dpo", "preference.beta=1"], "no setting 'beta'"),
        (["preference=dpo", *COLLECT, "collect.branchs=3"], "branchs"),
        (["preference=dpo", *COLLECT, "collect.seed=99999"], "below 100,000"),
        (["preference=bc", "nfe=[0]"], "nfe must be"),
        (["preference=bc", "pretrained=nowhere"], "no trained policy in nowhere"),
        (["preference=bc", "adapters={type: lora, rank: 0}"], "rank"),
        (["experiment=tfbind8_drakes", "preference=dpo"], "experiment of sequences"),
    ],
)
def test_what_cannot_be_done_is_said(extra, message, trained, tmp_path, capsys):
    assert tuned(trained, tmp_path / "run", *extra) == 1
    assert message in capsys.readouterr().err


def test_a_stopped_run_goes_on(trained, tmp_path, capsys):
    run = tmp_path / "run"
    assert tuned(trained, run, "preference=bc", "trainer.eval_every=2") == 0
    assert cli.main(["resume", str(run)]) == 0
    assert result_of(capsys.readouterr().out)["method"] == "bc"
