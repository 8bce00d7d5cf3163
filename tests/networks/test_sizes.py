"""Parameter counts follow from the configs."""

from __future__ import annotations

from diffpolicy.networks import make_network


def linear(i, o):
    return i * o + o


def test_mlp():
    h, d, c, w, n, e, s = 16, 7, 40, 64, 3, 2, 32
    network = make_network(
        dict(type="mlp", horizon=h, dim=d, cond_dim=c, width=w, depth=n, expansion=e, time_dim=s)
    )
    time = linear(s, w) + linear(w, w)
    cond = linear(c, w) + linear(w, w)
    film = linear(w, 2 * n * w)
    blocks = n * (linear(w, e * w) + linear(e * w, w))
    ends = linear(h * d, w) + 2 * w + linear(w, h * d)
    assert network.num_parameters() == time + cond + film + blocks + ends


def test_unet():
    d, c, e, k = 2, 40, 64, 5
    network = make_network(
        dict(
            type="unet1d",
            horizon=16,
            dim=d,
            cond_dim=c,
            down_dims=[16, 32],
            diffusion_step_embed_dim=e,
            kernel_size=k,
        )
    )

    def block(i, o):
        convs = linear(i * k, o) + linear(o * k, o) + 4 * o
        return convs + linear(e + c, 2 * o) + (linear(i, o) if i != o else 0)

    stages = [(d, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32), (64, 16), (16, 16)]
    resampling = linear(16 * 3, 16) + linear(16 * 4, 16)
    ends = linear(e, 4 * e) + linear(4 * e, e) + linear(16 * k, 16) + 32 + linear(16, d)
    assert network.num_parameters() == sum(block(*s) for s in stages) + resampling + ends


def test_transformer():
    h, d, c, w, n = 16, 7, 40, 64, 3
    network = make_network(
        dict(type="transformer", horizon=h, dim=d, cond_dim=c, width=w, depth=n, heads=4)
    )
    block = linear(w, 3 * w) + linear(w, w) + linear(w, 4 * w) + linear(4 * w, w)
    ends = linear(d, w) + h * w + linear(w, d)
    embeddings = 2 * linear(w, w) + linear(c, w) + linear(w, w)
    modulation = linear(w, (6 * n + 2) * w)
    assert network.num_parameters() == n * block + ends + embeddings + modulation


def test_frozen_parameters_do_not_count():
    network = make_network(dict(type="mlp", horizon=4, dim=2, width=8))
    network.requires_grad_(False)
    assert network.num_parameters() == 0
