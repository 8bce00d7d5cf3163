"""How rewards, and values of plans, are learned: settings, examples, targets and losses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffpolicy.data.normalize import MODES, Mode, Normalizer
from diffpolicy.data.preferences.examples import PairExamples
from diffpolicy.data.preferences.records import episodes_of
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.statistics import RunningStatistics
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch
from diffpolicy.networks.critics import QEnsemble
from diffpolicy.settings import check_choice, check_range, check_settings, ranged, settings_of
from diffpolicy.training.saved import Device, Saved, part_of
from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.sources import Source
from diffpolicy.training.train import train
from diffpolicy.training.trainer import TrainResult
from diffpolicy.training.weights import unchanged_on_error

TARGET = "plan_value_target"


@dataclass(frozen=True)
class RewardSpec:
    """Sizes of a reward network.

    Args:
        obs_dim: O.
        action_dim: A.
        width: units of a hidden layer.
        depth: hidden layers.
        members: networks in the ensemble, M.
        layer_norm: normalise the hidden layers, which bounds rewards away from the data.
        normalize: how inputs are normalised: ``"gaussian"``, ``"minmax"``, ``"quantile"`` or
            ``"identity"``.
    """

    obs_dim: int
    action_dim: int
    width: int = 32
    depth: int = 1
    members: int = 5
    layer_norm: bool = False
    normalize: str = "gaussian"

    def make_network(self) -> QEnsemble:
        """The networks, freshly initialised.

        Raises:
            ValueError: a size out of range.
        """
        return ensemble_of(self, self.obs_dim, 1)


def ensemble_of(spec: Any, cond_dim: int, horizon: int) -> QEnsemble:
    """An ensemble with the hidden layers and members that a spec says."""
    names = ("action_dim", "width", "depth", "members", "layer_norm")
    return QEnsemble(cond_dim, horizon, **{name: getattr(spec, name) for name in names})


class LearnedJudge(Saved):
    """Base of what is learned by an ensemble of networks and judges actions or plans.

    Args:
        spec: sizes, of the class ``SPEC``; makes the network.
        normalizer: of ``obs`` and ``action``.
        network: with weights; ``None``: freshly initialised.
        device: where the weights go.
    """

    SPEC: ClassVar[type[Any]]
    last_training: TrainResult | None = None

    def __init__(
        self,
        spec: Any,
        normalizer: Normalizer,
        network: QEnsemble | None = None,
        *,
        device: Device = "cpu",
    ) -> None:
        self.spec, self.normalizer = spec, normalizer.to(device)
        self.network: QEnsemble = (spec.make_network() if network is None else network).to(device)
        self.network.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.network.parameters()).device

    def identity(self) -> dict[str, Any]:
        """What this is, for telling one training run from another that it rewards."""
        return {"spec": self.spec, "normalizer": self.normalizer, "network": self.network}

    def _fit(
        self,
        loss: nn.Module,
        source: Source,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        about: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Self:
        """Train by a loss that holds the network as ``network``; ``how`` is the trainer's."""
        with unchanged_on_error(self.network):
            self.network.requires_grad_(True)
            how["export"] = lambda state: self._files(self._weights(state))
            how["identity"] = {"model": self.spec, "normalizer": self.normalizer, **(about or {})}
            self.last_training = train(loss, source, config, run_dir, **how)
            self._take(self._weights(self.last_training.ema))
            self.network.requires_grad_(False)
        return self

    def _weights(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Files of weights: those of an objective's state; ``None``: its own."""
        own = self.network.state_dict() if state is None else part_of(state, "network")
        return {"model.safetensors": dict(own)}

    def _take(self, files: Mapping[str, Any]) -> None:
        self.network.load_state_dict(files["model.safetensors"])

    def _files(self, weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
        spec, normalizer = asdict(self.spec), self.normalizer.to_config()
        return {
            "config.json": self._config(spec=spec, normalizer=normalizer),
            "normalizer.safetensors": self.normalizer.to_tensors(),
            **(self._weights() if weights is None else weights),
        }

    @classmethod
    def _made_of(cls, config: dict[str, Any], files: Mapping[str, Any], device: Device) -> Self:
        normalizer = Normalizer.from_parts(config["normalizer"], files["normalizer.safetensors"])
        made = cls(settings_of(cls.SPEC, config["spec"], cls.WHAT), normalizer, device=device)
        made._take(files)
        return made


@dataclass(frozen=True)
class PreferenceLearning:
    """Settings of learning from preferences, beside those of the trainer.

    Args:
        label_smoothing: the share of labels taken to be wrong, in [0, 0.5).
        ties: also learn from pairs in which neither was better: their logit should be 0.
        bootstrap: each member sees each pair as often as a Poisson(1) number says, so that members
            differ by their data and not by their first weights alone.
        windows: steps of a segment looked at at once (the others have their turn in other
            batches); ``None``: all. Rewards of successive steps are alike, so few of them cost
            less and tell as much.
        val_fraction: share of the episodes held out to keep the best checkpoint by
            (``eval_every`` of the trainer says how often); 0: the last one is kept.

    Raises:
        ValueError: values out of range.
    """

    label_smoothing: float = ranged("[0, 0.5)", 0.0)
    ties: bool = False
    bootstrap: bool = True
    windows: int | None = ranged("[1, inf)", 10)
    val_fraction: float = ranged("[0, 0.5]", 0.0)

    def __post_init__(self) -> None:
        check_settings(self)

    def split(
        self, preferences: PreferenceSet, seed: int
    ) -> tuple[PreferenceSet, PreferenceSet | None]:
        """What is trained on, and what is held out, if anything; no episode is in both."""
        if self.val_fraction == 0:
            return preferences, None
        return preferences.split_by_episode(max(2, round(1 / self.val_fraction)), seed)[0]

    def examples(
        self, preferences: PreferenceSet, normalizer: Normalizer, members: int, seed: int
    ) -> BootstrapPairs:
        """The pairs as examples for an ensemble."""
        single = dict.fromkeys(("horizon", "n_obs_steps", "n_action_steps"), 1)
        how: dict[str, Any] = {"windows": self.windows, "ties": self.ties, **single}
        pairs = PairExamples(preferences, normalizer=normalizer, **how)
        return BootstrapPairs(pairs, members if self.bootstrap else 0, seed)


class BootstrapPairs:
    """Pairs of segments, and how often each member of an ensemble sees each: ``weight [B, M]``.

    Args:
        pairs: the examples.
        members: M; 0: everybody sees everything, and there is no ``weight``.
        seed: of the weights, independent Poisson(1) numbers for each pair and member.
    """

    def __init__(self, pairs: PairExamples, members: int, seed: int) -> None:
        self.pairs = pairs
        draws = torch.Generator().manual_seed(mix_seed(seed, 0xB007))
        self.weight = torch.poisson(torch.ones(len(pairs.pairs), members), draws)

    def __len__(self) -> int:
        return len(self.pairs)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch."""
        batch = self.pairs.gather(indices)
        if self.weight.shape[1]:
            pair = torch.div(indices, self.pairs.parts, rounding_mode="floor")
            batch["weight"] = self.weight[pair]
        return batch


def judged_episodes(preferences: PreferenceSet) -> list[int]:
    """The episodes that preferences judge anything of, ascending."""
    return sorted({e for record in preferences.records for e in episodes_of(record)})


def fit_normalizer(store: EpisodeStore, episodes: list[int], mode: str) -> Normalizer:
    """A normaliser of ``obs`` and ``action`` fitted to some episodes of a store.

    Raises:
        ValueError: an unknown mode.
    """
    check_choice("normalize", mode, MODES)
    statistics: dict[str, dict[str, Any]] = {}
    for name in ("obs", "action"):
        total = int(store.episode_lengths[episodes].sum())
        running = RunningStatistics(name, store.fields[name].shape, total)
        for episode in episodes:
            running.update(store.episode(episode, [name])[name])
        statistics[name] = running.result()
    return Normalizer.fit(statistics, dict.fromkeys(statistics, cast("Mode", mode)))


def rows_of_episodes(store: EpisodeStore, episodes: list[int]) -> NDArray[np.int64]:
    """The rows of some episodes, counted over the whole store, int64."""
    ends, lengths = store.episode_ends, store.episode_lengths
    return np.concatenate([np.arange(ends[e] - lengths[e], ends[e]) for e in episodes])


def read_rows(
    store: EpisodeStore, rows: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Observations and actions of ascending rows, float32 in the data's units."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    found = (store.read(name, first, last)[rows - first] for name in ("obs", "action"))
    obs, action = (torch.from_numpy(part.astype(np.float32)).to(device) for part in found)
    return obs, action


def pessimistic(members: Tensor, pessimism: float) -> Tensor:
    """The mean over the members ``[M, ...]``, minus so many of their standard deviations.

    Raises:
        ValueError: a negative number of them.
    """
    check_range("[0, inf)", pessimism=pessimism)
    mean = members.mean(0)
    if not pessimism:
        return mean
    # The root of an exact 0 has no gradient (one member, or all the same).
    return mean - pessimism * (members.var(0, correction=0) + 1e-12).sqrt()


class PlanValueLoss(nn.Module):
    """Squared error of every member on what followed, summed over the members.

    ``forward(batch, generator)`` takes normalised ``obs [B, To, O]`` and ``action [B, H, A]``, and
    ``plan_value_target [B, H]``, of which the current step counts. Nothing in it is random.

    Args:
        network: values of every member, ``(cond, plan) -> [M, B]``.
        n_obs_steps: To.
    """

    def __init__(self, network: QEnsemble, n_obs_steps: int) -> None:
        super().__init__()
        self.network, self.n_obs_steps = network, n_obs_steps

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        now = self.n_obs_steps - 1
        values = self.network(batch["obs"].flatten(1), batch["action"][:, now:])
        error = values - batch[TARGET][:, now]
        return LossOutput(error.square().sum(0), {"bias": error.detach().mean()})


def mean_of_next(
    values: NDArray[np.floating], store: EpisodeStore, steps: int, discount: float
) -> NDArray[np.float32]:
    """The discounted mean of the next values of each step, its own first, within its episode.

    Args:
        values: one number for each step of the store, ``[T]``.
        store: says where episodes end; there the mean is of the steps that are left.
        steps: how many, at least 1.
        discount: per step, in (0, 1].

    Returns:
        ``[T]``.
    """
    weight = discount ** np.arange(steps)
    out = np.empty(len(values), np.float32)
    for end, length in zip(store.episode_ends, store.episode_lengths, strict=True):
        part = slice(end - length, end)
        # A correlation with the weights: `full`, of which the last `length` entries look ahead.
        total, count = (
            np.convolve(v, weight[::-1])[-length:]
            for v in (np.asarray(values[part], np.float64), np.ones(length))
        )
        out[part] = total / count
    return out
