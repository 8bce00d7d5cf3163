"""Losses of planners: what they count by hand, closed-form minimisers, and learning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpolicy.core import Denoiser, VPCosine, make_process
from diffpolicy.guidance import Layout
from diffpolicy.learn import DenoisingLoss, LossOutput, denoising_error
from diffpolicy.learn.cloning.planners import DraftLoss, InverseDynamicsLoss, SumOfLosses, ValueLoss
from diffpolicy.networks import make_network
from diffpolicy.networks.heads import make_head

H, O, A, TO = 5, 3, 2, 2  # noqa: E741
LAYOUTS = {
    kind: Layout(kind, obs_dim=O, action_dim=A, horizon=H, n_obs_steps=TO)
    for kind in ("action", "trajectory", "state")
}
SMALL = {"type": "mlp", "width": 16, "depth": 1}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def windows(count=6, dtype=torch.float32):
    g = seeded(1)
    shape = {"obs": (count, H, O), "action": (count, H, A), "return_to_go": (count, H)}
    batch = {name: torch.randn(s, generator=g, dtype=dtype) for name, s in shape.items()}
    valid = torch.ones(count, H, dtype=torch.bool)
    valid[0, 3:] = False  # ends after position 2
    valid[1, 0] = False  # begins at position 1, its now
    valid[2, 2:] = False  # now is the last step
    return {**batch, "valid": valid}


def denoiser_of(layout, cond_dim=0, prediction="eps"):
    torch.manual_seed(0)
    sizes = {"horizon": H, "dim": layout.dim, "cond_dim": cond_dim}
    network = make_network({**SMALL, **sizes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Denoiser(network, VPCosine(), prediction)


def head_of(kind, **settings):
    torch.manual_seed(0)
    sizes = {
        "inverse": {"obs_dim": O, "action_dim": A, "width": 16},
        "value": {"horizon": H, "dim": O + A, "base": SMALL},
        "draft": {"obs_dim": O, "horizon": H, "n_obs_steps": TO, "width": 16},
    }[kind]
    head = make_head({"type": kind, **sizes, **settings})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def test_known_entries_enter_clean_and_have_no_loss():
    layout, batch = LAYOUTS["trajectory"], windows()
    denoiser = denoiser_of(layout)
    inputs = []
    denoiser.network.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    objective = DenoisingLoss(denoiser, layout=layout)
    loss = objective(batch, seeded()).loss
    g = seeded()
    t = denoiser.process.sample_t((6, 1, 1), g)
    noise = torch.randn(6, H, O + A, generator=g)
    x0 = torch.cat([batch["obs"], batch["action"]], -1)
    x_t = denoiser.process.add_noise(x0, t, noise)
    known = torch.zeros(1, H, O + A, dtype=torch.bool)
    known[:, :TO, :O] = True
    seen = torch.where(known, x0, x_t)
    assert torch.equal(inputs[0], seen)
    error = (denoiser.raw(seen, t) - noise).square()
    free = error[(~known).expand_as(error)].view(6, -1)
    torch.testing.assert_close(loss, free.mean(1))
    # What the network says at known entries does not matter.
    denoiser.network.outward.bias.grad = None
    loss.mean().backward()
    grad = denoiser.network.outward.bias.grad.view(H, O + A)
    assert (grad[known[0]] == 0).all()
    assert (grad[~known[0]] != 0).all()
    assert set(objective.state_dict()) == {f"denoiser.{k}" for k in denoiser.state_dict()}


@pytest.mark.parametrize("mask_padding", [False, True])
def test_weights_are_those_of_a_weighted_mean(mask_padding):
    layout, batch = LAYOUTS["state"], windows()
    denoiser = denoiser_of(layout, 1, "x0")
    batch["return"] = torch.rand(6, 1)
    weights = layout.weights(next_obs=10)
    objective = DenoisingLoss(denoiser, layout=layout, weights=weights, mask_padding=mask_padding)
    loss = objective(batch, seeded()).loss
    g = seeded()
    t = denoiser.process.sample_t((6, 1, 1), g)
    noise = torch.randn(6, H, O, generator=g)
    x_t = denoiser.process.add_noise(batch["obs"], t, noise)
    seen = torch.cat([batch["obs"][:, :TO], x_t[:, TO:]], 1)
    error = (denoiser.raw(seen, t, batch["return"]) - batch["obs"]).square()
    for row in range(6):
        total = count = 0.0
        for k in range(TO, H):
            if not mask_padding or batch["valid"][row, k]:
                weight = 10.0 if k == TO else 1.0
                total, count = total + weight * error[row, k].sum(), count + weight * O
        expected = total / count if count else torch.zeros(())  # a window without any future
        torch.testing.assert_close(loss[row], expected)


def test_an_action_layout_is_the_loss_without_one_bit_for_bit():
    layout, batch = LAYOUTS["action"], windows()
    batch["obs"] = batch["obs"][:, :TO]
    denoiser = denoiser_of(layout, TO * O)
    for settings in ({}, {"mask_padding": True}, {"cond_dropout": 0.5}):
        plain = DenoisingLoss(denoiser, **settings)(batch, seeded()).loss
        again = DenoisingLoss(denoiser, layout=layout, **settings)(batch, seeded()).loss
        assert torch.equal(plain, again)


def test_a_return_is_a_further_part_of_the_condition_and_is_dropped_out():
    batch = windows()
    batch["return"] = torch.rand(6, 1)
    denoiser = denoiser_of(LAYOUTS["state"], 1)
    seen = []
    denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    DenoisingLoss(denoiser, layout=LAYOUTS["state"])(batch, seeded())
    assert torch.equal(seen[0], batch["return"])
    DenoisingLoss(denoiser, layout=LAYOUTS["state"], cond_dropout=0.5)(batch, seeded())
    kept = seen[1] != 0
    assert torch.equal(seen[1][kept], batch["return"][kept])
    assert 0 < kept.sum() < 6
    acting = denoiser_of(LAYOUTS["action"], TO * O + 1)
    acting.network.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    batch["obs"] = batch["obs"][:, :TO]
    DenoisingLoss(acting, layout=LAYOUTS["action"])(batch, seeded())
    assert torch.equal(seen[2], torch.cat([batch["obs"].flatten(1), batch["return"]], 1))


def test_inverse_dynamics_counts_the_pairs_from_now_that_hold_no_padding():
    head, batch = head_of("inverse"), windows()
    loss = InverseDynamicsLoss(head, TO)(batch, seeded()).loss
    for row in range(6):
        errors = [
            (head(batch["obs"][row, k], batch["obs"][row, k + 1]) - batch["action"][row, k])
            .square()
            .mean()
            for k in range(TO - 1, H - 1)
            if batch["valid"][row, k] and batch["valid"][row, k + 1]
        ]
        expected = torch.stack(errors).mean() if errors else torch.zeros(())
        torch.testing.assert_close(loss[row], expected)
    assert loss[2] == 0  # its now is the last step of an episode


@pytest.mark.parametrize("returns", [False, True])
def test_draft_counts_the_transitions_that_hold_no_padding(returns):
    head, batch = head_of("draft", returns=returns), windows()
    out = DraftLoss(head, LAYOUTS["state"])(batch, seeded())
    told = batch["return_to_go"].unsqueeze(-1)
    states, following = head(batch["obs"], told if returns else None)
    for row in range(6):
        pairs = [k for k in range(H - 1) if batch["valid"][row, k : k + 2].all()]
        expected = torch.stack(
            [(states[row, k] - batch["obs"][row, k + 1]).square().mean() for k in pairs]
        ).mean()
        if returns:
            expected = (
                expected
                + torch.stack(
                    [(following[row, k] - told[row, k + 1]).square().mean() for k in pairs]
                ).mean()
            )
        torch.testing.assert_close(out.loss[row], expected)
    assert set(out.metrics) == ({"state", "return"} if returns else {"state"})


def test_value_regresses_the_return_of_now_at_the_levels_of_the_denoiser():
    layout, batch, head = LAYOUTS["trajectory"], windows(), head_of("value")
    process, target = VPCosine(), batch["return_to_go"][:, TO - 1]
    x0 = torch.cat([batch["obs"], batch["action"]], -1)
    clean = ValueLoss(head, process, layout, "clean")(batch, seeded()).loss
    torch.testing.assert_close(clean, (head.score(None, x0) - target).square())
    loss = ValueLoss(head, process, layout)(batch, seeded()).loss
    g = seeded()  # level, then noise, as DenoisingLoss draws them
    t, noise = process.sample_t((6, 1, 1), g), torch.randn(6, H, O + A, generator=g)
    x_t = torch.where(layout.known, x0, process.add_noise(x0, t, noise))
    expected = (head(x_t, process.network_time(t)) - target).square()
    torch.testing.assert_close(loss, expected)


def test_value_of_action_plans_sees_the_observations():
    layout, batch = LAYOUTS["action"], windows()
    batch["obs"] = batch["obs"][:, :TO]
    head = head_of("value", dim=A, cond_dim=TO * O)
    loss = ValueLoss(head, VPCosine(), layout, "clean")(batch, seeded()).loss
    value = head.score(batch["obs"].flatten(1), batch["action"])
    torch.testing.assert_close(loss, (value - batch["return_to_go"][:, TO - 1]).square())


def objectives():
    trajectory, process = LAYOUTS["trajectory"], VPCosine()
    denoiser = denoiser_of(trajectory)
    inverse, value, draft = head_of("inverse"), head_of("value"), head_of("draft", returns=True)
    return {
        "denoising": DenoisingLoss(
            denoiser, layout=trajectory, weights=trajectory.weights(10, 5), mask_padding=True
        ),
        "inverse": InverseDynamicsLoss(inverse, TO),
        "value": ValueLoss(value, process, trajectory),
        "critic": ValueLoss(value, process, trajectory, "clean"),
        "draft": DraftLoss(draft, trajectory),
    }


@pytest.mark.parametrize("name", ["denoising", "inverse", "value", "critic", "draft"])
def test_gradients_by_finite_differences(name):
    objective = objectives()[name].double()
    batch = windows(dtype=torch.float64)
    torch.manual_seed(1)
    directions = [torch.randn_like(p) for p in objective.parameters()]

    def at(step):
        with torch.no_grad():
            for p, d in zip(objective.parameters(), directions, strict=True):
                p.add_(step * d)
        return objective(batch, seeded()).loss.mean()

    grads = torch.autograd.grad(at(0.0), list(objective.parameters()))
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    up, down = at(1e-6), at(-2e-6)
    assert ((up - down) / 2e-6).item() == pytest.approx(slope.item(), rel=1e-4)


def test_sum_of_losses_adds_examples_and_keeps_names():
    losses, batch = objectives(), windows()
    del losses["critic"]
    heads = nn.ModuleDict({n: losses[n].head for n in ("inverse", "value", "draft")})
    total = SumOfLosses(losses["denoising"].denoiser, heads, losses)
    out = total(batch, seeded())
    g = seeded()
    each = {name: loss(batch, g) for name, loss in losses.items()}
    torch.testing.assert_close(out.loss, sum(o.loss for o in each.values()))
    assert out.loss.shape == (6,)
    torch.testing.assert_close(out.metrics["inverse/loss"], each["inverse"].loss.mean())
    assert {f"{n}/loss" for n in losses} | {"draft/state", "draft/return"} == set(out.metrics)
    assert not any(value.requires_grad for value in out.metrics.values())
    names = set(total.state_dict())
    assert {n.split(".")[0] for n in names} == {"denoiser", "heads"}
    assert {n.split(".")[1] for n in names if n.startswith("heads.")} == set(heads)
    assert len(list(total.parameters())) == len(names)  # each of them once
    moved = total.double()
    assert moved is total
    assert losses["denoising"].weights.dtype == torch.float64  # their own buffers too
    assert total(windows(dtype=torch.float64), seeded()).loss.dtype == torch.float64


class Linear(nn.Module):
    """A problem whose value of noisy plans is linear: ``E[c x0 | x_t]`` with x0 ~ N(0, I)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.c = torch.randn(H, O + A) / 4

    def batch(self, count, g):
        x0 = torch.randn(count, H, O + A, generator=g)
        returns = (x0 * self.c).sum((1, 2))[:, None].expand(-1, H)
        return {"obs": x0[..., :O], "action": x0[..., O:], "return_to_go": returns}

    def expected(self, process, x_t, t, known):
        """Independent entries: ``E[x0 | x_t] = alpha x_t / (alpha^2 + sigma^2)``, or x_t."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = torch.where(known, 1.0, alpha / (alpha**2 + sigma**2))
        return (gain * x_t * self.c).sum((1, 2))


def fit(objective, batches, steps, lr=3e-3):
    optimizer, g = torch.optim.Adam(objective.parameters(), lr), seeded()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        objective(batches(g), g).loss.mean().backward()
        optimizer.step()


def test_value_learns_the_conditional_expectation_of_noisy_plans():
    layout, process, problem = LAYOUTS["trajectory"], VPCosine(), Linear()
    torch.manual_seed(0)
    base = {"type": "mlp", "width": 64, "depth": 1}
    head = make_head({"type": "value", "horizon": H, "dim": O + A, "base": base})
    objective = ValueLoss(head, process, layout)
    fit(objective, lambda g: problem.batch(128, g), 400, lr=1e-2)
    g = seeded(9)
    x0 = torch.randn(2000, H, O + A, generator=g)
    for at in (0.05, 0.4, 0.8):
        t = torch.full((1, 1, 1), at)
        x_t = process.add_noise(x0, t, torch.randn(x0.shape, generator=g))
        x_t = torch.where(layout.known, x0, x_t)
        expected = problem.expected(process, x_t, t, layout.known)
        with torch.no_grad():
            got = head(x_t, process.network_time(t))
        assert (got - expected).square().mean() < 0.03 * (x0 * problem.c).sum((1, 2)).var()


def test_inverse_dynamics_learns_a_linear_map():
    torch.manual_seed(2)
    into, drift = torch.randn(A, O), torch.randn(O, O) / 4

    def batch(g):
        obs, action = torch.randn(64, 1, O, generator=g), torch.randn(64, 1, A, generator=g)
        following = obs @ drift + action @ into
        return {"obs": torch.cat([obs, following], 1), "action": action.expand(-1, 2, -1)}

    head = make_head({"type": "inverse", "obs_dim": O, "action_dim": A, "width": 64})
    objective = InverseDynamicsLoss(head)
    fit(objective, batch, 300, lr=1e-2)
    with torch.no_grad():
        assert objective(batch(seeded(8)), seeded()).loss.mean() < 0.01


@pytest.mark.parametrize("base", ["gru", "transformer"])
def test_draft_learns_a_linear_system(base):
    """Rotation in a plane, and a return that falls by the first coordinate."""
    cos, sin = torch.tensor(0.3).cos(), torch.tensor(0.3).sin()
    turn = torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])

    def batch(g, count=64, steps=9):
        states = [torch.randn(count, 2, generator=g)]
        for _ in range(steps):
            states.append(states[-1] @ turn)
        obs = torch.stack(states[:-1], 1)
        start = torch.randn(count, 1, generator=g)
        return {"obs": obs, "return_to_go": start - 0.2 * (obs[..., 0].cumsum(1) - obs[..., 0])}

    torch.manual_seed(0)
    layout = Layout("state", obs_dim=2, action_dim=1, horizon=9, n_obs_steps=1)
    head = make_head(
        {"type": "draft", "obs_dim": 2, "horizon": 9, "n_obs_steps": 1, "returns": True,
         "base": base, "width": 32}
    )  # fmt: skip
    objective = DraftLoss(head, layout)
    fit(objective, batch, 300, lr=1e-2)
    unseen = batch(seeded(8), 256)
    with torch.no_grad():
        out = objective(unseen, seeded())
        plans = head.rollout(unseen["obs"][:, :1], unseen["return_to_go"][:, :1])
    assert out.metrics["state"] < 2e-3  # holding still errs by 0.09
    assert out.metrics["return"] < 2e-3
    assert torch.equal(plans[:, 0], unseen["obs"][:, 0])
    assert (plans - unseen["obs"]).square().mean() < 0.03  # eight steps of its own making


def test_loss_output_is_that_of_the_library():
    for name, objective in objectives().items():
        out = objective(windows(), seeded())
        assert isinstance(out, LossOutput), name
        assert out.loss.shape == (6,)


def test_a_few_pairs_of_each_window_estimate_the_mean_over_all():
    head, batch = head_of("inverse"), windows()
    whole = InverseDynamicsLoss(head, TO, max_pairs=None)(batch, seeded()).loss
    generator = torch.Generator().manual_seed(0)
    few = InverseDynamicsLoss(head, TO, max_pairs=1)
    draws = torch.stack([few({**batch, "valid": None}, generator).loss for _ in range(400)])
    plain = InverseDynamicsLoss(head, TO, max_pairs=None)({**batch, "valid": None}, seeded()).loss
    assert (draws.mean(0) - plain).abs().max() < 4 * draws.std(0).max() / 400**0.5
    assert whole.shape == plain.shape


def test_errors():
    trajectory, state = LAYOUTS["trajectory"], LAYOUTS["state"]
    with pytest.raises(ValueError, match="the network has dim=3, a 'trajectory' layout 5"):
        DenoisingLoss(denoiser_of(state), layout=trajectory)
    with pytest.raises(ValueError, match=r"weights must be \[1, 5, 3\], got \[5, 3\]"):
        DenoisingLoss(denoiser_of(state), layout=state, weights=torch.ones(5, 3))
    with pytest.raises(ValueError, match="must not be negative"):
        DenoisingLoss(denoiser_of(state), layout=state, weights=-torch.ones(1, 5, 3))
    with pytest.raises(ValueError, match="some must be positive at entries that are not known"):
        DenoisingLoss(denoiser_of(state), layout=state, weights=state.known.float())
    with pytest.raises(ValueError, match="unknown levels"):
        ValueLoss(head_of("value"), VPCosine(), trajectory, "noisy")
    with pytest.raises(ValueError, match="value head has dim=5, the layout 3"):
        ValueLoss(head_of("value"), VPCosine(), state)
    with pytest.raises(ValueError, match=r"build it with clean_time=-2\.7"):
        ValueLoss(head_of("value"), make_process("edm"), trajectory)
    with pytest.raises(ValueError, match="draft head has horizon=5, the layout 6"):
        DraftLoss(head_of("draft"), Layout("state", O, A, 6, TO))
    with pytest.raises(ValueError, match=r"needs obs .* with H > n_obs_steps"):
        InverseDynamicsLoss(head_of("inverse"), 2)(
            {**windows(), "obs": torch.zeros(6, 2, O)}, seeded()
        )
    with pytest.raises(ValueError, match="n_obs_steps must be at least 1"):
        InverseDynamicsLoss(head_of("inverse"), 0)
    denoiser, inverse = denoiser_of(state), head_of("inverse")
    with pytest.raises(ValueError, match="trains neither the denoiser nor the heads"):
        SumOfLosses(denoiser, nn.ModuleDict(), {"inverse": InverseDynamicsLoss(inverse)})


def test_weights_without_a_layout():
    denoiser, batch = denoiser_of(LAYOUTS["action"], TO * O), windows()
    batch["obs"] = batch["obs"][:, :TO]
    weights = torch.zeros(1, H, A)
    weights[:, 1] = 2.0
    loss = DenoisingLoss(denoiser, weights=weights)(batch, seeded()).loss
    g = seeded()
    t = denoiser.process.sample_t((6, 1, 1), g)
    noise = torch.randn(6, H, A, generator=g)
    only = torch.zeros(6, H, dtype=torch.bool)
    only[:, 1] = True
    cond = batch["obs"].flatten(1)
    expected = denoising_error(denoiser, batch["action"], t, noise, cond=cond, valid=only)
    torch.testing.assert_close(loss, expected)
