from __future__ import annotations

import pytest

from diffpolicy.networks import MLP, NETWORKS, Transformer, UNet1D, make_network

SHAPE = {"horizon": 8, "dim": 2, "cond_dim": 4}


def test_types():
    names = {"anchored", "flow_map", "mlp", "modalities", "sequence_cnn"} | {
        "transformer",
        "unet1d",
    }
    in_one_call = {"act", "bc_gmm", "bc_mlp"}
    assert set(NETWORKS) == names | in_one_call
    assert isinstance(make_network({"type": "mlp", **SHAPE}), MLP)
    assert isinstance(make_network({"type": "unet1d", "down_dims": [16, 32], **SHAPE}), UNet1D)
    assert isinstance(
        make_network({"type": "transformer", "width": 32, "depth": 1, **SHAPE}), Transformer
    )


def test_config_is_left_alone():
    config = {"type": "mlp", "width": 16, **SHAPE}
    make_network(config)
    assert config["type"] == "mlp"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"type": "resnet", **SHAPE},
            r"unknown network type 'resnet'; expected one of anchored, mlp",
        ),
        (SHAPE, r"network type None; expected one of"),
        ({"type": "mlp", "widht": 3, **SHAPE}, r"no setting 'widht'.*did you mean 'width'"),
        ({"type": "mlp", "down_dims": [3], **SHAPE}, r"no setting 'down_dims'; it has horizon"),
        ({"type": "mlp", "dim": 3}, r"network 'mlp' needs horizon"),
        ({"type": "mlp", **SHAPE, "horizon": 0}, r"horizon must be a positive integer, got 0"),
        ({"type": "mlp", **SHAPE, "dim": 2.0}, r"dim must be a positive integer, got 2.0"),
        ({"type": "mlp", **SHAPE, "cond_dim": -1}, r"cond_dim must be at least 0"),
        ({"type": "mlp", **SHAPE, "depth": 0}, r"depth must be a positive integer"),
        ({"type": "mlp", **SHAPE, "time_dim": 7}, r"time_dim must be an even integer"),
        ({"type": "mlp", **SHAPE, "t_kind": "step"}, r"unknown t_kind"),
        ({"type": "transformer", **SHAPE, "width": 30}, r"width must be a multiple of heads"),
        ({"type": "unet1d", **SHAPE, "kernel_size": 4}, r"kernel_size must be odd"),
        ({"type": "unet1d", **SHAPE, "down_dims": []}, r"at least one resolution"),
        ({"type": "unet1d", **SHAPE, "down_dims": [12, 24]}, r"multiples of n_groups=8"),
        ({"type": "unet1d", **SHAPE, "down_dims": [4, 8], "n_groups": 4}, r"the first of 8"),
        (
            {"type": "unet1d", **SHAPE, "horizon": 10},
            r"multiple of 4, such as 12",
        ),
        ({"type": "unet1d", **SHAPE, "horizon": 3}, r"multiple of 4, such as 4"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        make_network(config)
