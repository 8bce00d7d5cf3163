"""Particle methods against laws that can be enumerated, and a Gaussian mixture's tilt."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from diffpolicy.core import (
    AnalyticDenoiser,
    Ancestral,
    LogLinear,
    MaskedDenoiser,
    Relaxation,
    Scheduled,
    Start,
    VPCosine,
    levels,
    make_solver,
    one_by_one,
    one_hot,
    prior_start,
    sample,
    to_tokens,
    truncated_start,
)
from diffpolicy.guidance import ClassifierFreeGuidance
from diffpolicy.guidance.particles import SMC, SVDD, TDS, BestOfN
from diffpolicy.guidance.reward import RewardGuidance
from diffpolicy.guidance.search import (
    PARTICLE_METHODS,
    PathSearch,
    RolloverBudget,
    make_particle_method,
)
from diffpolicy.guidance.stepped_chain import (
    choose,
    effective_size,
    log_mean,
    normalised,
    systematic,
)
from diffpolicy.networks import make_network

V, L, D = 3, 3, 4
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
STATES = torch.tensor(list(itertools.product(range(D), repeat=L)))
JOINT = (1.2 * torch.randn(V**L, generator=torch.Generator().manual_seed(2))).softmax(0)
TABLE = torch.randn(V**L, generator=torch.Generator().manual_seed(3))
MARGINALS = one_hot(SEQUENCES, V)[..., :-1].flatten(1)  # [V^L, L V]
KL_WEIGHT = 0.7


def shares(x):
    """How much of each sequence is in soft one-hots ``[B, L, V]``: 1 for its own."""
    first, second, third = x.unbind(1)
    pairs = (first[:, :, None] * second[:, None]).flatten(1)
    return (pairs[:, :, None] * third[:, None]).flatten(1)


def reward(x):
    return shares(x) @ TABLE.to(x)


class Conditionals(nn.Module):
    """The exact law of each position given what is revealed, for a joint table."""

    dim = D

    def __init__(self, joint=JOINT):
        super().__init__()
        self.register_buffer("joint", joint)

    def forward(self, x, t, cond=None):
        known = x[..., :-1] + x[..., -1:]
        law = self.joint if cond is None else (self.joint.log() + cond[:, :1] * TABLE).softmax(-1)
        at = (shares(known) * law) @ MARGINALS
        return nn.functional.pad(at.clamp_min(1e-30).log().view(-1, L, V), (0, 1))


def table_denoiser(*, time_free=True):
    return MaskedDenoiser(Conditionals(), LogLinear(), V, time_free=time_free)


def chain_law(denoiser, grid):
    """The law of sequences at the end of ancestral sampling, by enumeration of all states."""
    hard, law = one_hot(STATES, V), (STATES == V).all(1).double()
    for t, s in itertools.pairwise(grid):
        tokens = denoiser.log_probs(hard, t).double().exp()
        reveal = denoiser.process.reveal(t, s)
        new = torch.cat([tokens * reveal, (1 - reveal).expand(len(STATES), L, 1)], -1)
        masked = hard[..., -1:].double()
        move = hard.double() * (1 - masked) + masked * new
        law = law @ torch.stack([move[:, i, STATES[:, i]] for i in range(L)]).prod(0)
    return law[(STATES < V).all(1)]


def tilted(law):
    weights = law * (TABLE.double() / KL_WEIGHT).exp()
    return weights / weights.sum(), weights.sum()


def index(x0):
    return to_tokens(x0) @ torch.tensor([V * V, V, 1])


def empirical(x0, weights=None):
    flat = index(x0.reshape(-1, L, D))
    return torch.bincount(flat, None if weights is None else weights.flatten(), V**L).double()


def distance(counts, law):
    """Total variation."""
    return float(0.5 * (counts / counts.sum() - law.double()).abs().sum())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_enumerated_chain_is_the_sampled_one():
    start = prior_start(LogLinear(), torch.zeros(40_000, L, D))
    grid = levels(start, 3)
    x0 = sample(table_denoiser(), Ancestral(), start, grid, generator=seeded())
    assert distance(empirical(x0), chain_law(table_denoiser(), grid)) < 0.02
    assert distance(chain_law(table_denoiser(), grid), JOINT) > 0.03  # several tokens at once


N = 3000
METHODS = [
    SMC(N, KL_WEIGHT),
    SMC(N, KL_WEIGHT, ess_threshold=1.0, estimate="hard"),
    SMC(N, KL_WEIGHT, ess_threshold=0.0),
    TDS(N, KL_WEIGHT),
    TDS(N, KL_WEIGHT, ess_threshold=1.0, mode="state", guidance_scale=0.5),
    TDS(N, KL_WEIGHT, mode="exact", estimate="hard", guidance_scale=2.0),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("num_steps", [None, 4], ids=["one by one", "4 steps"])
def test_many_particles_have_the_tilted_law(method, num_steps):
    denoiser = table_denoiser(time_free=num_steps is None)
    prior = JOINT.double()
    if num_steps is not None:
        prior = chain_law(denoiser, levels(prior_start(LogLinear(), torch.zeros(1, L, D)), 4))
    law, z = tilted(prior)
    out = method.draw(denoiser, reward, (4, L, D), num_steps=num_steps, generator=seeded())
    assert distance(empirical(out.particles, out.weights), law) < 0.045
    assert distance(empirical(out.particles, out.weights), prior) > 0.3
    assert out.log_z.exp().mean().item() == pytest.approx(z.item(), rel=0.04)
    torch.testing.assert_close(out.rewards, reward(out.x0[..., :-1]))
    assert out.x0[..., -1].sum() == 0  # no mask is left


@pytest.mark.parametrize("method", [SMC(64, KL_WEIGHT), TDS(64, KL_WEIGHT)], ids=["smc", "tds"])
def test_one_draw_of_each_group_has_the_tilted_law(method):
    law, _ = tilted(JOINT.double())
    out = method.draw(table_denoiser(), reward, (1500, L, D), num_steps=None, generator=seeded())
    assert distance(empirical(out.x0), law) < 0.07


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", [SMC, TDS])
def test_the_normalising_constant_is_unbiased_with_few_particles(kind, threshold):
    _, z = tilted(JOINT.double())
    method = kind(3, KL_WEIGHT, ess_threshold=threshold)
    out = method.draw(table_denoiser(), reward, (4000, L, D), num_steps=None, generator=seeded(1))
    estimates = out.log_z.exp()
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - z) < 3.5 * error
    assert error < 0.03 * z


def test_guided_weights_are_the_ratio_of_the_recorded_kernels():
    """Without resampling, weights are prod(p / q) exp(r / kl_weight)."""
    denoiser, method = table_denoiser(), TDS(5, KL_WEIGHT, ess_threshold=0.0)
    out = method.draw(denoiser, reward, (2, L, D), num_steps=4, generator=seeded())
    start = prior_start(LogLinear(), torch.zeros(10, L, D))
    guided, grid = RewardGuidance(denoiser, reward, 1 / KL_WEIGHT), levels(start, 4)
    x, generator, log_ratio = start.x, seeded(), torch.zeros(10, dtype=torch.float64)
    for k in range(4):
        torch.rand((2, 1), generator=generator, dtype=torch.float64)  # of the resampling
        kernels = []
        for proposal in (denoiser, guided):
            again = torch.Generator()
            again.set_state(generator.get_state())
            step = Start(x, grid[k])
            run = sample(proposal, Ancestral(), step, grid[k : k + 2], generator=again, record=True)
            kernels.append(run.transitions[0].mean)
        generator, x = again, run.x0
        p, q = ((law * x).sum(-1).double().log().sum(-1) for law in kernels)
        log_ratio += (p - q).detach()
    assert torch.equal(x.view(2, 5, L, D), out.particles)
    log_w = (log_ratio + reward(x[..., :-1]).double() / KL_WEIGHT).view(2, 5)
    torch.testing.assert_close(log_w.softmax(1), out.weights, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_mean(log_w), out.log_z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [SMC(8, 0.3, 1.0), TDS(8, 0.3, 1.0), SVDD(4, 0.3), BestOfN(3)], ids=lambda m: m.name
)
def test_without_reward_the_law_is_the_prior(method):
    def nothing(x):
        return 0 * x.sum((1, 2))

    out = method.draw(table_denoiser(), nothing, (4000, L, D), num_steps=None, generator=seeded())
    assert distance(empirical(out.x0), JOINT) < 0.05
    if out.log_z is not None:
        torch.testing.assert_close(out.log_z, torch.zeros_like(out.log_z))
        torch.testing.assert_close(out.ess, torch.full_like(out.ess, 8.0))


@pytest.mark.parametrize(
    "method", [SMC(1, 0.1), TDS(1, 0.1, guidance_scale=1e-9), SVDD(1), SVDD(1, 0.1), BestOfN(1)]
)
def test_one_chain_is_the_prior(method):
    out = method.draw(table_denoiser(), reward, (4000, L, D), num_steps=None, generator=seeded())
    assert distance(empirical(out.x0), JOINT) < 0.05


def test_best_of_n_has_the_law_of_the_maximum():
    out = BestOfN(4).draw(
        table_denoiser(), reward, (5000, L, D), num_steps=None, generator=seeded()
    )
    order = TABLE.argsort()
    below = JOINT.double()[order].cumsum(0) ** 4
    law = torch.zeros(V**L, dtype=torch.float64)
    law[order] = torch.cat([below[:1], below.diff()])
    assert distance(empirical(out.x0), law) < 0.04
    torch.testing.assert_close(
        out.rewards, reward(out.particles.flatten(0, 1)[..., :-1]).view(-1, 4).amax(1)
    )


def test_svdd_selects_next_states_by_the_reward_of_their_estimates():
    """One position: the law of one step of M candidates is known, and the last step decides."""

    class One(nn.Module):
        dim = D

        def forward(self, x, t, cond=None):
            return torch.tensor([0.5, 0.3, 0.2, 1.0]).log().expand_as(x)

    denoiser = MaskedDenoiser(One(), LogLinear(), V, time_free=True)
    worth, p = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.3, 0.2])
    of_one = lambda x: (x * worth).sum((1, 2))  # noqa: E731
    draw = {"num_steps": 1, "generator": seeded()}
    best = SVDD(3).draw(denoiser, of_one, (10_000, 1, D), **draw)
    below = p.cumsum(0) ** 3
    counts = torch.bincount(to_tokens(best.x0)[:, 0], minlength=V)
    law = torch.cat([below[:1], below.diff()])
    assert distance(counts, law) < 0.015
    assert best.ess is None
    soft = SVDD(2, 0.5).draw(denoiser, of_one, (10_000, 1, D), **draw)
    w = (worth / 0.5).exp()
    pairs = p[:, None] * p  # keep the first with w_a / (w_a + w_b)
    law = 2 * (pairs * w[:, None] / (w[:, None] + w)).sum(1)
    counts = torch.bincount(to_tokens(soft.x0)[:, 0], minlength=V)
    assert distance(counts, law) < 0.015
    assert soft.ess.shape == (1, 10_000)


@pytest.mark.parametrize("estimate", ["soft", "hard"])
def test_svdd_raises_the_reward_with_its_candidates(estimate):
    means = [
        SVDD(m, estimate=estimate)
        .draw(table_denoiser(), reward, (1000, L, D), num_steps=None, generator=seeded())
        .rewards.mean()
        for m in (1, 3, 12)
    ]
    assert means[0] + 0.3 < means[1] < means[2] - 0.2


class Counted(MaskedDenoiser):
    """Counts rows that went through the network."""

    def _run(self, x, *rest, **known):
        self.rows = getattr(self, "rows", 0) + len(x)
        return super()._run(x, *rest, **known)


@pytest.mark.parametrize(
    "method",
    [
        BestOfN(3), SMC(4), SMC(4, estimate="hard"), TDS(4), TDS(4, estimate="hard"),
        TDS(2, mode="exact"), TDS(2, mode="state"), SVDD(3), SVDD(3, 1.0),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("num_steps", [1, 5, None])
def test_evaluations_are_counted(method, num_steps):
    asked = 0

    def counting(x):
        nonlocal asked
        asked += len(x)
        return reward(x)

    denoiser = Counted(Conditionals(), LogLinear(), V, time_free=True)
    out = method.draw(denoiser, counting, (2, L, D), num_steps=num_steps)
    assert denoiser.rows == 2 * out.nfe
    assert asked == 2 * out.reward_calls
    steps = num_steps or L
    if out.ess is not None:
        assert out.ess.shape == (steps + (out.log_z is not None), 2)
    assert out.x0.shape == (2, L, D)
    assert out.rewards.shape == (2,)
    assert not out.x0.requires_grad


@pytest.mark.parametrize("method", [SMC(6, 0.2), TDS(6, 0.2), SVDD(4, 0.2), BestOfN(4)])
def test_the_generator_decides_everything(method):
    def run(seed):
        return method.draw(table_denoiser(), reward, (7, L, D), num_steps=3, generator=seeded(seed))

    for a, b in zip(run(5), run(5), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not torch.equal(run(5).x0, run(6).x0)


@pytest.mark.parametrize("method", [SMC(30, 0.2), TDS(30, 0.2), SVDD(8, 0.2), BestOfN(8)])
def test_each_group_follows_its_own_condition(method):
    """Under opposite conditions, groups keep apart; guidance without classifier goes along."""
    cond = torch.tensor([[6.0], [-6.0]]).repeat(100, 1)
    nothing = lambda x: 0 * x.sum((1, 2))  # noqa: E731
    denoiser = ClassifierFreeGuidance(table_denoiser(), 1.0)
    out = method.draw(denoiser, nothing, (200, L, D), num_steps=None, cond=cond, generator=seeded())
    values = reward(out.x0[..., :-1]).view(-1, 2).mean(0)
    assert values[0] > TABLE.mean() + 1 > TABLE.mean() - 1 > values[1]


def test_given_sequences_are_edited_only_where_they_are_masked():
    x0 = one_hot(torch.tensor([[0, 1, 2], [2, 2, 2]]).repeat_interleave(50, 0), V)
    start = truncated_start(LogLinear(), x0, 0.5, LogLinear().draw_noise(x0.shape, seeded(), x0))
    start = Start(start.x[::50].repeat_interleave(50, 0), start.t)
    kept = start.x[::50, :, -1] == 0
    assert kept.any()
    assert not kept.all()
    for method in (SMC(50, 0.2), TDS(50, 0.2), BestOfN(50)):
        out = method.draw(table_denoiser(), reward, start, num_steps=None, generator=seeded())
        assert torch.equal(to_tokens(out.x0)[kept], to_tokens(x0[::50])[kept])


@pytest.mark.parametrize("estimate", ["soft", "hard"])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_what_must_not_be_is_never_drawn(estimate, threshold):
    """Also where the estimate at the start, or of many particles, is something that must not be."""

    def forbidding(x):  # -inf unless the first token is certainly 0; 90 lower, to show in a twist
        return torch.where(x[:, 0, 0] == 1, reward(x) - 90, -torch.inf)

    law = tilted(JOINT.double() * (SEQUENCES[:, 0] == 0))[0]
    out = SMC(3000, KL_WEIGHT, threshold, estimate).draw(
        table_denoiser(), forbidding, (4, L, D), num_steps=None, generator=seeded()
    )
    assert distance(empirical(out.particles, out.weights), law) < 0.045
    assert (to_tokens(out.x0)[:, 0] == 0).all()


@pytest.mark.parametrize("method", [SMC(4), SVDD(4, 1.0), SVDD(4), BestOfN(4)])
def test_where_nothing_may_be_something_is_drawn_still(method):
    never = lambda x: x.sum((1, 2)) * -torch.inf  # noqa: E731
    out = method.draw(table_denoiser(), never, (3, L, D), num_steps=2)
    assert (out.rewards == -torch.inf).all()
    if out.log_z is not None:
        assert (out.log_z == -torch.inf).all()
        torch.testing.assert_close(out.weights, torch.full((3, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("time_free", [True, False])
@pytest.mark.parametrize("mode", ["clean", "state", "exact"])
def test_with_a_network_of_the_library(mode, time_free):
    torch.manual_seed(0)
    network = make_network({"type": "mlp", "width": 16, "depth": 1, "horizon": L, "dim": D})
    denoiser = MaskedDenoiser(network, LogLinear(), V, time_free=time_free)
    out = TDS(6, 0.2, mode=mode).draw(denoiser, reward, (2, L, D), num_steps=4)
    assert out.rewards.isfinite().all()
    guided = RewardGuidance(denoiser, reward, 3.0, mode=mode)
    x, t = prior_start(LogLinear(), torch.zeros(2, L, D)).x, torch.full((1, 1, 1), 0.5)
    on_grid = guided.on_grid(t[None])(0, x, None)
    torch.testing.assert_close(on_grid.x0_hat, guided(x, t).x0_hat)


# Continuous states


def test_gaussian_mixtures_are_tilted(mixture):
    """``p(x0) exp(-|x0 - c|^2 / (2 w))``: again a mixture, whose mean and masses are known."""
    c, w = torch.tensor([0.6, -0.5], dtype=torch.float64), 0.15
    process = VPCosine()
    x = process.draw_noise((4 * 1000, 1, 2), seeded(), torch.zeros(1, dtype=torch.float64))
    out = SMC(1000, 1.0).draw(
        mixture.denoiser(process),
        lambda plan, cond: -((plan[:, 0] - c) ** 2).sum(-1) / (2 * w),
        prior_start(process, x),
        num_steps=40,
        generator=seeded(),
    )
    total = mixture.stds**2 + w
    log_mass = -0.5 * ((mixture.means - c) ** 2 / total + (total / w).log()).sum(-1)
    mass = mixture.weights * log_mass.exp()
    means = (mixture.means * w + c * mixture.stds**2) / total
    exact = (mass[:, None] * means).sum(0) / mass.sum()
    got = (out.weights[..., None] * out.particles[:, :, 0]).sum(1).mean(0)
    prior_mean = (mixture.weights[:, None] * mixture.means).sum(0)
    assert (prior_mean - exact).norm() > 0.5
    torch.testing.assert_close(got, exact, atol=0.05, rtol=0)
    assert out.log_z.exp().mean().item() == pytest.approx(mass.sum().item(), rel=0.1)


@pytest.mark.parametrize("method", [BestOfN(8), SVDD(8), SVDD(8, 0.05), SMC(8, 0.05)])
def test_continuous_chains_with_conditions(gaussian, method):
    law = gaussian(0.0, 0.5)
    cond = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(60, 1)
    x = torch.randn(120 * method.chains, 1, 1, dtype=torch.float64, generator=seeded())
    out = method.draw(
        law.denoiser(VPCosine()),
        lambda plan, cond: -((plan[:, 0, 0] - cond[:, 0]) ** 2),
        prior_start(VPCosine(), x),
        num_steps=10,
        cond=cond,
        generator=seeded(),
    )
    means = out.x0[:, 0, 0].view(-1, 2).mean(0)
    assert means[0] > 0.4
    assert means[1] < -0.4


def test_a_continuous_prior_is_drawn_from_the_generator():
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: 0 * x)
    out = BestOfN(2).draw(
        denoiser, lambda plan, cond: plan.sum((1, 2)), (3, 4, 2), num_steps=2, generator=seeded()
    )
    assert out.x0.shape == (3, 4, 2)


# Weights


def test_systematic_resampling_copies_by_weight():
    weights = torch.rand(50, 7, generator=seeded(), dtype=torch.float64)
    weights[:, 3] = 0
    weights[0] = torch.tensor([0.0, 0, 0, 1, 0, 0, 0])
    weights = weights / weights.sum(1, keepdim=True)
    total = torch.zeros_like(weights)
    generator = seeded()
    for _ in range(400):
        parents = systematic(weights, generator)
        copies = nn.functional.one_hot(parents, 7).sum(1)
        assert (copies - 7 * weights).abs().max() < 1
        total += copies / 400
    assert (total - 7 * weights).abs().max() < 0.12
    assert total[0, 3] == pytest.approx(7)
    assert (total[1:, 3] == 0).all()


def test_even_weights_copy_each_particle_once():
    even = torch.full((3, 5), 0.2, dtype=torch.float64)
    assert torch.equal(systematic(even, seeded()), torch.arange(5).expand(3, 5))
    torch.testing.assert_close(effective_size(even), torch.full((3,), 5.0).double())


def test_extreme_log_weights():
    log_w = torch.tensor([[-1e5, -1e5 + 1, -torch.inf], [-torch.inf] * 3, [1e4, 0, 0]])
    weights = normalised(log_w.double())
    torch.testing.assert_close(weights[0, 1] / weights[0, 0], torch.tensor(1.0).exp().double())
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3).double())
    assert log_mean(log_w.double())[1] == -torch.inf
    assert choose(weights, seeded())[2] == 0


# Bad input


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("smc", {"particles": 0}, "particles must be at least 1, got 0"),
        ("smc", {"kl_weight": 0.0}, "kl_weight must be positive"),
        ("smc", {"ess_threshold": 1.5}, r"ess_threshold must be in \[0, 1\]"),
        ("smc", {"estimate": "mean"}, "unknown estimate 'mean'"),
        ("tds", {"guidance_scale": 0.0}, "guidance_scale must be positive"),
        ("tds", {"mode": "soft"}, "unknown mode 'soft'"),
        ("svdd", {"candidates": 0}, "candidates must be at least 1"),
        ("svdd", {"kl_weight": -1.0}, "kl_weight must be positive"),
        ("best_of_n", {"n": 0}, "n must be at least 1"),
        ("best_of_n", {"particles": 3}, r"no setting 'particles'; it has n"),
        ("rbf", {}, "unknown particle method 'rbf'; expected one of"),
    ],
)
def test_refused_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_particle_method(name, **settings)


def test_all_methods_are_made_by_name():
    assert {name: type(make_particle_method(name)) for name in PARTICLE_METHODS} == {
        "best_of_n": BestOfN, "smc": SMC, "svdd": SVDD, "tds": TDS,
        "path_search": PathSearch, "rollover": RolloverBudget,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (SMC(4), {"start": (2, L)}, r"a shape \(B, L, D\)"),
        (SMC(4), {"start": prior_start(LogLinear(), torch.zeros(6, L, D))}, "a multiple of 4 rows"),
        (SMC(4), {"cond": torch.zeros(8, 1)}, "one row per group, 2; got 8"),
        (SMC(4), {"solver": Ancestral(Relaxation())}, "without relaxation"),
        (
            SVDD(4),
            {"solver": Scheduled(one_by_one(torch.ones(2, L, dtype=torch.bool)))},
            "one position a step",
        ),
        (SMC(4), {"num_steps": None, "solver": Ancestral()}, "num_steps=None"),
        (SMC(4), {"num_steps": None, "denoise": table_denoiser(time_free=False)}, "time-free"),
        (
            SMC(4),
            {
                "start": Start(
                    prior_start(LogLinear(), torch.zeros(8, L, D)).x, torch.ones(8, 1, 1).double()
                )
            },
            "must share their level",
        ),
        (SMC(4), {"reward": lambda x: x.sum((1, 2)) * torch.nan}, "finite or minus infinity"),
        (TDS(4), {"reward": lambda x: x.sum((1, 2)) * torch.nan}, "finite or minus infinity"),
        (BestOfN(4), {"reward": lambda x: x.sum(2)}, r"one number per row, \[8\]; got \(8, 3\)"),
    ],
)
def test_refused_draws(method, change, message):
    given = {"denoise": table_denoiser(), "reward": reward, "start": (2, L, D), "num_steps": 3}
    given.update(change)
    with pytest.raises(ValueError, match=message):
        method.draw(given.pop("denoise"), given.pop("reward"), given.pop("start"), **given)


@pytest.mark.parametrize(
    ("method", "solver", "message"),
    [
        (SMC(2), make_solver("ddim"), "use ddpm, or ddim with eta > 0"),
        (SMC(2), make_solver("heun"), "use ddpm, or ddim with eta > 0"),
        (SMC(2, estimate="hard"), None, "estimate='soft'"),
        (TDS(2), None, "tds is for masked sequences"),
    ],
)
def test_refused_for_continuous_states(method, solver, message):
    denoiser = AnalyticDenoiser(VPCosine(), lambda x, t, cond: 0 * x)
    with pytest.raises(ValueError, match=message):
        method.draw(
            denoiser, lambda plan, cond: plan.sum((1, 2)), (1, 2, 2), num_steps=2, solver=solver
        )
