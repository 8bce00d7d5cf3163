"""Several rewards as one, against what they are made of and an optimum that is known."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.sequences import SequenceModel, tune
from diffpolicy.sequences.exact import ExactLaw
from diffpolicy.sequences.objectives import Objectives, Pessimistic
from diffpolicy.sequences.oracles import Oracles

X = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)


def count_b(x):
    return x[..., 1].mean(1)


def count_c(x):
    return x[..., 2].mean(1)


def test_weights_1_and_0_are_the_first_reward():
    assert torch.equal(Objectives([count_b, count_c], (1, 0))(X), count_b(X))
    both = Objectives([count_b, count_c], (2, -1), (None, 0.4), penalty=3)
    short = (0.4 - count_c(X)).clamp_min(0)
    torch.testing.assert_close(both(X), 2 * count_b(X) - count_c(X) - 3 * short)
    torch.testing.assert_close(both.values(X), torch.stack([count_b(X), count_c(X)], 1))
    for wrong in (((1,), None), ((1, 0), (None,))):
        with pytest.raises(ValueError, match="each reward has a weight"):
            Objectives([count_b, count_c], *wrong)


def test_disagreement_is_worth_less():
    unsure = Pessimistic([count_b, count_c], 0.5)
    torch.testing.assert_close(
        unsure(X), (count_b(X) + count_c(X)) / 2 - 0.25 * (count_b(X) - count_c(X)).abs()
    )
    alike = X.clone().requires_grad_()
    Pessimistic([count_b, count_b])(alike).sum().backward()
    assert alike.grad.isfinite().all()


def test_tuning_under_a_floor_keeps_it(table_task, small, quick, tmp_path):
    """Half of the letters have to be C; B is what is wanted."""
    model = SequenceModel.for_task(table_task, spec=small)
    means = {}
    for floor in (None, 0.5):
        reward = Objectives([count_b, count_c], (1, 0), (None, floor))
        config, run = quick(120, batch_size=128), tmp_path / str(floor)
        method = {"type": "policy_gradient", "kl_weight": 0.05}
        tuned = tune(model, Oracles(reward, count_b, {}), method, config, run, base={})
        with torch.no_grad():
            law = ExactLaw.of(tuned.model.denoiser)
        loaded = SequenceModel.load(tuned.model.save(tmp_path / f"{floor}_model"))
        assert loaded.with_reward(reward).draw(2).shape == (2, 4)
        hot = torch.eye(3)[law.space.states[law.space.sequences]]
        means[floor] = [float((law.p * count(hot)).sum()) for count in (count_b, count_c)]
    assert means[None][0] > 0.8
    assert means[0.5][1] > 0.45
    assert 0.3 < means[0.5][0] < 0.55
