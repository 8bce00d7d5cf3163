from __future__ import annotations

import pytest
import torch
from reference_unet import PublishedUNet, randomise

from diffpolicy.networks import (
    from_diffusion_policy_state_dict,
    from_lerobot_state_dict,
    make_network,
)

CONVERTERS = {
    "diffusion_policy": from_diffusion_policy_state_dict,
    "lerobot": from_lerobot_state_dict,
}
VARIANTS = {
    "published sizes of three levels, scaled down": dict(down_dims=[16, 32, 64], embed=32),
    "shift alone": dict(down_dims=[16, 32], embed=16, scale=False, kernel=3),
    "other groups": dict(down_dims=[16, 48, 96], embed=16, groups=4),
    "one level": dict(down_dims=[16], embed=16),
    "four levels": dict(down_dims=[8, 16, 16, 32], embed=16, kernel=3),
}


def converted(layout, *, cond_dim=6, horizon=16, seed=0, **options):
    reference = randomise(PublishedUNet(3, cond_dim, layout=layout, **options), seed)
    config, state = CONVERTERS[layout](
        reference.state_dict(), horizon=horizon, n_groups=options.get("groups", 8)
    )
    network = make_network(config)
    network.load_state_dict(state)
    return reference, network


@pytest.mark.parametrize("layout", CONVERTERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cond_dim", [6, 0])
def test_converted_weights_give_the_same_output(layout, variant, cond_dim):
    reference, network = converted(layout, cond_dim=cond_dim, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 16, 3, generator=generator)
    step = torch.tensor([0, 1, 37, 98, 99])
    cond = torch.randn(5, cond_dim, generator=generator) if cond_dim else None
    with torch.no_grad():
        expected = reference(x, step, cond)
        actual = network(x, step.view(-1, 1, 1), cond)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_published_parameter_names():
    """A sample of the names and shapes in the published Push-T checkpoint's U-Net."""
    with torch.device("meta"):
        names = PublishedUNet(2, 40, [256, 512, 1024], layout="diffusion_policy").state_dict()
    published = {
        "diffusion_step_encoder.1.weight": (1024, 256),
        "diffusion_step_encoder.3.bias": (256,),
        "down_modules.0.0.blocks.0.block.0.weight": (256, 2, 5),
        "down_modules.0.0.cond_encoder.1.weight": (512, 296),
        "down_modules.0.0.residual_conv.weight": (256, 2, 1),
        "down_modules.1.2.conv.weight": (512, 512, 3),
        "mid_modules.1.blocks.1.block.1.bias": (1024,),
        "up_modules.0.0.blocks.0.block.0.weight": (512, 2048, 5),
        "up_modules.1.2.conv.weight": (256, 256, 4),
        "final_conv.0.block.0.weight": (256, 256, 5),
        "final_conv.1.weight": (2, 256, 1),
    }
    assert {name: tuple(names[name].shape) for name in published} == published
    assert "down_modules.2.2.conv.weight" not in names
    config, state = from_diffusion_policy_state_dict(names, horizon=16)
    assert config == {
        "type": "unet1d",
        "horizon": 16,
        "dim": 2,
        "cond_dim": 40,
        "down_dims": [256, 512, 1024],
        "kernel_size": 5,
        "n_groups": 8,
        "diffusion_step_embed_dim": 256,
        "cond_predict_scale": True,
    }
    assert sum(v.numel() for v in state.values()) == sum(v.numel() for v in names.values())


def test_the_result_does_not_share_memory():
    reference, network = converted("diffusion_policy", down_dims=[16], embed=16)
    state = reference.state_dict()
    _, out = from_diffusion_policy_state_dict(state, horizon=16)
    ours = {v.data_ptr() for v in out.values()}
    assert not ours & {v.data_ptr() for v in state.values()}
    assert network.horizon == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mid_modules.0.blocks.0.block.0.bias"), r"mid_modules.*is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 tensors have no place.*'extra'"),
        (
            lambda s: s.update({"local_cond_encoder.0.blocks.0.block.0.bias": torch.zeros(1)}),
            r"local conditioning",
        ),
        (
            lambda s: [s.update({f"model.{k}": s.pop(k)}) for k in list(s)],
            r"no down_modules.*a prefix before them",
        ),
    ],
)
def test_other_state_dicts_are_refused(change, message):
    reference, _ = converted("diffusion_policy", down_dims=[16, 32], embed=16)
    state = dict(reference.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        from_diffusion_policy_state_dict(state, horizon=16)


def test_a_horizon_that_cannot_be_halved_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"multiple of 4"):
        converted("lerobot", down_dims=[16, 32, 64], embed=16, horizon=10)
