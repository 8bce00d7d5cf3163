"""What must not change when code is moved: short runs of every kind, as hashes.

    python scripts/gold.py record scripts/gold.json [only=demo,actor_critic]    # before a change
    python scripts/gold.py check scripts/gold.json [only=...]                   # after it

Each kind trains a few hundred updates on one thread from fixed seeds and hashes (SHA-256) its
weights, actions, tokens and scores. Bits depend on the processor and the version of torch: the file
names both (gold_xeon.json is of an Intel Xeon); ``check`` says when they are others. Weights are
hashed tensor by tensor and sorted, so that renaming a parameter is no difference. Exits 1 with
every line that differs. Needs the simulators (``.[all,onnx,hdf5]``); two minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from diffpolicy import RTI, DiffusionPolicy, EpisodeStore, Streaming, TrainerConfig, cli
from generators.command import run as generate

Hashes = dict[str, str]
QUIET = [
    "trainer.progress=false",
    "threads=1",
    "evaluation.num_workers=0",
    "evaluation.video_episodes=0",
]


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of parts in their order."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def array(value: Any) -> str:
    """Hash of an array with its shape and type."""
    value = np.ascontiguousarray(value.detach().numpy() if torch.is_tensor(value) else value)
    return digest([repr((value.shape, str(value.dtype))).encode(), value.tobytes()])


def weights(*modules: torch.nn.Module) -> str:
    """Hash of all parameters and buffers, whatever they are called."""
    tensors = [t for module in modules for t in module.state_dict().values()]
    return digest(sorted(array(t).encode() for t in tensors))


def values(content: Any) -> str:
    """Hash of plain values; of numbers, all digits."""
    return digest([json.dumps(content, sort_keys=True).encode()])


def command(*arguments: str) -> None:
    """Run the command line in this process.

    Raises:
        RuntimeError: it does not end with 0.
    """
    code = cli.main(arguments)
    if code:
        raise RuntimeError(f"`diffpolicy {' '.join(arguments)}` ended with {code}")


def scored(folder: Path) -> Hashes:
    """Hashes of an evaluated run: its policy's weights and plans, its episodes."""
    return {**acting(DiffusionPolicy.from_pretrained(folder)), "scores": episodes(folder)}


def episodes(folder: Path) -> str:
    """Hash of the episodes that ``eval.json`` tells of."""
    found = json.loads(next(folder.rglob("eval.json")).read_text())["episodes"]
    kept = ("seed", "episode_return", "max_reward", "success", "length")
    return values([[episode.get(name) for name in kept] for episode in found])


def acting(policy: Any, batch: int = 5, steps: int = 6) -> Hashes:
    """Hashes of a policy's weights and of its actions over some steps of made-up observations."""
    rng = np.random.default_rng(0)
    state, actions = policy.initial_state(range(batch)), []
    for _ in range(steps):
        obs = rng.uniform(-0.5, 0.5, (batch, policy.spec.obs_dim)).astype(np.float32)
        action, state = policy.act(obs, state)
        actions.append(action)
    return {"weights": weights(policy.denoiser, policy.heads), "actions": array(np.stack(actions))}


def made_up(seed: int = 0, episodes: int = 40, length: int = 24) -> EpisodeStore:
    """Point masses that go to one of two goals: observations, actions, rewards."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(-0.3, 0.3, (episodes, 2))
    goal = np.stack([rng.choice([-0.8, 0.8], episodes), rng.uniform(-0.5, 0.5, episodes)], 1)
    rows: dict[str, list[Any]] = {"obs": [], "action": [], "reward": [], "terminated": []}
    for step in range(length):
        action = np.clip(0.4 * (goal - place) + 0.05 * rng.normal(size=place.shape), -1, 1)
        rows["obs"].append(np.concatenate([place, goal[:, 1:]], 1))
        rows["action"].append(action)
        place = place + 0.3 * action
        rows["reward"].append(-np.abs(goal - place).sum(1, keepdims=True))
        rows["terminated"].append(np.full((episodes, 1), step == length - 1))
    stacked = {name: np.stack(row, 1).reshape(episodes * length, -1) for name, row in rows.items()}
    arrays = {k: v.astype(bool if k == "terminated" else np.float32) for k, v in stacked.items()}
    arrays |= {k: arrays[k][:, 0] for k in ("reward", "terminated")}
    return EpisodeStore.from_arrays(arrays, np.arange(1, episodes + 1) * length)


def cloned(run: Path, steps: int = 200, **spec: Any) -> DiffusionPolicy:
    """A small policy of the made-up data."""
    small = {"horizon": 8, "n_obs_steps": 2, "n_action_steps": 2, "prediction": "v"}
    network = {"type": "mlp", "width": 48, "depth": 2, **spec.pop("network", {})}
    anchors = spec.pop("anchors", None)
    policy = DiffusionPolicy.from_dataset(
        made_up(), spec={**small, **spec, "network": network}, anchors=anchors
    )
    config = TrainerConfig(steps=steps, batch_size=64, lr=1e-3, warmup_steps=20, progress=False)
    return policy.learn(made_up(), config, run)


# ------------------------------------------------------------------ the kinds


def demo(folder: Path) -> Hashes:
    """Recorded demonstrations, training, validation and test rollouts, as `make demo` does."""
    few = ["data.collect.episodes=6", "evaluation.episodes=3", "evaluation.val_episodes=2"]
    steps = ["trainer.steps=200", "trainer.warmup_steps=20", "trainer.eval_every=100"]
    steps.append("trainer.batch_size=64")
    store = folder / "demos.zarr"
    where = [f"run_dir={folder / 'run'}", f"data.path={store}"]
    command("train", "experiment=demo", *QUIET, *few, *steps, *where)
    found = EpisodeStore.open(store)
    recorded = [array(found.read(n, 0, found.num_steps)) for n in sorted(found.fields)]
    return {**scored(folder / "run"), "demonstrations": values(recorded)}


def preferences(folder: Path) -> Hashes:
    """Push-T: own plans, compared by a learned value, and DPO."""
    run, env = folder / "run", ["env=pusht"]
    shape = ["policy.horizon=8", "policy.n_action_steps=4", "network.width=48", "network.depth=2"]
    few = ["evaluation.episodes=2", "evaluation.val_episodes=0"]
    steps = ["trainer.steps=150", "trainer.warmup_steps=10", "trainer.batch_size=64"]
    data = [f"data.path={folder / 'demos.zarr'}", "data.collect.episodes=6"]
    command("train", *env, *QUIET, *shape, *few, *steps, *data, f"run_dir={folder / 'base'}")
    judge = "judge={lookahead: 16, reward: dense, members: 2, width: 32, trainer: {steps: 60}}"
    pairs = ["collect.episodes=4", "collect.repeats=2", judge, "plans={every: 8, candidates: 4}"]
    where = [f"pretrained={folder / 'base'}", f"run_dir={run}", "nfe=[1,4]"]
    command("prefer", "experiment=pusht_dpo", *QUIET, *few, *steps, *pairs, *where)
    report = json.loads((run / "report.json").read_text())["episodes"]
    return {**acting(DiffusionPolicy.from_pretrained(run)), "scores": values(report)}


def sequences(folder: Path) -> Hashes:
    """TFBind8: a masked model, DRAKES, and SMC drawing from the same model."""
    from diffpolicy.sequences import SequenceModel

    few, quiet = ["draws=64", "threads=1"], "trainer.progress=false"
    base, tuned, smc = (folder / name for name in ("base", "drakes", "smc"))
    command("train", "experiment=tfbind8", "trainer.steps=150", quiet, *few, f"run_dir={base}")
    short = ["trainer.steps=10", "trainer.batch_size=32", "trainer.lr=1e-3", "eval_draws=16"]
    where = [f"pretrained={base}", "experiment=tfbind8_drakes", "base=none"]
    command("tune", *where, quiet, *few, *short, f"run_dir={tuned}")
    command("tune", *where, "method=none", "guidance=smc", *few, f"run_dir={smc}")
    found: Hashes = {}
    for run in (base, tuned, smc):
        report = json.loads((run / "report.json").read_text())
        found[f"{run.name} scores"] = values(
            [report.get("after"), report.get("exact"), report.get("metrics")]
        )
    for run in (base, tuned):
        model = SequenceModel.from_pretrained(run)
        generator = torch.Generator().manual_seed(0)
        found[f"{run.name} weights"] = weights(model.denoiser)
        found[f"{run.name} tokens"] = array(model.draw(32, generator=generator))
    return found


def maze(folder: Path) -> Hashes:
    """A planner of maze trajectories with a draft: Diffuser, then Trajectory Diffuser."""
    file, run = folder / "maze.hdf5", folder / "run"
    env = "env=diffpolicy_envs:diffpolicy/PointMazeUMaze-v0"
    generate(["pointmaze", str(file), env, "steps=3000"])
    small = ["policy.horizon=32", "network.width=64", "network.depth=2", "sampler.num_steps=5"]
    steps = ["trainer.steps=150", "trainer.warmup_steps=10"]
    few = ["evaluation.episodes=2", "evaluation.val_episodes=0", "env.max_episode_steps=80"]
    data = [f"data.d4rl={file}", f"data.path={folder / 'maze.zarr'}", f"run_dir={run}"]
    command("train", "experiment=maze2d_umaze", *QUIET, *small, *steps, *few, *data)
    draft = DiffusionPolicy.from_pretrained(
        run, truncated={"sources": ["autoregressive"], "t_start": 0.2, "num_steps": 2}
    )
    return {**scored(run), "draft": acting(draft)["actions"]}


def actor_critic(folder: Path) -> Hashes:
    """Diffusion-QL: a chain through the critic, twin critics, best of N."""
    from diffpolicy.learn.learning import Learning

    spec = {
        "horizon": 4,
        "n_obs_steps": 1,
        "n_action_steps": 2,
        "network": {"type": "mlp", "width": 48, "depth": 2},
        "heads": {"critic": {"type": "q_ensemble", "layer_norm": True}},
        "selection": {"num_candidates": 4, "rank": "argmax"},
    }
    learning = {
        "actor_critic": {"actor": "chain", "critic": "td", "solver": "ddpm", "num_steps": 3}
    }
    policy = DiffusionPolicy.from_dataset(made_up(), spec=spec)
    config = TrainerConfig(steps=120, batch_size=64, lr=1e-3, warmup_steps=20, progress=False)
    policy.learn(made_up(), config, folder / "run", learning=Learning.from_config(learning))
    return acting(policy)


def streaming(folder: Path) -> Hashes:
    """Levels per position, rolled forward."""
    spec = {"network": {"t_kind": "position"}, "level_law": "position", "horizon": 12}
    policy = cloned(folder / "run", n_action_steps=4, **{**spec, "n_obs_steps": 2})
    return acting(policy.streaming(Streaming(steps_per_chunk=2)))


def truncated(folder: Path) -> Hashes:
    """Anchors, the last plan and a start between noise and data."""
    start = {"t_start": 0.4, "num_steps": 2}
    policy = cloned(folder / "run", truncated=start, anchors={"count": 6, "top_m": 3})
    return acting(policy)


def warm_starts(folder: Path) -> Hashes:
    """RTI: a level chosen from data, a policy run by it, and its loop compiled and exported."""
    from diffpolicy.runtime.export import export_policy
    from diffpolicy.runtime.exported import load_exported

    policy = cloned(folder / "run")
    chosen, why = policy.choose_rti(made_up(), num_steps=2, seed=0)
    fast = policy.with_settings(rti=RTI(t_start=0.3, num_steps=2), n_action_steps=1)
    found = acting(fast)
    found |= {"chosen": values(why.t_start), "actions of the chosen": acting(chosen)["actions"]}
    compiled = fast.compile(backend="onnxruntime", batch_size=5)
    found["compiled"] = acting(compiled)["actions"]
    export_policy(fast, folder / "exported", batch_size=5)
    exported = load_exported(folder / "exported")
    history = np.random.default_rng(1).uniform(-0.5, 0.5, (5, 2, 3)).astype(np.float32)
    plans = [exported.plan(history), exported.plan(history, executed=1)]
    found["exported"] = digest(array(plan.actions).encode() for plan in plans)
    return found


def evaluated(folder: Path) -> Hashes:
    """A warm-started policy of recorded demonstrations, scored by `diffpolicy eval`."""
    few = ["data.collect.episodes=6", "evaluation.episodes=2", "evaluation.val_episodes=0"]
    steps = ["trainer.steps=150", "trainer.warmup_steps=10", "trainer.batch_size=64"]
    steps.append(f"run_dir={folder / 'run'}")
    env = ["env=fetch_reach", f"data.path={folder / 'demos.zarr'}", "policy.n_obs_steps=1"]
    command("train", *env, *QUIET, *few, *steps)
    warm = ["rti.t_start=0.3", "rti.num_steps=2", "n_action_steps=1", f"output={folder / 'eval'}"]
    quick = ["evaluation.episodes=3", "evaluation.num_workers=0", "threads=1"]
    command("eval", f"checkpoint={folder / 'run'}", *warm, *quick)
    policy = DiffusionPolicy.from_pretrained(folder / "run")
    return {"scores": episodes(folder / "eval"), **acting(policy)}


KINDS: Mapping[str, Callable[[Path], Hashes]] = {
    kind.__name__: kind
    for kind in (
        demo,
        preferences,
        sequences,
        maze,
        actor_critic,
        streaming,
        truncated,
        warm_starts,
        evaluated,
    )
}


def machine() -> dict[str, str]:
    """What bits depend on beside the code."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    return {"cpu": cpu, "torch": torch.__version__, "numpy": np.__version__}


def run(only: Iterable[str]) -> dict[str, Hashes]:
    """Run kinds in folders of their own, and tell the seconds of each."""
    torch.set_num_threads(1)
    found = {}
    for name in only:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found[name] = KINDS[name](Path(folder))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main(mode: str, file: Path, only: list[str]) -> int:
    """Record or check.

    Returns:
        1 if anything differs.
    """
    if mode == "record":
        before = json.loads(file.read_text())["kinds"] if file.exists() else {}
        kinds = {**before, **run(only)}
        file.write_text(json.dumps({"machine": machine(), "kinds": kinds}, indent=1) + "\n")
        return 0
    recorded = json.loads(file.read_text())
    if recorded["machine"] != machine():
        print(f"recorded on {recorded['machine']}, this is {machine()}: bits may differ for that")
    differing = 0
    for kind, hashes in run(only).items():
        for name in sorted({*hashes, *recorded["kinds"].get(kind, {})}):
            old, new = recorded["kinds"].get(kind, {}).get(name), hashes.get(name)
            if old != new:
                differing += 1
                print(f"DIFFERS {kind}: {name} was {str(old)[:12]}, is {str(new)[:12]}")
    print(f"{differing} differences" if differing else "the same")
    return min(differing, 1)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("record", "check"):
        sys.exit(__doc__)
    chosen = [a.removeprefix("only=").split(",") for a in sys.argv[3:] if a.startswith("only=")]
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), chosen[0] if chosen else list(KINDS)))
