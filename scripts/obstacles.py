"""An obstacle that no demonstration has seen: how often the gripper goes round it, at what price.

    python scripts/obstacles.py [episodes=60] [steps=1200] [demos=60] [radius=0.04] [arms=[...]]
                                [runs=runs/obstacles] [output=obstacles.json]

A policy for Fetch reach is trained on scripted demonstrations, which all go straight to the goal.
Then a sphere stands in the way of each episode: its center lies on the way from the start to the
goal, at the middle, moved sideways by up to half its radius. An episode is a *case* (reachable) if
start and goal are at least `clear` outside of the sphere. Every arm acts in the same cases, with
the same noise, on seeds 300,000 and up: `plain` knows nothing of the sphere; the others are the
same weights under `policy.with_guidance`. Avoided: the way of the gripper, straight between control
steps, never enters the sphere. Success is the environment's, and of `plain` without the sphere.
Latency is the median processor time of a plan, arms measured in turns on one thread.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy import DiffusionPolicy, TrainerConfig
from diffpolicy.commands.options import parse
from diffpolicy.files import write_json
from diffpolicy.policies.rti import RTI
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.intervals import paired_difference, wilson_interval
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.record.experts import collect
from diffpolicy.settings import ConfigError
from diffpolicy.training.identity import machine

ENV = EnvSpec("diffpolicy_envs:diffpolicy/FetchReach-v0")
DEFAULTS: dict[str, Any] = {
    "episodes": 60,
    "steps": 1200,
    "demos": 60,
    "radius": 0.04,
    "clear": 0.02,
    "margin": 0.01,
    "arms": [],
    "runs": "runs/obstacles",
    "output": "obstacles.json",
}
SPEC: dict[str, Any] = {
    "horizon": 12,
    "n_obs_steps": 1,
    "n_action_steps": 4,
    "process": {"type": "ddpm_cosine"},
    "prediction": "v",
    "network": {"type": "mlp", "width": 256, "depth": 3},
    "sampler": {"solver": "ddim", "num_steps": 10},
    "action_low": [-1.0] * 4,
    "action_high": [1.0] * 4,
}
GRIPPER, GOAL = slice(0, 3), slice(10, 13)  # entries of the observation, metres
GAIN = 0.031  # metres that a full action moves the gripper by in a control step (measured)
RTI3 = RTI(t_start=0.3, num_steps=3)
# Name -> what is steered by, settings of the guidance, other settings of the policy.
ARMS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "plain": (None, {}, {}),
    "projected": ("lateral", {"scale": 0.0, "project": 2}, {}),
    "projected_normal": ("normal", {"scale": 0.0, "project": 2}, {}),
    "steered": ("lateral", {"window": (0.0, 0.3), "project": 1}, {}),
    "rti": (None, {}, {"rti": RTI3}),
    "rti_projected": ("lateral", {"scale": 0.0, "project": 1}, {"rti": RTI3}),
    "rti_projected_3": ("lateral", {"scale": 0.0, "project": 3}, {"rti": RTI3}),
}


def trained(settings: dict[str, Any], runs: Path) -> DiffusionPolicy:
    """The policy, from demonstrations that go straight."""
    if (runs / "policy").exists():
        steps = SPEC["n_action_steps"]
        return DiffusionPolicy.from_pretrained(runs / "policy", n_action_steps=steps)
    workers = Workers(num_envs=10, num_workers=0)
    how: dict[str, Any] = {"noise": 0.15, "progress": False, "workers": workers}
    store = collect(ENV, range(settings["demos"]), runs / "reach.zarr", **how)
    policy = DiffusionPolicy.from_dataset(store, spec=SPEC)
    config = TrainerConfig(steps=settings["steps"], batch_size=128, lr=1e-3, progress=False)
    policy.learn(store, config, runs / "training", val_fraction=0.0, overwrite=True)
    policy.save(runs / "policy")
    return policy


def sphere_between(start: Any, goal: Any, settings: dict[str, Any], seed: int) -> Any:
    """The center of an episode's sphere; ``None`` where it covers start or goal."""
    rng = np.random.default_rng(seed)
    way = (goal - start) / np.linalg.norm(goal - start)
    side = np.cross(way, rng.standard_normal(3))
    offset = rng.uniform(0, settings["radius"] / 2)
    center = (start + goal) / 2 + offset * side / np.linalg.norm(side)
    ends = [np.linalg.norm(end - center) for end in (start, goal)]
    return center if min(ends) >= settings["radius"] + settings["clear"] else None


def acting(
    policy: DiffusionPolicy, arm: str, center: Any, settings: dict[str, Any]
) -> DiffusionPolicy:
    """The policy of an arm before an episode's sphere."""
    push, guidance, others = ARMS[arm]
    if push is not None:
        sphere = {"type": "obstacle", "dims": [0, 1, 2], "center": center.tolist(), "push": push}
        sphere |= {"radius": settings["radius"], "margin": settings["margin"]}
        sphere |= {"gain": GAIN, "start": [0, 1, 2]}
        policy = policy.with_guidance(sphere, **guidance)
    return policy.with_settings(**others) if others else policy


def nearest(path: Any, center: Any) -> float:
    """The least distance of a polygon ``[T, 3]`` from a point."""
    first, step = path[:-1], path[1:] - path[:-1]
    size = np.maximum(np.square(step).sum(1), 1e-12)
    share = np.clip(((center - first) * step).sum(1) / size, 0, 1)
    return float(np.linalg.norm(first + share[:, None] * step - center, axis=1).min())


def episode(env: Any, policy: DiffusionPolicy, seed: int, center: Any) -> dict[str, Any]:
    """One episode: success, and how near the gripper came to a point."""
    obs, info = env.reset(seed=seed)
    state, path, done = policy.initial_state([seed]), [obs[GRIPPER]], False
    while not done:
        action, state = policy.act(obs[None], state)
        obs, _, terminated, truncated, info = env.step(action[0])
        path.append(obs[GRIPPER])
        done = terminated or truncated
    return {"success": bool(info["is_success"]), "distance": nearest(np.array(path), center)}


def cases(env: Any, settings: dict[str, Any]) -> dict[int, Any]:
    """The centers of the spheres of reachable episodes, by seed."""
    found: dict[int, Any] = {}
    for seed in range(300_000, 300_000 + settings["episodes"]):
        obs, _ = env.reset(seed=seed)
        start, goal = (obs[part].astype(np.float64) for part in (GRIPPER, GOAL))
        center = sphere_between(start, goal, settings, seed)
        if center is not None:
            found[seed] = center
    return found


def latencies(policies: dict[str, DiffusionPolicy], env: Any, seed: int) -> dict[str, float]:
    """Median processor milliseconds of a later plan in an episode, the arms in turns."""
    obs, _ = env.reset(seed=seed)
    states = {}
    for name, policy in policies.items():
        _, states[name] = policy.act(obs[None], policy.initial_state([seed]))
    times: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(120):
        for name, policy in policies.items():
            began = time.thread_time()
            policy.replan(states[name], [0])
            times[name].append(1e3 * (time.thread_time() - began))
    return {name: float(np.median(taken)) for name, taken in times.items()}


def run(arguments: list[str]) -> None:
    """Train, act in every case with every arm, report."""
    settings = parse(arguments, (), DEFAULTS)
    torch.set_num_threads(1)
    runs = Path(settings["runs"])
    policy = trained(settings, runs)
    env = ENV.make()
    arms = settings["arms"] or list(ARMS)
    spheres = cases(env, settings)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed, center in spheres.items():
        for arm in arms:
            found[arm].append(episode(env, acting(policy, arm, center, settings), seed, center))
    seed, center = next(iter(spheres.items()))
    took = latencies({arm: acting(policy, arm, center, settings) for arm in arms}, env, seed)
    report: dict[str, Any] = {
        "command": " ".join(["python scripts/obstacles.py", *arguments]),
        "settings": settings,
        "cases": len(spheres),
        "machine": machine(torch.device("cpu")),
        "arms": {},
    }
    for arm, episodes in found.items():
        base = "rti" if arm.startswith("rti") and "rti" in found else "plain"
        avoided = np.array([one["distance"] > settings["radius"] for one in episodes])
        success = np.array([one["success"] for one in episodes])
        before = np.array([one["success"] for one in found[base]])
        both = avoided & success
        row = {
            "avoided": float(avoided.mean()),
            "avoided_interval": list(wilson_interval(int(avoided.sum()), len(avoided))[1:3]),
            "success": float(success.mean()),
            "avoided_and_success": float(both.mean()),
            "success_loss": list(paired_difference(before, success)[:3]),
            "ms": took[arm],
            "times_latency": took[arm] / took[base],
        }
        report["arms"][arm] = row
        print(f"{arm}: {json.dumps(row)}", flush=True)
    write_json(settings["output"], report)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    try:
        run(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"obstacles: {error}")
