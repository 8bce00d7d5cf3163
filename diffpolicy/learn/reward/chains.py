"""Sampling chains that a reward is back-propagated through, with their divergence to a reference.

A chain's law of paths factorises over its steps, so its divergence is the sum of those of the
steps' kernels, each in closed form, in expectation over the states visited. It bounds that of the
final samples.

One driver for all: the first steps run without a graph, the last ones with. The divergence's
gradient in the first steps is taken step by step, so that no two of their graphs exist at a time,
and the log-probabilities it needs are those that sampling computed anyway. Where the network does
not look at the level, equal states are evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as checkpointed

from diffpolicy.core.denoiser import BaseDenoiser, Denoised
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import MaskingProcess
from diffpolicy.core.reveal import RevealRow
from diffpolicy.core.sampling import Grid, Trajectory, prepare, sample
from diffpolicy.core.starts import Start
from diffpolicy.core.steps import Memory, Row, Solver
from diffpolicy.learn.reference import dropout_of


class ChainResult(NamedTuple):
    """The end of a chain, with a graph, and its path divergence.

    Attributes:
        x0: ``[B, H, D]``.
        kl: ``[B]``; its gradient is right for losses that weigh all examples equally.
        reference_nfe: evaluations of the reference.
    """

    x0: Tensor
    kl: Tensor
    reference_nfe: int


def differentiable_chain(
    denoiser: BaseDenoiser, solver: Solver, start: Start, levels: Tensor | Grid, **how: Any
) -> Tensor:
    """The end of a chain; ``how`` are further arguments of :func:`~diffpolicy.core.sample`."""
    x0 = sample(denoiser, solver, start, levels, **how)
    assert isinstance(x0, Tensor)
    return x0


def chain_with_kl(
    denoiser: BaseDenoiser,
    reference: BaseDenoiser | None,
    solver: Solver,
    start: Start,
    levels: Tensor,
    *,
    step_kl: StepKL,
    noise: Tensor | None,
    cond: Tensor | None = None,
    grad_steps: int | None = None,
    kl_steps: Sequence[int] | None = None,
    checkpoint: bool = False,
    reference_graph: bool = True,
) -> ChainResult:
    """Run a chain and its divergence to ``reference``, both differentiable.

    The gradient of the divergence is right for losses that weigh all examples equally. In the steps
    before the graph it is that of each step in the states that were visited, and leaves out that
    other weights would visit others.

    Args:
        denoiser: what is tuned.
        reference: frozen; ``None``: the divergence is 0, and any solver will do.
        solver: stochastic, with one evaluation a step and no memory (ddpm, ancestral, scheduled).
        start: where the chain begins.
        levels: host grid ``[K + 1, ...]``.
        step_kl: the divergence of one step's kernel.
        noise: of all steps ``[K, B, H, D]``.
        cond: ``[B, C]``.
        grad_steps: k, how many of the last steps carry a graph; ``None``: all.
        kl_steps: of which steps the divergence is taken, scaled up to all of them; ``None``: all.
        checkpoint: recompute the steps with a graph in the backward pass.
        reference_graph: in steps with a graph, differentiate the reference by its input as well;
            without it the gradient lacks that term, and costs less.
    """
    if reference is None:
        how: dict[str, Any] = {"grad_steps": grad_steps, "checkpoint": checkpoint}
        x0 = differentiable_chain(denoiser, solver, start, levels, cond=cond, noise=noise, **how)
        return ChainResult(x0, x0.new_zeros(len(x0)), 0)
    assert noise is not None
    grid = prepare(denoiser, solver, levels, start.x)
    with torch.no_grad():
        theirs = prepare(reference, solver, levels, start.x)
    count = grid.nfe
    split = 0 if grad_steps is None else max(0, count - grad_steps)
    chosen = frozenset(range(count) if kl_steps is None else kl_steps)
    scale = count / max(1, len(chosen))
    meter = _Meter(denoiser, grid, theirs, step_kl, chosen)
    x = start.x
    with torch.no_grad():
        if split and chosen.issuperset(range(split)) and _reusable(meter, split, reference, x):
            x = _run_rows_alone(meter, x, noise[:split], cond)
        elif split:
            first = grid.part(0, split, meter)
            begin = Start(x, first.levels[0])
            x = differentiable_chain(denoiser, solver, begin, first, cond=cond, noise=noise[:split])
    kl = meter.total(x) * scale
    part = grid.part(split, count)
    begin, how = Start(x, part.levels[0]), {"noise": noise[split:], "checkpoint": checkpoint}
    trajectory = sample(denoiser, solver, begin, part, cond=cond, record=True, **how)
    assert isinstance(trajectory, Trajectory)
    for i, step in enumerate(trajectory.transitions, start=split):
        if i in chosen:
            answer = _reference_answer(theirs, (i, step.x, cond), reference_graph, checkpoint)
            kl = kl + scale * step_kl(grid.rows[i], step.x, step.denoised, answer)
    return ChainResult(trajectory.x0, kl, len(chosen))


def _reference_answer(
    grid: Grid, inputs: tuple[Any, ...], with_graph: bool, checkpoint: bool
) -> Denoised:
    if with_graph and checkpoint:
        return cast("Denoised", checkpointed(grid.denoise, *inputs, use_reentrant=False))
    with torch.set_grad_enabled(with_graph):
        return grid.denoise(*inputs)


@dataclass(eq=False)
class _Meter:
    """A denoiser on a grid whose divergence, and its gradient, are taken at every call."""

    denoiser: nn.Module
    grid: Grid
    theirs: Grid
    step_kl: StepKL
    chosen: frozenset[int]

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.value: Tensor | None = None

    def __call__(self, row: int, x: Tensor, cond: Any) -> Denoised:
        if row not in self.chosen:
            return self.grid.denoise(row, x, cond)
        answer = self.theirs.denoise(row, x, cond)
        with torch.enable_grad():
            out = self.grid.denoise(row, x, cond)
            kl = self.step_kl(self.grid.rows[row], x, out, answer)
        self.charge(kl)
        self.value = _sum(self.value, kl.detach())
        return Denoised(out.x0_hat.detach(), {k: v.detach() for k, v in out.aux.items()})

    def charge(self, kl: Tensor) -> None:
        """Add the gradient of ``kl [B]`` to those so far."""
        # What the steps share (time embeddings) is needed again; the rest goes with `kl`.
        new = torch.autograd.grad(
            kl, self.parameters, torch.ones_like(kl), retain_graph=True, allow_unused=True
        )
        self.gradients = [_sum(a, b) for a, b in zip(self.gradients, new, strict=True)]

    def total(self, x: Tensor) -> Tensor:
        """The divergence so far ``[B]``, which hands its gradient on in the backward pass."""
        if self.value is None:
            return x.new_zeros(len(x))
        carried: Tensor
        carried = _Carried.apply(self.value, self.gradients, *self.parameters)  # type: ignore[no-untyped-call]
        return carried


def _reusable(meter: _Meter, split: int, reference: BaseDenoiser, x: Tensor) -> bool:
    """Whether answers depend on hard states alone in the first ``split`` steps."""
    for denoiser in (meter.denoiser, reference):
        if not (isinstance(denoiser, MaskedDenoiser) and denoiser.time_free):
            return False
    rows: list[Any] = meter.grid.rows[:split]
    hard = all(r.which is None and r.gumbel_temperature is None for r in rows)
    if not hard or meter.step_kl is not masked_step_kl or _has_dropout(meter.denoiser):
        return False
    return bool((x.amax(-1) == 1).all())


def _has_dropout(denoiser: nn.Module) -> bool:
    """Whether two evaluations of a state differ."""
    return any(module.training and dropout_of(module) > 0 for module in denoiser.modules())


def _run_rows_alone(meter: _Meter, x: Tensor, noise: Tensor, cond: Tensor | None) -> Tensor:
    """The first steps ``[S, B, L, D]`` of ancestral sampling, without evaluations that repeat.

    Each row advances on its own, as far as nothing is revealed in it: its answer stays what it was.
    Without a condition, rows in equal states (all masks, at first) share one evaluation. Draws and
    divergence are those of all rows in step.
    """
    x, count, rows = x.clone(), len(noise), cast("list[RevealRow]", meter.grid.rows)
    reveal = torch.stack([row.reveal.expand(len(x), 1, 1) for row in rows[:count]])
    step = torch.zeros(len(x), dtype=torch.long, device=x.device)
    while len(active := (step < count).nonzero().squeeze(1)):
        here = x[active]
        first, which = _distinct(here, shared=cond is None)
        given = None if cond is None else cond[active]
        answer = meter.theirs.denoise(0, here[first], given)
        with torch.enable_grad():
            out = meter.grid.denoise(0, here[first], given)
        known = _taken(out, which, detach=True)
        x = x.to(torch.promote_types(x.dtype, known.x0_hat.dtype))
        weight = x.new_zeros(len(active), 1, 1)
        waiting = torch.arange(len(active), device=x.device)
        while len(waiting):
            index = active[waiting]
            k = step[index]
            row = replace(rows[0], reveal=reveal[k, index])
            memory = Memory(here[waiting], here[waiting], ())
            (moved, _, _), _, _ = row.advance(memory, _taken(known, waiting), noise[k, index])
            x[index] = moved
            weight[waiting] += row.reveal
            step[index] += 1
            still = (moved[..., -1] == here[waiting, :, -1]).all(1) & (k + 1 < count)
            waiting = waiting[still]
        with torch.enable_grad():
            summed = replace(rows[0], reveal=weight)
            kl = meter.step_kl(summed, here, _taken(out, which), _taken(answer, which))
        meter.charge(kl)
        meter.value = x.new_zeros(len(x)) if meter.value is None else meter.value
        meter.value[active] += kl.detach()
        del out, kl  # their graph, before the next one is made
    return x


def _distinct(x: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """One row of each different state ``x [B, L, D]``, and which of them each row is."""
    every = torch.arange(len(x), device=x.device)
    if not shared:
        return every, every
    found, which = torch.unique(x.argmax(-1), dim=0, return_inverse=True)
    return torch.zeros_like(every[: len(found)]).scatter_(0, which, every), which


def _taken(out: Denoised, rows: Tensor, *, detach: bool = False) -> Denoised:
    """The log-probabilities of some rows."""
    log_p = out.aux["log_p"]
    chosen = (log_p.detach() if detach else log_p)[rows]
    return Denoised(chosen, {"log_p": chosen})


class _Carried(torch.autograd.Function):
    """Values ``[B]`` whose sum has gradients that are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Any, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> Any:
        scale = output.mean()
        return None, None, *(None if g is None else scale * g for g in ctx.gradients)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


StepKL = Callable[[Any, Tensor, Denoised, Denoised], Tensor]  # (row, x, answer, reference's)


def masked_step_kl(row: RevealRow, x: Tensor, out: Denoised, reference: Denoised) -> Tensor:
    """``reveal sum_{i masked} KL(p(x0_i | x) || p_ref(x0_i | x))``, ``[B]``.

    Staying masked is equally probable under both, so nothing else remains of the divergence of the
    two kernels. Where positions to reveal were drawn before the loop, ``reveal`` is the fraction of
    masks revealed in this step: given their number, which ones is uniform. Relaxed states weigh
    each position with its mask's share.
    """
    mask = x[..., -1]
    inner = categorical_kl(out.aux["log_p"], reference.aux["log_p"])
    if row.which is None:
        return (row.reveal.flatten() * (mask * inner).sum(-1)).expand(len(x))
    revealed = (row.which.squeeze(-1).to(mask.dtype) * mask).sum(-1)
    return revealed / mask.sum(-1).clamp_min(1e-6) * (mask * inner).sum(-1)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def released_step_kl(process: MaskingProcess) -> StepKL:
    """The divergence that DRAKES' released code computes, for comparison and nothing else.

    ``sum_{i, a} c_i x_ia (-p + q + p (log p - log q)) / m_t`` with ``c = 1 - x_mask``, ``p`` and
    ``q`` equal where the state's largest entry is a token. It is 0 on hard states.
    """

    def step(row: RevealRow, x: Tensor, out: Denoised, reference: Denoised) -> Tensor:
        log_p, log_q = out.aux["log_p"], reference.aux["log_p"]
        still_masked = x.argmax(-1) == x.shape[-1] - 1
        rate = log_q.exp() - log_p.exp() + log_p.exp() * (log_p - log_q)
        weight = (1 - x[..., -1:]) * x[..., :-1] * still_masked.unsqueeze(-1)
        total = (weight * rate).sum((1, 2))
        return total / process.mask_probability(row.t).flatten().to(x)

    return step


def gaussian_step_kl(row: Row, x: Tensor, out: Denoised, reference: Denoised) -> Tensor:
    """``||mean - mean_ref||^2 / (2 std^2)`` of a stochastic step, ``[B]``.

    The last step, to clean, adds no noise, so its kernels share no support: it is left out, and the
    divergence is that of the chain up to it.
    """
    assert row.g is not None
    scaled = row.b[0] * (out.x0_hat - reference.x0_hat)
    noisy = row.g > 0
    std = torch.where(noisy, row.g, torch.ones_like(row.g))
    return torch.where(noisy, 0.5 * (scaled / std).square(), 0.0).flatten(1).sum(1)
