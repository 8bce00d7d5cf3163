"""Reward back-propagation on problems small enough for the exact law and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tuning_tables import TableReward, multilinear_denoiser

from diffpolicy.core import Denoiser, Relaxation, VPCosine
from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.learn.reward.pathwise import Finished, MaskedChain, RewardLoss
from diffpolicy.networks import make_network
from diffpolicy.sequences.exact import ExactLaw, exact_scores


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(size, **more):
    return {"index": torch.arange(size), **more}


def law(denoiser):
    with torch.no_grad():
        return ExactLaw.of(denoiser)


def exact_gradient(denoiser, reference, reward, kl_weight):
    """Of ``E[r] - kl_weight KL(path || path of the reference)`` by the logits."""
    mine = ExactLaw.of(denoiser)
    value = (mine.p * reward.values).sum() - kl_weight * mine.path_kl(law(reference))
    return torch.autograd.grad(value, denoiser.network.logits)[0].flatten()


def estimated_gradient(loss, size, seed=0):
    value = loss(rows(size), seeded(seed)).loss.mean()
    return -torch.autograd.grad(value, loss.denoiser.network.logits)[0].flatten()


def tune(loss, steps, size=128, lr=0.05):
    """Optimises as the trainer does: whatever takes a gradient."""
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=lr)
    g = seeded()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(rows(size), g).loss.mean().backward()
        optimizer.step()
        loss.after_step()


STRAIGHT = {
    name: Relaxation(straight_through=True, backward=name)
    for name in ("gumbel", "probabilities", "reinmax")
}


class TestEstimators:
    """Expected gradients against the exact one.

    Two tokens, three positions, kl_weight 0.1; measured on 20,000 rows, cosine / relative error:
    relaxed at temperature 1: 0.953 / 0.525 (0.5: 0.988 / 0.272), straight-through with the gradient
    of the Gumbel-softmax 0.973 / 0.341, of the probabilities 0.972 / 0.239, ReinMax 0.998 / 0.066.
    """

    @pytest.mark.parametrize(
        ("relaxation", "cosine", "error"),
        [
            (Relaxation(), 0.93, 0.6),
            (Relaxation(0.5), 0.97, 0.35),
            (STRAIGHT["gumbel"], 0.95, 0.42),
            (STRAIGHT["probabilities"], 0.95, 0.32),
            (STRAIGHT["reinmax"], 0.985, 0.15),
        ],
        ids=repr,
    )
    def test_point_where_the_exact_gradient_does(self, relaxation, cosine, error):
        denoiser, reference = (multilinear_denoiser(2, 3, seed=s) for s in (1, 2))
        reward, chain = TableReward(2, 3), MaskedChain(relaxation=relaxation)
        exact = exact_gradient(denoiser, reference, reward, 0.1)
        loss = RewardLoss(denoiser, reward, chain, kl_weight=0.1, reference=reference)
        found = estimated_gradient(loss, 8000)
        assert torch.cosine_similarity(found, exact, dim=0) > cosine
        assert (found - exact).norm() < error * exact.norm()

    @pytest.mark.parametrize("backward", ["probabilities", "reinmax"])
    def test_are_exact_for_one_position(self, backward):
        denoiser, reference = (multilinear_denoiser(3, 1, seed=s) for s in (1, 2))
        reward, chain = TableReward(3, 1), MaskedChain(relaxation=STRAIGHT[backward])
        exact = exact_gradient(denoiser, reference, reward, 0.3)
        loss = RewardLoss(denoiser, reward, chain, kl_weight=0.3, reference=reference)
        found = torch.stack([estimated_gradient(loss, 1000, seed) for seed in range(20)])
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - exact).abs() <= 4 * error + 1e-7).all()
        assert error.max() < 0.05 * exact.abs().max()
        if backward == "probabilities":  # it does not depend on the draw at all
            assert error.max() < 1e-7

    def test_colder_relaxation_is_less_biased(self):
        denoiser, reference = (multilinear_denoiser(2, 3, seed=s) for s in (1, 2))
        reward = TableReward(2, 3)
        exact = exact_gradient(denoiser, reference, reward, 0.1)
        errors = []
        for temperature in (2.0, 1.0, 0.5):
            chain = MaskedChain(relaxation=Relaxation(temperature))
            loss = RewardLoss(denoiser, reward, chain, kl_weight=0.1, reference=reference)
            errors.append((estimated_gradient(loss, 4000) - exact).norm().item())
        assert errors[0] > errors[1] > errors[2]


class TestTuning:
    def test_large_weight_returns_to_the_pretrained_law(self):
        denoiser, reference = (multilinear_denoiser(2, 3, seed=s) for s in (1, 2))
        loss = RewardLoss(
            denoiser,
            TableReward(2, 3),
            MaskedChain(relaxation=STRAIGHT["probabilities"]),
            kl_weight=1e4,
            reference=reference,
        )
        before = law(denoiser).path_kl(law(reference)).item()
        tune(loss, 60, lr=0.15)
        after = law(denoiser).path_kl(law(reference)).item()
        assert before > 0.5
        assert after < 0.01 * before

    def test_large_weight_stays_at_the_pretrained_law(self):
        denoiser = multilinear_denoiser(2, 3, seed=1)
        before = law(denoiser)
        loss = RewardLoss(denoiser, TableReward(2, 3), MaskedChain(), kl_weight=1e4)
        tune(loss, 20, lr=0.01)
        assert law(denoiser).path_kl(before).item() < 1e-4

    @pytest.mark.parametrize(
        ("chain", "progress"),
        [
            (MaskedChain(relaxation=STRAIGHT["reinmax"]), 0.95),
            (MaskedChain(relaxation=STRAIGHT["probabilities"]), 0.7),
            (MaskedChain(6, Relaxation(relaxed_steps=3), joint=True), 0.65),
        ],
        ids=["reinmax", "probabilities", "drakes"],
    )
    def test_comes_near_the_exact_optimum(self, chain, progress):
        """Measured 0.99, 0.78 and 0.74; more updates gain nothing: the rest is bias."""
        denoiser, reward = multilinear_denoiser(2, 3, seed=1, scale=0.5), TableReward(2, 3)
        reference = law(denoiser).p
        tune(RewardLoss(denoiser, reward, chain, kl_weight=0.5), 50, lr=0.15)
        scores = exact_scores(law(denoiser).p, reference, reward.values, 0.5)
        assert progress < scores.progress < 1


class Raises(BaseDenoiser):
    """A reference that nobody may ask."""

    def forward(self, x_t, t, cond=None):
        raise AssertionError("the reference was evaluated")

    on_grid = forward


class TestObjective:
    def small(self, chain=None, *, reward=None, kl_weight=0.1, **settings):
        denoiser = multilinear_denoiser(2, 3, seed=1)
        chain = chain or MaskedChain()
        return RewardLoss(
            denoiser, reward or TableReward(2, 3), chain, kl_weight=kl_weight, **settings
        )

    def test_weight_0_leaves_the_reference_out(self):
        loss = self.small(kl_weight=0.0, reference=Raises())
        out = loss(rows(4), seeded())
        assert out.loss.shape == (4,)
        assert out.metrics["kl"] == 0
        torch.testing.assert_close(out.loss.mean(), -out.metrics["reward"])

    def test_loss_is_weighted_divergence_minus_reward(self):
        reference = multilinear_denoiser(2, 3, seed=2)
        free, held = (self.small(kl_weight=w, reference=reference) for w in (0.0, 0.3))
        free, held = (loss(rows(8), seeded()) for loss in (free, held))
        assert held.metrics["kl"] > 0
        torch.testing.assert_close(held.metrics["reward"], free.metrics["reward"])
        kl = ((held.loss - free.loss) / 0.3).mean()
        torch.testing.assert_close(kl, held.metrics["kl"])

    @pytest.mark.parametrize("given", [False, True])
    def test_reference_is_frozen_in_evaluation_mode_and_never_trained(self, given):
        reference = multilinear_denoiser(2, 3, seed=2) if given else None
        loss = self.small(kl_weight=1.0, reference=reference)
        assert not any(m.training for m in loss.reference.modules())
        assert not any(p.requires_grad for p in loss.reference.parameters())
        before = loss.reference.network.logits.clone()
        trained = loss.denoiser.network.logits.clone()
        loss.train()
        tune(loss, 3)
        assert loss.denoiser.training
        assert not any(m.training for m in loss.reference.modules())
        assert torch.equal(loss.reference.network.logits, before)
        assert loss.reference.network.logits.grad is None
        assert not torch.equal(loss.denoiser.network.logits, trained)

    def test_reference_needs_weights_of_its_own(self):
        denoiser = multilinear_denoiser(2, 3)
        with pytest.raises(ValueError, match="reference shares weights with the denoiser"):
            RewardLoss(denoiser, TableReward(2, 3), MaskedChain(), kl_weight=1, reference=denoiser)
        assert denoiser.network.logits.requires_grad

    def test_copy_is_that_of_now(self):
        denoiser = multilinear_denoiser(2, 3)
        copied, now = frozen_copy(denoiser), denoiser.network.logits.detach().clone()
        with torch.no_grad():
            denoiser.network.logits.add_(1)
        assert torch.equal(copied.network.logits, now)
        assert denoiser.network.logits.requires_grad
        assert denoiser.training

    def test_weight_warms_up_over_optimiser_steps(self):
        reference = multilinear_denoiser(2, 3, seed=2)
        loss = self.small(kl_weight=0.4, kl_warmup=4, reference=reference)
        weights = []
        for _ in range(6):
            out = loss(rows(4), seeded())
            weights.append(((out.loss.mean() + out.metrics["reward"]) / out.metrics["kl"]).item())
            loss.after_step()
        assert weights == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
        assert "step" in loss.state_dict()  # a resumed run goes on from there

    def test_randomness_comes_from_the_generator(self):
        loss = self.small()
        one, two, other = (loss(rows(6), seeded(s)).loss for s in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)

    def test_reward_that_is_a_module_is_not_trained_or_stored(self):
        class Oracle(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(2))

            def forward(self, x):
                return (x * self.weight).sum((1, 2))

        loss = self.small(reward=Oracle())
        assert not any("weight" in name for name in loss.state_dict())
        assert loss(rows(4), seeded()).loss.shape == (4,)

    def test_reward_of_another_shape_is_named(self):
        loss = self.small(reward=lambda x: x.sum(1))
        with pytest.raises(ValueError, match=r"one number per item, \[4\]; got \[4, 2\]"):
            loss(rows(4), seeded())

    @pytest.mark.parametrize("settings", [{"kl_weight": -1.0}, {"kl_weight": 1, "kl_warmup": -1}])
    def test_weights_are_not_negative(self, settings):
        with pytest.raises(ValueError, match="must be at least 0"):
            RewardLoss(multilinear_denoiser(2, 3), TableReward(2, 3), MaskedChain(), **settings)


def test_copies_of_a_row_share_its_condition_and_are_averaged():
    class Copies:
        """Two plans of every row, which hold its number and that of the copy."""

        def check(self, denoiser):
            pass

        def run(self, denoiser, reference, size, cond, generator):
            rows = torch.arange(size).repeat_interleave(2)
            items = torch.stack([rows, torch.arange(2).repeat(size)], -1).unsqueeze(1).float()
            return Finished(items, torch.zeros(size), {"extra": torch.tensor(3.0)})

    def reward(items, cond):
        assert torch.equal(cond[:, 0], items[:, 0, 0] * 10)
        return items[:, 0, 1] + cond[:, 0]

    network = make_network({"type": "mlp", "horizon": 1, "dim": 2, "width": 8, "depth": 1})
    plans = Denoiser(network, VPCosine())  # rewards of sequences take no condition
    loss = RewardLoss(plans, reward, Copies(), kl_weight=0.0)
    cond = 10 * torch.arange(3.0).unsqueeze(1)
    out = loss(rows(3, cond=cond), seeded())
    torch.testing.assert_close(out.loss, -(10 * torch.arange(3.0) + 0.5))
    assert out.metrics["extra"] == 3


class TestMaskedChain:
    reference = frozen_copy(multilinear_denoiser(2, 3, seed=2))

    def run(self, chain, *, seed=0, size=40, **settings):
        denoiser = multilinear_denoiser(2, 3, seed=1, **settings)
        return chain.run(denoiser, self.reference, size, None, seeded(seed))

    def test_reward_sees_hard_sequences_with_a_soft_gradient(self):
        soft = self.run(MaskedChain(straight_through_end=False)).items
        hard = self.run(MaskedChain()).items
        assert soft.shape == hard.shape == (40, 3, 2)
        torch.testing.assert_close(soft.sum(-1), torch.ones(40, 3, dtype=soft.dtype))
        assert ((soft > 0) & (soft < 1)).any()
        assert ((hard == 0) | (hard == 1)).all()
        assert torch.equal(hard.argmax(-1), soft.argmax(-1))
        assert hard.requires_grad

    @pytest.mark.parametrize(
        "chain",
        [
            MaskedChain(),
            MaskedChain(4),
            MaskedChain(4, Relaxation(relaxed_steps=1), joint=True),
            MaskedChain(4, Relaxation(relaxed_steps=1), joint=True, kl="drakes_released"),
            MaskedChain(4, STRAIGHT["reinmax"], checkpoint=True, reference_graph=False),
        ],
        ids=repr,
    )
    def test_all_settings_run_and_take_gradients(self, chain):
        done = self.run(chain)
        assert done.kl.shape == (40,)
        assert done.items.sum((1, 2)).tolist() == pytest.approx([3.0] * 40)
        (done.kl.mean() + done.items[..., 0].mean()).backward()

    def test_divergence_of_soft_steps_alone_is_their_sum(self):
        relaxation, denoiser = Relaxation(relaxed_steps=1), multilinear_denoiser(2, 3, seed=1)
        asked, seen = [], []
        denoiser.network.register_forward_hook(lambda _, given, __: asked.append(given[0]))
        for prefix in (True, False):
            chain = MaskedChain(4, relaxation, joint=True, kl_prefix=prefix)
            seen.append(chain.run(denoiser, self.reference, 40, None, seeded()).kl)
        whole, last = seen
        x, t = asked[-1].detach(), torch.zeros(1, 1, 1)
        log_p, log_q = (d.log_probs(x, t) for d in (denoiser, self.reference))
        expected = (x[..., -1:] * log_p.exp() * (log_p - log_q)).sum((1, 2))  # all are revealed
        torch.testing.assert_close(last, expected)
        assert last.mean() < 0.6 * whole.mean()
        none = MaskedChain(4, Relaxation(), joint=True, kl_prefix=False)  # no hard steps
        assert torch.equal(self.run(none).kl, self.run(MaskedChain(4, joint=True)).kl)

    @pytest.mark.parametrize("kl_prefix", [True, False])
    def test_subsampled_divergence_has_the_same_mean(self, kl_prefix):
        chain = MaskedChain(4, Relaxation(relaxed_steps=2), joint=True, kl_prefix=kl_prefix)
        few = MaskedChain(
            4, Relaxation(relaxed_steps=2), joint=True, kl_prefix=kl_prefix, kl_steps=1
        )
        with torch.no_grad():
            whole = torch.stack([self.run(chain, seed=s).kl.mean() for s in range(40)])
            part = torch.stack([self.run(few, seed=s).kl.mean() for s in range(40)])
        error = (part - whole).std() / 40**0.5
        assert 0 < error < 0.15 * whole.mean()
        assert (part.mean() - whole.mean()).abs() < 4 * error

    def test_rows_end_together_so_that_soft_steps_reach_all(self):
        """Six steps of a grid for three positions: a row may need one evaluation or three."""
        chain = MaskedChain(6, Relaxation(relaxed_steps=1), straight_through_end=False)
        items = self.run(chain, size=300).items
        soft = (items > 0) & (items < 1)
        assert soft.flatten(1).any(1).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
            ({"kl_steps": 0}, "kl_steps must be at least 1"),
            ({"kl": "forward"}, "unknown kl 'forward'; expected one of"),
            ({"joint": True}, "joint=True draws reveals step by step and needs num_steps"),
        ],
    )
    def test_bad_values_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MaskedChain(**settings)

    def test_denoiser_must_fit(self):
        network = make_network({"type": "mlp", "horizon": 2, "dim": 3, "width": 8, "depth": 1})
        plans = Denoiser(network, VPCosine(), "x0")
        with pytest.raises(ValueError, match="for Denoiser use PlanChain"):
            RewardLoss(plans, TableReward(2, 3), MaskedChain(), kl_weight=0.1)
        sees_levels = multilinear_denoiser(2, 3, time_free=False)
        with pytest.raises(ValueError, match="needs num_steps=K"):
            RewardLoss(sees_levels, TableReward(2, 3), MaskedChain(), kl_weight=0.1)
        assert self.run(MaskedChain(4), time_free=False).items.shape == (40, 3, 2)
