"""Masked cross-entropy and the likelihood bound, against heads and laws that are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from tuning_tables import Table, sequences, table_denoiser

from diffpolicy.core import Cosine, LogLinear, MaskedDenoiser
from diffpolicy.learn.cloning.masked import (
    MaskedDenoisingLoss,
    antithetic_levels,
    draw_masks,
    elbo,
    masked_cross_entropy,
)
from diffpolicy.sequences.exact import ExactLaw

LAW = torch.tensor([0.6, 0.3, 0.1])
PROCESSES = [LogLinear(), Cosine()]


class Constant(nn.Module):
    """The same probabilities everywhere; remembers what it was given."""

    def __init__(self, length=5, factor=1.0):
        super().__init__()
        self.horizon, self.dim, self.factor = length, 4, factor
        self.logits = nn.Parameter(torch.cat([LAW.log(), torch.zeros(1)]))

    def forward(self, x, t, cond=None):
        self.t, self.cond = t, cond
        return self.logits.expand(len(x), self.horizon, -1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def constant(process=None, *, time_free=True, length=5):
    return MaskedDenoiser(Constant(length), process or LogLinear(), 3, time_free=time_free)


def some_tokens(count, length=5, seed=0):
    return torch.randint(0, 3, (count, length), generator=seeded(seed))


def order_bound(denoiser, tokens):
    """``E over orders of log p(tokens, order)``, by all orders, ``[N]``."""
    length = tokens.shape[1]
    orders = list(itertools.permutations(range(length)))
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for order in orders:
        state = torch.full_like(tokens, denoiser.vocab_size)
        for i in order:
            log_p = denoiser.log_probs(state, torch.zeros(1, 1, 1))[:, i]
            total += log_p.gather(1, tokens[:, i : i + 1]).squeeze(1) / len(orders)
            state[:, i] = tokens[:, i]
    return total


class TestCrossEntropy:
    def test_sums_over_masked_positions(self):
        tokens = some_tokens(6)
        masked = torch.rand(6, 5, generator=seeded(1)) < 0.5
        found = masked_cross_entropy(constant(), tokens, torch.ones(6, 1, 1), masked)
        torch.testing.assert_close(found, -(LAW.log()[tokens] * masked).sum(1))

    def test_denoiser_sees_masks_where_tokens_are_hidden(self):
        denoiser = table_denoiser(2, 3, seed=1)
        tokens = torch.tensor([[0, 1, 1]])
        masked = torch.tensor([[True, False, True]])
        log_p = denoiser.log_probs(torch.tensor([[2, 1, 2]]), torch.zeros(1, 1, 1))[0]
        found = masked_cross_entropy(denoiser, tokens, torch.ones(1, 1, 1), masked)
        torch.testing.assert_close(found, -(log_p[0, 0] + log_p[2, 1])[None])

    def test_nothing_masked_costs_nothing(self):
        masked = torch.zeros(4, 5, dtype=torch.bool)
        found = masked_cross_entropy(constant(), some_tokens(4), torch.ones(4, 1, 1), masked)
        assert torch.equal(found, torch.zeros(4))


class TestLevels:
    def test_antithetic_levels_fall_one_in_each_stratum(self):
        t = antithetic_levels(16, seeded()).flatten()
        u = (t.sort().values - 1e-3) / (1 - 1e-3) * 16
        torch.testing.assert_close(u - u[0], torch.arange(16.0), rtol=0, atol=1e-3)
        assert 0 <= u[0] < 1
        assert not torch.equal(t, t.sort().values)  # rows are shuffled

    def test_each_row_is_uniform_over_draws(self):
        g = seeded()
        t = torch.stack([antithetic_levels(4, g).flatten() for _ in range(2000)])
        assert t.min() >= 1e-3
        assert t.max() < 1
        for row in t.T:
            assert row.mean().item() == pytest.approx(0.5, abs=0.03)
            assert row.var().item() == pytest.approx(1 / 12, abs=0.01)

    @pytest.mark.parametrize("process", PROCESSES, ids=repr)
    def test_masks_have_the_probability_of_their_level(self, process):
        denoiser = constant(process, length=10_000)
        t = torch.tensor([0.15, 0.5, 0.9]).view(-1, 1, 1)
        masked = draw_masks(denoiser, some_tokens(3, 10_000), t, seeded())
        m = process.mask_probability(t).flatten()
        torch.testing.assert_close(masked.float().mean(1), m, atol=0.02, rtol=0)


class TestLoss:
    @pytest.mark.parametrize("process", PROCESSES, ids=repr)
    def test_of_a_constant_head_is_its_log_likelihood_in_expectation(self, process):
        """``E_t [m' / m * m] = 1`` per token, whatever the schedule."""
        tokens = some_tokens(1).expand(40_000, -1)
        out = MaskedDenoisingLoss(constant(process))({"tokens": tokens}, seeded())
        expected = -LAW.log()[tokens[0]].sum().item()
        error = out.loss.std().item() / len(tokens) ** 0.5
        assert error < 0.03 * expected
        assert out.loss.mean().item() == pytest.approx(expected, abs=4 * error)
        per_mask = out.metrics["nats_per_mask"].item()
        assert per_mask == pytest.approx(expected / 5, rel=0.02)

    @pytest.mark.parametrize("process", PROCESSES, ids=repr)
    def test_equals_the_bound_in_expectation(self, process):
        network = Table(2, 3, seed=3, scale=1.5)
        denoiser = MaskedDenoiser(network, process, 2, time_free=True)
        tokens = torch.tensor([0, 1, 0]).expand(60_000, -1)
        with torch.no_grad():
            loss = MaskedDenoisingLoss(denoiser)({"tokens": tokens}, seeded()).loss
            expected = -order_bound(denoiser, tokens[:1]).item()
        assert loss.mean().item() == pytest.approx(
            expected, abs=4 * loss.std().item() / 60_000**0.5
        )

    def test_learns_the_law_of_the_data(self):
        data = sequences(2, 2)
        law = torch.tensor([0.5, 0.1, 0.1, 0.3])
        denoiser = table_denoiser(2, 2, seed=0)
        loss, g = MaskedDenoisingLoss(denoiser), seeded()
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.1)
        for step in range(120):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
            tokens = data[torch.multinomial(law, 256, replacement=True, generator=g)]
            optimizer.zero_grad()
            loss({"tokens": tokens.to(torch.int8)}, g).loss.mean().backward()
            optimizer.step()
        with torch.no_grad():
            p = ExactLaw.of(denoiser).p
        assert 0.5 * (p - law).abs().sum().item() < 0.03

    def test_randomness_comes_from_the_generator(self):
        loss, batch = MaskedDenoisingLoss(constant()), {"tokens": some_tokens(8)}
        one, two, other = (loss(batch, seeded(s)).loss for s in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)

    def test_denoisers_of_levels_are_told_theirs(self):
        denoiser = constant(time_free=False)
        MaskedDenoisingLoss(denoiser)({"tokens": some_tokens(8)}, seeded())
        told = denoiser.network.t.flatten() / 1000
        torch.testing.assert_close(told, antithetic_levels(8, seeded()).flatten())

    @pytest.mark.parametrize("dropout", [0.0, 0.25])
    def test_conditions_are_dropped_for_some_examples(self, dropout):
        denoiser = constant()
        loss = MaskedDenoisingLoss(denoiser, cond_dropout=dropout)
        cond = torch.rand(4000, 2, generator=seeded()) + 0.5
        loss({"tokens": some_tokens(4000), "cond": cond}, seeded(1))
        seen = denoiser.network.cond
        dropped = (seen == 0).all(1)
        assert torch.equal(seen[~dropped], cond[~dropped])
        assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.03)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0])
    def test_dropout_is_a_fraction(self, dropout):
        with pytest.raises(ValueError, match=r"cond_dropout must be in \[0, 1\)"):
            MaskedDenoisingLoss(constant(), cond_dropout=dropout)


class TestBound:
    @pytest.mark.parametrize("draws", [1, 5, 7])
    def test_is_exact_where_all_masks_tell_the_same(self, draws):
        tokens = torch.tensor([[1, 1, 1, 1, 1]]).expand(300, -1)
        found = elbo(constant(), tokens, seeded(), draws=draws)
        torch.testing.assert_close(found, torch.full((300,), 5 * math.log(0.3)))

    def test_is_the_expected_log_likelihood_over_orders(self):
        denoiser = table_denoiser(2, 3, seed=2, scale=1.5)
        tokens = sequences(2, 3)
        with torch.no_grad():
            expected = order_bound(denoiser, tokens)
            many = tokens.repeat_interleave(4000, 0)
            found = elbo(denoiser, many, seeded(), draws=2).view(8, 4000).double()
            log_p = ExactLaw.of(denoiser).p.log()
        error = found.std(1) / 4000**0.5
        assert ((found.mean(1) - expected).abs() < 4 * error).all()
        assert (expected <= log_p).all()  # Jensen: it bounds the likelihood

    def test_counts_of_masks_are_stratified_over_draws(self):
        """Three draws of three positions see one, two and three masks, once each."""
        denoiser = table_denoiser(2, 3, seed=2)
        seen = []
        network = denoiser.network.forward

        def spy(x, t, cond=None):
            seen.append(x[..., -1].sum(1))
            return network(x, t, cond)

        denoiser.network.forward = spy
        elbo(denoiser, sequences(2, 3), seeded(), draws=3)
        assert torch.equal(torch.stack(seen), torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 8))

    @pytest.mark.parametrize("process", PROCESSES, ids=repr)
    def test_denoisers_of_levels_are_told_the_one_of_so_many_masks(self, process):
        denoiser = constant(process, time_free=False)
        states = []
        network = denoiser.network.forward

        def spy(x, t, cond=None):
            states.append((x[..., -1].sum(1) / 5, t.flatten() / 1000))
            return network(x, t, cond)

        denoiser.network.forward = spy
        elbo(denoiser, some_tokens(20), seeded(), draws=3)
        for fraction, t in states:
            torch.testing.assert_close(process.mask_probability(t), fraction)

    def test_conditions_reach_the_denoiser(self):
        denoiser, cond = constant(), torch.rand(4, 2, generator=seeded())
        elbo(denoiser, some_tokens(4), seeded(), draws=1, cond=cond)
        assert torch.equal(denoiser.network.cond, cond)

    def test_needs_a_draw(self):
        with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
            elbo(constant(), some_tokens(2), seeded(), draws=0)
