"""Core, networks, one sampling and one training step on a GPU, with host synchronisation forbidden.

Needs torch and numpy alone. Prints one line a check and exits 0, also where there is no GPU (with
the reason).
"""

from __future__ import annotations

import sys
import time

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
from diffpolicy.finetune import DenoisingLoss, MaskedChain, RewardLoss
from diffpolicy.networks import make_network

NETWORKS = {
    "mlp": {"type": "mlp", "width": 256, "depth": 3},
    "unet1d": {"type": "unet1d", "down_dims": [64, 128, 256]},
    "transformer": {"type": "transformer", "width": 128, "depth": 4},
}
SOLVERS = ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "deis", "ipndm", "unipc"]
BATCH, HORIZON, DIM, COND = 64, 16, 7, 20


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
                if where.type == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    results.append(sample(denoiser, solver, start, grid, cond=c, noise=draws))
                finally:
                    if where.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
        worst = max(worst, (results[0] - results[1].cpu()).abs().max().item())
    if worst > 2e-2:
        raise SystemExit(f"{name}: CPU and GPU samples differ by {worst:.1e}")
    return (
        f"sampling {name}: {len(SOLVERS)} solvers, no synchronisation, |CPU - GPU| <= {worst:.1e}"
    )


def check_training(name: str, device: torch.device, precision: str) -> str:
    """A few optimiser steps without a synchronisation; the loss must be finite and fall."""
    network = make_network({**NETWORKS[name], "horizon": HORIZON, "dim": DIM, "cond_dim": COND}).to(
        device
    )
    objective = DenoisingLoss(Denoiser(network, make_process("vp_cosine"), "eps"))
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    batch = {
        "obs": torch.randn(256, 1, COND, device=device),
        "action": torch.randn(256, HORIZON, DIM, device=device).mul(0.3),
    }
    losses = []
    for step in range(30):
        if step == 2:  # the first steps allocate and tune
            torch.cuda.set_sync_debug_mode("error")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(batch, generator).loss.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    torch.cuda.set_sync_debug_mode("default")
    first, last = losses[0].item(), losses[-1].item()
    if not last < first:
        raise SystemExit(f"{name} {precision}: the loss did not fall ({first:.3f} -> {last:.3f})")
    return f"training {name} {precision}: no synchronisation, loss {first:.3f} -> {last:.3f}"


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
            if where.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            x = sample(denoiser, Scheduled(groups.to(where)), start, grid, noise=draws)
            torch.cuda.set_sync_debug_mode("default")
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
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            sample(denoiser, solver, start, grid, cond=cond)
        torch.cuda.synchronize()
    return f"timing {name}: {(time.perf_counter() - began) * 10:.2f} ms a plan (10 evaluations)"


def main() -> int:
    """Run the checks."""
    if not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU here")
        return 0
    device = torch.device("cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name in NETWORKS:
        print(check_sampling(name, device))
        for precision in ("fp32", "bf16"):
            print(check_training(name, device, precision))
        print(time_sampling(name, device))
    print(check_sequences(device))
    print("gpu-check passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
