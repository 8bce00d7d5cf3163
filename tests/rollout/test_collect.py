from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect

EXPERT = EnvSpec("rollout_fake_envs:rollout_fakes/ExpertPoint-v0")
SERIAL = Workers(num_envs=1, num_workers=0)
PARALLEL = Workers(num_envs=2, num_workers=2)
HERE = Path(__file__).parents[1] / "helpers"


def _collect(path, seeds=range(12), spec=EXPERT, workers=SERIAL, **more):
    return collect(spec, seeds, path, workers=workers, progress=False, **more)


def _contents(store):
    episodes = [store.episode(i) for i in range(store.num_episodes)]
    return [
        (attrs, {name: array.tobytes() for name, array in sorted(episode.items())})
        for attrs, episode in zip(store.episode_attrs, episodes, strict=True)
    ]


def test_stores_the_successes_in_the_order_of_the_seeds(tmp_path):
    store = _collect(tmp_path / "a.zarr", noise=0.1)
    failed = {3, 10}  # this expert is too weak for every seventh seed
    assert [a["seed"] for a in store.episode_attrs] == [s for s in range(12) if s not in failed]
    assert all(attrs["success"] for attrs in store.episode_attrs)
    assert store.attrs["collection"]["tried"] == 12
    assert store.attrs["collection"]["kept"] == 10
    assert store.attrs["collection"]["failed"] == {"3": "no success", "10": "no success"}
    assert store.attrs["env_id"] == EXPERT.id
    assert store.attrs["expert_noise"] == 0.1
    assert store.statistics["obs"]["count"] == store.num_steps
    first = store.episode(0)
    assert first["obs"].dtype == first["action"].dtype == np.float32
    np.testing.assert_allclose(first["action"], np.clip(-2 * first["obs"][:, :2], -1, 1), atol=1e-6)
    assert first["terminated"].tolist() == [False] * (len(first["obs"]) - 1) + [True]
    assert store.episode_attrs[0]["return"] == pytest.approx(first["reward"].sum(), rel=1e-5)


def test_serial_and_parallel_agree_exactly(tmp_path):
    one = _collect(tmp_path / "a.zarr", noise=0.1)
    two = _collect(tmp_path / "b.zarr", noise=0.1, workers=PARALLEL)
    assert _contents(one) == _contents(two)


def test_keep_all(tmp_path):
    store = _collect(tmp_path / "a.zarr", keep="all")
    assert store.num_episodes == 12
    assert [a["seed"] for a in store.episode_attrs if not a["success"]] == [3, 10]
    assert store.attrs["collection"]["failed"] == {}


def test_goes_on_with_more_seeds_and_skips_what_is_there(tmp_path):
    path = tmp_path / "a.zarr"
    _collect(path, range(5))
    store = _collect(path, range(12))
    assert _contents(store) == _contents(_collect(tmp_path / "b.zarr", range(12)))
    assert store.attrs["collection"]["tried"] == 12
    with pytest.raises(ValueError, match="was collected with"):
        _collect(path, range(12), noise=0.5)


def test_goes_on_after_being_killed(tmp_path):
    path = tmp_path / "a.zarr"
    script = f"""
import sys
sys.path[:0] = {[str(HERE)] + [p for p in sys.path if p]!r}
from diffpolicy.rollout.record.experts import collect
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.workers import Workers
collect(EnvSpec({EXPERT.id!r}), range(100_000), {str(path)!r}, noise=0.1,
        workers=Workers(num_envs=2, num_workers=2), progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if path.exists() and _episodes(path) >= 8:
                break
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    there = _episodes(path)
    assert there >= 8
    seeds = range(there * 7 // 6 + 20)  # beyond what was collected, failures included
    store = _collect(path, seeds, noise=0.1)
    assert _contents(store) == _contents(_collect(tmp_path / "b.zarr", seeds, noise=0.1))


def _episodes(path):
    try:
        return EpisodeStore.open(path).num_episodes
    except (FileNotFoundError, ValueError, KeyError):
        return 0  # being made


@pytest.mark.parametrize("kind", ["raise", "kill", "hang"])
def test_a_fault_costs_its_episode_alone(kind, tmp_path):
    clean = _collect(tmp_path / "clean.zarr", range(8))
    fault = {"kind": kind, "seed": 4, "step": 1}
    workers = Workers(num_envs=2, num_workers=2, timeout=1.0 if kind == "hang" else 30)
    spec = EnvSpec(EXPERT.id, {"fault": fault})
    store = _collect(tmp_path / "a.zarr", range(8), spec=spec, workers=workers)
    assert _contents(store) == [c for c in _contents(clean) if c[0]["seed"] != 4]
    assert sorted(store.attrs["collection"]["failed"]) == ["3", "4"]
    once = EnvSpec(EXPERT.id, {"fault": {**fault, "once": str(tmp_path / "struck")}})
    store = _collect(tmp_path / "b.zarr", range(8), spec=once, workers=workers)
    assert _contents(store) == _contents(clean)


def test_bad_input(tmp_path):
    point = EnvSpec("rollout_fake_envs:rollout_fakes/Point-v0")
    with pytest.raises(ValueError, match=r"no scripted expert.*expert_action\(rng"):
        _collect(tmp_path / "a.zarr", spec=point)
    with pytest.raises(ValueError, match="none of the 1 episodes was kept"):
        _collect(tmp_path / "b.zarr", [3])
    with pytest.raises(ValueError, match="seeds must differ"):
        _collect(tmp_path / "c.zarr", [1, 1])
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        _collect(tmp_path / "c.zarr", noise=-1)
    with pytest.raises(ValueError, match="unknown keep 'best'"):
        _collect(tmp_path / "c.zarr", keep="best")
