"""Scores of real-time policies beside full sampling, paired over episodes and training seeds.

    python scripts/realtime.py runs=RUN_A,RUN_B,... output=FILE.json [episodes=100] [seed=300000]
        [methods=ddpm100,ddim10,ddim3,ddim2,rti3,rti2,truncated2] [env=ID] [score=max_reward]
        [latency=false] [timing=false] [draft_t=LEVEL] [plot=FILE.png] [threads=1]

One run per training seed, all of one task. The levels of the warm starts are chosen by the library
from the demonstrations that the run names; no environment takes part in it. Every cell (run,
method) is one evaluation on the same environment seeds; cells that the output holds already are
skipped. A method is NAME + network evaluations; @n executes n actions of each plan; `drawn` is
`truncated` with an anchor drawn by its probability, not always the most probable. Planners with a
head of type draft take `draft`, Trajectory Diffuser's start, at the level draft_t (chosen like the
others unless given). `timing=true` measures what a decision
of each method takes for one environment, all methods in turn in one process. With
latency=true a network evaluation takes 14 ms (the 5 M U-Net on one thread) and a control tick
50 ms; -always then begins the next plan as soon as one is there, -start executes a late plan from
its first action.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from diffpolicy.api import DiffusionPolicy
from diffpolicy.core import Sampler
from diffpolicy.data.observation import zeros
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.truncated import Truncated
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import evaluate
from diffpolicy.rollout.intervals import mean_interval, paired_difference, wilson_interval
from diffpolicy.rollout.latency import DelayedPolicy
from diffpolicy.rollout.pool.supervisor import Workers

DEFAULTS: dict[str, str] = {
    "runs": "",
    "output": "",
    "episodes": "100",
    "seed": "300000",
    "methods": "ddpm100,ddim10,ddim3,ddim2,rti3,rti2,truncated2",
    "env": "",
    "score": "",
    "latency": "false",
    "timing": "false",
    "draft_t": "",
    "plot": "",
    "threads": "1",
}
CONTROL_MS = 50.0
MS_PER_NFE = 14.0  # the 5 M U-Net on one thread of a CPU: 1.4 s for DDPM-100, 0.14 s for DDIM-10
FULL = ("ddpm100", "ddim20", "ddim10")


def levels_of(
    run: str, policy: DiffusionPolicy, store: str, num_steps: int, executed: int
) -> dict[str, Any]:
    """The chosen level and the table of the choice, kept beside the run."""
    file = Path(run) / f"levels_{num_steps}_{executed}.json"
    if not file.is_file():
        began = time.perf_counter()
        _, report = policy.choose_rti(store, num_steps=num_steps, n_action_steps=executed)
        seconds = round(time.perf_counter() - began, 1)
        file.write_text(json.dumps({**report.to_json(), "seconds": seconds}))
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def make(
    method: str, run: str, policy: DiffusionPolicy, store: str, draft_t: str = ""
) -> DiffusionPolicy:
    """The policy of a run under a method: NAME + evaluations, ``@n`` executes n actions a plan."""
    name, _, executed = method.split("-")[0].partition("@")
    kind = name.rstrip("0123456789")
    steps = int(name.removeprefix(kind))
    changes: dict[str, Any] = {"n_action_steps": int(executed)} if executed else {}
    if kind in ("ddpm", "ddim", "dpmpp_2m"):
        return policy.with_settings(sampler=Sampler(solver=kind, num_steps=steps), **changes)
    if kind == "rti":
        each = int(executed or 1)
        t_start = levels_of(run, policy, store, steps, each)["t_start"]
        return policy.with_settings(rti=RTI(t_start, num_steps=steps), n_action_steps=each)
    if kind in ("truncated", "drawn"):
        how = "draw" if kind == "drawn" else "best"
        settings = Truncated(num_steps=steps, rank="prior", choose=how)
        truncated = policy.with_anchors(store, truncated=settings, count=256, top_m=8)
        return truncated.with_settings(**changes).choose_truncated(store, episodes=30)[0]
    if kind == "draft":
        settings = Truncated(
            t_start=float(draft_t or 1.0), num_steps=steps, sources=("autoregressive",)
        )
        drafted = policy.with_settings(rti=None, truncated=settings, **changes)
        if draft_t:
            return drafted
        return drafted.choose_truncated(store, episodes=30)[0]
    raise ValueError(f"unknown method {method!r}")


def decision_ms(policies: dict[str, DiffusionPolicy], rounds: int = 30) -> dict[str, float]:
    """Median milliseconds of a decision for one environment; warm rows where a method has them."""
    states, times = {}, {name: [] for name in policies}
    obs = {n: p.normalizer.unnormalize_obs(zeros(p.observed, (1,))) for n, p in policies.items()}
    for name, policy in policies.items():
        state = policy.observe(obs[name], policy.initial_state([0]))
        states[name] = policy.replan(policy.replan(state, [0]), [0])
    for _ in range(rounds):
        for name, policy in policies.items():
            began = time.perf_counter()
            policy.replan(states[name], [0])
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: round(float(np.median(each)), 2) for name, each in times.items()}


def delayed(policy: DiffusionPolicy, method: str) -> DelayedPolicy:
    """The method with its latency; full samplers may also run a late plan from its start."""
    per_plan = {"cold": MS_PER_NFE * policy.nfe, "warm": MS_PER_NFE * policy.nfe}
    if policy.spec.rti is not None:
        per_plan["warm"] = MS_PER_NFE * policy.spec.rti.num_steps
    each = policy.n_action_steps == 1 or "-always" in method
    always = "always" if each else "due"
    arrival = "start" if method.endswith("-start") else "aligned"
    return DelayedPolicy(policy, per_plan, CONTROL_MS, replan=always, arrival=arrival)


def cell(
    method: str, run: str, options: dict[str, str], config: Any, spec: EnvSpec
) -> dict[str, Any]:
    """One evaluation."""
    policy = DiffusionPolicy.from_pretrained(run)
    made = make(method, run, policy, str(config.data.path), options["draft_t"])
    acting: Any = delayed(made, method) if options["latency"] == "true" else made
    first = int(options["seed"])
    seeds = range(first, first + int(options["episodes"]))
    began = time.perf_counter()
    result = evaluate(
        acting,
        spec,
        seeds,
        workers=Workers(num_envs=25, num_workers=1),
        success_threshold=config.env.success_threshold,
        progress=False,
    )
    score = options["score"] or str(config.env.score)
    names = {"success": "success", "max_reward": "max_reward", "return": "episode_return"}
    scores = [float(getattr(e, names[score])) for e in result.episodes]
    found = {"scores": scores, "score": score, "nfe_per_plan": result.metrics()["nfe_per_plan"]}
    for settings in (made.spec.rti, made.spec.truncated):
        if settings is not None:
            found["t_start"] = settings.t_start
    return {**found, "wall_s": round(time.perf_counter() - began, 1)}


def table(cells: dict[str, dict[str, Any]], runs: list[str], methods: list[str]) -> list[str]:
    """A line per method: mean with its interval, per training seed, and against the best full."""
    pooled = {
        m: np.concatenate([cells[f"{r}|{m}"]["scores"] for r in runs])
        for m in methods
        if all(f"{r}|{m}" in cells for r in runs)
    }
    full = [m for m in pooled if m.startswith(FULL)]
    best = max(full, key=lambda m: pooled[m].mean(), default=None)
    lines = []
    for method, scores in pooled.items():
        rate = bool(np.isin(scores, (0.0, 1.0)).all())
        mean = wilson_interval(int(scores.sum()), len(scores)) if rate else mean_interval(scores)
        each = [f"{np.mean(cells[f'{r}|{method}']['scores']):.3f}" for r in runs]
        nfe = np.mean([cells[f"{r}|{method}"]["nfe_per_plan"] for r in runs])
        line = f"{method:16s} {nfe:6.1f} NFE  {mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
        line += f"  seeds {' '.join(each)}"
        if best is not None and method != best:
            by = paired_difference(scores, pooled[best])
            line += f"  minus {best}: {by.value:+.3f} [{by.low:+.3f}, {by.high:+.3f}]"
        if "t_start" in cells[f"{runs[0]}|{method}"]:
            chosen = [cells[f"{r}|{method}"]["t_start"] for r in runs]
            line += f"  levels {chosen}"
        lines.append(line)
    return lines


def draw(report: dict[str, Any], runs: list[str], methods: list[str], path: str) -> None:
    """Score against the latency of a plan, one point per method with its interval."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in methods:
        cells = [report["cells"][f"{run}|{method}"] for run in runs]
        mean = mean_interval(np.concatenate([c["scores"] for c in cells]))
        warm = int(method.removeprefix("rti").split("@")[0].split("-")[0]) if "rti" in method else 0
        nfe = warm or round(float(np.mean([c["nfe_per_plan"] for c in cells])))
        error = [[mean.value - mean.low], [mean.high - mean.value]]
        axis.errorbar(MS_PER_NFE * nfe, mean.value, yerr=error, marker="o", capsize=3, label=method)
    axis.set_xscale("log")
    axis.set_xlabel(f"milliseconds a plan takes (a control tick every {CONTROL_MS:.0f} ms)")
    axis.set_ylabel(report["cells"][f"{runs[0]}|{methods[0]}"]["score"])
    axis.set_title(report["settings"]["env"].split("/")[-1])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    if set(given) - set(DEFAULTS):
        raise SystemExit(f"unknown options {sorted(set(given) - set(DEFAULTS))}")
    options = {**DEFAULTS, **given}
    torch.set_num_threads(int(options["threads"]))
    runs, methods = options["runs"].split(","), options["methods"].split(",")
    config: Any = OmegaConf.load(Path(runs[0]) / "config.yaml")
    kwargs = {} if options["env"] else OmegaConf.to_container(config.env.kwargs)
    limit = None if options["env"] else config.env.get("max_episode_steps")
    spec = EnvSpec(options["env"] or config.env.id, kwargs, limit)
    output = Path(options["output"])
    report = json.loads(output.read_text()) if output.is_file() else {}
    same = ("episodes", "seed", "score", "latency", "env", "draft_t")
    now = {**options, "env": spec.id}
    before = report.get("settings", now)
    if any(before.get(name, DEFAULTS[name]) != now[name] for name in same):
        raise SystemExit(f"{output} holds cells of other settings ({before}); give another output")
    report.setdefault("cells", {})
    report["settings"] = {**options, "env": spec.id, "control_ms": CONTROL_MS}
    report["settings"]["ms_per_nfe"] = MS_PER_NFE if options["latency"] == "true" else None
    for method in methods:
        for run in runs:
            if f"{run}|{method}" in report["cells"]:
                continue
            report["cells"][f"{run}|{method}"] = cell(method, run, options, config, spec)
            report["table"] = table(report["cells"], runs, methods)
            part = output.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(part, output)
            found = report["cells"][f"{run}|{method}"]
            print(
                f"{run} {method}: {np.mean(found['scores']):.3f}  {found['wall_s']} s", flush=True
            )
    if options["timing"] == "true":
        policy = DiffusionPolicy.from_pretrained(runs[0])
        store, t = str(config.data.path), options["draft_t"]
        made = {m: make(m, runs[0], policy, store, t) for m in methods}
        report["decision_ms"] = decision_ms(made)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print("ms per decision, one environment:", report["decision_ms"])
    print("\n".join(table(report["cells"], runs, methods)))
    if options["plot"]:
        draw(report, runs, methods, options["plot"])


if __name__ == "__main__":
    main(sys.argv[1:])
