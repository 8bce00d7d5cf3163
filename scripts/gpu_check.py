"""Core, networks, policies, sampling and training on a GPU, with host synchronisation forbidden.

    python scripts/gpu_check.py [cpu]

Prints one line a check and exits 0, also where there is no GPU (with the reason). With `cpu` the
same checks run on the CPU alone, so that they are known to work before a GPU is at hand.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from diffpolicy.core import (
    Denoiser,
    MaskedDenoiser,
    Relaxation,
    Scheduled,
    levels,
    make_masking,
    make_process,
    make_solver,
    one_by_one,
    prepare,
    prior_start,
    sample,
    to_tokens,
)
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.starts import Ramp
from diffpolicy.data.normalize import Normalizer
from diffpolicy.learn import DenoisingLoss, MaskedChain, RewardLoss
from diffpolicy.networks import make_network
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import PolicySampler, PolicySpec
from diffpolicy.runtime.compile import compile_planner, fastest

NETWORKS = {
    "mlp": {"type": "mlp", "width": 256, "depth": 3},
    "unet1d": {"type": "unet1d", "down_dims": [64, 128, 256]},
    "transformer": {"type": "transformer", "width": 128, "depth": 4},
}
SOLVERS = ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "deis", "ipndm", "unipc"]
PROCESSES = ["ddpm_cosine", "ddpm_linear", "vp_cosine", "edm", "flow"]
BATCH, HORIZON, DIM, COND = 64, 16, 7, 20
POLICIES = {
    "actions": {"rti": RTI(0.3, num_steps=2)},
    "stochastic": {"sampler": Sampler(solver="ddim", num_steps=5, options={"eta": 1.0})},
    "goals": {"layout": "trajectory", "goal": ((0, 2), (1, 3)), "constant": (2, 3)},
    "guided": {
        "sampler": PolicySampler(num_steps=5, guidance_scale=1.5),
        "cond_dropout": 0.1,
    },
}


@contextlib.contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_sampling(name: str, device: torch.device) -> str:
    """Every solver on the GPU without a synchronisation, and equal to the CPU."""
    torch.manual_seed(0)
    network = make_network(
        {**NETWORKS[name], "horizon": HORIZON, "dim": DIM, "cond_dim": COND}
    ).eval()
    noise, cond = torch.randn(BATCH, HORIZON, DIM), torch.randn(BATCH, COND)
    worst = 0.0
    for solver_name in SOLVERS:
        solver = make_solver(solver_name)
        results = []
        for where in (torch.device("cpu"), device):
            denoiser = Denoiser(network.to(where), make_process("ddpm_cosine"), "eps", clip=True)
            x, c = noise.to(where), cond.to(where)
            start = prior_start(denoiser.process, x)
            with torch.inference_mode():
                grid = prepare(denoiser, solver, levels(start, 10), start.x)
                draws = torch.randn(
                    grid.nfe, *x.shape, generator=torch.Generator().manual_seed(1)
                ).to(where)
                sample(
                    denoiser, solver, start, grid, cond=c, noise=draws
                )  # warm-up: handles and caches
                with no_sync(where):
                    results.append(sample(denoiser, solver, start, grid, cond=c, noise=draws))
        worst = max(worst, (results[0] - results[1].cpu()).abs().max().item())
    if worst > 2e-2:
        raise SystemExit(f"{name}: CPU and GPU samples differ by {worst:.1e}")
    return (
        f"sampling {name}: {len(SOLVERS)} solvers, no synchronisation, |CPU - GPU| <= {worst:.1e}"
    )


def check_training(
    name: str,
    device: torch.device,
    precision: str,
    process: str = "vp_cosine",
    level_law: str = "row",
) -> str:
    """A few optimiser steps without a synchronisation; the loss must be finite and fall."""
    network = make_network({**NETWORKS[name], "horizon": HORIZON, "dim": DIM, "cond_dim": COND}).to(
        device
    )
    prediction = "velocity" if process == "flow" else "edm" if process == "edm" else "eps"
    denoiser = Denoiser(network, make_process(process), prediction)
    ramp = Ramp(HORIZON, 1, 4) if level_law == "position" else None
    objective = DenoisingLoss(denoiser, level_law=level_law, ramp=ramp)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    batch = {
        "obs": torch.randn(256, 1, COND, device=device),
        "action": torch.randn(256, HORIZON, DIM, device=device).mul(0.3),
    }
    losses = []
    for step in range(30):
        checked = no_sync(device) if step >= 2 else contextlib.nullcontext()
        with checked:  # the first steps allocate and tune
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = objective(batch, generator).loss.mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    first, last = (torch.stack(part).mean().item() for part in (losses[:5], losses[-5:]))
    what = f"{name} {precision} {process} levels per {level_law}"
    if not last < first:
        raise SystemExit(f"{what}: the loss did not fall ({first:.3f} -> {last:.3f})")
    return f"training {what}: no synchronisation, loss {first:.3f} -> {last:.3f}"


def make_policy(kind: str, device: torch.device) -> DiffusionPlanner:
    """A policy with random weights."""
    values = {"sampler": Sampler(solver="ddim", num_steps=5), "n_action_steps": 4, **POLICIES[kind]}
    spec = PolicySpec(4, 2, horizon=HORIZON, network=NETWORKS["unet1d"], **values)
    torch.manual_seed(0)
    denoiser = spec.make_denoiser()
    for parameter in denoiser.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    normalizer = Normalizer(
        {"obs": "minmax", "action": "minmax"},
        {"obs": torch.tensor([0.5, 2.0, 1.0, 1.0]), "action": torch.tensor([0.5, 4.0])},
        {"obs": torch.tensor([0.1, -1.0, 0.0, 0.0]), "action": torch.tensor([0.2, 0.0])},
    )
    return DiffusionPlanner(spec, denoiser.to(device), normalizer)


def check_policy(kind: str, device: torch.device) -> str:
    """`act` gives the CPU's actions, and so does the policy compiled as CUDA graphs."""
    graph = "cuda_graph" if device.type == "cuda" else "eager"
    own = make_policy(kind, device)
    policies = [make_policy(kind, torch.device("cpu")), own]
    policies.append(compile_planner(own, backend=graph, batch_size=3))
    states = [policy.initial_state([1, 2, 3]) for policy in policies]
    worst, random = 0.0, np.random.default_rng(0)
    for _ in range(10):
        obs = random.normal(size=(3, 4)).astype(np.float32)
        actions = []
        for i, policy in enumerate(policies):
            action, states[i] = policy.act(obs, states[i])
            actions.append(action)
        worst = max(worst, *(float(np.abs(a - actions[0]).max()) for a in actions[1:]))
    if not worst <= 2e-2:
        raise SystemExit(f"policy {kind}: CPU, GPU and {graph} differ by {worst:.1e}")
    chosen = fastest(own.loop(), 1, seconds=0.2)
    if chosen.failed:
        raise SystemExit(f"policy {kind}: {chosen.failed}")
    return f"policy {kind}: act and {graph} as on the CPU, <= {worst:.1e}; auto: {chosen.backend}"


def check_sequences(device: torch.device) -> str:
    """Masked chains: equal to the CPU's without a synchronisation; a reward tuned through one."""
    network = make_network({"type": "sequence_cnn", "horizon": 24, "dim": 5, "width": 32}).eval()
    torch.nn.init.normal_(list(network.parameters())[-2], std=0.5)
    process = make_masking("masked_loglinear")
    noise = process.draw_noise((24, 64, 24, 5), torch.Generator().manual_seed(0), torch.zeros(1))
    groups = one_by_one(torch.ones(64, 24, dtype=torch.bool), torch.Generator().manual_seed(1))
    found = []
    for where in (torch.device("cpu"), device):
        denoiser = MaskedDenoiser(network.to(where), process, 4, time_free=True)
        start = prior_start(process, torch.zeros(64, 24, 5, device=where))
        with torch.inference_mode():
            grid = prepare(denoiser, Scheduled(groups.to(where)), levels(start, 24), start.x)
            draws = noise.to(where)
            sample(denoiser, Scheduled(groups.to(where)), start, grid, noise=draws)
            solver = Scheduled(groups.to(where))
            with no_sync(where):
                x = sample(denoiser, solver, start, grid, noise=draws)
        found.append(to_tokens(x).cpu())
    same = (found[0] == found[1]).float().mean().item()
    if same < 0.95:  # rounding may turn a draw, and what follows it
        raise SystemExit(f"sequences: only {same:.0%} of the tokens agree with the CPU")
    chain = MaskedChain(relaxation=Relaxation(straight_through=True, backward="reinmax"))
    loss = RewardLoss(denoiser, lambda s: s[..., 0].mean(1), chain, kl_weight=0.01)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    generator = torch.Generator(device).manual_seed(2)
    rewards = []
    for _ in range(20):
        out = loss({"index": torch.arange(64, device=device)}, generator)
        optimiser.zero_grad(set_to_none=True)
        out.loss.mean().backward()
        optimiser.step()
        rewards.append(out.metrics["reward"].item())
    if not rewards[-1] > rewards[0]:
        raise SystemExit(
            f"sequences: the reward did not rise ({rewards[0]:.2f}, {rewards[-1]:.2f})"
        )
    gain = f"{rewards[0]:.2f} -> {rewards[-1]:.2f}"
    return f"sequences: {same:.0%} of tokens as on the CPU, no synchronisation, reward {gain}"


def time_sampling(name: str, device: torch.device) -> str:
    """Milliseconds of one plan of 10 network evaluations, batch 1."""
    network = (
        make_network({**NETWORKS[name], "horizon": HORIZON, "dim": DIM, "cond_dim": COND})
        .to(device)
        .eval()
    )
    denoiser = Denoiser(network, make_process("ddpm_cosine"), "eps", clip=True)
    start = prior_start(denoiser.process, torch.randn(1, HORIZON, DIM, device=device))
    cond, solver = torch.randn(1, COND, device=device), make_solver("ddim")
    with torch.inference_mode():
        grid = prepare(denoiser, solver, levels(start, 10), start.x)
        for _ in range(20):
            sample(denoiser, solver, start, grid, cond=cond)
        synchronize(device)
        began = time.perf_counter()
        for _ in range(100):
            sample(denoiser, solver, start, grid, cond=cond)
        synchronize(device)
    return f"timing {name}: {(time.perf_counter() - began) * 10:.2f} ms a plan (10 evaluations)"


def main() -> int:
    """Run the checks."""
    dry = sys.argv[1:] == ["cpu"]
    if not dry and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU; `cpu` dry-runs the checks")
        return 0
    device = torch.device("cpu" if dry else "cuda")
    print(f"torch {torch.__version__}, {'CPU' if dry else torch.cuda.get_device_name()}")
    # Compared with the CPU: convolutions use TF32 by default, which is off by 1e-3 each.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name in NETWORKS:
        print(check_sampling(name, device))
        for precision in ("fp32", "bf16"):
            print(check_training(name, device, precision))
        print(time_sampling(name, device))
    for process in PROCESSES:
        print(check_training("mlp", device, "fp32", process))
    print(check_training("transformer", device, "fp32", "ddpm_cosine", "position"))
    for kind in POLICIES:
        print(check_policy(kind, device))
    print(check_sequences(device))
    print("gpu-check passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
