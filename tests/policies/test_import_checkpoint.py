"""Published checkpoints: built here in their formats, imported, compared with their own maths."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from reference_unet import PublishedUNet, randomise
from safetensors.torch import save_file
from torch import nn

from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.foreign import unpickle
from diffpolicy.policies.foreign.common import diffusion_settings
from diffpolicy.policies.foreign.published import read_checkpoint
from diffpolicy.policies.rows import row_noise

H, TO, TA, OBS, A = 8, 2, 4, 5, 3
DOWN, EMBED = [16, 32], 16


def published_unet(layout, seed):
    unet = PublishedUNet(A, TO * OBS, DOWN, embed=EMBED, layout=layout)
    return randomise(unet, seed)


def limits(low, high):
    """Scale and offset of Diffusion Policy's min-max normaliser."""
    scale = 2 / (high - low)
    return {"scale": scale, "offset": -1 - scale * low, "min": low, "max": high}


OBS_LOW, OBS_HIGH = torch.arange(5.0) - 4, torch.arange(5.0) + 1
ACTION_LOW, ACTION_HIGH = torch.tensor([-1.0, 0.0, 10.0]), torch.tensor([1.0, 2.0, 500.0])


# --- Diffusion Policy -------------------------------------------------------------------------


def ckpt_config(**changes):
    policy = {
        "_target_": "diffusion_policy.policy.diffusion_unet_lowdim_policy"
        ".DiffusionUnetLowdimPolicy",
        "model": {"_target_": "x.ConditionalUnet1D", "n_groups": 8, "down_dims": DOWN},
        "noise_scheduler": {
            "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
            "num_train_timesteps": 100,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": "fixed_small",
            "clip_sample": True,
            "prediction_type": "epsilon",
        },
        "horizon": "${horizon}",
        "obs_dim": OBS,
        "action_dim": A,
        "n_action_steps": TA,
        "n_obs_steps": TO,
        "num_inference_steps": 100,
        "obs_as_local_cond": False,
        "obs_as_global_cond": True,
        "pred_action_steps_only": False,
        "oa_step_convention": True,
        **changes,
    }
    config = OmegaConf.create({"horizon": H, "policy": policy, "training": {"device": None}})
    OmegaConf.resolve(config)
    return config


def ckpt_state(seed):
    unet = published_unet("diffusion_policy", seed)
    state = {f"model.{name}": value for name, value in unet.state_dict().items()}
    for field, (low, high) in (
        ("obs", (OBS_LOW, OBS_HIGH)),
        ("action", (ACTION_LOW, ACTION_HIGH)),
    ):
        part = limits(low, high)
        prefix = f"normalizer.params_dict.{field}"
        state |= {f"{prefix}.{k}": part[k] for k in ("scale", "offset")}
        state |= {f"{prefix}.input_stats.{k}": part[k] for k in ("min", "max")}
    return state | {"_dummy_variable": torch.empty(0), "mask_generator._dummy": torch.empty(0)}


def write_ckpt(path, *, config=None, ema=True, extra=None):
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    states = {"model": ckpt_state(1), "optimizer": optimizer.state_dict()}
    if ema:
        states["ema_model"] = ckpt_state(0)
    payload = {
        **(extra or {}),
        "cfg": ckpt_config() if config is None else config,
        "state_dicts": states,
        "pickles": {"global_step": pickle.dumps(7), "epoch": pickle.dumps(np.int64(3))},
    }
    torch.save(payload, path)
    return path


def ddim_loop(unet, x, cond, *, steps=100):
    """Deterministic DDIM over every training step, clean estimates clipped, around the network."""

    def bar(k):
        return math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    alphas = np.cumprod([max(bar(k + 1) / bar(k), 1 - 0.999) for k in range(steps)])
    for k in reversed(range(steps)):
        a, s = alphas[k] ** 0.5, (1 - alphas[k]) ** 0.5
        x0 = ((x - s * unet(x, torch.tensor([k]), cond)) / a).clamp(-1, 1)
        eps = (x - a * x0) / s
        before = alphas[k - 1] if k else 1.0
        x = before**0.5 * x0 + (1 - before) ** 0.5 * eps
    return x


@torch.no_grad()
def assert_plans_like_the_reference(foreign, unet):
    denoiser = foreign.spec.make_denoiser()
    denoiser.load_state_dict(foreign.weights)
    planner = DiffusionPlanner(foreign.spec, denoiser, foreign.normalizer)
    state = planner.initial_state([3])
    history = np.random.default_rng(0).normal(size=(1, TO, OBS)).astype(np.float32)
    state = dataclasses.replace(state, history=history)
    plan, nfe = planner.make_plans(state, deterministic=True)
    zero = np.zeros(1, np.int64)
    noise = torch.from_numpy(row_noise(zero, zero, (1, H, A))[0])
    obs = 2 * (torch.from_numpy(history) - OBS_LOW) / (OBS_HIGH - OBS_LOW) - 1
    expected = ddim_loop(unet, noise, obs.flatten(1))
    assert nfe == 100
    np.testing.assert_allclose(plan, expected.numpy(), atol=2e-4)
    actions = planner.to_actions(plan[:, TO - 1])
    scaled = (expected[:, TO - 1] + 1) / 2 * (ACTION_HIGH - ACTION_LOW) + ACTION_LOW
    np.testing.assert_allclose(actions, scaled.numpy(), rtol=1e-3, atol=1e-3)


def test_diffusion_policy_checkpoint(tmp_path):
    foreign = read_checkpoint(write_ckpt(tmp_path / "latest.ckpt"))
    spec = foreign.spec
    assert (spec.obs_dim, spec.action_dim) == (OBS, A)
    assert (spec.horizon, spec.n_obs_steps, spec.n_action_steps) == (H, TO, TA)
    assert spec.process["type"] == "discrete_vp"
    assert len(spec.process["betas"]) == 100
    assert (spec.prediction, spec.clip) == ("eps", True)
    assert (spec.sampler.solver, spec.sampler.num_steps) == ("ddpm", 100)
    assert foreign.normalizer.modes == {"obs": "minmax", "action": "minmax"}
    assert_plans_like_the_reference(foreign, published_unet("diffusion_policy", seed=0))


def test_without_averaged_weights_the_trained_ones_are_taken(tmp_path):
    foreign = read_checkpoint(write_ckpt(tmp_path / "latest.ckpt", ema=False))
    assert_plans_like_the_reference(foreign, published_unet("diffusion_policy", seed=1))


def test_saved_policy_acts_like_the_imported_one(tmp_path):
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.training.checkpoint import write_bundle
    from diffpolicy.training.saved import policy_files

    foreign = read_checkpoint(write_ckpt(tmp_path / "latest.ckpt"))
    write_bundle(tmp_path / "policy", policy_files(*foreign))
    policy = DiffusionPolicy.load(tmp_path / "policy", sampler={"solver": "ddim", "num_steps": 5})
    assert all(torch.equal(policy.denoiser.state_dict()[k], v) for k, v in foreign.weights.items())
    action, _ = policy.predict(np.zeros(OBS, np.float32), deterministic=True)
    assert action.shape == (A,)
    assert (action >= ACTION_LOW.numpy() - 1e-3).all()
    assert (action <= ACTION_HIGH.numpy() + 1e-3).all()


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickles as an instance whose state hides a call."""

    def __init__(self, inner):
        self.inner = inner


def test_nothing_in_the_pickle_is_executed(tmp_path):
    marks = [tmp_path / f"mark{i}" for i in range(4)]
    write_ckpt(
        tmp_path / "evil.ckpt",
        extra={
            "call": Call(os.mkdir, str(marks[0])),
            "code": Call(eval, f"__import__('os').mkdir({str(marks[1])!r})"),
            "nested": [Stateful({"x": (Call(os.makedirs, str(marks[2])),)})],
            "process": Call(subprocess.check_call, ["mkdir", str(marks[3])]),
        },
    )
    foreign = read_checkpoint(tmp_path / "evil.ckpt")
    assert not any(mark.exists() for mark in marks)
    assert_plans_like_the_reference(foreign, published_unet("diffusion_policy", seed=0))
    # The calls are live: an ordinary unpickler makes them.
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert all(mark.exists() for mark in marks)


def test_a_hostile_config_is_data(tmp_path):
    mark = tmp_path / "mark"
    config = {"policy": Call(os.mkdir, str(mark))}
    with pytest.raises(ValueError, match="has no 'policy'"):
        read_checkpoint(write_ckpt(tmp_path / "evil.ckpt", config=config))
    assert not mark.exists()


def test_the_reader_runs_in_another_process(tmp_path, monkeypatch):
    seen = []
    original = subprocess.run

    def spy(command, **options):
        seen.append(command)
        return original(command, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    monkeypatch.setattr(unpickle, "export", None)  # would fail in this one
    read_checkpoint(write_ckpt(tmp_path / "latest.ckpt"), kind="diffusion_policy")
    assert seen[0][:2] == [sys.executable, "-I"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "d.policy.DiffusionUnetVideoPolicy"}, "holds a DiffusionUnetVideoPolicy"),
        ({"obs_as_global_cond": False}, "obs_as_global_cond=False"),
        ({"obs_as_local_cond": True}, "obs_as_local_cond=True"),
        ({"oa_step_convention": False}, "oa_step_convention=False"),
        ({"pred_action_steps_only": True}, "pred_action_steps_only=True"),
        ({"noise_scheduler": {"_target_": "d.PNDMScheduler"}}, "noise_scheduler='PNDMScheduler'"),
        ({"noise_scheduler": {"beta_schedule": "sigmoid"}}, "beta_schedule='sigmoid'"),
        ({"num_inference_steps": 1001}, r"num_inference_steps must be in \[1, 100\], got 1001"),
        ({"horizon": 7}, "multiple of 2"),
        ({"obs_dim": OBS + 1}, "normaliser of 'obs' has 5 dimensions.*says 6"),
        ({"n_action_steps": H}, "n_action_steps=8 is too large"),
        ({"n_obs_steps": None}, "has no 'n_obs_steps'"),
    ],
)
def test_unsupported_checkpoints_say_why(tmp_path, change, message):
    path = write_ckpt(tmp_path / "latest.ckpt", config=ckpt_config(**change))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_clipping_needs_actions_that_were_bounded(tmp_path):
    state = ckpt_state(0)
    state["normalizer.params_dict.action.input_stats.max"] = 3 * ACTION_HIGH
    payload = {"cfg": ckpt_config(), "state_dicts": {"ema_model": state}}
    torch.save(payload, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="clip=True"):
        read_checkpoint(tmp_path / "x.ckpt")


def damaged_ckpt(path, how):
    source = write_ckpt(path / "good.ckpt")
    target = path / "bad.ckpt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            name = info.filename
            if how == "no pickle" and name.endswith("data.pkl"):
                continue
            if how == "cut pickle" and name.endswith("data.pkl"):
                data = data[:200]
            if how == "short storage" and "/data/" in name:
                data = data[:4]
            if how == "no storage" and "/data/" in name:
                continue
            kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
            new.writestr(name, data, compress_type=kind)
    return target


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no pickle", "no data.pkl"),
        ("cut pickle", "damaged, or not a checkpoint"),
        ("short storage", "beyond its storage"),
        ("no storage", "entry 'data/.*' is missing"),
        ("compressed", "compressed"),
    ],
)
def test_damaged_files_are_refused(tmp_path, how, message):
    with pytest.raises(ValueError, match=f"bad.ckpt cannot be imported.*{message}"):
        read_checkpoint(damaged_ckpt(tmp_path, how))


def test_other_torch_files_are_refused(tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no state_dicts"):
        read_checkpoint(tmp_path / "other.pt")


def test_tensors_stay_within_their_storage(tmp_path):
    path = tmp_path / "t.ckpt"
    base = torch.arange(12.0).view(3, 4)
    values = {"t": base.t(), "part": base[1:, 2], "half": base.half(), "long": base.long()}
    torch.save(values, path)
    archive = unpickle.Archive(str(path))
    payload = archive.payload()
    for name, value in values.items():
        np.testing.assert_array_equal(archive.array(payload[name]), value.numpy())
    inside = payload["t"]
    for outside in (
        inside._replace(offset=1),
        inside._replace(size=(4, 4)),
        inside._replace(stride=(1, 5)),
        inside._replace(size=(10**9, 1), stride=(0, 0)),
    ):
        with pytest.raises(unpickle.RefusedError, match="beyond its storage"):
            archive.array(outside)


def test_small_files_cannot_fill_the_machine(tmp_path):
    """What a few bytes stand for: shared lists double 40 times; tensors share one storage."""
    shared = [0.5]
    for _ in range(40):
        shared = [shared, shared]
    with pytest.raises(ValueError, match="stands for more than"):
        read_checkpoint(write_ckpt(tmp_path / "lists.ckpt", config={"policy": shared}))
    same = torch.zeros(250_000)
    states = {"model": {f"model.{i}": same for i in range(200)}}
    torch.save({"cfg": ckpt_config(), "state_dicts": states}, tmp_path / "tensors.ckpt")
    assert (tmp_path / "tensors.ckpt").stat().st_size < 2_000_000
    with pytest.raises(ValueError, match="several times the size of the file"):
        read_checkpoint(tmp_path / "tensors.ckpt")


def test_the_reader_is_bounded(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(unpickle.__file__).parent)!r}); import unpickle;"
        "unpickle.limit(1000); bytearray(4 << 30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr


def test_every_name_in_a_pickle_is_inert():
    reader = unpickle.Reader(io.BytesIO())
    for module, name in (("os", "system"), ("builtins", "eval"), ("torch", "load")):
        assert reader.find_class(module, name) is unpickle.Inert


# --- LeRobot ----------------------------------------------------------------------------------

STATE_DIM = 2


def lerobot_config(**changes):
    return {
        "type": "diffusion",
        "n_obs_steps": TO,
        "horizon": H,
        "n_action_steps": TA,
        "input_features": {
            "observation.environment_state": {"type": "ENV", "shape": [OBS - STATE_DIM]},
            "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [A]}},
        "normalization_mapping": {"STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"},
        "down_dims": DOWN,
        "n_groups": 8,
        "use_film_scale_modulation": True,
        "noise_scheduler_type": "DDPM",
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_inference_steps": None,
        **changes,
    }


def lerobot_statistics():
    features = {
        "observation.state": (OBS_LOW[:STATE_DIM], OBS_HIGH[:STATE_DIM]),
        "observation.environment_state": (OBS_LOW[STATE_DIM:], OBS_HIGH[STATE_DIM:]),
        "action": (ACTION_LOW, ACTION_HIGH),
    }
    return {
        name: {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4}
        for name, (low, high) in features.items()
    }


def write_lerobot(path, *, layout, config=None, statistics=None):
    path.mkdir()
    unet = published_unet("lerobot", seed=0).state_dict()
    tensors = {f"diffusion.unet.{name}": value for name, value in unet.items()}
    statistics = lerobot_statistics() if statistics is None else statistics
    if layout == "buffers":
        for name, values in statistics.items():
            groups = (
                ("normalize_targets", "unnormalize_outputs")
                if name == "action"
                else ("normalize_inputs",)
            )
            for group in groups:
                flat = f"{group}.buffer_{name.replace('.', '_')}"
                tensors |= {f"{flat}.{k}": v.clone() for k, v in values.items()}
    else:
        for file, step, index in (
            ("policy_preprocessor", "normalizer_processor", 3),
            ("policy_postprocessor", "unnormalizer_processor", 0),
        ):
            state = f"{file}_step_{index}_{step}.safetensors"
            entry = {"registry_name": step, "config": {"eps": 1e-8}, "state_file": state}
            steps = [{"registry_name": "device_processor", "config": {}}, entry]
            (path / f"{file}.json").write_text(json.dumps({"name": file, "steps": steps}))
            flat = {f"{n}.{k}": v.clone() for n, s in statistics.items() for k, v in s.items()}
            save_file(flat, path / state)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or lerobot_config()))
    return path


@pytest.mark.parametrize("layout", ["buffers", "processors"])
def test_lerobot_policy(tmp_path, layout):
    foreign = read_checkpoint(write_lerobot(tmp_path / "policy", layout=layout))
    assert foreign.spec.sampler.solver == "ddpm"
    assert foreign.normalizer.modes == {"obs": "minmax", "action": "minmax"}
    assert_plans_like_the_reference(foreign, published_unet("lerobot", seed=0))


def test_lerobot_config_of_the_first_releases(tmp_path):
    config = lerobot_config(
        input_shapes={"observation.environment_state": [OBS - STATE_DIM], "observation.state": [2]},
        output_shapes={"action": [A]},
        input_normalization_modes={
            "observation.environment_state": "min_max",
            "observation.state": "min_max",
        },
        output_normalization_modes={"action": "min_max"},
    )
    for name in ("type", "input_features", "output_features", "normalization_mapping"):
        del config[name]
    foreign = read_checkpoint(write_lerobot(tmp_path / "old", layout="buffers", config=config))
    assert_plans_like_the_reference(foreign, published_unet("lerobot", seed=0))


def test_lerobot_modes_and_constant_dimensions(tmp_path):
    statistics = lerobot_statistics()
    statistics["action"]["max"][1] = statistics["action"]["min"][1]
    statistics["observation.state"]["std"][0] = 0.0
    mapping = {"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}  # ENV not named: left alone
    config = lerobot_config(normalization_mapping=mapping)
    path = write_lerobot(tmp_path / "p", layout="processors", config=config, statistics=statistics)
    normalizer = read_checkpoint(path).normalizer
    state = statistics["observation.state"]
    obs = torch.linspace(-3, 3, OBS)
    expected = obs.clone()
    expected[1] = (obs[1] - state["mean"][1]) / state["std"][1]
    expected[0] = obs[0] - state["mean"][0]
    torch.testing.assert_close(normalizer.normalize("obs", obs), expected)
    for level in (-1.0, 0.3, 1.0):
        action = normalizer.unnormalize("action", torch.full((A,), level))
        low, high = statistics["action"]["min"], statistics["action"]["max"]
        torch.testing.assert_close(
            action, (level + 1) / 2 * (high - low) + low, atol=2.1e-4, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "act"}, "type='act'"),
        (
            {
                "input_features": {
                    "observation.state": {"type": "STATE", "shape": [2]},
                    "observation.image": {"type": "VISUAL", "shape": [3, 96, 96]},
                }
            },
            "no diffusion.rgb_encoder of camera 'observation.image'",
        ),
        (
            {
                "input_features": {
                    "observation.state": {"type": "STATE", "shape": [2]},
                    "observation.depth": {"type": "DEPTH", "shape": [96, 96]},
                }
            },
            "observes observation.depth; only observation.state",
        ),
        ({"output_features": {}}, "the output 'action'"),
        ({"noise_scheduler_type": "PNDM"}, "noise_scheduler_type='PNDM'"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0"),
        ({"horizon": None}, "config.json has no 'horizon'"),
        ({"normalization_mapping": {"STATE": "CUBE"}}, "observation.state='CUBE'"),
        ({"normalization_mapping": {"ACTION": "MEAN_STD"}}, "clip=True"),
        ({"n_obs_steps": 1}, "the weights are for"),
    ],
)
def test_unsupported_lerobot_policies_say_why(tmp_path, change, message):
    path = write_lerobot(tmp_path / "p", layout="buffers", config=lerobot_config(**change))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_lerobot_without_statistics(tmp_path):
    path = write_lerobot(tmp_path / "p", layout="processors", statistics={"x": {"y": OBS_LOW}})
    with pytest.raises(ValueError, match=r"no min and max of observation\.state.*cannot act"):
        read_checkpoint(path)


def test_lerobot_statistics_of_another_size(tmp_path):
    statistics = lerobot_statistics()
    statistics["action"]["min"] = torch.zeros(A + 1)
    path = write_lerobot(tmp_path / "p", layout="processors", statistics=statistics)
    with pytest.raises(ValueError, match=r"statistics of action.*shape \[3\]"):
        read_checkpoint(path)


def test_a_state_file_elsewhere_is_not_followed(tmp_path):
    path = write_lerobot(tmp_path / "p", layout="processors")
    name = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    (path / name).rename(tmp_path / name)
    file = path / "policy_preprocessor.json"
    file.write_text(file.read_text().replace(name, f"../{name}"))
    with pytest.raises(ValueError, match=f"p/{name} cannot be read"):
        read_checkpoint(path)


# --- what is there ----------------------------------------------------------------------------


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"unknown kind .*expected one of auto, lerobot, diffusion_policy"
    ):
        read_checkpoint(tmp_path, kind="sb3")
    with pytest.raises(ValueError, match="neither a LeRobot policy"):
        read_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest.ckpt").touch()
    with pytest.raises(ValueError, match=r"did you mean .*latest\.ckpt\?"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "diffpolicy-policy"}')
    with pytest.raises(ValueError, match="ours already"):
        read_checkpoint(tmp_path)


# --- noise schedules --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "scaled_linear"])
def test_betas_are_the_published_ones(schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DDPMScheduler
    theirs = DDPMScheduler(50, beta_schedule=schedule, beta_start=1e-3, beta_end=0.05).betas
    values = {"num_train_timesteps": 50, "beta_schedule": schedule}
    ours = diffusion_settings(values | {"beta_start": 1e-3, "beta_end": 0.05}, "ddpm", None)
    torch.testing.assert_close(torch.tensor(ours["process"]["betas"]), theirs)


def test_samplers_and_predictions():
    assert diffusion_settings({"prediction_type": "sample"}, "ddpm", 10)["prediction"] == "x0"
    ddim = diffusion_settings({"clip_sample": False}, "ddim", 10, eta=0.5)
    assert (ddim["clip"], dict(ddim["sampler"].options)) == (False, {"eta": 0.5})
    large = diffusion_settings({"variance_type": "fixed_large"}, "ddpm", None)["sampler"]
    assert (large.num_steps, dict(large.options)) == (1000, {"variance": "large"})
    betas = diffusion_settings({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}, "ddpm", 2)
    assert betas["process"] == {"type": "discrete_vp", "betas": [0.1, 0.2]}
