"""Masking processes: their schedules, how they mask and draw, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from diffpolicy.core import (
    Cosine,
    LogLinear,
    Start,
    levels,
    prior_start,
    truncated_start,
    warm_start,
)
from diffpolicy.core.masking import MASKING, hard_one_hot, make_masking, one_hot, to_tokens

PROCESSES = [LogLinear(), LogLinear(eps=0.001), Cosine()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def at(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
class TestSchedule:
    def test_nothing_is_masked_at_0_and_all_at_1(self, process):
        assert process.mask_probability(at(0.0)).item() == 0
        last = 1 - getattr(process, "eps", 0.0)
        assert process.mask_probability(at(1.0)).item() == pytest.approx(last, abs=1e-15)

    def test_rises_and_leaves_the_rest_as_signal(self, process):
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        m = process.mask_probability(t)
        assert (m.diff() > 0).all()
        torch.testing.assert_close(process.alpha(t), 1 - m)

    def test_weight_is_the_logarithmic_derivative(self, process):
        t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
        log_m = [process.mask_probability(t + d).log() for d in (-h, h)]
        torch.testing.assert_close(
            process.weight(t), (log_m[1] - log_m[0]) / (2 * h), rtol=1e-7, atol=1e-7
        )

    def test_staying_masked_over_a_grid_telescopes(self, process):
        grid = torch.tensor([0.9, 0.7, 0.35, 0.3, 0.1], dtype=torch.float64)
        stay = (1 - process.reveal(grid[:-1], grid[1:])).prod()
        m = process.mask_probability(grid)
        torch.testing.assert_close(stay, m[-1] / m[0])
        assert process.reveal(at(0.4), at(0.0)).item() == 1

    def test_config_makes_it_again(self, process):
        assert make_masking(process.config()) == process

    def test_each_token_is_masked_with_the_probability_of_its_level(self, process):
        tokens = torch.randint(0, 4, (3, 20_000), generator=seeded())
        x0 = one_hot(tokens, 4).double()
        t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64).view(-1, 1, 1)
        x = process.add_noise(x0, t, process.draw_noise(x0.shape, seeded(1), x0))
        assert x.dtype == torch.float64
        assert ((x == 0) | (x == 1)).all()
        drawn, m = to_tokens(x), process.mask_probability(t).flatten()
        torch.testing.assert_close((drawn == 4).double().mean(1), m, atol=0.015, rtol=0)
        assert (drawn == tokens)[drawn != 4].all()


def test_names_build_their_processes():
    assert {name: type(make_masking(name)) for name in MASKING} == {
        "masked_loglinear": LogLinear,
        "masked_cosine": Cosine,
    }


def test_cosine_reveals_few_positions_while_most_is_masked():
    t, s = at(0.9), at(0.8)
    assert Cosine().reveal(t, s) < 0.5 * LogLinear().reveal(t, s)
    assert Cosine().mask_probability(at(1 / 3)).item() == pytest.approx(0.5)


def test_gumbel_draws_have_the_law_of_the_softmax():
    law = torch.tensor([0.6, 0.3, 0.09, 0.01])
    noise = LogLinear().draw_noise((200_000, 4), seeded(), law)
    assert noise.dtype == torch.float32
    found = hard_one_hot(law.log() + noise).mean(0)
    error = (law * (1 - law) / len(noise)).sqrt()
    assert ((found - law).abs() < 4 * error).all()


def test_gumbel_noise_is_computed_in_float64():
    """float32 cannot hold uniform draws near 1, so there its large values would be cut at 17."""
    like = torch.zeros((), dtype=torch.float32)
    race = torch.empty(1000, dtype=torch.float64).exponential_(generator=seeded(3))
    noise = LogLinear().draw_noise((1000,), seeded(3), like)
    assert torch.equal(noise, (-race.log()).float())
    many = LogLinear().draw_noise((1_000_000,), seeded(), like.double())
    assert many.mean().item() == pytest.approx(0.5772, abs=0.006)
    assert many.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_soft_guess_is_drawn_from_and_masked_at_once():
    guess = torch.tensor([0.7, 0.3, 0.0]).expand(1, 40_000, 3)
    process = LogLinear()
    x = process.add_noise(guess, at(0.5), process.draw_noise(guess.shape, seeded(), guess))
    expected = torch.tensor([[0.35, 0.15, 0.5]])
    torch.testing.assert_close(x.mean(1), expected, atol=0.01, rtol=0)


def test_prior_is_all_masks():
    x, t = prior_start(Cosine(), torch.randn(2, 3, 5, generator=seeded()))
    assert t.item() == 1
    assert torch.equal(x, one_hot(torch.full((2, 3), 4), 4))


class TestPartialMasks:
    process = LogLinear()
    tokens = torch.randint(0, 4, (2, 5000), generator=seeded())
    x0 = one_hot(tokens, 4)
    noise = process.draw_noise(x0.shape, seeded(1), x0)

    def test_fraction_masked_is_that_of_the_start(self):
        x, t = truncated_start(self.process, self.x0, 0.3, self.noise)
        drawn = to_tokens(x)
        assert t.item() == 0.3
        assert (drawn == 4).float().mean().item() == pytest.approx(0.3, abs=0.02)
        assert (drawn == self.tokens)[drawn != 4].all()

    def test_rows_may_start_at_levels_of_their_own(self):
        t = torch.tensor([0.1, 0.9]).view(2, 1, 1)
        start = truncated_start(self.process, self.x0, t, self.noise)
        fractions = (to_tokens(start.x) == 4).float().mean(1)
        torch.testing.assert_close(fractions, t.flatten(), atol=0.03, rtol=0)

    @pytest.mark.parametrize("process", PROCESSES, ids=repr)
    def test_start_at_1_is_the_prior_exactly(self, process):
        x, _ = truncated_start(process, self.x0, 1.0, self.noise)
        assert torch.equal(x, process.prior(self.noise))

    def test_start_at_0_is_the_guess(self):
        x, _ = truncated_start(self.process, self.x0, 0.0, self.noise)
        assert torch.equal(x, self.x0)

    def test_warm_start_shifts_the_sequence_and_masks_again(self):
        x, _ = warm_start(self.process, self.x0, 0.3, self.noise, shift=7)
        drawn, shifted = to_tokens(x), self.tokens[:, 7:]
        kept = drawn[:, :-7] != 4
        assert (drawn[:, :-7] == shifted)[kept].all()
        assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
        tail = drawn[:, -7:]
        assert ((tail == self.tokens[:, -1:]) | (tail == 4)).all()

    def test_warm_start_can_take_the_sequence_as_it_is(self):
        start = warm_start(self.process, self.x0, 0.3, self.noise, shift=1, renoise=False)
        assert torch.equal(to_tokens(start.x)[:, :-1], self.tokens[:, 1:])


def test_tokens_and_states_convert_both_ways():
    tokens = torch.tensor([[0, 2, 3], [3, 1, 0]])
    x = one_hot(tokens, 3)
    assert x.shape == (2, 3, 4)
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.nn.functional.one_hot(tokens, 4).float())
    assert torch.equal(to_tokens(x), tokens)
    scores = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    hard = hard_one_hot(scores)
    assert hard.dtype == torch.float64
    assert torch.equal(hard.argmax(-1), scores.argmax(-1))
    assert torch.equal(hard.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("eps", [-0.1, 1.0])
def test_eps_is_a_fraction(eps):
    with pytest.raises(ValueError, match=r"eps must be in \[0, 1\)"):
        LogLinear(eps=eps)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("uniform", "unknown masking process 'uniform'; expected one of .*masked_cosine"),
        ({}, "unknown masking process None"),
        ({"type": "masked_cosine", "eps": 0.1}, "masking process 'masked_cosine'.*eps"),
    ],
)
def test_bad_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        make_masking(config)


def test_log_snr_grids_belong_to_gaussian_noise():
    start = Start(torch.zeros(1, 2, 3), torch.ones(1, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="spacing='t'"):
        levels(start, 4, spacing="karras", process=LogLinear())
