"""Solvers of masked chains against laws that are known: a head of constant probabilities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from diffpolicy.core import (
    Ancestral,
    Cosine,
    LogLinear,
    MaskedDenoiser,
    Relaxation,
    Scheduled,
    VPCosine,
    levels,
    one_by_one,
    one_hot,
    prior_start,
    reveal_schedule,
    sample,
    truncated_start,
)
from diffpolicy.core.denoiser import Denoised
from diffpolicy.core.masking import hard_one_hot, to_tokens
from diffpolicy.core.reveal import BACKWARDS, RevealRow
from diffpolicy.core.starts import explicit_levels
from diffpolicy.core.steps import Memory

LAW = torch.tensor([0.5, 0.3, 0.15, 0.05])
V, L = 4, 5
processes = pytest.mark.parametrize("process", [LogLinear(), LogLinear(0.001), Cosine()], ids=repr)
relaxations = pytest.mark.parametrize(
    "relaxation",
    [
        Relaxation(),
        Relaxation(0.3),
        Relaxation(2.0, final_temperature=0.1),
        Relaxation(relaxed_steps=2),
        *(Relaxation(0.7, straight_through=True, backward=b) for b in BACKWARDS),
        Relaxation(0.7, relaxed_steps=1, straight_through=True, backward="reinmax"),
    ],
    ids=repr,
)


class Constant(nn.Module):
    """The same probabilities at every position of every state."""

    horizon, dim = L, V + 1

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.cat([LAW.log(), torch.zeros(1)]))

    def forward(self, x, t, cond=None):
        return self.logits.expand(len(x), x.shape[1], -1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def constant(process=None):
    return MaskedDenoiser(Constant(), process or LogLinear(), V, time_free=True)


def masks(rows, length=L):
    return torch.ones(rows, length, dtype=torch.bool)


def all_masked(process, rows, length=L):
    return prior_start(process, torch.zeros(rows, length, V + 1))


def chain(solver_name, num_steps, *, rows, denoiser=None, relaxation=None, seed=0, **settings):
    """Samples by one of the solvers, of the constant head if no other is given."""
    denoiser = denoiser or constant()
    length, dim = denoiser.network.horizon, denoiser.network.dim
    start = prior_start(denoiser.process, torch.zeros(rows, length, dim))
    grid = levels(start, num_steps)
    if solver_name == "ancestral":
        solver = Ancestral(relaxation)
    else:
        groups, count = reveal_schedule(
            denoiser.process,
            grid,
            masks(rows, length),
            seeded(seed + 1),
            compact=solver_name == "compact",
        )
        solver, grid = Scheduled(groups, relaxation), levels(start, count)
    return sample(denoiser, solver, start, grid, generator=seeded(seed), **settings)


solvers = pytest.mark.parametrize("solver", ["ancestral", "scheduled", "compact"])


@solvers
@processes
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_constant_head_gives_independent_tokens_at_any_number_of_steps(
    solver, process, num_steps
):
    with torch.no_grad():
        x0 = chain(solver, num_steps, rows=6000, denoiser=constant(process))
    assert (x0[..., -1] == 0).all()
    assert ((x0 == 0) | (x0 == 1)).all()
    tokens = to_tokens(x0)
    error = (LAW * (1 - LAW) / len(x0)).sqrt()
    assert ((x0[..., :-1].mean(0) - LAW).abs() < 4.5 * error).all()
    pairs = torch.stack([one_hot(tokens, V)[:, i, :-1] for i in (0, 3)], 1)
    joint = torch.einsum("ba,bc->ac", pairs[:, 0], pairs[:, 1]) / len(x0)
    expected = LAW[:, None] * LAW
    error = (expected * (1 - expected) / len(x0)).sqrt()
    assert ((joint - expected).abs() < 4.5 * error).all()


class Table(nn.Module):
    """Logits of every state of two positions over two tokens."""

    horizon, dim = 2, 3

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(1.5 * torch.randn(9, 2, 3, generator=seeded(7)))

    def forward(self, x, t, cond=None):
        return self.logits[x.argmax(-1) @ torch.tensor([3, 1])]


@solvers
@pytest.mark.parametrize("num_steps", [1, 3])
def test_law_of_a_grid_is_the_sum_over_reveal_times(solver, num_steps):
    """One of the two positions sees the other's token unless both are revealed in one step."""
    process = Cosine()
    denoiser = MaskedDenoiser(Table(), process, 2, time_free=True)
    both, first, second = ((2, 2), ((0, 2), (1, 2)), ((2, 0), (2, 1)))
    with torch.no_grad():
        p = lambda *s: denoiser.log_probs(torch.tensor([s]), torch.zeros(1, 1, 1))[0].exp()  # noqa: E731
        alone = p(*both)
        left_first = alone[0][:, None] * torch.stack([p(*s)[1] for s in first])
        right_first = alone[1] * torch.stack([p(*s)[0] for s in second], 1)
        m = process.mask_probability(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))
        together = (m[:-1] - m[1:]).square().sum()
        apart = (1 - together) / 2
        law = together * alone[0][:, None] * alone[1] + apart * (left_first + right_first)
        x0 = chain(solver, num_steps, rows=40_000, denoiser=denoiser)[..., :-1]
    found = torch.einsum("ba,bc->ac", x0[:, 0], x0[:, 1]) / len(x0)
    error = (law * (1 - law) / len(x0)).sqrt()
    assert law.sum().item() == pytest.approx(1)
    assert ((found - law).abs() < 4.5 * error).all()


@solvers
@relaxations
def test_relaxed_states_stay_on_the_simplex_and_end_without_masks(solver, relaxation):
    denoiser = constant()
    path = chain(solver, 4, rows=50, relaxation=relaxation, denoiser=denoiser, record=True)
    for step in path.transitions:
        for x in (step.x_next, step.mean):
            assert (x >= 0).all()
            torch.testing.assert_close(x.sum(-1), torch.ones(50, L))
    assert (path.x0[..., -1] == 0).all()
    path.x0[..., 0].sum().backward()
    grad = denoiser.network.logits.grad
    assert grad.isfinite().all()
    assert grad[0] > 0


class TestRelaxation:
    log_p = LAW.log().expand(200, V)
    noise = LogLinear().draw_noise((200, V), seeded(), LAW)

    @pytest.mark.parametrize("backward", BACKWARDS)
    @pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
    def test_straight_through_is_the_hard_draw_exactly(self, backward, temperature):
        how = Relaxation(straight_through=True, backward=backward)
        log_p = self.log_p.clone().requires_grad_()
        drawn = how.draw(log_p, self.noise, temperature)
        assert torch.equal(drawn, hard_one_hot(self.log_p + self.noise))
        assert torch.equal(drawn, how.draw(self.log_p, self.noise, None))
        (drawn * torch.arange(4.0)).sum().backward()
        assert log_p.grad.isfinite().all()
        assert (log_p.grad != 0).any()

    def test_relaxed_draw_is_the_softmax_at_its_temperature(self):
        drawn = Relaxation().draw(self.log_p, self.noise, 0.4)
        race = ((self.log_p + self.noise) / 0.4).exp()
        torch.testing.assert_close(drawn, race / race.sum(-1, keepdim=True))

    def test_cold_draws_are_hard(self):
        drawn = Relaxation().draw(self.log_p, self.noise, 1e-4)
        hard = hard_one_hot(self.log_p + self.noise)
        assert ((drawn - hard).abs().sum(-1) < 1e-3).float().mean() > 0.99

    @pytest.mark.parametrize("backward", BACKWARDS)
    def test_impossible_tokens_have_finite_gradients(self, backward):
        base = self.log_p.clone().requires_grad_()
        log_p = torch.cat([base, torch.full((200, 1), -math.inf)], -1)
        noise = torch.cat([self.noise, torch.zeros(200, 1)], -1)
        drawn = Relaxation(straight_through=True, backward=backward).draw(log_p, noise, 0.5)
        assert (drawn[:, -1] == 0).all()
        drawn[:, 0].sum().backward()
        assert base.grad.isfinite().all()
        assert (base.grad != 0).any()

    @pytest.mark.parametrize("backward", ["probabilities", "reinmax"])
    def test_expected_gradient_of_what_is_linear_is_exact(self, backward):
        """Summed over all hard draws, ``sum_a p_a grad_a`` is the gradient of ``sum_a p_a r_a``."""
        r = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
        logits = torch.randn(V, generator=seeded(), dtype=torch.float64).requires_grad_()
        log_p = logits.log_softmax(-1)
        (exact,) = torch.autograd.grad((log_p.exp() * r).sum(), logits, retain_graph=True)
        noise = 50 * torch.eye(V, dtype=torch.float64)  # row a draws token a
        how = Relaxation(straight_through=True, backward=backward)
        drawn = how.draw(log_p.expand(V, V), noise, 1.0)
        value = (log_p.detach().exp() * (drawn * r).sum(-1)).sum()
        (found,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(found, exact)

    def test_reinmax_follows_its_algorithm(self):
        """Liu et al. 2023, algorithm 2, transcribed."""
        theta = torch.randn(20, V, generator=seeded(2)).log_softmax(-1)
        mine, other = theta.clone().requires_grad_(), theta.clone().requires_grad_()
        noise, weights = self.noise[:20], torch.randn(20, V, generator=seeded(3))
        how = Relaxation(straight_through=True, backward="reinmax")
        (how.draw(mine, noise, 1.3) * weights).sum().backward()
        pi_0, drawn = other.softmax(-1), hard_one_hot(theta + noise)
        pi_1 = (drawn + (other / 1.3).softmax(-1)) / 2
        pi_1 = ((pi_1.log() - other).detach() + other).softmax(-1)
        ((2 * pi_1 - pi_0 / 2) * weights).sum().backward()
        torch.testing.assert_close(mine.grad, other.grad)

    def test_temperature_changes_geometrically_over_the_last_steps(self):
        assert Relaxation(0.5).gumbel_temperatures(3) == [0.5] * 3
        annealed = Relaxation(2.0, final_temperature=0.5, relaxed_steps=3).gumbel_temperatures(5)
        assert annealed == [None, None, *(pytest.approx(v) for v in (2.0, 1.0, 0.5))]
        assert Relaxation(relaxed_steps=9).gumbel_temperatures(2) == [1.0, 1.0]
        assert Relaxation(2.0, final_temperature=0.5).gumbel_temperatures(1) == [2.0]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"gumbel_temperature": 0.0}, "gumbel_temperature must be positive, got 0.0"),
            ({"final_temperature": -1.0}, "final_temperature must be positive"),
            ({"relaxed_steps": 0}, "relaxed_steps must be at least 1"),
            ({"backward": "score"}, "unknown backward 'score'; expected one of"),
            ({"backward": "reinmax"}, "backward='reinmax' needs straight_through=True"),
        ],
    )
    def test_bad_values_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Relaxation(**settings)


@pytest.mark.parametrize("backward", BACKWARDS)
@solvers
def test_straight_through_chains_are_the_hard_ones(solver, backward):
    how = Relaxation(0.5, straight_through=True, backward=backward)
    hard, soft = (chain(solver, 4, rows=64, relaxation=r) for r in (None, how))
    assert torch.equal(hard, soft)


def test_steps_before_the_relaxed_ones_are_hard():
    path = chain("ancestral", 5, rows=30, relaxation=Relaxation(relaxed_steps=2), record=True)
    hard = [bool(((s.x_next == 0) | (s.x_next == 1)).all()) for s in path.transitions]
    assert hard == [True, True, True, False, False]


@pytest.mark.parametrize("which", [None, "some"])
def test_a_step_moves_mask_mass_alone(which):
    """``x + mask * drawn`` per position, with a mask that is left as the draw has it."""
    x = torch.rand(3, L, V + 1, generator=seeded()).softmax(-1)
    noise = LogLinear().draw_noise(x.shape, seeded(1), x)
    chosen = None if which is None else (torch.arange(L) % 2 == 0).expand(3, L).unsqueeze(-1)
    row = RevealRow(torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.25), Relaxation(), 0.8, chosen)
    log_p = LAW.log().expand(3, L, V)
    memory, mean, std = row.advance(Memory(x, x, ()), Denoised(x, {"log_p": log_p}), noise)
    if chosen is None:
        law = torch.cat([0.25 * LAW, torch.tensor([0.75])]).expand_as(x)
        drawn = ((law.log() + noise) / 0.8).softmax(-1)
    else:
        law = torch.cat([LAW, torch.zeros(1)]).expand_as(x)
        drawn = ((log_p + noise[..., :-1]) / 0.8).softmax(-1)
        drawn = torch.cat([drawn, torch.zeros(3, L, 1)], -1)
    carried = torch.cat([x[..., :-1], torch.zeros(3, L, 1)], -1)
    for found, move in ((memory.x, drawn), (mean, law)):
        expected = carried + x[..., -1:] * move
        if chosen is not None:
            expected = torch.where(chosen, expected, x)
        torch.testing.assert_close(found, expected)
    assert std is None


class TestSchedule:
    @processes
    @pytest.mark.parametrize("t_start", [1.0, 0.6])
    def test_steps_have_the_law_of_the_process(self, process, t_start):
        zero = torch.zeros(1, 1, V + 1)
        start = truncated_start(process, zero, t_start, zero)
        grid = levels(start, 6)
        groups, count = reveal_schedule(process, grid, masks(2000, 10), seeded())
        assert count == 6
        m = process.mask_probability(grid.flatten())
        expected = (m[:-1] - m[1:]) / m[0]
        found = torch.bincount(groups.flatten(), minlength=6) / groups.numel()
        error = (expected * (1 - expected) / groups.numel()).sqrt()
        assert ((found - expected).abs() < 4.5 * error).all()

    def test_rows_may_have_levels_of_their_own(self):
        process, rows = Cosine(), 2000
        t = torch.tensor([0.2, 1.0], dtype=torch.float64).repeat(rows // 2).view(-1, 1, 1)
        x = torch.zeros(rows, 8, V + 1)
        grid = levels(truncated_start(process, x, t, x), 3)
        groups, _ = reveal_schedule(process, grid, masks(rows, 8), seeded())
        for row in (0, 1):
            m = process.mask_probability(grid[:, row].flatten())
            expected = (m[:-1] - m[1:]) / m[0]
            found = torch.bincount(groups[row::2].flatten()) / groups[row::2].numel()
            torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0)

    @pytest.mark.parametrize("compact", [False, True])
    def test_what_the_grid_leaves_masked_stays_so(self, compact):
        denoiser, rows = constant(), 3000
        start = all_masked(denoiser.process, rows)
        grid = explicit_levels(start, [0.8, 0.5, 0.4])
        groups, count = reveal_schedule(
            denoiser.process, grid, masks(rows), seeded(), compact=compact
        )
        assert groups.max() == count
        with torch.no_grad():
            solver, grid = Scheduled(groups), levels(start, count, end=0.4)
            x = sample(denoiser, solver, start, grid, generator=seeded(1))
        assert x[..., -1].mean().item() == pytest.approx(0.4, abs=0.02)

    @pytest.mark.parametrize("num_steps", [2, 4, 30])
    def test_compact_schedules_skip_what_reveals_nothing(self, num_steps):
        process = LogLinear()
        grid = levels(all_masked(process, 1), num_steps)
        given = torch.rand(200, L, generator=seeded(1)) < 0.7
        given[0] = False
        full, _ = reveal_schedule(process, grid, given, seeded())
        groups, count = reveal_schedule(process, grid, given, seeded(), compact=True)
        assert count <= min(num_steps, L)
        for row in range(200):
            i = given[row]
            old, new = full[row][i].unique(), groups[row][i].unique()
            assert new.tolist() == list(range(count - len(old), count))  # no gap, all end together
            before, after = ((g[row][i][:, None] - g[row][i]).sign() for g in (full, groups))
            assert torch.equal(before, after)

    def test_one_by_one_is_a_uniform_permutation(self):
        groups = one_by_one(masks(12_000, 3), seeded())
        found = {p: 0 for p in itertools.permutations(range(3))}
        for row in groups.tolist():
            found[tuple(row)] += 1
        error = math.sqrt(12_000 / 6 * 5 / 6)
        assert all(abs(n - 2000) < 4.5 * error for n in found.values())

    def test_one_by_one_leaves_what_is_revealed_to_the_end(self):
        masked = torch.rand(300, 7, generator=seeded()) < 0.5
        groups = one_by_one(masked, seeded(1))
        assert torch.equal(groups.sort(1).values, torch.arange(7).expand(300, 7))
        number = masked.sum(1, keepdim=True)
        assert torch.equal(groups < number, masked)

    def test_given_tokens_outlast_any_schedule(self):
        denoiser = constant()
        given = one_hot(torch.randint(0, V + 1, (100, L), generator=seeded()), V)
        kept = given[..., -1] == 0
        start = prior_start(denoiser.process, given)._replace(x=given)
        solver = Scheduled(one_by_one(~kept, seeded()))
        count = int((~kept).sum(1).max())
        with torch.no_grad():
            x0 = sample(denoiser, solver, start, levels(start, count), generator=seeded(1))
        assert torch.equal(x0[kept], given[kept])
        assert (x0[..., -1] == 0).all()

    @pytest.mark.parametrize("groups", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)])
    def test_groups_are_integers_per_position(self, groups):
        with pytest.raises(ValueError, match=r"groups must be integers \[B, L\]"):
            Scheduled(groups)


def test_per_row_starts_run_in_both_solvers():
    denoiser, rows = constant(Cosine()), 4000
    given = one_hot(torch.zeros(rows, L, dtype=torch.long), V)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64).repeat(rows // 2).view(-1, 1, 1)
    noise = denoiser.process.draw_noise(given.shape, seeded(), given)
    start = truncated_start(denoiser.process, given, t, noise)
    grid = levels(start, 3)
    groups, _ = reveal_schedule(denoiser.process, grid, start.x[..., -1] > 0.5, seeded(1))
    for solver in (Ancestral(), Scheduled(groups)):
        with torch.no_grad():
            x0 = sample(denoiser, solver, start, grid, generator=seeded(2))
        assert (x0[..., -1] == 0).all()
        for row in (0, 1):
            m = denoiser.process.mask_probability(t[row]).item()
            expected = 1 - m * (1 - LAW[0].item())  # kept, or drawn again alike
            assert x0[row::2, :, 0].mean().item() == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("solver", [Ancestral(), Scheduled(torch.zeros(1, 2, dtype=torch.long))])
def test_gaussian_noise_has_other_solvers(solver):
    with pytest.raises(ValueError, match="reveals masked tokens; for VPCosine use ddim"):
        solver.rows(VPCosine(), torch.linspace(1, 0, 3).view(-1, 1, 1, 1))
