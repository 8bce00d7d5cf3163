"""What can be wrong with the tuning of a policy, found before anything is collected or written."""

from __future__ import annotations

import copy
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from diffpolicy.commands.lineage import lineage
from diffpolicy.commands.policy_rollouts import check_rollouts
from diffpolicy.commands.train_sequences import trainer_settings
from diffpolicy.config import ConfigError, TrainConfig
from diffpolicy.config_policy_tuning import PolicyTuningConfig, check_read, method_name

if TYPE_CHECKING:
    from diffpolicy.api import DiffusionPolicy
    from diffpolicy.data.store import EpisodeStore


def check_alone() -> None:
    """Raise ``ConfigError`` under torchrun: every process would collect and score for itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"policies are tuned by one process, and this is one of {os.environ['WORLD_SIZE']} "
            "(WORLD_SIZE): start `diffpolicy finetune` without torchrun"
        )


def check_tuning(
    config: PolicyTuningConfig,
    base: TrainConfig,
    policy: DiffusionPolicy,
    demonstrations: EpisodeStore | None,
) -> None:
    """Find what is wrong with the settings before anything runs."""
    from diffpolicy.learn.adapters import add_adapters
    from diffpolicy.learn.material import TuningData, check_fits
    from diffpolicy.learn.methods import method_of

    trainer_settings(config.trainer, config.seed)
    method = method_of(config.preference, "prefer", items="plans")
    check_fits(method, policy.spec, policy.normalizer, policy.denoiser, TuningData())
    need = method.reads()
    compared = "reward" in need or config.plans is not None
    if compared != (config.judge is not None):
        raise ConfigError(
            "preference.online and plans compare own plans by judge=..., and judge serves nothing "
            "else: give both or neither"
        )
    check_read(config)
    if need & {"pairs", "labels"} and config.preferences is None and config.collect is None:
        raise ConfigError(
            f"{method_name(config)} learns from preferences: give preferences=FILE, or collect="
            "{...} to make pairs from the policy's rollouts"
        )
    if "demonstrations" in need and demonstrations is None:
        raise ConfigError(
            f"{method_name(config)} learns from demonstrations, and those of the pre-trained run "
            "are not there; give demonstrations=STORE"
        )
    if config.preference.get("anchor") == "both" and demonstrations is None:
        raise ConfigError(
            "preference.anchor=both clones demonstrations too, and those of the pre-trained run "
            "are not there; give demonstrations=STORE, or preference.anchor=chosen"
        )
    check_rollouts(config, base, policy)
    if config.adapters is not None:
        add_adapters(copy.deepcopy(policy.denoiser), config.adapters)


def inputs(config: PolicyTuningConfig, demonstrations: EpisodeStore | None) -> dict[str, Path]:
    """What the run is to read, by the name of its setting."""
    from diffpolicy.data.preferences.set import PreferenceSet

    found = {"pretrained": Path(config.pretrained)}
    found |= {f"the run before {run}": of for run, of in pairwise(lineage(config.pretrained))}
    if config.preferences is not None:
        file = Path(config.preferences)
        found |= {
            "preferences": file,
            "the store of preferences": _path(PreferenceSet.open(file).store),
        }
    if demonstrations is not None:
        found["demonstrations"] = _path(demonstrations)
    return found


def _path(store: EpisodeStore) -> Path:
    return Path(str(store.path))


__all__ = ["check_alone", "check_tuning", "inputs"]
