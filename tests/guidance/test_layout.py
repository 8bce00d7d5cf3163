"""What plans hold: hand-written entries, round trips, and errors."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from diffpolicy.guidance import Layout

SIZES = {"obs_dim": 3, "action_dim": 2, "horizon": 4, "n_obs_steps": 2}


@pytest.mark.parametrize(
    ("kind", "dim", "cond_dim"), [("action", 2, 6), ("trajectory", 5, 0), ("state", 3, 0)]
)
def test_plans_are_made_and_taken_apart(kind, dim, cond_dim):
    layout = Layout(kind, **SIZES)
    assert (layout.dim, layout.cond_dim) == (dim, cond_dim)
    obs, action = torch.randn(6, 4, 3), torch.randn(6, 4, 2)
    x0 = layout.join(obs, action)
    assert x0.shape == (6, 4, dim)
    if kind != "action":
        assert torch.equal(x0[..., :3], obs)
    if kind != "state":
        assert torch.equal(x0[..., -2:], action)


def test_joint_plans_hold_what_is_imagined_and_the_action():
    layout = Layout("joint", **SIZES, imagined_dim=4)
    assert (layout.dim, layout.parts, layout.cond_dim, layout.pinned) == (6, (4, 2), 6, False)
    imagined, action = torch.randn(6, 4, 4), torch.randn(6, 4, 2)
    x0 = layout.join(imagined, action)
    assert torch.equal(x0[..., :4], imagined)
    assert torch.equal(x0[..., 4:], action)
    assert not layout.known.any()
    assert torch.equal(layout.values(torch.randn(5, 2, 3)), torch.zeros(5, 4, 6))


def test_known_entries_and_weights_by_hand():
    one, none = [True] * 3, [False] * 2
    layout = Layout("trajectory", **SIZES)
    rows = [one + none, one + none, [False] * 5, [False] * 5]
    assert layout.known.tolist() == [rows]
    assert layout.weights(first_action=10, next_obs=5).tolist() == [
        [[0, 0, 0, 1, 1], [0, 0, 0, 10, 10], [5, 5, 5, 1, 1], [1, 1, 1, 1, 1]]
    ]
    state = Layout("state", **SIZES, goal=((0, 2),))
    assert state.known.tolist() == [[one, one, [False] * 3, [True, False, False]]]
    assert state.weights(next_obs=2).tolist() == [[[0] * 3, [0] * 3, [2] * 3, [0, 1, 1]]]
    action = Layout("action", **SIZES)
    assert not action.known.any()
    assert action.weights(first_action=3).tolist() == [[[1, 1], [3, 3], [1, 1], [1, 1]]]


def test_weights_and_known_entries_coincide_when_the_next_observation_is_the_goal():
    layout = Layout("state", 2, 1, 3, 2, goal=((0, 0), (1, 1)))  # nothing is left to plan there
    assert layout.weights().sum() == 0


def test_values_are_the_history_and_the_goal():
    layout = Layout("trajectory", **SIZES, goal=((1, 0), (0, 2)))
    history, goal = torch.randn(5, 2, 3), torch.randn(5, 2)
    values = layout.values(history, goal)
    assert torch.equal(values[:, :2, :3], history)
    assert torch.equal(values[:, 3, 1], goal[:, 0])
    assert torch.equal(values[:, 3, 0], goal[:, 1])
    assert (values.masked_select(~layout.known) == 0).all()
    assert torch.equal(Layout("action", **SIZES).values(history), torch.zeros(5, 4, 2))


def test_a_layout_survives_json():
    layout = Layout("state", **SIZES, goal=((0, 2), (1, 0)))
    again = Layout(**json.loads(json.dumps(dataclasses.asdict(layout))))
    assert again == layout
    assert hash(again) == hash(layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "joints"}, "unknown layout 'joints'"),
        ({"obs_dim": 0}, "obs_dim must be at least 1, got 0"),
        ({"horizon": 2}, "horizon must be at least 3, got 2"),
        ({"kind": "joint"}, "imagined_dim must be at least 1, got 0"),
        ({"imagined_dim": 1}, "imagined_dim must be in"),
        ({"goal": ((0, 3),)}, "indices into an observation of 3 entries"),
        ({"goal": ((0, 1), (0, 2))}, "pins an entry twice"),
        ({"goal": ((0,),)}, "pairs of integers"),
        ({"kind": "action", "goal": ((0, 1),)}, "holds no observation whose goal"),
    ],
)
def test_bad_layouts(change, message):
    with pytest.raises(ValueError, match=message):
        Layout(**{"kind": "trajectory", **SIZES, **change})


def test_bad_calls():
    state = Layout("state", **SIZES)
    goal = Layout("state", **SIZES, goal=((0, 2),))
    history = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"obs must be \[B, 4, 3\], got \[1, 3, 3\]"):
        state.join(torch.zeros(1, 3, 3), torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"history must be \[B, 2, 3\]"):
        state.values(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"goal_values must be \[1, 1\], got \[1, 0\]"):
        goal.values(history)
    with pytest.raises(ValueError, match=r"goal_values must be \[1, 0\], got \[1, 1\]"):
        state.values(history, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="next_obs must be positive"):
        state.weights(next_obs=0)
