"""Published checkpoints with cameras: built in their layouts, compared with their own maths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from reference_resnet import forward, keypoints, numbered, shapes, weights
from reference_unet import PublishedUNet, randomise
from safetensors.torch import save_file

from diffpolicy import DiffusionPolicy
from diffpolicy.networks import from_resnet18_state_dict
from diffpolicy.networks.backbones import ResNet18
from diffpolicy.policies.foreign.published import read_checkpoint
from diffpolicy.training.checkpoint import write_bundle
from diffpolicy.training.saved import policy_files

H, TO, TA, A, WIDE, K = 8, 2, 4, 3, 16, 5
SIDE, CROP = (44, 41), (36, 36)  # an odd margin of 5, whose half is rounded to 2
DOWN, EMBED = [16, 32], 16
SCHEDULER = {
    "num_train_timesteps": 10,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
}


def unet(cond_dim, layout):
    return randomise(PublishedUNet(A, cond_dim, DOWN, embed=EMBED, layout=layout), 3)


def linear(out, inside, seed, conv=False):
    drawn = torch.Generator().manual_seed(seed)
    shape = (out, inside, 1, 1) if conv else (out, inside)
    return torch.randn(shape, generator=drawn) * inside**-0.5, torch.randn(out, generator=drawn)


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, TO, *SIDE, 3), dtype=np.uint8))


def cropped(images, mean, std):
    """Pictures ``[B, To, h, w, 3]`` as ``[B * To, 3, 36, 36]``, as published code sees them."""
    x = (images.flatten(0, 1).movedim(-1, 1).double() / 255).float()
    x = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    top, left = (round((s - c) / 2.0) for s, c in zip(SIDE, CROP, strict=True))
    return x[..., top : top + CROP[0], left : left + CROP[1]]


def seen(x, backbone, maps, head):
    """A camera's features per picture: ResNet-18, spatial softmax, a linear layer, ReLU."""
    k = keypoints(torch.nn.functional.conv2d(forward(backbone, x), *maps))
    return torch.nn.functional.linear(k, *head).relu()


@torch.no_grad()
def assert_same_network(foreign, obs, per_step, published):
    """One evaluation of the U-Net at every step; ``per_step`` is ``[B * To, C / To]``."""
    denoiser = foreign.spec.make_denoiser().eval()
    denoiser.load_state_dict(foreign.weights)
    cond = denoiser.encode(foreign.normalizer.normalize_obs(obs))
    count = len(cond)
    x = torch.randn(count, H, A, generator=torch.Generator().manual_seed(1))
    step = torch.arange(count) * 3
    expected = published(x, step, per_step.view(count, -1))
    actual = denoiser.network(x, step.view(-1, 1, 1), cond)
    blind = published(x, step, torch.zeros(count, per_step.numel() // count))
    assert (expected - blind).abs().max() > 0.1
    assert (actual - expected).abs().max() < 2e-4 * expected.abs().max()


def limits(low, high):
    low, high = torch.tensor(low), torch.tensor(high)
    scale = 2 / (high - low)
    part = {"scale": scale, "offset": -1 - scale * low}
    return part, {"min": low, "max": high}


# --- ResNet-18 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [False, True], ids=["group", "batch"])
@pytest.mark.parametrize("layout", ["named", "numbered"])
def test_converted_resnet_gives_the_same_map(batch, layout):
    state = weights(width=WIDE, batch=batch)
    given = state if layout == "named" else numbered(state)
    config, converted = from_resnet18_state_dict(given)
    assert config == {"type": "resnet18", "width": WIDE, "norm": "none" if batch else "group"}
    network = ResNet18(3, width=WIDE, norm=config["norm"])
    network.load_state_dict(converted)
    x = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = forward(state, x), network(x)
    assert expected.std() > 0.1
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.max()))


def test_published_names_and_shapes_of_resnet18():
    """Of torchvision's resnet18, whose 11,689,512 parameters include 513,000 of classes."""
    published = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.weight": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.bias": (128,),
        "layer4.1.bn2.bias": (512,),
    }
    found = shapes()
    assert {name: found[name] for name in published} == published
    ours = {name: tuple(value.shape) for name, value in ResNet18(3).named_parameters()}
    assert ours == found
    assert sum(np.prod(shape, dtype=int) for shape in found.values()) == 11_689_512 - 513_000


def test_other_state_dicts_are_refused():
    state = weights(width=WIDE)
    with pytest.raises(ValueError, match=r"1 tensors have no place in ResNet18.*fc"):
        from_resnet18_state_dict({**state, "fc.weight": torch.zeros(1)})
    del state["layer3.1.conv2.weight"]
    with pytest.raises(ValueError, match=r"layer3\.1\.conv2\.weight' is missing"):
        from_resnet18_state_dict(state)


# --- Diffusion Policy -----------------------------------------------------------------------------

META = {
    "obs": {
        "pos": {"shape": [2], "type": "low_dim"},
        "wrist": {"shape": [3, *SIDE], "type": "rgb"},
        "front": {"shape": [3, *SIDE], "type": "rgb"},
        "grip": {"shape": [1]},
    },
    "action": {"shape": [A]},
}


def ckpt(path, kind, state, **changes):
    state = dict(state)
    fields = {
        "pos": limits([0.0, 0.0], [512.0, 256.0]),
        "grip": limits([-2.0], [2.0]),
        "action": limits([-1.0] * A, [1.0] * A),
        **dict.fromkeys(("wrist", "front"), limits([0.0], [1.0])),
    }
    for name, (part, statistics) in fields.items():
        prefix = f"normalizer.params_dict.{name}"
        state |= {f"{prefix}.{k}": v for k, v in part.items()}
        state |= {f"{prefix}.input_stats.{k}": v for k, v in statistics.items()}
    policy = {
        "_target_": f"diffusion_policy.policy.x.{kind}",
        "shape_meta": META,
        "noise_scheduler": {"_target_": "d.DDPMScheduler", **SCHEDULER},
        "horizon": H,
        "n_action_steps": TA,
        "n_obs_steps": TO,
        "num_inference_steps": 10,
        "obs_as_global_cond": True,
        "n_groups": 8,
        **changes,
    }
    torch.save({"cfg": {"policy": policy}, "state_dicts": {"ema_model": state}}, path)
    return path


def observed(count=3):
    drawn = torch.Generator().manual_seed(2)
    obs = {"wrist": pictures(count), "front": pictures(count, 1)}
    obs["pos"] = 256 * torch.rand(count, TO, 2, generator=drawn)
    obs["grip"] = torch.randn(count, TO, 1, generator=drawn)
    low = {"pos": obs["pos"] * torch.tensor([2 / 512, 2 / 256]) - 1, "grip": obs["grip"] / 2}
    return obs, {name: value.flatten(0, 1) for name, value in low.items()}


def robomimic_core(name, seed):
    """Parameters of a ``VisualCore``: each is there under its own name and in a sequence."""
    backbone = weights(seed, width=WIDE)
    maps, head = linear(K, 8 * WIDE, seed, conv=True), linear(6, 2 * K, seed + 1)
    prefix = f"obs_encoder.obs_nets.{name}"
    state = {}
    for place in ("backbone", "nets.0"):
        state |= {f"{prefix}.{place}.nets.{k}": v for k, v in numbered(backbone).items()}
    for place in ("pool", "nets.1"):
        state |= {f"{prefix}.{place}.nets.weight": maps[0], f"{prefix}.{place}.nets.bias": maps[1]}
        state |= {f"{prefix}.{place}.temperature": torch.tensor([2.0])}
        state |= {f"{prefix}.{place}.pos_{axis}": torch.zeros(1, 4) for axis in "xy"}
    state |= {f"{prefix}.nets.3.weight": head[0], f"{prefix}.nets.3.bias": head[1]}
    return state, (backbone, tuple(value / 2 for value in maps), head)


def hybrid(path, **changes):
    cores = {name: robomimic_core(name, seed) for name, seed in (("wrist", 0), ("front", 5))}
    published = unet(TO * (6 + 6 + 3), "diffusion_policy")
    state = {f"model.{k}": v for k, v in published.state_dict().items()}
    for core, _ in cores.values():
        state |= core
    kind = "DiffusionUnetHybridImagePolicy"
    made = ckpt(path, kind, state, **{"crop_shape": list(CROP), **changes})
    return made, published, {name: parts for name, (_, parts) in cores.items()}


def test_diffusion_policy_with_robomimics_encoder(tmp_path):
    path, published, cores = hybrid(tmp_path / "latest.ckpt")
    foreign = read_checkpoint(path)
    spec = foreign.spec
    assert list(spec.observations) == ["front", "grip", "pos", "wrist"]
    assert spec.encoder == {
        "type": "images",
        "backbone": {"type": "resnet18", "width": WIDE, "norm": "group"},
        "points": K,
        "dim": 6,
        "relu": True,
        "crop": list(CROP),
    }
    obs, low = observed()
    half = [0.5] * 3
    features = {n: seen(cropped(obs[n], half, half), *core) for n, core in cores.items()}
    per_step = torch.cat([low["pos"], features["wrist"], features["front"], low["grip"]], 1)
    assert_same_network(foreign, obs, per_step, published)
    write_bundle(tmp_path / "policy", policy_files(*foreign))
    policy = DiffusionPolicy.load(tmp_path / "policy")
    action, _ = policy.predict({name: one[0, 0].numpy() for name, one in obs.items()})
    assert action.shape == (A,)


@pytest.mark.parametrize("shared", [False, True])
def test_diffusion_policy_with_many_images(tmp_path, shared):
    """``MultiImageObsEncoder``: means of the map, cameras and vectors sorted, ImageNet's pixels."""
    names = ["rgb"] if shared else ["wrist", "front"]
    nets = {n: weights(k, width=WIDE, batch=shared) for k, n in enumerate(names)}
    published = unet(TO * (2 * 8 * WIDE + 3), "diffusion_policy")
    state = {f"model.{k}": v for k, v in published.state_dict().items()}
    for name, net in nets.items():
        state |= {f"obs_encoder.key_model_map.{name}.{k}": v for k, v in net.items()}
    state["obs_encoder._dummy_variable"] = torch.empty(0)
    options = {"crop_shape": list(CROP), "imagenet_norm": True, "share_rgb_model": shared}
    path = ckpt(
        tmp_path / "x.ckpt",
        "DiffusionUnetImagePolicy",
        state,
        obs_encoder={**options, "resize_shape": list(SIDE)},
    )
    foreign = read_checkpoint(path)
    assert foreign.spec.encoder.get("shared", False) == shared
    obs, low = observed()
    # Their pictures are in [-1, 1] when ImageNet's mean is taken off.
    mean = [(1 + m) / 2 for m in (0.485, 0.456, 0.406)]
    std = [s / 2 for s in (0.229, 0.224, 0.225)]
    features = [
        forward(nets["rgb" if shared else n], cropped(obs[n], mean, std)).mean((2, 3))
        for n in ("front", "wrist")
    ]
    per_step = torch.cat([*features, low["grip"], low["pos"]], 1)
    assert_same_network(foreign, obs, per_step, published)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs_as_global_cond": False}, "obs_as_global_cond=False"),
        (
            {"shape_meta": {"obs": {"d": {"shape": [1, 4, 4], "type": "depth"}}}},
            "type of d='depth'",
        ),
        ({"n_obs_steps": 1}, r"the U-Net takes 30 features, the config says 15"),
        ({"shape_meta": None}, "has no 'shape_meta'"),
        ({"crop_shape": [50, 36]}, r"crop must be a share, or within \[44, 41\]"),
    ],
)
def test_image_checkpoints_that_do_not_fit_say_why(tmp_path, change, message):
    path, _, _ = hybrid(tmp_path / "latest.ckpt", **change)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


# --- LeRobot --------------------------------------------------------------------------------------


def lerobot(path, *, separate, cameras=("images.top", "images.side"), batch=False, **changes):
    path.mkdir()
    prefixes = [f"{place}." for place in range(len(cameras))] if separate else [""]
    tensors, nets = {}, []
    for place, prefix in enumerate(prefixes):
        backbone = weights(place, width=WIDE, batch=batch)
        maps, head = linear(K, 8 * WIDE, place, conv=True), linear(2 * K, 2 * K, place + 5)
        nets.append((backbone, maps, head))
        part = {f"backbone.{k}": v for k, v in numbered(backbone).items()}
        part |= {"pool.nets.weight": maps[0], "pool.nets.bias": maps[1]}
        part |= {"pool.pos_grid": torch.zeros(4, 2), "out.weight": head[0], "out.bias": head[1]}
        tensors |= {f"diffusion.rgb_encoder.{prefix}{k}": v for k, v in part.items()}
    published = unet(TO * (2 + len(cameras) * 2 * K + 1), "lerobot")
    tensors |= {f"diffusion.unet.{k}": v for k, v in published.state_dict().items()}
    statistics = {
        "observation_state": {"min": torch.zeros(2), "max": torch.tensor([512.0, 256.0])},
        "observation_environment_state": {"min": torch.tensor([-2.0]), "max": torch.tensor([2.0])},
        "action": {"min": -torch.ones(A), "max": torch.ones(A)},
    }
    for place, name in enumerate(cameras):
        mean, std = (torch.full((3, 1, 1), v) for v in (0.4 + 0.1 * place, 0.25))
        statistics[f"observation_{name.replace('.', '_')}"] = {"mean": mean, "std": std}
    for name, values in statistics.items():
        group = "unnormalize_outputs" if name == "action" else "normalize_inputs"
        tensors |= {f"{group}.buffer_{name}.{k}": v for k, v in values.items()}
    save_file({k: v.clone() for k, v in tensors.items()}, path / "model.safetensors")
    images = {f"observation.{n}": {"type": "VISUAL", "shape": [3, *SIDE]} for n in cameras}
    config = {
        **SCHEDULER,
        "type": "diffusion",
        "n_obs_steps": TO,
        "horizon": H,
        "n_action_steps": TA,
        "input_features": {
            "observation.environment_state": {"type": "ENV", "shape": [1]},
            **images,
            "observation.state": {"type": "STATE", "shape": [2]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [A]}},
        "normalization_mapping": {
            **dict.fromkeys(("STATE", "ENV", "ACTION"), "MIN_MAX"),
            "VISUAL": "MEAN_STD",
        },
        "vision_backbone": "resnet18",
        "crop_shape": list(CROP),
        "use_separate_rgb_encoder_per_camera": separate,
        **changes,
    }
    (path / "config.json").write_text(json.dumps(config))
    return published, nets


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("batch", [False, True], ids=["group", "batch"])
def test_lerobot_with_two_cameras(tmp_path, separate, batch):
    published, nets = lerobot(tmp_path / "p", separate=separate, batch=batch)
    foreign = read_checkpoint(tmp_path / "p")
    assert list(foreign.spec.observations) == ["side", "state", "top"]
    assert foreign.spec.obs_dim == 3
    obs, low = observed()
    ours = {"top": obs["wrist"], "side": obs["front"]}
    ours["state"] = torch.cat([obs["pos"], obs["grip"]], -1)
    features = [
        seen(cropped(ours[name], [mean] * 3, [0.25] * 3), *nets[min(place, len(nets) - 1)])
        for place, (name, mean) in enumerate((("top", 0.4), ("side", 0.5)))
    ]
    per_step = torch.cat([low["pos"], *features, low["grip"]], 1)
    assert_same_network(foreign, ours, per_step, published)


def test_lerobot_with_one_camera_and_the_usual_pixels(tmp_path):
    mapping = {**dict.fromkeys(("STATE", "ENV", "ACTION"), "MIN_MAX"), "VISUAL": "IDENTITY"}
    options = {"separate": False, "cameras": ("image",), "normalization_mapping": mapping}
    lerobot(tmp_path / "p", **options, crop_shape=None)
    spec = read_checkpoint(tmp_path / "p").spec
    assert sorted(spec.observations) == ["image", "state"]
    assert spec.encoder["pixels"] == {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert "crop" not in spec.encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_backbone": "resnet50"}, "vision_backbone='resnet50'"),
        ({"resize_shape": [20, 20]}, r"resize_shape=\[20, 20\]"),
        ({"use_separate_rgb_encoder_per_camera": True}, "no diffusion.rgb_encoder of camera"),
    ],
)
def test_lerobot_settings_that_cannot_be_imported_say_why(tmp_path, change, message):
    lerobot(tmp_path / "p", separate=False)
    config = json.loads((tmp_path / "p/config.json").read_text())
    (tmp_path / "p/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "p")
