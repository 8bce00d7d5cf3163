"""Actions as plans say them: exact rotations, exact inverses, windows and their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from diffpolicy.data.action_groups import KINDS, ActionGroup, Representation
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField
from diffpolicy.data.rotations import SIZES, from_matrix, to_matrix
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows, said_statistics

TURNS = Rotation.concatenate(
    [
        Rotation.random(200, random_state=0),
        Rotation.identity(),
        Rotation.from_rotvec([[np.pi, 0, 0], [0, 0, np.pi], [1e-7, 0, 0], [3, 0.9, -0.1]]),
    ]
)
EXACT = {
    "quaternion_wxyz": TURNS.as_quat(canonical=True, scalar_first=True),
    "quaternion_xyzw": TURNS.as_quat(canonical=True),
    "axis_angle": TURNS.as_rotvec(),
    "matrix": TURNS.as_matrix().reshape(-1, 9),
    "rot6d": TURNS.as_matrix()[:, :2].reshape(-1, 6),
}
POSE = (0, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("form", SIZES)
def test_rotations_are_those_of_scipy(form):
    exact, matrix = torch.from_numpy(EXACT[form]), torch.from_numpy(TURNS.as_matrix())
    torch.testing.assert_close(to_matrix(form, exact), matrix, rtol=0, atol=1e-12)
    again = to_matrix(form, from_matrix(form, matrix))
    torch.testing.assert_close(again, matrix, rtol=0, atol=1e-12)
    apart = (from_matrix(form, matrix) - exact).abs().amax(-1)
    assert (apart > 1e-9).sum() <= 2  # half turns have two axes


def test_what_is_no_rotation_becomes_one():
    for form, size in SIZES.items():
        matrix = to_matrix(form, torch.randn(20, size, generator=torch.Generator().manual_seed(0)))
        product = matrix @ matrix.mT
        torch.testing.assert_close(product, torch.eye(3).expand(20, 3, 3), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(20), atol=1e-5, rtol=0)


def representation(kind: str, *, pose: bool, form: str = "quaternion_xyzw") -> Representation:
    """Of ten numbers: a position, a rotation, a vector in another order, and one of four."""
    of = {} if kind == "absolute" else {"kind": kind}
    if pose:
        groups = [ActionGroup(POSE, rotation=form, pose=True, **of, **(of and {"of": POSE}))]
    else:
        groups = [
            ActionGroup(POSE[:3], **of, **(of and {"of": POSE[:3]})),
            ActionGroup(POSE[3:], rotation=form, **of, **(of and {"of": POSE[3:]})),
        ]
    groups += [
        ActionGroup((9, 7), **of, **(of and {"of": (8, 7)})),
        ActionGroup((8,), choices=4, first=1),
    ]
    return Representation(groups, 10, ObsField((10,)), now=2)


def sample(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    action = torch.randn(30, 6, 10, dtype=dtype, generator=generator)
    obs = torch.randn(30, 10, dtype=dtype, generator=generator)
    for values in (action, obs):
        turn = torch.nn.functional.normalize(values[..., 3:7], dim=-1)
        values[..., 3:7] = torch.where(turn[..., 3:] < 0, -turn, turn)
    action[..., 8] = torch.randint(1, 5, (30, 6), generator=generator).to(dtype)
    return action, obs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pose", [False, True])
def test_relative_and_absolute_are_inverses(kind, pose):
    says = representation(kind, pose=pose)
    action, obs = sample(torch.float32)
    entries = says.entries(action)
    assert entries.shape == (30, 6, says.dim) == (30, 6, 3 + 6 + 2 + 4)
    plan = says.relative(entries, obs)
    assert says.moves == (kind != "absolute") == (not plan.equal(entries))
    torch.testing.assert_close(says.absolute(plan, obs), entries, atol=1e-5, rtol=0)
    torch.testing.assert_close(says.actions(says.absolute(plan, obs)), action, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        says.relative(says.absolute(plan, obs), obs), plan, atol=2e-5, rtol=0
    )


def test_relative_poses_are_compositions():
    """UMI: the chunk as seen from the state's own frame; deltas from the action before."""
    action, obs = sample(torch.float64)
    turn = Rotation.from_quat(action[..., 3:7].reshape(-1, 4).numpy())
    state = Rotation.from_quat(obs[:, 3:7].repeat_interleave(6, 0).numpy())
    away = (action[..., :3] - obs[:, None, :3]).reshape(-1, 3).numpy()
    plan = (s := representation("relative", pose=True)).relative(s.entries(action), obs)
    exact = (state.inv() * turn).as_matrix()[:, :2].reshape(30, 6, 6)
    np.testing.assert_allclose(plan[..., 3:9].numpy(), exact, atol=1e-12)
    np.testing.assert_allclose(
        plan[..., :3].numpy(), state.inv().apply(away).reshape(30, 6, 3), atol=1e-12
    )
    apart = (s := representation("relative", pose=False)).relative(s.entries(action), obs)
    np.testing.assert_allclose(apart[..., :3].numpy(), away.reshape(30, 6, 3), atol=1e-12)
    changes = (s := representation("delta", pose=False)).relative(s.entries(action), obs)
    steps = action[..., :3].diff(dim=1)
    expected = torch.cat([steps[:, :2], action[:, 2:3, :3] - obs[:, None, :3], steps[:, 2:]], 1)
    torch.testing.assert_close(changes[..., :3], expected)


def test_choices_are_one_hot_and_the_largest_is_executed():
    says = Representation([ActionGroup((0,), choices=3, first=-1)], 1, ObsField((2,)), now=0)
    hot = says.entries(torch.tensor([[-1.0], [0.0], [1.0]]))
    assert hot.equal(torch.eye(3))
    assert says.actions(torch.tensor([[0.2, 0.9, 0.8]])).tolist() == [[0.0]]


def test_windows_hold_what_plans_say(tmp_path):
    rng = np.random.default_rng(0)
    lengths = (5, 9)
    shapes = {"obs.arm": (2,), "obs.k": (1,), "action": (2,)}
    with EpisodeStore.create(tmp_path / "s.zarr", shapes) as made:
        for n in lengths:
            arm = rng.normal(size=(n, 2)).cumsum(0).astype(np.float32)
            made.append({"obs.arm": arm, "obs.k": arm[:, :1], "action": arm[:, ::-1] + 0.5})
    store = EpisodeStore.open(tmp_path / "s.zarr")
    group = ActionGroup((0, 1), kind="relative", of=(1, 0), obs="arm")
    fields = {"arm": ObsField((2,)), "k": ObsField((1,))}
    sizes = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 1}
    says = Representation([group], 2, fields, now=1)
    raw, said = Windows(store, **sizes), Windows(store, **sizes, actions=says)
    every = torch.arange(sum(lengths))
    plain = raw.gather(every)
    expected = plain["action"] - plain["obs.arm"][:, 1:2].flip(-1)
    assert said.gather(every)["action"].equal(expected)
    statistics = {**store.statistics, "action": said_statistics(said)}
    np.testing.assert_allclose(statistics["action"]["min"], expected.flatten(0, 1).amin(0))
    normal = Normalizer.fit(statistics, dict.fromkeys(("obs.arm", "obs.k", "action"), "minmax"))
    batch = Windows(store, **sizes, actions=says, normalizer=normal).gather(every)
    torch.testing.assert_close(batch["action"], normal.normalize("action", expected))
    assert batch["action"].abs().max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"dims": (0, 0)}, "different indices"),
        ({"dims": (0, 1), "kind": "relativ", "of": (0, 1)}, "did you mean 'relative'"),
        ({"dims": (0, 1), "kind": "relative"}, "of must name as many entries as dims"),
        ({"dims": (0, 1), "of": (0, 1)}, "this one is absolute"),
        ({"dims": (0, 1, 2), "rotation": "rot6d"}, "dims must name the 6 entries of rot6d"),
        ({"dims": (0,), "pose": True}, "need the data's rotation"),
        ({"dims": (0, 1), "choices": 3}, "choices are of one dimension"),
        ({"dims": (0,), "first": 3}, "needs choices="),
    ],
)
def test_groups_that_mean_nothing_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        ActionGroup(**group)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([ActionGroup((0,)), ActionGroup((0, 1))], "belongs to one group at most"),
        ([ActionGroup((5,))], "0 to 2"),
        ([ActionGroup((0,), kind="delta", of=(7,))], "entries of 'obs', a vector of 4"),
        ([ActionGroup((0,), kind="delta", of=(0,), obs="arm")], "leave obs out"),
    ],
)
def test_groups_that_fit_no_action_or_observation_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        Representation(groups, 3, ObsField((4,)), now=0)
