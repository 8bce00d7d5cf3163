"""Demonstrations beside a policy's own draws, at the same levels: what Diffusion-DRO contrasts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.processes import DiscreteVP
from diffpolicy.core.sampling import Trajectory, sample
from diffpolicy.core.starts import Start
from diffpolicy.learn.preferences.few_step import FewStep, evaluating
from diffpolicy.learn.reward.rollouts import draw_order, run_order

if TYPE_CHECKING:
    from diffpolicy.learn.preferences.dro import DRO

LOWEST = 1e-3  # level of a jittered chain; the noise of a lower one cannot be told from the plan


class Contrast(NamedTuple):
    """What a batch comes down to: N demonstrations and N negatives, at the same levels.

    Attributes:
        x: states ``[2 N, H, D]``, or tokens ``[2 N, L]`` with masks; demonstrations first.
        t: levels ``[2 N, 1, 1]``.
        target: of the network ``[2 N, H, D]``; of sequences log-probabilities of tokens
            ``[2 N, L, V]``, those of given tokens 0 and ``-inf``.
        cond: ``[2 N, C]``, or None.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    cond: Tensor | None

    @classmethod
    def of(cls, x: Tensor, t: Tensor, target: Tensor, cond: Tensor | None) -> Contrast:
        """Both from states and targets ``[2, N, ...]``, the levels and condition of either."""
        twice = None if cond is None else torch.cat([cond, cond])
        return cls(x.flatten(0, 1), torch.cat([t, t]), target.flatten(0, 1), twice)

    def demonstrations(self) -> Contrast:
        """The first half."""
        return Contrast(*(None if v is None else v.chunk(2)[0] for v in self))  # type: ignore[arg-type]


@torch.no_grad()
def contrast_plans(
    policy: Denoiser, settings: DRO, x0: Tensor, cond: Tensor | None, generator: torch.Generator
) -> Contrast:
    """States of one chain of a policy per demonstration, and the demonstrations noised to match.

    Args:
        policy: who draws, and whose predictions are the targets.
        settings: the sampler, of one evaluation a step, and which states of its chains.
        x0: demonstrations ``[B, H, D]``.
        cond: ``[B, C]``, of both.
        generator: of levels, noise and chains.

    Returns:
        ``N = B settings.states`` of each.
    """
    process = policy.process
    if settings.jitter and settings.num_steps != 1:
        grid = jittered_levels(process, settings, len(x0), generator)
    else:
        grid = settings.grid(process).expand(-1, len(x0), 1, 1)
    start = Start(process.prior(process.draw_noise(x0.shape, generator, x0)), grid[0])
    chain = policy, settings.make(), start, grid
    with evaluating(policy):
        path = sample(*chain, cond=cond, generator=generator, record=True)
    assert isinstance(path, Trajectory)
    first = torch.zeros(len(x0), device=x0.device)
    rows, at = _places(first, len(path.transitions), settings.states, generator)
    t = grid[:-1].to(x0.device, x0.dtype)[at, rows]
    x0, cond = x0[rows], None if cond is None else cond[rows]
    noise = process.draw_noise(x0.shape, generator, x0)
    x = process.add_noise(x0, t, noise)
    if settings.negative == "noised":  # the chain's end, noised as the demonstration is
        end = path.x0[rows]
        other = process.add_noise(end, t, noise)
        goal = policy.target(end, noise, t)
    else:
        other = torch.stack([row.x for row in path.transitions])[at, rows]
        with evaluating(policy):
            goal = policy.raw(other, t, cond)
    target = torch.stack([policy.target(x0, noise, t), goal])
    return Contrast.of(torch.stack([x, other]), t, target, cond)


def jittered_levels(
    process: GaussianProcess, sampler: FewStep, size: int, generator: torch.Generator
) -> Tensor:
    """Levels ``[K + 1, size, 1, 1]`` of chains that together visit all, float64 on the host.

    One of the K evaluations is at t = 1, and one in each of the K - 1 steps below it, everywhere at
    the same uniformly drawn share of the step.
    """
    assert sampler.num_steps is not None
    base = sampler.grid(process, num_steps=sampler.num_steps - 1)
    u = torch.rand(size, 1, 1, generator=generator, device=generator.device)
    inner = process.snap(torch.lerp(base[:-1], base[1:], u.to("cpu", torch.float64)))
    low = 1 / len(process.betas) if isinstance(process, DiscreteVP) else LOWEST
    top, end = (v.expand(1, size, 1, 1) for v in (base[0], base[-1]))
    return torch.cat([top, inner.clamp_min(low), end])


@torch.no_grad()
def contrast_sequences(
    policy: MaskedDenoiser,
    settings: DRO,
    tokens: Tensor,
    cond: Tensor | None,
    generator: torch.Generator,
) -> Contrast:
    """States of one chain of a policy per demonstration, and the demonstrations masked likewise.

    Args:
        policy: who draws.
        settings: how, and which states of its chains. ``negative="noised"`` is the end of a chain,
            masked anew and as the demonstration is; the targets are its tokens, in place of the
            policy's probabilities.
        tokens: demonstrations ``[B, L]``.
        cond: ``[B, C]``, of both.
        generator: of orders and chains.

    Returns:
        ``N = B settings.states`` of each.
    """
    noised, new = settings.negative == "noised", (policy, len(tokens), settings.num_steps)
    order = draw_order(*new, generator)
    with evaluating(policy):
        path, _ = run_order(policy, order, cond=cond, generator=generator)
    if noised:  # what was drawn may depend on the order of its reveals; demonstrations cannot
        order = draw_order(*new, generator)
    groups, levels = order
    # Rows that advance on their own wait, all masked, at first.
    rows, at = _places(groups.amin(1), len(levels) - 1, settings.states, generator)
    masks = groups[rows] >= at.unsqueeze(1)
    dtype = policy.weight.dtype
    t = levels[:-1].flatten().to(tokens.device, dtype)[at].view(-1, 1, 1)
    clean = torch.stack([tokens, path.tokens])[:, rows]
    x = torch.where(masks, policy.mask_id, clean)
    target = torch.nn.functional.one_hot(clean, policy.vocab_size).to(dtype).log()
    cond = None if cond is None else cond[rows]
    if not noised:
        with evaluating(policy):
            target[1] = policy.log_probs(x[1], t, cond)
    return Contrast.of(x, t, target, cond)


def _places(first: Tensor, count: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` steps of each row, from its ``first [B]`` to the last: rows and steps ``[B n]``."""
    device = generator.device
    u = torch.rand(len(first), n, generator=generator, device=device)
    share = (u + torch.arange(n, device=device)) / n
    first = first.to(device).unsqueeze(1)
    at = (first + share * (count - first)).long().clamp(max=count - 1)
    rows = torch.arange(len(first), device=device).repeat_interleave(n)
    return rows, at.flatten()
