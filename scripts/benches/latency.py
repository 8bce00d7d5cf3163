"""`python scripts/bench.py latency`: one table of what a plan costs and what it scores."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffpolicy.commands.options import parse
from diffpolicy.config_compose import read_yaml
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError

if TYPE_CHECKING:
    from diffpolicy import DiffusionPolicy

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "streaming_checkpoint": None,
    "network": "mlp",
    "data": None,
    "episodes": 0,
    "seed": 300_000,
    "seconds": 90,
    "backend": "auto",
    "threads": 1,
    "peers": False,
    "json": None,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "width": 256, "depth": 3},
    "unet1d_small": {"type": "unet1d", "down_dims": [64, 128, 256]},
}
SHAPE = {"obs_dim": 26, "action_dim": 2, "horizon": 16, "n_obs_steps": 2, "n_action_steps": 8}
SLOW_MS = 100.0  # plans slower than this are timed less often

Planners = dict[str, Any]


def help_text() -> str:
    """The text of `python scripts/bench.py latency --help`."""
    return """\
usage: python scripts/bench.py latency [checkpoint=RUN] [json=FILE] [key=value] ...

One table: network evaluations, milliseconds per plan at batch 1 (median and 99th percentile, all
rows measured in turn in one run) and score, for full, few-step, truncated, warm-started and
streaming sampling of the same weights, in eager PyTorch and in the fastest runtime.

    checkpoint=RUN            a trained run; without it an untrained policy of Push-T's shapes
    network=mlp               of the untrained policy: mlp (3 x 256) or unet1d_small (5 M)
    data=STORE                demonstrations for levels and anchors; default: the run's own
    streaming_checkpoint=RUN  a run trained with policy.level_law=position, for the streaming row
    episodes=0                rollouts per row on seeds from seed=300000; 0: latency alone
    seconds=90                time to spend on the latencies
    backend=auto              the other runtime: auto (fastest), onnxruntime, openvino, none, ...
    threads=1                 CPU threads
    peers=false               also the same network in diffusers' loops (pip install diffusers)
    json=FILE                 where the rows are written, with machine and versions"""


def run(arguments: Sequence[str]) -> int:
    """Measure, print the table, write the file."""
    options = parse(arguments, [], DEFAULTS)
    if options["checkpoint"] is None and options["episodes"]:
        raise ConfigError("scores need a trained policy; give checkpoint=RUN")
    torch.set_num_threads(int(options["threads"]))
    planners, notes = variants(options)
    runtimes = {"eager": planners}
    if options["backend"] != "none":
        runtimes["compiled"] = compiled(planners, options["backend"], int(options["threads"]))
    calls = {
        (name, runtime): plan_call(planner)
        for runtime, group in runtimes.items()
        for name, planner in group.items()
    }
    if options["peers"]:
        peers, said = peer_calls(planners["full-ddpm-100"])
        calls |= peers
        notes += said
    times = interleave(calls, float(options["seconds"]))
    scores = score_all(planners, options) if options["episodes"] else {}
    rows = []
    for (name, runtime), found in times.items():
        planner = runtimes.get(runtime, {}).get(name)  # a peer's row has none
        score = None if planner is None else scores.get(name)
        rows.append(row(name, runtime_name(planner, runtime), planner, found, score))
    report = {"machine": machine(int(options["threads"])), "settings": options, "rows": rows}
    report["executor"] = executor_overhead()
    report["notes"] = notes
    print(markdown(rows))
    for note in notes:
        print(f"note: {note}")
    print(f"executor overhead per tick: {json.dumps(report['executor'])}")
    if options["json"]:
        path = Path(options["json"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    return 0


def variants(options: dict[str, Any]) -> tuple[Planners, list[str]]:
    """The policies of the table by name, and what a reader must know about them."""
    from diffpolicy import RTI, DiffusionPolicy, Sampler, Truncated
    from diffpolicy.commands.rti import demonstrations_of
    from diffpolicy.data.store import EpisodeStore

    notes = []
    if options["checkpoint"] is None:
        base, store = untrained(options["network"])
        notes.append("untrained weights: latencies only; levels are not chosen but 0.3")
    else:
        base = DiffusionPolicy.from_pretrained(options["checkpoint"])
        store = EpisodeStore.open(demonstrations_of(options["checkpoint"], options["data"]))
    base = base.with_settings(rti=None, truncated=None)

    def full(solver: str, steps: int) -> Any:
        return base.with_settings(sampler=Sampler(solver=solver, num_steps=steps))

    out = {"full-ddpm-100": full("ddpm", 100), "full-ddim-10": full("ddim", 10)}
    out["full-dpmpp-10"] = full("dpmpp_2m", 10)
    out |= {f"ddim-{k}": full("ddim", k) for k in (3, 2, 1)}
    for k in (4, 2, 1):
        settings = Truncated(num_steps=k, rank="prior")
        count = min(256, store.num_steps // 4)
        out[f"truncated-{k}"] = base.with_anchors(store, truncated=settings, count=count, top_m=8)
    for k in (3, 2, 1):
        if options["checkpoint"] is None:
            out[f"rti-{k}"] = base.with_settings(rti=RTI(0.3, num_steps=k), n_action_steps=1)
        else:
            out[f"rti-{k}"], report = base.choose_rti(store, num_steps=k)
            notes.append(f"rti-{k}: level {report.t_start}, chosen from the demonstrations")
    streaming, note = streaming_policy(options)
    return out | streaming, notes + note


def streaming_policy(options: dict[str, Any]) -> tuple[Planners, list[str]]:
    """The streaming row, which needs weights trained for it."""
    from diffpolicy import DiffusionPolicy, Streaming

    name, settings = "streaming-3", Streaming(steps_per_chunk=3)
    if options["streaming_checkpoint"] is not None:
        policy = DiffusionPolicy.from_pretrained(options["streaming_checkpoint"])
        note = [f"{name}: weights of {options['streaming_checkpoint']}, trained per position"]
        return {name: policy.streaming(settings)}, note
    if options["checkpoint"] is None:
        return {name: untrained(options["network"], streaming=True)[0].streaming(settings)}, []
    return {}, ["no streaming row: give streaming_checkpoint=RUN (policy.level_law=position)"]


def untrained(network: str, *, streaming: bool = False) -> tuple[DiffusionPolicy, Any]:
    """A policy of Push-T's shapes with random weights, and synthetic demonstrations."""
    from diffpolicy import DiffusionPolicy
    from diffpolicy.data.store import EpisodeStore

    if network not in NETWORKS:
        raise ConfigError(f"unknown network {network!r}; expected one of {sorted(NETWORKS)}")
    rng = np.random.default_rng(0)
    dims = {"obs": SHAPE["obs_dim"], "action": SHAPE["action_dim"]}
    arrays = {k: rng.uniform(-1, 1, (2000, d)).astype(np.float32) for k, d in dims.items()}
    store = EpisodeStore.from_arrays(arrays, np.arange(1, 21) * 100)
    chosen, spec = dict(NETWORKS[network]), {**SHAPE, "process": {"type": "ddpm_cosine"}}
    del spec["obs_dim"], spec["action_dim"]
    if streaming:
        chosen |= {"t_kind": "position"} if network == "mlp" else {}
        spec |= {"level_law": "position", "n_action_steps": 5}
    return DiffusionPolicy.from_dataset(store, spec={**spec, "network": chosen}), store


def compiled(planners: Planners, backend: str, threads: int) -> Planners:
    """The same policies under another runtime, for one environment."""
    from diffpolicy.runtime.compile import compile_planner

    return {
        name: compile_planner(planner, backend=backend, batch_size=1, threads=threads)
        for name, planner in planners.items()
    }


def plan_call(planner: Any) -> Callable[[], Any]:
    """Makes one plan from a state that has one already: observation in, plan out."""
    rng = np.random.default_rng(0)
    state = planner.initial_state([0])
    scale = planner.normalizer.unnormalize(
        "obs", rng.uniform(-0.5, 0.5, (2, planner.obs_dim)).astype(np.float32)
    )
    state = planner.replan(planner.observe(scale[:1], state), [0])
    state = planner.observe(scale[1:], planner.execute(state)[1])
    return lambda: planner.replan(state, [0])


def peer_calls(planner: Any) -> tuple[dict[tuple[str, str], Callable[[], Any]], list[str]]:
    """The same network in diffusers' own loops, normalisation and conversion included."""
    notes = ["LeRobot's policy is not among the peers: it cannot be given this network"]
    try:
        import diffusers
    except ImportError:
        return {}, [*notes, "no rows for diffusers: pip install diffusers"]

    process = planner.denoiser.process
    if planner.spec.prediction not in ("eps", "v") or process.type != "discrete_vp":
        raise ConfigError("peers=true compares eps- and v-prediction on ddpm_cosine alone")
    kinds: dict[str, tuple[Any, int]] = {
        "full-ddpm-100": (diffusers.DDPMScheduler, 100),
        "full-ddim-10": (diffusers.DDIMScheduler, 10),
    }
    betas = np.asarray(process.betas)
    prediction = {"eps": "epsilon", "v": "v_prediction"}[planner.spec.prediction]
    history = np.zeros((1, planner.n_obs_steps, planner.obs_dim), np.float32)
    shape = (1, planner.horizon, planner.action_dim)

    def call(kind: Any, steps: int) -> Callable[[], Any]:
        scheduler = kind(len(betas), trained_betas=betas, prediction_type=prediction)
        network, normalizer = planner.denoiser.network, planner.normalizer

        def plan() -> Any:
            with torch.inference_mode():
                cond = normalizer.normalize("obs", torch.from_numpy(history)).flatten(1)
                x = torch.randn(shape)
                scheduler.set_timesteps(steps)
                for t in scheduler.timesteps:
                    out = network(x, t.to(torch.float32).view(1, 1, 1), cond)
                    x = scheduler.step(out, t, x).prev_sample
                return x.numpy()

        return plan

    calls = {(name, "diffusers"): call(kind, steps) for name, (kind, steps) in kinds.items()}
    return calls, notes


def interleave(
    calls: dict[tuple[str, str], Callable[[], Any]], seconds: float
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every call, in turn; slow ones only every so many rounds."""
    first: dict[tuple[str, str], float] = {}
    for key, call in calls.items():
        call()  # the first one allocates
        first[key] = _milliseconds(call)
    every = {key: max(1, round(ms / SLOW_MS)) for key, ms in first.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    until, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or number < 20:
        for key, call in calls.items():
            if number % every[key] == 0:
                times[key].append(_milliseconds(call))
        number += 1
    return times


def _milliseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def score_all(planners: Planners, options: dict[str, Any]) -> dict[str, Any]:
    """Mean score of every policy with its interval, on the same episodes."""
    from omegaconf import OmegaConf

    from diffpolicy.rollout.env_spec import EnvSpec, stored_env_id
    from diffpolicy.rollout.evaluate import evaluate
    from diffpolicy.rollout.intervals import mean_interval, wilson_interval
    from diffpolicy.rollout.pool.supervisor import Workers
    from diffpolicy.rollout.pool.workers import WorkerPool

    file = Path(options["checkpoint"]) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"scores need {file}, which says the environment; give a run directory")
    config: Any = OmegaConf.create(read_yaml(file))
    kwargs: Any = OmegaConf.to_container(config.env.kwargs)
    env_id = stored_env_id(config.env.id, file, instead="")
    spec = EnvSpec(env_id, kwargs, config.env.get("max_episode_steps"))
    seeds = range(options["seed"], options["seed"] + options["episodes"])
    field = {"return": "episode_return"}.get(config.env.score, config.env.score)
    out = {}
    with WorkerPool(spec, Workers(num_envs=min(25, len(seeds)), num_workers=1)) as pool:
        for name, planner in planners.items():
            result = evaluate(
                planner,
                spec,
                seeds,
                workers=pool,
                success_threshold=config.env.success_threshold,
                progress=False,
            )
            values = [float(getattr(e, field)) for e in result.episodes]
            rate = field in ("success", "final_success")
            out[name] = (
                wilson_interval(int(sum(values)), len(values)) if rate else mean_interval(values)
            )
    return out


def row(name: str, runtime: str, planner: Any, times: list[float], score: Any) -> dict[str, Any]:
    """One row of the table."""
    values = {
        "name": name,
        "runtime": runtime,
        "nfe": int(name.rsplit("-", 1)[1]) if planner is None else _nfe(planner),
        "p50_ms": round(float(np.percentile(times, 50)), 4),
        "p99_ms": round(float(np.percentile(times, 99)), 4),
        "plans": len(times),
        "score": None,
        "score_ci": None,
    }
    if score is not None:
        values["score"] = round(score.value, 4)
        values["score_ci"] = [round(v, 4) for v in (score.low, score.high) if math.isfinite(v)]
    return values


def _nfe(planner: Any) -> int:
    """Evaluations of a plan that is not an episode's first."""
    if "warm" in planner.kinds or hasattr(planner, "nfe_per_chunk"):
        return int(planner._loops["warm", False].nfe)
    return int(planner.nfe)


def runtime_name(planner: Any, runtime: str) -> str:
    """``eager``, a peer's name, or the backend that the loops of the policy run on."""
    if planner is None or runtime == "eager":
        return runtime
    found = {str(getattr(loop, "backend", "eager")) for loop in planner._loops.values()}
    return "+".join(sorted(found - {"eager"})) or "eager"


def executor_overhead(ticks: int = 5000, *, rate_hz: float = 1000.0) -> dict[str, Any]:
    """What the real-time executor itself costs per tick, with a policy that does nothing."""
    from diffpolicy.runtime.executor import RealTimeExecutor
    from diffpolicy.runtime.planner import Timing
    from diffpolicy.runtime.schedule import ActionLimits

    limits = ActionLimits(np.zeros(7), low=-1, high=1)
    with RealTimeExecutor(_idle_policy(), Timing(rate_hz), limits) as executor:
        obs = np.zeros(20, np.float32)
        executor.warm_up(obs)
        report = executor.run(lambda: obs, lambda action: None, ticks=ticks)
    cost = report.tick_overhead
    return {
        "ticks": report.ticks,
        "rate_hz": rate_hz,
        **{n: getattr(cost, n) for n in ("p50_ms", "p99_ms", "p999_ms", "max_ms", "mean_ms")},
        "late_p99_ms": report.lateness.p99_ms,
    }


def _idle_policy() -> Any:
    """A policy whose plans are zeros."""
    from diffpolicy.policies.base import ChunkedPolicy

    class Idle(ChunkedPolicy):
        def make_plans(self, state: Any, *, deterministic: bool) -> tuple[Any, Any]:
            return np.zeros_like(state.plan), np.zeros(len(state), np.int64)

        def to_actions(self, normalised: Any) -> Any:
            return normalised

    return Idle(obs_dim=20, action_dim=7, horizon=16, n_obs_steps=2, n_action_steps=8)


def machine(threads: int) -> dict[str, Any]:
    """Where it was measured, and with which versions."""
    import platform
    from importlib import metadata

    packages = ("torch", "numpy", "onnxruntime", "openvino", "diffusers")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
        "load": [round(v, 2) for v in os.getloadavg()],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    import platform

    return platform.processor() or platform.machine()


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = ["| plan | runtime | NFE | ms p50 | ms p99 | score |", "|---|---|---|---|---|---|"]
    for values in rows:
        score = "" if values["score"] is None else f"{values['score']:.3f} {values['score_ci']}"
        lines.append(
            f"| {values['name']} | {values['runtime']} | {values['nfe']} | {values['p50_ms']:.2f} "
            f"| {values['p99_ms']:.2f} | {score} |"
        )
    return "\n".join(lines)
