"""The facade that users import: one class that learns, acts, saves and loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.data.fields import check_vector
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows
from diffpolicy.learn.learning import fitted_returns
from diffpolicy.learn.trainable import TrainablePolicy
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.base import Array
from diffpolicy.policies.choose_level import choose_level, demonstrations, observation_step
from diffpolicy.policies.chunking import Chunking, RealTimeChunking
from diffpolicy.policies.diffusion import PolicySpec, Sampler
from diffpolicy.policies.level_report import LevelReport
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import Gripper
from diffpolicy.policies.streaming import Streaming, StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.policies.upgrade import upgraded
from diffpolicy.training.checkpoint import read_bundle, write_bundle
from diffpolicy.training.saved import FORMAT, VERSION, find_policy, policy_files
from diffpolicy.training.settings import TrainerConfig


class DiffusionPolicy(TrainablePolicy):
    """A diffusion policy (Chi et al. 2023): ``from_dataset``, ``learn``, ``predict``, ``save``.

    ``load``.

    Example:
        >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr")
        >>> policy.learn("data/demos.zarr", TrainerConfig(steps=5000), run_dir="runs/mine")
        >>> action, state = policy.predict(obs)
    """

    @classmethod
    def from_dataset(
        cls,
        store: EpisodeStore | str | os.PathLike[str],
        *,
        spec: Mapping[str, Any] | None = None,
        normalize: Mapping[str, str] | None = None,
        anchors: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Self:
        """An untrained policy whose shapes and normaliser come from a store of demonstrations.

        Args:
            store: fields ``obs [T, O]`` and ``action [T, A]``, with statistics; or its path.
            spec: entries of :class:`~diffpolicy.policies.diffusion.PolicySpec` other than the two
                dimensions.
            normalize: mode per field, ``minmax`` (default), ``gaussian``, ``quantile``,
                ``identity``.
            anchors: settings of :meth:`Anchors.fit <diffpolicy.policies.anchors.Anchors.fit>`
                (``count``, ``relative_to``, ``top_m``) for a policy with ``truncated``; ``None``:
                no anchors.
            seed: of the initial weights, and of the anchors.
            device: where the weights live.

        Raises:
            ValueError: a missing field or statistics, or settings that do not fit together.
        """
        store = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
        absent = [name for name in ("obs", "action") if name not in store.fields]
        if absent:
            raise ValueError(
                f"store {store.name} has no field {absent[0]!r} (it has {sorted(store.fields)}); "
                "convert it with `diffpolicy data convert ... obs=FIELD action=FIELD`"
            )
        for name in ("obs", "action"):
            check_vector(name, store.fields[name].shape, store.name)
        dims = {
            "obs_dim": store.fields["obs"].shape[0],
            "action_dim": store.fields["action"].shape[0],
        }
        known = {"observation_step": observation_step(store), **(spec or {})}
        if known.get("level_law") == "position":
            known["trained_action_steps"] = known.get("n_action_steps", PolicySpec.n_action_steps)
        full = PolicySpec.from_config({**known, **dims})
        if full.returns is not None:
            full = replace(full, returns=fitted_returns(full.returns, store))
        modes: dict[str, Any] = {"obs": "minmax", "action": "minmax", **(normalize or {})}
        normalizer = Normalizer.fit(store.statistics, modes)
        for gripper in full.grippers:
            if gripper.mode == "scale":
                normalizer = normalizer.scaled("action", gripper.dim, 1 / gripper.factor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser, heads = full.make_denoiser(), full.make_heads()
        fitted = None
        if anchors is not None:
            fitted = fit_anchors(full, store, normalizer, **{"seed": seed, **anchors})
        return cls(full, denoiser.to(device), normalizer, fitted, heads.to(device))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the policy as a directory: ``config.json``, safetensors files, and their hashes."""
        weights, heads = self.denoiser.state_dict(), self.heads.state_dict()
        files = policy_files(self.spec, weights, self.normalizer, self.anchors, heads)
        write_bundle(Path(path), files)
        return Path(path)

    def with_settings(self, **changes: Any) -> Self:
        """The same weights with other entries of the spec: ``rti``, ``n_action_steps``, ...

        Example:
            >>> fast = policy.with_settings(rti=RTI(t_start=0.3), n_action_steps=1)

        Raises:
            ValueError: settings that do not fit, or that would need other weights.
        """
        fixed = {"obs_dim", "action_dim", "horizon", "n_obs_steps", "network", "process"}
        fixed |= {"prediction", "cond_dropout", "level_law", "trained_action_steps"}
        fixed |= {"layout", "goal", "constant", "heads"}
        wrong = sorted(set(changes) & fixed)
        scaled = [
            {g for g in s if g.mode == "scale"}
            for s in (self.spec.grippers, changes.get("grippers", self.spec.grippers))
        ]
        if scaled[0] != scaled[1]:
            wrong.append("a gripper of mode 'scale'")
        if self.spec.network.get("type") == "anchored" and self.spec.truncated is not None:
            other = changes.get("truncated", self.spec.truncated)
            if other is None or other.t_start != self.spec.truncated.t_start:
                wrong.append("the level that a network of type 'anchored' starts from")
        if (changes.get("returns", self.spec.returns) is None) != (self.spec.returns is None):
            wrong.append("whether plans are conditioned on returns")
        if wrong:
            raise ValueError(f"{wrong[0]} belongs to the weights; train a policy with another one")
        spec = replace(self.spec, **changes)
        return type(self)(spec, self.denoiser, self.normalizer, self.anchors, self.heads)

    def choose_rti(
        self,
        store: EpisodeStore | str | os.PathLike[str],
        *,
        num_steps: int = 3,
        n_action_steps: int = 1,
        episodes: int = 60,
        seed: int = 0,
        **settings: Any,
    ) -> tuple[Self, LevelReport]:
        """Real-time iteration with the start level chosen from demonstrations.

        Args:
            store: demonstrations, or their path.
            num_steps: network evaluations per warm plan.
            n_action_steps: actions executed per plan.
            episodes: demonstrations used.
            seed: of their choice and of the noise.
            settings: other entries of :class:`~diffpolicy.policies.rti.RTI`.

        Returns:
            The policy with these settings, and why the level was chosen.
        """
        opened = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
        if settings.get("innovation") is not None and self.spec.observation_step is None:
            base = self.with_settings(observation_step=observation_step(opened))
        else:
            base = self
        base = base.with_settings(rti=None, truncated=None, n_action_steps=n_action_steps)
        rti = RTI(t_start=1.0, num_steps=num_steps, **settings)
        report = choose_level(base, demonstrations(opened, episodes, seed=seed), rti, seed=seed)
        return base.with_settings(rti=replace(rti, t_start=report.t_start)), report

    def choose_truncated(
        self,
        store: EpisodeStore | str | os.PathLike[str],
        *,
        episodes: int = 60,
        seed: int = 0,
    ) -> tuple[Self, LevelReport]:
        """A truncated policy with its start level chosen from demonstrations, as for warm starts.

        The default level of :meth:`with_anchors` covers the anchors' quantisation error and no
        more; where the plan depends much on the state, a higher one is better.

        Args:
            store: demonstrations, or their path.
            episodes: demonstrations used.
            seed: of their choice and of the noise.

        Returns:
            The policy with that level, and why it was chosen.

        Raises:
            ValueError: a policy without truncated settings.
        """
        settings = self.spec.truncated
        if settings is None:
            raise ValueError(
                "this policy has no truncated settings; begin with with_anchors(store)"
            )
        opened = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
        demos = demonstrations(opened, episodes, seed=seed)
        report = choose_level(self, demos, settings, seed=seed)
        assert isinstance(report.t_start, float)  # one for all dimensions
        chosen = replace(settings, t_start=report.t_start)
        return self.with_settings(truncated=chosen), report

    def with_anchors(
        self,
        store: EpisodeStore | str | os.PathLike[str],
        *,
        truncated: Truncated | None = None,
        count: int = 20,
        relative_to: tuple[int | None, ...] | None = None,
        top_m: int | None = None,
        seed: int = 0,
    ) -> Self:
        """A truncated policy on the same weights: anchors by k-means over a store's plans.

        Args:
            store: demonstrations, or their path.
            truncated: how plans are drawn from the anchors.
            count: anchors, see :meth:`diffpolicy.policies.anchors.Anchors.fit`.
            relative_to: observation that each action dimension is relative to.
            top_m: anchors offered per state, the most probable ones; ``None``: all.
            seed: of the clustering.
        """
        opened = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
        options = {"count": count, "relative_to": relative_to, "top_m": top_m, "seed": seed}
        anchors = fit_anchors(self.spec, opened, self.normalizer, **options)
        spec = replace(self.spec, rti=None, truncated=truncated or Truncated())
        return type(self)(spec, self.denoiser, self.normalizer, anchors, self.heads)

    def compile(
        self, *, backend: str = "auto", batch_size: int = 1, threads: int | None = None
    ) -> Self:
        """The same policy with its sampling loops compiled, each checked against eager.

        Compile last: a policy made from this one (``with_settings``, ``chunked``, ...) has eager
        loops again. So has ``deterministic=True`` with a stochastic sampler.

        Args:
            backend: see :func:`diffpolicy.runtime.compile.available_backends`; ``"auto"`` measures
                them and takes the fastest.
            batch_size: rows solved at once.
            threads: of CPU backends.

        Raises:
            ImportError: a backend that is not installed, with the command that does it.
            ValueError: an unknown backend, or results that differ from eager.
        """
        from diffpolicy.runtime.compile import compile_planner

        return compile_planner(self, backend=backend, batch_size=batch_size, threads=threads)

    def streaming(self, settings: Streaming | None = None) -> StreamingPlanner:
        """Streaming diffusion on these weights, which need training at levels per position.

        (``level_law="position"``).
        """
        spec = replace(self.spec, rti=None, truncated=None, heads={}, selection=None)
        return StreamingPlanner(spec, self.denoiser, self.normalizer, streaming=settings)

    def chunked(self, settings: Chunking | None = None) -> RealTimeChunking:
        """Real-time chunking: new plans agree with what is executed while they are computed."""
        return RealTimeChunking(self, settings or Chunking())

    def plans(self, history: Array, *, seed: int = 0) -> tuple[Array, Array]:
        """All candidate plans of a truncated policy, with their scores.

        Args:
            history: raw observations ``[N, To, O]``, oldest first.
            seed: of the noise.

        Returns:
            Actions ``[N, M, H, A]`` in environment units, and scores ``[N, M]``, the higher the
            better within a row.
        """
        state = self.initial_state(range(seed, seed + len(history)))
        for step in range(self.n_obs_steps):
            state = self.observe(history[:, step], state)
        found = self.propose(state)
        with torch.inference_mode():
            plans = self._complete(found.plans.flatten(0, 1).cpu().numpy())
        shaped = plans.reshape(*found.plans.shape[:3], self.plan_dim)
        return self.to_actions(shaped), found.scores.cpu().numpy()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        sampler: Mapping[str, Any] | None = None,
        n_action_steps: int | None = None,
        rti: Mapping[str, Any] | None = None,
        truncated: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read a policy directory, verifying every hash.

        Args:
            path: a directory written by :meth:`save` or a checkpoint's ``policy``.
            device: where the weights go.
            sampler: replacements for entries of the stored sampler.
            n_action_steps: replacement for the actions executed per plan.
            rti: replacements for entries of the stored warm starts; ``{}`` keeps them, and
                ``{"t_start": ...}`` is enough for a policy without.
            truncated: the same for plans from guesses; a policy has one or the other.
            settings: replacements for other entries of the spec that do not touch the weights:
                ``selection`` and ``returns`` (merged with the stored ones), ``temperature``,
                ``value_scale``.

        Raises:
            ValueError: not a policy, a damaged file, or settings that do not fit.
        """
        files = read_bundle(Path(path))
        config = upgraded(files["config.json"])
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
        for name, other, changes in (("rti", "truncated", rti), ("truncated", "rti", truncated)):
            if changes:
                config[name] = {**(config.get(name) or {}), **changes}
                config[other] = None
        _replace_settings(config, settings or {})
        anchors = None
        if config.get("anchors") is not None:
            anchors = Anchors.from_parts(config["anchors"], files["anchors.safetensors"])
        config.pop("anchors", None)
        spec = PolicySpec.from_config(config)
        denoiser = spec.make_denoiser()
        denoiser.load_state_dict(files["model.safetensors"])
        heads = spec.make_heads()
        if len(heads):
            heads.load_state_dict(files["heads.safetensors"])
        return cls(spec, denoiser.to(device), normalizer, anchors, heads.to(device))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """:meth:`load`, from a policy, a checkpoint or a run directory (its best checkpoint.

        Else its last).
        """
        return cls.load(find_policy(path), **options)


def _replace_settings(config: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Replace entries of a stored spec that do not touch the weights."""
    for name, value in settings.items():
        if name not in ("selection", "returns", "temperature", "value_scale"):
            raise ValueError(f"{name!r} cannot be replaced when a policy is loaded")
        if name == "returns" and config.get(name) is None:
            raise ValueError("this policy was trained without returns as a condition")
        merged = isinstance(value, Mapping)
        config[name] = {**(config.get(name) or {}), **value} if merged else value


def fit_anchors(
    spec: PolicySpec, store: EpisodeStore, normalizer: Normalizer, **options: Any
) -> Anchors:
    """Anchors over the windows of a store, for plans of the shape that ``spec`` says."""
    windows = Windows(
        store,
        horizon=spec.horizon,
        n_obs_steps=spec.n_obs_steps,
        n_action_steps=spec.n_action_steps,
        normalizer=normalizer.to("cpu"),
    )
    return Anchors.fit(windows, normalizer, **options)


__all__ = [
    "RTI",
    "Anchors",
    "Chunking",
    "Denoiser",
    "DiffusionPolicy",
    "Gripper",
    "PolicySpec",
    "Sampler",
    "Streaming",
    "TrainerConfig",
    "Truncated",
    "find_policy",
    "policy_files",
]
