"""Distillation: exact students of Gaussian laws, and one that learns two modes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from two_modes import TWO_MODES_SPEC, near_a_mode, two_modes_store

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.core import AnalyticDenoiser, Grid, make_process, make_solver, prior_start, sample
from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.starts import Start
from diffpolicy.core.steps import Step
from diffpolicy.learn.distill.consistency import Consistency, ConsistencyLoss
from diffpolicy.learn.distill.guided import Guided, GuidedLoss
from diffpolicy.learn.distill.halving import Halving, HalvingLoss
from diffpolicy.learn.distill.rectified import Rectified, RectifiedLoss
from diffpolicy.learn.material import TuningData, tuned
from diffpolicy.policies.plan_loop import PlanLoop
from diffpolicy.policies.rti import RTI

MEAN, STD = 0.3, 0.4
PROCESS = make_process("vp_cosine")


class Exact(nn.Module):
    """A network of prediction "v" whose clean estimate is a function ``(x, t)``."""

    t_kinds = frozenset({"row"})
    horizon, dim = 3, 2

    def __init__(self, x0_hat):
        super().__init__()
        self.x0_hat = x0_hat
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, time, cond=None):
        t = time / PROCESS.network_time(torch.ones(1, dtype=torch.float64))
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        return (alpha * x - self.x0_hat(x, t)) / sigma + self.weight


def posterior_mean(x, t):
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def end_of_path(x, t):
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


TEACHER = AnalyticDenoiser(PROCESS, lambda x, t, cond: posterior_mean(x, t))


def loss_of(kind, settings, x0_hat):
    """The mean loss of a student with this clean estimate, taught by the exact denoiser."""
    loss = kind(Denoiser(Exact(x0_hat), PROCESS, "v"), settings)
    loss.reference = TEACHER
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(512, 3, 2, generator=generator, dtype=torch.float64)
    batch = {"action": MEAN + STD * noise}
    return loss(batch, generator).loss.mean().item()


def test_the_end_of_the_path_is_consistent():
    coarse, fine = (
        loss_of(ConsistencyLoss, Consistency(num_steps=k), end_of_path) for k in (20, 80)
    )
    assert fine < coarse / 50  # the teacher's steps are of second order, their squares of fourth
    assert coarse < 0.05 * loss_of(ConsistencyLoss, Consistency(num_steps=20), posterior_mean)


def test_a_sub_path_is_learned_between_the_ends_of_a_step(monkeypatch):
    coarse, fine = (
        loss_of(ConsistencyLoss, Consistency(num_steps=k, sub_path=True), end_of_path)
        for k in (20, 80)
    )
    assert fine < coarse / 50  # a line within the teacher's step, as far from the path as its end
    whole = loss_of(ConsistencyLoss, Consistency(num_steps=20), posterior_mean)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.ones(shape))
    sub_path = Consistency(num_steps=20, sub_path=True)
    assert loss_of(ConsistencyLoss, sub_path, posterior_mean) == pytest.approx(whole, rel=1e-12)


def test_guidance_becomes_the_students_own_clean_estimate():
    def guided(x, t):
        free = 0.5 * posterior_mean(x, t)
        return free + 3.0 * (posterior_mean(x, t) - free)

    loss = GuidedLoss(Denoiser(Exact(guided), PROCESS, "v"), Guided(), guidance_scale=3.0)
    told = lambda x, t, cond: posterior_mean(x, t) * (0.5 + 0.5 * cond[:, :, None])  # noqa: E731
    loss.reference = AnalyticDenoiser(PROCESS, told)
    generator = torch.Generator().manual_seed(0)
    batch = {"action": torch.randn(64, 3, 2, dtype=torch.float64), "obs": torch.ones(64, 1, 1)}
    assert loss(batch, generator).loss.mean().item() < 1e-20


def test_one_step_of_the_student_is_two_of_the_teacher():
    grid = Sampler(num_steps=8).grid(PROCESS)

    def worth_two(x, t):
        out, levels = torch.empty_like(x), t.expand(len(x), 1, 1).flatten()
        for i in range(0, 8, 2):
            rows = (levels - grid[i].flatten()).abs() < 1e-9
            two = grid[i : i + 3]
            end = sample(TEACHER, make_solver("ddim"), Start(x[rows], grid[i]), two)
            step = Step.between(PROCESS, grid[i], grid[i + 2])
            keep = step.sigma_s / step.sigma_t
            out[rows] = (end - keep * x[rows]) / (step.alpha_s - keep * step.alpha_t)
        return out

    assert loss_of(HalvingLoss, Halving(num_steps=4), worth_two) < 1e-20
    assert loss_of(HalvingLoss, Halving(num_steps=4), posterior_mean) > 1e-4
    student = AnalyticDenoiser(PROCESS, lambda x, t, cond: worth_two(x, t))
    start = prior_start(PROCESS, torch.randn(16, 3, 2, dtype=torch.float64))
    four, eight = (
        Sampler(num_steps=4).draw(student, start),
        Sampler(num_steps=8).draw(TEACHER, start),
    )
    torch.testing.assert_close(four, eight, atol=1e-12, rtol=0)


def test_a_rectified_path_ends_where_it_began_to_go():
    settings = Rectified(num_steps=6)
    zero, one = (
        settings.draw(TEACHER, prior_start(PROCESS, torch.full((1, 3, 2), z, dtype=torch.float64)))
        for z in (0.0, 1.0)
    )
    scale = one - zero  # a denoiser that is linear draws plans that are linear in their noise

    def own_end(x, t):
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        return zero + scale * (x - alpha * zero) / (alpha * scale + sigma)

    assert loss_of(RectifiedLoss, settings, own_end) < 1e-20
    assert loss_of(RectifiedLoss, settings, posterior_mean) > 1e-3
    student = AnalyticDenoiser(PROCESS, lambda x, t, cond: own_end(x, t))
    noise = torch.randn(16, 3, 2, dtype=torch.float64)
    plan = settings.draw(TEACHER, prior_start(PROCESS, noise))
    t = torch.ones(1, 1, 1, dtype=torch.float64)
    start = Start(PROCESS.add_noise(plan, t, noise), t)
    torch.testing.assert_close(Sampler(num_steps=1).draw(student, start), plan, atol=1e-12, rtol=0)


def test_a_consistent_student_may_renoise_and_estimate_in_turns():
    student = AnalyticDenoiser(PROCESS, lambda x, t, cond: end_of_path(x, t))
    start = prior_start(PROCESS, torch.randn(200_000, 1, 1, dtype=torch.float64))
    options = {"eta": 1.0, "variance": "renoise"}
    drawn = Sampler(num_steps=3, options=options).draw(student, start)
    assert abs(drawn.mean() - MEAN) < 5e-3
    assert abs(drawn.std() - STD) < 5e-3
    rows = make_solver("ddim", **options).rows(PROCESS, Sampler(num_steps=3).grid(PROCESS))
    assert all((row.a == 0).all() for row in rows)
    quiet = make_solver("ddim", eta=0.0, variance="renoise")
    for a, b in zip(
        quiet.rows(PROCESS, Sampler(num_steps=3).grid(PROCESS)),
        make_solver("ddim").rows(PROCESS, Sampler(num_steps=3).grid(PROCESS)),
        strict=True,
    ):
        assert torch.equal(a.a, b.a)
        assert torch.equal(a.b[0], b.b[0])


def test_a_consistent_student_is_deterministic_by_its_noise_alone():
    options = {"eta": 1.0, "variance": "renoise"}
    several = Sampler(num_steps=3, options=options).make(deterministic=True)
    assert several.stochastic  # plain DDIM would leave the path: its estimates are ends
    assert not Sampler(num_steps=3, solver="ddpm").make(deterministic=True).stochastic
    for num_steps, draws in ((1, 1), (3, 4)):
        sampler = Sampler(num_steps=num_steps, options=options)
        grid = Grid(TEACHER, sampler.make(), sampler.grid(PROCESS), torch.zeros(1))
        assert grid.stochastic == (num_steps > 1)
        shape = {"start": "prior", "plan_shape": (1, 1, 3, 2)}
        loop = PlanLoop(TEACHER, None, sampler.make(), sampler.grid(PROCESS), **shape)
        assert loop.draws == draws


def test_what_rests_is_not_noised_anew():
    held = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64).view(3, 1, 1, 1)
    rest, moves = make_solver("ddim", eta=1.0, variance="renoise").rows(PROCESS, held)
    assert (rest.a, rest.b[0], rest.g) == (1, 0, 0)
    torch.testing.assert_close(moves.g, PROCESS.sigma(held[2]))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ConsistencyLoss, Consistency(num_steps=5)),
        (HalvingLoss, Halving(num_steps=3)),
        (RectifiedLoss, Rectified(num_steps=5)),
    ],
    ids=["consistency", "halving", "rectified"],
)
def test_a_teacher_has_no_more_steps_than_training_levels(kind, settings):
    few = Denoiser(
        Exact(posterior_mean), make_process({"type": "ddpm_cosine", "num_steps": 4}), "v"
    )
    with pytest.raises(ValueError, match="Take at most 4 steps"):
        kind(few, settings)


def test_settings_are_in_their_range():
    for kind, least in ((Consistency, 2), (Halving, 1), (Rectified, 1)):
        with pytest.raises(ValueError, match=f"num_steps must be at least {least}"):
            kind(num_steps=least - 1)
        with pytest.raises(ValueError, match="draws must be at least 1"):
            kind(draws=0)


def test_a_solver_that_adds_noise_has_no_pairs():
    with pytest.raises(ValueError, match="adds noise"):
        Rectified(solver="ddpm")


@pytest.fixture(scope="module")
def two_modes(tmp_path_factory):
    """Actions near -0.6 or 0.6, whatever is observed, and a teacher that knows them."""
    folder = tmp_path_factory.mktemp("modes")
    store, spec = two_modes_store(folder), {"prediction": "v", "cond_dropout": 0.1}
    spec |= TWO_MODES_SPEC
    policy = DiffusionPolicy.from_dataset(store, spec=spec)
    config = TrainerConfig(steps=400, batch_size=128, lr=3e-3, progress=False)
    return policy.learn(store, config, folder / "teacher"), store


@pytest.mark.parametrize(
    "method",
    [Consistency(num_steps=8), Rectified(num_steps=6, draws=4)],
    ids=["consistency", "rectified"],
)
def test_a_student_finds_both_modes_at_once(method, two_modes, tmp_path):
    teacher, store = two_modes
    assert near_a_mode(teacher, store, 10) > 0.9
    assert near_a_mode(teacher, store, 1) < 0.3  # the mean of both
    before = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    data = TuningData(demonstrations=store)
    config = TrainerConfig(steps=400, batch_size=128, lr=2e-3, progress=False)
    student = teacher.distill(data, method, config, tmp_path / "student")
    assert near_a_mode(student, store, 1) > 0.6
    signs = np.sign(student.predict(store.read("obs", 0, 400))[0])
    assert 0.3 < (signs > 0).mean() < 0.7
    assert all(torch.equal(before[n], v) for n, v in teacher.denoiser.state_dict().items())
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "student")
    assert loaded.spec.sampler.num_steps == 1
    assert loaded.spec.sampler == student.spec.sampler


def test_the_guidance_of_the_teacher_becomes_the_students_own(two_modes, tmp_path):
    teacher, store = two_modes
    guided = teacher.with_settings(sampler=replace(teacher.spec.sampler, guidance_scale=2.0))
    config = TrainerConfig(steps=1, batch_size=8, progress=False)
    data = TuningData(demonstrations=store)
    student = guided.distill(data, Halving(num_steps=2), config, tmp_path / "student")
    assert student.spec.sampler.guidance_scale == 1
    assert student.spec.cond_dropout == 0
    assert student.spec.sampler.num_steps == 2
    own = teacher.distill(data, Guided(guidance_scale=2.0), config, tmp_path / "own")
    assert own.spec.sampler == teacher.spec.sampler
    assert own.spec.cond_dropout == 0
    with pytest.raises(ValueError, match=r"got cond_dropout=0.0 and the scale 2"):
        own.distill(data, Guided(guidance_scale=2.0), config, tmp_path / "again")
    loss = HalvingLoss(guided.denoiser, Halving(), guidance_scale=2.0)
    x, t, cond = torch.randn(4, 2, 1), torch.full((4, 1, 1), 0.7), torch.randn(4, 1)
    with torch.no_grad():
        free = guided.denoiser(x, t, torch.zeros_like(cond)).x0_hat
        told = guided.denoiser(x, t, cond).x0_hat
        wanted = (free + 2 * (told - free)).clamp(-1, 1)
        torch.testing.assert_close(loss.teacher(x, t, cond).x0_hat, wanted)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (ConsistencyLoss, Consistency(draws=3)),
        (HalvingLoss, Halving(draws=3)),
        (RectifiedLoss, Rectified(draws=3, num_steps=2)),
    ],
    ids=["consistency", "halving", "rectified"],
)
def test_observations_are_encoded_once_whatever_is_drawn(kind, method, two_modes):
    loss = kind(two_modes[0].denoiser, method)
    calls = []
    hooks = [
        one.encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, one in (("student", loss.denoiser), ("teacher", loss.reference))
    ]
    batch = {"obs": torch.randn(4, 1, 1), "action": torch.randn(4, 2, 1)}
    loss(batch, torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["student", "teacher"]


@pytest.mark.filterwarnings("ignore:this policy is a student:UserWarning")
def test_a_student_of_four_steps_is_halved_once_at_a_time(two_modes, tmp_path):
    teacher, store = two_modes
    data, config = TuningData(demonstrations=store), TrainerConfig(steps=1, progress=False)
    four = teacher.distill(data, Halving(num_steps=4), config, tmp_path / "four")
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "four")
    assert loaded.spec.trained_steps == 4
    with pytest.raises(ValueError, match=r"method=halving method\.num_steps=2"):
        loaded.distill(data, Halving(num_steps=1), config, tmp_path / "one")
    two = four.distill(data, Halving(num_steps=2), config, tmp_path / "two")
    assert two.spec.trained_steps == 2
    assert Halving(num_steps=2).scored_steps == (2,)
    assert Consistency().scored_steps == (1, 2, 4, 10)
    with pytest.warns(UserWarning, match="draws plans in 8: sampler.num_steps=4"):
        loaded.with_settings(sampler=replace(loaded.spec.sampler, num_steps=8))
    with pytest.raises(ValueError, match=r"rti takes ddim and t_start=0\.25 num_steps=1 or"):
        loaded.with_settings(rti=RTI(0.3, num_steps=2))
    warm, _ = loaded.choose_rti(store, num_steps=3, episodes=4)
    assert (warm.spec.rti.t_start, warm.spec.rti.num_steps) == (0.75, 3)


def test_a_student_by_consistency_is_warm_started_in_its_own_way(two_modes, tmp_path):
    teacher, store = two_modes
    data, config = TuningData(demonstrations=store), TrainerConfig(steps=1, progress=False)
    student = teacher.distill(data, Consistency(num_steps=4), config, tmp_path / "student")
    warm, _ = student.choose_rti(store, num_steps=2, episodes=4)
    assert warm.spec.rti.options == {"eta": 1.0, "variance": "renoise"}
    with pytest.raises(ValueError, match="Halving lets its teacher take steps along"):
        student.distill(data, Halving(num_steps=2), config, tmp_path / "two")


def test_adapters_alone_are_distilled_and_merged(two_modes, tmp_path):
    teacher, store = two_modes
    data, config = TuningData(demonstrations=store), TrainerConfig(steps=3, progress=False)
    how = Consistency(num_steps=4), data, config, tmp_path / "student"
    student = tuned(teacher, "distill", *how, {"type": "lora", "rank": 2})
    before, after = teacher.denoiser.state_dict(), student.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
