"""`diffpolicy eval`: roll a trained policy out and score it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpolicy.commands.options import groups_help
from diffpolicy.config import ConfigError, EnvConfig, EvalConfig, build, config_dir, load_eval


def help_text() -> str:
    """The text of `diffpolicy eval --help`."""
    settings = (config_dir() / "eval.yaml").read_text().split("_self_\n")[1].strip()
    evaluation = (config_dir() / "evaluation" / "default.yaml").read_text().strip()
    indent = "\n    "
    return f"""\
usage: diffpolicy eval checkpoint=RUN [key=value] ...

Rolls a policy out in its environment, one episode per seed, and prints `RESULT {{json}}`;
everything about each episode goes to eval.json.

settings:
    {indent.join(settings.splitlines())}

evaluation.KEY:
    {indent.join(evaluation.splitlines())}

{groups_help(("evaluation",))}

examples:
    diffpolicy eval checkpoint=runs/demo evaluation.episodes=100
    diffpolicy eval checkpoint=runs/demo sampler.solver=unipc sampler.num_steps=5
    diffpolicy eval checkpoint=runs/pusht evaluation.seed=100000   # Diffusion Policy's own seeds"""


def run(arguments: Sequence[str]) -> int:
    """Compose the configuration, evaluate, report."""
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.commands.train import choose_rendering, evaluate_policy, pick_device, summary
    from diffpolicy.rollout.spec import EnvSpec

    began = time.perf_counter()
    config = load_eval(arguments)
    if config.evaluation.episodes == 0:
        raise ConfigError("evaluation.episodes=0 leaves nothing to evaluate")
    device = pick_device(config.device, config.threads)
    choose_rendering(config.evaluation.video_episodes)
    policy = DiffusionPolicy.from_pretrained(
        config.checkpoint,
        device=device,
        sampler={k: v for k, v in config.sampler.items() if v is not None},
        n_action_steps=config.n_action_steps,
    )
    env = _environment(config, policy.spec.env_id)
    spec = EnvSpec(env.id, env.kwargs, env.max_episode_steps)
    output = Path(config.output) if config.output else Path(config.checkpoint) / "eval"
    result = evaluate_policy(
        policy,
        spec,
        config.evaluation,
        output,
        env.success_threshold,
        deterministic=config.deterministic,
    )
    report: dict[str, Any] = {"task": env.name, **summary(result)}
    report["total_s"] = round(time.perf_counter() - began, 1)
    print("RESULT " + json.dumps(report))
    return 0


def _environment(config: EvalConfig, trained_for: str | None) -> EnvConfig:
    """The run's environment (from its config.yaml, else the policy's id) with overrides."""
    from omegaconf import OmegaConf

    values: dict[str, Any] = {}
    root = Path(config.checkpoint).resolve()
    candidates = [folder / "config.yaml" for folder in (root, *list(root.parents)[:3])]
    file = next((c for c in candidates if c.is_file()), None)  # the run a checkpoint lies in
    if file is not None:
        values = dict(OmegaConf.to_container(OmegaConf.load(file))["env"])  # type: ignore[call-overload,index,arg-type]
    elif trained_for:
        values = {"id": trained_for}
    values.update({k: v for k, v in config.env.items() if v is not None})
    if "id" not in values:
        raise ConfigError("the policy does not say which environment it is for; give env.id=...")
    return build(EnvConfig, values, "env.")
