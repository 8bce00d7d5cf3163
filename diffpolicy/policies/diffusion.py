"""Diffusion policies: plans are samples of a conditional denoiser.

The policy's whole choice is where sampling starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.guidance import ClassifierFreeGuidance
from diffpolicy.core.noise import make_process
from diffpolicy.core.sampling import Grid, prepare, sample
from diffpolicy.core.solvers import Solver, make_solver
from diffpolicy.core.starts import levels, prior_start
from diffpolicy.data.normalize import Normalizer
from diffpolicy.networks import make_network
from diffpolicy.policies.base import Array, ChunkedPolicy, PolicyState, check_horizon, row_noise


@dataclass(frozen=True)
class Sampler:
    """How plans are drawn.

    Args:
        solver: name from :data:`diffpolicy.core.SOLVERS`.
        num_steps: steps from pure noise to clean.
        spacing: grid of levels, ``"t"``, ``"log_snr"`` or ``"karras"``.
        options: options of the solver, e.g. ``{"eta": 0.5}``.
        guidance_scale: classifier-free guidance; 1 is the conditional model alone.
    """

    solver: str = "ddim"
    num_steps: int = 10
    spacing: str = "t"
    options: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.0

    def make(self, *, deterministic: bool = False) -> Solver:
        """The solver; ``deterministic`` takes its noise-free form."""
        solver = make_solver(self.solver, **self.options)
        return (
            make_solver(self.solver, **{**self.options, "eta": 0.0})
            if deterministic and solver.stochastic
            else solver
        )


@dataclass(frozen=True)
class PolicySpec:
    """Everything about a diffusion policy but its weights and normaliser: plain values.

    Stored as JSON.

    Args:
        obs_dim: O.
        action_dim: A.
        horizon: plan length H.
        n_obs_steps: To.
        n_action_steps: Ta.
        network: ``{"type": ..., sizes}`` for :func:`diffpolicy.networks.make_network`.
        process: for :func:`diffpolicy.core.make_process`.
        prediction: what the network outputs.
        clip: clamp clean estimates to [-1, 1].
        cond_dropout: fraction of examples trained without their condition.
        sampler: how plans are drawn.
        action_low: lower bounds of actions in environment units ``[A]``, ``None`` for unbounded.
        action_high: upper bounds.
        env_id: the environment it was trained for, if known.
    """

    obs_dim: int
    action_dim: int
    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    process: Mapping[str, Any] = field(default_factory=lambda: {"type": "vp_cosine"})
    prediction: str = "eps"
    clip: bool = True
    cond_dropout: float = 0.0
    sampler: Sampler = field(default_factory=Sampler)
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    env_id: str | None = None

    def __post_init__(self) -> None:
        check_horizon(self.horizon, self.n_obs_steps, self.n_action_steps)
        if self.sampler.guidance_scale != 1 and self.cond_dropout == 0:
            raise ValueError(
                f"guidance_scale={self.sampler.guidance_scale} needs a policy trained with "
                "cond_dropout > 0; this one was trained without"
            )
        for name, bound in (("action_low", self.action_low), ("action_high", self.action_high)):
            if bound is not None and len(bound) != self.action_dim:
                raise ValueError(
                    f"{name} must have action_dim={self.action_dim} entries, got {len(bound)}"
                )

    def to_config(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PolicySpec:
        """The inverse of :meth:`to_config`.

        Raises:
            ValueError: unknown or missing entries.
        """
        values = dict(config)
        try:
            values["sampler"] = Sampler(**values.get("sampler", {}))
            for name in ("action_low", "action_high"):
                if values.get(name) is not None:
                    values[name] = tuple(float(v) for v in values[name])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"policy config: {error}") from None

    def make_denoiser(self) -> Denoiser:
        """A denoiser with freshly initialised weights."""
        shape = {
            "horizon": self.horizon,
            "dim": self.action_dim,
            "cond_dim": self.n_obs_steps * self.obs_dim,
        }
        network, process = make_network({**self.network, **shape}), make_process(self.process)
        data_std = getattr(process, "data_std", 0.5)
        return Denoiser(network, process, self.prediction, clip=self.clip, data_std=data_std)


class DiffusionPlanner(ChunkedPolicy):
    """A trained denoiser that acts: full diffusion from pure noise for every plan.

    Args:
        spec: shapes, parameterisation and sampler.
        denoiser: ``spec.make_denoiser()`` with trained weights.
        normalizer: the frozen normaliser of the training data, with fields ``obs`` and ``action``.

    Raises:
        ValueError: clipping with an action normaliser whose range is not [-1, 1], or shapes that do
            not match.
    """

    def __init__(self, spec: PolicySpec, denoiser: Denoiser, normalizer: Normalizer) -> None:
        super().__init__(
            obs_dim=spec.obs_dim,
            action_dim=spec.action_dim,
            horizon=spec.horizon,
            n_obs_steps=spec.n_obs_steps,
            n_action_steps=spec.n_action_steps,
        )
        check_normalizer(spec, normalizer)
        self.spec = spec
        self.denoiser = denoiser.eval()
        parameter = next(denoiser.parameters())
        self.device = parameter.device
        self.normalizer = normalizer.to(self.device)
        self._low, self._high = (
            None if b is None else np.asarray(b, np.float32)
            for b in (spec.action_low, spec.action_high)
        )
        with torch.no_grad():
            self._grids = {
                flag: self._grid(deterministic=flag, like=parameter.detach())
                for flag in (False, True)
            }

    def _grid(self, *, deterministic: bool, like: Tensor) -> tuple[Solver, Grid]:
        process, sampler = self.denoiser.process, self.spec.sampler
        solver = sampler.make(deterministic=deterministic)
        shape = torch.zeros(1, self.horizon, self.action_dim, dtype=like.dtype, device=like.device)
        start = prior_start(process, shape)
        grid = levels(start, sampler.num_steps, spacing=sampler.spacing, process=process)
        guided: BaseDenoiser = self.denoiser
        if sampler.guidance_scale != 1:
            guided = ClassifierFreeGuidance(guided, sampler.guidance_scale, clip=self.spec.clip)
        return solver, prepare(guided, solver, grid, shape)

    @property
    def nfe(self) -> int:
        """Network evaluations per plan."""
        return self._grids[False][1].nfe

    @torch.inference_mode()
    def make_plans(self, state: PolicyState, *, deterministic: bool) -> tuple[Array, int]:
        solver, grid = self._grids[deterministic]
        draws = 1 + (grid.nfe if grid.stochastic else 0)
        shape = (draws, self.horizon, self.action_dim)
        zero = np.zeros_like(state.seed)
        keys = (zero[:1], zero[:1]) if deterministic else (state.seed, state.counter)
        noise = torch.from_numpy(row_noise(*keys, shape)).to(self.device).transpose(0, 1)
        if deterministic:
            noise = noise.expand(-1, len(state), -1, -1)
        obs = torch.from_numpy(state.history).to(self.device)
        cond = self.normalizer.normalize("obs", obs).flatten(1)
        start = prior_start(self.denoiser.process, noise[0])
        x0 = sample(
            self.denoiser,
            solver,
            start,
            grid,
            cond=cond,
            noise=noise[1:] if grid.stochastic else None,
        )
        assert isinstance(x0, Tensor)
        return x0.cpu().numpy(), grid.nfe

    def to_actions(self, normalised: Array) -> Array:
        actions = (
            self.normalizer.unnormalize("action", torch.from_numpy(normalised).to(self.device))
            .cpu()
            .numpy()
        )
        return (
            actions
            if self._low is None and self._high is None
            else np.clip(actions, self._low, self._high)
        )


def check_normalizer(spec: PolicySpec, normalizer: Normalizer) -> None:
    """Raise ``ValueError`` unless the normaliser fits the policy's shapes and its clipping."""
    for name, dim in (("obs", spec.obs_dim), ("action", spec.action_dim)):
        if name not in normalizer.fields:
            raise ValueError(
                f"the normaliser has no field {name!r} (it has {sorted(normalizer.fields)})"
            )
        got = tuple(normalizer.normalize(name, torch.zeros(1, dim)).shape)
        if got != (1, dim):
            raise ValueError(f"the normaliser's field {name!r} does not have dimension {dim}")
    if spec.clip and not normalizer.is_unit_range("action"):
        raise ValueError(
            "clip=True clamps clean actions to [-1, 1], but the action normaliser does not map the "
            "data into that range; use the 'minmax' mode for 'action', or clip=False"
        )
