"""What every network promises, whatever its architecture."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffpolicy.networks import make_network

# Ops that read a tensor's value on the host, or whose result shape depends on values.
SYNCING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::unique",
)


class SyncCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        name = func._schema.name
        if name.startswith(SYNCING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def example_inputs(network, batch=4, kind="row"):
    generator = torch.Generator().manual_seed(1)
    shape = {
        "row": (batch, 1, 1),
        "position": (batch, network.horizon, 1),
        "dim": (batch, 1, network.dim),
    }[kind]
    x = torch.randn(batch, network.horizon, network.dim, generator=generator)
    t = 100 * torch.rand(shape, generator=generator)
    return x, t, torch.randn(batch, network.cond_dim, generator=generator)


def test_counter_sees_item():
    with SyncCounter() as counter:
        torch.ones(()).item()
    assert counter.found == ["aten::_local_scalar_dense"]


def test_forward_reads_nothing_on_the_host(small_network):
    for kind in small_network.t_kinds:
        x, t, cond = example_inputs(small_network, kind=kind)
        with SyncCounter() as counter:
            small_network(x, t, cond).sum().backward()
        assert counter.total > 10
        assert counter.found == []


def test_rows_do_not_depend_on_their_batch(small_network):
    for kind in small_network.t_kinds:
        x, t, cond = example_inputs(small_network, kind=kind)
        together = small_network(x, t, cond)
        assert together.shape == x.shape
        alone = torch.cat([small_network(*(v[i : i + 1] for v in (x, t, cond))) for i in range(4)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_precomputed_time_embedding_gives_the_same_output(small_network):
    for kind in small_network.t_kinds:
        x, t, cond = example_inputs(small_network, kind=kind)
        expected = small_network(x, t, cond)
        embedded = small_network.embed_time(t)
        torch.testing.assert_close(small_network(x, t, cond, time_emb=embedded), expected)
        # Stacked over the steps of a loop, as the sampler does it; one row serves the whole batch.
        one = t[:1]
        loop = small_network.embed_time(torch.stack([one, one + 3.0, one + 7.0]))
        for step, offset in enumerate((0.0, 3.0, 7.0)):
            torch.testing.assert_close(
                small_network(x, one, cond, time_emb=loop[step]),
                small_network(x, (one + offset).expand_as(t), cond),
                atol=1e-5,
                rtol=1e-5,
            )


def test_every_kind_of_equal_levels_gives_the_per_row_result(small_network):
    x, t, cond = example_inputs(small_network)
    expected = small_network(x, t, cond)
    shapes = {"position": (4, small_network.horizon, 1), "dim": (4, 1, small_network.dim)}
    for kind in small_network.t_kinds - {"row"}:
        torch.testing.assert_close(
            small_network(x, t.expand(shapes[kind]), cond), expected, atol=1e-5, rtol=1e-5
        )


def test_unequal_levels_matter(small_network):
    for kind in small_network.t_kinds:
        x, t, cond = example_inputs(small_network, kind=kind)
        other = t.clone()
        other[:, -1, -1] += 200
        assert (small_network(x, other, cond) - small_network(x, t, cond)).abs().max() > 1e-4


def test_time_may_be_a_number_or_shared_by_the_batch(small_network):
    x, _, cond = example_inputs(small_network)
    expected = small_network(x, torch.full((4, 1, 1), 7.0), cond)
    for t in (torch.tensor(7.0), torch.full((1, 1, 1), 7.0), torch.tensor(7.0).double()):
        torch.testing.assert_close(small_network(x, t, cond), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(small_network):
    x, t, cond = example_inputs(small_network)
    small_network(x, t, cond).square().mean().backward()
    silent = [
        name
        for name, parameter in small_network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert silent == []


def test_training_from_the_initial_weights_wakes_every_parameter(small_config):
    torch.manual_seed(0)
    network = make_network(small_config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    x, t, cond = example_inputs(network)
    for _ in range(4):
        optimizer.zero_grad()
        (network(x, t, cond) - x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in network.named_parameters())


def test_config_rebuilds_the_network(small_network, small_config):
    config = json.loads(json.dumps(small_network.config()))
    assert config.items() >= small_config.items()
    twin = make_network(config)
    twin.load_state_dict(small_network.state_dict())
    assert twin.num_parameters() == small_network.num_parameters()
    assert torch.equal(twin(*example_inputs(twin)), small_network(*example_inputs(small_network)))


def test_same_seed_same_network(small_config):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(make_network(small_config).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_unconditional(small_config):
    network = make_network({**small_config, "cond_dim": 0})
    x, t, _ = example_inputs(network)
    assert network(x, t).shape == x.shape
    with pytest.raises(ValueError, match=r"cond_dim=0 \(0: unconditional\), got cond \[4, 5\]"):
        network(x, t, torch.zeros(4, 5))


def test_captured_without_a_graph_break(small_network):
    x, t, cond = example_inputs(small_network)
    compiled = torch.compile(small_network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, cond), small_network(x, t, cond))


def test_double_precision_runs_throughout(small_network):
    network = small_network.double()
    x, t, cond = (v.double() for v in example_inputs(network))
    assert network(x, t, cond).dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda x: network(x, t[:1], cond[:1]), (x[:1].requires_grad_(),), atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 7, 3)}, r"x must be \[B, 8, 3\].*\[4, 7, 3\]"),
        ({"x": (8, 3)}, r"x must be \[B, 8, 3\]"),
        ({"cond": (4, 6)}, r"cond must be \[B, 5\].*\[4, 6\]"),
        ({"cond": (4, 1, 5)}, r"cond must be \[B, 5\], got \[4, 1, 5\]"),
        ({"cond": None}, "built with cond_dim=5.*got cond none"),
    ],
)
def test_wrong_shapes_are_refused(small_network, change, message):
    shapes = {"x": (4, 8, 3), "cond": (4, 5), **change}
    x, cond = (None if s is None else torch.zeros(s) for s in (shapes["x"], shapes["cond"]))
    with pytest.raises(ValueError, match=message):
        small_network(x, torch.zeros(4, 1, 1), cond)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_a_gpu(small_network):
    network = small_network.cuda()
    x, t, cond = (v.cuda() for v in example_inputs(network))
    network(x, t, cond)
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(x, t, cond).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
