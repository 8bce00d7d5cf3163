"""Divergences of single steps: against the kernels' laws, and summed against exact path KLs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from tuning_tables import all_paths, multilinear_denoiser, rollout_of

from diffpolicy.core import (
    AnalyticDenoiser,
    Ancestral,
    Cosine,
    Relaxation,
    Scheduled,
    VPCosine,
    levels,
    make_solver,
    one_by_one,
    prepare,
    prior_start,
    sample,
)
from diffpolicy.core.masking import one_hot
from diffpolicy.learn.reward.chains import (
    categorical_kl,
    gaussian_step_kl,
    masked_step_kl,
    released_step_kl,
)
from diffpolicy.sequences.exact import ExactLaw


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pair():
    return tuple(multilinear_denoiser(2, 3, seed=s) for s in (1, 2))


def full_masks(rows, length=3, vocab_size=2):
    like = torch.zeros(rows, length, vocab_size + 1, dtype=torch.float64)
    return prior_start(multilinear_denoiser().process, like)


def recorded_kl(denoiser, reference, solver, start, grid, step_kl=masked_step_kl, seed=0):
    """The divergence of recorded chains, per row ``[B]``."""
    with torch.no_grad():
        whole = prepare(denoiser, solver, grid, start.x)
        path = sample(denoiser, solver, start, whole, generator=seeded(seed), record=True)
        other = reference.on_grid(grid[:-1])
        steps = zip(whole.rows, path.transitions, strict=True)
        return sum(
            step_kl(row, s.x, s.denoised, other(i, s.x, None)) for i, (row, s) in enumerate(steps)
        )


def assert_mean(values, expected):
    error = values.std().item() / len(values) ** 0.5
    assert error < 0.05 * expected
    assert values.mean().item() == pytest.approx(expected, abs=4 * error)


def test_categorical_divergence():
    p, q = (torch.randn(4, 3, 5, generator=seeded(s)).log_softmax(-1) for s in (0, 1))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(categorical_kl(p, q), expected)
    assert torch.equal(categorical_kl(p, p), torch.zeros(4, 3))


@pytest.mark.parametrize("process", [None, Cosine()], ids=repr)
def test_ancestral_step_is_the_divergence_of_its_kernels(process):
    """Between the laws ``mean`` of the next token, over V tokens and the mask, at each position."""
    denoiser, reference = (multilinear_denoiser(2, 3, seed=s, process=process) for s in (1, 2))
    tokens = torch.tensor(list(itertools.product(range(3), repeat=3)))
    x = one_hot(tokens, 2).double()
    start = full_masks(1)
    grid = levels(start, 4)
    rows = prepare(denoiser, Ancestral(), grid, x).rows
    noise = denoiser.process.draw_noise((1, *x.shape), seeded(), x)
    t = grid[1:3]
    with torch.no_grad():
        mine, theirs = (
            sample(d, Ancestral(), start._replace(x=x, t=t[0]), t, noise=noise, record=True)
            for d in (denoiser, reference)
        )
    p, q = mine.transitions[0].mean, theirs.transitions[0].mean
    expected = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum((1, 2))
    found = masked_step_kl(rows[1], x, mine.transitions[0].denoised, theirs.transitions[0].denoised)
    torch.testing.assert_close(found, expected)
    clean = (tokens < 2).all(1)
    assert (found[clean] == 0).all()
    assert (found[~clean] > 0).all()


def test_scheduled_step_is_the_mean_over_which_positions_it_reveals(pair):
    x = one_hot(torch.tensor([[2, 0, 2]]), 2).double().expand(3, -1, -1)
    zero = torch.zeros(1, 1, 1)
    out, other = (d(x, zero) for d in pair)
    inner = categorical_kl(out.aux["log_p"], other.aux["log_p"])[0]
    groups = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])  # of the masked: first, last, both
    rows = prepare(pair[0], Scheduled(groups), levels(full_masks(3), 2), x).rows
    found = masked_step_kl(rows[0], x, out, other)
    both = inner[0] + inner[2]
    torch.testing.assert_close(found, torch.stack([both / 2, both / 2, both]))
    clean = one_hot(torch.tensor([[0, 1, 1]]), 2).double().expand(3, -1, -1)
    assert (masked_step_kl(rows[0], clean, out, other) == 0).all()


def test_one_position_a_step_adds_up_to_the_exact_path_kl(pair):
    rows = 4000
    solver = Scheduled(one_by_one(torch.ones(rows, 3, dtype=torch.bool), seeded(1)))
    start = full_masks(rows)
    found = recorded_kl(*pair, solver, start, levels(start, 3))
    with torch.no_grad():
        exact = ExactLaw.of(pair[0]).path_kl(ExactLaw.of(pair[1])).item()
    assert_mean(found, exact)


@pytest.mark.parametrize("scheduled", [False, True])
def test_steps_of_a_grid_add_up_to_the_exact_path_kl(pair, scheduled):
    """Against the sum over all paths of chance times log-ratio."""
    tokens, groups, order = all_paths(2, 3, 2)
    with torch.no_grad():
        paths = rollout_of(*pair, tokens, groups, 2)
    chance = order * paths.log_p.sum(1).exp()
    exact = (chance * paths.log_ratio).sum().item()
    start = full_masks(4000)
    drawn = torch.randint(0, 2, (4000, 3), generator=seeded(2))
    solver = Scheduled(drawn) if scheduled else Ancestral()
    assert_mean(recorded_kl(*pair, solver, start, levels(start, 2)), exact)


def test_relaxed_states_weigh_positions_with_their_share_of_mask(pair):
    x = torch.rand(4, 3, 3, generator=seeded(), dtype=torch.float64).softmax(-1)
    grid = levels(full_masks(1), 4)
    row = prepare(pair[0], Ancestral(Relaxation()), grid, x).rows[1]
    out, other = (d(x, torch.zeros(1, 1, 1)) for d in pair)
    inner = categorical_kl(out.aux["log_p"], other.aux["log_p"])
    expected = (x[..., -1] * inner).sum(1) / 3  # of what is masked at 3/4, a third by 2/4
    torch.testing.assert_close(masked_step_kl(row, x, out, other), expected)


class TestReleased:
    process = multilinear_denoiser().process

    def test_is_zero_on_hard_states(self, pair):
        start = full_masks(50)
        kl = released_step_kl(self.process)
        found = recorded_kl(*pair, Ancestral(), start, levels(start, 4), kl)
        assert (found == 0).all()
        assert (recorded_kl(*pair, Ancestral(), start, levels(start, 4)) > 0).all()

    def test_follows_its_formula_on_soft_states(self, pair):
        x = torch.rand(20, 3, 3, generator=seeded(), dtype=torch.float64)
        x = (4 * x).softmax(-1)
        grid = levels(full_masks(1), 5)
        row = prepare(pair[0], Ancestral(Relaxation()), grid, x).rows[2]
        out, other = (d(x, torch.zeros(1, 1, 1)) for d in pair)
        log_p, log_q = out.aux["log_p"], other.aux["log_p"]
        expected = torch.zeros(20, dtype=torch.float64)
        for b, i, a in itertools.product(range(20), range(3), range(2)):
            if x[b, i].argmax() != 2:  # carried over: both networks give the token itself
                continue
            p, q = log_p[b, i, a].exp(), log_q[b, i, a].exp()
            rate = -p + q + p * (p.log() - q.log())
            expected[b] += (1 - x[b, i, 2]) * rate / 0.6 * x[b, i, a]
        assert (expected > 0).any()
        found = released_step_kl(self.process)(row, x, out, other)
        torch.testing.assert_close(found, expected)


def test_gaussian_step_is_the_divergence_of_its_kernels():
    process = VPCosine()
    mine, theirs = (AnalyticDenoiser(process, lambda x, t, cond, c=c: c * x) for c in (0.5, 0.2))
    like = torch.randn(6, 2, 3, generator=seeded(), dtype=torch.float64)
    start = prior_start(process, like)
    solver, grid = make_solver("ddpm"), levels(start, 4)
    whole = prepare(mine, solver, grid, like)
    path = sample(mine, solver, start, whole, generator=seeded(1), record=True)
    for i, step in enumerate(path.transitions):
        row, answer = whole.rows[i], theirs(step.x, step.t)
        found = gaussian_step_kl(row, step.x, step.denoised, answer)
        if i == 3:  # to clean: no noise, and left out
            assert (found == 0).all()
            continue
        means = step.mean, row.a * step.x + row.b[0] * answer.x0_hat
        p, q = (Normal(mean, step.std.expand_as(mean)) for mean in means)
        torch.testing.assert_close(found, kl_divergence(p, q).sum((1, 2)))
