"""`python scripts/bench.py`: speed as ratios, both sides measured in turn in one process.

Absolute times on a shared machine drift; a ratio of medians of interleaved rounds does not.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import parse
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError

TARGETS = {
    "sampling": "residual MLP (1.40 M): total <= 0.5 x the same network driven by diffusers' "
    "DDPMScheduler; loop overhead <= 120 us a step; a plain MLP beside it",
    "training": "samples/s from the store >= 0.95 x the same step on one fixed batch",
    "gather": ">= 500,000 windows/s",
    "startup": "import diffpolicy adds <= 0.3 s to import torch; --help within 1 s",
}

OTHERS = {"latency": "latency", "gradients": "reward_gradients", "images": "images"}
"""Further benchmarks, by the first argument, and their modules."""


def help_text() -> str:
    """The text of `python scripts/bench.py --help`."""
    names = "\n".join(f"    {name:<10} {target}" for name, target in TARGETS.items())
    return f"""\
usage: python scripts/bench.py [only=NAME] [rounds=15] [threads=1] [output=FILE.json]

Measures, both sides interleaved in one run, and prints one line each with its target:
{names}
"sampling" needs the diffusers package (pip install diffusers).

{_others_help()}"""


def _others_help() -> str:
    return "\n\n".join(_other(name).help_text() for name in OTHERS)


def _other(name: str) -> Any:
    return import_module(f"benches.{OTHERS[name]}")


def run(arguments: Sequence[str]) -> int:
    """Run the benchmarks and print (and store) their results."""
    if arguments and arguments[0] in OTHERS:
        return int(_other(arguments[0]).run(arguments[1:]))
    options = parse(arguments, [], {"only": None, "rounds": 15, "threads": 1, "output": None})
    benches: dict[str, Callable[[int], dict[str, Any]]] = {
        "sampling": sampling,
        "training": training,
        "gather": gather,
        "startup": startup,
    }
    if options["only"] not in (None, *benches):
        raise ConfigError(
            f"unknown benchmark {options['only']!r}; expected one of {sorted(benches)}"
        )
    import torch

    torch.set_num_threads(int(options["threads"]))
    report: dict[str, Any] = {"machine": _machine(), "threads": options["threads"]}
    for name, bench in benches.items():
        if options["only"] in (None, name):
            report[name] = bench(int(options["rounds"]))
            print(f"{name}: {json.dumps(report[name])}\n    target: {TARGETS[name]}")
    if options["output"]:
        path = Path(options["output"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    return 0


def _machine() -> dict[str, str]:
    import os

    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"processor": platform.machine(), "cores": str(os.cpu_count()), **versions}


def interleaved(
    sides: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side in every round, the sides in turn; one warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began = clock()
            side()
            if number:
                times[name].append(clock() - began)
    return times


def ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the ratios round by round."""
    ratios = [a / b for a, b in zip(top, bottom, strict=True)]
    parts = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(value, 3) for name, value in parts.items()}


def sampling(rounds: int) -> dict[str, Any]:
    """One plan, batch 1, DDPM 100: ours, diffusers', the bare network.

    The network is the library's residual MLP: 3 blocks of a stream of 256, each with a hidden layer
    of 512 and FiLM, 1.40 M parameters in all. A plain MLP of three hidden layers of 256 has 0.19 M,
    so it is measured too.
    """
    import torch

    from diffpolicy.core import (
        Denoiser,
        levels,
        make_process,
        make_solver,
        prepare,
        prior_start,
        sample,
    )
    from diffpolicy.networks import make_network

    try:
        import diffusers
    except ImportError as error:
        raise ImportError("bench sampling needs diffusers: pip install diffusers") from error

    config = {"type": "mlp", "width": 256, "depth": 3, "horizon": 16, "dim": 7, "cond_dim": 20}
    network = make_network(config).eval()
    denoiser = Denoiser(network, make_process("ddpm_cosine"), "eps", clip=True)
    solver, cond = make_solver("ddpm"), torch.randn(1, 20)
    start = prior_start(denoiser.process, torch.randn(1, 16, 7))
    grid = prepare(denoiser, solver, levels(start, 100), start.x)
    make_scheduler: Any = diffusers.DDPMScheduler
    scheduler = make_scheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    times = torch.arange(100.0).view(100, 1, 1, 1)
    modulate: Any = network.modulate

    def ours() -> None:
        sample(denoiser, solver, start, grid, cond=cond)

    def theirs() -> None:
        x = torch.randn(1, 16, 7)
        scheduler.set_timesteps(100)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, times[t], cond), t, x).prev_sample

    plain = _plain_mlp()

    def bare() -> None:
        for t in times:
            network(start.x, t, cond)

    def bare_modulated() -> None:
        films = modulate(embedded, cond).unbind(0)
        for row in range(100):
            network(start.x, times[row], cond, film=films[row])

    with torch.inference_mode():
        embedded = network.embed_time(times)
        found = interleaved(
            {
                "ours": ours,
                "diffusers": theirs,
                "network": bare,
                "network_modulated": bare_modulated,
                **_plain_sides(plain, denoiser.process, solver, start, cond, scheduler),
            },
            rounds,
        )
    milliseconds = {name: round(1e3 * statistics.median(v), 3) for name, v in found.items()}
    pairs = zip(found["ours"], found["network_modulated"], strict=True)
    overhead = statistics.median(a - b for a, b in pairs) * 1e6 / 100
    return {
        "ours_over_diffusers": ratio(found["ours"], found["diffusers"]),
        "plain_mlp_ours_over_diffusers": ratio(found["ours_plain"], found["diffusers_plain"]),
        "parameters": {
            "residual_mlp": network.num_parameters(),
            "plain_mlp": sum(p.numel() for p in plain.parameters()),
        },
        "overhead_us_per_step": round(overhead, 1),
        "ms": milliseconds,
    }


def _plain_mlp() -> Any:
    """Plan, time and condition in, three hidden layers of 256, a plan ``[B, 16, 7]`` out."""
    from torch import nn

    layers: list[nn.Module] = [nn.Linear(16 * 7 + 1 + 20, 256), nn.Mish()]
    for _ in range(2):
        layers += [nn.Linear(256, 256), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(256, 16 * 7), nn.Unflatten(1, (16, 7))).eval()


def _plain_sides(
    plain: Any, process: Any, solver: Any, start: Any, cond: Any, scheduler: Any
) -> dict[str, Callable[[], Any]]:
    """The plain network under this library's loop and under diffusers'."""
    import torch

    from diffpolicy.core import AnalyticDenoiser, levels, prepare, sample

    times = torch.linspace(0, 1, 100).view(100, 1, 1)

    def denoise(x: Any, t: Any, cond: Any) -> Any:
        return plain(torch.cat([x.flatten(1), t.view(1, 1), cond], 1))

    denoiser = AnalyticDenoiser(process, denoise)
    grid = prepare(denoiser, solver, levels(start, 100), start.x)

    def ours() -> None:
        sample(denoiser, solver, start, grid, cond=cond)

    def theirs() -> None:
        x = torch.randn_like(start.x)
        scheduler.set_timesteps(100)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, times[t], cond), t, x).prev_sample

    return {"ours_plain": ours, "diffusers_plain": theirs}


def _synthetic_store(episodes: int, length: int, obs_dim: int, action_dim: int) -> Any:
    import numpy as np

    from diffpolicy.data.store import EpisodeStore

    rng = np.random.default_rng(0)
    steps = episodes * length
    arrays = {
        "obs": rng.standard_normal((steps, obs_dim), np.float32),
        "action": rng.standard_normal((steps, action_dim), np.float32),
    }
    return EpisodeStore.from_arrays(arrays, np.arange(1, episodes + 1) * length)


def gather(rounds: int) -> dict[str, Any]:
    """Random windows of 16 (obs 17, action 6), batch 256, from memory."""
    import torch

    from diffpolicy.data.windows import Windows

    source = Windows(
        _synthetic_store(100, 1000, 17, 6), horizon=16, n_obs_steps=2, n_action_steps=8
    )
    batches = [torch.randint(len(source), (256,)) for _ in range(200)]

    def side() -> None:
        for batch in batches:
            source.gather(batch)

    seconds = interleaved({"gather": side}, rounds)["gather"]
    rates = sorted(len(batches) * 256 / s for s in seconds)
    return {"windows_per_s": {"median": round(statistics.median(rates)), "min": round(rates[0])}}


def training(rounds: int) -> dict[str, Any]:
    """Trainer steps (MLP 3 x 256, batch 256) on windows from a store on disk.

    And on one fixed batch.
    """
    import torch

    from diffpolicy.data.windows import Windows
    from diffpolicy.learn.cloning.denoising import DenoisingLoss
    from diffpolicy.policies.spec import PolicySpec
    from diffpolicy.training.settings import TrainerConfig
    from diffpolicy.training.trainer import Trainer

    steps = 40
    spec = PolicySpec(17, 6, network={"type": "mlp", "width": 256, "depth": 3})

    class FixedBatch:
        """A source that always answers with the same rows."""

        def __init__(self, source: Windows) -> None:
            self.batch, self.size = source.gather(torch.arange(256)), len(source)

        def __len__(self) -> int:
            return self.size

        def gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.batch

    with tempfile.TemporaryDirectory() as folder:
        from diffpolicy.data.store import EpisodeStore

        store = _synthetic_store(100, 500, 17, 6)
        disk = EpisodeStore.from_arrays(
            {name: store.read(name) for name in ("obs", "action")},
            store.episode_ends,
            path=Path(folder) / "s.zarr",
        )
        windows = Windows(disk, horizon=16, n_obs_steps=2, n_action_steps=8)
        count = iter(range(10**6))

        def side(source: Any) -> Callable[[], None]:
            def fit() -> None:
                config = TrainerConfig(steps=steps, batch_size=256, progress=False)
                run_dir = Path(folder) / f"run{next(count)}"
                Trainer(DenoisingLoss(spec.make_denoiser()), source, config, run_dir).fit()

            return fit

        found = interleaved({"fixed": side(FixedBatch(windows)), "store": side(windows)}, rounds)
    rates = {name: round(steps * 256 / statistics.median(v)) for name, v in found.items()}
    return {"store_over_fixed": ratio(found["fixed"], found["store"]), "samples_per_s": rates}


def startup(rounds: int) -> dict[str, Any]:
    """Wall time of `import torch`, of `import diffpolicy` after it, and of `diffpolicy --help`."""
    probe = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
        "import diffpolicy.core, diffpolicy.networks, diffpolicy; "
        "c = time.perf_counter(); print(b - a, c - b)"
    )
    both, helps = [], []
    for _ in range(max(3, rounds // 3)):
        done = subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, check=True
        )
        both.append([float(v) for v in done.stdout.split()])
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "diffpolicy.cli", "--help"], capture_output=True, check=True
        )
        helps.append(time.perf_counter() - began)
    torch_s, ours_s = (statistics.median(v) for v in zip(*both, strict=True))
    values = {
        "import_torch_s": torch_s,
        "diffpolicy_adds_s": ours_s,
        "help_s": statistics.median(helps),
    }
    return {name: round(value, 3) for name, value in values.items()}
