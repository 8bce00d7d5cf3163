"""Solvers of masked sequences: which positions are revealed in a step, and how tokens are drawn.

They run in the same :func:`diffpolicy.core.sampling.sample` as all others. Tokens are drawn with
the loop's Gumbel noise: the argmax of ``log p + noise`` is a draw from ``p``, and
``softmax((log p + noise) / gumbel_temperature)`` its relaxation, through which a reward can be
back-propagated (Jang et al. 2017; DRAKES, Wang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffpolicy.core.denoiser import Denoised
from diffpolicy.core.masking import MaskingProcess, hard_one_hot
from diffpolicy.core.starts import Start, levels, prior_start
from diffpolicy.core.steps import Memory, Solver
from diffpolicy.settings import check_choice, check_range

BACKWARDS = ("gumbel", "probabilities", "reinmax")
KNOWN = -1  # the group of positions that no step reveals, because they are not masked


@dataclass(frozen=True)
class Relaxation:
    """How draws of tokens are made differentiable.

    Args:
        gumbel_temperature: of the Gumbel-softmax in the first relaxed step; 1 in DRAKES.
        final_temperature: of the last step; between the two it changes geometrically. ``None``:
            constant.
        relaxed_steps: how many of the last steps are relaxed, the ones before are hard; ``None``:
            all.
        straight_through: the state is the hard draw, and only its gradient a relaxed one.
        backward: with ``straight_through``, whose gradient: ``"gumbel"``, of the Gumbel-softmax
            (Jang et al. 2017); ``"probabilities"``, of the token probabilities at this temperature
            (Bengio et al. 2013), at temperature 1 the exact gradient of what is linear in that
            position with all else fixed; ``"reinmax"``, of second order (Liu et al. 2023, alg. 2).

    Raises:
        ValueError: values out of range.
    """

    gumbel_temperature: float = 1.0
    final_temperature: float | None = None
    relaxed_steps: int | None = None
    straight_through: bool = False
    backward: str = "gumbel"

    def __post_init__(self) -> None:
        check_range("(0, inf)", gumbel_temperature=self.gumbel_temperature)
        check_range("(0, inf)", final_temperature=self.final_temperature)
        check_range("[1, inf)", relaxed_steps=self.relaxed_steps)
        check_choice("backward", self.backward, BACKWARDS)
        if self.backward != "gumbel" and not self.straight_through:
            raise ValueError(f"backward={self.backward!r} needs straight_through=True")

    def gumbel_temperatures(self, num_steps: int) -> list[float | None]:
        """The temperature of every step; ``None`` where the draw is hard."""
        count = num_steps if self.relaxed_steps is None else min(self.relaxed_steps, num_steps)
        first = self.gumbel_temperature
        ratio = (self.final_temperature or first) / first
        soft = [first * ratio ** (i / max(1, count - 1)) for i in range(count)]
        return [None] * (num_steps - count) + soft

    def draw(self, log_p: Tensor, noise: Tensor, gumbel_temperature: float | None) -> Tensor:
        """A hard or relaxed draw from ``log_p [..., V]`` with Gumbel ``noise`` of its shape."""
        scores = log_p + noise
        if gumbel_temperature is None:
            return hard_one_hot(scores)
        if not self.straight_through:
            return (scores / gumbel_temperature).softmax(-1)
        hard = hard_one_hot(scores)
        return hard + _value_free(self._surrogate(log_p, scores, hard, gumbel_temperature))

    def _surrogate(
        self, log_p: Tensor, scores: Tensor, hard: Tensor, gumbel_temperature: float
    ) -> Tensor:
        if self.backward == "gumbel":
            return (scores / gumbel_temperature).softmax(-1)
        soft = (log_p / gumbel_temperature).softmax(-1)
        if self.backward == "probabilities":
            return soft
        # Impossible tokens (revealing is certain in the last step) stay impossible: -inf + inf.
        finite = log_p.clamp_min(-1e4)
        middle = (0.5 * (hard + soft)).detach().clamp_min(1e-30).log()
        tilted = (middle - finite.detach() + finite).softmax(-1)
        return 2 * tilted - 0.5 * finite.softmax(-1)


def _value_free(x: Tensor) -> Tensor:
    """Zero, with the gradient of ``x``."""
    return x - x.detach()


HARD = Relaxation()


@dataclass(frozen=True)
class RevealRow:
    """One step of a masked chain.

    Attributes:
        t: level of the state, host float64.
        reveal: probability that a masked position is revealed, broadcastable to the state.
        relaxation: how tokens are drawn.
        gumbel_temperature: of this step's draw; ``None``: hard.
        which: ``[B, L, 1]``, 1 where a position is revealed in this step; ``None``: drawn with the
            tokens.
    """

    t: Tensor
    reveal: Tensor
    relaxation: Relaxation
    gumbel_temperature: float | None
    which: Tensor | None = None
    stochastic: ClassVar[bool] = True

    def constants(self) -> list[Tensor]:
        """What the grid keeps on the device."""
        return [self.reveal]

    def with_constants(self, values: Sequence[Tensor]) -> RevealRow:
        """The same row holding ``values``."""
        return replace(self, reveal=values[0])

    def advance(
        self, memory: Memory, out: Denoised, noise: Tensor | None
    ) -> tuple[Memory, Tensor, None]:
        """The next state; also its law ``[B, L, V + 1]`` given this one."""
        assert noise is not None
        x, log_p = memory.x, out.aux["log_p"]
        tokens, mask = pad(x[..., :-1], (0, 1)), x[..., -1:]
        if self.which is None:
            stay = torch.log1p(-self.reveal).expand_as(mask)
            joint = torch.cat([log_p + self.reveal.log(), stay], dim=-1)
            drawn = self.relaxation.draw(joint, noise, self.gumbel_temperature)
            law = joint.detach().exp()
        else:
            drawn = self.relaxation.draw(log_p, noise[..., :-1], self.gumbel_temperature)
            drawn = pad(drawn, (0, 1))
            law = pad(log_p.detach().exp(), (0, 1))
        moved = torch.addcmul(tokens, mask, drawn)
        mean = torch.addcmul(tokens, mask, law)
        if self.which is not None:
            here = self.which.to(x.dtype)
            moved, mean = x + here * (moved - x), x + here * (mean - x)
        return Memory(moved, moved, ()), mean, None


@dataclass(frozen=True)
class Ancestral(Solver):
    """Ancestral sampling (MDLM): each step draws, per masked position, a token or to stay masked.

    Args:
        relaxation: ``None``: hard draws. With one, whether a position is revealed is relaxed
            together with its token, as in DRAKES.
    """

    relaxation: Relaxation | None = None
    name: ClassVar[str] = "ancestral"
    stochastic = True

    def rows(self, process: Any, levels: Tensor) -> list[Any]:
        return _rows(process, levels, self.relaxation, None)


@dataclass(frozen=True)
class Scheduled(Solver):
    """Reveals each position in a step drawn before the loop; only its token is drawn in it.

    The law of sequences is that of ancestral sampling, because masking does not look at tokens.

    Args:
        groups: int64 ``[B, L]``: the step (network evaluation, from 0) that reveals a position.
        relaxation: ``None``: hard draws.
    """

    groups: Tensor
    relaxation: Relaxation | None = None
    name: ClassVar[str] = "scheduled"
    stochastic = True

    def __post_init__(self) -> None:
        if self.groups.dim() != 2 or self.groups.is_floating_point():
            got = f"{self.groups.dtype} {tuple(self.groups.shape)}"
            raise ValueError(f"groups must be integers [B, L], as reveal_schedule's; got {got}")

    def rows(self, process: Any, levels: Tensor) -> list[Any]:
        return _rows(process, levels, self.relaxation, self.groups)


def _rows(
    process: Any, levels: Tensor, relaxation: Relaxation | None, groups: Tensor | None
) -> list[Any]:
    if not isinstance(process, MaskingProcess):
        kind = type(process).__name__
        raise ValueError(f"this solver reveals masked tokens; for {kind} use ddim, ddpm, ...")
    count = len(levels) - 1
    soft = [None] * count if relaxation is None else relaxation.gumbel_temperatures(count)
    how = HARD if relaxation is None else relaxation
    which = [None if groups is None else (groups == i).unsqueeze(-1) for i in range(count)]
    return [
        RevealRow(levels[i], process.reveal(levels[i], levels[i + 1]), how, soft[i], which[i])
        for i in range(count)
    ]


def reveal_schedule(
    process: MaskingProcess,
    levels: Tensor,
    masked: Tensor,
    generator: torch.Generator | None = None,
    *,
    compact: bool = False,
) -> tuple[Tensor, int]:
    """The step in which each masked position is revealed, drawn before sampling.

    Args:
        process: gives the law of reveal times.
        levels: host grid ``[K + 1, 1, 1, 1]``, or ``[K + 1, B, 1, 1]`` with levels per row.
        masked: bool ``[B, L]``, which positions of the start are masked.
        generator: on the device of ``masked``.
        compact: leave out, in each row, the steps that reveal nothing. Rows then advance on their
            own and need at most ``min(K, L)`` evaluations in place of K (MDLM caches the network's
            output to the same end). Right for time-free denoisers alone. All rows are done at the
            same step; those that need fewer wait at first, so the last steps, which a
            :class:`Relaxation` makes differentiable, are the last of every row.

    Returns:
        Groups ``[B, L]`` for :class:`Scheduled`, and the number of steps that they take. With
        ``compact`` it is read from the device. A position that a grid ending above 0 leaves masked
        is in the group of that number: no step reveals it.
    """
    count = len(levels) - 1
    left = process.mask_probability(levels.flatten(1))
    left = (left / left[0]).flip(0).T.contiguous().to(masked.device)  # [B or 1, K + 1], rising
    u = torch.rand(masked.shape, generator=generator, device=masked.device, dtype=torch.float64)
    # Revealed in step k where left[k + 1] < 1 - u <= left[k].
    steps = count - torch.searchsorted(left.expand(len(masked), -1).contiguous(), 1 - u)
    if not compact:
        return steps, count
    used = torch.zeros(len(masked), count + 1, dtype=torch.int32, device=masked.device)
    used.scatter_add_(1, steps, masked.int())
    rank = (used[:, :-1] > 0).cumsum(1)  # counted from 1
    total = max(1, int(rank.max().item()))
    groups = (rank + (total - 1 - rank[:, -1:])).gather(1, steps.clamp_max(count - 1))
    return torch.where(steps < count, groups.clamp_min(0), total), total


def reveals(
    process: MaskingProcess,
    start: Start,
    num_steps: int | None,
    *,
    time_free: bool,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """When each mask of ``start`` is revealed, and the grid that takes: for :class:`Scheduled`.

    Args:
        process: gives the law of reveal times.
        start: hard states ``[B, L, V + 1]`` and their level.
        num_steps: steps of the grid; ``None``: one position at a time, in random order.
        time_free: the denoiser does not look at the level. Rows then advance on their own, in at
            most ``min(num_steps, L)`` evaluations.
        generator: on the state's device, which is read for the number of evaluations.

    Returns:
        Groups ``[B, L]``, ``KNOWN`` where nothing is masked, and the host grid ``[K + 1, ...]``.

    Raises:
        ValueError: ``num_steps=None`` with a denoiser that depends on the level.
    """
    masked = start.x[..., -1] > 0.5
    if num_steps is None:
        if not time_free:
            raise ValueError("num_steps=None is for time_free denoisers; give one, such as 128")
        left = masked.sum(1, keepdim=True)
        count = max(1, int(left.max().item()))
        # Rows with fewer masks wait at first, so that all are done at the same step.
        groups = one_by_one(masked, generator) + (count - left)
        return torch.where(masked, groups, KNOWN), levels(start, count)
    grid = levels(start, num_steps)
    groups, count = reveal_schedule(process, grid, masked, generator, compact=time_free)
    return torch.where(masked, groups, KNOWN), levels(start, count)


def blank_start(
    process: MaskingProcess, like: Tensor, generator: torch.Generator | None = None
) -> Start:
    """Where chains of masked sequences ``like [B, L, V + 1]`` begin: masks, and what is known."""
    if process.random_prior:
        like = process.draw_noise(like.shape, generator, like)
    return prior_start(process, like)


def one_by_one(masked: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Groups ``[B, L]`` that reveal one position a step, in uniformly random order.

    The limit of infinitely many steps; exact for time-free denoisers. Positions that are not
    masked come last, so the number of steps needed is the largest number of masks in a row.
    """
    u = torch.rand(masked.shape, generator=generator, device=masked.device)
    return torch.where(masked, u, 2.0).argsort(1).argsort(1)
