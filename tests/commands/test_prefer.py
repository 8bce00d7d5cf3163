"""`diffpolicy tune` and `prefer` of a policy: from rollouts to a report, on Pendulum."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, cli
from diffpolicy.config import load_run
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.report.tables import read_report
from diffpolicy.report.tuning import FORMAT
from diffpolicy.training.identity import ResumeWarning
from diffpolicy.training.trainer import Trainer

ENV = ["env.id=Pendulum-v1", "env.name=pendulum", "env.score=return", "env.max_episode_steps=20"]
FEW = ["evaluation.val_episodes=2", "evaluation.episodes=3", "evaluation.num_workers=0"]
QUICK = ["trainer.progress=false", "trainer.batch_size=16", "trainer.warmup_steps=1", "threads=1"]
COLLECT = ["collect.episodes=2", "collect.points=2", "collect.branches=3", "collect.lookahead=8"]
UNSCORED = ["evaluation.episodes=0", "evaluation.val_episodes=0"]
ONLINE = [
    "method=dpo",
    "method.online={candidates: 2, num_steps: 2}",
    "judge={lookahead: 5, members: 2, width: 16, trainer: {steps: 5, batch_size: 8}}",
    "collect.kind=episodes",
    "collect.episodes=3",
    "collect.repeats=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a policy that was trained on actions at random."""
    folder = tmp_path_factory.mktemp("pendulum")
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (120, 3)).astype(np.float32)
    action = rng.uniform(-2, 2, (120, 1)).astype(np.float32)
    ends = np.arange(20, 121, 20)
    EpisodeStore.from_arrays({"obs": obs, "action": action}, ends, path=folder / "demos.zarr")
    shape = [
        "policy.prediction=v",
        "policy.horizon=6",
        "policy.n_action_steps=4",
        "network.width=16",
        "network.depth=1",
    ]
    where = ["data=store", f"data.path={folder / 'demos.zarr'}", f"run_dir={folder / 'run'}"]
    steps = ["trainer.steps=5"]
    assert cli.main(["train", *ENV, *where, *shape, *FEW, *QUICK, *steps]) == 0
    return folder


def tuned(trained: Path, run: Path, *extra: str) -> int:
    where = [f"pretrained={trained / 'run'}", f"run_dir={run}", "nfe=[1,4]"]
    steps = [] if any(e.startswith("trainer.steps") for e in extra) else ["trainer.steps=4"]
    return cli.main(["prefer", *where, *FEW, *QUICK, *steps, *extra])


def result_of(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1].removeprefix("RESULT "))


def test_rollouts_become_pairs_and_pairs_a_report(trained, tmp_path, capsys):
    run = tmp_path / "dpo"
    assert tuned(trained, run, "method=dpo", *COLLECT) == 0
    result = result_of(capsys.readouterr().out)
    assert result["method"] == "dpo"
    assert set(result["before"]) == set(result["after"]) == {"1", "4"}
    report = read_report(run, FORMAT)
    assert report["seeds"] == [300_000, 300_001, 300_002]
    assert len(report["episodes"]["after"]["4"]) == 3
    assert report["training"]["rounds"][0]["preferences"]["pairs"] > 0
    assert {"score_by_nfe.png", "curves.png"} <= {p.name for p in run.glob("*.png")}
    assert "difference" in (run / "report.md").read_text()
    assert (run / "preferences.jsonl").is_file()
    DiffusionPolicy.from_pretrained(run)
    assert tuned(trained, run, "method=dpo", *COLLECT) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_own_plans_are_compared_by_what_rollouts_led_to(trained, tmp_path):
    run = tmp_path / "online"
    assert (
        tuned(trained, run, *ONLINE, *UNSCORED, "judge.lookahead=6", "judge.trainer.steps=4") == 0
    )
    assert (run / "value" / "checkpoints").is_dir()
    assert json.loads((run / "report.json").read_text())["settings"]["judge"]["lookahead"] == 6
    assert "reward" in (run / "metrics.csv").read_text().splitlines()[0]


def test_own_plans_are_drawn_once_for_every_loss(trained, tmp_path, capsys):
    """The pairs of one run's plans are a preference file for others."""
    run, plans = tmp_path / "dpo", "plans={every: 6, candidates: 3, num_steps: 2}"
    own = ["method=dpo", plans, *ONLINE[2:]]
    assert tuned(trained, run, *own, *UNSCORED) == 0
    pairs = PreferenceSet.open(run / "plans.jsonl")
    rollouts = EpisodeStore.open(run / "rollouts.zarr")
    asked = sum((n - 3 + 5) // 6 for n in rollouts.episode_lengths)
    assert 0.8 * asked <= len(pairs) <= asked  # plans at the actions' bounds are worth the same
    summary = read_report(run, FORMAT)["training"]["rounds"][0]["preferences"]
    assert summary["sources"] == {"value": len(pairs)}
    file = f"preferences={run / 'plans.jsonl'}"
    assert tuned(trained, tmp_path / "kto", "method=kto", file, *UNSCORED) == 0
    before = (run / "report.json").read_bytes()
    own = ["method=dpo", plans, ONLINE[2], file, "overwrite=true"]
    for where in (run, tmp_path / "again"):  # nothing is removed, nothing written
        capsys.readouterr()
        assert tuned(trained, where, *own, *UNSCORED) == 1
        assert "judge=null plans=null" in capsys.readouterr().err
    assert (run / "report.json").read_bytes() == before
    assert not (tmp_path / "again").exists()


def test_given_rollouts_serve_a_judge(trained, tmp_path, rollouts):
    """For pairs of own plans, and for plans that are compared while the policy is tuned."""
    file = f"preferences={rollouts / 'preferences.jsonl'}"
    plans = "plans={every: 6, candidates: 3, num_steps: 2}"
    assert tuned(trained, tmp_path / "sft", "method=sft", plans, ONLINE[2], file) == 0
    assert tuned(trained, tmp_path / "dpo", *ONLINE[:3], file, *UNSCORED) == 0


def test_drawing_plans_goes_on(trained, tmp_path, monkeypatch):
    """Killed while it draws, a run has no pairs, and draws them anew when it is resumed."""
    run, plans = tmp_path / "run", "plans={every: 6, candidates: 3, num_steps: 2}"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("diffpolicy.learn.plan_pairs._written", killed)
        assert tuned(trained, run, "method=dpo", plans, *ONLINE[2:], *UNSCORED) == 130
    assert (run / "plans.zarr").exists()
    assert not (run / "plans.jsonl").exists()
    assert cli.main(["resume", str(run)]) == 0
    assert len(PreferenceSet.open(run / "plans.jsonl")) > 10


def test_every_round_draws_its_own_plans(trained, tmp_path):
    run, plans = tmp_path / "run", "plans={every: 6, candidates: 3, num_steps: 2}"
    assert tuned(trained, run, "method=dpo", plans, "rounds=2", *ONLINE[2:], *UNSCORED) == 0
    scores = [
        [r.info["scores"] for r in PreferenceSet.open(run / f"round_{n}" / "plans.jsonl").records]
        for n in range(2)
    ]
    assert scores[0] != scores[1]


def test_answers_of_a_person_are_not_taken_for_plans(trained, tmp_path, capsys, rollouts):
    run = tmp_path / "run"
    assert tuned(trained, run, "method=bc", *UNSCORED) == 0
    shutil.copy(rollouts / "preferences.jsonl", run / "plans.jsonl")
    assert tuned(trained, run, "method=bc", *UNSCORED, "overwrite=true") == 1
    assert "something else than pairs of plans" in capsys.readouterr().err


def test_runs_that_come_from_each_other(trained, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert tuned(trained, first, "method=bc", *UNSCORED) == 0
    assert tuned(trained, second, "method=bc", f"pretrained={first}", *UNSCORED) == 0
    again = ["method=bc", f"pretrained={second}", "overwrite=true", *UNSCORED]
    assert tuned(trained, first, *again) == 1  # it would remove what second comes from
    assert "is a part of the run" in capsys.readouterr().err
    file = first / "config.yaml"
    file.write_text(file.read_text().replace(str(trained / "run"), str(second)))
    assert tuned(trained, tmp_path / "third", "method=bc", f"pretrained={first}") == 1
    assert "each was tuned from the next" in capsys.readouterr().err
    file.write_text(file.read_text().replace(str(second), str(tmp_path / "gone")))
    assert tuned(trained, tmp_path / "third", "method=bc", f"pretrained={first}") == 1
    assert f"was tuned from {tmp_path / 'gone'}" in capsys.readouterr().err
    scored = ["eval", f"checkpoint={second}", *FEW]
    assert cli.main(scored) == 1
    assert cli.main([*scored, "env.id=Pendulum-v1", "env.max_episode_steps=20"]) == 0


def test_both_anchors_need_demonstrations(trained, tmp_path, capsys, rollouts):
    moved = trained / "moved.zarr"
    (trained / "demos.zarr").rename(moved)
    try:
        file = f"preferences={rollouts / 'preferences.jsonl'}"
        assert tuned(trained, tmp_path / "a", "method=dpo", file) == 1
        assert "method.anchor=chosen" in capsys.readouterr().err
        found = f"demonstrations={moved}"
        assert tuned(trained, tmp_path / "b", "method=dpo", file, found, *UNSCORED) == 0
    finally:
        moved.rename(trained / "demos.zarr")


def test_candidates_are_ranked_by_the_value_of_a_tuning(trained, tmp_path, capsys):
    run = tmp_path / "online"
    assert tuned(trained, run, *ONLINE, *UNSCORED) == 0
    scored = ["eval", f"checkpoint={trained / 'run'}", *FEW]
    judge = f"judge.path={run / 'value'}"
    results = []
    for extra in ([], [judge, "selection.num_candidates=1"], [judge], [judge]):
        capsys.readouterr()
        assert cli.main([*scored, *extra]) == 0
        results.append(result_of(capsys.readouterr().out)["return"])
    alone, of_one, of_ten, again = results
    assert alone == of_one != of_ten == again
    assert cli.main([*scored, "judge.pessimism=2"]) == 1
    assert "judge.path" in capsys.readouterr().err
    assert cli.main([*scored, f"judge.path={tmp_path}"]) == 1
    assert "plan value" in capsys.readouterr().err
    for extra in ("judge.pessimism=-1", "n_action_steps=2", "streaming.steps_per_chunk=1"):
        assert cli.main([*scored, judge, extra]) == 1
    assert "does not go with streaming" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the gradient of the first 3 steps")  # all comparisons tie
def test_pso_compares_its_own_chains_by_what_rollouts_led_to(trained, tmp_path):
    pso = ["method=pso_online", "method.num_steps=2", *ONLINE[2:]]
    assert tuned(trained, tmp_path / "run", *pso, *UNSCORED) == 0


def test_rounds_tune_the_newest_policy(trained, tmp_path, capsys):
    run = tmp_path / "rounds"
    extra = ["method=dpo", "rounds=2", *COLLECT, "adapters={type: lora, rank: 2}"]
    assert tuned(trained, run, *extra) == 0
    seeds = [
        {a["seed"] for a in EpisodeStore.open(run / f"round_{n}" / "rollouts.zarr").episode_attrs}
        for n in range(2)
    ]
    assert seeds[0].isdisjoint(seeds[1])
    assert len(read_report(run, FORMAT)["training"]["rounds"]) == 2


def test_a_given_file_takes_the_place_of_what_an_experiment_makes():
    given = ["experiment=pusht_dpo", "preferences=answers.jsonl"]
    config = load_run("prefer", given)
    assert (config.collect, config.plans, config.rounds) == (None, None, 1)
    assert load_run("prefer", [*given, "judge.lookahead=8"]).plans is not None
    config = load_run("prefer", [*given, "judge.reward=dense", "plans.every=6"])
    assert config.collect is None
    assert config.judge["lookahead"] > 1
    assert config.plans["every"] == 6


def test_a_tuned_policy_is_tuned_on(trained, tmp_path, capsys):
    """Its environment and demonstrations are those that it was trained with."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert tuned(trained, first, "method=bc") == 0
    assert tuned(trained, second, "method=bc", f"pretrained={first}") == 0
    after, before = (read_report(run, FORMAT)["episodes"] for run in (first, second))
    assert before["before"]["4"] == after["after"]["4"]
    capsys.readouterr()
    assert cli.main(["eval", f"checkpoint={second}", *FEW, f"output={tmp_path / 'scored'}"]) == 0
    assert result_of(capsys.readouterr().out)["task"] == "pendulum"


@pytest.mark.parametrize("method", ["bc", "dro"])
def test_demonstrations_are_those_of_the_run(method, trained, tmp_path):
    assert tuned(trained, tmp_path / method, f"method={method}") == 0


@pytest.mark.parametrize("method", ["ipo", "kto", "margin", "pso", "sft"])
def test_other_methods_read_a_preference_file(method, trained, tmp_path, rollouts):
    file = rollouts / "preferences.jsonl"
    extra = [f"method={method}", f"preferences={file}", "evaluation.episodes=0"]
    assert tuned(trained, tmp_path / method, *extra, "evaluation.val_episodes=0") == 0


@pytest.fixture(scope="module")
def rollouts(trained, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("rollouts") / "run"
    assert tuned(trained, run, "method=dpo", *COLLECT, *UNSCORED) == 0
    return run


def test_runs_are_compared_by_episode(trained, tmp_path, capsys, rollouts):
    runs = []
    for method in ("bc", "sft"):
        for seed in (1, 2):
            runs.append(str(tmp_path / f"{method}_{seed}"))
            extra = [f"method={method}", f"seed={seed}"]
            if method == "sft":
                extra.append(f"preferences={rollouts / 'preferences.jsonl'}")
            assert tuned(trained, Path(runs[-1]), *extra) == 0
    capsys.readouterr()
    output = tmp_path / "compared"
    assert cli.main(["prefer", "compare", *runs, f"output={output}"]) == 0
    text = capsys.readouterr().out
    assert "| before | 2 |" in text
    assert "minus bc" in text
    rows = {r["method"]: r for r in json.loads((output / "report.json").read_text())["rows"]}
    scores = [read_report(r, FORMAT)["after"]["4"]["value"] for r in runs]
    assert rows["sft"]["score"]["4"]["value"] == pytest.approx(np.mean(scores[2:]))
    gap = rows["sft"]["minus_baseline"]["4"]["value"]
    assert gap == pytest.approx(np.mean(scores[2:]) - np.mean(scores[:2]))
    assert rows["bc"]["minus_baseline"] == {}
    assert cli.main(["prefer", "compare", runs[0], runs[0], f"output={output}"]) == 1
    assert "two reports are of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["method=dpo"], "give preferences=FILE, or collect="),
        (["method=dpo", "rounds=0"], "rounds must be at least 1"),
        (["method=dpo", "method.beta=1"], "unknown key 'dpo.beta'"),
        (["method=dpi"], "did you mean 'dpo'"),
        (["method=draft_k"], "use policy.tune(...) or `diffpolicy tune`"),
        (["method=sequence_dpo"], "tunes models of sequences, not plans"),
        (["method=dpo", *COLLECT, "collect.branchs=3"], "did you mean 'collect.branches'"),
        (["method=dpo", *COLLECT, "collect.seed=99999"], "below 100,000"),
        (["method=dpo", *COLLECT, "collect.kind=some"], "unknown collect.kind 'some'"),
        (["method=dpo", *COLLECT, "collect.points=two"], "collect.points must be int"),
        (["method=dpo", *COLLECT, "collect.branches=1"], "at least 2"),
        (["method=dpo", *COLLECT, "collect.score=os:getcwd"], "imports no code"),
        (["method=dpo", *COLLECT, "method.online=true"], "dpo.online must be"),
        (["method=pso", *COLLECT, "method.online=yes please"], "pso.online must be"),
        ([*ONLINE, "judge=null"], "judges the policy's own plans"),
        (["method=dpo", "plans={every: 2}", *COLLECT], "judges the policy's own plans"),
        (["method=dpo", "plans={every: 90}", *ONLINE[2:]], "no episode is longer than 20"),
        (["method=dpo", "plans={evry: 2}", *ONLINE[2:]], "unknown key 'plans.evry'; did you mean"),
        ([*ONLINE, "judge.reward=dense"], "no method dense_reward"),
        ([*ONLINE, "judge.reward=mine"], "unknown judge.reward 'mine'"),
        ([*ONLINE, "judge.lookahead=0"], "lookahead must be at least 1"),
        ([*ONLINE, "judge.lookahed=3"], "judge has no setting 'lookahed'"),
        ([*ONLINE, "judge.obs_dim=3"], "judge has no setting 'obs_dim'"),
        ([*ONLINE, "judge.width=wide"], "width must be"),
        ([*ONLINE, "judge.pessimism=-1"], "judge.pessimism must be at least 0"),
        ([*ONLINE, "judge.trainer.step=3"], "unknown key 'judge.trainer.step'"),
        (["method=bc", "demonstrations=a.zarr"], "no episode store at a.zarr"),
        (["method=bc", "nfe=[0]"], "nfe must be"),
        (["method=bc", "pretrained=nowhere"], "no trained policy in nowhere"),
        (["method=bc", "adapters={type: lora, rank: 0}"], "rank"),
        (
            ["experiment=tfbind8_drakes", "method=dpo"],
            "run `diffpolicy tune experiment=tfbind8_drakes`",
        ),
    ],
)
def test_what_cannot_be_done_is_said(extra, message, trained, tmp_path, capsys):
    assert tuned(trained, tmp_path / "run", *extra) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return DiffusionPolicy.from_pretrained(path).denoiser.state_dict()


def same(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def newest(run: Path) -> Path:
    pointers = run / "checkpoints"
    name = "best" if (pointers / "best").is_file() else "last"
    return pointers / (pointers / name).read_text().strip()


def test_another_run_replaces_all_of_an_earlier_one(trained, tmp_path, capsys):
    run, few = tmp_path / "run", ["evaluation.episodes=0"]
    rounds = ["rounds=2", "evaluation.val_episodes=0"]
    assert tuned(trained, run, *ONLINE, *COLLECT[:1], *few, *rounds) == 0
    assert tuned(trained, run, *ONLINE, *few) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert tuned(trained, run, "method=dpo", *COLLECT, *few, "overwrite=true") == 0
    assert not list(run.glob("round_*"))
    assert same(run / "policy", newest(run))
    before = weights_of(run)
    other = ["collect.kind=branches", "collect.episodes=1", "collect.points=1"]
    assert tuned(trained, run, "method=ipo", *other, "overwrite=true", "trainer.lr=0.1") == 0
    assert same(run / "policy", newest(run))
    assert any(not torch.equal(before[k], v) for k, v in weights_of(run).items())
    store = EpisodeStore.open(run / "rollouts.zarr")
    assert {attrs["seed"] for attrs in store.episode_attrs} == {50_000}
    assert store.attrs["rollouts"]["settings"]["branches"] == 6
    assert (run / "score_by_nfe.png").is_file()
    assert tuned(trained, run, "method=bc", "overwrite=true", *UNSCORED) == 0
    left = {path.name for path in run.iterdir()}
    assert not left & {"rollouts.zarr", "preferences.jsonl", "score_by_nfe.png"}


def test_what_a_person_said_or_a_run_reads_is_not_overwritten(trained, tmp_path, capsys):
    run, dpo = tmp_path / "run", ["method=dpo", "overwrite=true", *UNSCORED]
    assert tuned(trained, run, *dpo, *COLLECT) == 0
    pairs = PreferenceSet.open(run / "preferences.jsonl")
    assert tuned(trained, run, *dpo, f"preferences={pairs.path}") == 1
    assert "is a part of the run that overwrite=true would remove" in capsys.readouterr().err
    answers = PreferenceSet.create(run / "rollouts_human.jsonl", pairs.store)
    answers.append(replace(pairs.pairs()[0], source="human"))
    assert tuned(trained, run, *dpo, *COLLECT) == 1
    assert "answers of a person" in capsys.readouterr().err
    assert len(PreferenceSet.open(run / "rollouts_human.jsonl").pairs()) == 1
    assert (run / "policy").is_dir()
    assert tuned(trained, trained / "run", "method=bc", "overwrite=true") == 1
    assert "pretrained=" in capsys.readouterr().err
    assert (trained / "run" / "checkpoints").is_dir()


def test_an_interrupted_run_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    """Ctrl-C in a judge, in the first round and in the second judge, each continued."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = [*ONLINE, *UNSCORED, "rounds=2", "trainer.steps=5", "trainer.eval_every=5"]
    assert tuned(trained, whole, *settings) == 0
    step = Trainer._train_step

    def interrupted(where: Path, command: Callable[[], int]) -> int:
        def stop_there(self: Trainer) -> None:
            step(self)
            if self.run_dir == where and self.step == 2:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_train_step", stop_there)
            return command()

    def resume() -> int:
        return cli.main(["resume", str(cut)])

    assert interrupted(cut / "round_0" / "value", lambda: tuned(trained, cut, *settings)) == 130
    assert f"diffpolicy resume {cut}" in capsys.readouterr().out
    assert not (cut / "round_0" / "checkpoints").exists()
    assert interrupted(cut / "round_0", resume) == 130
    assert interrupted(cut / "round_1" / "value", resume) == 130
    assert interrupted(cut / "round_1", resume) == 130
    assert resume() == 0
    for part in ("round_0", "round_1", "policy"):
        assert same(whole / part, cut / part), part
    values = (run / "round_0" / "value" for run in (whole, cut))
    assert len({(newest(v) / "policy" / "model.safetensors").read_bytes() for v in values}) == 1


def test_a_finished_run_is_only_scored_again(trained, tmp_path, capsys):
    run = tmp_path / "run"
    assert tuned(trained, run, "method=bc", "trainer.eval_every=2", "trainer.lr=0.01") == 0
    first = result_of(capsys.readouterr().out)
    DiffusionPolicy.from_pretrained(trained / "run").save(run / "policy")
    assert cli.main(["resume", str(run)]) == 0
    again = result_of(capsys.readouterr().out)
    assert again["after"] == first["after"]
    assert same(run / "policy", newest(run))


def test_the_baseline_of_an_experiment_needs_no_rollouts(trained, tmp_path, capsys):
    run = tmp_path / "run"
    assert tuned(trained, run, "experiment=pusht_dpo", "method=bc", *UNSCORED) == 0
    assert (
        "bc reads demonstrations alone: nothing is collected or compared" in capsys.readouterr().out
    )
    assert not (run / "rollouts.zarr").exists()


def test_pairs_of_a_tuned_policy_are_of_its_environment(rollouts, tmp_path, capsys):
    target = tmp_path / "more.zarr"
    few = ["episodes=2", "kind=episodes", "repeats=2", "num_workers=0"]
    assert cli.main(["data", "prefs", "collect", str(target), f"checkpoint={rollouts}", *few]) == 0
    store = EpisodeStore.open(target)
    assert store.attrs["max_episode_steps"] == 20
    assert max(store.episode_lengths) == 20
    config = rollouts / "config.yaml"
    lost = tmp_path / "lost"
    shutil.copytree(rollouts / "policy", lost / "policy")
    text = config.read_text()
    (lost / "config.yaml").write_text(text.replace("pretrained: /", "pretrained: /gone/"))
    assert cli.main(["data", "prefs", "collect", str(target), f"checkpoint={lost}"]) == 1
    assert "which knows its environment and is not here" in capsys.readouterr().err


def test_one_process_tunes(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tuned(trained, tmp_path / "run", "method=dpo", *COLLECT) == 1
    assert "by one process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_how_rollouts_are_collected_is_kept_with_them(trained, tmp_path):
    run = tmp_path / "run"
    own = ["collect.score=max_reward", "collect.noise_seed=3"]
    assert tuned(trained, run, "method=dpo", *COLLECT, *own, *UNSCORED) == 0
    preferences = PreferenceSet.open(run / "preferences.jsonl")
    assert preferences.attrs["scoring"]["score"] == "max_reward"
    assert preferences.store.attrs["rollouts"]["settings"]["seed"] == 3


def test_a_tuning_goes_on_for_longer(trained, tmp_path, capsys):
    run = tmp_path / "run"
    assert tuned(trained, run, "method=bc", *UNSCORED) == 0
    with pytest.warns(ResumeWarning, match="steps=6"):
        assert cli.main(["resume", str(run), "trainer.steps=6"]) == 0
    assert newest(run).name == "0000006"
    assert same(run / "policy", newest(run))
    assert cli.main(["resume", str(run)]) == 0
    (run / "round_1").mkdir()  # which began with what the first has learned
    capsys.readouterr()
    assert cli.main(["resume", str(run), "trainer.steps=8"]) == 1
    assert "second round" in capsys.readouterr().err


def test_a_reward_of_plans_is_back_propagated(trained, tmp_path, capsys):
    """By a judge that is learned from rollouts, and by one that an earlier tuning has left."""
    run, judge = tmp_path / "draft", ONLINE[2]
    where = [f"pretrained={trained / 'run'}", "nfe=[1]", *FEW, *QUICK, "trainer.steps=4"]
    rollouts = [*ONLINE[3:], judge, "method=draft_k", "method.grad_steps=5"]
    assert cli.main(["tune", *where, *rollouts, f"run_dir={run}"]) == 0
    assert result_of(capsys.readouterr().out)["method"] == "draft_k"
    before, after = weights_of(trained / "run"), weights_of(run)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (run / "value" / "checkpoints").is_dir()
    again = [f"judge={{path: {run / 'value'}}}", "method=alignprop"]
    assert cli.main(["tune", *where, *again, *UNSCORED, f"run_dir={tmp_path / 'again'}"]) == 0
    assert not (tmp_path / "again" / "rollouts.zarr").exists()
    assert cli.main(["tune", *where, "method=dpo", f"run_dir={tmp_path / 'other'}"]) == 1
    assert "use policy.prefer(...) or `diffpolicy prefer`" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::diffpolicy.training.identity.ResumeWarning")
@pytest.mark.filterwarnings("ignore:a student of prediction:UserWarning")
@pytest.mark.parametrize("method", ["consistency", "rectified"])
def test_a_policy_is_distilled(method, trained, tmp_path, capsys):
    run = tmp_path / method
    how = [f"method={method}", "method.num_steps=4", "trainer.steps=3", "nfe=[1]"]
    where = [str(trained / "run"), f"run_dir={run}"]
    assert cli.main(["distill", *where, *how, *FEW, *QUICK]) == 0
    assert result_of(capsys.readouterr().out)["method"] == method
    assert DiffusionPolicy.from_pretrained(run).spec.sampler.num_steps == 1
    assert cli.main(["resume", str(run), "trainer.steps=5"]) == 0
    again = ["method=halving", "method.num_steps=2", "trainer.steps=2", f"run_dir={tmp_path / 'h'}"]
    halved = cli.main(["distill", str(run), *again, *QUICK, *UNSCORED])
    if method == "consistency":  # which knows where paths end alone, not their steps
        assert halved == 1
        assert "distill the policy that it was made of" in capsys.readouterr().err
    else:
        assert halved == 0
        assert DiffusionPolicy.from_pretrained(tmp_path / "h").spec.sampler.num_steps == 2
    assert cli.main(["distill", "--print-config", str(run), "seed=3"]) == 0
    assert f"pretrained: {run}" in capsys.readouterr().out


def test_a_distillation_says_what_it_needs(trained, tmp_path, capsys):
    assert cli.main(["distill", str(trained / "run"), "method=dpo", f"run_dir={tmp_path}"]) == 1
    assert "DPO is a method of 'prefer', not of 'distill'" in capsys.readouterr().err
    assert cli.main(["distill", str(trained / "run"), "rounds=2", f"run_dir={tmp_path}"]) == 1
    assert "in one round, without rounds" in capsys.readouterr().err
    assert cli.main(["distill", "--help"]) == 0
    assert "method=halving" in capsys.readouterr().out
