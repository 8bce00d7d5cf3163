from __future__ import annotations

import itertools

import pytest
import torch
from policies_truncated_law import truncated_law

from diffpolicy.core import AnalyticDenoiser, Sampler, make_process, make_solver, sample
from diffpolicy.core.starts import levels, truncated_start
from diffpolicy.data import EpisodeStore, Normalizer, Windows
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.clusters import ClusterClassifier, clusters
from diffpolicy.policies.truncated import ScoredPlans

PROCESSES = ["vp_cosine", "ddpm_cosine", "ddpm_linear", "edm", "flow"]


def planted(count=5, size=40, seed=0, spread=0.0):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(count, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(size // 2, count, 6, generator=generator, dtype=torch.float64)
    noise = torch.cat([noise, -noise])  # the mean of every cluster is its centre
    points = (centres + spread * noise).flatten(0, 1)
    return centres, points[torch.randperm(len(points), generator=generator)]


@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found(spread, seed):
    centres, points = planted(spread=spread)
    found, label = clusters(points, 5, seed=seed)
    order = torch.cdist(centres, found).argmin(1)
    assert sorted(order.tolist()) == list(range(5))
    torch.testing.assert_close(found[order], centres, atol=1e-6, rtol=0)
    assert torch.equal(torch.cdist(points, found).argmin(1), label)


def test_large_clusters_come_first():
    points = torch.cat([torch.zeros(5, 2), torch.ones(20, 2), 2 * torch.ones(10, 2)])
    found, label = clusters(points, 3, seed=3)
    assert found.tolist() == [[1, 1], [2, 2], [0, 0]]
    assert label.tolist() == [2] * 5 + [0] * 20 + [1] * 10


def test_saved_classifiers_of_before_still_predict():
    """Files of before say no activation: theirs was SiLU."""
    generator = torch.Generator().manual_seed(0)
    sizes, tensors = [4, 8, 8, 3], {}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        tensors[f"weight{i}"] = torch.randn(b, a, generator=generator)
        tensors[f"bias{i}"] = torch.randn(b, generator=generator)
    cond = torch.randn(5, 4, generator=generator)
    h = cond @ tensors["weight0"].T + tensors["bias0"]
    for i in (1, 2):
        h = torch.nn.functional.silu(h) @ tensors[f"weight{i}"].T + tensors[f"bias{i}"]
    classifier = ClusterClassifier(tensors, "silu")
    torch.testing.assert_close(classifier.log_prob(cond), h.log_softmax(-1))
    assert (classifier.count, classifier.cond_dim) == (3, 4)
    assert classifier.to_tensors().keys() == tensors.keys()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_classifier_learns_the_chance_of_every_cluster(count):
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(800, 2, generator=generator)
    truth = (cond @ torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -2.0]]))[:, :count].log_softmax(-1)
    label = torch.multinomial(truth.exp(), 1, generator=generator)[:, 0]
    fitted = ClusterClassifier.fit(cond, label, count + 1)  # one cluster is never seen
    found = fitted.log_prob(cond).exp()
    assert (found[:, :count] - truth.exp()).abs().mean() < 0.08
    assert found[:, count].max() < 1e-6


def mode_store(episodes=12, steps=30, seed=0):
    """Plans of four constant actions; the state says which half of them is possible, and where."""
    generator = torch.Generator().manual_seed(seed)
    obs, actions = [], []
    for _ in range(episodes):
        side = torch.randint(2, (1,), generator=generator).item()
        place = 3 * torch.randn(1, generator=generator).item()
        move = (2 * side + torch.randint(2, (1,), generator=generator).item() - 1.5) * 2
        obs.append(torch.tensor([[float(side), place]]).repeat(steps, 1))
        actions.append(torch.tensor([[place + move, move]]).repeat(steps, 1))
    arrays = {"obs": torch.cat(obs).numpy(), "action": torch.cat(actions).numpy()}
    ends = [steps * (i + 1) for i in range(episodes)]
    return EpisodeStore.from_arrays(arrays, ends)


@pytest.fixture(scope="module")
def mode_data():
    store = mode_store()
    normalizer = Normalizer.fit(store.statistics, {"obs": "gaussian", "action": "gaussian"})
    windows = Windows(store, horizon=6, n_obs_steps=2, n_action_steps=2, normalizer=normalizer)
    return windows, normalizer


def test_relative_anchors_are_the_modes(mode_data):
    windows, normalizer = mode_data
    anchors = Anchors.fit(windows, normalizer, count=4, relative_to=[1, None])
    assert anchors.error < 1e-5
    assert anchors.position_error.max() < 1e-5
    history = torch.tensor([[[0.0, 1.5], [0.0, 2.0]], [[1.0, 0.0], [1.0, -1.0]]])
    guess, log_prob = anchors.guesses(history, normalizer)
    raw = normalizer.unnormalize("action", guess)
    expected = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    for row, place in ((0, 2.0), (1, -1.0)):  # relative to the last observation alone
        moves = raw[row, :, 0].sort(0).values
        torch.testing.assert_close(moves[:, 1], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(moves[:, 0], expected + place, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(2))
    normalised = normalizer.normalize("obs", history)
    again, _ = anchors.guesses_normalised(normalised, normalizer)
    torch.testing.assert_close(again, guess)


def test_absolute_anchors_do_not_fit_plans_that_start_anywhere(mode_data):
    windows, normalizer = mode_data
    anchors = Anchors.fit(windows, normalizer, count=4)
    assert anchors.error > 0.01
    guess, _ = anchors.guesses(torch.zeros(3, 2, 2), normalizer)
    assert guess.shape == (3, 4, 6, 2)
    assert torch.equal(guess[0], anchors.plans)


def test_error_is_the_root_mean_square_distance():
    """One episode, one anchor: the error is the standard deviation of the plans."""
    action = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)).numpy()
    store = EpisodeStore.from_arrays({"obs": action, "action": action}, [60])
    normalizer = Normalizer.fit(store.statistics, {"obs": "gaussian", "action": "gaussian"})
    windows = Windows(
        store, horizon=1, n_obs_steps=1, n_action_steps=1, normalizer=normalizer, pad_after=0
    )
    anchors = Anchors.fit(windows, normalizer, count=1)
    assert anchors.error == pytest.approx(1.0, abs=1e-5)
    assert anchors.position_error.tolist() == pytest.approx([1.0], abs=1e-5)


@pytest.fixture(scope="module")
def conditioned(mode_data):
    windows, normalizer = mode_data
    return Anchors.fit(windows, normalizer, count=4, relative_to=[1, None], top_m=2, seed=5)


def test_top_m_offers_what_the_state_allows(mode_data, conditioned):
    anchors, normalizer = conditioned, mode_data[1]
    assert anchors.count == 2
    history = torch.tensor([[[0.0, 1.0]] * 2, [[1.0, 1.0]] * 2])
    guess, log_prob = anchors.guesses(history, normalizer)
    assert guess.shape == (2, 2, 6, 2)
    moves = normalizer.unnormalize("action", guess)[..., 0, 1]
    assert (moves[0] < 0).all()
    assert (moves[1] > 0).all()
    assert (log_prob[:, 0] >= log_prob[:, 1]).all()
    assert (log_prob.exp().sum(1) > 0.9).all()


@pytest.mark.parametrize("top_m", [None, 2])
def test_anchors_survive_saving(mode_data, conditioned, top_m):
    windows, normalizer = mode_data
    anchors = conditioned if top_m else Anchors.fit(windows, normalizer, count=4)
    again = Anchors.from_parts(anchors.to_config(), anchors.to_tensors())
    history = torch.randn(3, 2, 2)
    for mine, theirs in zip(
        anchors.guesses(history, normalizer), again.guesses(history, normalizer), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert again.error == anchors.error
    moved = anchors.to("cpu")
    assert torch.equal(
        moved.guesses(history, normalizer)[0], anchors.guesses(history, normalizer)[0]
    )


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("error", [0.02, 0.1, 0.3, 1.0])
def test_default_level_covers_the_error_and_no_more(name, error):
    process = make_process(name)
    anchors = Anchors(torch.zeros(1, 2, 1), torch.ones(1), error, torch.zeros(2))
    t = torch.tensor(anchors.default_t_start(process), dtype=torch.float64)
    assert 0 < t <= 1
    assert process.snap(t).item() == pytest.approx(t.item())
    ratio = process.sigma(t) / process.alpha(t)
    assert ratio >= error * (1 - 1e-6)
    below = t - (0.01 if name.startswith("ddpm") else 1e-3)
    if below > 2e-3:
        assert process.sigma(below) < error * process.alpha(below)


def test_perfect_anchors_still_start_above_clean_data():
    anchors = Anchors(torch.zeros(1, 2, 1), torch.ones(1), 0.0, torch.zeros(2))
    assert anchors.default_t_start(make_process("vp_cosine")) == pytest.approx(1e-3)
    assert anchors.default_t_start(make_process("ddpm_cosine")) == pytest.approx(0.01)


def gaussian_mode(process, mean, std):
    def x0_hat(x, t, cond):
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = (alpha * std).square() + sigma.square()
        return mean + alpha * std**2 / variance * (x - alpha * mean)

    return AnalyticDenoiser(process, x0_hat)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_truncated_law_is_what_ddim_does(name, steps):
    process, mean, std, guess_error, t_start = make_process(name), 0.7, 0.2, 0.3, 0.4
    denoise = gaussian_mode(process, mean, std)
    guess = torch.full((2, 1, 1), mean + guess_error, dtype=torch.float64)
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1)
    start = truncated_start(process, guess, t_start, noise)
    grid = levels(start, steps, process=process)
    out = sample(denoise, make_solver("ddim"), start, grid).flatten()
    law = truncated_law(process, t_start, mode_std=std, guess_error=guess_error, grid=grid)
    assert out[0].item() - mean == pytest.approx(law.bias, abs=1e-12)
    assert (out[1] - out[0]).item() == pytest.approx(law.std, abs=1e-12)


def test_truncated_law_has_the_limit_of_the_fact_sheet():
    process, t, std = make_process("vp_cosine"), 0.4, 0.2
    level = torch.tensor(t, dtype=torch.float64)
    variance = (process.alpha(level) * std) ** 2 + process.sigma(level) ** 2
    limit = truncated_law(process, t, mode_std=std, guess_error=0.5)
    factor = std / variance.sqrt()
    assert limit.bias == pytest.approx(float(factor * process.alpha(level) * 0.5))
    assert limit.std == pytest.approx(float(factor * process.sigma(level)))
    grid = torch.linspace(t, 0, 20_001, dtype=torch.float64)
    fine = truncated_law(process, t, mode_std=std, guess_error=0.5, grid=grid)
    assert fine.bias == pytest.approx(limit.bias, rel=1e-3)
    # From the prior the mode is reproduced whole.
    assert truncated_law(process, 1.0, mode_std=std).std == pytest.approx(std, rel=1e-3)


def test_anchor_starts_reproduce_the_modes_of_a_separated_mixture():
    process, std, t_start = make_process("vp_cosine"), 0.05, 0.15
    modes = torch.tensor([-6.0, 0.0, 6.0], dtype=torch.float64)

    def x0_hat(x, t, cond):
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = (alpha * std) ** 2 + sigma**2
        away = x[..., None] - alpha * modes
        weight = torch.softmax(-0.5 * away.square() / variance, -1)
        return (weight * (modes + alpha * std**2 / variance * away)).sum(-1)

    n = 4000
    guess = (modes + 0.03).view(1, 3, 1, 1).expand(n, -1, -1, -1)
    noise = torch.randn(guess.shape, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.cat([noise[: n // 2], -noise[: n // 2]])
    denoise = AnalyticDenoiser(process, x0_hat)
    start = truncated_start(process, guess.flatten(0, 1), t_start, noise.flatten(0, 1))
    solved = Sampler(num_steps=4).draw(denoise, start)
    law = truncated_law(
        process, t_start, mode_std=std, guess_error=0.03, grid=levels(start, 4, process=process)
    )
    plans = solved.view(n, 3)
    torch.testing.assert_close(
        plans.mean(0), modes + law.bias, atol=1e-9, rtol=0
    )  # antithetic noise: the mean is exact
    expected = law.std * noise.view(n, 3).std(0)
    torch.testing.assert_close(plans.std(0), expected, rtol=1e-9, atol=0)


def test_scores_choose_the_plan():
    plans = torch.arange(6.0).view(1, 3, 2, 1)
    scored = ScoredPlans(plans, torch.tensor([[0.1, 0.7, 0.2]]), 2)
    assert torch.equal(scored.best(), plans[:, 1])


def test_bad_settings_say_what_is_expected(mode_data):
    windows, normalizer = mode_data
    with pytest.raises(ValueError, match=r"per action dimension \(2, None where.*got \[1\]"):
        Anchors.fit(windows, normalizer, count=2, relative_to=[1])
    with pytest.raises(ValueError, match=r"indexes observations 0..1, got \[1, 2\]"):
        Anchors.fit(windows, normalizer, count=2, relative_to=[1, 2])
    with pytest.raises(ValueError, match=r"top_m must be in \[1, 2\]"):
        Anchors.fit(windows, normalizer, count=2, top_m=3)  # before anything is fitted
    with pytest.raises(ValueError, match=r"10000 anchors need at least as many windows"):
        Anchors.fit(windows, normalizer, count=10_000)
    anchors = Anchors.fit(windows, normalizer, count=2)
    with pytest.raises(ValueError, match=r"tensors lack \['anchors.frequency'"):
        Anchors.from_parts(anchors.to_config(), {"anchors.plans": anchors.plans})
    with pytest.raises(ValueError, match="do not belong together"):
        Anchors.from_parts({**anchors.to_config(), "shape": [1, 2, 3]}, anchors.to_tensors())
    with pytest.raises(ValueError, match=r"lacks 'weight0'"):
        ClusterClassifier({})
    with pytest.raises(ValueError, match="give both or neither"):
        Anchors(torch.zeros(2, 2, 1), torch.ones(2), 0.0, torch.zeros(2), top_m=1)


def test_fits_are_deterministic(mode_data):
    windows, normalizer = mode_data
    first, second = (Anchors.fit(windows, normalizer, count=4, seed=2) for _ in range(2))
    assert all(torch.equal(v, second.to_tensors()[k]) for k, v in first.to_tensors().items())


def test_conditions_of_another_size_are_refused(mode_data, conditioned):
    anchors, normalizer = conditioned, mode_data[1]
    with pytest.raises(ValueError, match=r"must be \[n, 4\], got \[1, 6\]"):
        anchors.guesses(torch.zeros(1, 3, 2), normalizer)
