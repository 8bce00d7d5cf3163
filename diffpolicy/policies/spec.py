"""A diffusion policy as plain values: shapes, parameterisation, and how plans are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.processes import explicit_process, make_process
from diffpolicy.core.sampler import PriorSampler, Sampler
from diffpolicy.data.action_groups import ActionGroup, Representation
from diffpolicy.data.fields import checked_bounds, inward_bounds
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField, ObsFields, by_store_field
from diffpolicy.guidance.layout import Layout
from diffpolicy.networks import make_network
from diffpolicy.networks.encoders import Encoder, encoder_class, make_encoder
from diffpolicy.networks.heads import make_head
from diffpolicy.policies.base import check_horizon
from diffpolicy.policies.best_of_n import Selection
from diffpolicy.policies.boundary import Gripper
from diffpolicy.policies.direct import check_direct, direct_class
from diffpolicy.policies.few_steps import check_steps
from diffpolicy.policies.guided import Costs
from diffpolicy.policies.imagined import Imagined, check_imagined
from diffpolicy.policies.planners import Returns, check_planning, head_config
from diffpolicy.policies.rows import row_noise
from diffpolicy.policies.rti import RTI
from diffpolicy.policies.truncated import Truncated
from diffpolicy.settings import check_range, check_shape, from_values, named_settings, ranged

SIZES = ("horizon", "n_obs_steps", "n_action_steps")


@named_settings
@dataclass(frozen=True, kw_only=True)
class PolicySampler(PriorSampler):
    """How a policy draws plans from pure noise; a :class:`~diffpolicy.core.sampler.PriorSampler`.

    Args:
        guidance_scale: classifier-free guidance; 1 is the conditional model alone.
        guidance_t_min: at this level and below, the conditional model is asked alone.
        start_seed: the random stream whose first draw every full solve starts from, in place of
            fresh noise (calibrated start noise, ``diffpolicy autotune start_noise=64``). The policy
            becomes deterministic by it: one plan for each observation.
    """

    guidance_scale: float = 1.0
    guidance_t_min: float = ranged("[0, 1]", 0.0)
    start_seed: int | None = None

    def start_noise(self, horizon: int, dim: int) -> Tensor | None:
        """The calibrated start noise ``[H, D]``, if there is one."""
        if self.start_seed is None:
            return None
        first = np.array([self.start_seed]), np.zeros(1, np.int64)
        return torch.from_numpy(row_noise(*first, (1, horizon, dim))[0, 0])


@named_settings
@dataclass(frozen=True)
class PolicySpec:
    """Everything about a diffusion policy but its weights and normaliser: plain values.

    Stored as JSON.

    Args:
        obs_dim: O; of observations by name the sum of the vectors' sizes.
        action_dim: A.
        horizon: plan length H.
        n_obs_steps: To.
        n_action_steps: Ta.
        network: ``{"type": ..., sizes}`` for :func:`diffpolicy.networks.make_network`.
        process: for :func:`diffpolicy.core.make_process`.
        prediction: what the network outputs, see :class:`diffpolicy.core.Denoiser`; of
            ``"mean_velocity"`` it is wrapped so that it is told where a step leads.
        clip: clamp clean estimates to [-1, 1].
        cond_dropout: fraction of examples trained without their condition.
        level_law: noise levels of the training, see
            :class:`diffpolicy.learn.cloning.denoising.DenoisingLoss`.
        trained_action_steps: Ta of the training where the noise levels depended on it.
        trained_steps: the one number of steps that a student of progressive distillation draws
            plans in; None: any.
        sampler: how plans are drawn.
        truncated: draw every plan from guesses (anchors, ...) in place of pure noise.
        rti: how rows that have a plan of their episode are planned; ``None``: like the first one.
        actions: dimensions of the action that plans say in another way than the environment takes
            them: relative to the state, as rotations, by choice; see
            :class:`~diffpolicy.data.action_groups.ActionGroup`.
        grippers: action dimensions with two values.
        observation_step: the largest change of each observation entry between two steps that is
            usual in the demonstrations ``[O]`` (0.999 quantile), for ``rti.innovation``.
        action_low: lower bounds of actions in environment units ``[A]``, ``None`` for unbounded;
            rounded inwards to float32.
        action_high: upper bounds.
        layout: what a plan holds: ``"action"``; ``"trajectory"``, observations and actions, with
            the observations up to now pinned (Diffuser); ``"state"``, observations alone, with a
            head of type ``inverse`` for the actions (Decision Diffuser, Trajectory Diffuser); or
            ``"joint"``, ``imagined`` observations and actions, each at levels of its own (PAD).
        imagined: of layout ``"joint"``: the observations in plans, and whether they are drawn.
        goal: pairs (i, j): entry i of the last observation of a plan is pinned to entry j of the
            current observation.
        constant: entries of the observation that an episode does not change (a goal): known at
            every position of a plan.
        returns: condition plans on a return; not for layout ``"action"``.
        value_scale: guidance by the gradient of the head ``value``; 0: none.
        guidance: keep plans from costs; ``None``: there are none.
        temperature: factor of all noise, the prior's and the solver's; low-temperature sampling of
            Decision Diffuser.
        heads: further networks by name, as :func:`diffpolicy.networks.heads.make_head` takes them:
            ``inverse``, ``value``, ``critic``, ``state_value``, ``draft``.
        selection: choose among several plans by the head ``critic``, or else ``value``.
        observations: the arrays of an observation by name, whose order they are in; empty: one
            array of ``obs_dim``. The name ``""`` stands for a single image.
        encoder: ``{"type": ..., settings}`` for :func:`diffpolicy.networks.encoders.make_encoder`:
            from observations to the condition of network and critics; the type may be
            ``package.module:Class``. Default: ``images`` where there is one, else ``state``.
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
    level_law: str = "row"
    trained_action_steps: int | None = None
    trained_steps: int | None = None
    sampler: PolicySampler = field(default_factory=PolicySampler)
    truncated: Truncated | None = None
    rti: RTI | None = None
    actions: tuple[ActionGroup, ...] = ()
    grippers: tuple[Gripper, ...] = ()
    observation_step: tuple[float, ...] | None = None
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    layout: str = "action"
    imagined: Imagined | None = None
    goal: tuple[tuple[int, int], ...] = ()
    constant: tuple[int, ...] = ()
    returns: Returns | None = None
    value_scale: float = 0.0
    guidance: Costs | None = None
    temperature: float = 1.0
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    selection: Selection | None = None
    observations: Mapping[str, ObsField] = field(default_factory=dict)
    encoder: Mapping[str, Any] = field(default_factory=dict)
    env_id: str | None = None

    def __post_init__(self) -> None:
        check_horizon(self.horizon, self.n_obs_steps, self.n_action_steps)
        sampler: Sampler = self.sampler
        if not isinstance(sampler, PolicySampler):  # a plain one: without guidance
            object.__setattr__(self, "sampler", PolicySampler(**vars(sampler)))
        if self.sampler.guidance_scale != 1 and self.cond_dropout == 0:
            raise ValueError(
                f"guidance_scale={self.sampler.guidance_scale} needs a policy trained with "
                "cond_dropout > 0; this one was trained without"
            )
        object.__setattr__(self, "process", explicit_process(self.process))
        given = {name: config for name, config in self.heads.items() if config is not None}
        object.__setattr__(self, "heads", given)  # YAML takes a head away by setting it to null
        check_imagined(self)
        self._check_observations()
        self._check_sizes()
        self._round_bounds()
        self._check_parts()
        check_planning(self)
        check_direct(self)
        check_steps(self)

    def _check_observations(self) -> None:
        """Refuse what takes the observation as one vector where it has names or an encoder."""
        images = any(field.is_image for field in self.observations.values())
        usual = {"type": "images" if images else "state"}
        object.__setattr__(self, "encoder", {**usual, **(self.encoder or {})})
        encoder_class(self.encoder["type"])
        object.__setattr__(self, "observations", dict(sorted(self.observations.items())))
        total = sum(field.size for field in self.observations.values() if not field.is_image)
        if self.observations and self.obs_dim != total:
            raise ValueError(f"obs_dim must be {total}, all observations, got {self.obs_dim}")
        needed = {
            f"layout={self.layout!r}": self.plan_layout.pinned,
            "rti.innovation": self.rti is not None and self.rti.innovation is not None,
            "observation_step": self.observation_step is not None,
        }
        found = [name for name, used in needed.items() if used]
        other = self.encoder["type"] != "state" and self.plan_layout.pinned
        if found and (self.observations or other):
            names = ", ".join(name or "an image" for name in self.observations) or "one vector"
            raise ValueError(
                f"{', '.join(found)}: needs one vector as observation and the encoder 'state', "
                f"this policy has {names} and {self.encoder['type']!r}; leave it out"
                # Flattened images would be tens of thousands of floats.
                + ("" if images else ", or wrap it in gymnasium.wrappers.FlattenObservation")
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """``horizon``, ``n_obs_steps`` and ``n_action_steps``, by these names."""
        return {name: getattr(self, name) for name in SIZES}

    @property
    def observed(self) -> ObsFields:
        """What a step's observation is made of."""
        return self.observations.get("") or self.observations or ObsField((self.obs_dim,))

    def make_encoder(self) -> Encoder:
        """The encoder, with freshly initialised weights if it has any."""
        return make_encoder(self.encoder, self.observed, self.n_obs_steps)

    def _check_sizes(self) -> None:
        """Refuse what says something per action or per observation entry, but not of each."""
        t_start = None if self.rti is None else self.rti.t_start
        planned = "action_dim" if self.representation is None else "planned_dim"
        per_entry = {
            "action_low": (self.action_low, "action_dim"),
            "action_high": (self.action_high, "action_dim"),
            "rti.t_start": (t_start if isinstance(t_start, tuple) else None, planned),
            "observation_step": (self.observation_step, "obs_dim"),
        }
        for name, (values, size) in per_entry.items():
            if values is not None:
                check_shape(
                    f"{name} (one for each of {size})", (len(values),), (getattr(self, size),)
                )
        for gripper in self.grippers:
            check_range(f"[0, {self.action_dim})", **{"gripper.dim": gripper.dim})
        if self.representation is not None and (self.plan_layout.pinned or self.heads):
            raise ValueError(
                f"action groups (policy.actions, or those of a store whose actions choose) go with "
                f"layout 'action' or 'joint', and heads judge actions as data hold them; this "
                f"policy has layout={self.layout!r} and the heads {sorted(self.heads)}"
            )
        _ = self.planned_grippers  # of dimensions that plans say as they are

    def _round_bounds(self) -> None:
        checked_bounds(self.action_low, self.action_high)
        low, high = self.action_low, self.action_high
        inner, outer = inward_bounds(
            np.full(self.action_dim, -np.inf) if low is None else low,
            np.full(self.action_dim, np.inf) if high is None else high,
        )
        if low is not None:
            object.__setattr__(self, "action_low", tuple(inner.tolist()))
        if high is not None:
            object.__setattr__(self, "action_high", tuple(outer.tolist()))

    @property
    def representation(self) -> Representation | None:
        """Between actions and how plans say them; ``None``: plans hold actions as they are."""
        if not self.actions:
            return None
        sizes = self.action_dim, self.observed, self.n_obs_steps - 1
        made = Representation(self.actions, *sizes)
        return None if made.plain else made

    @property
    def whole(self) -> dict[int, str]:
        """NumPy's integer types of the action's dimensions that are whole numbers."""
        types = [g.whole or ("int64" if g.choices is not None else None) for g in self.actions]
        pairs = zip(self.actions, types, strict=True)
        return {dim: kind for group, kind in pairs if kind is not None for dim in group.dims}

    @property
    def planned_dim(self) -> int:
        """P, entries of a plan that say an action: ``action_dim`` without groups."""
        says = self.representation
        return self.action_dim if says is None else says.dim

    @property
    def planned_grippers(self) -> tuple[Gripper, ...]:
        """The grippers, by the entries of plans that they are.

        Raises:
            ValueError: one that plans say in another way.
        """
        says = self.representation
        if says is None:
            return self.grippers
        return tuple(replace(gripper, dim=says.entry(gripper.dim)) for gripper in self.grippers)

    @property
    def plan_layout(self) -> Layout:
        """The layout of plans with the sizes of this policy."""
        return Layout(
            self.layout,
            self.obs_dim,
            self.planned_dim,
            self.horizon,
            self.n_obs_steps,
            self.goal,
            self.constant,
            0 if self.imagined is None else self.imagined.dim(self.horizon),
        )

    def _check_parts(self) -> None:
        anchored = self.network.get("type") == "anchored"
        if anchored and (self.cond_dropout > 0 or self.level_law != "row"):
            raise ValueError(
                "a network of type 'anchored' is trained with its condition and one level per "
                "plan; cond_dropout must be 0 and level_law 'row'"
            )
        if self.rti is not None and self.truncated is not None:
            raise ValueError(
                "rti and truncated are two ways to start a plan; to combine them, set truncated "
                "with sources ('anchors', 'previous')"
            )
        if self.observation_step is None and self.rti is not None and self.rti.innovation:
            raise ValueError(
                "rti.innovation compares observations with the demonstrations' steps, which this "
                "policy does not hold; train it anew, or measure them with "
                "diffpolicy.policies.recorded.observation_step"
            )

    def to_config(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PolicySpec:
        """The inverse of :meth:`to_config`.

        Raises:
            ValueError: unknown or missing entries, or values of a wrong type.
        """
        process = explicit_process(config.get("process", "vp_cosine"))  # a name is enough
        actions = config.get("actions") or ()  # null, where nothing says of them
        return from_values(cls, {**config, "process": process, "actions": actions})

    def summary(self) -> str:
        """What a policy is in a line: shapes, network, how plans are drawn."""
        start = self.rti or self.truncated
        name = "rti" if self.rti is not None else "truncated"
        drawn = start or self.sampler
        level = "" if start is None else f", {name} t_start={start.t_start}"
        how = f"{self.process.get('type')}, {self.prediction}; "
        how += f"{drawn.solver} in {drawn.num_steps} steps{level}"
        named = [f"{name or 'image'} {list(f.shape)}" for name, f in self.observations.items()]
        return (
            f"obs {', '.join(named) or self.obs_dim} x {self.n_obs_steps}, action "
            f"{self.action_dim}, horizon {self.horizon}, executes {self.n_action_steps}; "
            f"{self.network.get('type')}, " + ("in one call" if direct_class(self) else how)
        )

    def make_denoiser(self) -> Denoiser:
        """A denoiser with freshly initialised weights."""
        layout = self.plan_layout
        encoder = None if layout.pinned else self.make_encoder()
        told = 0 if encoder is None else encoder.cond_dim
        returns = 2 if self.returns is not None else 0
        shape: dict[str, Any] = {"horizon": self.horizon, "dim": layout.dim}
        shape["cond_dim"] = told + returns
        if self.network.get("type") == "modalities":
            shape["sizes"] = [size for size in layout.parts if size]
        config = {**self.network, **shape}
        if self.prediction == "mean_velocity":
            config = {"type": "flow_map", "base": self.network, **shape}
        network, process = make_network(config), make_process(self.process)
        data_std = getattr(process, "data_std", 0.5)
        return Denoiser(
            network, process, self.prediction, clip=self.clip, data_std=data_std, encoder=encoder
        )

    def make_heads(self) -> nn.ModuleDict:
        """The heads, freshly initialised; sizes that a config leaves out are this policy's."""
        return nn.ModuleDict({n: make_head(head_config(self, c)) for n, c in self.heads.items()})


def check_normalizer(spec: PolicySpec, normalizer: Normalizer) -> None:
    """Raise ``ValueError`` unless the normaliser fits the policy's shapes and its clipping."""
    dims = {k: f.size for k, f in by_store_field(spec.observed).items() if not f.is_image}
    for name, dim in (dims | {"action": spec.planned_dim}).items():
        check_shape(f"the normaliser's field {name!r}", normalizer.shape(name), (dim,))
    held = {"trajectory": ("obs", "action"), "state": ("obs",)}.get(spec.layout, ("action",))
    held += () if spec.imagined is None else spec.imagined.vectors
    for name in held if spec.clip else ():
        if not normalizer.is_unit_range(name):
            raise ValueError(
                f"clip=True clamps clean plans to [-1, 1], but the normaliser of {name!r} does not "
                f"map the data into that range; use the 'minmax' mode for {name!r}, or clip=False"
            )
