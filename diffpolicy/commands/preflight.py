"""What can be known to fail is found before anything is removed, collected or trained."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from diffpolicy.config import EnvConfig, EvaluationConfig, TrainConfig
from diffpolicy.extras import EXTRAS, installed
from diffpolicy.settings import ConfigError, check_choice, check_range, from_values, near_miss

if TYPE_CHECKING:
    from diffpolicy.rollout.env_spec import EnvSpec

SCORES = ("success", "final_success", "max_reward", "return", "length")


def pick_device(name: str, threads: int | None) -> Any:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; set the CPU threads.

    Raises:
        ConfigError: no such device, here or at all.
        ValueError: no number of threads.
    """
    import torch

    check_range("[1, inf)", threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    kind, _, number = str(name).partition(":")
    known = ("auto", "cpu", "cuda")
    if kind not in known or (number and not (kind == "cuda" and number.isdigit())):
        hint = "; did you mean 'cuda'?" if kind == "gpu" else near_miss(kind, known)
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {name!r}{hint}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        kind = "cuda" if count else "cpu"
    if kind == "cuda" and not number and count:
        number = os.environ.get("LOCAL_RANK", "0")  # torchrun: one device a process
    if kind == "cuda" and (not count or int(number) >= count):
        seen = f"torch sees {count} of them" if count else "torch sees no GPU here"
        raise ConfigError(f"device={name}, but {seen}; use device=cpu or device=auto")
    return torch.device(kind, int(number)) if number else torch.device(kind)


def check_writable(*paths: str | Path) -> None:
    """Raise ``ConfigError`` unless files can be written into directories that may not be yet."""
    for path in map(Path, paths):
        there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path.cwd())
        if not there.is_dir():
            raise ConfigError(f"nothing can be written to {path}: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"nothing can be written to {path}: {there} is not writable")


def check_installed(modules: Iterable[str], reason: str) -> None:
    """Raise ``ConfigError`` for an optional package that ``reason`` needs and that is missing."""
    for module in modules:
        if not installed(module):
            extra = EXTRAS.get(module, "all")
            raise ConfigError(
                f"{reason} needs {module}, which is not installed: "
                f'pip install "diffpolicy[{extra}]"'
            )


def choose_rendering(video_episodes: int) -> None:
    """Pick a GL backend before any simulator is imported, and say so if there is none.

    Raises:
        ConfigError: pictures are asked for, and what writes them is not installed.
    """
    if video_episodes > 0:
        from diffpolicy.rollout.video import choose_gl_backend

        reason = f"evaluation.video_episodes={video_episodes} (0: no pictures)"
        check_installed(("imageio", "imageio_ffmpeg", "PIL"), reason)
        print(choose_gl_backend().message)


def check_environment(config: EnvConfig, settings: EvaluationConfig) -> None:
    """Make the environment of a run's rollouts once, and see that it reports the run's score.

    Raises:
        ConfigError: a score that the environment does not report.
        ValueError: an unknown score.
        EnvSpecError: the environment cannot be made.
    """
    check_choice("env.score", config.score, SCORES)
    if settings.episodes == settings.val_episodes == 0:
        return
    from diffpolicy.rollout.env_spec import EnvSpec, describe

    spec = EnvSpec(config.id, config.kwargs, config.max_episode_steps)
    if not config.score.endswith("success") or config.success_threshold is not None:
        describe(spec)
    elif not _says_success(spec, settings.val_seed):
        raise ConfigError(
            f"{config.id} reports no success (an entry is_success or success of info), which "
            f"env.score={config.score} needs: give env.success_threshold (a step's reward that "
            "counts as success), or env.score=return or max_reward"
        )


def _says_success(spec: EnvSpec, seed: int) -> bool:
    """Whether an episode of random actions says of any step if it was a success."""
    from diffpolicy.rollout.pool.slots import EnvSlot

    slot = EnvSlot(spec, 0)
    try:
        slot.reset(seed)
        space = slot.env.action_space
        space.seed(seed)
        while True:
            outcome = slot.step(space.sample())
            if outcome.success is not None:
                return True
            if outcome.terminated or outcome.truncated:
                return False
    finally:
        slot.close()


def check_training(config: TrainConfig) -> None:
    """Find what is wrong with the settings before anything is collected or trained.

    Raises:
        ConfigError: settings that cannot be used.
        ValueError: likewise.
    """
    from diffpolicy.commands.runs import trainer_settings
    from diffpolicy.commands.stores import hindsight
    from diffpolicy.data.action_groups import ActionGroup
    from diffpolicy.learn.learning import Learning, check_learning
    from diffpolicy.policies.spec import PolicySpec

    if trainer_settings(config.trainer, config.seed).tensorboard:
        check_installed(("tensorboard",), "trainer.tensorboard=true")
    learning = Learning.from_config(config.learning)
    if hindsight(config.data.goals) is not None and learning.actor_critic is not None:
        raise ConfigError(
            "data.goals is for cloning and planners; an actor-critic learns from the rewards that "
            "its data have: data.goals=null"
        )
    # What is left out needs the dimensions of the data.
    unknown = {"rti": None, **dict.fromkeys(("actions", "grippers", "goal", "constant"), ())}
    shape = {**config.spec(), **unknown}
    for i, group in enumerate(config.policy.get("actions") or ()):
        from_values(ActionGroup, group, f"policy.actions[{i}].")
    spec = PolicySpec.from_config({"obs_dim": 1, "action_dim": 1, **shape})
    plain = replace(spec, encoder={"type": "state"})  # others may need the fields of the data
    denoiser = plain.make_denoiser()
    plain.make_heads()
    check_learning(spec, learning)
    spec.sampler.make().rows(denoiser.process, spec.sampler.grid(denoiser.process))


def check_policy(config: TrainConfig) -> None:
    """Build what will be trained for what the environment observes, before that is recorded.

    Where the data are there already they say it themselves, and at once.

    Raises:
        ImportError: a package that a part of the policy needs.
        ValueError: settings that do not go together.
    """
    from diffpolicy.data.observation import by_store_field
    from diffpolicy.learn.making import observed, with_task_count
    from diffpolicy.policies.spec import PolicySpec
    from diffpolicy.rollout.env_spec import EnvSpec, describe

    data, env = config.data, config.env
    there = data.path is None or Path(data.path).exists()
    if there or data.mix or data.collect is None or config.policy.get("imagined"):
        return
    info = describe(EnvSpec(env.id, env.kwargs, env.max_episode_steps))
    seen = SimpleNamespace(fields=by_store_field(info.obs), name=env.id)
    actions = config.policy.get("actions")
    spec = {**config.spec(), **observed(seen), "action_dim": info.action_dim, "rti": None}
    spec["actions"] = info.action_groups if actions is None else actions
    told = any(field.is_id for field in seen.fields.values())
    spec["encoder"] = with_task_count(spec.get("encoder"), int(told))
    PolicySpec.from_config(spec).make_denoiser()
