"""What a policy is trained with: behaviour cloning, rewards, preferences, all in one trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import split_episodes
from diffpolicy.learn.adapters import add_adapters, has_adapters, merge_adapters, merged_state
from diffpolicy.learn.learning import Learning, examples, objective
from diffpolicy.learn.plan_rewards import Conditions, PlanReward, check_tunable, in_own_units
from diffpolicy.learn.preference_data import PreferenceData, preference_objective
from diffpolicy.learn.reward.pathwise import RewardLoss
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.training.saved import policy_files
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Source, Trainer, TrainResult
from diffpolicy.training.weights import unchanged_on_error


class TrainablePolicy(DiffusionPlanner):
    """A policy that learns; see :class:`diffpolicy.DiffusionPolicy`."""

    last_training: TrainResult | None = None

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
        return self._fit(
            lambda: (objective(self, how), source),
            config,
            run_dir,
            val_source=held_out,
            evaluate=evaluate,
            about={"learning": how},
            resume=resume,
            overwrite=overwrite,
        )

    def tune(
        self,
        reward: PlanReward,
        store: EpisodeStore | str | os.PathLike[str],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        chain: PlanChain | None = None,
        kl_weight: float = 0.0,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Back-propagate a reward of sampled plans into the denoiser (DRaFT, AlignProp, adjoint).

        Args:
            reward: differentiable, ``(action [B, H, A], obs [B, To, O]) -> [B]`` in the data's own
                units: a critic, a model of the dynamics, or a differentiable simulator.
            store: whose observations plans are sampled for.
            config: of the trainer.
            run_dir: where metrics and checkpoints go.
            chain: how plans are sampled and how far the gradient goes; the last step of 10 of DDIM
                unless given.
            kl_weight: of the path divergence from the policy as it is now; needs a chain that adds
                noise.
            resume: continue the run in ``run_dir``.
            overwrite: replace it.

        Example:
            >>> near = lambda action, obs: -(action - obs[:, -1:, :2]).square().sum((1, 2))
            >>> policy.tune(near, store, TrainerConfig(steps=200, lr=1e-4), "runs/tuned")

        Raises:
            ValueError: a policy whose plans are not of actions given observations, or settings that
                do not fit.
        """
        check_tunable(self.spec)
        episodes = store if isinstance(store, EpisodeStore) else EpisodeStore.open(store)
        every = list(range(episodes.num_episodes))
        windows = examples(self.spec, self.normalizer.to("cpu"), episodes, Learning(), every)

        def made() -> tuple[nn.Module, Source]:
            worth = in_own_units(reward, self.spec, self.normalizer)
            how = PlanChain(grad_steps=1) if chain is None else chain
            loss = RewardLoss(self.denoiser, worth, how, kl_weight=kl_weight)
            return loss, Conditions(windows)

        return self._fit(made, config, run_dir, resume=resume, overwrite=overwrite)

    def prefer(
        self,
        data: PreferenceData,
        method: Mapping[str, Any],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        adapters: Mapping[str, Any] | None = None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Tune by preferences: Diffusion-DPO, PSO, DRO and their relatives.

        The policy as it is now is the reference. Adapters are merged into the weights at the end,
        so that what is saved is a policy like any other.

        Args:
            data: preferences, demonstrations, or both; see
                :class:`~diffpolicy.learn.preference_data.PreferenceData`.
            method: ``{"type": "preference", "loss": "dpo", ...}``, ``pso``, ``dro`` or ``cloning``;
                see :func:`~diffpolicy.learn.preference_data.preference_objective`.
            config: of the trainer.
            run_dir: where metrics and checkpoints go.
            adapters: tune these few weights alone, see
                :func:`~diffpolicy.learn.adapters.add_adapters`.
            evaluate: as in :meth:`learn`.
            resume: continue the run in ``run_dir``.
            overwrite: replace it.

        Example:
            >>> data = PreferenceData.of("data/pairs.jsonl", "data/demos.zarr")
            >>> dpo = {"type": "preference", "loss": "dpo", "kl_beta": 0.3}
            >>> policy.prefer(data, dpo, TrainerConfig(steps=500, lr=1e-4), "runs/preferred")

        Raises:
            ValueError: a policy whose plans are not of actions given observations, data that the
                method needs and that are missing, or settings that do not fit.
        """

        def made() -> tuple[nn.Module, Source]:
            if adapters is not None:
                add_adapters(self.denoiser, adapters)
            own = self.spec, self.denoiser, self.normalizer
            return preference_objective(*own, method, data, seed=config.seed)

        return self._fit(
            made,
            config,
            run_dir,
            evaluate=evaluate,
            about={"method": method},
            resume=resume,
            overwrite=overwrite,
        )

    def _fit(
        self,
        make: Callable[[], tuple[nn.Module, Source]],
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        val_source: Source | None = None,
        evaluate: Callable[[Path, int], Mapping[str, float]] | None = None,
        about: Mapping[str, Any] | None = None,
        resume: bool,
        overwrite: bool,
    ) -> Self:
        """Train an objective that holds the denoiser; if that fails, nothing has changed.

        Args:
            make: builds the objective, which may add adapters, and its source.
            config: of the trainer.
            run_dir: where metrics and checkpoints go.
            val_source: held-out examples.
            evaluate: as in :meth:`learn`.
            about: what else the result depends on.
            resume: continue the run in ``run_dir``.
            overwrite: replace it.
        """
        adapted = has_adapters(self.denoiser)  # by the caller, who merges them
        own = {"policy": self.spec, "normalizer": self.normalizer, "anchors": self.anchors}
        with unchanged_on_error(self.denoiser, self.heads):
            loss, source = make()
            trainer = Trainer(
                loss,
                source,
                config,
                run_dir,
                export=self._bundle,
                val_source=val_source,
                evaluate=evaluate,
                identity={**own, **(about or {})},
                resume=resume,
                overwrite=overwrite,
            )
            result = trainer.fit()
            loss.load_state_dict(result.ema)
            if has_adapters(self.denoiser) and not adapted:
                merge_adapters(self.denoiser)
            self.denoiser.eval()
            self.heads.eval()
        self.last_training = result
        self._loops = self._made_loops()  # compiled ones hold the old weights
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
