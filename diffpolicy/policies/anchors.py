"""Anchors: typical plans of the demonstrations, from which truncated diffusion starts.

An anchor stands for one mode of the plans (DiffusionDrive, Liao et al. 2025). Noised to a level
that covers its distance to the plans it stands for, it is a start like any other:
``truncated_start(process, guess, anchors.default_t_start(process), noise)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import each, from_fields
from diffpolicy.data.windows import Windows
from diffpolicy.policies.clusters import ClusterClassifier, clusters
from diffpolicy.settings import check_range, check_shape

_MOST_WINDOWS = 20_000  # k-means learns nothing from more
_HELD_OUT = 0.1
_TENSORS = ("plans", "frequency", "position_error")


def _flat(obs: Tensor) -> Tensor:
    """One vector ``[n, To, O]`` as a condition."""
    return obs.flatten(1)


@dataclass(frozen=True)
class Anchors:
    """Typical plans, in normalised units, with what is needed to place them in a state.

    Build them with :meth:`fit` or :meth:`from_parts`.

    Attributes:
        plans: ``[M, H, A]``. Normalised actions or, in the dimensions that ``relative_to`` names,
            normalised actions minus the normalised current state.
        frequency: ``[M]`` share of the windows that each anchor is nearest to.
        error: root mean square distance, per coordinate, of a window to the nearest anchor offered
            for its state; normalised units, from held-out episodes when there is more than one.
        position_error: ``[H]``, the same per position of the plan.
        relative_to: per action dimension the index of the raw last observation that it is relative
            to, or None where it is absolute; None: all are absolute.
        top_m: anchors offered per state; None: all of them, whatever the state.
        classifier: probability of each anchor in a state; with ``top_m`` only.
    """

    plans: Tensor
    frequency: Tensor
    error: float
    position_error: Tensor
    relative_to: tuple[int | None, ...] | None = None
    top_m: int | None = None
    classifier: ClusterClassifier | None = None

    def __post_init__(self) -> None:
        count, horizon, action_dim = self.plans.shape
        check_shape("frequency", self.frequency.shape, (count,))
        check_shape("position_error", self.position_error.shape, (horizon,))
        _check_relative(self.relative_to, action_dim)
        if (self.top_m is None) != (self.classifier is None):
            raise ValueError("top_m and classifier belong together: give both or neither")
        check_range(f"[1, {count}]", top_m=self.top_m)
        known = count if self.classifier is None else self.classifier.count
        if known != count:
            raise ValueError(f"the classifier knows {known} anchors, but there are {count}")

    # ---------------------------------------------------------------- making them

    @classmethod
    def fit(
        cls,
        windows: Windows,
        normalizer: Normalizer,
        *,
        count: int = 20,
        relative_to: Sequence[int | None] | None = None,
        top_m: int | None = None,
        encode: Callable[[Any], Tensor] = _flat,
        seed: int = 0,
    ) -> Anchors:
        """Cluster the plans of demonstrations.

        Of more than 20,000 windows that many are drawn. A tenth of the episodes is held out to
        measure the error on (none, if there is only one episode).

        Args:
            windows: normalised windows, such as :class:`diffpolicy.data.windows.Windows`.
            normalizer: the one that the windows were normalised with.
            count: anchors M.
            relative_to: make anchors relative to the current state: per action dimension the index
                of the observation in the same unit and frame (a position command and the position),
                None where there is none. Demonstrated plans that start anywhere then share anchors.
            top_m: also fit a classifier of the encoded observations, and offer only the ``top_m``
                most probable anchors of a state. ``count`` can then be larger.
            encode: the policy's encoder, from normalised observations ``[n, To, ...]`` (or such
                by name, images too) to ``[n, C]``; default: one vector, flattened.
            seed: of the windows drawn, the clusters and the classifier.

        Raises:
            ValueError: fewer windows than anchors, or settings that do not fit the data.
        """
        check_range(f"[1, {count}]", top_m=top_m)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(windows), generator=generator)[:_MOST_WINDOWS].sort().values
        indices = None if relative_to is None else tuple(relative_to)
        normalizer = normalizer.to("cpu")
        conds, locals_ = [], []  # by parts: images of all windows would not fit into memory
        for rows in torch.split(chosen, 1024):
            part = windows.gather(rows)
            obs, plans = each(Tensor.cpu, from_fields(part)), part["action"].cpu()
            _check_relative(indices, plans.shape[-1], obs)
            base = _reference(_now(obs, normalizer, indices), normalizer, indices, plans)
            conds.append(encode(obs))
            locals_.append((plans - base).flatten(1))
        cond, local = torch.cat(conds), torch.cat(locals_)
        held_out = _held_out(windows, chosen, generator)
        fitted = ~held_out
        centres, label = clusters(local[fitted], count, seed=seed)
        classifier = None
        if top_m is not None:
            classifier = ClusterClassifier.fit(cond[fitted], label, count, seed=seed)
        centres = centres.view(count, *plans.shape[1:])
        frequency = torch.bincount(label, minlength=count) / len(label)
        unknown = torch.zeros(plans.shape[1])
        anchors = cls(centres, frequency, 0.0, unknown, indices, top_m, classifier)
        judged = held_out if bool(held_out.any()) else fitted
        square = anchors._residual(cond[judged], local[judged])
        error, position_error = float(square.mean().sqrt()), square.mean(dim=(0, 2)).sqrt()
        return replace(anchors, error=error, position_error=position_error)

    def _residual(self, cond: Tensor, local: Tensor) -> Tensor:
        """Squared distance ``[N, H, A]`` of plans to the nearest anchor offered for them."""
        best, parts = [], (torch.split(value, 1024) for value in (cond, local))
        for told, plan in zip(*parts, strict=True):
            offered = self.plans.flatten(1)[self.offered(told)[0]]
            square = (plan[:, None] - offered).square()
            nearest = square.sum(-1).argmin(1)
            best.append(square[torch.arange(len(plan)), nearest])
        return torch.cat(best).view(-1, *self.plans.shape[1:])

    # ---------------------------------------------------------------- using them

    @property
    def count(self) -> int:
        """Anchors offered for a state: m."""
        return len(self.plans) if self.top_m is None else self.top_m

    def offered(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Which anchors a state gets, the most probable first, and their log-probability.

        Args:
            cond: ``[n, C]`` the encoded observations.

        Returns:
            Index ``[n, m]`` and log-probability ``[n, m]`` (over all M anchors, so those of
            ``top_m`` sum to less than one).
        """
        if self.classifier is None or self.top_m is None:
            frequency = self.frequency.clamp_min(torch.finfo(self.frequency.dtype).tiny).log()
            index = torch.arange(len(self.plans), device=cond.device)
            return index.expand(len(cond), -1), frequency.expand(len(cond), -1)
        check_shape("conditions of these anchors", cond.shape, ("n", self.classifier.cond_dim))
        log_prob, index = self.classifier.log_prob(cond).topk(self.top_m, dim=-1)
        return index, log_prob

    def guesses(
        self, history: Any, normalizer: Normalizer, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The anchors of a state as whole plans.

        Args:
            history: ``[n, To, O]`` raw observations, oldest first, or such by name.
            normalizer: the policy's, on the device of ``history``.
            cond: ``[n, C]``, the same as the policy's encoder says it; default: one vector,
                normalised and flattened.

        Returns:
            Plans ``[n, m, H, A]`` normalised and log-probabilities ``[n, m]``.
        """
        cond = _flat(normalizer.normalize("obs", history)) if cond is None else cond
        return self._place(None if self.relative_to is None else history[:, -1], cond, normalizer)

    def guesses_normalised(
        self, obs: Any, normalizer: Normalizer, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same from normalised observations ``[n, To, O]``, as training batches hold them."""
        now = _now(obs, normalizer, self.relative_to)
        return self._place(now, _flat(obs) if cond is None else cond, normalizer)

    def _place(
        self, now: Tensor | None, cond: Tensor, normalizer: Normalizer
    ) -> tuple[Tensor, Tensor]:
        index, log_prob = self.offered(cond)
        local = self.plans[index]
        base = _reference(now, normalizer, self.relative_to, local[:, 0])
        return local + base[:, None], log_prob

    def default_t_start(self, process: GaussianProcess) -> float:
        """The lowest level whose noise covers the distance between an anchor and its plans.

        A noised anchor and the equally noised plan differ by ``alpha(t) error`` under noise
        ``sigma(t)``; with ``sigma / alpha >= error`` that is at most one standard deviation per
        coordinate, a Kullback-Leibler divergence of at most 1/2: the denoiser sees states it knows
        and can move the guess to the plan. More noise only costs steps and forgets the mode. So
        ``log SNR = -2 log(error)``, rounded up to a knot of a discrete process.

        Returns:
            A level in (0, 1].
        """
        target = torch.tensor(-2 * math.log(max(self.error, 1e-6)), dtype=torch.float64)
        t = process.t_from_log_snr(target).clamp(1e-3, 1.0)
        if isinstance(process, DiscreteVP):
            half = 0.5 / len(process.betas)
            t = process.snap((t + half - 1e-9).clamp(half + 1e-9, 1.0))
        return float(t)

    def to(self, device: torch.device | str) -> Anchors:
        """The same anchors on ``device``."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        classifier = None if self.classifier is None else self.classifier.to(device)
        return replace(self, **moved, classifier=classifier)

    # ---------------------------------------------------------------- saving

    def to_config(self) -> dict[str, Any]:
        """The JSON half."""
        return {
            "shape": list(self.plans.shape),
            "error": self.error,
            "relative_to": None if self.relative_to is None else list(self.relative_to),
            "top_m": self.top_m,
            "activation": None if self.classifier is None else self.classifier.activation,
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors, for a safetensors file."""
        tensors = {f"anchors.{name}": getattr(self, name) for name in _TENSORS}
        if self.classifier is not None:
            parts = self.classifier.to_tensors().items()
            tensors |= {f"anchors.classifier.{name}": value for name, value in parts}
        return {name: value.contiguous() for name, value in tensors.items()}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Anchors:
        """Rebuild from what :meth:`to_config` and :meth:`to_tensors` returned.

        Raises:
            ValueError: a tensor is missing, or shapes do not fit.
        """
        missing = [f"anchors.{name}" for name in _TENSORS if f"anchors.{name}" not in tensors]
        if missing:
            raise ValueError(f"the anchors' tensors lack {missing}; there are {sorted(tensors)}")
        plans, frequency, position_error = (tensors[f"anchors.{name}"] for name in _TENSORS)
        if list(plans.shape) != list(config["shape"]):
            both = f"{list(plans.shape)} and {config['shape']}"
            raise ValueError(f"anchors and config do not belong together: shapes {both}")
        top_m, relative, error = config["top_m"], config["relative_to"], float(config["error"])
        relative = None if relative is None else tuple(relative)
        prefix, classifier = "anchors.classifier.", None
        if top_m is not None:
            parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            classifier = ClusterClassifier(parts, config.get("activation", "silu"))
        return cls(plans, frequency, error, position_error, relative, top_m, classifier)


def _check_relative(
    relative_to: tuple[int | None, ...] | None, action_dim: int, obs: Any = None
) -> None:
    if relative_to is None:
        return
    given = list(relative_to)
    if isinstance(obs, Mapping):
        raise ValueError(
            f"relative_to={given} indexes one vector, the observations are {sorted(obs)}: leave it "
            "out, or declare relative actions (policy.actions): they name what they are relative to"
        )
    if obs is not None and any(i is not None and not 0 <= i < obs.shape[-1] for i in given):
        raise ValueError(f"relative_to indexes observations 0..{obs.shape[-1] - 1}, got {given}")
    if len(given) != action_dim:
        wanted = f"({action_dim}, None where the action is absolute)"
        raise ValueError(f"relative_to has an index per action dimension {wanted}, got {given}")


def _now(
    obs: Any, normalizer: Normalizer, relative_to: tuple[int | None, ...] | None
) -> Tensor | None:
    """The raw current state ``[n, O]`` of normalised observations, where anchors look at it."""
    return None if relative_to is None else normalizer.unnormalize("obs", obs[:, -1])


def _reference(
    now: Tensor | None,
    normalizer: Normalizer,
    relative_to: tuple[int | None, ...] | None,
    like: Tensor,
) -> Tensor:
    """The current state as a normalised action, ``[n, 1, A]``; 0 where anchors are absolute."""
    if relative_to is None or now is None:
        return like.new_zeros(len(like), 1, like.shape[-1])
    kept = torch.tensor([i is not None for i in relative_to], device=now.device)
    state = now[:, [i or 0 for i in relative_to]]
    return (normalizer.normalize("action", state) * kept)[:, None]


def _held_out(windows: Windows, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Bool per chosen window: whether its episode is among the tenth that is held out."""
    episode = torch.tensor([windows.locate(int(i))[0] for i in chosen])
    names = torch.unique(episode)
    if len(names) < 2:
        return torch.zeros(len(chosen), dtype=torch.bool)
    size = max(1, round(_HELD_OUT * len(names)))
    out = names[torch.randperm(len(names), generator=generator)[:size]]
    return torch.isin(episode, out)
