"""Policies whose plans say actions another way: at their boundary, in starts, blends and files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy
from diffpolicy.data.action_groups import ActionGroup
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.learning import Learning, examples, objective
from diffpolicy.policies.boundary import Gripper
from diffpolicy.policies.chunking import Chunking
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.streaming import StreamingPlanner
from diffpolicy.policies.truncated import Truncated

POSE = (0, 1, 2, 3, 4, 5, 6)
ARM = ActionGroup(POSE, kind="relative", of=POSE, rotation="quaternion_xyzw", pose=True)
NETWORK = {"type": "mlp", "width": 16, "depth": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EpisodeStore:
    """An arm far from the origin whose commands are a little ahead of it, and a gripper."""
    path, rng = tmp_path_factory.mktemp("arm") / "arm.zarr", np.random.default_rng(0)
    with EpisodeStore.create(path, {"obs": (8,), "action": (8,)}) as made:
        for _ in range(6):
            walk = rng.normal(size=(21, 7)).cumsum(0) * 0.05 + 5 * rng.normal(size=7)
            walk[:, 3:7] /= np.linalg.norm(walk[:, 3:7], axis=1, keepdims=True)
            walk[:, 3:7] *= np.sign(walk[:, 6:7])
            rows = np.concatenate([walk, rng.choice([-1, 1], (21, 1))], 1).astype(np.float32)
            made.append({"obs": rows[:-1], "action": rows[1:]})
    return EpisodeStore.open(path)


def policy_of(store, *groups, **spec) -> DiffusionPolicy:
    sizes = {"horizon": 8, "n_obs_steps": 2, "n_action_steps": 3, "network": NETWORK}
    sizes |= {"sampler": {"num_steps": 2}, "actions": [vars(group) for group in groups]}
    made = DiffusionPolicy.from_dataset(store, spec={**sizes, **spec})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def observations(store, steps: int, rows: int = 2) -> np.ndarray:
    return np.stack([store.read("obs", 20 * row, 20 * row + steps) for row in range(rows)], 1)


def test_an_absolute_group_changes_not_a_bit(store):
    plain, grouped = policy_of(store), policy_of(store, ActionGroup(tuple(range(8))))
    obs = observations(store, 5)
    states = [policy.initial_state([0, 1]) for policy in (plain, grouped)]
    for seen in obs:
        both = [p.act(seen, s) for p, s in zip((plain, grouped), states, strict=True)]
        np.testing.assert_array_equal(both[0][0], both[1][0])
        states = [state for _, state in both]


@pytest.mark.parametrize("kind", ["relative", "delta"])
def test_plans_are_remembered_absolutely_and_warm_starts_are_said_anew(store, kind):
    """A warm start after k steps equals re-expressing the absolute plan in the new state."""
    group = replace(ARM, kind=kind)
    policy = policy_of(store, group, rti={"t_start": 0.3}, grippers=[{"dim": 7, "mode": "scale"}])
    assert (policy.action_dim, policy.plan_dim) == (8, 3 + 6 + 1)
    assert policy.boundary.grippers == (Gripper(9, "scale"),)
    obs, state = observations(store, 5), policy.initial_state([0, 1])
    state = policy.replan(policy.observe(obs[0], state), [0, 1])
    actions = policy.to_actions(state.plan)
    assert np.abs(actions[..., :3] - obs[0][:, None, :3]).max() < 5  # near the arm, wherever it is
    np.testing.assert_allclose(np.linalg.norm(actions[..., 3:7], axis=-1), 1, atol=1e-5)
    assert set(np.unique(actions[..., 7].round(4))) <= {-1.0, 1.0}
    for seen in obs[1:3]:
        state = policy.observe(seen, policy.execute(state)[1])
    says, normal = policy.spec.representation, policy.normalizer
    moved = torch.from_numpy(actions[:, [*range(2, 8), 7, 7]])  # by the two steps; the last held
    said = says.relative(says.entries(moved), torch.from_numpy(obs[2]))
    guess = policy.shifted(state)
    expected = normal.normalize("action", said).numpy()
    np.testing.assert_allclose(guess[..., :9], expected[..., :9], atol=2e-3)
    scale = np.abs(normal.to_tensors()["action.scale"].numpy()[:9])
    np.testing.assert_allclose(guess[..., :9] / scale, expected[..., :9] / scale, atol=2e-5)


def test_what_the_network_says_is_the_same_wherever_the_arm_is(store):
    """Relative plans of an observation that moved by a constant move by it, bar the condition."""
    group = ActionGroup((0, 1, 2), kind="relative", of=(0, 1, 2))
    policy = policy_of(store, group)
    obs, plan = torch.randn(2, 8), torch.randn(2, 8, 8)
    here = policy.boundary.absolute(plan, obs).numpy()
    obs[:, :3] += 7
    there = policy.boundary.absolute(plan, obs).numpy()
    change = policy.to_actions(there) - policy.to_actions(here)
    np.testing.assert_allclose(change[..., :3], 7, atol=1e-4)
    np.testing.assert_array_equal(change[..., 3:], 0)


def test_plans_of_different_states_blend_absolutely(store):
    """Averages and frozen actions of relative plans are those of the actions they mean."""
    policy = policy_of(store, ARM)
    obs = observations(store, 4)
    many = TemporalEnsemble(policy, m=0.0)
    state, meant = many.initial_state([0, 1]), []
    for step, seen in enumerate(obs):
        action, state = many.act(seen, state)
        meant.append(policy.to_actions(state.plan)[:, 1:])
        mean = np.mean([plan[:, step - i, :3] for i, plan in enumerate(meant)], 0)
        np.testing.assert_allclose(action[:, :3], mean, atol=1e-4)
    blended = policy.chunked(Chunking("zeros"))
    state = blended.replan(blended.observe(obs[0], blended.initial_state([0, 1])), [0, 1])
    before = policy.to_actions(state.plan)
    for seen in obs[1:3]:
        state = blended.observe(seen, blended.execute(state)[1])
    state = blended.replan(replace(state, delay=np.array([2, 2])), [0, 1])
    after = policy.to_actions(state.plan)
    np.testing.assert_allclose(after[:, 1:3], before[:, 3:5], atol=1e-3)
    assert np.abs(after[:, 3:] - before[:, 5:][:, [0, 1, 2, 2, 2]]).max() > 1e-2


def test_groups_stand_behind_what_is_imagined(store):
    """Plans of layout joint translate their actions and leave the rest as it is."""
    parts = {"type": "modalities", "base": NETWORK, "width": 16}
    joint = {"layout": "joint", "imagined": {"field": "obs"}, "network": parts}
    policy = policy_of(store, ARM, **joint, rti={"t_start": 0.3})
    assert policy.plan_dim == 8 + 10
    obs, plan = torch.randn(2, 8), torch.randn(2, 8, 18)
    said = policy.boundary.relative(plan, obs)
    assert torch.equal(said[..., :8], plan[..., :8])
    alone = policy.boundary.relative(plan[..., 8:], obs)
    assert torch.equal(said[..., 8:], alone)
    seen, state = observations(store, 3), policy.initial_state([0, 1])
    for step in seen:
        action, state = policy.act(step, state)
    assert np.abs(action[:, :3] - seen[0][:, :3]).max() < 5
    episodes = range(len(store.episode_ends))
    batch = examples(policy.spec, policy.normalizer, store, Learning(), episodes)
    loss = objective(policy, Learning())(batch.gather(torch.arange(4)), torch.Generator())
    assert loss.loss.isfinite().all()


def test_choices_are_checked_where_there_are_actions():
    rows = {"obs": np.zeros((4, 1)), "action": np.array([[1], [2], [3], [1]])}
    store = EpisodeStore.from_arrays(rows, [4])
    store.append({"obs": np.zeros((4, 1))}, actions=False)  # read as 0, which is no choice
    store.finalize()
    group = ActionGroup((0,), choices=3, first=1)
    assert policy_of(store, group).plan_dim == 3


def test_what_cannot_be_said_anew_is_refused(store):
    policy = policy_of(store, ARM, level_law="position", network={"type": "transformer"})
    with pytest.raises(ValueError, match="buffer holds noisy actions"):
        policy.streaming()
    turned = replace(ARM, kind="absolute", of=())
    steady = policy_of(store, turned, level_law="position", network={"type": "transformer"})
    assert isinstance(steady.streaming(), StreamingPlanner)
    with pytest.raises(ValueError, match="belongs to the weights"):
        policy.with_settings(actions=())
    with pytest.raises(ValueError, match="relative_to is for plans of actions as they are"):
        policy.with_anchors(store, relative_to=(None,) * 10)
    with pytest.raises(ValueError, match="not said as it is in plans"):
        policy_of(store, ARM, grippers=[{"dim": 3}])
    with pytest.raises(ValueError, match="go with layout 'action' or 'joint'"):
        policy_of(store, ARM, layout="trajectory")
    with pytest.raises(ValueError, match="do not cover it"):
        policy_of(store, ActionGroup((7,), choices=2, first=0))


def test_files_hold_the_boundary(store, tmp_path):
    """Saved, and exported as whole loops, the policy acts the same."""
    policy = policy_of(store, ARM, rti={"t_start": 0.3, "num_steps": 1})
    loaded = DiffusionPolicy.load(policy.save(tmp_path / "p"))
    assert loaded.spec == policy.spec
    obs, state = observations(store, 8), policy.initial_state([0, 1])
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    from diffpolicy.runtime.exported import load_exported

    pytest.importorskip("onnx", reason="needs the onnx extra")
    from diffpolicy.runtime.export import export_policy

    export_policy(policy, tmp_path / "e", batch_size=2)
    compiled = policy.compile(backend="onnxruntime", batch_size=2, threads=1)
    fast, _ = compiled.act(obs[0], state)
    np.testing.assert_allclose(fast, policy.act(obs[0], state)[0], atol=1e-4)
    running, other = load_exported(tmp_path / "e"), loaded.initial_state([0, 1])
    for seen in obs:
        due = bool(policy.needs_plan(state).any())
        state = policy.observe(seen, state)
        if due:
            warm = policy.starts_warm(state).all()
            draws = policy.loop("warm" if warm else "cold").draws
            noise = policy.draw_noise(state, draws, False).numpy()
            given = running.plan(state.history, noise=noise)
            state = policy.replan(state, [0, 1])
            made = policy.to_actions(state.plan[:, 1:4])
            np.testing.assert_allclose(given.actions, made, atol=5e-5)
        action, state = policy.execute(state)
        again, other = loaded.act(seen, other)
        np.testing.assert_array_equal(action, again)


def test_anchors_and_levels_are_of_what_plans_say(store):
    policy = policy_of(store, ARM)
    both = Truncated(sources=("anchors", "previous"))
    truncated = policy.with_anchors(store, truncated=both, count=3)
    assert truncated.anchors is not None
    assert truncated.anchors.plans.shape == (3, 8, 10)
    history = observations(store, 2).swapaxes(0, 1)
    actions, scores = truncated.plans(history)
    assert (actions.shape, scores.shape) == ((2, 4, 8, 8), (2, 4))
    assert np.abs(actions[..., :3] - history[:, None, -1:, :3]).max() < 5
    near, report = policy.choose_rti(store, episodes=4)
    assert isinstance(near.spec.rti, RTI)
    assert report.shift_error is not None
    assert report.shift_error < 10


def test_relative_plans_learn_where_absolute_ones_do_not(tmp_path):
    """Commands one step from a state that is seen nowhere twice: what is learned is the step."""
    rng, path = np.random.default_rng(0), tmp_path / "walk.zarr"
    with EpisodeStore.create(path, {"obs": (3,), "action": (2,)}) as made:
        for _ in range(60):
            heading = rng.choice([-1.0, 1.0])
            at = 50 * rng.normal(size=2) + np.arange(21)[:, None] * [0.1 * heading, 0.1]
            obs = np.concatenate([at, np.full((21, 1), heading)], 1).astype(np.float32)
            made.append({"obs": obs[:-1], "action": obs[1:, :2]})
    store = EpisodeStore.open(path)
    errors = {}
    for kind in ("absolute", "relative"):
        groups = [ActionGroup((0, 1), kind="relative", of=(0, 1))] if kind == "relative" else []
        policy = learned(store, groups, tmp_path / kind)
        obs = np.concatenate([30 * rng.normal(size=(16, 2)), rng.choice([-1, 1], (16, 1))], 1)
        made, _ = policy.act(obs.astype(np.float32), policy.initial_state(range(16)))
        step = 0.1 * np.stack([obs[:, 2], np.ones(16)], 1)
        errors[kind] = float(np.abs(made - obs[:, :2] - step).mean())
    assert errors["relative"] < 0.05
    assert errors["relative"] < 0.1 * errors["absolute"]


def learned(store, groups, folder) -> DiffusionPolicy:
    from diffpolicy import TrainerConfig

    policy = DiffusionPolicy.from_dataset(
        store,
        spec={
            **{"horizon": 4, "n_obs_steps": 1, "n_action_steps": 1, "prediction": "x0"},
            "actions": [vars(group) for group in groups],
            "network": {"type": "mlp", "width": 32, "depth": 1},
            "sampler": {"num_steps": 5},
        },
    )
    config = TrainerConfig(steps=300, batch_size=64, lr=3e-3, warmup_steps=10, progress=False)
    return policy.learn(store, config, folder, val_fraction=0)
