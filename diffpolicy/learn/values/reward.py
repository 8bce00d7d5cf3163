"""The facade of learned rewards: learn from preferences, judge steps, save and load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import diffpolicy.learn.values.learning as judging
from diffpolicy.data.fields import FieldSpec, check_vector
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.preferences.records import Pair
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.preferences.bradley_terry import BradleyTerryLoss
from diffpolicy.learn.values.learning import LearnedJudge, PreferenceLearning, RewardSpec
from diffpolicy.networks.base import described
from diffpolicy.networks.critics import QEnsemble
from diffpolicy.settings import check_shape, settings_of
from diffpolicy.training.process import seeded
from diffpolicy.training.saved import Device
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Running

ROWS = 16_384  # steps judged at once: bounds memory
MOST_ROWS = 65_536  # steps that the scale of the rewards is measured on


class RewardModel(LearnedJudge):
    """The reward of a step, r(observation, action), by an ensemble of networks.

    Learned from preferences between segments (Christiano et al. 2017, with the mean over a
    segment's steps, see :mod:`diffpolicy.learn.preferences.bradley_terry`). Preferences leave a
    reward's offset open, so it is given in units of its own: over the steps of the training
    episodes each member, and the ensemble's mean, have mean 0, and the ensemble's mean has
    standard deviation 1.

    It judges what is at hand: an action in a known observation. A plan is worth what it leads to;
    :class:`diffpolicy.learn.values.PlanValue` learns that, and is what policies are tuned with and
    candidates ranked by. With :meth:`relabel` a store serves any method that learns from rewards.

    Example:
        >>> preferences = PreferenceSet.open("data/door_prefs.jsonl")
        >>> model = RewardModel.for_preferences(preferences)
        >>> model.learn(preferences, TrainerConfig(steps=300, batch_size=64), "runs/door_reward")
        >>> model.accuracy(preferences)

    Args:
        spec: sizes.
        normalizer: of ``obs`` and ``action``.
        network: with weights; ``None``: freshly initialised.
        standard: ``shift`` and ``scale`` of each member ``[2, M]``; ``None``: 0 and 1.
        device: where the weights go.
    """

    FORMAT, WHAT, SPEC = "diffpolicy-reward", "reward model", RewardSpec
    spec: RewardSpec

    def __init__(
        self,
        spec: RewardSpec,
        normalizer: Normalizer,
        network: QEnsemble | None = None,
        standard: Tensor | None = None,
        *,
        device: Device = "cpu",
    ) -> None:
        for name, size in (("obs", spec.obs_dim), ("action", spec.action_dim)):
            check_shape(f"what normalizes {name}", normalizer.shape(name), (size,))
        super().__init__(spec, normalizer, network, device=device)
        if standard is None:
            standard = torch.tensor([[0.0], [1.0]]).expand(2, spec.members)
        self.standard = standard.clone().to(device)

    def __repr__(self) -> str:
        spec = self.spec
        what = f"obs {spec.obs_dim}, action {spec.action_dim}; {spec.members} members"
        return described(self, what, self.network)

    @classmethod
    def for_preferences(
        cls,
        preferences: PreferenceSet,
        *,
        spec: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: Device = "cpu",
    ) -> Self:
        """An untrained model with the sizes and the normaliser of the episodes that were judged.

        Args:
            preferences: say which episodes.
            spec: further entries of :class:`RewardSpec`.
            seed: of the initial weights.
            device: where the weights live.

        Raises:
            ValueError: settings out of range, or episodes without vectors ``obs`` and ``action``.
        """
        store = preferences.store
        sizes = {}
        for name in ("obs", "action"):
            shape = store.fields[name].shape if name in store.fields else ()
            check_vector(name, shape, store.name)
            sizes[f"{name}_dim"] = shape[0]
        full = settings_of(RewardSpec, {**(spec or {}), **sizes}, cls.WHAT)
        episodes = judging.judged_episodes(preferences)
        normalizer = judging.fit_normalizer(store, episodes, full.normalize)
        return cls(full, normalizer, seeded(seed, full.make_network), device=device)

    # ---------------------------------------------------------------- learning

    def learn(
        self,
        preferences: PreferenceSet,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        learning: PreferenceLearning | None = None,
        **run: Unpack[Running],
    ) -> Self:
        """Train on the pairs (and rankings) of a preference set.

        Args:
            preferences: with their store.
            config: of the trainer. A few hundred steps are enough for a thousand pairs.
            run_dir: where metrics and checkpoints go.
            learning: settings beside the trainer's.
            **run: ``resume`` and ``overwrite`` of
                :class:`~diffpolicy.training.trainer.Trainer`.

        Returns:
            self, with the averaged (EMA) weights, or the best ones where episodes are held out.

        Raises:
            ValueError: no pairs, or settings that do not fit.
        """
        learning = PreferenceLearning() if learning is None else learning
        train, held_out = learning.split(preferences, config.seed)
        rows = judging.rows_of_episodes(train.store, judging.judged_episodes(train))
        judged = judging.read_rows(train.store, rows[:: -(-len(rows) // MOST_ROWS)], self.device)

        def evaluate(folder: Path, step: int) -> Mapping[str, float]:
            assert held_out is not None
            found = type(self).from_pretrained(folder, device=self.device).evaluate(held_out)
            return {"score": -found["log_loss"], "held_out_accuracy": found["accuracy"]}

        source = learning.examples(train, self.normalizer.to("cpu"), self.spec.members, config.seed)
        self._judged = judged
        loss = BradleyTerryLoss(self.network, label_smoothing=learning.label_smoothing)
        run["evaluate"] = None if held_out is None else evaluate
        self._fit(loss, source, config, run_dir, about={"learning": learning}, **run)
        if held_out is not None:
            self._take(type(self).from_pretrained(run_dir, device=self.device)._weights())
        return self

    def identity(self) -> dict[str, Any]:
        """What this model is, for telling one training run from another that it rewards."""
        return {**super().identity(), "standard": self.standard}

    @torch.no_grad()
    def _weights(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Weights of the network, and each member's shift and scale on the judged steps."""
        files, standard = super()._weights(state), self.standard
        if state is not None:
            found = []
            for part in zip(*(torch.split(values, ROWS) for values in self._judged), strict=True):
                arguments = self._normalised(*part)
                weights = files["model.safetensors"]
                found.append(torch.func.functional_call(self.network, weights, arguments))
            rewards = torch.cat(found, 1)
            shift, scale = rewards.mean(1), rewards.std(1, correction=0).clamp_min(1e-6)
            together = ((rewards - shift[:, None]) / scale[:, None]).mean(0)
            spread = together.std(correction=0).clamp_min(1e-6)
            standard = torch.stack([shift, scale * spread])
        return {**files, "standard.safetensors": {"standard": standard}}

    def _take(self, files: Mapping[str, Any]) -> None:
        super()._take(files)
        self.standard = files["standard.safetensors"]["standard"].to(self.device)

    # ---------------------------------------------------------------- judging

    def member_rewards(self, obs: Tensor, action: Tensor) -> Tensor:
        """What every member says, ``[M, ...]``, of observations and actions as in :meth:`reward`.

        Raises:
            ValueError: shapes that do not fit.
        """
        if obs.shape[:-1] != action.shape[:-1]:
            shapes = f"{list(obs.shape)} and {list(action.shape)}"
            raise ValueError(f"obs and action must agree but for the last dimension; got {shapes}")
        shift, scale = self.standard.unsqueeze(-1)
        out: Tensor = (self.network(*self._normalised(obs, action)) - shift) / scale
        return out.view(-1, *obs.shape[:-1])

    def _normalised(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """What the network takes: ``[N, O]`` and ``[N, 1, A]``."""
        seen = self.normalizer.normalize("obs", obs).reshape(-1, self.spec.obs_dim)
        done = self.normalizer.normalize("action", action)
        return seen, done.reshape(-1, 1, self.spec.action_dim)

    def reward(self, obs: Any, action: Any, *, pessimism: float = 0.0) -> Any:
        """The reward of taking actions in observations.

        Args:
            obs: in the data's units, ``[..., O]``.
            action: in the data's units, ``[..., A]``.
            pessimism: standard deviations over the members to take off their mean.

        Returns:
            ``[...]``, of the inputs' kind; of tensors differentiable in both.

        Raises:
            ValueError: shapes that do not fit.
        """
        if isinstance(obs, Tensor):
            return judging.pessimistic(self.member_rewards(obs, action), pessimism)
        arrays = (np.asarray(v, np.float32) for v in (obs, action))
        given = (torch.as_tensor(array, device=self.device) for array in arrays)
        with torch.no_grad():
            return judging.pessimistic(self.member_rewards(*given), pessimism).cpu().numpy()

    def rewards(self, store: EpisodeStore, *, pessimism: float = 0.0) -> NDArray[np.float32]:
        """The reward of every step of a store, ``[T]``."""
        found = []
        for a in range(0, store.num_steps, ROWS):
            rows = a, min(a + ROWS, store.num_steps)
            seen = store.read("obs", *rows), store.read("action", *rows)
            found.append(self.reward(*seen, pessimism=pessimism))
        return np.concatenate(found)

    def relabel(
        self, store: EpisodeStore, path: str | os.PathLike[str], *, pessimism: float = 0.0
    ) -> EpisodeStore:
        """Write a copy of a store with these rewards in the field ``reward``.

        What learns from rewards (critics, returns) then learns from preferences.

        Args:
            store: the episodes.
            path: of the new store.
            pessimism: see :meth:`reward`.

        Raises:
            FileExistsError: something is at ``path``.
        """
        fields = {**store.fields, "reward": FieldSpec((), "float32")}
        attrs = {**store.attrs, "reward": "learned from preferences"}
        made = EpisodeStore.create(path, fields, attrs=attrs)
        for episode, kept in enumerate(store.episode_attrs):
            rows = store.episode(episode)
            reward = self.reward(rows["obs"], rows["action"], pessimism=pessimism)
            made.append({**rows, "reward": reward}, **kept)
        made.finalize()
        return made

    # ---------------------------------------------------------------- agreement

    def right(self, preferences: PreferenceSet, pairs: Sequence[Pair]) -> NDArray[Any]:
        """Whether the chosen segment of each pair has the larger mean reward, ``[P]``.

        The answer is 1 if it has, 0 if the rejected one has, and 1/2 if they are equal.
        """
        return ((self._gaps(preferences, pairs).mean(0).sign() + 1) / 2).numpy()

    def accuracy(self, preferences: PreferenceSet) -> float:
        """The share of the pairs that are ranked as they were judged; ties are left out.

        Raises:
            ValueError: no pairs.
        """
        return self.evaluate(preferences)["accuracy"]

    def evaluate(self, preferences: PreferenceSet) -> dict[str, float]:
        """``accuracy``, ``log_loss`` (nats; log 2 is a coin) and ``pairs``, how many, of a set.

        Raises:
            ValueError: no pairs.
        """
        pairs = preferences.pairs()
        if not pairs:
            raise ValueError(f"{preferences!r} has no pairs to agree with (ties do not count)")
        gaps = self._gaps(preferences, pairs) * self.standard[1][:, None].cpu()
        together = torch.logsumexp(F.logsigmoid(gaps), 0) - np.log(len(gaps))
        return {
            "accuracy": float(self.right(preferences, pairs).mean()),
            "log_loss": -float(together.mean()),
            "pairs": float(len(pairs)),
        }

    def _gaps(self, preferences: PreferenceSet, pairs: Sequence[Pair]) -> Tensor:
        """Mean reward of the chosen minus that of the rejected segment, ``[M, P]``, on the CPU."""
        segments = [s for pair in pairs for s in (pair.chosen, pair.rejected)]
        every = [preferences.rows(s) for s in segments]
        rows, place = np.unique(np.concatenate(every), return_inverse=True)
        with torch.no_grad():
            parts = [
                self.member_rewards(
                    *judging.read_rows(preferences.store, part, self.device)
                ).double()
                for part in np.split(rows, range(ROWS, len(rows), ROWS))
            ]
        of_steps = torch.cat(parts, 1).cpu()[:, torch.from_numpy(place)]
        of_segments = torch.split(of_steps, [len(r) for r in every], 1)
        means = torch.stack([part.mean(1) for part in of_segments], 1)
        return means[:, 0::2] - means[:, 1::2]
