"""Exported policies: the files, the contract, and running them without PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy import cli
from diffpolicy.api import DiffusionPolicy
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.fields import inward_bounds
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.boundary import Gripper
from diffpolicy.policies.ensemble import TemporalEnsemble
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.streaming import Streaming, StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.runtime import export as exporting
from diffpolicy.runtime.export import export_policy
from diffpolicy.runtime.exported import checksum, load_exported

pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")

EXPORT_NETWORKS = {
    "mlp": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8},
    "unet1d": {"type": "unet1d", "down_dims": [8, 16], "diffusion_step_embed_dim": 8},
    "transformer": {"type": "transformer", "width": 16, "depth": 1, "heads": 2},
}
LOW, HIGH = (-1.0, -0.2), (0.9, 0.2)


def exported_test_policy(network="mlp", *, anchors=None, **spec):
    """A small policy with bounds, whose weights are not at their initial zeros."""
    settings = {
        "sampler": Sampler(num_steps=2),
        "rti": RTI(t_start=0.3, num_steps=1),
        "action_low": LOW,
        "action_high": HIGH,
        **spec,
    }
    settings["network"] = EXPORT_NETWORKS[network] if isinstance(network, str) else network
    values = PolicySpec(3, 2, horizon=8, n_action_steps=4, **settings)
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
    return DiffusionPolicy(values, denoiser, normalizer, anchors)


@pytest.fixture(scope="module")
def one_export(tmp_path_factory):
    """An export of two rows with cold and warm loop, and its policy."""
    policy = exported_test_policy()
    folder = tmp_path_factory.mktemp("export") / "policy"
    export_policy(policy, folder, batch_size=2, rate_hz=20.0)
    return policy, folder


@pytest.fixture
def damaged_copy(one_export, tmp_path):
    """A copy of the export to spoil."""
    return shutil.copytree(one_export[1], tmp_path / "copy")


def eager_episode(policy, observed, seeds):
    """Plans and chunks of the policy itself, with the noise that each plan took."""
    state, steps, drawn = policy.initial_state(seeds), [], []
    draw = policy.draw_noise

    def noted(*arguments):
        drawn.append(draw(*arguments).numpy())
        return draw(*arguments)

    policy.draw_noise = noted
    for obs in observed:
        state = policy.observe(obs, state)
        due = np.flatnonzero(policy.needs_plan(state))
        if len(due):
            state = policy.replan(state, due)
            steps.append([state.history, drawn[-1], state.plan, []])
        actions, state = policy.execute(state)
        steps[-1][3].append(actions)
    return [(h, n, p, np.stack(a, 1)) for h, n, p, a in steps]


def check_episode(policy, folder):
    """Run an export beside its policy for three plans."""
    export_policy(policy, folder, batch_size=2)
    running = load_exported(folder)
    observed = np.random.default_rng(0).standard_normal((12, 2, 3)).astype(np.float32)
    episode = eager_episode(policy, observed, [3, 4])
    assert len(episode) == 3
    for history, noise, plan, chunk in episode:
        got = running.plan(history, noise=noise)
        np.testing.assert_allclose(got.plan, plan, atol=5e-5)
        np.testing.assert_allclose(got.actions, chunk, atol=5e-5)
        assert (got.actions >= np.float32(LOW)).all()
        assert (got.actions <= np.float32(HIGH)).all()
    return running


EXPORT_CASES = {
    "ddim": {},
    "ddpm": {
        "sampler": Sampler(num_steps=2, options={"eta": 1.0}),
        "rti": RTI(t_start=0.4, num_steps=2, options={"eta": 1.0}, tail="extrapolate"),
    },
    "given": {
        "sampler": Sampler(solver="dpmpp_2m", num_steps=2),
        "rti": RTI(t_start=0.1, num_steps=1, renoise=False),
    },
    "rolled": {
        "sampler": Sampler(num_steps=7, options={"eta": 1.0}),
        "rti": RTI(0.4, num_steps=6),
    },
    "grippers": {
        "sampler": Sampler(solver="unipc", num_steps=2),
        "grippers": (Gripper(0, "clip", 5.0), Gripper(1, "scale", 4.0)),
    },
}


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        *[pytest.param(name, {}, id=name) for name in ("unet1d", "transformer")],
        *[pytest.param("mlp", value, id=f"mlp-{name}") for name, value in EXPORT_CASES.items()],
    ],
)
def test_an_episode_is_the_policys_own(network, settings, tmp_path):
    check_episode(exported_test_policy(network, **settings), tmp_path / "e")


@pytest.mark.parametrize(
    "truncated",
    [
        Truncated(t_start=0.4, num_steps=2, rank="prior"),
        Truncated(t_start=0.4, num_steps=6, rank="prior", choose="draw"),
        Truncated(t_start=0.4, num_steps=1, sources=("anchors", "previous", "draft")),
        Truncated(t_start=0.4, num_steps=1, rank="denoising", continuity=0.5),
        Truncated(t_start=0.4, num_steps=1, rank="confidence"),
    ],
    ids=["prior", "drawn", "all sources", "continuity", "confidence"],
)
def test_truncated_policies(truncated, tmp_path):
    generator = torch.Generator().manual_seed(0)
    anchors = Anchors(
        2 * torch.rand(3, 8, 2, generator=generator) - 1,
        torch.tensor([0.2, 0.5, 0.3]),
        0.3,
        torch.full((8,), 0.3),
    )
    anchored = {"network": {"type": "anchored", "base": EXPORT_NETWORKS["mlp"]}}
    own = anchored if truncated.rank == "confidence" else {}
    policy = exported_test_policy(rti=None, truncated=truncated, anchors=anchors, **own)
    running = check_episode(policy, tmp_path / "e")
    remembers = "previous" in truncated.sources or truncated.continuity > 0
    assert set(running.contract["loops"]) == ({"cold", "warm"} if remembers else {"cold"})


@pytest.mark.parametrize("fill", ["denoise", "noise"])
def test_streaming_policies(fill, tmp_path):
    base = exported_test_policy("transformer", rti=None, level_law="position")
    spec = replace(base.spec, n_action_steps=2)
    policy = StreamingPlanner(
        spec, base.denoiser, base.normalizer, streaming=Streaming(steps_per_chunk=2, fill=fill)
    )
    export_policy(policy, tmp_path / "e", batch_size=2)
    running = load_exported(tmp_path / "e")
    assert running.contract["loops"]["warm"]["carries"] == "buffer"
    observed = np.random.default_rng(0).standard_normal((6, 2, 3)).astype(np.float32)
    episode = eager_episode(policy, observed, [3, 4])
    assert len(episode) == 3
    for history, noise, plan, chunk in episode:
        got = running.plan(history, noise=noise)
        np.testing.assert_allclose(got.plan, plan, atol=5e-5)
        np.testing.assert_allclose(got.actions, chunk, atol=5e-5)
    noise = np.random.default_rng(1).standard_normal((2, 2, 8, 2)).astype(np.float32)
    late = running.plan(history, executed=3, noise=noise)  # its buffer cannot move that far
    anew = load_exported(tmp_path / "e").plan(history, noise=noise)
    np.testing.assert_array_equal(late.plan, anew.plan)


def test_a_jump_of_the_observation_is_planned_cold(tmp_path):
    rti = RTI(t_start=0.3, num_steps=1, innovation=1.0)
    policy = exported_test_policy(rti=rti, observation_step=(0.5, 0.5, 0.5))
    export_policy(policy, tmp_path / "e", batch_size=1)
    running = load_exported(tmp_path / "e")
    assert running.contract["cold_if_step_exceeds"] == [0.5, 0.5, 0.5]
    noise = np.random.default_rng(0).standard_normal((1, 1, 8, 2)).astype(np.float32)
    still, jump = np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32)
    jump[0, 1, 2] = 0.6
    running.plan(still, noise=noise)
    got = running.plan(jump, noise=noise)
    np.testing.assert_array_equal(got.plan, running.solve("cold", jump, noise=noise).plan)


def test_policies_that_wrap_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TemporalEnsemble cannot be exported"):
        export_policy(TemporalEnsemble(exported_test_policy()), tmp_path / "e")


def test_contract(one_export):
    policy, folder = one_export
    contract = json.loads((folder / "contract.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == ["cold.onnx", "contract.json", "warm.onnx"]
    assert contract["policy"] == {
        "obs_dim": 3,
        "action_dim": 2,
        "horizon": 8,
        "n_obs_steps": 2,
        "n_action_steps": 4,
        "env_id": None,
    }
    assert contract["rate_hz"] == 20.0
    assert contract["batch"] == {"size": 2, "dynamic": False}
    low, high = (bound.tolist() for bound in inward_bounds(LOW, HIGH))
    assert contract["actions"] == {"unit": "environment", "low": low, "high": high}
    cold, warm = contract["loops"]["cold"], contract["loops"]["warm"]
    assert {p["name"]: p["shape"] for p in cold["inputs"]} == {
        "history": [2, 2, 3],
        "noise": [1, 2, 8, 2],
    }
    assert {p["name"]: (p["shape"], p["dtype"]) for p in warm["inputs"]} == {
        "history": ([2, 2, 3], "float32"),
        "last_plan": ([2, 8, 2], "float32"),
        "shift": ([2], "int64"),
        "noise": ([1, 2, 8, 2], "float32"),
    }
    for loop, level in ((cold, 1.0), (warm, 0.3)):
        assert {p["name"]: p["shape"] for p in loop["outputs"]} == {
            "plan": [2, 8, 2],
            "actions": [2, 4, 2],
        }
        assert 0 <= loop["max_error"] <= 1e-4
        assert loop["start_level"] == [level]
    assert (cold["nfe"], warm["nfe"]) == (2, 1)
    assert contract["verified"]["by"].startswith("onnxruntime")
    assert contract["versions"]["opset"] == 17
    assert "shift = k" in contract["warm_start"]
    assert policy.spec.rti is not None


def test_the_files_are_valid_onnx_with_the_contracts_shapes(one_export):
    import onnx

    _, folder = one_export
    loops = json.loads((folder / "contract.json").read_text())["loops"]
    for entry in loops.values():
        model = onnx.load(folder / entry["file"])
        onnx.checker.check_model(model, full_check=True)
        for ports, have in (
            (entry["inputs"], model.graph.input),
            (entry["outputs"], model.graph.output),
        ):
            shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in have}
            assert shapes == {p["name"]: p["shape"] for p in ports}


def test_running_an_export_needs_no_torch(one_export):
    code = (
        "import sys, numpy as np; from diffpolicy.runtime.exported import load_exported; "
        f"p = load_exported({str(one_export[1])!r}); "
        "r = p.plan(np.zeros((1, 2, 3), np.float32)); "
        "print(r.actions.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 4, 2) False", done.stderr[-2000:]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_are_cut_and_padded(one_export, count):
    policy, folder = one_export
    rng = np.random.default_rng(count)
    history = rng.standard_normal((count, 2, 3)).astype(np.float32)
    noise = rng.standard_normal((1, count, 8, 2)).astype(np.float32)
    got = load_exported(folder).solve("cold", history, noise=noise)
    with torch.inference_mode():
        expected = policy.loop("cold")(*map(torch.from_numpy, (history, history, noise)))
    np.testing.assert_allclose(got.plan, expected.numpy(), atol=5e-5)
    assert got.actions.shape == (count, 4, 2)


def test_dynamic_batch(tmp_path):
    policy = exported_test_policy("unet1d", rti=None)
    result = export_policy(policy, tmp_path / "e", batch_size=2, dynamic_batch=True)
    assert result.contract["loops"]["cold"]["inputs"][0]["shape"] == ["B", 2, 3]
    running = load_exported(tmp_path / "e")
    history = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((1, 5, 8, 2)).astype(np.float32)
    whole = running.solve("cold", history, noise=noise)
    single = running.solve("cold", history[3:4], noise=noise[:, 3:4])
    np.testing.assert_allclose(whole.plan[3:4], single.plan, atol=5e-5)


def test_a_network_with_a_fixed_batch_is_refused_as_dynamic(tmp_path, monkeypatch):
    policy = exported_test_policy(rti=None)
    forward = type(policy.denoiser.network).forward

    def fixed(self, x, *arguments, **options):
        return forward(self, x.reshape(int(x.shape[0]), 8, 2), *arguments, **options)

    monkeypatch.setattr(type(policy.denoiser.network), "forward", fixed)
    with pytest.raises(ValueError, match="with dynamic_batch=false; other numbers of rows are"):
        export_policy(policy, tmp_path / "e", batch_size=2, dynamic_batch=True)


def test_rows_are_reset_one_by_one(one_export):
    _, folder = one_export
    rng = np.random.default_rng(0)
    history = rng.standard_normal((2, 2, 3)).astype(np.float32)
    noise = rng.standard_normal((1, 2, 8, 2)).astype(np.float32)
    policy = load_exported(folder)
    cold = policy.plan(history, noise=noise)
    warm = policy.plan(history, executed=3, noise=noise)
    again = policy.solve("warm", history, cold.plan, np.array([3, 3]), noise)
    np.testing.assert_array_equal(warm.plan, again.plan)
    policy.reset([1])
    mixed = policy.plan(history, executed=np.array([2, 7]), noise=noise)
    third = policy.solve("warm", history, warm.plan, np.array([2, 2]), noise)
    np.testing.assert_allclose(mixed.plan[0], third.plan[0], atol=1e-6)
    np.testing.assert_allclose(mixed.plan[1], cold.plan[1], atol=1e-6)
    policy.reset()
    np.testing.assert_array_equal(policy.plan(history, noise=noise).plan, cold.plan)


def test_noise_comes_from_the_seed(one_export):
    history = np.zeros((1, 2, 3), np.float32)
    plans = [load_exported(one_export[1], seed=s).plan(history).plan for s in (1, 1, 2)]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert np.abs(plans[0] - plans[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": np.zeros((2, 3))}, r"history must be \[n, 2, 3\]"),
        (
            {"history": np.full((1, 2, 3), np.nan)},
            "history holds values that are not finite",
        ),
        ({"last": None}, "warm loop of this policy needs 'last_plan'"),
        ({"last": np.zeros((1, 7, 2))}, r"last_plan must be \[1, 8, 2\], got \[1, 7, 2\]"),
        ({"shift": np.array([-1])}, "shift must not be negative, got -1"),
        ({"noise": np.zeros((2, 1, 8, 2))}, r"noise must be \[1, 1, 8, 2\]"),
    ],
)
def test_wrong_inputs(one_export, arguments, message):
    good = {
        "history": np.zeros((1, 2, 3)),
        "last": np.zeros((1, 8, 2)),
        "shift": np.array([1]),
    }
    policy = load_exported(one_export[1])
    policy.solve("warm", **good)
    with pytest.raises(ValueError, match=message):
        policy.solve("warm", **{**good, **arguments})


def test_unknown_kind(one_export):
    with pytest.raises(ValueError, match=r"no 'hot' loop; it has \['cold', 'warm'\]"):
        load_exported(one_export[1]).draws("hot")


def test_a_damaged_file_is_refused(damaged_copy):
    file = damaged_copy / "warm.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"warm\.onnx is damaged or was changed"):
        load_exported(damaged_copy)
    file.unlink()
    with pytest.raises(ValueError, match=r"names 'warm\.onnx', which is not a file"):
        load_exported(damaged_copy)


def edit_contract(folder, edit, *, sign=False):
    file = folder / "contract.json"
    contract = json.loads(file.read_text())
    edit(contract)
    if sign:
        contract["checksum"] = checksum(contract)
    file.write_text(json.dumps(contract))


def test_a_changed_contract_is_refused(damaged_copy):
    edit_contract(damaged_copy, lambda c: c["actions"].update(low=[-9.0, -9.0]))
    with pytest.raises(ValueError, match="was changed after the export"):
        load_exported(damaged_copy)


def test_a_contract_cannot_name_files_elsewhere(damaged_copy):
    edit_contract(damaged_copy, lambda c: c["loops"]["cold"].update(file="../x.onnx"), sign=True)
    with pytest.raises(ValueError, match="which is not a file in"):
        load_exported(damaged_copy)


def test_what_is_not_an_export_is_refused(damaged_copy, tmp_path):
    with pytest.raises(ValueError, match=r"has no contract\.json"):
        load_exported(tmp_path)
    edit_contract(damaged_copy, lambda c: c.update(version=99), sign=True)
    with pytest.raises(ValueError, match="has version 99; this diffpolicy reads 1 and 2"):
        load_exported(damaged_copy)
    (damaged_copy / "contract.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the contract of an exported policy"):
        load_exported(damaged_copy)
    (damaged_copy / "contract.json").write_text("{")
    with pytest.raises(ValueError, match="is not the contract of an exported policy"):
        load_exported(damaged_copy)


def test_nothing_is_overwritten_unasked(one_export, tmp_path):
    policy, _ = one_export
    target = tmp_path / "deep" / "e"
    export_policy(policy, target)
    first = (target / "contract.json").read_text()
    with pytest.raises(ValueError, match="exists; give another output, or overwrite=true"):
        export_policy(policy, target)
    export_policy(policy, target, rate_hz=5.0, overwrite=True)
    assert (target / "contract.json").read_text() != first
    assert os.listdir(target.parent) == ["e"]  # no scratch is left
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an export: it holds other files"):
        export_policy(policy, target, overwrite=True)


def test_a_failed_export_leaves_nothing(one_export, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("differs")

    monkeypatch.setattr(exporting, "check_close", broken)
    with pytest.raises(ValueError, match="differs"):
        export_policy(one_export[0], tmp_path / "e")
    assert os.listdir(tmp_path) == []


def test_actions_that_the_export_does_not_know_are_refused(tmp_path, monkeypatch):
    policy = exported_test_policy(rti=None)
    monkeypatch.setattr(policy, "to_actions", lambda plan: plan + 0.5)
    with pytest.raises(ValueError, match="in a way that the export does not know"):
        export_policy(policy, tmp_path / "e")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rate_hz": 0}, "rate_hz must be positive"),
    ],
)
def test_bad_settings(one_export, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_policy(one_export[0], tmp_path / "e", **options)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages_say_how_to_install_them(one_export, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[onnx\]"'):
        export_policy(one_export[0], tmp_path / "e")


def test_command(tmp_path, capsys):
    exported_test_policy().save(tmp_path / "policy")
    common = [f"checkpoint={tmp_path}/policy", f"output={tmp_path}/e"]
    assert cli.main(["export", *common, "sampler.num_steps=3", "rate_hz=10"]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("RESULT "))
    assert report["loops"] == {"cold": 3, "warm": 1}
    assert report["max_error"] <= 1e-4
    assert load_exported(tmp_path / "e").contract["rate_hz"] == 10
    assert cli.main(["export", *common]) == 1
    assert "overwrite=true" in capsys.readouterr().err
    assert cli.main(["export", *common, "batch_sz=2"]) == 1
    assert "did you mean 'batch_size'" in capsys.readouterr().err
