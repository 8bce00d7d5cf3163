from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.core import Denoiser, levels, make_process, make_solver, sample, truncated_start
from diffpolicy.learn.cloning.anchored import AnchoredLoss
from diffpolicy.networks import make_network
from diffpolicy.policies.truncated import ScoredPlans

ANCHORS = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 4, 2).contiguous()


def small_denoiser(stages=1, width=32, cond_dim=2):
    torch.manual_seed(0)
    network = make_network(
        {
            "type": "anchored",
            "horizon": 4,
            "dim": 2,
            "cond_dim": cond_dim,
            "stages": stages,
            "base": {"type": "mlp", "width": width, "depth": 2},
        }
    )
    return Denoiser(network, make_process("vp_cosine"), "x0")


class EchoNetwork(nn.Module):
    """Answers its input and a fixed logit, so that every loss can be worked out by hand."""

    t_kinds = frozenset({"row"})

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.logit = nn.Parameter(torch.zeros(()))
        self.seen = []

    def cascade(self, x, t, cond=None):
        self.seen.append((x, t))
        return [(self.gain * x, self.logit.expand(len(x)))]


def echo_loss(**settings):
    network = EchoNetwork()
    denoiser = Denoiser(network, make_process("vp_cosine"), "x0")
    return network, AnchoredLoss(denoiser, ANCHORS, t_max=1e-9, **settings)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_loss_by_hand(reconstruction):
    """Without noise the echo of the positive is its anchor; logit 0 costs log 2 each."""
    _, loss = echo_loss(
        classification="bce", reconstruction=reconstruction, class_weight=2.0, recon_weight=3.0
    )
    plan = torch.tensor([0.9, -0.3]).view(2, 1, 1).expand(2, 4, 2)
    out = loss({"action": plan}, gen())
    away = torch.tensor([0.1, 0.3])
    away = away if reconstruction == "l1" else away.square()
    expected = 2.0 * torch.log(torch.tensor(2.0)) + 3.0 * away
    torch.testing.assert_close(out.loss, expected, atol=1e-4, rtol=0)
    assert set(out.metrics) == {"classification", "reconstruction", "found"}


def test_focal_loss_by_hand():
    network, loss = echo_loss(class_weight=1.0, recon_weight=1e-9)
    with torch.no_grad():
        network.logit.fill_(1.0)
    out = loss({"action": torch.ones(1, 4, 2)}, gen())
    p = torch.tensor(1.0).sigmoid()
    expected = (0.25 * (1 - p) ** 2 * -p.log() + 2 * 0.75 * p**2 * -(1 - p).log()) / 3
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_all_anchors_share_one_level_and_the_positive_is_the_nearest():
    network = EchoNetwork()
    denoiser = Denoiser(network, make_process("vp_cosine"), "x0")
    loss = AnchoredLoss(denoiser, ANCHORS, t_max=0.4)
    plan = torch.full((64, 4, 2), 0.8)
    loss({"action": plan}, gen())
    x, time = network.seen[0]
    t = time.view(64, 3) / 1000
    assert torch.equal(t, t[:, :1].expand(-1, 3))
    assert 0 < t.min() < 0.02
    assert 0.38 < t.max() <= 0.4
    alpha = denoiser.process.alpha(t[:, :1, None, None])
    residual = (x.view(64, 3, 4, 2)[:, 0] - alpha[:, 0] * 1.0) / denoiser.process.sigma(
        t[:, :1, None]
    )  # the positive, anchor 1, comes first: what is left is standard normal
    assert residual.mean().abs() < 0.15
    assert residual.std().item() == pytest.approx(1, abs=0.15)


def test_reconstruction_gradient_reaches_the_positive_alone():
    denoiser = small_denoiser()
    loss = AnchoredLoss(denoiser, ANCHORS, t_max=0.2, class_weight=0.0)
    seen = []
    cascade = denoiser.network.cascade

    def spy(x, t, cond=None):
        x = x.detach().requires_grad_()
        seen.append(x)
        return cascade(x, t, cond)

    denoiser.network.cascade = spy
    batch = {"obs": torch.zeros(5, 1, 2), "action": torch.full((5, 4, 2), -0.7)}
    loss(batch, gen()).loss.sum().backward()
    grad = seen[0].grad.view(5, 3, 4, 2).abs().sum((2, 3))
    assert (grad[:, 0] > 0).all()
    assert (grad[:, 1:] == 0).all()


def test_invalid_positions_do_not_count():
    _, loss = echo_loss(classification="bce", class_weight=0.0, recon_weight=1.0)
    plan = torch.full((1, 4, 2), 0.9)
    plan[:, 2:] = -50.0
    valid = torch.tensor([[True, True, False, False]])
    out = loss({"action": plan, "valid": valid}, gen())
    assert out.loss.item() == pytest.approx(0.1, abs=1e-4)


def test_fewer_negatives_keep_the_expected_loss():
    def values(negatives):
        denoiser = small_denoiser()
        loss = AnchoredLoss(
            denoiser, ANCHORS, t_max=1e-6, classification="bce", negatives=negatives
        )
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=gen(1)))
        batch = {"obs": torch.zeros(4000, 1, 2), "action": torch.full((4000, 4, 2), 0.8)}
        with torch.no_grad():
            return loss(batch, gen()).loss

    every, one = values(None), values(1)
    assert one.std() > 1e-3  # another negative each time
    assert one.mean().item() == pytest.approx(every.mean().item(), rel=0.02)


def test_learns_mode_means_and_probabilities():
    """Plans near -1 with probability 0.7 and near +1 with 0.3, around means off the anchors."""
    denoiser = small_denoiser(width=64)
    loss = AnchoredLoss(
        denoiser,
        ANCHORS,
        t_max=0.15,
        class_weight=1.0,
        recon_weight=1.0,
        classification="bce",
        reconstruction="l2",
    )
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3, fused=True)
    generator = gen()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        upper = torch.rand(128, 1, 1, generator=generator) < 0.3
        mean = torch.where(upper, 1.2, -0.8)
        plan = mean + 0.1 * torch.randn(128, 4, 2, generator=generator)
        out = loss({"obs": torch.zeros(128, 1, 2), "action": plan}, generator)
        optimizer.zero_grad()
        out.loss.mean().backward()
        optimizer.step()
    guess = ANCHORS.expand(200, -1, -1, -1)
    noise = torch.randn(guess.shape, generator=generator).flatten(0, 1)
    start = truncated_start(denoiser.process, guess.flatten(0, 1), 0.15, noise)
    grid, cond = levels(start, 2, process=denoiser.process), torch.zeros(600, 2)
    with torch.no_grad():
        path = sample(denoiser, make_solver("ddim"), start, grid, cond=cond, record=True)
    scores = path.transitions[-1].denoised.aux["confidence"].view(200, 3)
    solved = ScoredPlans(path.x0.view(guess.shape), scores, 2)
    confidence = solved.scores.sigmoid().mean(0)
    assert confidence.tolist() == pytest.approx([0.7, 0.0, 0.3], abs=0.06)
    means = solved.plans.mean((0, 2, 3))
    assert means[[0, 2]].tolist() == pytest.approx([-0.8, 1.2], abs=0.05)
    assert torch.equal(solved.scores.argmax(1), torch.zeros(200, dtype=torch.long))
    assert solved.best().mean().item() == pytest.approx(-0.8, abs=0.05)


def test_every_stage_is_supervised():
    denoiser = small_denoiser(stages=2)
    loss = AnchoredLoss(denoiser, ANCHORS, t_max=0.2)
    batch = {"obs": torch.zeros(5, 1, 2), "action": torch.full((5, 4, 2), -0.7)}
    loss(batch, gen()).loss.sum().backward()
    for stage in denoiser.network.stages:
        assert stage.outward.weight.grad.abs().sum() > 0


def test_guesses_may_depend_on_the_state():
    network = EchoNetwork()
    denoiser = Denoiser(network, make_process("vp_cosine"), "x0")
    loss = AnchoredLoss(
        denoiser,
        lambda obs, cond: ANCHORS + obs[:, -1].view(-1, 1, 1, 2),
        t_max=1e-9,
        class_weight=0.0,
        recon_weight=1.0,
    )
    obs = torch.tensor([[[5.0, 5.0]], [[-3.0, -3.0]]])
    plan = obs.expand(2, 4, 2) + 1.1
    out = loss({"obs": obs, "action": plan}, gen())
    assert out.loss.tolist() == pytest.approx([0.1, 0.1], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_max": 0.0}, r"t_max must be in \(0, 1\]"),
        ({"t_max": 0.1, "classification": "ce"}, "unknown classification 'ce'"),
        ({"t_max": 0.1, "reconstruction": "huber"}, "unknown reconstruction 'huber'"),
        ({"t_max": 0.1, "negatives": 0}, "negatives must be at least 1"),
        ({"t_max": 0.1, "recon_weight": 0.0}, "recon_weight must be positive"),
    ],
)
def test_bad_loss_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchoredLoss(small_denoiser(), ANCHORS, **settings)


def test_a_network_without_confidence_is_refused():
    network = make_network({"type": "mlp", "horizon": 4, "dim": 2})
    denoiser = Denoiser(network, make_process("vp_cosine"), "x0")
    with pytest.raises(ValueError, match="needs a network of type 'anchored'"):
        AnchoredLoss(denoiser, ANCHORS, t_max=0.1)
