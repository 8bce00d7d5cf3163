"""The whole sampling loop of a policy as one pure module: observations in, plan out.

Policies call it, runtimes compile it and exporters write it to a file; all of them see the same
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import AtLevel
from diffpolicy.core.sampler import Teleport
from diffpolicy.core.sampling import Trajectory, prepare, sample
from diffpolicy.core.starts import Start, warm_start
from diffpolicy.core.steps import Solver
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import ObsField, ObsFields, each
from diffpolicy.guidance.cost_guidance import CostCond
from diffpolicy.guidance.layout import Layout
from diffpolicy.guidance.pinned import PinCond
from diffpolicy.settings import check_choice, check_shape


class Loop(Protocol):
    """A sampling loop: a :class:`PlanLoop`, or a compiled form of one.

    Attributes:
        takes_encoded: it takes observations :class:`Encoded`.
    """

    takes_encoded: bool
    nfe: int
    draws: int
    horizon: int
    action_dim: int

    @property
    def condition(self) -> Callable[..., Any]:
        """Encodes observations."""

    def __call__(self, history: Any, guess: Tensor, noise: Tensor, /) -> Tensor:
        """Normalised plans ``[n, H, A]``."""


STARTS = ("prior", "noised", "given")


class Encoded(NamedTuple):
    """Observations that were encoded already, which eager loops take in their place.

    Attributes:
        cond: ``[n, C]``.
        seen: what costs look at, raw observations ``[n, To, ...]``; ``None``: there are none.
    """

    cond: Tensor
    seen: Any = None


def encoded(condition: Callable[..., Any], history: Any) -> Encoded:
    """Raw observations as what a loop's :class:`Condition` makes of them, without a plan's pins."""
    given = condition(history)
    return Encoded(*given) if isinstance(given, CostCond) else Encoded(given)


def repeated(history: Any, many: int) -> Any:
    """Every row of observations, encoded or not, ``many`` times in a row."""
    if isinstance(history, Encoded):
        seen = None if history.seen is None else repeated(history.seen, many)
        return Encoded(history.cond.repeat_interleave(many, 0), seen)
    return each(lambda one: one.repeat_interleave(many, 0), history)


class Condition(nn.Module):
    """What the denoiser is told: the normalised observation history, encoded.

    Args:
        normalizer: the policy's.
        encoder: the denoiser's; default: one array, flattened.
        fields: what is observed in a step; default: one vector.

    Attributes:
        pinned: it also tells what is known of the plan, as a ``PinCond``.
        guided: it also tells what costs look at, as a ``CostCond``.
    """

    pinned = guided = False

    def __init__(
        self,
        normalizer: Normalizer,
        encoder: nn.Module | None = None,
        fields: ObsFields | None = None,
    ) -> None:
        super().__init__()
        self.normalizer, self.fields = normalizer, fields
        self.encoder = nn.Flatten(1) if encoder is None else encoder

    def forward(self, history: Any, *known: Tensor) -> Any:
        """``cond`` for raw observations ``[n, To, ...]``, and what else a loop was given."""
        if isinstance(history, Encoded):
            return history.cond
        return self.encoder(self.normalizer.normalize_obs(history))

    def settled(self, plan: Tensor, given: Any) -> Tensor:
        """The plan ``[n, H, D]`` with what is known of it set exactly."""
        return plan


class GuidedCondition(Condition):
    """What another condition tells, and the raw observations that costs look at.

    Args:
        told: the other one.
    """

    guided = True

    def __init__(self, told: Condition) -> None:
        super().__init__(told.normalizer, told.encoder, told.fields)
        self.told, self.pinned = told, told.pinned

    def forward(self, history: Any, *known: Tensor) -> CostCond:
        """The other's condition, and what is observed."""
        seen = history.seen if isinstance(history, Encoded) else history
        return CostCond(self.told(history, *known), seen)

    def settled(self, plan: Tensor, given: CostCond) -> Tensor:
        return self.told.settled(plan, given.cond)


class PinnedCondition(Condition):
    """Plans that hold observations: the history is pinned in them, and so is a goal.

    Args:
        normalizer: the policy's.
        layout: what a plan holds.
        returns: the return that is asked for, as ``(1, normalised)``; empty: none.
    """

    known: Tensor
    wanted: Tensor | None
    pinned = True

    def __init__(self, normalizer: Normalizer, layout: Layout, returns: Sequence[float]) -> None:
        super().__init__(normalizer)
        self.layout = layout
        self.register_buffer("known", layout.known, persistent=False)
        self.register_buffer("wanted", torch.tensor(returns) if returns else None, persistent=False)

    def forward(self, history: Tensor, *known: Tensor) -> PinCond:
        """The pinned values and the condition beside them."""
        normal, goal = self.normalizer.normalize("obs", history), self.goal(history[:, -1])
        values = self.layout.values(normal, goal)
        wanted = None if self.wanted is None else self.wanted.to(values).expand(len(values), -1)
        return PinCond(wanted, values)

    def settled(self, plan: Tensor, given: PinCond) -> Tensor:
        """The plan with its known entries; solvers reach them to within rounding or noise."""
        return torch.where(self.known, given.values, plan)

    def goal(self, obs: Tensor) -> Tensor | None:
        """Normalised goal entries ``[n, G]`` for raw observations ``[n, O]``."""
        if not self.layout.goal:
            return None
        moved = obs.clone()  # goal entries in the places whose normalisation they get
        for target, source in self.layout.goal:
            moved[:, target] = obs[:, source]
        normal = self.normalizer.normalize("obs", moved)
        # One by one: a list as index would be copied to the device, which no CUDA graph records.
        return torch.stack([normal[:, target] for target, _ in self.layout.goal], 1)


class PlanLoop(nn.Module):
    """K steps of one solver over a fixed grid of levels.

    Args:
        denoiser: maps noisy to clean plans (guidance included).
        normalizer: the policy's, with a field ``obs``.
        solver: of :mod:`diffpolicy.core.solvers`.
        levels: host grid ``[K + 1, 1, 1 or H, 1 or A]``, the first entry the start's level.
        start: where sampling begins: ``"prior"`` from noise alone, ``"noised"`` from the guess
            noised to the first level (truncated, warm), ``"given"`` from the guess as it is.
        plan_shape: ``(To, O, H, D)``; D = A unless ``condition`` says that plans hold more.
        temperature: factor of all noise.
        start_noise: standard normal ``[H, D]`` that a prior start always begins with, in place of
            the noise it is given.
        teleport: where a prior start leads at no cost; its level is the first.
        condition: from raw observations to what the denoiser takes; default :class:`Condition`.

    Attributes:
        nfe: network evaluations K.
        draws: R, slices of noise that :meth:`forward` needs.
        fields: what is observed in a step.
        takes_encoded: it takes observations :class:`Encoded`.
        uses_guess: whether the guess matters.

    Raises:
        ValueError: an unknown start, or levels that the network cannot take.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        normalizer: Normalizer,
        solver: Solver,
        levels: Tensor,
        *,
        start: str,
        plan_shape: tuple[int, int, int, int],
        condition: Condition | None = None,
        temperature: float = 1.0,
        start_noise: Tensor | None = None,
        teleport: Teleport | None = None,
    ) -> None:
        super().__init__()
        check_choice("start", start, STARTS)
        n_obs_steps, obs_dim, self.horizon, self.action_dim = plan_shape
        self.obs_shape = (n_obs_steps, obs_dim)
        self.denoiser, self.normalizer, self.solver = denoiser, normalizer, solver
        self.start, self.levels, self.temperature = start, levels, temperature
        self.condition = Condition(normalizer) if condition is None else condition
        self.fields = self.condition.fields or ObsField((obs_dim,))
        self.takes_encoded = not self.condition.pinned
        parameter = next(denoiser.parameters(), torch.zeros(1))
        shape = (1, self.horizon, self.action_dim)
        like = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        with torch.no_grad():
            self.grid = prepare(denoiser, solver, levels, like)
            self.noising = AtLevel(denoiser.process, levels[0], like)
        self.nfe = self.grid.nfe
        self.start_noise = None if start_noise is None else start_noise.to(like)
        self.teleport, self.jump = teleport, None
        if teleport is not None:
            check_shape("teleport.mean", (len(teleport.mean), len(teleport.mean[0])), shape[1:])
            self.jump = [v.to(like) for v in teleport.map(denoiser.process)]
        drawn = start != "given" and start_noise is None
        self.draws = drawn + (self.nfe if self.grid.stochastic else 0)
        self.uses_guess = start != "prior"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.noising.device

    def forward(self, history: Any, guess: Tensor, noise: Tensor, *known: Tensor) -> Tensor:
        """One plan per row.

        Args:
            history: raw observations ``[n, To, O]``, such tensors by name, or :class:`Encoded`.
            guess: normalised clean guess ``[n, H, A]`` (ignored by a prior start).
            noise: standard normal ``[R, n, H, A]``.
            known: what the loop's condition takes beside the observations.

        Returns:
            Normalised plans ``[n, H, A]``.
        """
        x0 = self._sample(self.condition(history, *known), guess, noise, record=False)
        assert isinstance(x0, Tensor)
        return x0

    def with_confidence(self, history: Any, guess: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Plans, and the logit ``[n]`` that a network with that head gave each in the last step.

        Raises:
            ValueError: a network without a confidence head.
        """
        result = self._sample(self.condition(history), guess, noise, record=True)
        assert isinstance(result, Trajectory)
        aux = result.transitions[-1].denoised.aux
        if "confidence" not in aux:
            raise ValueError("this network has no confidence head; one of type 'anchored' has")
        return result.x0, aux["confidence"]

    def _sample(
        self, given: Any, guess: Tensor, noise: Tensor, *, record: bool
    ) -> Tensor | Trajectory:
        noise = self.tempered(noise)
        result = sample(
            self.denoiser,
            self.solver,
            self.begin(guess, noise),
            self.grid,
            cond=given,
            noise=noise[self.draws - self.nfe :] if self.grid.stochastic else None,
            record=record,
        )
        if isinstance(result, Trajectory):
            return result._replace(x0=self.condition.settled(result.x0, given))
        return self.condition.settled(result, given)

    def tempered(self, noise: Tensor) -> Tensor:
        """The noise with the standard deviation that this loop samples with."""
        return noise if self.temperature == 1 else self.temperature * noise

    def begin(self, guess: Tensor, noise: Tensor) -> Start:
        """The start made of a guess and the first slice of noise."""
        t = self.levels[0]
        if self.start == "prior":
            own = self.start_noise  # the same for each row, of which there are as many as guesses
            first = noise[0] if own is None else self.tempered(own).expand(guess.shape[0], -1, -1)
            if self.jump is not None:
                return Start(torch.addcmul(self.jump[1], self.jump[0], first), t)
            return Start(self.noising.prior(first), t)
        if self.start == "given":
            return warm_start(self.noising, guess, t, guess, shift=0, renoise=False)
        return warm_start(self.noising, guess, t, noise[0], shift=0)  # shifted by its policy
