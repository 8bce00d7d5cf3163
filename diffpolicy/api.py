"""The facade that users import: one class that learns, acts, saves and loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from diffpolicy.data.joined import Place, Stored, open_store
from diffpolicy.data.observation import Obs, count, each, take
from diffpolicy.data.windows import split_store
from diffpolicy.learn.adapters import merged_state
from diffpolicy.learn.learning import Learning, examples, objective, usable_episodes
from diffpolicy.learn.making import fit_anchors, fitted_spec, read_policy
from diffpolicy.learn.material import TuningData, tuned
from diffpolicy.learn.method import Method
from diffpolicy.policies.base import Array
from diffpolicy.policies.choosing import Choosing
from diffpolicy.policies.chunking import Chunking, RealTimeChunking
from diffpolicy.policies.guided import Costs
from diffpolicy.policies.invert import invert, restore
from diffpolicy.policies.streaming import Streaming, StreamingPlanner
from diffpolicy.policies.truncated import Truncated
from diffpolicy.training.checkpoint import write_bundle
from diffpolicy.training.saved import find_policy, part_of, policy_files
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.sources import Source
from diffpolicy.training.train import train
from diffpolicy.training.trainer import Running, TrainResult


class DiffusionPolicy(Choosing):
    """A diffusion policy (Chi et al. 2023) that learns, acts, and is saved and loaded.

    Example:
        >>> policy = DiffusionPolicy.from_dataset("data/demos.zarr")
        >>> policy.learn("data/demos.zarr", TrainerConfig(steps=5000), run_dir="runs/mine")
        >>> action, state = policy.predict(obs)
    """

    last_training: TrainResult | None = None
    invert, restore = invert, restore

    @classmethod
    def from_dataset(
        cls,
        store: Stored,
        *,
        spec: Mapping[str, Any] | None = None,
        normalize: Mapping[str, str] | None = None,
        per_store: bool = False,
        anchors: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Self:
        """An untrained policy whose shapes and normaliser come from a store of demonstrations.

        Args:
            store: fields ``obs [T, O]`` (or several ``obs.NAME``) and ``action [T, A]``, with
                statistics; or its path; or several, ``[{"path": ..., "weight": 3}, ...]``.
            spec: entries of :class:`~diffpolicy.policies.spec.PolicySpec` but the two dimensions.
            normalize: mode per field, ``minmax`` where none is given, see ``data.normalize.MODES``;
                ``obs`` is that of every ``obs.NAME`` without one of its own.
            per_store: a normaliser for each of several stores; the policy acts by the first's.
            anchors: settings of ``Anchors.fit``, for a policy with ``truncated``.
            seed: of the initial weights, and of the anchors.
            device: where the weights live.

        Raises:
            ValueError: a missing field or statistics, or settings that do not fit together.
        """
        opened = open_store(store)
        full, normalizer = fitted_spec(opened, spec or {}, normalize or {}, per_store=per_store)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser, heads = full.make_denoiser(), full.make_heads()
        fit = {"seed": seed, **(anchors or {})}
        fitted = None
        if anchors is not None:
            fitted = fit_anchors(full, opened, normalizer, denoiser, trained=False, **fit)
        return cls(full, denoiser.to(device), normalizer, fitted, heads.to(device))

    def learn(
        self,
        store: Stored,
        config: TrainerConfig,
        run_dir: Place,
        *,
        val_fraction: float = 0.02,
        max_episodes: int | None = None,
        learning: Learning | None = None,
        **run: Unpack[Running],
    ) -> Self:
        """Train denoiser and heads on stored episodes; ends with the averaged (EMA) weights.

        Args:
            store: the demonstrations, or their path, or several, drawn by their weights.
            config: steps, batch size, learning rate, ...
            run_dir: where metrics and checkpoints go.
            val_fraction: fraction of the episodes held out for the validation loss.
            max_episodes: use the first so many episodes (of each store) only.
            learning: what is learned beyond behaviour cloning: actor-critics, weights of losses.
            **run: ``evaluate``, called with a policy directory and the step, whose ``score``
                decides the best; ``resume`` the run in ``run_dir`` exactly where it stopped;
                ``overwrite`` an earlier one there.

        Returns:
            self; ``last_training`` tells the steps done, seconds, and whether it was interrupted.
        """
        episodes = open_store(store)
        usable = usable_episodes(self.spec, episodes, max_episodes)
        training, val = split_store(episodes, usable, val_fraction, config.seed)
        how = Learning() if learning is None else learning
        shared = self.spec, self.normalizer.to("cpu"), episodes, how
        run["val_source"] = examples(*shared, val.tolist(), draws=1) if len(val) else None
        source = examples(*shared, training.tolist())
        return self.fit(
            objective(self, how), source, config, run_dir, about={"learning": how}, **run
        )

    def fit(
        self,
        objective: nn.Module,
        source: Source,
        config: TrainerConfig,
        run_dir: Place,
        *,
        about: Mapping[str, Any] | None = None,
        **run: Unpack[Running],
    ) -> Self:
        """Train with any objective of this policy; if that fails, nothing has changed.

        ``objective`` is a module that holds what it trains as ``denoiser`` and, if it trains heads,
        as ``heads``, this policy's own; its ``forward(batch, generator)`` returns a
        :class:`~diffpolicy.learn.cloning.denoising.LossOutput`. ``source`` gives its examples and
        ``val_source`` held-out ones; ``about`` is what else the result depends on, which a resumed
        run must say again. The rest, and what is returned, is as in :meth:`learn`.

        Raises:
            ValueError: an objective that trains another denoiser.
        """
        if getattr(objective, "denoiser", None) is not self.denoiser:
            raise ValueError(
                f"{type(objective).__name__} must train this policy's own denoiser: build it with "
                "policy.denoiser"
            )
        own = {"policy": self.spec, "normalizer": self.normalizer, "anchors": self.anchors}
        run_as: dict[str, Any] = {"export": self._bundle, "identity": {**own, **(about or {})}}
        self.last_training = train(objective, source, config, run_dir, **run_as, **run)
        self._loops = self._made_loops()  # compiled ones hold the old weights
        return self

    def tune(
        self,
        data: TuningData,
        method: Method | Mapping[str, Any],
        config: TrainerConfig,
        run_dir: Place,
        *,
        adapters: Mapping[str, Any] | None = None,
        **run: Unpack[Running],
    ) -> Self:
        """Tune by a reward of the policy's own plans: DRaFT, AlignProp.

        ``method`` is one of :data:`diffpolicy.learn.methods.METHODS`, or its plain values. The data
        hold a ``reward``, and ``observations`` (or ``demonstrations``) that plans are drawn for.
        With ``adapters`` these few weights alone are tuned, and merged at the end, see
        :func:`~diffpolicy.learn.adapters.add_adapters`. The rest is as in :meth:`fit`.

        Example:
            >>> near = lambda action, obs: -(action - obs[:, -1:, :2]).square().sum((1, 2))
            >>> data = TuningData.of(reward=near, observations="data/demos.zarr")
            >>> policy.tune(data, {"type": "plan_chain"}, TrainerConfig(steps=200), "runs/tuned")
        """
        return tuned(self, "tune", method, data, config, run_dir, adapters, **run)

    def prefer(
        self,
        data: TuningData,
        method: Method | Mapping[str, Any],
        config: TrainerConfig,
        run_dir: Place,
        *,
        adapters: Mapping[str, Any] | None = None,
        **run: Unpack[Running],
    ) -> Self:
        """Tune by comparisons: Diffusion-DPO, PSO, DRO and their relatives.

        The policy as it is now is the reference. Arguments are those of :meth:`tune`.

        Example:
            >>> data = TuningData.of("data/pairs.jsonl", "data/demos.zarr")
            >>> policy.prefer(data, {"type": "dpo", "kl_beta": 0.3}, config, "runs/preferred")
        """
        return tuned(self, "prefer", method, data, config, run_dir, adapters, **run)

    def distill(
        self,
        data: TuningData,
        method: Method | Mapping[str, Any],
        config: TrainerConfig,
        run_dir: Place,
        **run: Unpack[Running],
    ) -> Self:
        """A student that draws plans in one or a few evaluations; this policy stays as it is.

        Example:
            >>> quick = policy.distill(data, {"type": "consistency"}, config, "runs/quick")
        """
        return tuned(self, "distill", method, data, config, run_dir, **run)

    def _bundle(self, objective_state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The files of this policy with other weights; heads that are not trained stay."""
        weights = merged_state(self.denoiser, part_of(objective_state, "denoiser"))
        heads = part_of(objective_state, "heads") or self.heads.state_dict()
        return policy_files(self.spec, weights, self.normalizer, self.anchors, heads)

    def save(self, path: Place) -> Path:
        """Write the policy as a directory: ``config.json``, safetensors files, and their hashes."""
        state = {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
        write_bundle(Path(path), self._bundle(state))
        return Path(path)

    def with_guidance(self, *costs: Mapping[str, Any], **settings: Any) -> Self:
        """The same weights, with plans kept from costs that training knew nothing of.

        See :class:`~diffpolicy.policies.guided.Costs`; without costs guidance is taken away.

        Example:
            >>> low = policy.with_guidance({"type": "limits", "dims": [0], "high": [0.5]})
        """
        return self.with_settings(guidance=Costs(costs, **settings) if costs else None)

    def with_anchors(
        self, store: Stored, *, truncated: Truncated | None = None, **fit: Any
    ) -> Self:
        """A truncated policy on the same weights: anchors by k-means over a store's plans.

        Args:
            store: demonstrations, or their path.
            truncated: how plans are drawn from the anchors.
            fit: ``count``, ``relative_to``, ``top_m`` and ``seed`` of ``Anchors.fit``.
        """
        spec = replace(self.spec, rti=None, truncated=truncated or Truncated())
        anchors = fit_anchors(spec, open_store(store), self.normalizer, self.denoiser, **fit)
        return type(self)(spec, self.denoiser, self.normalizer, anchors, self.heads)

    def compile(
        self, *, backend: str = "auto", batch_size: int = 1, threads: int | None = None
    ) -> Self:
        """The same policy with its sampling loops compiled, each checked against eager.

        Compile last: a policy made from this one (``with_settings``, ``chunked``, ...) has eager
        loops again. So has ``deterministic=True`` with a stochastic sampler. ``backend`` is one of
        :func:`diffpolicy.runtime.compile.available_backends` or ``"auto"``, the fastest measured;
        ``batch_size`` rows are solved at once, with ``threads`` of CPU backends.

        Raises:
            ImportError: a backend that is not installed, with the command that does it.
            ValueError: an unknown backend, or results that differ from eager.
        """
        from diffpolicy.runtime.compile import compile_planner

        return compile_planner(self, backend=backend, batch_size=batch_size, threads=threads)

    def streaming(self, settings: Streaming | None = None) -> StreamingPlanner:
        """Streaming diffusion on these weights, trained with ``level_law="position"``."""
        spec = replace(self.spec, rti=None, truncated=None, heads={}, selection=None)
        return StreamingPlanner(spec, self.denoiser, self.normalizer, streaming=settings)

    def chunked(self, settings: Chunking | None = None) -> RealTimeChunking:
        """Real-time chunking: new plans agree with what is executed while they are computed."""
        return RealTimeChunking(self, settings or Chunking())

    def plans(self, history: Obs, *, seed: int = 0) -> tuple[Array, Array]:
        """All candidate plans of a truncated policy, with their scores.

        For raw observations ``history [N, To, O]`` (or by name), oldest first: actions
        ``[N, M, H, A]`` in environment units, and scores ``[N, M]``, the higher the better.
        """
        state = self.initial_state(range(seed, seed + count(history)))
        for step in range(self.n_obs_steps):
            state = self.observe(take(history, (slice(None), step)), state)
        found = self.propose(state)
        with torch.inference_mode():
            seen = each(lambda array: array.repeat(found.plans.shape[1], 0), state.history)
            plans = self._complete(found.plans.flatten(0, 1).cpu().numpy(), seen)
        shaped = plans.reshape(*found.plans.shape[:3], self.plan_dim)
        return self.to_actions(shaped), found.scores.cpu().numpy()

    @classmethod
    def load(cls, path: Place, *, device: str | torch.device = "cpu", **changes: Any) -> Self:
        """Read a policy directory, verifying every hash.

        Args:
            path: a directory written by :meth:`save` or a checkpoint's ``policy``.
            device: where the weights go.
            changes: other entries of the spec that do not touch the weights, as plain values.
                Groups are merged with the stored ones: ``sampler={"num_steps": 4}``. Another solver
                drops the options of the old one; ``rti`` and ``truncated`` replace each other. A
                policy with a normaliser per store acts by that of ``normalizer="NAME"``.

        Raises:
            ValueError: not a policy, a damaged file, or settings that do not fit.
        """
        spec, denoiser, normalizer, anchors, heads = read_policy(Path(path), changes)
        return cls(spec, denoiser.to(device), normalizer, anchors, heads.to(device))

    @classmethod
    def from_pretrained(cls, path: Place, **options: Any) -> Self:
        """Load a policy directory, a checkpoint, or the best (else the last) one of a run."""
        return cls.load(find_policy(path), **options)
