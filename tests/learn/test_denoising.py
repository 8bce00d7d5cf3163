"""Denoising losses: laws of levels, and errors at finer levels."""

from __future__ import annotations

import pytest
import torch

from diffpolicy.core import Denoiser, make_process
from diffpolicy.core.starts import Ramp
from diffpolicy.learn import DenoisingLoss, denoising_error
from diffpolicy.networks import make_network

HORIZON, DIM = 12, 3
RAMP = Ramp(HORIZON, 2, 4)  # chunks 2: positions 0-4, 5-8, spare 9-11


def mlp_denoiser(t_kind="row", prediction="eps", process="vp_cosine", **network):
    torch.manual_seed(0)
    shape = {"horizon": HORIZON, "dim": DIM, "cond_dim": 2}
    config = {"type": "mlp", "width": 16, "depth": 1, "t_kind": t_kind, **network}
    return Denoiser(make_network({**config, **shape}), make_process(process), prediction)


def plans(count):
    generator = torch.Generator().manual_seed(1)
    action = torch.rand(count, HORIZON, DIM, generator=generator) * 2 - 1
    return {"action": action, "obs": torch.randn(count, 1, 2, generator=generator)}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_levels_per_row_draw_what_they_always_drew():
    """The default's random stream is level, noise, dropout: nothing before or between."""
    denoiser, batch = mlp_denoiser(), plans(8)
    loss = DenoisingLoss(denoiser, cond_dropout=0.5)(batch, seeded()).loss
    g = seeded()
    t = denoiser.process.sample_t((8, 1, 1), g)
    noise = torch.randn(8, HORIZON, DIM, generator=g)
    keep = torch.rand(8, 1, generator=g) >= 0.5
    cond = batch["obs"].flatten(1) * keep
    assert torch.equal(loss, denoising_error(denoiser, batch["action"], t, noise, cond=cond))


@pytest.mark.parametrize("process", ["vp_cosine", "ddpm_cosine", "flow"])
def test_levels_per_position_are_the_streaming_mixture(process):
    prediction = "velocity" if process == "flow" else "eps"
    denoiser = mlp_denoiser("position", prediction, process)
    loss = DenoisingLoss(denoiser, level_law="position", ramp=RAMP)
    t = loss.draw_levels(4000, DIM, seeded())
    assert t.shape == (4000, HORIZON, 1)
    t = t[..., 0]
    assert (t > 0).all()
    assert (t <= 1).all()
    constant = (t == t[:, :1]).all(1)
    assert constant.float().mean().item() == pytest.approx(0.2, abs=0.03)
    ramped = t[~constant]
    assert (ramped[:, :5] == ramped[:, :1]).all()  # To - 1 + Ta entries share chunk 0
    assert (ramped[:, 5:9] == ramped[:, 5:6]).all()
    assert (ramped[:, 9:] == 1).all()  # beyond the last whole chunk: noise
    torch.testing.assert_close(ramped[:, 5], ramped[:, 0] + 0.5)
    first = ramped[:, 0]
    assert first.max() <= 0.5
    assert first.mean().item() == pytest.approx(0.25, abs=0.01)  # the phase is uniform
    assert t[constant].mean().item() == pytest.approx(0.5, abs=0.04)


def test_levels_per_dimension_are_independent():
    loss = DenoisingLoss(mlp_denoiser("dim"), level_law="dim", constant_fraction=0.25)
    t = loss.draw_levels(4000, DIM, seeded())
    assert t.shape == (4000, 1, DIM)
    t = t[:, 0]
    constant = (t == t[:, :1]).all(1)
    assert constant.float().mean().item() == pytest.approx(0.25, abs=0.03)
    correlation = torch.corrcoef(t[~constant].T)
    assert correlation.fill_diagonal_(0).abs().max() < 0.06
    torch.testing.assert_close(t.mean(0), torch.full((DIM,), 0.5), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("prediction", "process"),
    [("eps", "vp_cosine"), ("v", "vp_cosine"), ("x0", "ddpm_cosine"), ("edm", "edm"),
     ("velocity", "flow"), ("eps", "edm"), ("v", "flow")],
)  # fmt: skip
@pytest.mark.parametrize("law", ["position", "dim"])
def test_error_at_finer_levels(prediction, process, law):
    """Each entry of the target belongs to its own level: it recovers x0 from x_t there."""
    denoiser = mlp_denoiser(law, prediction, process)
    ramp = RAMP if law == "position" else None
    loss = DenoisingLoss(denoiser, level_law=law, ramp=ramp, constant_fraction=0.1)
    batch = plans(16)
    x0 = batch["action"].double()
    t = loss.draw_levels(16, DIM, seeded()).double()
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=seeded(5))
    x_t = denoiser.process.add_noise(x0, t, noise)
    c_x, c_out, _, _ = denoiser.coefficients(t)
    recovered = c_x * x_t + c_out * denoiser.target(x0, noise, t)
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-5)
    got = loss(batch, seeded())
    assert got.loss.shape == (16,)
    assert got.loss.isfinite().all()
    got.loss.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in denoiser.parameters())


@pytest.mark.parametrize("law", ["position", "dim"])
def test_equal_levels_everywhere_are_the_row_law(law):
    """With constant plans only, the finer laws train a network that sees copies of one level."""
    denoiser, batch = mlp_denoiser(law), plans(8)
    noise, t = torch.randn(8, HORIZON, DIM, generator=seeded()), torch.full((8, 1, 1), 0.3)
    wide = t.expand(8, HORIZON, 1) if law == "position" else t.expand(8, 1, DIM)
    cond = batch["obs"].flatten(1)
    a, b = (denoising_error(denoiser, batch["action"], v, noise, cond=cond) for v in (t, wide))
    torch.testing.assert_close(a, b)


def test_training_at_levels_per_position_learns():
    """The network must tell clean positions from noisy ones; one batch over and over."""
    denoiser, batch = mlp_denoiser("position", width=64), plans(4)
    objective = DenoisingLoss(denoiser, level_law="position", ramp=RAMP)
    optimizer, generator = torch.optim.Adam(denoiser.parameters(), 3e-3), seeded()
    losses = []
    for _ in range(200):
        loss = objective(batch, generator).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-30:]) < 0.6 * sum(losses[:30])


def test_errors():
    with pytest.raises(ValueError, match="unknown level_law 'chunk'; expected one of row"):
        DenoisingLoss(mlp_denoiser(), level_law="chunk")
    with pytest.raises(ValueError, match=r"MLP takes \['row'\].*'t_kind': 'position'.*unet1d"):
        DenoisingLoss(mlp_denoiser(), level_law="position", ramp=RAMP)
    with pytest.raises(ValueError, match=r"t_kind='dim'"):
        DenoisingLoss(mlp_denoiser("position"), level_law="dim")
    with pytest.raises(ValueError, match="needs ramp=Ramp"):
        DenoisingLoss(mlp_denoiser("position"), level_law="position")
    with pytest.raises(ValueError, match="the ramp has horizon=20, the network 12"):
        DenoisingLoss(mlp_denoiser("position"), level_law="position", ramp=Ramp(20, 2, 8))
    with pytest.raises(ValueError, match="constant_fraction must be in"):
        DenoisingLoss(mlp_denoiser(), constant_fraction=1.5)
