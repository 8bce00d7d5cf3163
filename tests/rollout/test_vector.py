from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError
from diffpolicy.rollout.pool import supervisor
from diffpolicy.rollout.pool import workers as vector
from diffpolicy.rollout.pool.slots import Failure, Outcome
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool

POINT = EnvSpec("rollout_fake_envs:rollout_fakes/Point-v0")
EXPERT = EnvSpec("rollout_fake_envs:rollout_fakes/ExpertPoint-v0")
HERE = Path(__file__).parents[1] / "helpers"


def _faulty(kind, seed=1, step=1, **more):
    return EnvSpec(POINT.id, {"fault": {"kind": kind, "seed": seed, "step": step, **more}})


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _pids(pool):
    return [process.proc.pid for process in pool._supervisor.processes]


def _await_gone(pids, patience=5.0):
    deadline = time.monotonic() + patience
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [pid for pid in pids if _alive(pid)]


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def _begin_step(pool, rows):
    values = {"action": np.zeros((len(rows), 2), np.float32), "frame": [False] * len(rows)}
    pool._supervisor.order("step", rows, values)


def _run_rows(pool, steps=3):
    """Some resets and steps, as one comparable value."""
    rows = list(range(pool.num_envs))
    seen = [pool.reset(rows, [10 + row for row in rows])]
    rng = np.random.default_rng(0)
    seen += [
        pool.step(rng.uniform(-1, 1, (len(rows), 2)).astype(np.float32), rows) for _ in range(steps)
    ]
    return [
        (row, out.obs.tolist(), out.reward, out.terminated, out.truncated, out.success)
        for results in seen
        for row, out in results.items()
    ]


def test_serial_and_parallel_agree_exactly():
    runs = []
    for num_workers in (0, 1, 2, 5):
        with WorkerPool(POINT, Workers(num_envs=5, num_workers=num_workers)) as pool:
            assert pool.num_workers == num_workers
            assert (pool.info.obs_dim, pool.info.action_dim) == (3, 2)
            runs.append(_run_rows(pool))
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize(("cheap_s", "processes"), [(math.inf, 1), (0.0, 2)])
def test_the_number_of_processes_follows_the_cost_of_a_step(cheap_s, processes, monkeypatch):
    monkeypatch.setattr(vector, "CHEAP_S", cheap_s)
    monkeypatch.setattr(supervisor, "_cores", lambda: 2)
    with WorkerPool(POINT, Workers(num_envs=5)) as pool:
        assert pool.num_workers == processes
        assert isinstance(pool.step(np.zeros((1, 2), np.float32), [0])[0], Failure)
        got = _run_rows(pool)
    with WorkerPool(POINT, Workers(num_envs=5, num_workers=0)) as pool:
        assert got == _run_rows(pool)


def test_rows_can_be_driven_apart():
    with WorkerPool(POINT, Workers(num_envs=4, num_workers=2)) as pool:
        pool.reset([3, 0], [7, 8])
        first = pool.step(np.zeros((1, 2), np.float32), [3])
        second = pool.step(np.zeros((2, 2), np.float32), [0, 3])
        assert list(first) == [3]
        assert list(second) == [0, 3]
        assert first[3].obs[2] == 1
        assert second[3].obs[2] == 2
        assert second[0].obs[2] == 1
        untouched = pool.step(np.zeros((1, 2), np.float32), [1])[1]
        assert isinstance(untouched, Failure)
        assert "no episode was begun" in untouched.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_there_is_no_automatic_reset(num_workers):
    spec = EnvSpec(POINT.id, max_episode_steps=1)
    with WorkerPool(spec, Workers(num_envs=2, num_workers=num_workers)) as pool:
        pool.reset([0, 1], [1, 2])
        out = pool.step(np.zeros((2, 2), np.float32), [0, 1])
        assert all(one.truncated for one in out.values())
        assert all(one.obs[2] == 1 for one in out.values())  # the last observation, not a new one
        again = pool.step(np.zeros((1, 2), np.float32), [0])[0]
        assert isinstance(again, Failure)
        assert "call reset() first" in again.text


def test_an_environment_that_raises_costs_its_row_alone():
    with WorkerPool(_faulty("raise"), Workers(num_envs=4, num_workers=2, timeout=20)) as pool:
        before = _pids(pool)
        pool.reset(range(4), [0, 1, 2, 3])
        out = pool.step(np.zeros((4, 2), np.float32), range(4))
        assert [isinstance(out[row], Outcome) for row in range(4)] == [True, False, True, True]
        assert out[1].kind == "raised"
        assert "the gripper is on fire" in out[1].text
        assert "Traceback" in out[1].text
        assert _pids(pool) == before
        assert isinstance(pool.reset([1], [5])[1], Outcome)
        on = pool.step(np.zeros((4, 2), np.float32), range(4))
        assert [on[row].obs[2] for row in range(4)] == [2, 1, 2, 2]


@pytest.mark.parametrize(
    ("kind", "told", "text"),
    [("kill", "died", r"killed by signal SIGKILL \(9\)"), ("hang", "timed out", "did not answer")],
)
def test_a_worker_that_is_killed_or_hangs_is_replaced_in_time(kind, told, text):
    timeout = 1.5
    with WorkerPool(_faulty(kind), Workers(num_envs=4, num_workers=2, timeout=timeout)) as pool:
        before = _pids(pool)
        pool.reset(range(4), [0, 1, 2, 3])
        began = time.monotonic()
        out = pool.step(np.zeros((4, 2), np.float32), range(4))
        assert time.monotonic() - began < timeout + 1
        assert isinstance(out[0], Outcome)
        assert isinstance(out[2], Outcome)
        assert out[1].kind == told
        assert re.search(text, out[1].text)
        # Row 3 shares the process of row 1: its episode is gone, but not by its own fault.
        assert out[3].kind == "lost"
        assert "row 1" in out[3].text
        assert _pids(pool)[0] == before[0]
        assert _pids(pool)[1] != before[1]
        assert _await_gone(before[1:]) == []
        fresh = pool.reset([1, 3], [5, 6])
        assert all(isinstance(one, Outcome) for one in fresh.values())
        on = pool.step(np.zeros((4, 2), np.float32), range(4))
        assert [on[row].obs[2] for row in range(4)] == [2, 1, 2, 1]


def test_a_worker_that_is_killed_from_outside_between_two_steps():
    with WorkerPool(POINT, Workers(num_envs=3, num_workers=3)) as pool:
        pool.reset(range(3), [1, 2, 3])
        os.kill(_pids(pool)[2], signal.SIGKILL)
        out = pool.step(np.zeros((3, 2), np.float32), range(3))
        assert [type(out[row]) for row in range(3)] == [Outcome, Outcome, Failure]
        assert "SIGKILL" in out[2].text
        assert isinstance(pool.reset([2], [3])[2], Outcome)


def test_a_stopped_worker_is_given_up():
    with WorkerPool(POINT, Workers(num_envs=2, num_workers=2, timeout=0.5)) as pool:
        pool.reset(range(2), [1, 2])
        os.kill(_pids(pool)[1], signal.SIGSTOP)
        out = pool.step(np.zeros((2, 2), np.float32), range(2))
        assert out[1].kind == "timed out"


def test_an_observation_that_is_not_finite_is_an_error_of_the_row():
    with WorkerPool(_faulty("nan", step=0), Workers(num_envs=2, num_workers=0)) as pool:
        # The fault strikes in reset(), where only the observation can show it.
        assert "observation that is not finite at [0, 1]" in pool.reset([0], [1])[0].text


@needs_proc
def test_no_process_outlives_close_an_exception_or_the_last_reference():
    pool = WorkerPool(POINT, Workers(num_envs=2, num_workers=2))
    pids = _pids(pool)
    assert all(map(_alive, pids))
    pool.close()
    assert _await_gone(pids) == []
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.reset([0], [0])

    def fail_inside():
        with WorkerPool(POINT, Workers(num_envs=2, num_workers=2)) as pool:
            pids.extend(_pids(pool))
            pool.reset([0], [1])
            _begin_step(pool, [0])
            raise KeyError("in the middle of a step")

    with pytest.raises(KeyError):
        fail_inside()
    pool = WorkerPool(_faulty("hang"), Workers(num_envs=2, num_workers=2))
    pids.extend(_pids(pool))
    pool.reset([0, 1], [0, 1])
    _begin_step(pool, [0, 1])
    del pool
    gc.collect()
    assert _await_gone(pids) == []


@needs_proc
def test_no_process_outlives_a_parent_that_is_killed():
    script = f"""
import os, signal, sys, time, threading
sys.path[:0] = {[str(HERE)] + [p for p in sys.path if p]!r}
import numpy as np
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.workers import WorkerPool, Workers
spec = EnvSpec({POINT.id!r}, {{"fault": {{"kind": "hang", "seed": 1, "step": 1}}}})
pool = WorkerPool(spec, Workers(num_envs=2, num_workers=2))  # no __main__ guard is needed
pool.reset([0, 1], [0, 1])
values = {{"action": np.zeros((2, 2), np.float32), "frame": [False, False]}}
pool._supervisor.order("step", [0, 1], values)
print([p.proc.pid for p in pool._supervisor.processes], flush=True)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False, timeout=60
    )
    pids = json.loads(done.stdout)
    assert len(pids) == 2
    assert _await_gone(pids) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_id_that_does_not_exist_is_one_error_not_a_restart(num_workers):
    with pytest.raises(EnvSpecError, match="Close matches: Pendulum-v1"):
        WorkerPool(EnvSpec("Pendulum-v11"), Workers(num_envs=2, num_workers=num_workers))


def test_workers_load_neither_torch_nor_zarr():
    spec = EnvSpec("rollout_fake_envs:rollout_fakes/Modules-v0")
    with WorkerPool(spec, Workers(num_envs=1, num_workers=1)) as pool:
        torch_loaded, zarr_loaded, pid = pool.reset([0], [0])[0].obs
    assert (torch_loaded, zarr_loaded) == (0, 0)
    assert pid != os.getpid()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_frames(num_workers):
    workers = Workers(num_envs=2, num_workers=num_workers)
    with WorkerPool(POINT, workers, frame_side=32) as pool:  # drawn with 64 x 64
        start = pool.reset([0, 1], [1, 2], frames=[True, False])
        assert start[0].frame.shape == (32, 32, 3)
        assert start[1].frame is None
        assert start[0].frame.dtype == np.uint8
        out = pool.step(np.zeros((2, 2), np.float32), [0, 1], frames=[False, True])
        assert out[0].frame is None
        assert (out[1].frame == 10).all()
        for _ in range(11):  # to the end of the episode, which alone is drawn
            assert out[0].frame is None
            out = pool.step(np.zeros((1, 2), np.float32), [0], frames=["end"])
        assert out[0].truncated
        assert out[0].frame is not None
    with WorkerPool(POINT, workers) as pool:
        assert "without frames" in pool.reset([0], [1], frames=[True])[0].note


@pytest.mark.parametrize("fault", ["make", "draw"])
def test_without_graphics_everything_else_works(fault):
    spec = EnvSpec(POINT.id, {"render_fault": fault})
    with WorkerPool(spec, Workers(num_envs=1, num_workers=0), frame_side=64) as pool:
        out = pool.reset([0], [1], frames=[True])[0]
    assert out.frame is None
    assert out.note.startswith("RuntimeError: no")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_expert_acts_cleanly_and_is_disturbed(num_workers):
    noise = []
    with WorkerPool(EXPERT, Workers(num_envs=2, num_workers=num_workers)) as pool:
        for seed in range(4):
            before = pool.reset([0, 1], [seed, seed + 10])
            after = pool.expert_step(0.2, [0, 1])
            for row in (0, 1):
                clean = np.clip(-2.0 * before[row].obs[:2], -1, 1)
                if seed + 10 * row not in (3, 10):  # where the expert is weak
                    np.testing.assert_allclose(after[row].action, clean, atol=1e-6)
                    moved = after[row].obs[:2] - before[row].obs[:2]
                    # Noise goes where the mask says.
                    np.testing.assert_allclose(moved[1], 0.5 * clean[1], atol=1e-6)
                    noise.append(moved[0] - 0.5 * clean[0])
    assert np.max(np.abs(noise)) > 0.05


def test_an_interrupt_leaves_the_pool_usable(monkeypatch):
    with WorkerPool(POINT, Workers(num_envs=2, num_workers=1)) as pool:
        pool.reset([0, 1], [1, 2])
        with monkeypatch.context() as patch:

            def interrupted():
                raise KeyboardInterrupt

            patch.setattr(pool._supervisor, "events", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.step(np.zeros((2, 2), np.float32), [0, 1])
        out = pool.reset([0, 1], [3, 4])
        assert all(isinstance(one, Outcome) for one in out.values())
        assert all(one.obs[2] == 0 for one in out.values())


def test_misuse():
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        Workers(num_envs=0)
    with pytest.raises(ValueError, match="num_workers"):
        Workers(num_workers=-1)
    with pytest.raises(ValueError, match="timeout must be positive"):
        Workers(timeout=0)
    with pytest.raises(ValueError, match="retries"):
        Workers(retries=-1)
    with WorkerPool(POINT, Workers(num_envs=2, num_workers=0)) as pool:
        with pytest.raises(ValueError, match=r"0\.\.1, got \[0, 2\]"):
            pool.reset([0, 2], [1, 2])
        with pytest.raises(ValueError, match="2 rows but seed of 1"):
            pool.reset([0, 1], [1])
        with pytest.raises(ValueError, match=r"actions must be \[2, 2\], got \[2, 3\]"):
            pool.step(np.zeros((2, 3)), [0, 1])
        with pytest.raises(ValueError, match="2 rows but frame of 1"):
            pool.reset([0, 1], [1, 2], frames=[True])


def _forker(tmp_path, **more):
    return EnvSpec(
        "rollout_fake_envs:rollout_fakes/Forker-v0", {"pids": str(tmp_path / "pids"), **more}
    )


@needs_proc
def test_what_an_environment_has_started_ends_with_its_worker(tmp_path):
    with WorkerPool(_forker(tmp_path), Workers(num_envs=2, num_workers=2)) as pool:
        pool.reset([0, 1], [0, 2])
        os.kill(_pids(pool)[0], signal.SIGKILL)
        began = time.monotonic()
        out = pool.step(np.zeros((2, 2), np.float32), [0, 1])
        # Its child still holds the socket, so that no end of it is to be read.
        assert time.monotonic() - began < 10
        assert out[0].kind == "died"
        assert isinstance(pool.reset([0], [0])[0], Outcome)
        children = [int(line) for line in (tmp_path / "pids").read_text().split()]
        assert len(children) == 3
        assert _await_gone(children[:1]) == [] or _await_gone(children[1:2]) == []
    assert _await_gone(children) == []


def test_a_worker_that_cannot_be_started_again_costs_its_rows_and_says_why(tmp_path):
    spec = _forker(tmp_path, once=str(tmp_path / "struck"))
    with WorkerPool(spec, Workers(num_envs=4, num_workers=2)) as pool:
        pool.reset(range(4), [0, 1, 2, 3])
        out = pool.step(np.zeros((4, 2), np.float32), range(4))
        assert [type(out[row]) for row in range(4)] == [Outcome, Failure, Outcome, Failure]
        for _ in range(4):  # it is tried some times before it is given up
            again = pool.reset([1, 3], [1, 3])
        assert [again[row].kind for row in (1, 3)] == ["gone", "gone"]
        assert "the licence server says no" in again[1].text
        assert "gave up after 3 failed starts" in again[1].text
        on = pool.step(np.zeros((2, 2), np.float32), [0, 2])
        assert all(isinstance(one, Outcome) for one in on.values())
