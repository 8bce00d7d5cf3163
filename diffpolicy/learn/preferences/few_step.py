"""Moves of few-step samplers: drawn, or bridged to given items, and their log-probabilities.

A chain of K steps is a policy of K moves. Losses on these moves change the sampler that is used,
at its own levels and nowhere else, which keeps its few-step ability.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.sampling import Trajectory, sample
from diffpolicy.core.solvers import DDIM
from diffpolicy.core.starts import prior_start
from diffpolicy.core.steps import Row
from diffpolicy.learn.preferences.items import Items
from diffpolicy.learn.reward.rollouts import (
    MaskedRollout,
    at_reveal,
    check_steps,
    draw_order,
    run_order,
    state_log_probs,
)

Order = tuple[Tensor, Tensor]  # when positions are revealed, and the grid
LOG_ROOT_2PI = 0.9189385332046727  # log sqrt(2 pi)


@dataclass(frozen=True, kw_only=True)
class FewStep(Sampler):
    """A sampler from pure noise, from plain values.

    Args:
        num_steps: K, its network evaluations. Of masked sequences None reveals one position at a
            time.
        solver: of plans; as ``options`` and ``spacing``, see :class:`diffpolicy.core.Sampler`.

    Raises:
        ValueError: values out of range, unknown names.
    """

    num_steps: int | None = 4  # type: ignore[assignment]  # None: not of plans
    solver: str = "ddpm"

    def check_plans(self) -> None:
        """Raise ``ValueError`` unless this samples plans."""
        if self.num_steps is None:
            raise ValueError("num_steps=None is of masked tokens; of plans give num_steps=K")


class Moves(NamedTuple):
    """What a chain's log-probability is, step by step.

    Attributes:
        log_p: ``[B, K]``, of every step, summed over the scored entries of an item.
        entries: ``[B, K]``, how many entries that is: numbers of plans, tokens of sequences.
    """

    log_p: Tensor
    entries: Tensor


class PlanPaths(NamedTuple):
    """Chains of plans, of every step that adds noise.

    Attributes:
        x: states before a step, ``[K, N, H, D]``.
        x_next: states after it.
        items: to which the N rows belong; ``x0`` is the end of their chain.
    """

    x: Tensor
    x_next: Tensor
    items: Items


class PlanSteps:
    """The steps of a few-step sampler of plans that have a density: ``N(a x + b x0_hat, std^2)``.

    The last one, to clean, adds no noise and is left out.

    Args:
        process: of the denoisers that are compared.
        sampler: ``ddpm``, or ``ddim`` with ``eta`` above 0.

    Raises:
        ValueError: a sampler whose steps have no density, or none but the last.
    """

    def __init__(self, process: GaussianProcess, sampler: FewStep) -> None:
        sampler.check_plans()
        self.solver = sampler.make()
        if not (isinstance(self.solver, DDIM) and self.solver.stochastic):
            raise ValueError(
                f"steps of solver={sampler.solver!r} have no density: they add no noise, or have a "
                "memory; use solver='ddpm', or 'ddim' with options={'eta': 1.0}"
            )
        self.levels = sampler.grid(process)
        rows = self.solver.rows(process, self.levels)
        self.rows = [row for row in rows if row.g is not None and bool((row.g > 0).all())]
        if not self.rows:
            raise ValueError("the step to clean has no density; give num_steps of at least 2")
        self.process, self.nfe = process, len(rows)
        self._std = [cast("Tensor", row.g) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def draw(
        self,
        denoiser: BaseDenoiser,
        start: Tensor,
        generator: torch.Generator,
        *,
        cond: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> PlanPaths:
        """Run the sampler from standard normal ``start [N, H, D]``.

        ``cond [N, C]`` is the condition, bool ``steps [N, H]`` says which positions are scored.
        """
        noise = self.process.draw_noise((self.nfe, *start.shape), generator, start)
        chain = self.solver, prior_start(self.process, start), self.levels
        with evaluating(denoiser):
            path = sample(denoiser, *chain, cond=cond, noise=noise, record=True)
        assert isinstance(path, Trajectory)
        taken = path.transitions[: len(self)]
        x, after = torch.stack([row.x for row in taken]), torch.stack([row.x_next for row in taken])
        return PlanPaths(x, after, rows_alone(path.x0, cond, steps))

    def bridge(self, items: Items, noise: Tensor) -> PlanPaths:
        """Chains that end in given plans: the sampler's, if its ``x0_hat`` were their ``x0``.

        ``x`` at t = 1 is ``x0`` noised; each next state is drawn from the forward process given the
        one before and ``x0``, ``q(x_s | x_t, x0)`` (Song et al. 2021, eq. 7 with the sampler's
        ``eta``), so that every state has the forward law ``N(alpha x0, sigma^2)``.

        Args:
            items: N rows.
            noise: standard normal ``[K, N, H, D]``, K being ``len(self) + 1``.
        """
        x0 = items.x0
        top = self.levels[0].to(x0.device, x0.dtype)
        states = [self.process.add_noise(x0, top, noise[0])]
        for i, row in enumerate(self.rows):
            x = states[-1]
            states.append(_mean(row, x, x0) + self._bridge_std(i).to(x) * noise[i + 1])
        return PlanPaths(torch.stack(states[:-1]), torch.stack(states[1:]), items)

    def log_prob(self, denoiser: BaseDenoiser, paths: PlanPaths) -> Moves:
        """Of all steps as one batch; differentiable with respect to the denoiser alone."""
        items, count = paths.items, len(self)
        x, size = paths.x, len(items.x0)
        t = torch.stack([row.t for row in self.rows]).to(x.device)  # float64: schedules are exact
        t = t.expand(count, size, 1, 1).reshape(-1, 1, 1)
        cond = None if items.cond is None else items.cond.repeat(count, 1)
        x0_hat = denoiser(x.flatten(0, 1), t, cond).x0_hat.view_as(x)
        mean = torch.stack([_mean(row, x[i], x0_hat[i]) for i, row in enumerate(self.rows)])
        std = torch.stack(self._std).to(x)
        z = (paths.x_next - mean) / std
        each = (-0.5 * z.square() - std.log() - LOG_ROOT_2PI).sum(-1)
        if items.steps is not None:
            each = torch.where(items.steps, each, 0.0)
        log_p = torch.stack([items.total(step) for step in each.sum(-1)], dim=1)
        return Moves(log_p, items.entries().to(log_p).unsqueeze(1).expand(-1, count))

    def take(self, paths: PlanPaths, rows: Tensor) -> PlanPaths:
        """Some of the chains, each an item of its own."""
        items = paths.items
        cond, steps = (None if v is None else v[rows] for v in (items.cond, items.steps))
        chosen = rows_alone(items.x0[rows], cond, steps)
        return PlanPaths(paths.x[:, rows], paths.x_next[:, rows], chosen)

    def _bridge_std(self, i: int) -> Tensor:
        """What noise brings ``a x_t`` to the forward law; the sampler's own for small variance."""
        row = self.rows[i]
        before, after = self.process.sigma(row.t), self.process.sigma(self.levels[i + 1])
        return (after.square() - (row.a * before).square()).clamp_min(0).sqrt()


class MaskedSteps:
    """The steps of a masked sampler: which tokens its reveals draw.

    The order of reveals does not look at tokens, so its probability cancels in ratios and is left
    out.

    Args:
        denoiser: tells sizes and whether rows may advance on their own.
        sampler: its ``num_steps``.

    Raises:
        ValueError: ``num_steps=None`` with a denoiser that depends on the level.
    """

    def __init__(self, denoiser: MaskedDenoiser, sampler: FewStep) -> None:
        check_steps(denoiser, sampler.num_steps)
        self.vocab_size, self.num_steps = denoiser.vocab_size, sampler.num_steps

    def shared(self, denoiser: MaskedDenoiser, size: int, generator: torch.Generator) -> Order:
        """When each position is revealed, and the grid: the same of both halves of 2 ``size``."""
        groups, grid = draw_order(denoiser, size, self.num_steps, generator)
        return groups.repeat(2, 1), grid

    @torch.no_grad()
    def draw(
        self, denoiser: MaskedDenoiser, order: Order, generator: torch.Generator, *, cond: Any
    ) -> MaskedRollout:
        """Run the sampler in a given order; ``log_p`` is that of the reveals, without a graph."""
        with evaluating(denoiser):
            return run_order(denoiser, order, cond=cond, generator=generator)[0]

    def bridge(self, items: Items, order: Order) -> MaskedRollout:
        """Chains that end in given sequences; nobody drew them, so ``log_p`` is empty."""
        groups, grid = order
        nothing, sizes = items.x0.new_empty(0), (len(grid) - 1, grid, self.vocab_size)
        return MaskedRollout(items.x0, groups, *sizes, nothing, items.cond)

    def log_prob(self, denoiser: MaskedDenoiser, rollout: MaskedRollout) -> Moves:
        """Of all steps as one batch."""
        log_p = at_reveal(state_log_probs(denoiser, rollout), rollout)
        zero = log_p.new_zeros(len(log_p), rollout.nfe)
        entries = zero.scatter_add(1, rollout.groups, torch.ones_like(log_p))
        return Moves(zero.scatter_add(1, rollout.groups, log_p), entries)

    def take(self, rollout: MaskedRollout, rows: Tensor) -> MaskedRollout:
        """Some of the chains; ``log_p`` is that of all."""
        cond = None if rollout.cond is None else rollout.cond[rows]
        tokens, groups = rollout.tokens[rows], rollout.groups[rows]
        return rollout._replace(tokens=tokens, groups=groups, cond=cond)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block: a chain is drawn from the policy, not from its dropout."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def rows_alone(x0: Tensor, cond: Tensor | None, steps: Tensor | None) -> Items:
    """Items of one row each."""
    return Items(x0, cond, steps, torch.arange(len(x0), device=x0.device), len(x0))


def _mean(row: Row, x: Tensor, x0_hat: Tensor) -> Tensor:
    """Of the next state."""
    return row.a.to(x) * x + row.b[0].to(x) * x0_hat
