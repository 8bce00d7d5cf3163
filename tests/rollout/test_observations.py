"""Observations of several things at once, from the environment to the policy and the store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffpolicy.data.observation import ObsField, check, count
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec, EnvSpecError, describe
from diffpolicy.rollout.evaluate import evaluate
from diffpolicy.rollout.labelling.clips import ClipError, ClipRenderer
from diffpolicy.rollout.pool.slots import to_flat
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.record.branches import Branching, collect_rollouts
from diffpolicy.rollout.record.experts import collect

NAMED = EnvSpec("rollout_fake_envs:rollout_fakes/Dict-v0")
IMAGE = EnvSpec("rollout_fake_envs:rollout_fakes/Image-v0")
FIELDS = {
    "state": ObsField((2,), "float64"),
    "desired_goal": ObsField((2,), "float32", "goal"),
    "camera": ObsField((6, 8, 3), "uint8", "image"),
    "clock": ObsField((1,), "int64"),
}
STORED = {"obs.state": "float64", "obs.desired_goal": "float32", "obs.camera": "uint8"}


@pytest.fixture
def named_policy(make_fake_policy):
    """Walks by the entry ``state``; notes what it sees, looks on, and plans every other step."""

    class Named(type(make_fake_policy())):
        n_obs_steps, n_action_steps = 2, 2

        def act(self, obs, state, *, deterministic=False):
            check(obs, FIELDS)
            for name, field in FIELDS.items():
                assert obs[name].dtype == field.dtype
            return super().act(obs["state"], state, deterministic=deterministic)

        def observe(self, obs, state):
            check(obs, FIELDS)
            return replace(state, steps=state.steps + 0 * count(obs))

    return Named()


def test_what_an_environment_observes_is_described():
    assert describe(NAMED).obs == FIELDS
    assert describe(IMAGE).obs == ObsField((6, 8, 3), "uint8", "image")
    with pytest.raises(EnvSpecError, match=r"obs\.camera.*one vector is needed"):
        _ = describe(NAMED).obs_dim


@pytest.mark.parametrize("spec", [NAMED, IMAGE])
def test_processes_send_native_types(spec):
    runs = []
    for num_workers in (0, 2):
        with WorkerPool(spec, Workers(num_envs=3, num_workers=num_workers)) as pool:
            pool.reset(range(3), range(3))
            outcomes = pool.step(np.full((3, 2), 0.5), range(3)).values()
            for outcome in outcomes:
                check(outcome.obs, pool.info.obs, lead=())
            runs.append([to_flat(outcome) for outcome in outcomes])
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert getattr(other[name], "dtype", None) == getattr(value, "dtype", None)
            np.testing.assert_array_equal(other[name], value)


def test_an_evaluation_does_not_depend_on_processes(named_policy):
    workers = Workers(num_envs=4, num_workers=2)
    one = evaluate(named_policy, NAMED, range(6), workers=workers, progress=False)
    other = evaluate(
        named_policy, NAMED, range(6), workers=replace(workers, num_workers=0), progress=False
    )
    assert one.episodes == other.episodes


def test_an_entry_that_is_missing_or_not_finite_is_an_error_of_the_row():
    broken = EnvSpec(NAMED.id, {"fault": {"kind": "nan", "seed": 1, "step": 0}})
    with WorkerPool(broken, Workers(num_envs=1, num_workers=0)) as pool:
        told = pool.reset([0], [1])[0].text
    assert "observation 'state' that is not finite at [0, 1]" in told


def test_demonstrations_are_stored_by_name(tmp_path):
    store = collect(NAMED, range(5), tmp_path / "a.zarr", progress=False)
    assert {name: store.fields[name].dtype for name in STORED} == STORED
    first = store.episode(0)
    np.testing.assert_allclose(first["action"], np.clip(-2 * first["obs.state"], -1, 1), atol=1e-6)
    assert first["obs.camera"][:, 0, 0, 0].tolist() == list(range(len(first["action"])))
    assert "obs.state" in store.statistics
    images = EnvSpec(IMAGE.id)
    with pytest.raises(ValueError, match="no scripted expert"):
        collect(images, range(5), tmp_path / "b.zarr", progress=False)


def test_branches_are_compared_and_shown_by_name(tmp_path, named_policy):
    preferences = collect_rollouts(
        named_policy,
        NAMED,
        range(2),
        store_path=tmp_path / "a.zarr",
        prefs_path=tmp_path / "a.jsonl",
        settings=Branching(points=2, branches=2, lookahead=4, common_noise=False),
        workers=Workers(num_envs=3, num_workers=0),
        progress=False,
    )
    assert len(preferences.pairs()) == 4
    store = EpisodeStore.open(tmp_path / "a.zarr")
    assert {name: store.fields[name].dtype for name in STORED} == STORED
    with ClipRenderer(store, side=64) as renderer:
        assert renderer.frames(preferences.pairs()[0].chosen).shape[1:] == (64, 64, 3)
    with (
        store_of_other_actions(store, tmp_path) as wrong,
        ClipRenderer(wrong) as renderer,
        pytest.raises(ClipError, match=r"another observation at step 1"),
    ):
        renderer.frames(preferences.pairs()[0].chosen)


def store_of_other_actions(store, folder):
    """The same episodes with actions that were not executed."""
    attrs = {name: store.attrs[name] for name in ("env_id", "env_kwargs", "max_episode_steps")}
    copy = EpisodeStore.create(folder / "wrong.zarr", store.fields, attrs=attrs)
    for i in range(store.num_episodes):
        episode = store.episode(i)
        copy.append({**episode, "action": episode["action"] + 1}, **store.episode_attrs[i])
    return copy


def test_fetch_as_it_comes(make_fake_policy):
    """Without the wrapper that makes one vector of it."""
    pytest.importorskip("gymnasium_robotics")
    spec = EnvSpec("gymnasium_robotics:FetchReach-v4", {}, 5)
    info = describe(spec)
    assert {name: (field.shape, field.role) for name, field in info.obs.items()} == {
        "observation": ((10,), "state"),
        "achieved_goal": ((3,), "state"),
        "desired_goal": ((3,), "goal"),
    }
    assert {"gymnasium-robotics", "mujoco"} <= info.versions.keys()

    class Reaches(type(make_fake_policy())):
        def act(self, obs, state, *, deterministic=False):
            check(obs, info.obs)
            way = np.clip(10 * (obs["desired_goal"] - obs["achieved_goal"]), -1, 1)
            _, state = super().act(way, state, deterministic=True)
            return np.concatenate([way, 0 * way[:, :1]], axis=1), state

    result = evaluate(Reaches(), spec, range(2), workers=Workers(2, 0), progress=False)
    assert result.summary["length"]["value"] == 5
