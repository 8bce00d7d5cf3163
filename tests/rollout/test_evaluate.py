from __future__ import annotations

import json
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from rollout_fake_envs import FakePoint

from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError
from diffpolicy.rollout.evaluate import VideoOptions, evaluate
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.results import EpisodeRecord, summarise
from diffpolicy.rollout.rows import AllFailedError, fitting

POINT = EnvSpec("rollout_fake_envs:rollout_fakes/Point-v0")
SERIAL = Workers(num_envs=3, num_workers=0)


def _run(policy, seeds=range(8), spec=POINT, workers=SERIAL, **more):
    return evaluate(policy, spec, seeds, workers=workers, progress=False, **more)


def _by_hand(policy, seed, spec=POINT):
    """One episode in a plain loop: what the evaluator has to find."""
    env = gym.make(spec.id, **spec.kwargs)
    obs, _ = env.reset(seed=seed)
    state, rewards, successes = policy.initial_state([seed]), [], []
    while True:
        actions, state = policy.act(np.float32(obs)[None], state)
        obs, reward, terminated, truncated, info = env.step(actions[0])
        rewards.append(reward)
        successes.append(bool(info["is_success"]))
        if terminated or truncated:
            env.close()
            return EpisodeRecord(
                seed=seed,
                episode_return=math.fsum(rewards),
                max_reward=max(rewards),
                length=len(rewards),
                success=any(successes),
                final_success=successes[-1],
                terminated=terminated,
                truncated=truncated,
                nfe=int(state.nfe[0]),
                plans=int(state.plans[0]),
            )


def test_agrees_with_a_plain_loop_to_the_last_step(make_fake_policy):
    policy = make_fake_policy(gain=0.3)
    result = _run(policy, range(12))
    assert result.episodes == tuple(_by_hand(policy, seed) for seed in range(12))
    assert any(episode.terminated for episode in result.episodes)
    assert any(episode.truncated for episode in result.episodes)


def test_an_episode_depends_on_its_seed_alone(fake_policy):
    seeds = list(range(9))
    reference = {e.seed: e for e in _run(fake_policy, seeds).episodes}
    for order, workers in (
        (seeds[::-1], SERIAL),
        ([4, 0, 7, 2, 8, 1, 5, 3, 6], Workers(num_envs=1, num_workers=0)),
        (seeds, Workers(num_envs=20, num_workers=0)),
        (seeds, Workers(num_envs=4, num_workers=2)),
        ([3, 8], Workers(num_envs=3, num_workers=1)),
    ):
        result = _run(fake_policy, order, workers=workers)
        assert [e.seed for e in result.episodes] == order
        assert all(e == reference[e.seed] for e in result.episodes)


def test_all_running_rows_go_into_one_call(make_fake_policy):
    policy = make_fake_policy()
    result = _run(policy, range(10), workers=Workers(num_envs=5, num_workers=0))
    assert policy.batches[0] == 5
    assert sum(policy.batches) == result.summary["steps"]
    assert max(policy.batches) == 5


def test_deterministic_is_passed_on(fake_policy):
    noisy = _run(fake_policy)
    quiet = _run(fake_policy, deterministic=True)
    assert quiet.episodes != noisy.episodes
    assert quiet.settings["deterministic"] is True


def test_a_threshold_replaces_what_the_environment_says(fake_policy):
    result = _run(fake_policy, success_threshold=-0.2)
    for episode in result.episodes:
        assert episode.success == (episode.max_reward >= -0.2)


def test_summary_by_hand():
    episodes = [
        EpisodeRecord(0, 3.0, 1.0, 10, True, False, True, False, nfe=20, plans=2),
        EpisodeRecord(1, 1.0, 0.5, 20, False, False, False, True, nfe=40, plans=4),
        EpisodeRecord(2, 2.0, 0.9, 30, True, True, False, True, nfe=60, plans=6),
        EpisodeRecord(
            3, math.nan, math.nan, 0, False, False, False, False, 0, 0, attempts=2, error="died"
        ),
    ]
    calls = [(9.0, 3), (0.010, 1), (0.020, 2), (0.030, 2)]
    got = summarise(episodes, calls=calls, wall_s=2.0)
    assert (got["n_episodes"], got["n_errors"], got["steps"], got["plans"]) == (4, 1, 60, 12)
    assert got["success"]["value"] == 0.5  # the error is in the denominator
    assert got["success"]["n"] == 4
    assert got["final_success"]["value"] == 0.25
    assert got["max_reward"]["value"] == pytest.approx(0.8)
    assert got["max_reward"]["n"] == 3
    assert got["return"]["value"] == pytest.approx(2.0)
    assert got["length"]["value"] == 20
    assert got["nfe_per_plan"] == 10
    assert got["ms_per_call"]["mean"] == pytest.approx(20.0)  # the first call is warm-up
    assert got["ms_per_plan"] == pytest.approx({"mean": 35 / 3, "p50": 10.0, "p95": 14.5})
    assert got["steps_per_s"] == 30


def test_a_task_without_success_has_no_success_rate():
    one = EpisodeRecord(0, 3.0, 1.0, 10, None, None, True, False, nfe=20, plans=2)
    assert summarise([one])["success"] is None
    # An error alone earns no 0 either: nobody knows whether the task has a notion of success.
    assert summarise([replace(one, success=False, error="died")])["success"] is None


def _faulty(kind, tmp_path=None, step=2):
    fault = {"kind": kind, "seed": 5, "step": step}
    if tmp_path is not None:
        fault["once"] = str(tmp_path / "struck")
    return EnvSpec(POINT.id, {"fault": fault})


@pytest.mark.parametrize("kind", ["raise", "kill", "hang"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_fault_that_strikes_once_costs_nothing(kind, step, fake_policy, tmp_path):
    clean = _run(fake_policy)
    workers = Workers(num_envs=4, num_workers=2, timeout=1.5 if kind == "hang" else 30)
    result = _run(fake_policy, spec=_faulty(kind, tmp_path, step), workers=workers)
    assert result.summary["n_errors"] == 0
    for got, want in zip(result.episodes, clean.episodes, strict=True):
        assert replace(got, attempts=1, failed_attempts=()) == want
        assert got.attempts == (2 if got.seed == 5 else 1)
    assert len(result.episodes[5].failed_attempts) == 1


@pytest.mark.parametrize(
    ("kind", "text"),
    [("raise", "the gripper is on fire"), ("kill", "SIGKILL"), ("hang", "in time"), ("nan", "nan")],
)
def test_a_fault_that_stays_is_an_error_in_the_denominator(kind, text, fake_policy):
    clean = _run(fake_policy)
    workers = Workers(num_envs=4, num_workers=2, timeout=1.5 if kind == "hang" else 30)
    with pytest.warns(RuntimeWarning, match="1 of 8 episodes failed and count as failures"):
        result = _run(fake_policy, spec=_faulty(kind), workers=workers)
    bad = result.episodes[5]
    assert bad.attempts == 2
    assert text in bad.error
    assert text in bad.failed_attempts[0]
    assert bad.success is False
    assert math.isnan(bad.episode_return)
    assert result.summary["n_errors"] == 1
    assert text in result.notes[0]
    assert result.summary["success"]["n"] == 8
    others = [e for e in result.episodes if e.seed != 5]
    assert others == [e for e in clean.episodes if e.seed != 5]
    rate = sum(e.success for e in others) / 8
    assert result.summary["success"]["value"] == pytest.approx(rate)


def test_without_retries_the_first_failure_counts(fake_policy):
    workers = Workers(num_envs=2, num_workers=0, retries=0)
    with pytest.warns(RuntimeWarning, match="failed"):
        result = _run(fake_policy, spec=_faulty("raise"), workers=workers)
    assert result.episodes[5].attempts == 1
    assert result.episodes[5].failed_attempts == ()


def test_a_pool_can_be_used_again(fake_policy):
    with WorkerPool(POINT, Workers(num_envs=3, num_workers=1)) as pool:
        first = _run(fake_policy, workers=pool)
        second = _run(fake_policy, workers=pool)
        few = _run(fake_policy, [2], workers=pool)
        with pytest.raises(ValueError, match="the pool runs"):
            _run(fake_policy, spec=_faulty("raise"), workers=pool)
    assert first.episodes == second.episodes
    assert few.episodes == first.episodes[2:3]


def test_results_are_json_and_written_whole(fake_policy, tmp_path):
    with pytest.warns(RuntimeWarning, match="failed"):
        result = _run(fake_policy, spec=_faulty("raise"))
    path = result.save(tmp_path / "deep" / "run")
    assert path.name == "eval.json"
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(result.to_dict()))
    assert read["episodes"][5]["return"] is None
    assert read["episodes"][0]["return"] == result.episodes[0].episode_return
    assert read["env"]["id"] == POINT.id
    assert "gymnasium" in read["env"]["versions"]
    assert read["settings"]["num_envs"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["eval.json"]
    assert result.save(tmp_path / "other.json").name == "other.json"
    assert result.save(tmp_path / "other.json").name == "other.json"  # an evaluation, replaced
    for content in ("{}", "notes of my own", '{"summary": 1}'):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(FileExistsError, match=r"mine.json is no evaluation"):
            result.save(tmp_path / "mine.json")
        assert (tmp_path / "mine.json").read_text() == content
    metrics = result.metrics()
    assert metrics["success"] == result.summary["success"]["value"]
    assert {"success_low", "success_high", "return", "max_reward", "n_errors"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())


def test_videos_of_the_first_episodes(fake_policy):
    clean = _run(fake_policy)
    result = _run(fake_policy, video=VideoOptions(episodes=2, side=32))
    assert [video.seed for video in result.videos] == [0, 1]
    for video, episode in zip(result.videos, result.episodes, strict=False):
        assert video.frames.shape == (episode.length + 1, 32, 32, 3)
        assert video.success == episode.success
    assert result.episodes == clean.episodes
    sparse = _run(fake_policy, video=VideoOptions(episodes=1, stride=3))
    length = result.episodes[0].length
    shown = [0, *range(3, length, 3), length]  # the last step always
    assert sparse.videos[0].frames[:, 0, 0, 0].tolist() == [10 * step for step in shown]


@pytest.mark.parametrize("fault", ["make", "draw", "kill"])
def test_failing_graphics_never_cost_a_score(fault, fake_policy):
    clean = _run(fake_policy)
    spec = EnvSpec(POINT.id, {"render_fault": fault})
    workers = Workers(num_envs=2, num_workers=1)
    result = _run(fake_policy, spec=spec, workers=workers, video=VideoOptions(episodes=2))
    assert result.videos == ()
    got = [replace(e, attempts=1, failed_attempts=()) for e in result.episodes]
    assert tuple(got) == clean.episodes
    if fault != "kill":
        assert "no video: RuntimeError" in result.notes[0]


def test_bad_input(make_fake_policy):
    with pytest.raises(ValueError, match=r"row 1 is not finite.*seed 1, step 0"):
        _run(make_fake_policy(nan_at=1))
    with pytest.raises(ValueError, match="seeds must differ"):
        _run(make_fake_policy(), [1, 2, 1])
    with pytest.raises(ValueError, match="no seeds"):
        _run(make_fake_policy(), [])
    with pytest.raises(EnvSpecError, match="No environment"):
        _run(make_fake_policy(), spec=EnvSpec("NoSuchThing-v0"))
    with pytest.raises(ValueError, match="at least 1"):
        VideoOptions(stride=0)

    class WrongShape(make_fake_policy):
        def act(self, obs, state, *, deterministic=False):
            actions, state = super().act(obs, state)
            return actions[:, :1], state

    with pytest.raises(ValueError, match=r"actions \(3, 1\), expected \(3, 2\)"):
        _run(WrongShape())


CHAOS = "rollout_fake_envs:rollout_fakes/Chaos-v0"


@pytest.mark.parametrize(
    "network",
    [
        {"type": "mlp", "width": 256, "depth": 2},
        {"type": "unet1d", "down_dims": [16, 32], "n_groups": 4},  # it tells the edge of a batch
    ],
    ids=["mlp", "unet1d"],
)
def test_no_bit_of_an_episode_depends_on_its_neighbours(network, make_diffusion_policy):
    policy, spec = make_diffusion_policy(network), EnvSpec(CHAOS)
    seeds = range(40, 46)
    alone = _run(policy, seeds, spec, Workers(1, 0)).episodes
    assert _run(policy, seeds, spec, Workers(5, 0)).episodes == alone
    with pytest.warns(RuntimeWarning, match="1 of 5 episodes failed"):
        broken = _run(policy, [45, 43, 41, 40, 44], EnvSpec(CHAOS, {"broken": [41]}), Workers(8, 0))
    sound = [e for e in broken.episodes if e.error is None]
    assert sound == [alone[i] for i in (5, 3, 0, 4)]
    exact = [_run(policy, [41, 44], spec, Workers(n, 0), plan_batch=1) for n in (1, 2)]
    assert exact[0].episodes == exact[1].episodes
    assert (exact[0].settings["plan_batch"], broken.settings["plan_batch"]) == (1, 8)


def test_if_every_episode_fails_there_is_no_score(fake_policy):
    spec = EnvSpec(CHAOS, {"broken": [1, 2]})
    with pytest.raises(
        AllFailedError, match=r"all 2 episodes failed.*RuntimeError.*gripper is on fire"
    ):
        _run(fake_policy, [1, 2], spec)


def test_an_environment_that_cannot_be_made_again_leaves_what_was_finished(fake_policy, tmp_path):
    once = {"pids": str(tmp_path / "pids"), "once": str(tmp_path / "struck")}
    spec = EnvSpec("rollout_fake_envs:rollout_fakes/Forker-v0", once)
    clean = _run(fake_policy, [5, 1, 3])
    workers = Workers(num_envs=1, num_workers=1)
    with pytest.warns(RuntimeWarning, match="2 of 3 episodes failed"):
        result = _run(fake_policy, [5, 1, 3], spec, workers)
    assert result.episodes[0] == clean.episodes[0]
    for episode in result.episodes[1:]:
        assert "the licence server says no" in episode.error
    assert any("environments were lost" in note for note in result.notes)


def test_environments_are_made_before_the_clock_starts(fake_policy):
    log = []

    class Logged(FakePoint):
        def __init__(self):
            log.append("made")
            super().__init__()

        def reset(self, **options):
            log.append("reset")
            return super().reset(**options)

    gym.register("rollout_logged/Logged-v0", entry_point=Logged, max_episode_steps=3)
    spec = EnvSpec("rollout_logged/Logged-v0")
    with WorkerPool(spec, Workers(num_envs=4, num_workers=0)) as pool:
        result = _run(fake_policy, [0, 1, 2], spec, pool)  # no more of them than episodes
    assert log == ["made"] * 3 + ["reset"] * 3
    assert result.summary["setup_s"] > 0
    with WorkerPool(POINT, Workers(num_envs=4, num_workers=2)) as pool:
        pool.make([0, 1, 3])
        parallel = _run(fake_policy, [0, 1, 2], workers=pool)
    assert parallel.episodes == _run(fake_policy, [0, 1, 2]).episodes


def test_no_more_environments_than_pay():
    asked = Workers(num_envs=64, num_workers=2)
    assert fitting(asked, 64).num_envs == 8
    assert fitting(asked, 64, plan_batch=64).num_envs == 64
    assert fitting(asked, 1000).num_envs == 64
    assert fitting(asked, 3).num_envs == 3
    assert fitting(None, 100).num_envs == 8
