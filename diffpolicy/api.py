"""The facade that users import: one class that learns, acts, saves and loads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.data.fields import check_vector
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import split_episodes
from diffpolicy.learn.adapters import add_adapters, merge_adapters, merged_state
from diffpolicy.learn.learning import Learning, examples, fit_anchors, fitted_returns, objective
from diffpolicy.learn.material import PlanMaterial, TuningData
from diffpolicy.learn.method import Method
from diffpolicy.learn.methods import method_of
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.base import Array
from diffpolicy.policies.changes import check_same_weights, merged_config
from diffpolicy.policies.choose_level import choose_level, demonstrations, observation_step
from diffpolicy.policies.chunking import Chunking, RealTimeChunking
from diffpolicy.policies.diffusion import DiffusionPlanner, PolicySpec, Sampler
from diffpolicy.policies.level_report import LevelReport
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.spec import Gripper
from diffpolicy.policies.streaming import Streaming, StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.policies.upgrade import upgraded
from diffpolicy.training.checkpoint import read_bundle, write_bundle
from diffpolicy.training.policy_files import FORMAT, VERSION, find_policy, policy_files
from diffpolicy.training.rollback import unchanged_on_error
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Source, Trainer, TrainResult


class DiffusionPolicy(DiffusionPlanner):
    """A diffusion policy (Chi et al. 2023) that learns, acts, and is saved and loaded.

    Example:
        >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr")
        >>> policy.learn("data/demos.zarr", TrainerConfig(steps=5000), run_dir="runs/mine")
        >>> action, state = policy.predict(obs)
    """

    last_training: TrainResult | None = None

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

    def learn(
        self,
        store: EpisodeStore | str | os.PathLike[str],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        val_fraction: float = 0.02,
        max_episodes: int | None = None,
        learning: Learning | None = None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Train denoiser and heads on stored episodes; ends with the averaged (EMA) weights.

        Args:
            store: the demonstrations, or their path.
            config: steps, batch size, learning rate, ...
            run_dir: where metrics and checkpoints go.
            val_fraction: fraction of the episodes held out for the validation loss.
            max_episodes: use the first so many episodes only.
            learning: what is learned beyond behaviour cloning: actor-critics, weights of losses.
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
        how = Learning() if learning is None else learning
        normal = self.normalizer.to("cpu")
        source = examples(self.spec, normal, episodes, how, train.tolist())
        held_out = examples(self.spec, normal, episodes, how, val.tolist()) if len(val) else None
        return self.fit(
            objective(self, how),
            source,
            config,
            run_dir,
            val_source=held_out,
            evaluate=evaluate,
            about={"learning": how},
            resume=resume,
            overwrite=overwrite,
        )

    def fit(
        self,
        objective: nn.Module,
        source: Source,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        val_source: Source | None = None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        about: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Train with any objective of this policy; if that fails, nothing has changed.

        Args:
            objective: ``forward(batch, generator) -> LossOutput``, a module that holds what it
                trains as ``denoiser`` and, if it trains heads, as ``heads``: this policy's own.
            source: examples for it.
            config: settings of the trainer.
            run_dir: where metrics and checkpoints go.
            val_source: held-out examples.
            evaluate: as in :meth:`learn`.
            about: what else the result depends on: a resumed run must say the same.
            resume: continue the run in ``run_dir`` exactly where it stopped.
            overwrite: replace it.

        Returns:
            self; ``last_training`` tells the steps done, seconds, and whether it was interrupted.

        Raises:
            ValueError: an objective that trains another denoiser.
        """
        if getattr(objective, "denoiser", None) is not self.denoiser:
            raise ValueError(
                f"{type(objective).__name__} must train this policy's own denoiser: build it with "
                "policy.denoiser"
            )
        own = {"policy": self.spec, "normalizer": self.normalizer, "anchors": self.anchors}
        with unchanged_on_error(self.denoiser, self.heads):
            result = Trainer(
                objective,
                source,
                config,
                run_dir,
                export=self._bundle,
                val_source=val_source,
                evaluate=evaluate,
                identity={**own, **(about or {})},
                resume=resume,
                overwrite=overwrite,
            ).fit()
            objective.load_state_dict(result.ema)
            self.denoiser.eval()
            self.heads.eval()
        self.last_training = result
        self._loops = self._made_loops()  # compiled ones hold the old weights
        return self

    def tune(
        self,
        data: TuningData,
        method: Method | Mapping[str, Any],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        adapters: Mapping[str, Any] | None = None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Tune by a reward of the policy's own plans: DRaFT, AlignProp.

        Args:
            data: a ``reward``, and ``observations`` (or ``demonstrations``) that plans are drawn
                for.
            method: of :data:`diffpolicy.learn.methods.METHODS`, or its plain values.
            config: of the trainer.
            run_dir: where metrics and checkpoints go.
            adapters: tune these few weights alone, see
                :func:`~diffpolicy.learn.adapters.add_adapters`; they are merged at the end.
            evaluate: as in :meth:`learn`.
            resume: continue the run in ``run_dir``.
            overwrite: replace it.

        Example:
            >>> near = lambda action, obs: -(action - obs[:, -1:, :2]).square().sum((1, 2))
            >>> data = TuningData.of(reward=near, observations="data/demos.zarr")
            >>> draft = {"type": "plan_chain", "grad_steps": 1}
            >>> policy.tune(data, draft, TrainerConfig(steps=200, lr=1e-4), "runs/tuned")

        Raises:
            ValueError: a method of comparisons, a policy that it cannot tune, or data that lack
                what it reads.
        """
        made = method_of(method, "tune")
        return self._tuned(made, data, config, run_dir, adapters, evaluate, resume, overwrite)

    def prefer(
        self,
        data: TuningData,
        method: Method | Mapping[str, Any],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        adapters: Mapping[str, Any] | None = None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Tune by comparisons: Diffusion-DPO, PSO, DRO and their relatives.

        The policy as it is now is the reference. Arguments are those of :meth:`tune`; what the
        data must hold depends on the method.

        Example:
            >>> data = TuningData.of("data/pairs.jsonl", "data/demos.zarr")
            >>> dpo = {"type": "dpo", "kl_beta": 0.3}
            >>> policy.prefer(data, dpo, TrainerConfig(steps=500, lr=1e-4), "runs/preferred")

        Raises:
            ValueError: a method of rewards, a policy that it cannot tune, or data that lack what
                it reads.
        """
        made = method_of(method, "prefer")
        return self._tuned(made, data, config, run_dir, adapters, evaluate, resume, overwrite)

    def _tuned(
        self,
        method: Method,
        data: TuningData,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        adapters: Mapping[str, Any] | None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None,
        resume: bool,
        overwrite: bool,
    ) -> Self:
        material = PlanMaterial(self.spec, self.normalizer, data, config.seed)
        material.check(method)
        with unchanged_on_error(self.denoiser, self.heads):
            if adapters is not None:
                add_adapters(self.denoiser, adapters)
            self.fit(
                method.objective(self.denoiser, material),
                method.source(material),
                config,
                run_dir,
                evaluate=evaluate,
                about={"method": method},
                resume=resume,
                overwrite=overwrite,
            )
            if adapters is not None:
                merge_adapters(self.denoiser)
                self.denoiser.eval()
                self._loops = self._made_loops()
        return self

    def _bundle(self, objective_state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The files of this policy with other weights; heads that are not trained stay."""
        parts = [
            {k.removeprefix(p): v for k, v in objective_state.items() if k.startswith(p)}
            for p in ("denoiser.", "heads.")
        ]
        weights = merged_state(self.denoiser, parts[0])
        heads = parts[1] or self.heads.state_dict()
        return policy_files(self.spec, weights, self.normalizer, self.anchors, heads)

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
        check_same_weights(self.spec, changes)
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
        cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu", **changes: Any
    ) -> Self:
        """Read a policy directory, verifying every hash.

        Args:
            path: a directory written by :meth:`save` or a checkpoint's ``policy``.
            device: where the weights go.
            changes: other entries of the spec that do not touch the weights, as plain values.
                Groups of settings are merged with the stored ones: ``sampler={"num_steps": 4}``.
                Another solver drops the options of the old one, and ``rti={"t_start": 0.3}`` takes
                the place of ``truncated`` as ``truncated={...}`` does of ``rti``.

        Raises:
            ValueError: not a policy, a damaged file, or settings that do not fit.
        """
        files = read_bundle(Path(path))
        config = upgraded(files["config.json"])
        if config.pop("format", None) != FORMAT or config.pop("version", None) != VERSION:
            raise ValueError(f"{path} is not a diffpolicy policy of version {VERSION}")
        parts = config.pop("normalizer"), files["normalizer.safetensors"]
        normalizer = Normalizer.from_parts(*parts)
        anchors, stored = None, config.pop("anchors", None)
        if stored is not None:
            anchors = Anchors.from_parts(stored, files["anchors.safetensors"])
        spec = PolicySpec.from_config(config)
        denoiser, heads = spec.make_denoiser(), spec.make_heads()
        denoiser.load_state_dict(files["model.safetensors"])
        if len(heads):
            heads.load_state_dict(files["heads.safetensors"])
        if changes:
            changed = PolicySpec.from_config(merged_config(config, changes))
            check_same_weights(spec, {f.name: getattr(changed, f.name) for f in fields(changed)})
            spec = changed
        return cls(spec, denoiser.to(device), normalizer, anchors, heads.to(device))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Load a policy directory, a checkpoint, or the best (else the last) one of a run."""
        return cls.load(find_policy(path), **options)


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
