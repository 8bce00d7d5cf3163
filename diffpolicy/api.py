"""The facade that users import: one class that learns, acts, saves and loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows, split_episodes
from diffpolicy.finetune.denoising import DenoisingLoss
from diffpolicy.policies.diffusion import DiffusionPlanner, PolicySpec, Sampler
from diffpolicy.training.checkpoint import read_bundle, write_bundle
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer, TrainResult

FORMAT, VERSION = "diffpolicy-policy", 1


class DiffusionPolicy(DiffusionPlanner):
    """A diffusion policy (Chi et al. 2023): ``from_dataset``, ``learn``, ``predict``, ``save``.

    ``load``.

    Example:
        >>> policy = DiffusionPolicy.from_dataset(EpisodeStore.open("data/demos.zarr"))
        >>> policy.learn("data/demos.zarr", TrainerConfig(steps=5000), run_dir="runs/mine")
        >>> action, state = policy.predict(obs)
    """

    last_training: TrainResult | None = None

    @classmethod
    def from_dataset(
        cls,
        store: EpisodeStore,
        *,
        spec: Mapping[str, Any] | None = None,
        normalize: Mapping[str, str] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Self:
        """An untrained policy whose shapes and normaliser come from a store of demonstrations.

        Args:
            store: fields ``obs [T, O]`` and ``action [T, A]``, with statistics.
            spec: entries of :class:`~diffpolicy.policies.diffusion.PolicySpec` other than the two
                dimensions.
            normalize: mode per field, ``minmax`` (default), ``gaussian``, ``quantile``,
                ``identity``.
            seed: of the initial weights.
            device: where the weights live.

        Raises:
            ValueError: a missing field or statistics, or settings that do not fit together.
        """
        absent = [name for name in ("obs", "action") if name not in store.fields]
        if absent:
            raise ValueError(
                f"store {store.name} has no field {absent[0]!r} (it has {sorted(store.fields)}); "
                "convert it with `diffpolicy data convert ... obs=FIELD action=FIELD`"
            )
        dims = {
            "obs_dim": store.fields["obs"].shape[0],
            "action_dim": store.fields["action"].shape[0],
        }
        full = PolicySpec.from_config({**(spec or {}), **dims})
        modes: dict[str, Any] = {"obs": "minmax", "action": "minmax", **(normalize or {})}
        normalizer = Normalizer.fit(store.statistics, modes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = full.make_denoiser()
        return cls(full, denoiser.to(device), normalizer)

    def learn(
        self,
        store: EpisodeStore | str | os.PathLike[str],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        val_fraction: float = 0.02,
        max_episodes: int | None = None,
        mask_padding: bool = False,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Behaviour cloning on a store of demonstrations; ends with the averaged (EMA) weights.

        Args:
            store: the demonstrations, or their path.
            config: steps, batch size, learning rate, ...
            run_dir: where metrics and checkpoints go.
            val_fraction: fraction of the episodes held out for the validation loss.
            max_episodes: use the first so many episodes only.
            mask_padding: leave edge-padded actions out of the loss.
            evaluate: called with a policy directory and the step; returns metrics, of which
                ``score`` decides the best checkpoint.
            resume: continue the run in ``run_dir`` exactly where it stopped.
            overwrite: replace an earlier run in ``run_dir``.

        Returns:
            self; ``last_training`` tells the steps done, seconds, and whether it was interrupted.
        """
        episodes = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
        count = min(episodes.num_episodes, max_episodes or episodes.num_episodes)
        train, val = split_episodes(count, val_fraction, config.seed)
        windows = partial(
            Windows,
            episodes,
            horizon=self.horizon,
            n_obs_steps=self.n_obs_steps,
            n_action_steps=self.n_action_steps,
            normalizer=self.normalizer.to("cpu"),
        )
        source, val_source = windows(episodes=train), windows(episodes=val) if len(val) else None
        objective = DenoisingLoss(
            self.denoiser, cond_dropout=self.spec.cond_dropout, mask_padding=mask_padding
        )
        trainer = Trainer(
            objective,
            source,
            config,
            run_dir,
            export=self._bundle,
            val_source=val_source,
            evaluate=evaluate,
            resume=resume,
            overwrite=overwrite,
        )
        result = trainer.fit()
        self.last_training = result
        objective.load_state_dict(result.ema)
        self.__init__(self.spec, self.denoiser, self.normalizer)  # type: ignore[misc] # new weights, new tables
        return self

    def _bundle(self, objective_state: Mapping[str, Tensor]) -> dict[str, Any]:
        prefix = "denoiser."
        weights = {
            k.removeprefix(prefix): v for k, v in objective_state.items() if k.startswith(prefix)
        }
        return policy_files(self.spec, weights, self.normalizer)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the policy as a directory: ``config.json``.

        Two safetensors files and a manifest of hashes.
        """
        write_bundle(
            Path(path), policy_files(self.spec, self.denoiser.state_dict(), self.normalizer)
        )
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        sampler: Mapping[str, Any] | None = None,
        n_action_steps: int | None = None,
    ) -> Self:
        """Read a policy directory, verifying every hash.

        Args:
            path: a directory written by :meth:`save` or a checkpoint's ``policy``.
            device: where the weights go.
            sampler: replacements for entries of the stored sampler.
            n_action_steps: replacement for the actions executed per plan.

        Raises:
            ValueError: not a policy, a damaged file, or settings that do not fit.
        """
        files = read_bundle(Path(path))
        config = dict(files["config.json"])
        if config.pop("format", None) != FORMAT or config.pop("version", None) != VERSION:
            raise ValueError(f"{path} is not a diffpolicy policy of version {VERSION}")
        normalizer = Normalizer.from_parts(
            config.pop("normalizer"), files["normalizer.safetensors"]
        )
        if sampler:
            # Options belong to one solver: a new solver does not inherit those of the old one.
            kept = (
                config["sampler"]
                if "solver" not in sampler
                else {**config["sampler"], "options": {}}
            )
            config["sampler"] = {**kept, **sampler}
        if n_action_steps is not None:
            config["n_action_steps"] = n_action_steps
        spec = PolicySpec.from_config(config)
        denoiser = spec.make_denoiser()
        denoiser.load_state_dict(files["model.safetensors"])
        return cls(spec, denoiser.to(device), normalizer)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """:meth:`load`, from a policy, a checkpoint or a run directory (its best checkpoint.

        Else its last).
        """
        return cls.load(find_policy(path), **options)


def policy_files(
    spec: PolicySpec, weights: Mapping[str, Tensor], normalizer: Normalizer
) -> dict[str, Any]:
    """The files of a policy directory.

    As values for :func:`diffpolicy.training.checkpoint.write_bundle`.
    """
    config = {
        "format": FORMAT,
        "version": VERSION,
        **spec.to_config(),
        "normalizer": normalizer.to_config(),
    }
    return {
        "config.json": config,
        "model.safetensors": dict(weights),
        "normalizer.safetensors": normalizer.to_tensors(),
    }


def find_policy(path: str | os.PathLike[str]) -> Path:
    """The policy directory that ``path`` (policy, checkpoint or run) stands for.

    Raises:
        ValueError: nothing there, with what was looked for.
    """
    root = Path(path)
    candidates = [root, root / "policy"]
    for pointer in ("best", "last"):
        file = root / "checkpoints" / pointer
        if file.is_file():
            candidates.append(root / "checkpoints" / file.read_text().strip() / "policy")
    for candidate in candidates:
        config = candidate / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("format") == FORMAT:
            return candidate
    raise ValueError(
        f"no policy in {root}: expected a policy directory (config.json, model.safetensors), a "
        "checkpoint directory (policy/) or a run directory (checkpoints/best or checkpoints/last)"
    )


__all__ = [
    "Denoiser",
    "DiffusionPolicy",
    "PolicySpec",
    "Sampler",
    "TrainerConfig",
    "find_policy",
    "policy_files",
]
