"""What plans are worth by a learned reward: what it says of the steps that they lead to.

A reward r(observation, action) can only judge the action at the observation that is known. Of a
plan only the first observation is, and where a reward speaks of places (a door that is open), the
plan cannot change it there: raising r directly tunes a policy towards actions that merely look like
those of good places. So the value of a plan is learned as that of a critic is, from what followed.
It knows as much of causes as the episodes show: where one action alone was ever taken in a place
(smooth demonstrations), the action tells where one is, and the value may take the one for the
other. Episodes of the policy to be tuned, with its own noise, are better.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, Unpack

import torch
from numpy.typing import NDArray
from torch import Tensor

import diffpolicy.learn.values.learning as judging
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.returns import with_fields
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows, split_episodes
from diffpolicy.learn.values.learning import LearnedJudge, PlanValueLoss
from diffpolicy.learn.values.reward import RewardModel
from diffpolicy.networks.base import described
from diffpolicy.networks.critics import QEnsemble
from diffpolicy.settings import check_settings, ranged, settings_of
from diffpolicy.training.process import seeded
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Running


@dataclass(frozen=True)
class PlanValueSpec:
    """What a plan is judged by.

    Args:
        obs_dim: O.
        action_dim: A.
        n_action_steps: actions of a plan that are judged, from the current step on: those that the
            policy executes.
        lookahead: steps whose rewards count, from the current one on; longer than a plan where an
            action shows its effect later. Fewer at the end of an episode.
        discount: of the rewards, per step, in (0, 1].
        n_obs_steps: observations looked at, To.
        width: units of a hidden layer.
        depth: hidden layers.
        members: networks in the ensemble, M.
        layer_norm: normalise the hidden layers, which bounds the value of plans unlike the data's.

    Raises:
        ValueError: values out of range.
    """

    obs_dim: int
    action_dim: int
    n_action_steps: int = ranged("[1, inf)")
    lookahead: int = ranged("[1, inf)", 16)
    discount: float = ranged("(0, 1]", 1.0)
    n_obs_steps: int = ranged("[1, inf)", 1)
    width: int = 128
    depth: int = 2
    members: int = 5
    layer_norm: bool = True

    def __post_init__(self) -> None:
        check_settings(self)

    def make_network(self) -> QEnsemble:
        """The networks, freshly initialised.

        Raises:
            ValueError: a size out of range.
        """
        return judging.ensemble_of(self, self.n_obs_steps * self.obs_dim, self.n_action_steps)


class PlanValue(LearnedJudge):
    """The mean learned reward of the steps that follow when a plan is begun.

    ``E[sum_k discount^k r_{t+k} / sum_k discount^k | observations, actions from now on]`` over
    ``lookahead`` steps, in the units of the reward, by regression on stored episodes; after
    the plan's own actions their behaviour goes on. It is a reward of plans as
    :meth:`diffpolicy.DiffusionPolicy.tune` takes one, in the data's units and differentiable, and
    ranks candidates of :class:`diffpolicy.policies.best_of_n.Selector` through :meth:`ranking`.

    Example:
        >>> value = PlanValue.for_reward(model, n_action_steps=8)
        >>> value.learn(model, store, TrainerConfig(steps=2000), "runs/door_plans")
        >>> data, draft = TuningData(reward=value, observations=store), PlanChain(grad_steps=1)
        >>> policy.tune(data, draft, TrainerConfig(steps=200, lr=1e-4), "runs/door_tuned")
        >>> policy.selector = Selector(Selection(8), value.ranking(policy.normalizer))

    Args:
        spec: sizes, and what is judged.
        normalizer: of ``obs`` and ``action``.
        network: with weights; ``None``: freshly initialised.
        device: where the weights go.

    Attributes:
        pessimism: standard deviations over the members that are taken off their mean (0 or more;
            0 unless set). With some, plans about which the members disagree are worth less.
    """

    FORMAT, WHAT, SPEC = "diffpolicy-plan-value", "plan value", PlanValueSpec
    spec: PlanValueSpec
    pessimism = 0.0

    def __repr__(self) -> str:
        spec = self.spec
        seen = f"obs {spec.obs_dim} x {spec.n_obs_steps}"
        plan = f"{spec.n_action_steps} actions of {spec.action_dim}"
        made = f"rewards of {spec.lookahead} steps, {spec.members} members"
        return described(self, f"{seen}, {plan}; {made}", self.network)

    @classmethod
    def for_reward(cls, reward: RewardModel, *, seed: int = 0, **spec: Any) -> Self:
        """An untrained value with the sizes, normaliser and device of a reward model.

        Args:
            reward: the model.
            seed: of the initial weights.
            **spec: further entries of :class:`PlanValueSpec`; ``n_action_steps`` at least.

        Raises:
            ValueError: settings that are unknown, missing or out of range.
        """
        sizes = {"obs_dim": reward.spec.obs_dim, "action_dim": reward.spec.action_dim}
        return cls._untrained(reward, {**spec, **sizes}, seed)

    @classmethod
    def for_policy(cls, policy: Any, *, seed: int = 0, **spec: Any) -> Self:
        """An untrained value of a policy's own chunks, for the rewards that a store holds.

        Args:
            policy: sizes, normaliser and device are its own.
            seed: of the initial weights.
            **spec: further entries of :class:`PlanValueSpec`.

        Raises:
            ValueError: settings that are unknown or out of range.
        """
        if policy.spec.representation is not None:
            raise ValueError(
                "values are of actions as data hold them: no policy with action groups"
            )
        names = ("obs_dim", "action_dim", "n_obs_steps", "n_action_steps")
        sizes = {name: getattr(policy, name) for name in names}
        return cls._untrained(policy, {**sizes, **spec}, seed)

    @classmethod
    def _untrained(cls, like: Any, values: Mapping[str, Any], seed: int) -> Self:
        full = settings_of(PlanValueSpec, values, cls.WHAT)
        network = seeded(seed, full.make_network)
        return cls(full, like.normalizer, network, device=like.device)

    # ---------------------------------------------------------------- learning

    def learn(
        self,
        reward: Any,
        store: EpisodeStore,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        val_fraction: float = 0.1,
        **run: Unpack[Running],
    ) -> Self:
        """Learn what followed in a store, by given rewards or by the store's own.

        Any episodes will do, judged or not; those of the policy that is to be tuned tell most.

        Args:
            reward: says what each step is worth by ``rewards(store) -> [T]``: a reward model, or an
                environment's
                :class:`~diffpolicy.rollout.record.steps.DenseReward`; ``None``: the field
                ``reward`` of the store.
            store: the episodes.
            config: of the trainer.
            run_dir: where metrics and checkpoints go; with held-out episodes ``metrics.csv`` has
                ``val_loss``.
            val_fraction: share of the episodes held out.
            **run: ``resume`` and ``overwrite`` of
                :class:`~diffpolicy.training.trainer.Trainer`.

        Returns:
            self, with the averaged (EMA) weights.

        Raises:
            ValueError: a store that does not fit, or settings out of range.
        """
        parts = split_episodes(store.num_episodes, val_fraction, config.seed)
        run["val_source"] = self._windows(reward, store, parts[1]) if len(parts[1]) else None
        loss = PlanValueLoss(self.network, self.spec.n_obs_steps)
        return self._fit(loss, self._windows(reward, store, parts[0]), config, run_dir, **run)

    def _windows(self, reward: Any, store: EpisodeStore, episodes: Any) -> Windows:
        spec = self.spec
        if reward is None:
            earned = store.read("reward", 0, store.num_steps).reshape(-1)
        else:
            earned = reward.rewards(store)
        target = judging.mean_of_next(earned, store, spec.lookahead, spec.discount)
        sizes = {name: getattr(spec, name) for name in ("n_obs_steps", "n_action_steps")}
        return Windows(
            with_fields(store, {judging.TARGET: target}),
            horizon=spec.n_obs_steps - 1 + spec.n_action_steps,
            **sizes,
            normalizer=self.normalizer.to("cpu"),
            episodes=episodes,
            fields=("obs", "action", judging.TARGET),
            pad_after=0,  # plans that were carried out to their end
        )

    @torch.no_grad()
    def report(self, reward: Any, store: EpisodeStore, episodes: Sequence[int]) -> dict[str, float]:
        """How well the values foretell what followed in episodes, and whether plans matter in it.

        Args:
            reward: what the value was learned of.
            store: the episodes.
            episodes: which; held-out ones, to learn anything from it.

        Returns:
            ``explained``: the share of the variance of what followed that is foretold (1 all, 0 no
            better than the mean); ``explained_shuffled``: the same with each plan replaced by that
            of another step. If the two are alike, the value does not depend on plans, and there is
            nothing to tune by. If they differ, it does, be it as a cause or as a sign of the place.
        """
        windows = self._windows(reward, store, episodes)
        batch = windows.gather(torch.arange(len(windows)))
        wanted = batch[judging.TARGET][:, self.spec.n_obs_steps - 1]
        other = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))
        cond, plan = batch["obs"].flatten(1).to(self.device), batch["action"]
        plan = plan[:, self.spec.n_obs_steps - 1 :].to(self.device)
        found = {}
        for name, judged in (("explained", plan), ("explained_shuffled", plan[other])):
            error = (self.network(cond, judged).mean(0).cpu() - wanted).square().mean()
            found[name] = float(1 - error / wanted.var(correction=0))
        return found

    # ---------------------------------------------------------------- judging

    def __call__(self, action: Tensor, obs: Tensor) -> Tensor:
        """The value of plans ``[B]``, in units of the reward model; differentiable in both.

        Args:
            action: plans in the data's units ``[B, H, A]``; position ``To - 1`` is the current
                step, To those of ``obs``.
            obs: observations in the data's units, the current one last, ``[B, To, O]``.

        Raises:
            ValueError: fewer observations or actions than the value looks at, or other sizes.
        """
        spec, seen = self.spec, obs.shape[1]
        now = seen - 1
        if seen < spec.n_obs_steps or action.shape[1] < now + spec.n_action_steps:
            needs = f"{spec.n_action_steps} actions from the current step ({now}) on"
            shapes = f"{list(obs.shape)} and {list(action.shape)}"
            raise ValueError(f"needs {spec.n_obs_steps} observations, {needs}; got {shapes}")
        cond = self.normalizer.normalize("obs", obs[:, seen - spec.n_obs_steps :]).flatten(1)
        plan = self.normalizer.normalize("action", action[:, now : now + spec.n_action_steps])
        return judging.pessimistic(self.network(cond, plan), self.pessimism)

    def ranking(
        self, normalizer: Normalizer
    ) -> Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]:
        """The score by which a policy's :class:`~diffpolicy.policies.best_of_n.Selector` chooses.

        Args:
            normalizer: the policy's: its plans come normalised.

        Returns:
            ``(raw observations [n, To, O], normalised plans [n, H, A]) -> [n]``.
        """
        own = normalizer.to(self.device)

        @torch.no_grad()
        def score(history: NDArray[Any], plans: NDArray[Any]) -> NDArray[Any]:
            obs, plan = (torch.from_numpy(v).float().to(self.device) for v in (history, plans))
            out: NDArray[Any] = self(own.unnormalize("action", plan), obs).cpu().numpy()
            return out

        return score
