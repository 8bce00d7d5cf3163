"""Streaming diffusion: geometry, exact denoisers, rows, resets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from policies_truncated_law import truncated_law
from torch import Tensor, nn

from diffpolicy.core import Denoiser, VPCosine, make_process
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.starts import Ramp
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySampler, PolicySpec
from diffpolicy.policies.streaming import Streaming, StreamingPlanner, renoise_tables
from diffpolicy.settings import from_values

MLP = {"type": "mlp", "width": 16, "depth": 1, "t_kind": "position"}
STREAMED = {"network": MLP, "horizon": 12, "n_action_steps": 4, "level_law": "position"}


class GaussianPlan(nn.Module):
    """The exact clean estimate for plans ``N(0, cov)``, at any level of each position."""

    t_kinds = frozenset({"row", "position"})

    def __init__(self, cov: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # tells device and dtype
        self.cov, self.process = cov.double(), VPCosine()

    def embed_time(self, t: Tensor) -> Tensor:
        return t

    def forward(self, x, t, cond=None, *, time_emb=None):
        t = t.double() / 1000
        alpha, sigma = (v.expand(1, len(self.cov), 1)[0] for v in self._scales(t))
        noisy = alpha * self.cov * alpha.T + torch.diag(sigma[:, 0] ** 2)
        gain = torch.linalg.solve(noisy, alpha * self.cov).T  # cov A (A cov A + S^2)^-1
        return (gain.to(x.dtype) @ x).to(x.dtype)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.alpha(t), self.process.sigma(t)


def identity_normalizer(obs_dim=1, action_dim=1):
    row = {"count": 9, "min": [-1.0], "max": [1.0], "mean": [0.0], "std": [1.0]}
    row |= {"q01": [-1.0], "q99": [1.0]}
    wide = lambda dim: {k: v * dim if isinstance(v, list) else v for k, v in row.items()}  # noqa: E731
    stats = {"obs": wide(obs_dim), "action": wide(action_dim)}
    return Normalizer.fit(stats, {"obs": "identity", "action": "identity"})


def exact_streaming(cov, streaming, **changes):
    values = {
        "horizon": len(cov),
        "n_obs_steps": 2,
        "n_action_steps": 4,
        "clip": False,
        "sampler": Sampler(num_steps=20),
        "prediction": "x0",
        "level_law": "position",
    }
    spec = PolicySpec(1, 1, **{**values, **changes})
    denoiser = Denoiser(GaussianPlan(cov), VPCosine(), "x0")
    return StreamingPlanner(spec, denoiser, identity_normalizer(), streaming=streaming)


def run_streaming(policy, steps, seeds, obs=None):
    state, actions = policy.initial_state(seeds), []
    for i in range(steps):
        row = np.zeros((len(state), policy.obs_dim), np.float32) if obs is None else obs[i]
        action, state = policy.act(row, state)
        actions.append(action)
    return np.stack(actions), state


# Known answers


@pytest.mark.parametrize("fill", ["denoise", "noise"])
def test_independent_positions_have_the_closed_form_std(fill):
    """Every action is DDIM along the whole ramp: its std is the product of the step factors."""
    std, horizon, steps = 0.5, 13, 5
    policy = exact_streaming(
        std**2 * torch.eye(horizon), Streaming(steps, fill), sampler=Sampler(num_steps=15)
    )
    assert policy.ramp.chunks == 3
    assert policy.nfe_per_chunk == steps
    actions, state = run_streaming(policy, 4 * 9, range(600))
    settled = actions[4 * 3 :, :, 0]
    grid = torch.linspace(1, 0, 3 * steps + 1, dtype=torch.float64)
    expected = truncated_law(VPCosine(), 1.0, mode_std=std, grid=grid).std
    assert expected == pytest.approx(std, rel=0.1)  # the exact denoiser's, but for 15 steps
    assert abs(settled.mean()) < 4 * std / settled.size**0.5
    assert settled.std() == pytest.approx(expected, rel=4 / (2 * settled.size) ** 0.5)
    if fill == "noise":
        assert state.nfe.tolist() == [9 * steps] * 600
        first = actions[:4, :, 0]  # zeros noised to 1/3 only: too narrow
        assert first.std() < 0.85 * expected
    else:
        assert state.nfe.tolist() == [15 + 8 * steps] * 600


@pytest.mark.parametrize(
    ("solver", "steps", "std_tol"), [("dpmpp_2m", 8, 0.04), ("ddpm", 16, 0.09)]
)
def test_correlated_plans_keep_their_law_after_many_ticks(solver, steps, std_tol):
    """AR(1) with its exact denoiser: the marginal stays, and the correlation within a chunk.

    Between chunks part of it is lost: past actions are known to the network only as noised to the
    first chunk's level.
    """
    std, rho, horizon = 0.5, 0.8, 13
    lag = torch.arange(horizon)[:, None] - torch.arange(horizon)
    policy = exact_streaming(
        std**2 * rho ** lag.abs(), Streaming(steps), sampler=Sampler(solver=solver, num_steps=24)
    )
    actions = run_streaming(policy, 4 * 9, range(400))[0][4 * 4 :, :, 0]
    assert abs(actions.mean()) < 0.02
    np.testing.assert_allclose(actions.std(1), std, rtol=0.2)  # 400 rows: sd of a std 3.5 %
    assert actions.std() == pytest.approx(std, rel=std_tol)
    pairs = (actions[:-1] * actions[1:]).mean(1) / actions.var()
    seams = pairs[3::4]  # between the last action of a chunk and the first of the next
    assert np.delete(pairs, np.s_[3::4]).mean() == pytest.approx(rho, abs=0.04)
    assert 0.5 < seams.mean() < rho


def test_early_replanning_keeps_the_law():
    """Replanning at every step noises the buffer up by the right amount each time."""
    std, horizon = 0.5, 13
    cov = std**2 * torch.eye(horizon)
    policy = exact_streaming(cov, Streaming(6), sampler=Sampler(solver="dpmpp_2m", num_steps=20))
    newest = TemporalEnsemble(policy, -1e6)
    actions, state = run_streaming(newest, 24, range(200))
    assert actions[12:].std() == pytest.approx(std, rel=0.05)
    assert state.plans.tolist() == [24] * 200
    assert state.nfe.tolist() == [20 + 23 * 6] * 200


def test_the_first_plan_is_the_full_samplers():
    policy = exact_streaming(
        0.25 * torch.eye(9), Streaming(3), sampler=Sampler(solver="ddpm", num_steps=6)
    )
    plain = DiffusionPlanner(policy.spec, policy.denoiser, policy.normalizer)
    a, b = (run_streaming(p, 4, range(3))[0] for p in (policy, plain))
    assert np.array_equal(a, b)


def test_geometry():
    ramp = Ramp(horizon=12, n_obs_steps=2, n_action_steps=4)  # 1 past + 4 + 4 + 3 spare
    assert ramp.chunks == 2
    assert ramp.clean == 5
    assert ramp.index().tolist() == [0] * 5 + [1] * 4 + [2] * 3
    grid = ramp.grid(2)[:, 0, :, 0]
    assert grid[0].tolist() == [0.5] * 5 + [1.0] * 7
    assert grid[1].tolist() == [0.25] * 5 + [0.75] * 4 + [1.0] * 3
    assert grid[2].tolist() == [0.0] * 5 + [0.5] * 4 + [1.0] * 3
    published = Ramp(20, 2, 8)  # SDP's configuration: h = 2, half of N evaluations per chunk
    assert published.chunks == 2
    assert published.clean == 9


@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear", "ddpm_cosine", "edm", "flow"])
def test_the_buffer_is_noised_up_to_where_a_tick_starts(name):
    """Signal and variance after a shift by e are those of the tick's first levels."""
    process, ramp = make_process(name), Ramp(14, 2, 4)
    keep, add = (v[..., 0].double() for v in renoise_tables(process, ramp))
    start = ramp.levels(torch.ones(1, 1, dtype=torch.float64))[:, 0]
    end = ramp.levels(torch.zeros(1, 1, dtype=torch.float64))[:, 0]
    for e in range(5):
        inside = torch.arange(14) + e < 14
        source = torch.where(inside, end[(torch.arange(14) + e).clamp(max=13)], 1.0)
        variance = (keep[e] * process.sigma(source)) ** 2 + add[e] ** 2
        torch.testing.assert_close(variance, process.sigma(start) ** 2, rtol=1e-5, atol=1e-6)
        signal = torch.where(start < 1, process.alpha(start), 0.0)
        got = keep[e] * process.alpha(source)
        moving = (start < 1) | (source < 1)
        torch.testing.assert_close(got[moving], signal[moving], rtol=1e-5, atol=1e-6)
    assert keep[4, 1:9].tolist() == [1.0] * 8  # a whole chunk: only the past is noised again
    assert add[4, 0] > 0


# Behaviour


def test_a_tick_leaves_positions_that_do_not_move(make_planner):
    for solver in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc", "heun", "deis"):
        policy = streaming_planner(make_planner, sampler=Sampler(solver=solver, num_steps=4))
        loop = policy.loop("warm")
        guess = torch.randn(2, 12, 2)
        noise = torch.randn(loop.draws, 2, 12, 2)
        with torch.no_grad():
            both = loop(torch.zeros(2, 2, 3), guess, noise)
        assert both.shape == (2, 24, 2)
        assert torch.equal(both[:, 21:], guess[:, 9:]), solver  # spare positions: still pure noise
        assert both.isfinite().all()
        assert torch.equal(both[:, :5], both[:, 12:17])  # finished actions are in both parts
        assert (both[:, :12].abs() <= 1 + 1e-5).all()  # and the rest of the plan is an estimate


def streaming_planner(make_planner, streaming=None, **changes):
    plain = make_planner(**{**STREAMED, **changes})
    streaming = Streaming(3) if streaming is None else streaming
    return StreamingPlanner(plain.spec, plain.denoiser, plain.normalizer, streaming=streaming)


def observed(steps, count):
    return np.random.default_rng(0).standard_normal((steps, count, 3)).astype(np.float32)


@pytest.mark.parametrize("fill", ["denoise", "noise", "constant"])
def test_permuting_environments_permutes_actions(make_planner, fill):
    constant = (0.3, -0.2) if fill == "constant" else None
    policy = streaming_planner(make_planner, Streaming(2, fill, constant))
    obs, seeds, order = observed(14, 4), np.array([3, 1, 4, 15]), np.array([2, 0, 3, 1])
    straight, _ = run_streaming(policy, 14, seeds, obs)
    permuted, _ = run_streaming(policy, 14, seeds[order], obs[:, order])
    np.testing.assert_allclose(permuted, straight[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fill", ["denoise", "noise"])
def test_reset_clears_one_row_only(make_planner, fill):
    policy = streaming_planner(make_planner, Streaming(2, fill))
    obs = observed(16, 3)
    straight, _ = run_streaming(policy, 16, [0, 1, 2], obs)
    _, state = run_streaming(policy, 6, [0, 1, 2], obs)
    state = policy.forget(state, np.array([False, True, False]), seeds=[1])
    assert not state.memory["buffer"][1].any()
    assert state.memory["buffer"][0].any()
    after = []
    for row in obs[:10]:
        mixed = np.stack([obs[6 + len(after)][0], row[1], obs[6 + len(after)][2]])
        action, state = policy.act(mixed, state)
        after.append(action)
    after = np.stack(after)
    np.testing.assert_allclose(after[:, [0, 2]], straight[6:, [0, 2]], rtol=0, atol=1e-5)
    # With its old stream from 0 again, the row repeats its episode: nothing of it was left.
    np.testing.assert_allclose(after[:, 1], straight[:10, 1], rtol=0, atol=1e-5)


def test_a_row_that_executed_too_much_is_filled_anew(make_planner):
    policy = streaming_planner(make_planner)
    _, state = run_streaming(policy, 4, range(2), observed(4, 2))
    late = dataclasses.replace(state, cursor=state.cursor + np.array([0, 1]))
    planned = policy.replan(late, [0, 1])
    assert (planned.nfe - state.nfe).tolist() == [3, 4]  # a tick, a full sample


def test_pure_and_deterministic(make_planner):
    policy = streaming_planner(make_planner, sampler=Sampler(solver="ddpm", num_steps=4))
    obs = np.repeat(observed(1, 1), 2, axis=1)[0]
    state = policy.initial_state([1, 2])
    for _ in range(5):
        first, after = policy.act(obs, state, deterministic=True)
        again, _ = policy.act(obs, state, deterministic=True)
        assert np.array_equal(first, again)
        np.testing.assert_allclose(first[0], first[1], rtol=0, atol=1e-6)
        state = after
    assert policy.loop("warm", deterministic=True).draws == 0


def test_a_compiled_tick_takes_the_place_of_the_eager_one(make_planner):
    policy = streaming_planner(make_planner)
    calls = []

    class Counted:
        def __init__(self, loop):
            self.loop, self.nfe, self.draws = loop, loop.nfe, loop.draws

        def __call__(self, *inputs):
            calls.append(len(inputs[0]))
            return self.loop(*inputs)

    other = policy.with_loops({"warm": Counted(policy.loop("warm"))})
    obs = observed(9, 2)
    a, b = (run_streaming(p, 9, [0, 1], obs)[0] for p in (policy, other))
    assert np.array_equal(a, b)
    assert calls == [2, 2]


def test_constant_fill_begins_at_that_action(make_planner):
    """Given in environment units, kept in the buffer's; it shows in the first plan."""
    plans = []
    for value in (-0.9, 0.9):
        policy = streaming_planner(make_planner, Streaming(1, "constant", (value, value)))
        state = policy.observe(np.zeros((1, 3), np.float32), policy.initial_state([0]))
        buffer = policy._noised(torch.from_numpy(policy._constant).expand(1, 12, 2), 1.0, 0)
        alpha = VPCosine().alpha(torch.tensor(0.5)).item()
        assert buffer[0, 0].tolist() == pytest.approx([alpha * value] * 2, rel=1e-5)
        plans.append(policy.replan(state, [0]).plan)
    assert np.abs(plans[0] - plans[1]).max() > 1e-3


# Bad input


def test_errors(make_planner):
    with pytest.raises(ValueError, match=r"at least two chunks.*horizon=8"):
        streaming_planner(make_planner, horizon=8)
    with pytest.raises(ValueError, match="not per position"):
        streaming_planner(make_planner, network={"type": "mlp", "width": 8})
    with pytest.raises(ValueError, match="steps_per_chunk must be at least 1"):
        Streaming(0)
    with pytest.raises(ValueError, match="unknown fill 'zero'"):
        Streaming(fill="zero")
    with pytest.raises(ValueError, match="needs constant="):
        Streaming(fill="constant")
    with pytest.raises(ValueError, match=r"streaming.constant must be \[2\]"):
        streaming_planner(make_planner, Streaming(2, "constant", (0.0,)))
    with pytest.raises(ValueError, match="unknown key 'steps'"):
        from_values(Streaming, {"steps": 3})
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        Ramp(12, 2, 4).grid(0)
    policy = streaming_planner(make_planner)
    with pytest.raises(ValueError, match="runs the loops"):
        policy.loop("hot")
    with pytest.raises(ValueError, match=r"level_law='position'.*trained with 'row'"):
        streaming_planner(make_planner, level_law="row")
    searched = {"solver": "bespoke", "levels": (0.5, 0.0), "options": {"weights": [[], [-0.5]]}}
    with pytest.raises(ValueError, match="a searched sampler is for full solves"):
        streaming_planner(make_planner, Streaming(2), sampler=PolicySampler(**searched))
    with pytest.raises(ValueError, match="neither rti nor truncated"):
        streaming_planner(make_planner, rti=RTI(t_start=0.3))
    assert from_values(Streaming, {"fill": "constant", "constant": [0, 1]}).constant == (0.0, 1.0)
