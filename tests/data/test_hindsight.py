"""Goals in hindsight: later states of the same episode, by published laws, the same again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.commands.preflight import check_training
from diffpolicy.commands.stores import hindsight
from diffpolicy.config import load_train
from diffpolicy.data import EpisodeStore
from diffpolicy.data.hindsight import GOAL, STATE, Hindsight, HindsightWindows, relabelled
from diffpolicy.data.joined import Joined
from diffpolicy.data.windows import Windows
from diffpolicy.learn.learning import Learning, examples
from diffpolicy.settings import ConfigError
from diffpolicy.training.sources import Weighted

LENGTHS = (5, 1, 9)


def store(lengths=LENGTHS):
    """Rows that say where they are: episode and step."""
    rows = [(e, t) for e, length in enumerate(lengths) for t in range(length)]
    obs = np.array(rows, np.float32)
    return EpisodeStore.from_arrays({"obs": obs, "action": obs[:, 1:]}, np.cumsum(lengths))


def windows(view, **more):
    return Windows(view, horizon=4, n_obs_steps=2, n_action_steps=2, **more)


def everything(source):
    batch = source.gather(torch.arange(len(source)))
    now = batch[STATE][:, -1]
    goals = batch[GOAL]
    assert (goals == goals[:, :1]).all()  # one goal for all steps that are seen
    return now, goals[:, -1]


def test_goals_are_later_states_of_the_same_episode():
    view = relabelled(store())
    now, goal = everything(HindsightWindows(windows(view), Hindsight(), whole=False, draws=400))
    assert (goal[:, 0] == now[:, 0]).all()
    last = torch.tensor(LENGTHS)[now[:, 0].long()] - 1
    assert (goal[:, 1] <= last).all()
    assert ((goal[:, 1] > now[:, 1]) | (now[:, 1] == last)).all()
    # From step 3 of nine all five later ones, equally often: 400 draws, 80 +- 8 each.
    some = goal[(now[:, 0] == 2) & (now[:, 1] == 3), 1].long()
    counts = torch.bincount(some, minlength=9)
    assert counts[:4].sum() == 0
    assert counts[4:].float().sub(80).abs().max() < 32


def test_laws_are_the_published_ones():
    uniform = (np.arange(100_000) + 0.5) / 100_000
    left = np.full(len(uniform), 40)
    ahead = Hindsight(geom_sample=True, discount=0.9).steps(left, uniform)
    found = np.bincount(ahead, minlength=41) / len(ahead)
    law = 0.1 * 0.9 ** (np.arange(1, 41) - 1)
    law[-1] = 0.9**39  # all that would be beyond the end
    np.testing.assert_allclose(found[1:], law, atol=2e-5)
    np.testing.assert_allclose(np.bincount(Hindsight().steps(left, uniform))[1:], 2500)
    assert (Hindsight().steps(np.zeros(3, np.int64), np.array([0, 0.5, 0.99])) == 0).all()
    shares = Hindsight(p_trajgoal=0.5, p_curgoal=0.2, p_randomgoal=0.3)
    now, goal = everything(
        HindsightWindows(windows(relabelled(store())), shares, whole=False, draws=4000)
    )
    first = (now == torch.tensor([2.0, 0.0])).all(1)
    same = (goal[first] == now[first]).all(1).float().mean()
    other = (goal[first, 0] != 2).float().mean()
    assert abs(same - (0.2 + 0.3 / 15)) < 0.03
    assert abs(other - 0.3 * 6 / 15) < 0.03


def test_plans_that_hold_observations_end_at_their_goal():
    view = relabelled(store(), {"flat": True})
    source = HindsightWindows(windows(view, whole=True), view.hindsight, whole=True, draws=1)
    batch = source.gather(torch.arange(len(source)))
    state, goal = batch["obs"].split(2, -1)
    assert (goal == state[:, -1:]).all()


def test_examples_are_the_same_again_and_of_each_store_by_its_weight():
    view = relabelled(store())
    policy = DiffusionPolicy.from_dataset(view, spec={"horizon": 4, "n_action_steps": 2})
    assert policy.spec.observations["desired_goal"].role == "goal"
    episodes = list(range(3))
    shared = policy.spec, policy.normalizer, view, Learning(), episodes
    source, again = examples(*shared), examples(*shared)
    assert len(source) >= 1 << 24
    some = torch.randint(len(source), (64,))
    for name, value in source.gather(some).items():
        assert (again.gather(some)[name] == value).all()
    assert len(examples(*shared, draws=1)) == sum(LENGTHS)
    both = Joined({"a": store(), "b": store((20,))}, [1, 3])
    mixed = examples(policy.spec, policy.normalizer, relabelled(both), Learning(), range(4))
    assert isinstance(mixed, Weighted)
    batch = mixed.gather(mixed.draw(0, 32, 0))
    assert (batch[GOAL][:, 0] != batch[GOAL][:, 0].mean(0)).any()


def test_read_as_it_is_a_goal_is_the_end_of_its_episode():
    view = relabelled(store())
    ends = np.repeat(np.array(LENGTHS) - 1, LENGTHS)
    assert (view.read(GOAL)[:, 1] == ends).all()
    assert (view.read(GOAL, 3, 7)[:, 1] == ends[3:7]).all()
    assert view.statistics[GOAL] == view.statistics[STATE]
    with pytest.raises(ValueError, match="add up to 1"):
        Hindsight(p_curgoal=0.5)
    with pytest.raises(ValueError, match=r"hindsight makes goals of the field 'obs'"):
        relabelled(
            EpisodeStore.from_arrays(
                {"obs.hand": np.zeros((2, 2)), "action": np.zeros((2, 1))}, [2]
            )
        )


@pytest.mark.parametrize("flat", [False, True])
def test_actions_stay_relative_to_the_state(flat):
    groups = [{"dims": [0], "kind": "relative", "of": [1], "whole": "int64"}]
    arrays = {"obs": store().read("obs"), "action": store().read("action")}
    own = EpisodeStore.from_arrays(arrays, np.cumsum(LENGTHS), attrs={"action_groups": groups})
    policy = DiffusionPolicy.from_dataset(relabelled(own, {"flat": flat}), spec={})
    assert policy.spec.actions[0].obs == ("" if flat else "observation")
    assert own.attrs["action_groups"] == groups
    state = np.array([0.0, 3.0], np.float32)
    seen = np.tile(state, 2) if flat else {"observation": state, "desired_goal": state}
    assert policy.predict(seen)[0].dtype == np.int64


def test_settings_on_the_command_line():
    config = load_train(["experiment=ogbench_goals", "data.goals={type: hindsight, flat: true}"])
    assert hindsight(config.data.goals) == Hindsight(flat=True)
    assert hindsight(load_train(["experiment=ogbench_goals"]).data.goals) == Hindsight()
    assert hindsight(load_train(["experiment=ogbench_scene"]).data.goals) is None
    for wrong, message in (
        ("hindsigt", "did you mean 'hindsight'"),
        ({"flat": True}, r"\{type: hindsight\} with its settings"),
        (True, r"\{type: hindsight\} with its settings"),
        ({"type": "hindsight", "geom_sampl": True}, r"no setting 'geom_sampl'.*'geom_sample'"),
    ):
        with pytest.raises(ValueError, match=message):
            hindsight(wrong)
    critic = load_train(["experiment=ogbench_scene_iql", "data.goals=hindsight"])
    with pytest.raises(ConfigError, match="for cloning and planners"):
        check_training(critic)


def test_a_policy_learns_to_go_where_it_is_shown(tmp_path):
    # A point on a line walks left or right for twelve steps: the goal alone says which.
    step = np.where(np.arange(40) % 2, 0.1, -0.1).repeat(12)
    place = np.concatenate([np.arange(12) * s for s in step[::12]])
    data = {"obs": place[:, None].astype(np.float32), "action": step[:, None].astype(np.float32)}
    view = relabelled(EpisodeStore.from_arrays(data, 12 * np.arange(1, 41)))
    spec = {"horizon": 4, "n_obs_steps": 1, "n_action_steps": 2, "prediction": "x0"}
    spec |= {"network": {"type": "mlp", "width": 32, "depth": 1}, "sampler": {"num_steps": 4}}
    policy = DiffusionPolicy.from_dataset(view, spec=spec)
    policy.learn(view, TrainerConfig(steps=200, batch_size=64, lr=3e-3), tmp_path / "run")
    observation = {"observation": np.zeros((2, 1), np.float32)}
    observation["desired_goal"] = np.array([[-1.0], [1.0]], np.float32)
    action, _ = policy.predict(observation)
    np.testing.assert_allclose(action[:, 0], [-0.1, 0.1], atol=0.05)
