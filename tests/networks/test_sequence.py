"""Networks of sequences: the dilated CNN, integer tokens, and the regressor of oracles."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffpolicy.networks import SequenceCNN, SequenceRegressor, make_head, make_network
from diffpolicy.networks.sequence import PositionConv

LENGTH, DIM = 9, 5
TOKENS_TAKEN = {
    "mlp": {"width": 16, "depth": 1},
    "transformer": {"width": 16, "depth": 1, "heads": 2},
    "sequence_cnn": {"width": 16, "dilations": [1, 2]},
}


def shaken(network, scale=0.1):
    """Layers that start at zero made random: every path carries signal."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return network


def small_cnn(**options):
    return SequenceCNN(LENGTH, DIM, **{"width": 16, "dilations": (1, 2), **options})


def tokens_of(batch=4, length=LENGTH, size=DIM):
    return torch.randint(size, (batch, length), generator=torch.Generator().manual_seed(1))


def by_conv1d(conv, h, kernel_size):
    """The same convolution by torch's own, with the taps that were left out as zeros."""
    lost = kernel_size - conv.weight.shape[1]
    kernel = F.pad(conv.weight.transpose(1, 2), (lost // 2, lost // 2))
    out = F.conv1d(
        h.transpose(1, 2),
        kernel,
        conv.bias,
        padding=kernel_size // 2 * conv.dilation,
        dilation=conv.dilation,
    )
    return F.relu(out).transpose(1, 2)


@pytest.mark.parametrize(
    ("length", "kernel_size", "dilation", "taps"),
    [(75, 9, 1, 9), (75, 9, 16, 9), (75, 9, 64, 3), (10, 5, 4, 5), (8, 9, 8, 1), (1, 3, 1, 1)],
)
def test_convolution_is_conv1d_without_the_taps_that_only_see_padding(
    length, kernel_size, dilation, taps
):
    torch.manual_seed(0)
    conv = PositionConv(6, 4, kernel_size, length=length, dilation=dilation).double()
    assert conv.weight.shape == (4, taps, 6)
    h = torch.randn(3, length, 6, dtype=torch.double, requires_grad=True)
    ours, expected = conv(h), by_conv1d(conv, h, kernel_size)
    torch.testing.assert_close(ours, expected)
    wanted = (h, conv.weight, conv.bias)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_untrained_logits_are_uniform():
    out = small_cnn()(tokens_of(), torch.tensor(0.0))
    assert out.shape == (4, LENGTH, DIM)
    assert torch.equal(out, torch.zeros_like(out))


def test_parameter_count_at_a_short_length():
    network = SequenceCNN(75, 5, width=32, stacks=2)
    taps = 2 * (9 + 9 + 9 + 9 + 3)
    blocks = taps * 32 * 32 + 10 * (32 + 2 * 32)
    shifts, time = 32 * 320 + 320, 2 * (32 * 32 + 32)
    ends = 9 * 5 * 32 + 32 + 75 * 32 + 32 * 32 + 32 + 32 * 5 + 5
    assert network.num_parameters() == blocks + shifts + time + ends


@pytest.mark.parametrize("cond_dim", [0, 3])
@pytest.mark.parametrize("kind", list(TOKENS_TAKEN))
def test_tokens_and_their_one_hot_agree(kind, cond_dim):
    config = {"type": kind, "horizon": LENGTH, "dim": DIM, "cond_dim": cond_dim}
    network = shaken(make_network({**config, **TOKENS_TAKEN[kind]})).double()
    tokens = tokens_of()
    cond = torch.randn(4, cond_dim, dtype=torch.double) if cond_dim else None
    t = torch.linspace(0, 1000, 4, dtype=torch.double).view(4, 1, 1)
    hard = F.one_hot(tokens, DIM).double()
    hard_out, token_out = network(hard, t, cond), network(tokens, t, cond)
    torch.testing.assert_close(token_out, hard_out, atol=1e-12, rtol=0)
    names = dict(network.named_parameters())
    for name, a, b in zip(
        names,
        torch.autograd.grad(token_out.square().sum(), names.values()),
        torch.autograd.grad(hard_out.square().sum(), names.values()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("kind", list(TOKENS_TAKEN))
def test_tokens_in_a_captured_graph(kind):
    network = shaken(
        make_network({"type": kind, "horizon": LENGTH, "dim": DIM, **TOKENS_TAKEN[kind]})
    )
    t = torch.zeros(1, 1, 1)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens_of(), t), network(tokens_of(), t))


def test_export():
    network, t = shaken(small_cnn()), torch.zeros(1, 1, 1)
    exported = torch.export.export(network.eval(), (tokens_of(), t)).module()
    torch.testing.assert_close(exported(tokens_of(), t), network(tokens_of(), t))


@pytest.mark.parametrize("kind", list(TOKENS_TAKEN))
def test_tokens_that_do_not_fit(kind):
    network = make_network({"type": kind, "horizon": LENGTH, "dim": DIM, **TOKENS_TAKEN[kind]})
    t = torch.zeros(1, 1, 1)
    for wrong in (
        tokens_of(length=8),
        tokens_of().int(),
        tokens_of() > 0,
        F.one_hot(tokens_of(), DIM),
    ):
        with pytest.raises(ValueError, match=r"tokens must be int64 \[B, 9\].* in 0 .. 4"):
            network(wrong, t)
    with pytest.raises(IndexError):
        network(torch.full((1, LENGTH), DIM), t)


def test_networks_of_plans_refuse_tokens():
    network = make_network({"type": "unet1d", "horizon": 8, "dim": DIM, "down_dims": [8, 16]})
    with pytest.raises(ValueError, match=r"UNet1D takes x \[B, 8, 5\] of floats.*sequence_cnn"):
        network(tokens_of(length=8), torch.zeros(1, 1, 1))


def test_gradients_reach_a_soft_input():
    x = torch.softmax(torch.randn(4, LENGTH, DIM), -1).requires_grad_()
    out = shaken(small_cnn())(x, torch.tensor(3.0))
    (slope,) = torch.autograd.grad(out.square().sum(), x)
    assert (slope.abs().sum(-1) > 0).all()


def test_only_positions_tell_masked_positions_apart():
    masked = torch.full((1, 40), DIM - 1)
    inner = slice(10, 30)  # further from the ends than three convolutions of 3 taps reach

    def spread(positions):
        network = SequenceCNN(
            40, DIM, width=16, kernel_size=3, dilations=(1, 2), positions=positions
        )
        out = shaken(network)(masked, torch.tensor(0.0))[0, inner]
        return (out - out[0]).abs().max()

    assert spread(False) < 1e-5
    assert spread(True) > 1e-2


def test_dropout_acts_in_training_alone():
    network = shaken(small_cnn(dropout=0.5))
    t = torch.tensor(0.0)
    first, second = network(tokens_of(), t), network(tokens_of(), t)
    assert not torch.equal(first, second)
    network.eval()
    assert torch.equal(network(tokens_of(), t), network(tokens_of(), t))


def test_every_option_survives_the_config():
    options = dict(
        width=8, kernel_size=5, dilations=(1, 3), stacks=2, positions=False, dropout=0.25
    )
    network = SequenceCNN(LENGTH, DIM, 3, **options)
    config = json.loads(json.dumps(network.config()))
    assert config == {
        **options,
        "type": "sequence_cnn",
        "horizon": LENGTH,
        "dim": DIM,
        "cond_dim": 3,
        "dilations": [1, 3],
    }
    twin = make_network(config)
    twin.load_state_dict(network.state_dict())
    assert all(value.is_contiguous() for value in network.state_dict().values())
    assert twin.config() == network.config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, r"width must be an even integer"),
        ({"kernel_size": 4}, r"kernel_size must be odd"),
        ({"kernel_size": 0}, r"kernel_size must be a positive integer"),
        ({"dilations": []}, r"dilations must be a list.*\[\]"),
        ({"dilations": 4}, r"dilations must be a list"),
        ({"dilations": [1, 0]}, r"dilations\[1\] must be a positive integer, got 0"),
        ({"stacks": 0}, r"stacks must be a positive integer"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small_cnn(**options)


def test_cnn_learns_a_motif_and_its_complement():
    # The second half repeats the first reversed: masked there, it must be read from afar.
    torch.manual_seed(0)
    network = SequenceCNN(8, 5, width=16, kernel_size=3, dilations=(1, 2, 4))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    t = torch.zeros(1, 1, 1)
    for _ in range(150):
        half = torch.randint(4, (64, 4))
        shown = torch.cat([half, torch.full_like(half, 4)], 1)
        loss = F.cross_entropy(network(shown, t)[:, 4:].flatten(0, 1), half.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # log 4 = 1.39 when nothing is learned


@pytest.fixture
def regressor():
    torch.manual_seed(0)
    return SequenceRegressor(LENGTH, 4, width=8, depth=2, kernel_size=3).eval()


def test_regressor_shapes_and_tokens(regressor):
    tokens = tokens_of(size=4)
    hard = F.one_hot(tokens, 4).float()
    assert regressor(tokens).shape == (4,)
    torch.testing.assert_close(regressor(tokens), regressor(hard), atol=1e-6, rtol=0)
    assert SequenceRegressor(LENGTH, 4, 3, width=8)(hard).shape == (4, 3)
    assert SequenceRegressor(1, 2, width=4)(tokens_of(length=1, size=2)).shape == (4,)
    compiled = torch.compile(regressor, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hard), regressor(hard))


def test_regressor_gradient_in_a_soft_input(regressor):
    regressor.double()
    x = torch.softmax(torch.randn(2, LENGTH, 4, dtype=torch.double), -1).requires_grad_()
    assert torch.autograd.gradcheck(regressor, (x,), atol=1e-6)
    (slope,) = torch.autograd.grad(regressor(x).sum(), x)
    assert (slope.abs().sum(-1) > 0).all()


def test_regressor_is_a_head(regressor):
    config = json.loads(json.dumps(regressor.config()))
    twin = make_head(config).eval()
    twin.load_state_dict(regressor.state_dict())
    assert isinstance(twin, SequenceRegressor)
    assert torch.equal(twin(tokens_of(size=4)), regressor(tokens_of(size=4)))
    with pytest.raises(ValueError, match=r"head 'sequence_regressor' has no setting 'lenght'"):
        make_head({"type": "sequence_regressor", "lenght": 3})


def test_regressor_bad_inputs(regressor):
    for wrong in (
        torch.zeros(2, LENGTH, 5),
        torch.zeros(2, LENGTH),
        tokens_of(length=8),
        tokens_of().int(),
    ):
        with pytest.raises(ValueError, match=r"(x|tokens) must be "):
            regressor(wrong)
    with pytest.raises(IndexError):
        regressor(torch.full((1, LENGTH), 4))
    for options, message in (
        ({"outputs": 0}, "outputs must be a positive integer"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            SequenceRegressor(LENGTH, 4, **options)


def test_regressor_learns_where_a_motif_is():
    # AC at one place raises the activity, unless AC at another turns it to its opposite: neither a
    # sum over places nor the composition of the sequence explains it.
    torch.manual_seed(0)
    length = 12

    def truth(tokens):
        first = (tokens[:, 2] == 0) & (tokens[:, 3] == 1)
        second = (tokens[:, 8] == 0) & (tokens[:, 9] == 1)
        return first.float() * (1 - 2 * second.float())

    def draw(count):
        tokens = torch.randint(4, (count, length))
        for site in (2, 8):
            planted = torch.rand(count) < 0.5
            tokens[planted, site : site + 2] = torch.tensor([0, 1])
        return tokens

    network = SequenceRegressor(length, 4, width=16, depth=1, kernel_size=3, dropout=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(150):
        tokens = draw(128)
        loss = nn.functional.mse_loss(network(tokens), truth(tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = draw(1000)
    left = F.mse_loss(network(tokens), truth(tokens)) / truth(tokens).var()
    assert left < 0.1  # the best linear function of the one-hot leaves 0.55
