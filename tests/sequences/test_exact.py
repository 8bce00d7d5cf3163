"""Exact laws against sums over all reveal orders, samples, and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from diffpolicy.core import (
    LogLinear,
    MaskedDenoiser,
    Scheduled,
    levels,
    one_by_one,
    prior_start,
    sample,
)
from diffpolicy.core.masking import to_tokens
from diffpolicy.networks import make_network
from diffpolicy.sequences.exact import ExactLaw, StateSpace, divergence, exact_scores, optimum


class Table(nn.Module):
    """Free logits of every state."""

    def __init__(self, vocab_size, length, seed):
        super().__init__()
        self.horizon, self.dim = length, vocab_size + 1
        shape = ((vocab_size + 1) ** length, length, vocab_size + 1)
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64))
        self.register_buffer("place", (vocab_size + 1) ** torch.arange(length - 1, -1, -1))

    def forward(self, x, t, cond=None):
        return self.logits[(x.argmax(-1) * self.place).sum(-1)]


def table(vocab_size=2, length=3, seed=0):
    return MaskedDenoiser(Table(vocab_size, length, seed), LogLinear(), vocab_size, time_free=True)


def random_network(vocab_size, length, *, time_free=True, cond_dim=0):
    torch.manual_seed(0)
    sizes = {"horizon": length, "dim": vocab_size + 1, "cond_dim": cond_dim}
    network = make_network({"type": "mlp", "width": 16, "depth": 1, **sizes})
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return MaskedDenoiser(network, LogLinear(), vocab_size, time_free=time_free)


def brute_force(denoiser, length):
    """The law as the average over all orders of the product of conditionals, and its path KL."""
    vocab, t = denoiser.vocab_size, torch.zeros(1, 1, 1)
    orders = list(itertools.permutations(range(length)))
    law = []
    for tokens in itertools.product(range(vocab), repeat=length):
        total = 0.0
        for order in orders:
            state, chance = torch.full((1, length), vocab), 1.0
            for i in order:
                chance *= denoiser.log_probs(state, t)[0, i, tokens[i]].exp().item()
                state[0, i] = tokens[i]
            total += chance / len(orders)
        law.append(total)
    return torch.tensor(law, dtype=torch.float64)


@torch.no_grad()
def exact(denoiser, **settings):
    return ExactLaw.of(denoiser, **settings)


def objective(p, reference, reward, kl_weight):
    return (p * reward).sum() - kl_weight * (p * (p.log() - reference.log())).sum()


class TestLaw:
    @pytest.mark.parametrize(("vocab_size", "length"), [(2, 1), (2, 5), (3, 4), (4, 4), (5, 2)])
    def test_sums_to_one(self, vocab_size, length):
        law = exact(random_network(vocab_size, length))
        assert law.p.shape == (vocab_size**length,)
        assert law.p.dtype == torch.float64
        assert law.p.sum().item() == pytest.approx(1, abs=1e-6)
        for left in range(length + 1):  # every path passes one state of each number of masks
            assert law.visits[law.space.masks == left].sum().item() == pytest.approx(1, abs=1e-6)

    @torch.no_grad()
    @pytest.mark.parametrize(("vocab_size", "length"), [(2, 3), (3, 2)])
    def test_is_the_average_over_all_orders(self, vocab_size, length):
        denoiser = table(vocab_size, length)
        torch.testing.assert_close(exact(denoiser).p, brute_force(denoiser, length))

    @torch.no_grad()
    def test_of_constant_probabilities_is_their_product(self, constant):
        law = exact(constant([0.7, 0.2, 0.1], 3).denoiser)
        p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
        product = torch.einsum("a,b,c->abc", p, p, p).flatten()
        torch.testing.assert_close(law.p, product, rtol=1e-6, atol=1e-8)

    @torch.no_grad()
    def test_sampler_converges_to_it(self):
        """Total variation of N draws: mean at most half sum sqrt(p (1 - p) / N), then McDiarmid."""
        denoiser, count = table(3, 3, seed=1), 30_000
        g = torch.Generator().manual_seed(0)
        groups = one_by_one(torch.ones(count, 3, dtype=torch.bool), g)
        start = prior_start(denoiser.process, torch.zeros(count, 3, 4))
        x0 = sample(denoiser, Scheduled(groups), start, levels(start, 3), generator=g)
        law = exact(denoiser)
        drawn = law.space.index(to_tokens(x0))
        found = torch.bincount(drawn, minlength=27).double() / count
        bound = (
            0.5 * (law.p * (1 - law.p) / count).sqrt().sum() + (math.log(1e3) / 2 / count) ** 0.5
        )
        assert 0.5 * (found - law.p).abs().sum() < bound
        uniform = torch.full((27,), 1 / 27)
        assert 0.5 * (uniform - law.p).abs().sum() > 5 * bound  # the law is not an easy one

    @torch.no_grad()
    def test_sweep_in_parts_is_the_same(self):
        denoiser = random_network(3, 3)
        space = StateSpace(3, 3)
        torch.testing.assert_close(
            space.log_probs(denoiser, batch_size=7), space.log_probs(denoiser)
        )

    def test_conditions_have_laws_of_their_own(self):
        denoiser = random_network(2, 3, cond_dim=2)
        one, other = (exact(denoiser, cond=torch.tensor([c])).p for c in ([1.0, 0.0], [0.0, -2.0]))
        assert one.sum().item() == pytest.approx(1, abs=1e-6)
        assert (one - other).abs().max() > 1e-3


class TestStateSpace:
    def test_counts_in_base_v_plus_1(self):
        space = StateSpace(2, 3)
        assert space.states.tolist() == [list(s) for s in itertools.product(range(3), repeat=3)]
        assert torch.equal(space.states[-1], torch.full((3,), 2))
        complete = [list(s) for s in itertools.product(range(2), repeat=3)]
        assert space.states[space.sequences].tolist() == complete
        assert torch.equal(space.index(torch.tensor(complete)), torch.arange(8))

    def test_edges_reveal_one_position(self):
        space = StateSpace(3, 2)
        for edges in space.edges:
            source, target = space.states[edges.source], space.states[edges.target]
            changed = source != target
            assert (changed.sum(1) == 1).all()
            assert (source[changed] == 3).all()
            assert (target[changed] == edges.entry % 3).all()
        assert [len(e.source) for e in space.edges] == [6, 18]

    def test_too_many_states_are_refused(self):
        with pytest.raises(ValueError, match=r"5\^20 = \d+ states are too many.*estimate by"):
            StateSpace(4, 20)

    def test_denoiser_must_fit(self):
        with pytest.raises(ValueError, match="the denoiser has vocab_size=2, the state space 3"):
            StateSpace(3, 3).log_probs(table(2, 3))
        with pytest.raises(ValueError, match="defined for time_free denoisers"):
            ExactLaw.of(random_network(2, 3, time_free=False))


class TestDivergences:
    @pytest.mark.parametrize("seed", range(5))
    def test_that_of_paths_is_at_least_that_of_sequences(self, seed):
        p, q = exact(table(seed=seed)), exact(table(seed=seed + 10))
        of_paths, of_sequences = p.path_kl(q).item(), divergence(p.p, q.p)
        assert of_paths > of_sequences > 0
        assert p.path_kl(p).item() == 0
        assert divergence(p.p, p.p) == 0

    def test_they_agree_for_independent_positions(self, constant):
        p, q = (exact(constant(v, 3).denoiser) for v in ([0.7, 0.2, 0.1], [0.2, 0.2, 0.6]))
        one = 0.7 * math.log(0.7 / 0.2) + 0.1 * math.log(0.1 / 0.6)
        assert p.path_kl(q).item() == pytest.approx(3 * one, rel=1e-5)
        assert divergence(p.p, q.p) == pytest.approx(3 * one, rel=1e-5)

    def test_of_laws_with_zeros(self):
        p, q = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]))
        assert divergence(p, q) == pytest.approx(0.5 * math.log(2))
        assert divergence(q, p) == math.inf


class TestScores:
    reward = torch.linspace(-1, 1, 8, dtype=torch.float64).sin()
    weight = 0.3

    @property
    def reference(self):
        return exact(table(seed=3)).p

    def test_progress_is_0_at_the_reference_and_1_at_the_optimum(self):
        reference = self.reference
        best = optimum(reference, self.reward, self.weight)
        assert best.sum().item() == pytest.approx(1)
        at_start = exact_scores(reference, reference, self.reward, self.weight)
        assert at_start.progress == pytest.approx(0, abs=1e-12)
        assert at_start.kl == 0
        assert at_start.objective == at_start.objective_reference
        at_best = exact_scores(best, reference, self.reward, self.weight)
        assert at_best.progress == pytest.approx(1)
        assert at_best.kl_to_best == pytest.approx(0, abs=1e-12)

    def test_optimum_maximises_the_objective_at_weight_times_log_z(self):
        reference = self.reference
        best = optimum(reference, self.reward, self.weight)
        log_z = (reference.log() + self.reward / self.weight).logsumexp(0)
        found = objective(best, reference, self.reward, self.weight)
        assert found.item() == pytest.approx((self.weight * log_z).item())
        g = torch.Generator().manual_seed(0)
        for scale in (1e-2, 0.3, 3.0):
            other = (best.log() + scale * torch.randn(8, generator=g)).softmax(0)
            scores = exact_scores(other, reference, self.reward, self.weight)
            assert scores.objective < found
            lost = self.weight * scores.kl_to_best  # J* - J = kl_weight KL(p || p*)
            assert found.item() - scores.objective == pytest.approx(lost)
            assert scores.progress < 1

    def test_figures_are_those_of_their_definitions(self):
        p, reference = exact(table(seed=4)).p, self.reference
        scores = exact_scores(p, reference, self.reward, self.weight)
        assert scores.reward == pytest.approx((p * self.reward).sum().item())
        assert scores.entropy == pytest.approx(-(p * p.log()).sum().item())
        assert scores.kl == pytest.approx(divergence(p, reference))
        expected = objective(p, reference, self.reward, self.weight)
        assert scores.objective == pytest.approx(expected.item())

    def test_constant_reward_has_no_progress(self):
        reference = self.reference
        for constant in (0.0, 7.0):
            scores = exact_scores(reference, reference, torch.full((8,), constant), self.weight)
            assert math.isnan(scores.progress)


@pytest.mark.parametrize("length", [2, 3])
def test_gradient_of_the_exact_objective_is_that_of_finite_differences(length):
    space = StateSpace(2, length)
    reference = exact(table(2, length, seed=8))
    reward = torch.linspace(0, 1, 2**length, dtype=torch.float64).square()

    def value(logits):
        law = ExactLaw.from_log_probs(space, logits.log_softmax(-1))
        both = objective(law.p, reference.p, reward, 0.1), law.path_kl(reference)
        return torch.stack(both)

    g = torch.Generator().manual_seed(0)
    shape = (space.count, length, 2)
    logits = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(value, logits)


def test_law_of_a_denoiser_carries_a_graph():
    denoiser = table()
    ExactLaw.of(denoiser).p[0].backward()
    grad = denoiser.network.logits.grad
    never = StateSpace(2, 3).sequences  # complete sequences are never asked about
    assert (grad[never] == 0).all()
    assert (grad[-1, :, :-1] != 0).all()
