"""Policies that see images: compiled, exported, served, in the real-time loop."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy.api import DiffusionPolicy
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField, each, take
from diffpolicy.networks.encoders import ImageEncoder
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime.backends import missing
from diffpolicy.runtime.clock import VirtualClock
from diffpolicy.runtime.compile import compile_loop, compile_planner
from diffpolicy.runtime.executor import RealTimeExecutor
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
    acts_alike(policy, fast)
    loop = fast._loops["cold", False]
    history, *rest = example_inputs(policy.loop(), 2)
    blurred = each(lambda one: one.float(), history)
    with pytest.raises(ValueError, match=r"history.* must be uint8, got torch\.float32"):
        loop(blurred, *rest)


@pytest.mark.parametrize("backend", ["eager", *ONNX])
def test_parts_of_a_loop_are_the_loop(backend):
    loop = seeing_policy().loop()
    inputs = LoopGraph(loop).example(2)
    parts = {p: compile_loop(loop, backend=backend, batch_size=2, part=p) for p in ("encoder", "rest")}
    history, *rest = example_inputs(loop, 2)
    with torch.inference_mode():
        wanted = LoopGraph(loop)(*inputs)
    from diffpolicy.policies.plan_loop import Encoded

    got = parts["rest"](Encoded(parts["encoder"](history)), *rest)
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("backend", ["eager", *ONNX[:1]])
@pytest.mark.parametrize(
    "settings",
    [
        {"truncated": Truncated(t_start=0.4, num_steps=1, sources=("previous", "draft"))},
        {
            "heads": {"critic": {"type": "critic", "width": 8}},
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
