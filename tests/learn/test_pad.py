"""The loss of imagined observations and actions: levels, masks, weights, and co-training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.core import Denoiser, make_process
from diffpolicy.data import EpisodeStore
from diffpolicy.data.windows import split_episodes
from diffpolicy.guidance import Layout
from diffpolicy.learn.cloning.pad import JointLoss
from diffpolicy.learn.learning import Learning, examples, objective, usable_episodes
from diffpolicy.networks import make_network

F, A, H = 3, 2, 4
LAYOUT = Layout("joint", 3, A, H, 1, imagined_dim=F)
PARTS = {"type": "modalities", "base": {"type": "mlp", "width": 16, "depth": 1}, "width": 8}


def denoiser():
    torch.manual_seed(0)
    network = make_network({**PARTS, "sizes": [F, A], "horizon": H, "dim": F + A, "cond_dim": 3})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Denoiser(network, make_process("vp_cosine"), "v")


def seeded():
    return torch.Generator().manual_seed(3)


def batch(count=6, acts=1.0):
    g = torch.Generator().manual_seed(1)
    sizes = {"obs": (1, 3), "imagined": (H, F), "action": (H, A)}
    parts = {name: torch.randn(count, *size, generator=g) for name, size in sizes.items()}
    valid = torch.ones(count, H, dtype=torch.bool)
    return {**parts, "has_action": torch.full((count, H), acts), "valid": valid}


def test_levels_are_one_per_part_and_their_mixture_is_as_said():
    t = JointLoss(denoiser(), LAYOUT).draw_levels(8000, F + A, seeded())
    assert t.shape == (8000, 1, F + A)
    imagined, action = t[:, 0, :F], t[:, 0, F:]
    assert (imagined == imagined[:, :1]).all()
    assert (action == action[:, :1]).all()
    same, alone = imagined[:, 0] == action[:, 0], imagined[:, 0] == 1
    assert same.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert alone.float().mean().item() == pytest.approx(0.25, abs=0.02)
    free = ~(same | alone)
    pair = torch.stack([imagined[free, 0], action[free, 0]])
    assert abs(pair.corrcoef()[0, 1].item()) < 0.03
    assert pair.mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def gradients(loss, data):
    loss.denoiser.zero_grad()
    loss(data, seeded()).loss.mean().backward()
    heads = loss.denoiser.network.outward
    return [torch.zeros(()) if h.weight.grad is None else h.weight.grad for h in heads]


def test_an_episode_without_actions_teaches_what_is_imagined_alone():
    loss = JointLoss(denoiser(), LAYOUT)
    imagined, action = gradients(loss, batch(acts=0.0))
    assert imagined.abs().sum() > 0
    assert action.abs().sum() == 0
    one = loss(batch(acts=0.0), seeded())
    other = loss({**batch(acts=0.0), "action": torch.randn(6, H, A)}, seeded())
    assert torch.equal(one.loss, other.loss)  # whatever stands there is not looked at
    imagined, action = gradients(JointLoss(denoiser(), LAYOUT, imagined_weight=0.0), batch())
    assert imagined.abs().sum() == 0
    assert action.abs().sum() > 0


def test_the_loss_is_the_weighted_sum_of_the_parts_means():
    plain = JointLoss(denoiser(), LAYOUT, imagined_weight=0.0)(batch(), seeded())
    whole = JointLoss(denoiser(), LAYOUT, imagined_weight=0.5)(batch(), seeded())
    unweighted = JointLoss(denoiser(), LAYOUT)(batch(), seeded())
    torch.testing.assert_close(whole.loss, (plain.loss + unweighted.loss) / 2)
    parts = whole.metrics["action"] + 0.5 * whole.metrics["imagined"]
    torch.testing.assert_close(parts, whole.loss.mean())
    without = {k: v for k, v in batch().items() if k != "has_action"}
    torch.testing.assert_close(
        JointLoss(denoiser(), LAYOUT)(without, seeded()).loss, unweighted.loss
    )


def test_padding_is_left_out_part_by_part():
    data = batch()
    valid, seen = data["valid"].clone(), data["valid"].clone()
    valid[:, 2:], seen[:, 1:] = False, False
    loss = JointLoss(denoiser(), LAYOUT, mask_padding=True)
    given = {**data, "valid": valid, "imagined_valid": seen}
    one = loss(given, seeded()).loss
    all_padding = loss({**given, "valid": valid & False, "imagined_valid": seen & False}, seeded())
    assert torch.equal(all_padding.loss, torch.zeros(6))
    assert (one > 0).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"imagined_weight": -1.0}, "imagined_weight must be at least 0"),
        ({"layout": Layout("action", 3, A, H, 1)}, "unknown layout of a JointLoss 'action'"),
    ],
)
def test_bad_settings(how, message):
    with pytest.raises(ValueError, match=message):
        JointLoss(denoiser(), **{"layout": LAYOUT, **how})


def mixed_store(acting=4, silent=4, length=12):
    """Actions are twice the state; the last episodes have none."""
    rng = np.random.default_rng(0)
    store = EpisodeStore.from_arrays({"obs": np.ones((1, 1)), "action": np.ones((1, 1))}, [1])
    for index in range(acting + silent):
        obs = rng.uniform(-0.5, 0.5, (length, 1)).cumsum(0).clip(-1, 1)
        if index < acting:
            store.append({"obs": obs, "action": 2 * obs + 3})
        else:
            store.append({"obs": obs}, actions=False)
    store.finalize()
    return store


SPEC = {"horizon": 4, "n_obs_steps": 1, "n_action_steps": 2}
JOINT = {**SPEC, "layout": "joint", "imagined": {"field": "obs"}, "network": PARTS}


def test_stores_say_which_episodes_have_actions():
    store = mixed_store()
    assert store.has_actions.tolist() == [True] * 5 + [False] * 4
    assert store.read("action")[-1].tolist() == [0]
    policy = DiffusionPolicy.from_dataset(store, spec=SPEC)
    low, high = policy.normalizer.unnormalize("action", torch.tensor([[-1.0], [1.0]])).flatten()
    assert (low.item(), high.item()) == pytest.approx((1, 5), abs=0.3)  # without those zeros
    assert usable_episodes(policy.spec, store, None).tolist() == [0, 1, 2, 3, 4]
    assert usable_episodes(policy.spec, store, 3).tolist() == [0, 1, 2]
    joint = DiffusionPolicy.from_dataset(store, spec=JOINT)
    assert len(usable_episodes(joint.spec, store, None)) == 9
    silent = EpisodeStore.from_arrays({"obs": np.ones((1, 1)), "action": np.ones((1, 1))}, [1])
    silent._episode_attrs = [{"actions": False}]
    with pytest.raises(ValueError, match="none of the 1 episodes"):
        usable_episodes(policy.spec, silent, None)


def test_examples_hold_what_the_loss_takes():
    store = mixed_store()
    policy = DiffusionPolicy.from_dataset(store, spec=JOINT)
    source = examples(policy.spec, policy.normalizer, store, Learning(), list(range(9)))
    got = source.gather(torch.arange(len(source)))
    assert got["obs"].shape[1:] == (1, 1)
    assert got["imagined"].shape[1:] == (4, 1)
    torch.testing.assert_close(got["imagined"][:, 0], got["obs"][:, 0])
    assert got["has_action"].mean().item() == pytest.approx(49 / 97, abs=0.01)
    loss = objective(policy, Learning(imagined_weight=0.3))
    assert loss.imagined_weight == 0.3
    assert loss(got, seeded()).loss.shape == (len(source),)
    assert len(split_episodes(5, 0.2, 0)[0]) == 4


def test_it_learns_the_action_and_what_comes_next(tmp_path):
    """One step holds the state (a random walk's present) and the action, twice the state plus 3."""
    store = mixed_store(acting=30, silent=30)
    given = {**JOINT, "prediction": "x0", "process": {"type": "vp_cosine"}}
    policy = DiffusionPolicy.from_dataset(store, spec=given)
    config = TrainerConfig(steps=250, lr=5e-3, batch_size=64, progress=False)
    policy.learn(store, config, tmp_path / "run", val_fraction=0.0)
    obs = np.linspace(-0.8, 0.8, 9, dtype=np.float32)[:, None]
    for predict in ("action", "joint"):
        spec = policy.spec.imagined.__class__(shape=(1,), predict=predict)
        acting = policy.with_settings(imagined=spec)
        state = acting.observe(obs, acting.initial_state(range(9)))
        state = acting.replan(state, range(9))
        actions, _ = acting.execute(state)
        np.testing.assert_allclose(actions, 2 * obs + 3, atol=0.35)
        if predict == "joint":
            seen = policy.normalizer.unnormalize("obs", torch.from_numpy(state.plan[:, 0, :1]))
            np.testing.assert_allclose(seen.numpy(), obs, atol=0.2)


def test_images_are_observed_and_imagined_by_one_policy(tmp_path):
    """Encoded, the present conditions the plan; small copies of what follows are a part of it."""
    rng = np.random.default_rng(0)
    store = EpisodeStore.from_arrays(
        {
            "obs.camera": rng.integers(0, 255, (24, 16, 16, 3), np.uint8),
            "obs.state": rng.normal(size=(24, 2)),
            "action": rng.normal(size=(24, 1)),
        },
        [12, 24],
    )
    given = {
        **SPEC,
        "layout": "joint",
        "imagined": {"field": "obs.camera", "size": 4, "frames": 1, "predict": "joint"},
        "network": {**PARTS, "width": 12},
    }
    policy = DiffusionPolicy.from_dataset(store, spec=given)
    assert policy.layout.parts == (4 * 4 * 3 // 4, 1)
    config = TrainerConfig(steps=2, batch_size=8, progress=False)
    policy.learn(store, config, tmp_path / "run", val_fraction=0.0, learning=Learning(draws=2))
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "run", imagined={"predict": "action"})
    assert loaded.spec.imagined.predict == "action"
    seen = {"camera": np.zeros((2, 16, 16, 3), np.uint8), "state": np.zeros((2, 2), np.float32)}
    for acting in (policy, loaded):
        action, state = acting.predict(seen)
        assert action.shape == (2, 1)
        assert state.plan.shape == (2, 4, 13)
