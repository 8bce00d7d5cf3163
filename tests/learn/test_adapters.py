"""Adapters: exact small cases, every network in every way of use, and training them."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffpolicy.core import Denoiser, LogLinear, VPCosine, levels, make_solver, prior_start, sample
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.reveal import Ancestral
from diffpolicy.core.sampling import prepare
from diffpolicy.core.starts import Ramp
from diffpolicy.learn.adapters import (
    adapters_off,
    add_adapters,
    has_adapters,
    merge_adapters,
    merged_state,
)
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.networks import make_network
from diffpolicy.training.checkpoint import read_bundle
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer

LORA = {"type": "lora", "rank": 2, "scale": 0.5}
SARA = {"type": "sara", "quantile": 0.15}
H, D, C = 8, 3, 5
MLP = {"type": "mlp", "width": 16, "depth": 2, "time_dim": 8}
PLANS = {
    "mlp": MLP,
    "mlp by position": {**MLP, "t_kind": "position"},
    "unet1d": {
        "type": "unet1d",
        "down_dims": [8, 16],
        "kernel_size": 3,
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
    },
    "transformer": {"type": "transformer", "width": 16, "depth": 2, "heads": 2},
    "sequence_cnn": {"type": "sequence_cnn", "width": 16, "kernel_size": 5, "dilations": [1, 4]},
    "anchored": {"type": "anchored", "base": MLP, "stages": 2},
}
TOKENS = ("mlp", "transformer", "sequence_cnn", "unet1d")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stir(module, seed=0, std=0.1):
    """Moves what takes a gradient away from its start, zeros in particular."""
    g = seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn(p.shape, generator=g))


def plan_denoiser(name="mlp", seed=0):
    torch.manual_seed(seed)
    network = make_network({**PLANS[name], "horizon": H, "dim": D, "cond_dim": C})
    stir(network)
    return Denoiser(network, VPCosine(), "eps").eval()


def token_denoiser(name, seed=0):
    torch.manual_seed(seed)
    network = make_network({**PLANS[name], "horizon": H, "dim": 5, "cond_dim": C})
    stir(network)
    return MaskedDenoiser(network, LogLinear(), 4).eval()


@torch.no_grad()
def plans(denoiser):
    """Sampled with embeddings, and where a network has them modulations, computed beforehand."""
    start = prior_start(denoiser.process, torch.randn(4, H, D, generator=seeded(1)))
    cond = torch.randn(4, C, generator=seeded(2))
    return sample(denoiser, make_solver("ddim"), start, levels(start, 3), cond=cond)


@torch.no_grad()
def outputs(denoiser):
    """Everything that a network is asked for."""
    x = torch.randn(4, H, D, generator=seeded(3))
    cond = torch.randn(4, C, generator=seeded(4))
    answers = [plans(denoiser), denoiser.raw(x, torch.full((4, 1, 1), 0.3), cond)]
    if "position" in denoiser.network.t_kinds:
        ramp = Ramp(H, 1, 4).levels(torch.rand(4, 1, 1, generator=seeded(5)))
        answers.append(denoiser(x, ramp, cond).x0_hat)
    answers += list(denoiser(x, torch.full((1, 1, 1), 0.3), cond).aux.values())
    return answers


@torch.no_grad()
def token_outputs(denoiser):
    cond = torch.randn(4, C, generator=seeded(2))
    tokens = torch.randint(5, (4, H), generator=seeded(3))
    soft = F.one_hot(tokens, 5).float()
    t = torch.full((4, 1, 1), 0.5)
    start = prior_start(denoiser.process, denoiser.process.draw_noise((4, H, 5), seeded(), soft))
    sampled = sample(denoiser, Ancestral(), start, levels(start, 3), cond=cond, generator=seeded(6))
    return [denoiser.log_probs(v, t, cond) for v in (tokens, soft)] + [sampled]


def same(left, right):
    assert len(left) == len(right)
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check_every_use(denoiser, answer, config):
    """On = merged, off = original, both bit for bit; on differs."""
    before, names = answer(denoiser), list(denoiser.state_dict())
    add_adapters(denoiser, config)
    assert same(answer(denoiser), before)  # changes start at zero
    stir(denoiser, 7, 0.3)
    on = answer(denoiser)
    assert not any(torch.equal(a, b) for a, b in zip(on[:2], before[:2], strict=True))
    with adapters_off(denoiser):
        assert same(answer(denoiser), before)
    twin = frozen_copy(denoiser)
    state = merged_state(denoiser, denoiser.state_dict())
    merge_adapters(denoiser)
    assert same(answer(denoiser), on)
    assert same(answer(twin), on)  # merging leaves copies alone
    assert sorted(denoiser.state_dict()) == sorted(names) == sorted(state)
    assert all(torch.equal(value, state[name]) for name, value in denoiser.state_dict().items())


# ---------------------------------------------------------------- exact cases


class Layers(nn.Module):
    """One layer of each kind; only its weights matter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.conv = nn.Conv1d(3, 5, 3)
        self.pointwise = nn.Conv1d(6, 4, 1)
        self.grow = nn.ConvTranspose1d(4, 3, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.tiny = nn.Linear(6, 1)


def layers():
    torch.manual_seed(0)
    holder = nn.Module()
    holder.network = Layers()
    return holder


def test_a_low_rank_change_is_scale_times_up_times_down():
    holder = layers()
    old = {name: p.detach().clone() for name, p in holder.network.named_parameters()}
    add_adapters(holder, {"type": "lora", "rank": 1, "scale": 2.0})
    adapter = holder.network.linear.parametrizations.weight[0]
    with torch.no_grad():
        adapter.up.copy_(torch.tensor([[1.0], [0.0], [-1.0], [2.0]]))
        adapter.down.copy_(torch.arange(6.0).view(1, 6))
    expected = torch.tensor([1.0, 0.0, -1.0, 2.0])[:, None] * torch.arange(6.0) * 2
    change = holder.network.linear.weight - old["linear.weight"]
    torch.testing.assert_close(change, expected)
    assert torch.equal(holder.network.conv.weight, old["conv.weight"])


def test_every_kind_of_weight_is_adapted_with_the_given_rank():
    holder = layers()
    add_adapters(holder, {"type": "lora", "rank": 2})
    adapted = {
        name.removeprefix("network.").replace(".parametrizations", "").removesuffix(".0.up"): p
        for name, p in holder.named_parameters()
        if name.endswith(".up")
    }
    assert {name: len(p) for name, p in adapted.items()} == {
        "linear.weight": 4,
        "conv.weight": 5,
        "pointwise.weight": 4,
        "grow.weight": 4,
        "attention.in_proj_weight": 24,
        "attention.out_proj.weight": 8,
    }  # not tiny, of one row, nor the norm
    before = holder.network.conv.weight.detach().clone()
    stir(holder)
    change = (holder.network.conv.weight - before).flatten(1)
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2


def test_the_start_of_a_low_rank_change():
    holder = layers()
    state = torch.random.get_rng_state()
    add_adapters(holder, {"type": "lora", "rank": 3, "targets": ["conv"], "seed": 4})
    assert torch.equal(torch.random.get_rng_state(), state)  # its own seed alone
    adapter = holder.network.conv.parametrizations.weight[0]
    assert adapter.up.shape == (5, 3)
    assert adapter.down.shape == (3, 9)
    assert not adapter.up.any()
    assert 0.2 < adapter.down.abs().max() <= 1 / 3  # uniform in +-1 / sqrt(columns)


def test_packed_attention_is_effective_and_merges():
    holder = layers()
    holder.network.eval()
    x = torch.randn(2, 3, 8, generator=seeded())

    def attend():
        with torch.no_grad():
            return holder.network.attention(x, x, x, need_weights=False)[0]

    before = attend()
    add_adapters(holder, {"type": "lora", "rank": 2, "targets": ["attention"]})
    stir(holder)
    on = attend()
    assert not torch.equal(on, before)
    with adapters_off(holder):
        assert torch.equal(attend(), before)
    merge_adapters(holder)
    assert torch.equal(attend(), on)


def test_a_sparse_change_is_of_the_smallest_weights():
    holder = layers()
    with torch.no_grad():
        holder.network.tiny.weight.copy_(torch.tensor([[0.5, -0.1, 0.3, 0.0, -2.0, 0.2]]))
    add_adapters(holder, {"type": "sara", "quantile": 0.5, "targets": ["tiny"]})
    adapter = holder.network.tiny.parametrizations.weight[0]
    assert adapter.index.tolist() == [1, 3, 5]
    with torch.no_grad():
        adapter.change.copy_(torch.tensor([1.0, 2.0, 3.0]))
    weight = holder.network.tiny.weight
    torch.testing.assert_close(weight, torch.tensor([[0.5, 0.9, 0.3, 2.0, -2.0, 3.2]]))
    weight.mul(torch.arange(6.0)).sum().backward()
    assert adapter.change.grad.tolist() == [1.0, 3.0, 5.0]  # of the trained entries alone
    assert holder.network.tiny.parametrizations.weight.original.grad is None


def test_the_quantile_is_one_of_every_layer():
    denoiser = plan_denoiser()
    sizes = {n: p.numel() for n, p in denoiser.named_parameters() if p.dim() > 1}
    add_adapters(denoiser, SARA)
    changes = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    assert len(changes) == len(sizes)
    for name, p in changes.items():
        plain = name.replace(".parametrizations", "").removesuffix(".0.change")
        assert len(p) == round(0.15 * sizes[plain])


def test_ties_are_broken_by_position():
    holder = layers()
    nn.init.zeros_(holder.network.tiny.weight)
    add_adapters(holder, {"type": "sara", "quantile": 0.5, "targets": ["tiny"]})
    assert holder.network.tiny.parametrizations.weight[0].index.tolist() == [0, 1, 2]


# ---------------------------------------------------------------- in every network


@pytest.mark.parametrize("config", [LORA, SARA], ids=["lora", "sara"])
@pytest.mark.parametrize("name", PLANS)
def test_plans_of_every_network(name, config):
    check_every_use(plan_denoiser(name), outputs, config)


@pytest.mark.parametrize("config", [LORA, SARA], ids=["lora", "sara"])
@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_every_network(name, config):
    check_every_use(token_denoiser(name), token_outputs, config)


@pytest.mark.parametrize("name", PLANS)
def test_every_adapter_gets_a_gradient(name):
    denoiser = plan_denoiser(name)
    add_adapters(denoiser, LORA)
    stir(denoiser)
    x = torch.randn(4, H, D, generator=seeded(3))
    cond = torch.randn(4, C, generator=seeded(4))
    t = torch.full((4, 1, 1), 0.3)
    if name == "anchored":  # no gradient crosses from one stage to the one before
        answers = [value for pair in denoiser.network.cascade(x, t, cond) for value in pair]
    else:
        answers = [denoiser.raw(x, t, cond)]
    sum(answer.square().sum() for answer in answers).backward()
    for key, p in denoiser.named_parameters():
        assert p.requires_grad == key.endswith((".up", ".down"))
        assert (p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad, key


def test_a_grid_prepared_with_adapters_off_is_the_originals():
    denoiser = plan_denoiser()
    before = plans(denoiser)
    add_adapters(denoiser, LORA)
    stir(denoiser)
    start = prior_start(denoiser.process, torch.randn(4, H, D, generator=seeded(1)))
    cond = torch.randn(4, C, generator=seeded(2))
    with torch.no_grad(), adapters_off(denoiser):
        grid = prepare(denoiser, make_solver("ddim"), levels(start, 3), start.x)
        again = sample(denoiser, make_solver("ddim"), start, grid, cond=cond)
    assert torch.equal(again, before)


# ---------------------------------------------------------------- switching


def test_blocks_nest_and_close_after_an_exception():
    denoiser = plan_denoiser()
    before = plans(denoiser)
    add_adapters(denoiser, LORA)
    stir(denoiser)
    on = plans(denoiser)
    with adapters_off(denoiser):
        with adapters_off(denoiser):
            assert torch.equal(plans(denoiser), before)
        assert torch.equal(plans(denoiser), before)
        with pytest.raises(RuntimeError, match="inside"), adapters_off(denoiser):
            raise RuntimeError("inside")
        assert torch.equal(plans(denoiser), before)
    assert torch.equal(plans(denoiser), on)


def test_copies_have_a_switch_of_their_own():
    denoiser = plan_denoiser()
    before = plans(denoiser)
    add_adapters(denoiser, LORA)
    stir(denoiser)
    on, twin = plans(denoiser), copy.deepcopy(denoiser)
    with adapters_off(denoiser):
        assert torch.equal(plans(twin), on)
        late = frozen_copy(denoiser)
        assert torch.equal(plans(late), on)  # nothing would ever switch it on
    with adapters_off(late):
        assert torch.equal(plans(late), before)
        assert torch.equal(plans(denoiser), on)
    stir(twin)
    assert torch.equal(plans(denoiser), on)
    assert has_adapters(twin)
    assert not any(p.requires_grad for p in late.parameters())


def test_merging_one_of_two_copies_leaves_the_other_adapted():
    denoiser = plan_denoiser()
    add_adapters(denoiser, LORA)
    stir(denoiser)
    on, twin = plans(denoiser), copy.deepcopy(denoiser)
    merge_adapters(twin)
    assert not has_adapters(twin)
    assert torch.equal(plans(twin), on)
    assert torch.equal(plans(denoiser), on)
    merge_adapters(denoiser)
    assert torch.equal(plans(denoiser), on)
    assert [type(m) for m in denoiser.modules()] == [type(m) for m in plan_denoiser().modules()]


def test_what_took_a_gradient_takes_one_again_after_merging():
    denoiser = plan_denoiser()
    denoiser.network.film.requires_grad_(requires_grad=False)
    taking = {n for n, p in denoiser.named_parameters() if p.requires_grad}
    add_adapters(denoiser, LORA)
    merge_adapters(denoiser)
    assert {n for n, p in denoiser.named_parameters() if p.requires_grad} == taking
    add_adapters(denoiser, SARA)  # and it can be adapted again
    assert has_adapters(denoiser)


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("config", [LORA, SARA], ids=["lora", "sara"])
def test_state_dicts_go_round(config):
    denoiser, other = plan_denoiser(), plan_denoiser(seed=1)
    add_adapters(denoiser, config)
    stir(denoiser)
    add_adapters(other, config)
    other.load_state_dict(denoiser.state_dict())
    assert torch.equal(plans(other), plans(denoiser))


def test_merged_state_is_of_the_given_state_alone():
    denoiser, plain = plan_denoiser(), plan_denoiser(seed=1)
    add_adapters(denoiser, LORA)
    state = {name: value.clone() for name, value in denoiser.state_dict().items()}
    kept = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        if name.endswith(".up"):
            kept[name] = value.normal_(generator=seeded()).clone()
    before = plans(denoiser)
    merged = merged_state(denoiser, state)
    assert torch.equal(plans(denoiser), before)
    assert all(torch.equal(value, kept[name]) for name, value in state.items())
    with adapters_off(denoiser):
        within = merged_state(denoiser, state)
    assert all(torch.equal(value, within[name]) for name, value in merged.items())
    plain.load_state_dict(merged)
    denoiser.load_state_dict(state)
    assert torch.equal(plans(plain), plans(denoiser))
    assert merged_state(plain, plain.state_dict()).keys() == merged.keys()


# ---------------------------------------------------------------- the trainer


class Demonstrations:
    """Windows of a fixed law."""

    def __init__(self, count=64):
        self.obs = torch.randn(count, 1, C, generator=seeded(8))
        self.action = self.obs[..., :D].expand(-1, H, -1).tanh().contiguous()

    def __len__(self):
        return len(self.obs)

    def gather(self, indices):
        return {"obs": self.obs[indices], "action": self.action[indices]}


CONFIG = TrainerConfig(
    steps=12,
    batch_size=16,
    lr=1e-2,
    warmup_steps=2,
    log_every=4,
    checkpoint_every=4,
    eval_every=6,
    progress=False,
)


def trainer(run_dir, config, *, resume=False, name="mlp"):
    objective = DenoisingLoss(plan_denoiser(name))
    add_adapters(objective.denoiser, config)

    def export(state):
        own = {k.removeprefix("denoiser."): v for k, v in state.items()}
        return {"model.safetensors": merged_state(objective.denoiser, own)}

    source = Demonstrations()
    return Trainer(objective, source, CONFIG, run_dir, export=export, val_source=source,
                   resume=resume)  # fmt: skip


def files(run):
    name = (Path(run) / "checkpoints" / "last").read_text().strip()
    found = read_bundle(Path(run) / "checkpoints" / name)
    found["training/state.json"].pop("train_s")
    return found


@pytest.mark.parametrize(("config", "name"), [(LORA, "mlp"), (SARA, "mlp"), (LORA, "transformer")])
def test_training_stops_resumes_and_exports(config, name, tmp_path):
    run = trainer(tmp_path / "whole", config, name=name)
    denoiser = run.objective.denoiser
    held = {n: p.clone() for n, p in denoiser.named_parameters() if not p.requires_grad}
    result = run.fit()

    cut = trainer(tmp_path / "cut", config, name=name)
    one = cut._train_step

    def step():
        one()
        if cut.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    cut._train_step = step
    assert cut.fit().interrupted
    trainer(tmp_path / "cut", config, name=name, resume=True).fit()

    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        if key.endswith(".safetensors"):
            assert value.keys() == resumed[key].keys()
            assert all(torch.equal(v, resumed[key][k]) for k, v in value.items()), key
        else:
            assert value == resumed[key]
    moments = {k.rpartition("/")[0] for k in whole["training/optimizer.safetensors"]}
    assert moments == {f"denoiser.{n}" for n, p in denoiser.named_parameters() if p.requires_grad}
    for key, value in denoiser.named_parameters():
        assert key not in held or torch.equal(value, held[key]), key
        assert key not in held or torch.equal(result.ema[f"denoiser.{key}"], held[key]), key

    run.objective.load_state_dict(result.ema)
    plain = plan_denoiser(name, seed=5)
    plain.load_state_dict(whole["policy/model.safetensors"])
    assert torch.equal(plans(plain), plans(denoiser.eval()))
    assert not torch.equal(plans(plain), plans(plan_denoiser(name)))
    with adapters_off(denoiser):
        assert torch.equal(plans(denoiser), plans(plan_denoiser(name)))


@pytest.mark.parametrize("config", [LORA, SARA], ids=["lora", "sara"])
def test_adapters_learn_what_the_frozen_network_does_not_know(config):
    loss = DenoisingLoss(plan_denoiser())
    add_adapters(loss.denoiser, config)
    batch = Demonstrations().gather(torch.arange(64))
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(batch, seeded()).loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = loss(batch, seeded()).loss.mean()
        with adapters_off(loss.denoiser):
            before = loss(batch, seeded()).loss.mean()
    assert after < 0.9 * before


@pytest.mark.parametrize("config", [LORA, SARA], ids=["lora", "sara"])
def test_gradients_through_a_chain_that_is_recomputed_are_the_same(config):
    denoiser = plan_denoiser()
    add_adapters(denoiser, config)
    stir(denoiser)
    start = prior_start(denoiser.process, torch.randn(4, H, D, generator=seeded(1)))
    cond = torch.randn(4, C, generator=seeded(2))
    own = [p for p in denoiser.parameters() if p.requires_grad]

    def gradients(*, checkpoint):
        x = sample(
            denoiser,
            make_solver("ddim"),
            start,
            levels(start, 3),
            cond=cond,
            checkpoint=checkpoint,
        )
        return torch.autograd.grad(x.square().sum(), own)

    for kept, again in zip(gradients(checkpoint=False), gradients(checkpoint=True), strict=True):
        torch.testing.assert_close(again, kept)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "dora"}, "unknown adapter type 'dora'; expected one of lora, sara"),
        ({"type": "lora", "alpha": 8}, "adapter 'lora' has no setting 'alpha'"),
        ({"type": "lora", "rank": 0}, "rank must be a positive integer, got 0"),
        ({"type": "lora", "scale": 0.0}, "scale must be positive, got 0.0"),
        ({"type": "lora", "rank": 500}, "no layer named '\\*'; those are none"),
        ({"type": "sara", "quantile": 100}, r"quantile must be in \(0, 1\), got 100"),
        ({"type": "lora", "rank": 2, "targets": "film"}, "targets must be patterns"),
        ({"type": "lora", "rank": 2, "targets": []}, "targets must be patterns"),
        (
            {"type": "lora", "rank": 2, "targets": ["film", "attn*"]},
            "'attn\\*'; those are blocks.0.expand, blocks.0.project, .*film, inward",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(config, message):
    denoiser = plan_denoiser()
    with pytest.raises(ValueError, match=message):
        add_adapters(denoiser, config)
    assert not has_adapters(denoiser)
    assert all(p.requires_grad for p in denoiser.parameters())


def test_misuse_is_refused():
    denoiser = plan_denoiser()
    with pytest.raises(ValueError, match="has no adapters"), adapters_off(denoiser):
        pass
    with pytest.raises(ValueError, match="has no adapters"):
        merge_adapters(denoiser)
    with pytest.raises(ValueError, match="Linear has no network"):
        add_adapters(nn.Linear(2, 2), LORA)
    add_adapters(denoiser, LORA)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(denoiser, SARA)
    prefixed = {f"denoiser.{k}": v for k, v in denoiser.state_dict().items()}
    with pytest.raises(ValueError, match=r"'denoiser\..*' is in one alone"):
        merged_state(denoiser, prefixed)
    with pytest.raises(ValueError, match=r"'network.* is in one alone"):
        merged_state(denoiser, plan_denoiser().state_dict())
