"""Scores: shared noise, sum units, bounds of the likelihood that are exact where they can be."""

from __future__ import annotations

import math

import pytest
import torch
from tuning_preferences import consistent_denoiser, plan_items, pointwise
from tuning_tables import all_paths, sequences, table_denoiser
from tuning_tilted_mixture import MixtureDenoiser, one_dimensional

from diffpolicy.core import Denoiser, FlowMatching, VPCosine, VPLinear
from diffpolicy.core.processes import EDM, DiscreteVP
from diffpolicy.learn.cloning.denoising import denoising_error
from diffpolicy.learn.preferences.items import Items
from diffpolicy.learn.preferences.scores import (
    DenoisingScore,
    MaskedScore,
    default_score,
)
from diffpolicy.learn.reference import check_no_dropout
from diffpolicy.networks.mlp import MLP
from diffpolicy.networks.sequence import SequenceCNN


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def token_items(tokens, steps=None):
    return Items(tokens, None, steps, torch.arange(len(tokens)), len(tokens))


# ------------------------------------------------------------------------------ plans


def test_own_score_is_half_the_summed_error_of_training():
    denoiser, items = pointwise(), plan_items()._replace(steps=None)
    score = DenoisingScore()
    draw = score.draw(denoiser, items, seeded())
    got = score(denoiser, items, draw)
    error = denoising_error(denoiser, items.x0, draw.t[0], draw.noise[0], cond=items.cond)
    torch.testing.assert_close(got, -0.5 * 4 * 2 * error)
    torch.testing.assert_close(score.error(items, got), error)


def test_error_is_the_mean_over_scored_entries():
    denoiser, items = pointwise(), plan_items()
    score = DenoisingScore()
    draw = score.draw(denoiser, items, seeded())
    error = score.error(items, score(denoiser, items, draw))
    wanted = denoising_error(
        denoiser, items.x0, draw.t[0], draw.noise[0], cond=items.cond, valid=items.steps
    )
    torch.testing.assert_close(error, wanted)


def test_published_betas_translate():
    """-beta/2 times the difference of mean errors is the logit of Diffusion-DPO."""
    denoiser, items = pointwise(), plan_items(count=2)._replace(steps=None)
    score = DenoisingScore()
    draw = score.draw(denoiser, items, seeded())
    own = score(denoiser, items, draw)
    mean = denoising_error(denoiser, items.x0, draw.t[0], draw.noise[0], cond=items.cond)
    beta_mean, size = 5000.0, 4 * 2
    torch.testing.assert_close(
        beta_mean / size * (own[0] - own[1]), -beta_mean / 2 * (mean[0] - mean[1])
    )


@pytest.mark.parametrize("weighting", ["own", "elbo"])
def test_windows_of_an_item_add_up_and_draws_average(weighting):
    denoiser, items = pointwise(), plan_items(count=3, windows=4)
    score = DenoisingScore(weighting=weighting, draws=3)
    draw = score.draw(denoiser, items, seeded())
    got = score(denoiser, items, draw)
    assert got.shape == (3,)
    total = torch.zeros(3)
    for row in range(12):
        single = Items(
            items.x0[row : row + 1],
            items.cond[row : row + 1],
            items.steps[row : row + 1],
            torch.zeros(1, dtype=torch.long),
            1,
        )
        for one in range(3):
            part = type(draw)(*(v[one : one + 1, row : row + 1] for v in draw))
            total[row // 4] += score(denoiser, single, part)[0] / 3
    torch.testing.assert_close(got, total)


@pytest.mark.parametrize("weighting", ["own", "elbo"])
def test_positions_that_are_not_scored_have_no_influence(weighting):
    denoiser, items = pointwise(), plan_items()
    score = DenoisingScore(weighting=weighting)
    draw = score.draw(denoiser, items, seeded())
    other = torch.where(items.steps[..., None], items.x0, 7.0)
    got = score(denoiser, items._replace(x0=other), draw)
    assert torch.equal(got, score(denoiser, items, draw))
    none = items._replace(steps=torch.zeros_like(items.steps))
    assert torch.equal(score(denoiser, none, draw), torch.zeros(5))
    assert torch.equal(score.error(none, score(denoiser, none, draw)), torch.zeros(5))


def test_a_bad_number_in_padding_does_not_spread():
    denoiser, items = pointwise(), plan_items(count=1, windows=2)
    items = items._replace(steps=torch.tensor([[True] * 4, [False] * 4]))
    items.x0[1] = math.nan
    score = DenoisingScore()
    assert score(denoiser, items, score.draw(denoiser, items, seeded())).isfinite().all()


class Elsewhere(torch.nn.Module):
    """The network of another parameterisation that gives the same ``x0_hat``."""

    t_kinds = frozenset({"row"})

    def __init__(self, inner, process, prediction):
        super().__init__()
        self.inner, self.process, self.prediction = inner, process, prediction
        self.t = None

    def forward(self, x, t, cond=None):
        level = self.t
        probe = Denoiser(torch.nn.Identity(), self.process, self.prediction)
        c_x, c_out, c_in, _ = probe.coefficients(level)
        x_t = x / c_in
        return (self.inner(x_t, level, cond).x0_hat - c_x * x_t) / c_out


@pytest.mark.parametrize(
    ("process", "predictions"),
    [
        (VPCosine(), ["eps", "v", "x0", "edm"]),
        (VPLinear(), ["v", "x0"]),
        (EDM(), ["eps", "v", "edm"]),
        (FlowMatching(), ["velocity", "v", "x0"]),
        (DiscreteVP.cosine(50), ["eps", "v"]),
    ],
)
def test_elbo_does_not_depend_on_what_the_network_predicts(process, predictions):
    inner = pointwise(prediction="x0", process=process).double()
    items = plan_items()
    items = items._replace(x0=items.x0.double(), cond=items.cond.double())
    score = DenoisingScore("elbo", draws=2)
    draw = score.draw(inner, items, seeded())
    wanted = score(inner, items, draw)
    for prediction in predictions:
        network = Elsewhere(inner, process, prediction)
        network.t = draw.t.flatten(0, 1)
        got = score(Denoiser(network, process, prediction), items, draw)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [VPCosine(), FlowMatching(), EDM()])
def test_elbo_differences_are_log_likelihood_ratios(process):
    """The bound is tight for exact denoisers: its mean difference is that of log-densities."""
    problem = one_dimensional()
    laws = problem.prior, problem.optimum
    denoisers = [MixtureDenoiser(process, law) for law in laws]
    points = torch.tensor([-1.2, -0.4, 0.3, 1.0], dtype=torch.float64)
    items = Items(points.view(-1, 1, 1), None, None, torch.arange(4), 4)
    score = DenoisingScore("elbo", draws=8000)
    draw = score.draw(denoisers[0], items, seeded())
    with torch.no_grad():
        first, second = (score(d, items, draw) for d in denoisers)
    ratio = laws[1].log_prob(points[:, None]) - laws[0].log_prob(points[:, None])
    assert ratio.abs().max() > 0.5
    torch.testing.assert_close(second - first, ratio, atol=0.05, rtol=0)


def test_elbo_draws_cover_log_snr_evenly():
    denoiser, items = pointwise(), plan_items(count=500)
    draw = DenoisingScore("elbo", log_snr=(-4, 4)).draw(denoiser, items, seeded())
    place = (denoiser.process.log_snr(draw.t.double()).flatten() + 4) / 8
    even = (torch.arange(500) + 0.5) / 500
    torch.testing.assert_close(place.sort().values, even.double(), atol=0.002, rtol=0)
    assert torch.equal(draw.weight, torch.full((1, 500), 8.0))
    assert (place.diff() > 0).float().mean() < 0.6  # in no order


def test_levels_are_drawn_from_those_given():
    process = DiscreteVP.cosine(100)
    denoiser, items = pointwise(process=process), plan_items(count=300)
    score = DenoisingScore(levels=(1.0, 0.501, 0.25))
    t = score.draw(denoiser, items, seeded()).t
    values, counts = t.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.25, 0.5, 1.0]))
    assert counts.min() >= 99
    many = DenoisingScore(levels=(1.0, 0.5), draws=4).draw(denoiser, items, seeded()).t
    assert ((many == 1.0).sum(0) == 2).all()  # stratified within a row


def test_draws_of_a_row_are_stratified():
    denoiser, items = pointwise(), plan_items(count=50)
    t = DenoisingScore(draws=3).draw(denoiser, items, seeded()).t
    for row in (3 * (1 - t)).floor().sort(0).values[:, :, 0, 0].T:
        assert torch.equal(row, torch.arange(3.0))


def test_an_even_number_of_draws_has_opposite_noise():
    denoiser, items = pointwise(), plan_items()
    draw = DenoisingScore("elbo", draws=4).draw(denoiser, items, seeded())
    assert torch.equal(draw.noise[:2], -draw.noise[2:])
    assert torch.equal(draw.t[:2], draw.t[2:])
    assert not torch.equal(draw.t[0], draw.t[1])


def test_discrete_processes_are_scored_at_their_knots():
    process = DiscreteVP.cosine(20)
    denoiser, items = pointwise(process=process), plan_items(count=200)
    for score in (DenoisingScore(), DenoisingScore("elbo")):
        t = score.draw(denoiser, items, seeded()).t * 20
        torch.testing.assert_close(t, t.round(), atol=1e-4, rtol=0)
        assert t.min() > 0.5


def test_all_randomness_is_the_generators():
    denoiser, items = pointwise(), plan_items()
    for score in (DenoisingScore(), DenoisingScore("elbo", draws=2), DenoisingScore(levels=(1.0,))):
        one, two, other = (score.draw(denoiser, items, seeded(s)) for s in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one.noise, other.noise)


# ------------------------------------------------------------------------------ sequences


def test_masked_score_of_a_consistent_model_is_its_log_likelihood():
    law = torch.rand(9, generator=seeded(), dtype=torch.float64) + 0.1
    law /= law.sum()
    denoiser, space = consistent_denoiser(law, 3, 2)
    items = token_items(space.states[space.sequences])
    score = MaskedScore(draws=2000)
    with torch.no_grad():
        got = score(denoiser, items, score.draw(denoiser, items, seeded()))
    torch.testing.assert_close(got.double(), law.log(), atol=0.05, rtol=0)
    torch.testing.assert_close(score.error(items, got), -got / 2)


@pytest.mark.parametrize("time_free", [True, False])
def test_masked_score_is_the_mean_log_likelihood_over_orders(time_free):
    """Exactly so, by enumeration, for a model whose orders disagree."""
    denoiser = table_denoiser(3, 3, time_free=time_free)
    tokens, groups, chance = all_paths(3, 3)
    exact = torch.zeros(27)
    with torch.no_grad():
        for step in range(3):
            state = torch.where(groups >= step, denoiser.mask_id, tokens)
            log_p = denoiser.log_probs(state, torch.ones(1, 1, 1)).gather(-1, tokens[..., None])
            part = (log_p[..., 0] * (groups == step)).sum(1) * chance
            exact.index_add_(0, (tokens * torch.tensor([9, 3, 1])).sum(1), part.float())
        items = token_items(sequences(3, 3))
        score = MaskedScore(draws=4000)
        got = score(denoiser, items, score.draw(denoiser, items, seeded()))
    torch.testing.assert_close(got, exact, atol=0.1, rtol=0)


def test_masked_windows_add_up_and_unscored_tokens_do_not():
    denoiser = table_denoiser(2, 3)
    tokens = torch.randint(2, (4, 3), generator=seeded())
    steps = torch.tensor([[True, False, True]] * 4)
    score = MaskedScore(draws=3)
    rows = token_items(tokens, steps)
    draw = score.draw(denoiser, rows, seeded())
    single = score(denoiser, rows, draw)
    both = score(denoiser, rows._replace(item=torch.tensor([0, 0, 1, 1]), count=2), draw)
    torch.testing.assert_close(both, single.view(2, 2).sum(1))
    everything = score(denoiser, token_items(tokens), draw)
    rest = score(denoiser, token_items(tokens, ~steps), draw)
    torch.testing.assert_close(single + rest, everything)


# ------------------------------------------------------------------------------ construction


def test_the_kind_of_score_is_the_denoisers():
    assert default_score(table_denoiser()) == MaskedScore()
    assert default_score(pointwise()) == DenoisingScore()


@pytest.mark.parametrize(
    ("config", "denoiser", "message"),
    [
        ({"weighting": "mean"}, pointwise(), "unknown weighting 'mean'"),
        ({"draws": 0}, pointwise(), "draws must be at least 1"),
        ({"draws": 0}, table_denoiser(), "draws must be at least 1"),
        ({"levels": []}, pointwise(), "at least one"),
        ({"levels": [0.0, 1.0]}, pointwise(), r"levels must be in \(0, 1\]"),
        ({"log_snr": [1, -1], "weighting": "elbo"}, pointwise(), "two rising numbers"),
        ({"log_snr": [-90, -80], "weighting": "elbo"}, pointwise(), "leaves nothing"),
        (
            {},
            MixtureDenoiser(VPCosine(), one_dimensional().prior),
            "MixtureDenoiser has no prediction of its own",
        ),
    ],
)
def test_settings_that_cannot_work(config, denoiser, message):
    with pytest.raises(ValueError, match=message):
        type(default_score(denoiser))(**config).check(denoiser)


def test_scores_refuse_denoisers_of_the_other_kind():
    with pytest.raises(ValueError, match="sequences take MaskedScore"):
        DenoisingScore().check(table_denoiser())
    with pytest.raises(ValueError, match="plans take DenoisingScore"):
        MaskedScore().check(pointwise())


def test_dropout_is_found_wherever_it_hides():
    check_no_dropout(Denoiser(MLP(4, 2), VPCosine()))
    with pytest.raises(ValueError, match=r"dropout=0.1 in Dropout"):
        check_no_dropout(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    with pytest.raises(ValueError, match=r"dropout=0.2 in SequenceCNN"):
        check_no_dropout(SequenceCNN(8, 5, width=8, stacks=1, dropout=0.2))
