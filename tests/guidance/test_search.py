"""Search among paths on a fixed budget: laws without a reward, gains with one, counted."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import AnalyticDenoiser, VPCosine, make_solver
from diffpolicy.guidance.particles import BestOfN
from diffpolicy.guidance.search import PathSearch, RolloverBudget

GROUPS = 400
METHODS = {
    "rollover": RolloverBudget(budget=40, particles=4),
    "path_search": PathSearch(paths=3, branches=2, down=3, up=1),
}


def near_one(x, cond):
    return -(x - 1).square().sum((1, 2))


class Counted(AnalyticDenoiser):
    """Plans N(0, 0.3^2) of two entries; counts what every group was asked for."""

    def __init__(self):
        process = VPCosine()
        super().__init__(process, lambda x, t, cond: self.gain(process, t.to(x)) * x)
        self.asked = torch.zeros(GROUPS, dtype=torch.int64)

    @staticmethod
    def gain(process, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return 0.09 * alpha / (0.09 * alpha.square() + sigma.square())

    def forward(self, x_t, t, cond=None):
        if cond is not None:
            self.asked += cond[:, 0].long().bincount(minlength=GROUPS)
        return super().forward(x_t, t, cond)


def drawn(method, reward, seed=0, steps=8, solver="ddpm"):
    denoiser = Counted()
    out = method.draw(
        denoiser,
        reward,
        (GROUPS, 2, 1),
        num_steps=steps,
        cond=torch.arange(GROUPS)[:, None].float(),
        solver=make_solver(solver),
        generator=torch.Generator().manual_seed(seed),
    )
    return out, denoiser.asked


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_never_exceeded_and_counted(name):
    out, asked = drawn(METHODS[name], near_one)
    assert int(asked.max()) == out.nfe
    if name == "rollover":
        assert out.nfe <= 40
        assert int(asked.min()) < 40  # who was lucky in every step has some left
        torch.testing.assert_close(out.rewards, near_one(out.x0, None))
    else:
        # Three paths go down and are judged; then six, each time, to the end.
        steps = [(0, 3), (2, 5), (4, 7), (6, 8)]
        many = [3, 6, 6, 6]
        judged = [1, 1, 1, 0]
        total = sum(n * (b - a + j) for (a, b), n, j in zip(steps, many, judged, strict=True))
        assert out.nfe == total
        assert (asked == total).all()


@pytest.mark.parametrize("name", METHODS)
def test_searches_gain_on_a_single_chain(name):
    plain, _ = drawn(BestOfN(1), near_one)
    found, _ = drawn(METHODS[name], near_one)
    gain = found.rewards - plain.rewards
    assert gain.mean() > 5 * gain.std() / GROUPS**0.5
    assert gain.mean() > 0.4


@pytest.mark.parametrize("name", METHODS)
def test_without_preference_the_law_is_the_chain_s(name):
    """Noising up is the forward process, and a draw that is not chosen by reward is any draw."""
    nothing = lambda x, cond: torch.zeros(len(x))  # noqa: E731
    law = [
        torch.cat([drawn(method, nothing, seed, 24)[0].x0 for seed in range(4)])
        for method in (BestOfN(1), METHODS[name])
    ]
    assert abs(float(law[1].mean())) < 0.03
    assert float(law[1].std()) == pytest.approx(float(law[0].std()), abs=0.015)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match="up < down"):
        PathSearch(down=2, up=2)
    with pytest.raises(ValueError, match="at least 11"):
        drawn(RolloverBudget(budget=10), near_one)
    with pytest.raises(ValueError, match="use ddpm"):
        drawn(RolloverBudget(), near_one, solver="ddim")
