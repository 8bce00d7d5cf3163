"""Denoising losses: per example, for given clean sample, level and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.noise import stratified
from diffpolicy.core.starts import Ramp
from diffpolicy.guidance.layout import Layout
from diffpolicy.learn.method import Batch, Method, Source, check_sizes, encoded
from diffpolicy.settings import check_choice, check_range, check_shape, one_of

X = TypeVar("X", Tensor, Tensor | None)
LEVEL_LAWS = ("row", "position", "dim")
CLONED = {  # the sources of a material
    "demonstrations": ("demonstrations",),
    "chosen": ("chosen",),
    "both": ("chosen", "demonstrations"),
}


class LossOutput(NamedTuple):
    """What every objective of the library returns.

    Attributes:
        loss: per example, ``[B]``; the trainer averages it.
        metrics: 0-dim tensors to log, detached.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal of ``shape``, on the device and in the dtype of ``like``."""
    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device)


def mean_over_plan(error: Tensor, valid: Tensor | None) -> Tensor:
    """The mean ``[B]`` of ``error [B, H]``, over the positions that are ``valid``; None: all."""
    if valid is None:
        return error.mean(-1)
    weight = valid.to(error.dtype)
    return (error * weight).sum(-1) / weight.sum(-1).clamp_min(1)


def drop_cond(cond: Tensor | None, share: float, generator: torch.Generator) -> Tensor | None:
    """Conditions ``[B, C]``, a share of which are zeroed, for classifier-free guidance."""
    if cond is None or share == 0:
        return cond
    u = torch.rand(len(cond), 1, generator=generator, device=generator.device)
    return cond * (u >= share).to(cond)


def squared_error(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error ``[B, H, D]`` of the network's output, what the network saw, and its output.

    The arguments are those of :func:`denoising_error`.
    """
    x_t = denoiser.process.add_noise(x0, t, noise)
    seen = x_t if known is None else torch.where(known, x0, x_t)
    output = denoiser.raw(seen, t, cond)
    return (output - denoiser.target(x0, noise, t)).square(), seen, output


def denoising_error(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    cond: Tensor | None = None,
    valid: Tensor | None = None,
    known: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the network's own output at given level and noise, per example.

    Two models scored at the same ``t`` and ``noise`` can be differenced (preference losses do).

    Args:
        denoiser: network and parameterisation; the regression target is its own (noise, velocity,
            ...).
        x0: clean, normalised ``[B, H, D]``.
        t: levels, broadcastable to ``x0``, on its device.
        noise: standard normal ``[B, H, D]``.
        cond: ``[B, C]``.
        valid: bool ``[B, H]``; positions left out of the mean where False.
        known: bool, broadcastable to ``x0``: entries that the network sees clean, as
            :class:`diffpolicy.guidance.pinned.Pinned` shows them to it.
        weights: broadcastable to ``x0``, not negative; the error is then the weighted mean over
            all entries. Give known entries the weight 0.

    Returns:
        ``[B]``.
    """
    error, _, _ = squared_error(denoiser, x0, t, noise, cond, known)
    if weights is None:
        return mean_over_plan(error.mean(-1), valid)
    weights = weights.to(error.dtype).expand_as(error)
    if valid is not None:
        weights = weights * valid.unsqueeze(-1)
    total = weights.sum((1, 2))
    # A window without any entry to learn from has no error, rather than none that is finite.
    return (error * weights).sum((1, 2)) / torch.where(total > 0, total, 1.0)


class DenoisingLoss(nn.Module):
    """The training objective of diffusion policies: behaviour cloning as denoising.

    It is that of Ho et al. 2020, eq. 14.

    ``forward(batch, generator)`` takes a batch with ``obs [B, To, O]`` (or such tensors under
    ``obs.NAME``) and ``action [B, H, A]``, normalised, and optionally ``valid [B, H]`` and
    ``return [B, 1]``, a further part of the condition. Levels and noise come from ``generator``
    alone.

    With a ``layout`` of states the batch holds ``obs [B, H, O]`` instead, the plan is the one that
    the layout says, its known entries enter the network clean and have no loss, and the condition
    is the return alone, if the batch has one.

    Args:
        denoiser: what is trained.
        cond_dropout: fraction of examples whose condition is zeroed, for classifier-free guidance.
        mask_padding: leave edge-padded positions out (Diffusion Policy keeps them in).
        level_law: which noise levels a plan is trained at. ``"row"``: one for the whole plan.
            ``"position"``: rising along the plan as streaming has them (``ramp`` at a random
            phase). ``"dim"``: an independent one per action dimension, for warm starts whose level
            differs between dimensions.
        ramp: the chunks of ``"position"``.
        constant_fraction: with the two finer laws, the fraction of plans at one level throughout
            (0.2 in the streaming paper); these also train full sampling.
        layout: what a plan holds; None as ``"action"``.
        weights: of the entries of a plan ``[1, H, D]`` (see :meth:`Layout.weights`); None: equal.
        draws: levels and noises per example, over which its loss is the mean. Observations are
            encoded once for all of them, so that a costly encoder's gradient is less noisy.

    Raises:
        ValueError: settings out of range, levels that the network cannot take, or a network or
            weights of another size than the layout's.
    """

    known: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        cond_dropout: float = 0.0,
        mask_padding: bool = False,
        level_law: str = "row",
        ramp: Ramp | None = None,
        constant_fraction: float = 0.2,
        layout: Layout | None = None,
        weights: Tensor | None = None,
        draws: int = 1,
    ) -> None:
        super().__init__()
        check_range("[0, 1)", cond_dropout=cond_dropout)
        check_range("[1, inf)", draws=draws)
        check_range("[0, 1]", constant_fraction=constant_fraction)
        check_level_law(level_law, denoiser, ramp)
        self.denoiser, self.layout, self.draws = denoiser, layout, draws
        self.cond_dropout, self.mask_padding = cond_dropout, mask_padding
        self.level_law, self.ramp = level_law, ramp
        self.constant_fraction, known = constant_fraction, None
        if layout is not None:
            sizes = {"horizon": layout.horizon, "dim": layout.dim}
            check_sizes("the network", denoiser.network, f"a {layout.kind!r} layout", **sizes)
            if layout.pinned:
                known = layout.known
                weights = layout.weights() if weights is None else weights
        if weights is not None:
            weights = _checked_weights(weights, layout, denoiser.network)
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def draw_levels(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        """Levels ``[count, 1 or H, 1 or D]`` of the law, on the generator's device."""
        process = self.denoiser.process
        constant = process.sample_t((count, 1, 1), generator)
        if self.level_law == "row":
            return constant
        if self.ramp is not None and self.level_law == "position":
            finer = self.ramp.levels(stratified((count, 1, 1), generator))
        else:
            # One call per dimension: within a call, the entries of a row share their stratum.
            each = [process.sample_t((count, 1, 1), generator) for _ in range(dim)]
            finer = torch.cat(each, dim=2)
        coin = torch.rand(count, 1, 1, generator=generator, device=generator.device)
        return torch.where(coin < self.constant_fraction, constant, finer)

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        x0, cond = clean_plan(batch, self.layout, self.denoiser)
        valid = batch["valid"] if self.mask_padding else None
        x0, cond, valid = self.repeated(x0), self.repeated(cond), self.repeated(valid)
        t = self.draw_levels(x0.shape[0], x0.shape[2], generator).to(x0.device, x0.dtype)
        noise = standard_normal(x0.shape, x0, generator)
        cond = drop_cond(cond, self.cond_dropout, generator)
        loss, metrics = self.errors(x0, t, noise, cond, valid, generator)
        return LossOutput(self.mean_of_draws(loss), metrics)

    def errors(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        cond: Tensor | None,
        valid: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss ``[B]`` of every plan, and what to log; see :func:`denoising_error`."""
        seen = {"valid": valid, "known": self.known, "weights": self.weights}
        return denoising_error(self.denoiser, x0, t, noise, cond=cond, **seen), {}

    def repeated(self, rows: X) -> X:
        """Every row ``draws`` times in a row; None stays None."""
        many = rows is not None and self.draws > 1
        return rows.repeat_interleave(self.draws, 0) if many else rows  # type: ignore[union-attr]

    def mean_of_draws(self, loss: Tensor) -> Tensor:
        """``[B]`` of losses ``[B * draws]``."""
        return loss.view(-1, self.draws).mean(1)


def clean_plan(
    batch: Batch, layout: Layout | None, denoiser: BaseDenoiser | None = None
) -> tuple[Tensor, Tensor | None]:
    """The clean plan ``[B, H, D]`` of a batch of windows, and the condition ``[B, C]`` or None."""
    if layout is None or not layout.pinned:
        cond = encoded(denoiser or BaseDenoiser(), batch)
        x0, parts = batch["action"], [] if cond is None else [cond]
        if layout is not None and layout.kind == "joint":
            x0 = layout.join(batch["imagined"], x0)
    else:
        action = batch["action" if layout.kind == "trajectory" else "obs"]  # states need none
        x0, parts = layout.join(batch["obs"], action), []
    if "return" in batch:
        parts.append(batch["return"])
    return x0, torch.cat(parts, dim=1) if parts else None


def _checked_weights(weights: Tensor, layout: Layout | None, network: nn.Module) -> Tensor:
    sizes = [getattr(layout or network, name, name) for name in ("horizon", "dim")]
    check_shape("weights", weights.shape, (1, *sizes))
    if layout is not None:
        weights = weights.masked_fill(layout.known & (weights > 0), 0.0)
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError(
            "weights must not be negative, and some must be positive at entries that are not known"
        )
    return weights


def check_level_law(level_law: str, denoiser: Denoiser, ramp: Ramp | None) -> None:
    """Raise ``ValueError`` unless the denoiser's network can be trained at such levels."""
    check_choice("level_law", level_law, LEVEL_LAWS)
    if level_law == "position" and ramp is None:
        raise ValueError(
            "level_law='position' needs ramp=Ramp(horizon, n_obs_steps, n_action_steps)"
        )
    network = denoiser.network
    kinds: frozenset[str] = getattr(network, "t_kinds", frozenset({"row"}))
    if level_law not in kinds:
        hint = "; unet1d and transformer take levels per position" * (level_law == "position")
        raise ValueError(
            f"level_law={level_law!r} needs a network that takes levels per {level_law}, but "
            f"{type(network).__name__} takes {sorted(kinds)}. Build an mlp with "
            f"t_kind={level_law!r} (network={{'type': 'mlp', 't_kind': {level_law!r}}}){hint}"
        )
    check_sizes("the ramp", ramp, "the network", horizon=getattr(network, "horizon", None))


@dataclass(frozen=True)
class Cloning(Method):
    """Behaviour cloning of demonstrations, of preferred items, or of both, as many of each.

    Args:
        data: ``"demonstrations"``, ``"chosen"`` (filtered behaviour cloning) or ``"both"``.

    Raises:
        ValueError: other data.
    """

    command: ClassVar[str] = "prefer"

    data: str = one_of(*CLONED)

    def reads(self) -> frozenset[str]:
        """What is cloned: demonstrations, pairs (whose chosen items are), or both."""
        return frozenset("pairs" if name == "chosen" else name for name in CLONED[self.data])

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`DenoisingLoss`; the steps beside an item are never cloned."""
        return DenoisingLoss(
            denoiser,
            cond_dropout=material.spec.cond_dropout,
            mask_padding=material.data.mask_padding or self.data != "demonstrations",
        )

    def source(self, material: Any) -> Source:
        """The windows of what is cloned, in turns."""
        sources = [getattr(material, name)() for name in CLONED[self.data]]
        return material.in_turns(*sources)  # type: ignore[no-any-return]
