"""Policies that see images: compiled, exported, served, in the real-time loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpolicy.api import DiffusionPolicy
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField, each, take, to_fields
from diffpolicy.data.store import EpisodeStore
from diffpolicy.networks.encoders import ImageEncoder
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.plan_loop import Encoded
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime.backends import missing
from diffpolicy.runtime.clock import VirtualClock
from diffpolicy.runtime.compile import compile_loop, compile_planner
from diffpolicy.runtime.executor import RealTimeExecutor
from diffpolicy.runtime.export import export_policy
from diffpolicy.runtime.exported import load_exported
from diffpolicy.runtime.graph import LoopGraph, example_inputs
from diffpolicy.runtime.planner import Timing
from diffpolicy.runtime.schedule import ActionLimits

CAMERA = ObsField((16, 16, 3), "uint8", "image")
KINDS = {
    "several": {"arm": ObsField((3,)), "front": CAMERA, "wrist": CAMERA},
    "bare": {"": CAMERA},
}
ONNX = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=f"needs {name}"))
    for name in ("onnxruntime", "openvino")
]


def seeing_policy(kind="several", **settings):
    """A small policy with cameras, whose weights are not at their initial zeros."""
    backbone = {"type": "cnn", "widths": [4, 8]}
    spec = PolicySpec(
        3 if kind == "several" else 0,
        2,
        horizon=8,
        n_action_steps=4,
        observations=KINDS[kind],
        encoder={"type": "images", "backbone": backbone, "dim": 4, "points": 4, "crop": 0.875},
        prediction="v",
        network={"type": "mlp", "width": 16, "depth": 1, "time_dim": 8},
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        **{"sampler": Sampler(num_steps=2), **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser, heads = spec.make_denoiser(), spec.make_heads()
        for parameter in denoiser.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    sizes = {"action": 2} | ({"obs.arm": 3} if kind == "several" else {})
    normalizer = Normalizer(
        dict.fromkeys(sizes, "minmax"),
        {name: torch.full((size,), 0.5) for name, size in sizes.items()},
        {name: torch.full((size,), 0.1) for name, size in sizes.items()},
    )
    return DiffusionPolicy(spec, denoiser, normalizer, heads=heads)


def sights(policy, lead, seed=0):
    """Random observations ``[*lead, ...]`` in the types that cameras give."""
    rng = np.random.default_rng(seed)

    def one(field):
        shape = (*lead, *field.shape)
        if field.is_image:
            return rng.integers(256, size=shape, dtype=np.uint8)
        return rng.standard_normal(shape).astype(np.float32)

    return each(one, policy.observed)


@pytest.fixture
def encoded_rows(monkeypatch):
    """Rows of every call of the encoder."""
    rows, plain = [], ImageEncoder.forward

    def counted(self, obs):
        found = plain(self, obs)
        rows.append(len(found))
        return found

    monkeypatch.setattr(ImageEncoder, "forward", counted)
    return rows


def acts_alike(policy, other, steps=5):
    """Both give the same actions over two plans or more."""
    states = [p.initial_state([1, 2]) for p in (policy, other)]
    for step in range(steps):
        obs = sights(policy, (2,), seed=step)
        wanted, states[0] = policy.act(obs, states[0])
        got, states[1] = other.act(obs, states[1])
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", *ONNX])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_from_pixels_to_plan(kind, backend):
    policy = seeing_policy(kind, rti=RTI(t_start=0.3, num_steps=6))  # its warm loop is rolled
    fast = compile_planner(policy, backend=backend, batch_size=2, threads=1)
    assert max(loop.error for loop in fast._loops.values() if hasattr(loop, "error")) <= 1e-4
    assert not any(module.training for module in policy.denoiser.modules())  # crops stay central
    acts_alike(policy, fast)
    assert not any(part.training for part in policy.denoiser.modules())  # which crops at random
    loop = fast._loops["cold", False]
    history, *rest = example_inputs(policy.loop(), 2)
    blurred = each(lambda one: one.float(), history)
    with pytest.raises(ValueError, match=r"history.* must be uint8, got torch\.float32"):
        loop(blurred, *rest)


@pytest.mark.parametrize("backend", ["eager", *ONNX])
def test_parts_of_a_loop_are_the_loop(backend):
    loop = seeing_policy().loop()
    inputs = LoopGraph(loop).example(2)
    parts = {
        p: compile_loop(loop, backend=backend, batch_size=2, part=p) for p in ("encoder", "rest")
    }
    history, *rest = example_inputs(loop, 2)
    with torch.inference_mode():
        wanted = LoopGraph(loop)(*inputs)
    got = parts["rest"](Encoded(parts["encoder"](history)), *rest)
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("backend", ["eager", *ONNX[:1]])
@pytest.mark.parametrize(
    "settings",
    [
        {"truncated": Truncated(t_start=0.4, num_steps=1, sources=("previous", "draft"))},
        {
            "heads": {"critic": {"type": "q_ensemble", "width": 8, "depth": 1}},
            "selection": Selection(num_candidates=3),
        },
    ],
    ids=["truncated", "best of N"],
)
def test_candidates_share_what_was_encoded(settings, backend, encoded_rows):
    policy = seeing_policy(**settings)
    fast = compile_planner(policy, backend=backend, batch_size=2)
    encoded_rows.clear()
    obs, state = sights(policy, (2,)), policy.initial_state([1, 2])
    wanted = policy.act(obs, state)[0]
    assert encoded_rows == [2]
    np.testing.assert_allclose(fast.act(obs, state)[0], wanted, atol=5e-5)
    assert sum(encoded_rows) == (4 if backend == "eager" else 2)  # there by the other runtime
    if policy.spec.truncated is not None:
        assert policy.plans(sights(policy, (2, 2)))[0].shape == (2, 2, 8, 2)


@pytest.mark.skipif(bool(missing("onnxruntime")), reason="needs the onnx extra")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("several", {"rti": RTI(t_start=0.3, num_steps=1)}),
        ("bare", {"sampler": Sampler(num_steps=6)}),  # rolled
        (
            "several",
            {"truncated": Truncated(t_start=0.4, num_steps=1, sources=("previous", "draft"))},
        ),
    ],
    ids=["warm", "bare, rolled", "draft"],
)
def test_exported_with_one_input_per_camera(kind, settings, tmp_path):
    policy = seeing_policy(kind, **settings)
    error = export_policy(policy, tmp_path / "e", batch_size=2).max_error
    assert error <= 1e-4
    running = load_exported(tmp_path / "e")
    ports = {
        p["name"]: (p["dtype"], p["shape"]) for p in running.contract["loops"]["cold"]["inputs"]
    }
    image = "uint8", [2, 2, 16, 16, 3]
    if kind == "several":
        assert ports["history.arm"] == ("float32", [2, 2, 3])
        assert ports["history.front"] == ports["history.wrist"] == image
    else:
        assert ports["history"] == image
    state = policy.initial_state([1, 2])
    for step in range(3):
        state = policy.observe(sights(policy, (2,), seed=step), state)
        noise = policy.draw_noise(state, running.draws("cold"), False).numpy()
        got = running.plan(state.history, executed=1, noise=noise)
        state = policy.execute(policy.replan(state, [0, 1]))[1]
        np.testing.assert_allclose(got.plan, state.plan, atol=1e-4)
    with pytest.raises(ValueError, match=r"history.* must be uint8, got float32"):
        running.plan(each(lambda one: one.astype(np.float32), state.history))


@pytest.mark.skipif(bool(missing("onnxruntime")), reason="needs the onnx extra")
def test_the_rows_of_an_image_policy_may_be_free(tmp_path):
    policy = seeing_policy()
    export_policy(policy, tmp_path / "e", batch_size=2, dynamic_batch=True)
    running, history = load_exported(tmp_path / "e"), sights(policy, (5, 2))
    noise = np.random.default_rng(1).standard_normal((1, 5, 8, 2)).astype(np.float32)
    whole = running.solve("cold", history, noise=noise)
    single = running.solve("cold", take(history, [3]), noise=noise[:, 3:4])
    np.testing.assert_allclose(whole.plan[3:4], single.plan, atol=5e-5)


def test_served_images_travel_as_they_are():
    pytest.importorskip("websockets")
    from diffpolicy.runtime.client import PolicyClient, ServerError
    from diffpolicy.runtime.serve import serving

    for kind in KINDS:
        policy = seeing_policy(kind)
        history = sights(policy, (2,))
        states = policy.initial_state([0])
        with serving(policy) as server, PolicyClient(server.host, server.port) as client:
            client.reset(seed=0)
            for step in range(2):
                wanted, states = policy.act(take(history, [step]), states)
                np.testing.assert_allclose(client.act(take(history, step)), wanted[0], atol=1e-5)
            assert client.plan(history).shape == (4, 2)
            with pytest.raises(ServerError, match="must be uint8, got float32"):
                client.act(each(lambda one: one[0].astype(np.float32), history))


def test_large_images_fit_into_a_request():
    """Two steps of a camera of 1080 lines are more than 4 MiB, the least that is accepted."""
    pytest.importorskip("websockets")
    from diffpolicy.runtime.serve import PolicyServer, ServeConfig

    policy = seeing_policy("bare")
    policy.observed = ObsField((1080, 1920, 3), "uint8", "image")
    assert PolicyServer(policy, ServeConfig()).longest_message > 2 * 1080 * 1920 * 3
    assert PolicyServer(seeing_policy()).longest_message == 1 << 22


@pytest.mark.parametrize("latency_ms", [20.0, 80.0])
def test_the_real_time_loop_keeps_its_rate_with_images(latency_ms):
    """At 20 Hz plans are in time, or late: every tick has an action that may be sent."""
    policy = seeing_policy(rti=RTI(t_start=0.3, num_steps=1))
    limits, clock = ActionLimits((0.0, 0.0), low=-1.0, high=1.0), VirtualClock([latency_ms])
    executor = RealTimeExecutor(policy, Timing(20.0, replan_after=2), limits, clock=clock)
    frames = iter([sights(policy, (), seed=step) for step in range(20)])
    sent = []
    report = executor.run(lambda: next(frames), sent.append, ticks=20)
    assert len(sent) == 20
    assert all(np.isfinite(one).all() and (abs(one) <= 1).all() for one in sent)
    assert report.bad_observations == report.worker_crashes == report.rejected_plans == 0
    assert report.sources["safe"] == (1 if latency_ms < 50 else 2)  # until the first plan comes
    assert (report.missed_deadlines > 0) == (latency_ms > 50)
    blurred = each(lambda one: one.astype(np.float32), sights(policy, ()))
    executor.tick(blurred)
    assert executor.report().bad_observations == 1


def test_the_level_is_chosen_with_each_image_encoded_once(encoded_rows):
    rng, rows = np.random.default_rng(0), 4 * 10
    policy = seeing_policy()
    seen = to_fields(sights(policy, (rows,)))
    action = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    store = EpisodeStore.from_arrays({**seen, "action": action}, np.arange(1, 5) * 10)
    encoded_rows.clear()
    chosen, report = policy.choose_rti(store, num_steps=1, n_action_steps=2, episodes=4)
    assert sum(encoded_rows) == rows
    assert chosen.spec.rti.t_start == report.t_start
    with pytest.raises(ValueError, match=r"rti\.innovation compares vectors, one 'obs' a step"):
        policy.choose_rti(store, innovation=3.0)
