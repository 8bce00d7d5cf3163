"""Sequence models on a base: exact guidance before tuning, files, and plain networks of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.guidance import RewardGuidance
from diffpolicy.sequences import SequenceModel, tune
from diffpolicy.sequences.evaluate import exactly
from diffpolicy.sequences.exact import ExactLaw
from diffpolicy.sequences.guided import draw_guided, steered
from diffpolicy.sequences.oracles import Oracle, Oracles

KL_WEIGHT = 0.1
METHODS = [
    {"type": "pathwise", "relaxation": {"straight_through": True, "backward": "probabilities"}},
    {"type": "policy_gradient"},
    {"type": "weighted", "buffer": 64, "refresh": 64},
    {"type": "weighted", "target": "soft_value", "buffer": 64, "refresh": 64},
    {"type": "stepwise", "buffer": 64, "refresh": 64},
]


class Pairs(nn.Module):
    """A reward with weights: neighbours that are alike."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.config = {"gain": gain}
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return self.gain * (x[:, 1:] * x[:, :-1]).sum((1, 2)) / 3


@pytest.fixture
def pretrained(table_task, small):
    return SequenceModel.for_task(table_task, spec=small)


@torch.no_grad()
def law(model):
    return ExactLaw.of(model.denoiser).p


def test_untuned_its_law_is_that_of_guidance_and_of_its_draws(pretrained):
    reward = Pairs().requires_grad_(False)
    based = pretrained.with_base(reward, scale=1 / KL_WEIGHT, order=1)
    guidance = {"type": "reward", "scale": 1 / KL_WEIGHT}
    guided, cond = steered(pretrained, guidance, reward)
    assert isinstance(guided, RewardGuidance)
    assert cond is None
    space = ExactLaw.of(based.denoiser).space
    with torch.no_grad():
        p = ExactLaw.of(guided, space).p
    torch.testing.assert_close(law(based), p)
    drawn = based.draw(20_000, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(space.index(drawn), minlength=81).double() / len(drawn)
    assert 0.5 * (found - p).abs().sum() < 0.5 * (p * (1 - p) / len(drawn)).sqrt().sum() + 0.02
    once = {"generator": torch.Generator().manual_seed(1)}
    drawn = draw_guided(based, {"type": "none"}, reward, 3, **once)
    assert drawn.reward_calls == 4  # one for every evaluation


def test_guidance_and_classes_are_scored_exactly(table_task, quick, tmp_path):
    model = SequenceModel.for_task(
        table_task,
        spec={
            "network": {"type": "mlp", "width": 32, "depth": 1},
            "label_quantiles": (0.7,),
            "cond_dropout": 0.3,
        },
    )
    model.learn(
        *table_task.measurements()[:1], quick(150), tmp_path, labels=table_task.measurements()[1]
    )
    scores = {}
    for scale in (1.0, 3.0):
        guided = steered(model, {"type": "cfg", "scale": scale}, table_task.reward)
        scores[scale] = exactly(model, model, table_task, KL_WEIGHT, guided=guided).scores
    assert scores[3.0].kl > scores[1.0].kl > 0
    assert scores[3.0].reward > scores[1.0].reward


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.get("target", m["type"]))
def test_every_method_tunes_from_it(method, table_task, pretrained, quick, tmp_path):
    """A few updates do not lose what guidance has gained, and the reference stays the plain one."""
    table_task.reward = reward = Pairs().requires_grad_(False)
    oracles = Oracles(reward, reward, {})
    given = {**method, "kl_weight": KL_WEIGHT}
    config = quick(30, lr=2e-3, eval_every=30, batch_size=64)
    tuned = tune(pretrained, oracles, given, config, tmp_path, base={"order": 2}, eval_draws=8)
    assert tuned.model.spec.base["scale"] == pytest.approx(1 / KL_WEIGHT)
    based = pretrained.with_base(reward, scale=1 / KL_WEIGHT)
    before = exactly(based, pretrained, table_task, KL_WEIGHT).scores.progress
    after = exactly(tuned.model, pretrained, table_task, KL_WEIGHT).scores.progress
    assert 0.8 < before < 1
    assert after > before - 0.03
    assert tuned.reward_calls > 30 * 64


def test_the_optimum_is_reached_from_it(table_task, pretrained, quick, tmp_path):
    table_task.reward = reward = Pairs().requires_grad_(False)
    oracles = Oracles(reward, reward, {})
    method = {"type": "policy_gradient", "kl_weight": KL_WEIGHT}
    config = quick(150, lr=3e-3, batch_size=256)
    tuned = tune(pretrained, oracles, method, config, tmp_path, base={})
    assert exactly(tuned.model, pretrained, table_task, KL_WEIGHT).scores.progress > 0.985


@pytest.mark.parametrize("kind", ["oracle", "module"])
def test_it_is_saved_with_its_reward(kind, pretrained, tmp_path):
    oracle = Oracle({"type": "sequence_regressor", "length": 4, "vocab_size": 3}).frozen()
    reward = oracle if kind == "oracle" else Pairs(2.0)
    based = pretrained.with_base(reward, scale=3.0)
    based.save(tmp_path / "model")
    loaded = SequenceModel.load(tmp_path / "model")
    assert loaded.spec == based.spec
    torch.testing.assert_close(law(loaded), law(based))
    copied = based.copy()
    assert copied.denoiser.base is not based.denoiser.base
    torch.testing.assert_close(law(copied), law(based))


def test_a_task_is_opened_again_and_a_function_is_asked_for(pretrained, table_task, tmp_path):
    pretrained.with_base(table_task.reward, scale=3.0).save(tmp_path / "model")
    loaded = SequenceModel.load(tmp_path / "model")
    with pytest.raises(ValueError, match="give it again"):
        loaded.draw(2)
    given = loaded.with_reward(table_task.reward)
    torch.testing.assert_close(law(given), law(pretrained.with_base(table_task.reward, scale=3.0)))
    unknown = {"type": "task", "id": "nowhere_at_all:Some-v0", "kwargs": {}}
    pretrained.with_base(table_task.reward, stored=unknown).save(tmp_path / "other")
    with pytest.raises(ValueError, match="code that you did not choose"):
        SequenceModel.load(tmp_path / "other").draw(2)


def test_what_does_not_fit_is_refused(pretrained, table_task):
    based = pretrained.with_base(table_task.reward)
    with pytest.raises(ValueError, match="has a base already"):
        based.with_base(table_task.reward)
    with pytest.raises(ValueError, match="with_base"):
        pretrained.with_reward(table_task.reward)
    with pytest.raises(ValueError, match="a base is a trained model"):
        based.spec.make_denoiser()
    with pytest.raises(ValueError, match="scale"):
        pretrained.with_base(table_task.reward, scal=2.0)


def test_a_plain_network_learns_its_law(pretrained, quick, tmp_path):
    based = pretrained.with_base(Pairs().requires_grad_(False), scale=3.0)
    plain = based.distilled(quick(200, batch_size=128), tmp_path)
    assert plain.spec == pretrained.spec
    p = law(based)
    left, before = (float((p * (p / law(m)).log()).sum()) for m in (plain, pretrained))
    assert left < 0.02 < 0.2 * before


@pytest.mark.parametrize("hacking", ["warn", "stop"])
def test_the_alarm_ends_a_run_that_hacks_its_reward(
    hacking, table_task, pretrained, quick, tmp_path
):
    """The held-out reward is the opposite: all that is gained is lost."""
    oracles = Oracles(table_task.reward, lambda x: -table_task.reward(x), {})
    method = {"type": "policy_gradient", "kl_weight": 0.01}
    config = quick(60, lr=5e-3, eval_every=5)
    tuned = tune(pretrained, oracles, method, config, tmp_path, hacking=hacking, eval_draws=64)
    assert not tuned.interrupted
    steps = tuned.model.last_training.step
    assert steps == 60 if hacking == "warn" else 10 <= steps <= 40
