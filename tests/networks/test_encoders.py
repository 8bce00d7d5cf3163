"""Encoders of images and tasks: exact answers, then what they are given and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy.data.observation import ObsField
from diffpolicy.networks.backbones import MeanPool, ResNet18, SmallCNN, SpatialSoftmax
from diffpolicy.networks.encoders import make_encoder

CAMERA = ObsField((12, 16, 3), "uint8", "image")
TINY = {"type": "cnn", "widths": [4, 4]}
IMAGES = {"type": "images", "backbone": TINY, "dim": 5, "points": 3}


def images(*lead, shape=(12, 16, 3), seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (*lead, *shape), dtype=np.uint8))


def identity_pool(maps, points=1):
    pool = SpatialSoftmax(maps.shape[1], points)
    with torch.no_grad():
        pool.maps.weight.copy_(torch.eye(points, maps.shape[1])[..., None, None])
        pool.maps.bias.zero_()
        return pool(maps)


def test_a_single_peak_is_where_it_is():
    maps = torch.full((1, 2, 5, 9), -1e4)
    maps[0, 0, 4, 2], maps[0, 1, 1, 8] = 0, 0
    places = identity_pool(maps, 2)
    assert torch.allclose(places, torch.tensor([[-0.5, 1.0, 1.0, -0.5]]), atol=1e-6)


def test_a_gaussian_bump_and_a_flat_map_have_their_means():
    """The softmax of minus a squared distance is a Gaussian; cut off symmetrically by nothing."""
    x, y = torch.linspace(-1, 1, 81), torch.linspace(-1, 1, 61)
    bump = -((x - 0.3).square() + (y[:, None] + 0.2).square()) / (2 * 0.1**2)
    found = identity_pool(bump[None, None])
    assert torch.allclose(found, torch.tensor([[0.3, -0.2]]), atol=1e-4)
    assert identity_pool(torch.zeros(1, 1, 4, 7)).abs().max() < 1e-6


def test_half_precision_is_no_pixel_off():
    maps = torch.randn(3, 4, 21, 21, generator=torch.Generator().manual_seed(0))
    full = identity_pool(maps, 4)
    pool = SpatialSoftmax(4, 4).bfloat16()
    with torch.no_grad():
        pool.maps.weight.copy_(torch.eye(4)[..., None, None])
        pool.maps.bias.zero_()
        half = pool(maps.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 1 / 21


def test_mean_pool_and_features_without_a_layer():
    maps = torch.arange(8.0).view(1, 2, 2, 2)
    assert MeanPool(2)(maps).tolist() == [[1.5, 5.5]]
    encoder = make_encoder({**IMAGES, "dim": None, "points": None}, {"c": CAMERA}, 2)
    assert encoder.cond_dim == 2 * 4
    seen = encoder(dict(c=images(3, 2)))
    raw = encoder.eyes[0].backbone(images(3, 2).flatten(0, 1).movedim(-1, 1) / 127.5 - 1)
    assert torch.allclose(seen, raw.mean((2, 3)).view(3, -1), atol=1e-6)
    cut = make_encoder({**IMAGES, "dim": None, "relu": True}, {"c": CAMERA}, 2)
    assert (cut(dict(c=images(3, 2))) >= 0).all()


def seeing(fields, *, n_obs_steps=2, **settings):
    settings = {"type": "images", "backbone": {"type": "strangers_code:Sees"}, **settings}
    return make_encoder(settings, fields, n_obs_steps)


def seen_by(encoder, obs):
    for eye in encoder.eyes:
        eye.backbone.given.clear()
    encoder(obs)
    return [eye.backbone.given for eye in encoder.eyes]


def test_pixels_are_scaled_and_cut_from_the_middle():
    encoder = seeing({"c": CAMERA}, crop=0.75).eval()
    given = images(3, 2)
    [[found]] = seen_by(encoder, {"c": given})
    assert found.shape == (6, 3, 9, 12)
    middle = given[:, :, 2:11, 2:14].float() / 127.5 - 1  # round(3 / 2) = 2
    assert torch.equal(found, middle.flatten(0, 1).movedim(-1, 1))
    sides = seeing({"c": CAMERA}, crop=[9, 12]).eval()
    assert torch.equal(seen_by(sides, {"c": given})[0][0], found)


def test_crops_of_training_are_those_of_the_seed_and_alike_for_all_steps_of_a_row():
    encoder = seeing({"c": CAMERA}, crop=0.5).train()
    rows = images(16, 1).expand(-1, 2, -1, -1, -1)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(seen_by(encoder, {"c": rows})[0][0].unflatten(0, (16, 2)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0][:, 0], found[0][:, 1])
    places = set()
    for row, part in zip(rows[:, 0], found[0][:, 0], strict=True):
        scaled = (row.float() / 127.5 - 1).movedim(-1, 0)
        fits = [
            (y, x)
            for y in range(7)
            for x in range(9)
            if torch.equal(scaled[:, y : y + 6, x : x + 8], part)
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 8


def test_jitter_is_bounded_and_of_training_alone():
    encoder = seeing({"c": CAMERA}, jitter=0.2)
    given = {"c": images(8, 2)}
    plain = seen_by(encoder.eval(), given)[0][0]
    torch.manual_seed(0)
    changed = seen_by(encoder.train(), given)[0][0]
    assert not torch.equal(plain, changed)
    assert (changed - plain).abs().max() <= 0.4 + 1e-6
    assert changed.abs().max() <= 1
    torch.manual_seed(0)
    assert torch.equal(seen_by(encoder, given)[0][0], changed)


def test_pixels_of_a_mean_and_a_deviation():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    encoder = seeing({"c": CAMERA}, pixels={"mean": mean, "std": std})
    given = images(2, 2)
    expected = (given / 255 - torch.tensor(mean)) / torch.tensor(std)
    [[found]] = seen_by(encoder, {"c": given})
    assert torch.allclose(found, expected.flatten(0, 1).movedim(-1, 1), atol=1e-5)
    grey = ObsField((12, 16), "uint8", "image")
    each = {"c": {"mean": mean, "std": std}, "g": {"mean": [0.0], "std": [1.0]}}
    encoder = seeing({"c": CAMERA, "g": grey}, pixels=each)
    both = {"c": given, "g": images(2, 2, shape=(12, 16))}
    [[coloured], [grey_ones]] = seen_by(encoder, both)
    assert torch.equal(coloured, found)
    assert torch.allclose(grey_ones[:, 0], (both["g"] / 255).flatten(0, 1), atol=1e-6)


def test_cameras_have_backbones_of_their_own_or_share_one():
    fields = {"a": CAMERA, "b": CAMERA, "joints": ObsField((4,))}
    obs = {"a": images(2, 2), "b": images(2, 2, seed=1), "joints": torch.randn(2, 2, 4)}
    own, shared = (make_encoder({**IMAGES, "shared": s}, fields, 2).eval() for s in (False, True))
    assert (len(own.eyes), len(shared.eyes)) == (2, 1)
    assert own.cond_dim == shared.cond_dim == 2 * 5 * 2 + 2 * 4
    out = shared(obs)
    swapped = shared({**obs, "a": obs["b"], "b": obs["a"]})
    assert torch.equal(out[:, :10], swapped[:, 10:20])
    assert torch.equal(out[:, 20:], obs["joints"].flatten(1))
    assert not torch.allclose(own(obs)[:, :10], own({**obs, "a": obs["b"]})[:, :10])


def test_grey_images_and_a_single_image():
    grey = ObsField((12, 16), "uint8", "image")
    encoder = make_encoder(IMAGES, grey, 1).eval()
    assert encoder(images(3, 1, shape=(12, 16))).shape == (3, 5)
    assert next(encoder.eyes[0].backbone.parameters()).shape[1] == 1
    with pytest.raises(ValueError, match=r"\[1, 3\] channels cannot share"):
        make_encoder({**IMAGES, "shared": True}, {"a": CAMERA, "b": grey}, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 1.5}, r"crop must be in \(0, 1\]"),
        ({"crop": [9, 17]}, r"crop must be a share, or within \[12, 16\] of 'c'"),
        ({"jitter": 1.0}, r"jitter must be in \[0, 1\)"),
        ({"points": 0}, "points must be at least 1"),
        ({"backbone": {"type": "resnet81"}}, "did you mean 'resnet18'"),
        ({"backbone": {"type": "cnn", "width": 3}}, "did you mean 'widths'"),
        ({"pixels": {"mean": [0.5]}}, "must hold mean and std"),
        ({"pixels": {"mean": [0.5], "std": [1.0]}}, r"mean of 'c' must be \[3\], got \[1\]"),
        ({"tasks": {"count": 2}}, "there is none"),
        ({"backbone": {"type": "resnet18", "width": 16}}, r"of 'c'.*single pixel.*points=null"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_encoder({**IMAGES, **settings}, {"c": CAMERA}, 2)


# --- backbones ----------------------------------------------------------------------------------


def test_resnet18_has_the_papers_shapes_and_groups_of_sixteen():
    network = ResNet18(3)
    assert sum(p.numel() for p in network.parameters()) == 11_176_512
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.1.conv2.weight"] == (64, 64, 3, 3)
    assert shapes["layer3.0.downsample.0.weight"] == (256, 128, 1, 1)
    assert shapes["layer4.1.bn2.bias"] == (512,)
    assert network.layer4[1].bn2.num_groups == 32
    assert "layer1.0.downsample.0.weight" not in shapes


@pytest.mark.parametrize("norm", ["group", "none"])
def test_resnet18_at_half_width_sees(norm):
    network = ResNet18(3, width=16, norm=norm)
    out = network(torch.rand(2, 3, 64, 96))
    assert out.shape == (2, network.out_channels, 2, 3) == (2, 128, 2, 3)
    out.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    with pytest.raises(ValueError, match="multiple of 16"):
        ResNet18(3, width=20)


def test_small_cnn_needs_a_convolution():
    with pytest.raises(ValueError, match="convolutions"):
        SmallCNN(3, widths=[])


class FakeTimm:
    """What is asked of timm, for machines without it."""

    def __init__(self):
        self.asked = []

    def create_model(self, name, **options):
        self.asked.append((name, options))
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        network = nn.Sequential(nn.Conv2d(options["in_chans"], 6, 3, 2), nn.BatchNorm2d(6))
        network.feature_info = type("Info", (), {"channels": lambda _: [3, 6]})()
        network.forward = lambda x: [x, network[1](network[0](x))]
        return network


@pytest.fixture
def fake_timm(monkeypatch):
    from diffpolicy.networks import backbones

    fake = FakeTimm()
    monkeypatch.setattr(backbones, "need", lambda _: fake)
    return fake


def test_timm_is_frozen_or_tuned_and_downloads_nothing_where_weights_follow(fake_timm):
    from diffpolicy.networks.backbones import weights_follow

    settings = {**IMAGES, "backbone": {"type": "timm", "name": "tiny", "pretrained": True}}
    tuned = make_encoder(settings, {"c": CAMERA}, 2).train()
    assert fake_timm.asked == [("tiny", {"pretrained": True, "in_chans": 3, "features_only": True})]
    assert all(p.requires_grad for p in tuned.parameters())
    settings["backbone"]["frozen"] = True
    with weights_follow():
        frozen = make_encoder(settings, {"c": CAMERA}, 2).train()
    assert fake_timm.asked[-1][1]["pretrained"] is False
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    out = frozen({"c": images(4, 2)})
    assert out.shape == (4, frozen.cond_dim) == (4, 10)
    out.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert {n.split(".")[2] for n, p in frozen.named_parameters() if p.requires_grad} == {
        "pool",
        "head",
    }
    with pytest.raises(ValueError, match="timm has no backbone 'tinny' with maps"):
        make_encoder({**settings, "backbone": {"type": "timm", "name": "tinny"}}, CAMERA, 2)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[timm\]"'):
        make_encoder({**IMAGES, "backbone": {"type": "timm", "name": "tiny"}}, CAMERA, 1)


def test_where_timm_does_not_fit_the_message_says_what_works(monkeypatch, tmp_path):
    import sys

    # So it is where torchvision is of another release than torch, or of another place.
    fault = "operator torchvision::nms does not exist"
    (tmp_path / "timm.py").write_text(f"raise RuntimeError({fault!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ImportError, match=rf"cannot be imported: {fault}.*encoder=resnet18"):
        make_encoder({**IMAGES, "backbone": {"type": "timm", "name": "tiny"}}, CAMERA, 1)


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])
def test_timm_itself(name):
    pytest.importorskip("timm", exc_type=ImportError, reason="needs the timm extra")
    backbone = {"type": "timm", "name": name}
    encoder = make_encoder(
        {**IMAGES, "backbone": backbone}, ObsField((64, 64, 3), "uint8", "image"), 1
    )
    assert encoder.eval()(images(2, 1, shape=(64, 64, 3))).shape == (2, 5)


# --- tasks --------------------------------------------------------------------------------------

TASK = ObsField((1,), "int64", "task")
JOINTS = ObsField((3,))


@pytest.mark.parametrize("kind", ["state", "images"])
def test_the_number_of_a_task_is_looked_up_once(kind):
    fields = {"joints": JOINTS, "task": TASK} | ({"c": CAMERA} if kind == "images" else {})
    settings = {"type": "state"} if kind == "state" else IMAGES
    encoder = make_encoder({**settings, "tasks": {"count": 3, "dim": 4}}, fields, 2).eval()
    seen = 2 * 5 * (kind == "images")
    assert encoder.cond_dim == seen + 2 * 3 + 4
    table = next(p for n, p in encoder.named_parameters() if n.endswith("told.weight"))
    obs = {"joints": torch.randn(3, 2, 3), "task": torch.tensor([2.0, 0, 2]).view(3, 1, 1)}
    obs |= {"c": images(3, 2), "task": obs["task"].expand(-1, 2, -1)}
    out = encoder(obs)
    assert torch.equal(out[:, seen : seen + 6], obs["joints"].flatten(1))
    assert torch.equal(out[:, -4:], table[[2, 0, 2]])
    with pytest.raises(ValueError, match=r"'task' must be in 0 \.\. 2, got 3 \.\. 3"):
        encoder({**obs, "task": torch.full((3, 2, 1), 3.0)})


def test_the_vector_of_a_task_passes_as_it_is_or_through_a_layer():
    fields = {"joints": JOINTS, "task": ObsField((6,), "float32", "task")}
    obs = {"joints": torch.randn(2, 2, 3), "task": torch.randn(2, 2, 6)}
    plain = make_encoder({"type": "state"}, fields, 2)
    assert list(plain.parameters()) == []
    assert torch.equal(plain(obs)[:, 6:], obs["task"][:, -1])
    layer = make_encoder({"type": "state", "tasks": {"dim": 4}}, fields, 2)
    assert layer(obs).shape == (2, layer.cond_dim) == (2, 10)
    assert [tuple(p.shape) for p in layer.parameters()] == [(4, 6), (4,)]


def test_encoders_without_tasks_are_as_they_were():
    encoder = make_encoder({"type": "state"}, JOINTS, 2)
    assert set(vars(encoder)) - set(vars(nn.Module())) == {"names", "cond_dim"}
    assert list(encoder.parameters()) == []


@pytest.mark.parametrize(
    ("fields", "tasks", "message"),
    [
        ({"a": JOINTS, "task": TASK}, {}, "say how many there are, encoder.tasks.count"),
        ({"a": JOINTS}, {"count": 2}, "of one field whose role is task"),
        ({"a": TASK, "b": TASK}, {"count": 2}, r"of one field.*\['a', 'b'\]"),
        ({"a": JOINTS, "task": TASK}, {"count": 0}, "count must be at least 1"),
        ({"a": JOINTS, "task": TASK}, {"cuont": 2}, "did you mean 'encoder.tasks.count'"),
        (
            {"task": ObsField((6,), "float32", "task")},
            {"count": 2},
            r"count is for integers \[1\]",
        ),
    ],
)
def test_settings_of_tasks_that_do_not_fit_are_refused(fields, tasks, message):
    with pytest.raises(ValueError, match=message):
        make_encoder({"type": "state", "tasks": tasks}, fields, 2)
