"""Compiled loops against eager PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySampler, PolicySpec
from diffpolicy.policies.streaming import Streaming, StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime import backends
from diffpolicy.runtime import compile as compiling
from diffpolicy.runtime.backends import BUILDERS, missing
from diffpolicy.runtime.compile import (
    CompiledLoop,
    available_backends,
    compile_loop,
    compile_planner,
    fastest,
    measure,
)
from diffpolicy.runtime.graph import example_inputs
from diffpolicy.runtime.rolled import RolledLoop, rolled

COMPILE_NETWORKS = {
    "mlp": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8},
    "unet1d": {"type": "unet1d", "down_dims": [8, 16], "diffusion_step_embed_dim": 8},
    "transformer": {"type": "transformer", "width": 16, "depth": 1, "heads": 2},
}
COMPILE_SOLVERS = {
    "ddim": Sampler(num_steps=2),
    "ddpm": Sampler(num_steps=2, options={"eta": 1.0}),
    "dpmpp": Sampler(solver="dpmpp_2m", num_steps=3),
    "unipc": Sampler(solver="unipc", num_steps=3),
}


def compiled_test_planner(network="mlp", sampler=None, *, anchors=None, **spec):
    """A small policy whose weights are not at their initial zeros."""
    values = PolicySpec(
        obs_dim=3,
        action_dim=2,
        horizon=8,
        network=network if isinstance(network, dict) else COMPILE_NETWORKS[network],
        sampler=sampler or Sampler(num_steps=3),
        **{"n_action_steps": 4, **spec},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = values.make_denoiser()
        for parameter in denoiser.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    normalizer = Normalizer(
        {"obs": "minmax", "action": "minmax"},
        {"obs": torch.tensor([0.5, 2.0, 1.0]), "action": torch.tensor([0.5, 4.0])},
        {"obs": torch.tensor([0.1, -1.0, 0.0]), "action": torch.tensor([0.2, 0.0])},
    )
    return DiffusionPlanner(values, denoiser, normalizer, anchors)


def eager_plans(loop, inputs):
    with torch.inference_mode():
        return loop(*inputs)


def backend_here(name):
    absent = missing(name)
    return pytest.param(
        name, marks=pytest.mark.skipif(bool(absent), reason=f"needs {' and '.join(absent)}")
    )


ONNX_BACKENDS = [backend_here("onnxruntime"), backend_here("openvino")]


@pytest.fixture(scope="module")
def exported_once():
    """ONNX bytes by network and solver: tracing is what takes the time of these tests."""
    made = {}
    trace = backends.to_onnx

    def remembered(key):
        def to_onnx(*arguments, **options):
            if key not in made:
                made[key] = trace(*arguments, **options)
            return made[key]

        return to_onnx

    return remembered


@pytest.mark.parametrize("backend", ["eager", *ONNX_BACKENDS])
@pytest.mark.parametrize("solver", COMPILE_SOLVERS)
@pytest.mark.parametrize("network", COMPILE_NETWORKS)
def test_same_plans_as_eager(backend, network, solver, exported_once, monkeypatch):
    monkeypatch.setattr(backends, "to_onnx", exported_once((network, solver)))
    loop = compiled_test_planner(network, COMPILE_SOLVERS[solver]).loop("cold")
    compiled = compile_loop(loop, backend=backend, batch_size=2, threads=1)
    inputs = example_inputs(loop, 2, seed=7)
    expected = eager_plans(loop, inputs)
    assert expected.abs().max() > 0.05  # not trivially zero
    torch.testing.assert_close(compiled(*inputs), expected, atol=5e-5, rtol=0)
    assert compiled.error <= 1e-4
    assert (compiled.nfe, compiled.draws) == (loop.nfe, loop.draws)


ROLLED_SAMPLERS = {
    "ddpm": Sampler(num_steps=7, options={"eta": 1.0}),
    "unipc": Sampler(solver="unipc", num_steps=8),
    "heun": Sampler(solver="heun", num_steps=4),
    "deis": Sampler(solver="deis", num_steps=6),
}


@pytest.mark.parametrize("solver", ROLLED_SAMPLERS)
@pytest.mark.parametrize("layout", ["action", "trajectory"])
def test_a_rolled_loop_is_the_loop(solver, layout):
    sampler, guided = ROLLED_SAMPLERS[solver], {}
    if layout == "action":
        sampler = PolicySampler(**vars(sampler), guidance_scale=1.5)
        guided = {"cond_dropout": 0.1}
    planner = compiled_test_planner(sampler=sampler, layout=layout, temperature=0.5, **guided)
    loop = planner.loop("cold")
    one = rolled(loop)
    assert isinstance(one, RolledLoop)
    for rows in (1, 3):
        inputs = example_inputs(loop, rows, seed=rows)
        torch.testing.assert_close(
            eager_plans(one, inputs), eager_plans(loop, inputs), atol=2e-6, rtol=0
        )


@pytest.mark.parametrize("backend", ONNX_BACKENDS)
@pytest.mark.parametrize("network", COMPILE_NETWORKS)
def test_graphs_do_not_grow_with_the_evaluations(network, backend, exported_once, monkeypatch):
    graphs = []
    for steps in (6, 20):
        trace = exported_once((network, steps))
        monkeypatch.setattr(
            backends, "to_onnx", lambda *a, trace=trace: graphs.append(trace(*a)) or graphs[-1]
        )
        sampler = Sampler(solver="dpmpp_2m", num_steps=steps)
        loop = compiled_test_planner(network, sampler).loop("cold")
        compiled = compile_loop(loop, backend=backend, batch_size=2, threads=1)
        inputs = example_inputs(loop, 2, seed=7)
        torch.testing.assert_close(compiled(*inputs), eager_plans(loop, inputs), atol=5e-5, rtol=0)
    assert len(graphs[1]) < 2 * len(graphs[0])  # constants and time embeddings alone


def test_auto_passes_over_what_fails(monkeypatch, caplog):
    def broken(module, example, threads):
        raise OSError("a library is missing")

    for name in ("onnxruntime", "openvino", "cuda_graph"):
        monkeypatch.setitem(BUILDERS, name, broken)
    loop = compiled_test_planner().loop("cold")
    best = fastest(loop, 1, seconds=0.0)
    assert best.backend == "eager"
    assert set(best.failed) == set(available_backends()) - {"eager"}
    assert all(said == "OSError: a library is missing" for said in best.failed.values())
    with pytest.raises(OSError, match="a library is missing"):
        fastest(loop, 1, ["onnxruntime"] if not missing("onnxruntime") else ["openvino"])


@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("backend", ONNX_BACKENDS)
def test_warm_loops_use_the_guess(backend, renoise):
    planner = compiled_test_planner(rti=RTI(t_start=0.3, num_steps=2, renoise=renoise))
    loop = planner.loop("warm")
    compiled = compile_loop(loop, backend=backend, batch_size=1)
    history, guess, noise = example_inputs(loop, 1)
    assert compiled.uses_guess
    assert compiled.draws == int(renoise)
    torch.testing.assert_close(
        compiled(history, guess, noise), eager_plans(loop, (history, guess, noise))
    )
    moved = compiled(history, -guess, noise)
    assert (moved - compiled(history, guess, noise)).abs().max() > 1e-3


@pytest.mark.parametrize("count", [0, 1, 3, 7])
@pytest.mark.parametrize("backend", ["eager", *ONNX_BACKENDS])
def test_other_batch_sizes_are_cut_and_padded(backend, count):
    loop = compiled_test_planner("mlp", COMPILE_SOLVERS["ddpm"]).loop("cold")
    compiled = compile_loop(loop, backend=backend, batch_size=3)
    inputs = example_inputs(loop, count, seed=3)
    plans = compiled(*inputs)
    assert plans.shape == (count, 8, 2)
    torch.testing.assert_close(plans, eager_plans(loop, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cheap", ["groups", "eager"])
def test_more_rows_than_it_was_built_for_go_the_faster_way(cheap, monkeypatch):
    calls, loop = [], compiled_test_planner().loop("cold")

    def counted(module, example, threads):
        def run(*inputs):
            calls.append(len(inputs[0]))
            return eager_plans(module, inputs)

        return run

    monkeypatch.setitem(BUILDERS, "onnxruntime", counted)
    monkeypatch.setattr(
        compiling, "measure", lambda runs, inputs, **_: {n: float(n != cheap) for n in runs}
    )
    compiled = compile_loop(loop, backend="onnxruntime", batch_size=1)
    inputs = example_inputs(loop, 64)
    calls.clear()
    history, guess, noise = inputs
    each = [(history[i : i + 1], guess[i : i + 1], noise[:, i : i + 1]) for i in range(64)]
    parts = each if cheap == "groups" else [inputs]  # to the bit: rows in other batches round apart
    assert torch.equal(compiled(*inputs), torch.cat([eager_plans(loop, part) for part in parts]))
    assert calls == ([1] * 64 if cheap == "groups" else [])
    assert len(compiled._ways) == 1


def test_auto_measures_the_batch_that_it_is_asked_for(monkeypatch):
    rows, plain = [], measure

    def noted(runs, inputs, **options):
        rows.append((sorted(runs), len(inputs[0])))
        return {name: float(name != "eager") for name in plain(runs, inputs, seconds=0.0)}

    monkeypatch.setattr(compiling, "measure", noted)
    fast = compile_planner(compiled_test_planner(), backend="auto", batch_size=64)
    assert rows == [(sorted(available_backends()), 64)]
    assert fast._loops["cold", False].backend == "eager"


def test_results_are_not_overwritten_by_the_next_call():
    loop = compiled_test_planner().loop("cold")
    for backend in available_backends():
        compiled = compile_loop(loop, backend=backend, batch_size=1)
        first = compiled(*example_inputs(loop, 1, seed=1))
        kept = first.clone()
        compiled(*example_inputs(loop, 1, seed=2))
        assert torch.equal(first, kept), backend


@pytest.mark.slow
def test_torch_compile(monkeypatch):
    """The compiler takes the loop; every layer of a network would cost it seconds more."""
    planner = compiled_test_planner(sampler=Sampler(num_steps=1))
    monkeypatch.setattr(
        planner.denoiser.network,
        "forward",
        lambda x, t, cond, **_: torch.tanh(x + cond[:, None, :2]),
    )
    loop = planner.loop("cold")
    compiled = compile_loop(loop, backend="torch.compile", batch_size=2)
    inputs = example_inputs(loop, 2, seed=7)
    torch.testing.assert_close(compiled(*inputs), eager_plans(loop, inputs), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("network", COMPILE_NETWORKS)
def test_cuda_graph(network, solver):
    planner = compiled_test_planner(network, COMPILE_SOLVERS[solver])
    planner = DiffusionPlanner(planner.spec, planner.denoiser.cuda(), planner.normalizer)
    loop = planner.loop("cold")
    compiled = compile_loop(loop, backend="cuda_graph", batch_size=2)
    for seed in range(3):
        inputs = example_inputs(loop, 3, seed=seed)
        torch.testing.assert_close(compiled(*inputs), eager_plans(loop, inputs), atol=1e-5, rtol=0)
    first = compiled(*example_inputs(loop, 2, seed=1))
    kept = first.clone()
    compiled(*example_inputs(loop, 2, seed=2))
    assert torch.equal(first, kept)


def test_cuda_graph_needs_cuda():
    with pytest.raises(ValueError, match="'cuda_graph' runs on cuda, and this policy is on cpu"):
        compile_loop(compiled_test_planner().loop("cold"), backend="cuda_graph", batch_size=1)


def test_a_backend_that_differs_is_refused(monkeypatch):
    def wrong(module, example, threads):
        return lambda *inputs: eager_plans(module, inputs) + 2e-4

    monkeypatch.setitem(BUILDERS, "eager", wrong)
    with pytest.raises(ValueError, match=r"'eager' differs from eager PyTorch by 2\.00e-04"):
        compile_loop(compiled_test_planner().loop("cold"), backend="eager", batch_size=1)


@pytest.mark.parametrize(("prediction", "refused"), [("eps", False), ("x0", True)])
def test_ill_conditioned_loops_are_judged_by_their_own_rounding(prediction, refused, monkeypatch):
    """One step from t = 1 divides the noise estimate's rounding by alpha(1) = 5e-4."""
    process, once = {"type": "ddpm_cosine"}, Sampler(num_steps=1)
    planner = compiled_test_planner(process=process, sampler=once, prediction=prediction)
    network = planner.denoiser.network
    inner = network.forward
    monkeypatch.setattr(network, "forward", lambda x, *a, **k: x + 1e-3 * inner(x, *a, **k))

    def jittered(module, example, threads):
        return lambda history, guess, noise: eager_plans(module, (history, guess, noise)) + 2e-4

    monkeypatch.setitem(BUILDERS, "eager", jittered)
    if refused:
        with pytest.raises(ValueError, match="differs from eager PyTorch by"):
            CompiledLoop(planner.loop("cold"), "eager", 2)
    else:
        assert CompiledLoop(planner.loop("cold"), "eager", 2).error == pytest.approx(2e-4, rel=0.1)


def test_weights_that_are_not_finite_are_refused():
    planner = compiled_test_planner()
    next(planner.denoiser.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: the weights are damaged"):
        compile_loop(planner.loop("cold"), backend="eager", batch_size=1)


def test_fastest_takes_the_lowest_median_and_tells_all():
    loop = compiled_test_planner().loop("cold")
    best = fastest(loop, 1, seconds=0.05)
    assert set(best.timings) == set(available_backends())
    assert best.backend == min(best.timings, key=best.timings.__getitem__)
    only = fastest(loop, 1, ["eager"], seconds=0.0)
    assert only.backend == "eager"
    with pytest.raises(ValueError, match="no backend to choose from"):
        fastest(loop, 1, [])


def test_measure_takes_turns():
    order = []
    runs = {name: lambda *_, name=name: order.append(name) for name in "ab"}
    nothing = (torch.zeros(1),) * 3
    assert set(measure(runs, nothing, seconds=0)) == {"a", "b"}
    assert order == ["a", "b"] * 4  # one warm-up and three turns


def test_available_backends_are_installed_and_of_the_device(monkeypatch):
    assert available_backends()[0] == "eager"
    assert "cuda_graph" not in available_backends("cpu")
    assert set(available_backends("cuda")) == {"eager", "cuda_graph"}
    monkeypatch.setattr(compiling, "missing", lambda name: ["x"] if name == "openvino" else [])
    assert available_backends() == ("eager", "onnxruntime")


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_missing_packages_say_how_to_install_them(monkeypatch, backend, extra):
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(ImportError, match=rf'pip install "diffpolicy\[{extra}\]"'):
        compile_loop(compiled_test_planner().loop("cold"), backend=backend)


def test_packages_that_vanish_while_building(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[onnx\]"'):
        BUILDERS["onnxruntime"](torch.nn.Identity(), [torch.zeros(1)], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, r"unknown backend 'tensorrt'; expected one of .*openvino"),
        ({"backend": "eager", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"backend": "eager", "threads": -1}, "threads must be at least 1, got -1"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(ValueError, match=message):
        compile_loop(compiled_test_planner().loop("cold"), **options)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_wrong_shapes(which):
    loop = compiled_test_planner().loop("cold")
    compiled = CompiledLoop(loop, "eager", 2)
    inputs = list(example_inputs(loop, 2))
    inputs[which] = inputs[which][..., :-1]
    name = ("history", "guess", "noise")[which]
    with pytest.raises(ValueError, match=rf"{name} must be \["):
        compiled(*inputs)
    inputs = list(example_inputs(loop, 2))
    inputs[which] = inputs[which].double()
    with pytest.raises(ValueError, match=f"{name} must be float32, got torch.float64"):
        compiled(*inputs)


@pytest.mark.parametrize("backend", ["eager", *ONNX_BACKENDS])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_compiled_policy_acts_as_the_policy(backend, eta):
    planner = compiled_test_planner(
        sampler=Sampler(num_steps=3, options={"eta": eta}),
        rti=RTI(t_start=0.2, num_steps=2),
    )
    fast = compile_planner(planner, backend=backend, batch_size=2)
    assert planner._loops["cold", False] is not fast._loops["cold", False]
    rng = np.random.default_rng(0)
    for deterministic in (False, True):
        states = [p.initial_state([1, 2, 3]) for p in (planner, fast)]
        for _ in range(10):
            obs = rng.standard_normal((3, 3)).astype(np.float32)
            slow_action, states[0] = planner.act(obs, states[0], deterministic=deterministic)
            fast_action, states[1] = fast.act(obs, states[1], deterministic=deterministic)
            np.testing.assert_allclose(fast_action, slow_action, atol=1e-5)
        assert (states[0].nfe == states[1].nfe).all()
        assert (states[1].plans == 3).all()


@pytest.mark.parametrize("backend", ["eager", *ONNX_BACKENDS])
def test_truncated_policies_compile_their_loops(backend):
    anchors = Anchors(
        2 * torch.rand(3, 8, 2, generator=torch.Generator().manual_seed(0)) - 1,
        torch.full((3,), 1 / 3),
        0.3,
        torch.full((8,), 0.3),
    )
    settings = Truncated(t_start=0.4, num_steps=1, sources=("anchors", "draft"))
    base = compiled_test_planner(truncated=settings, anchors=anchors)
    fast = compile_planner(base, backend=backend, batch_size=2)
    sizes = {kind: fast._loops[kind, False].batch_size for kind in fast.kinds}
    assert sizes == {"guesses": 8, "draft": 2, "rank": 8}
    obs = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    wanted, got = (p.act(obs, p.initial_state([1, 2]))[0] for p in (base, fast))
    np.testing.assert_allclose(got, wanted, atol=5e-5)


def test_ranks_that_need_the_confidence_head_are_refused():
    network = {"type": "anchored", "base": COMPILE_NETWORKS["mlp"]}
    anchors = Anchors(torch.zeros(2, 8, 2), torch.full((2,), 0.5), 0.3, torch.full((8,), 0.3))
    settings = Truncated(t_start=0.4, num_steps=1, rank="confidence")
    planner = compiled_test_planner(network, truncated=settings, anchors=anchors)
    with pytest.raises(ValueError, match="ranked by 'confidence' need more"):
        compile_planner(planner, backend="eager")


@pytest.mark.parametrize("backend", ["eager", *ONNX_BACKENDS])
def test_streaming_policies_compile_both_loops(backend):
    base = compiled_test_planner("transformer", n_action_steps=2, level_law="position")
    settings = Streaming(steps_per_chunk=2)
    slow = StreamingPlanner(base.spec, base.denoiser, base.normalizer, streaming=settings)
    fast = compile_planner(slow, backend=backend, batch_size=2)
    assert isinstance(fast._loops["warm", False], CompiledLoop)
    states = [p.initial_state([1, 2]) for p in (slow, fast)]
    for obs in np.random.default_rng(0).standard_normal((6, 2, 3)).astype(np.float32):
        wanted, states[0] = slow.act(obs, states[0])
        got, states[1] = fast.act(obs, states[1])
        np.testing.assert_allclose(got, wanted, atol=5e-5)


def test_auto_compiles_every_loop():
    planner = compiled_test_planner(rti=RTI(t_start=0.2, num_steps=1))
    fast = compile_planner(planner, batch_size=1)
    for kind in ("cold", "warm"):
        loop = fast._loops[kind, False]
        assert isinstance(loop, CompiledLoop)
        assert loop.backend in available_backends()
        assert "batch_size=1" in repr(loop)


SIGNALLED = """
import gc, os, signal, sys
sys.path.insert(0, {here!r})
from test_compile import compile_loop, compiled_test_planner
loop = compiled_test_planner().loop("cold")
made = [compile_loop(loop, backend="openvino", batch_size=n, threads=1) for n in (1, 2, 3)]
while made:
    del made[0]  # the oldest first
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.skipif(bool(missing("openvino")), reason="needs openvino")
def test_signals_are_handled_after_compiled_loops_are_gone():
    code = SIGNALLED.format(here=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr[-2000:]
