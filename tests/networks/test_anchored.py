from __future__ import annotations

import pytest
import torch

from diffpolicy.core import Denoiser, make_process, make_solver, sample
from diffpolicy.core.starts import levels, truncated_start
from diffpolicy.networks import Anchored, make_network

BASES = {
    "mlp": {"type": "mlp", "width": 32, "depth": 2},
    "unet1d": {"type": "unet1d", "down_dims": [16, 32], "diffusion_step_embed_dim": 16},
    "transformer": {"type": "transformer", "width": 32, "depth": 1, "heads": 2},
}
SIZES = {"horizon": 8, "dim": 3, "cond_dim": 5}


def anchored(base="mlp", stages=2):
    torch.manual_seed(0)
    network = make_network({"type": "anchored", "base": BASES[base], "stages": stages, **SIZES})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_answers_of_every_base(base, stages):
    network = anchored(base, stages)
    x, cond, t = torch.randn(4, 8, 3), torch.randn(4, 5), torch.full((4, 1, 1), 30.0)
    answers = network.cascade(x, t, cond)
    assert [(tuple(o.shape), tuple(c.shape)) for o, c in answers] == [((4, 8, 3), (4,))] * stages
    output, aux = network.with_aux(x, t, cond)
    assert torch.equal(output, network(x, t, cond))
    assert torch.equal(aux["confidence"], answers[-1][1])
    emb = network.embed_time(t)
    torch.testing.assert_close(network(x, t, cond, time_emb=emb), output)
    assert network.t_kinds == make_network({**BASES[base], **SIZES}).t_kinds


def test_config_rebuilds_the_network():
    network = anchored(stages=2)
    again = make_network(network.config())
    again.load_state_dict(network.state_dict())
    x, cond, t = torch.randn(4, 8, 3), torch.randn(4, 5), torch.full((4, 1, 1), 30.0)
    assert torch.equal(again(x, t, cond), network(x, t, cond))


def test_no_gradient_between_stages():
    network = anchored(stages=2)
    x, cond, t = torch.randn(4, 8, 3), torch.randn(4, 5), torch.full((4, 1, 1), 30.0)
    output, logit = network.cascade(x, t, cond)[-1]
    (output.sum() + logit.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in network.stages[0].parameters())
    assert any(p.grad.abs().sum() > 0 for p in network.stages[1].parameters())


def test_confidence_begins_at_the_prior():
    network = make_network({"type": "anchored", "base": BASES["mlp"], "prior": 0.1, **SIZES})
    with torch.no_grad():
        network.gain.zero_()
    aux = network.with_aux(torch.randn(2, 8, 3), torch.zeros(2, 1, 1), torch.randn(2, 5))[1]
    torch.testing.assert_close(aux["confidence"].sigmoid(), torch.full((2,), 0.1))


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_denoiser_delivers_the_confidence(prediction):
    network, process = anchored(), make_process("vp_cosine")
    denoiser = Denoiser(network, process, prediction)
    x, cond = torch.randn(4, 8, 3), torch.randn(4, 5)
    out = denoiser(x, torch.full((4, 1, 1), 0.3), cond)
    assert out.aux["confidence"].shape == (4,)
    start = truncated_start(process, x, 0.3, torch.randn_like(x))
    with torch.no_grad():
        result = sample(
            denoiser,
            make_solver("ddim"),
            start,
            levels(start, 2, process=process),
            cond=cond,
            record=True,
        )
    last = result.transitions[-1]
    expected = denoiser(last.x, last.t.float(), cond)
    torch.testing.assert_close(last.denoised.aux["confidence"], expected.aux["confidence"])
    torch.testing.assert_close(result.x0, expected.x0_hat)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs base"),
        ({"base": "mlp"}, r"base must be another network's config.*got 'mlp'"),
        ({"base": {"type": "anchored"}}, "base must be another network's config"),
        ({"base": {"type": "mlp", "horizon": 4}}, "horizon of this network are given otherwise"),
        ({"base": {"type": "mlp"}, "stages": 0}, "stages must be a positive integer"),
        ({"base": {"type": "mlp"}, "prior": 1.0}, r"prior must be in \(0, 1\)"),
        ({"base": {"type": "mlp", "widht": 3}}, "did you mean 'width'"),
    ],
)
def test_bad_configs_of_anchored(settings, message):
    with pytest.raises(ValueError, match=message):
        make_network({"type": "anchored", **SIZES, **settings})


def test_levels_per_dimension_are_refused():
    network = Anchored(8, 3, base={"type": "mlp", "width": 16, "t_kind": "dim"})
    denoiser = Denoiser(network, make_process("vp_cosine"), "x0")
    with pytest.raises(ValueError, match="not per dim"):
        denoiser.check_t(torch.zeros(1, 1, 3))
