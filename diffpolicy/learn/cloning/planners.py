"""Losses of what a planner needs beside its denoiser: inverse dynamics, values, drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.guidance.layout import Layout
from diffpolicy.guidance.value import head_value
from diffpolicy.learn.cloning.denoising import (
    LossOutput,
    clean_plan,
    mean_over_plan,
    standard_normal,
)
from diffpolicy.learn.method import Batch, check_sizes
from diffpolicy.settings import check_choice, check_range


class InverseDynamicsLoss(nn.Module):
    """Squared error of the action between two successive observations of a window.

    ``forward(batch, generator)`` takes ``obs [B, H, O]``, ``action [B, H, A]``, both normalised,
    and optionally ``valid [B, H]``. Pairs from now on count, position To - 1 and later (earlier
    ones are another window's now), unless one of the two is padding. An example's loss is the mean
    over its pairs, 0 if it has none.

    Neighbouring windows share their pairs, so that a few of each window's show the head as much
    data per step as its width can use; they are drawn from ``generator``, the same of all windows
    of a batch.

    Args:
        head: ``(obs, next_obs) -> action``, an
            :class:`~diffpolicy.networks.heads.InverseDynamics`.
        n_obs_steps: To.
        max_pairs: of a window, how many are drawn; ``None``: all.

    Raises:
        ValueError: a size that is not positive, or a batch that has no pair.
    """

    def __init__(self, head: nn.Module, n_obs_steps: int = 1, *, max_pairs: int | None = 8) -> None:
        super().__init__()
        check_range("[1, inf)", n_obs_steps=n_obs_steps, max_pairs=max_pairs)
        self.head, self.n_obs_steps, self.max_pairs = head, n_obs_steps, max_pairs

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        now = self.n_obs_steps - 1
        obs, action = batch["obs"][:, now:], batch["action"][:, now:-1]
        if obs.shape[1] < 2 or action.shape[1] != obs.shape[1] - 1:
            shapes = [list(batch[name].shape) for name in ("obs", "action")]
            raise ValueError(f"needs obs and action [B, H, ...] with H > n_obs_steps, got {shapes}")
        pairs = torch.arange(action.shape[1], device=obs.device)
        if self.max_pairs is not None and self.max_pairs < len(pairs):
            order = torch.randperm(len(pairs), generator=generator, device=generator.device)
            pairs = order[: self.max_pairs].to(obs.device)
        error = (self.head(obs[:, pairs], obs[:, pairs + 1]) - action[:, pairs]).square().mean(-1)
        valid = batch.get("valid")
        return LossOutput(_mean_of_pairs(error, valid, now + pairs), {})


class ValueLoss(nn.Module):
    """Squared error of the return to go of the window's current step.

    ``forward(batch, generator)`` takes what
    :class:`~diffpolicy.learn.cloning.denoising.DenoisingLoss` takes, and ``return_to_go [B, H]``,
    normalised, of which position To - 1 is regressed.

    ``"all"``: on plans noised at the levels that a denoiser is trained at (one per plan), their
    known entries clean. The minimiser is ``E[return | x_t]``, which Diffuser guides by (Janner et
    al. 2022). ``"clean"``: on the plans themselves, to choose among candidates (Trajectory
    Diffuser's critic).

    Args:
        head: ``(x, network time, cond) -> [B]``, a
            :class:`~diffpolicy.networks.heads.TrajectoryValue`.
        process: of the denoiser that is to be guided.
        layout: what a plan holds.
        levels: see above.

    Raises:
        ValueError: unknown levels, or a head of another size or with another ``clean_time``.
    """

    known: Tensor

    def __init__(
        self, head: nn.Module, process: GaussianProcess, layout: Layout, levels: str = "all"
    ) -> None:
        super().__init__()
        check_choice("levels", levels, ("all", "clean"))
        sizes = {"horizon": layout.horizon, "dim": layout.dim}
        check_sizes("the value head", head, "the layout", **sizes)
        zero = float(process.network_time(torch.zeros((), dtype=torch.float64)))
        clean = getattr(head, "clean_time", zero)
        if abs(clean - zero) > 1e-6:
            raise ValueError(f"the value has clean_time={clean}; build it with clean_time={zero}")
        self.head, self.process, self.layout, self.levels = head, process, layout, levels
        self.value = head_value(head, process)
        self.register_buffer("known", layout.known, persistent=False)

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        x0, cond = clean_plan(batch, self.layout)
        if self.levels == "clean":
            x_t, t = x0, x0.new_zeros(1, 1, 1)
        else:
            t = self.process.sample_t((len(x0), 1, 1), generator).to(x0.device, x0.dtype)
            noise = standard_normal(x0.shape, x0, generator)
            x_t = self.process.add_noise(x0, t, noise)
            x_t = torch.where(self.known, x0, x_t)
        target = batch["return_to_go"][:, self.layout.n_obs_steps - 1]
        return LossOutput((self.value(x_t, t, cond) - target).square(), {})


class DraftLoss(nn.Module):
    """Squared error of the next state, and return to go, given the true ones so far.

    ``forward(batch, generator)`` takes ``obs [B, H, O]``, optionally ``valid [B, H]``, and
    ``return_to_go [B, H]`` if the draft is told returns; all normalised. An example's loss is the
    mean over its transitions, those from or to padding left out.

    Args:
        head: a :class:`~diffpolicy.networks.draft.Draft`.
        layout: of the plans that it drafts.

    Raises:
        ValueError: a draft of another size than the layout's plans.
    """

    def __init__(self, head: nn.Module, layout: Layout) -> None:
        super().__init__()
        sizes = {"obs_dim": layout.obs_dim, "n_obs_steps": layout.n_obs_steps}
        check_sizes("the draft head", head, "the layout", horizon=layout.horizon, **sizes)
        self.head = head

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        states, told = batch["obs"], None
        if self.head.returns:
            told = batch["return_to_go"].unsqueeze(-1)
        before = (states[:, :-1], None if told is None else told[:, :-1])
        next_states, next_returns = self.head(*before)
        error = (next_states - states[:, 1:]).square().mean(-1)
        valid = batch.get("valid")
        first = torch.arange(error.shape[1], device=error.device)
        loss = _mean_of_pairs(error, valid, first)
        metrics = {"state": loss.detach().mean()}
        if told is not None:
            of_return = _mean_of_pairs((next_returns - told[:, 1:]).square()[..., 0], valid, first)
            metrics["return"] = of_return.detach().mean()
            loss = loss + of_return
        return LossOutput(loss, metrics)


class SumOfLosses(nn.Module):
    """Several objectives trained at once, on the same batches.

    Their losses are added example by example, and their metrics keep apart: ``<name>/loss`` and
    ``<name>/<metric>``. The parameters are those of the denoiser and the heads, and the state dict
    says ``denoiser.`` and ``heads.<name>.``, as that of the policy made of them.

    Args:
        denoiser: what the policy samples with.
        heads: its further networks, by name.
        losses: the objectives of these, by name; each draws from the generator in this order.

    Raises:
        ValueError: a loss with parameters that are neither the denoiser's nor a head's.
    """

    def __init__(
        self, denoiser: nn.Module, heads: nn.ModuleDict, losses: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.denoiser, self.heads = denoiser, heads
        own = {id(parameter) for parameter in self.parameters()}
        for name, loss in losses.items():
            if any(id(parameter) not in own for parameter in loss.parameters()):
                raise ValueError(
                    f"{name!r} trains neither the denoiser nor the heads {sorted(heads)}"
                )
        # Not registered (a plain dict): their networks must appear once in the state dict.
        self.losses = dict(losses)

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        outs = {name: loss(batch, generator) for name, loss in self.losses.items()}
        metrics: dict[str, Tensor] = {}
        for name, out in outs.items():
            found = {"loss": out.loss.detach().mean(), **out.metrics}
            metrics |= {f"{name}/{key}": value for key, value in found.items()}
        return LossOutput(torch.stack([out.loss for out in outs.values()]).sum(0), metrics)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SumOfLosses:
        """Moves the losses' own buffers too (which entries are known, weights)."""
        for loss in self.losses.values():
            loss._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _mean_of_pairs(error: Tensor, valid: Tensor | None, first: Tensor) -> Tensor:
    """The mean of ``error [B, P]`` over pairs, of ``first [P]`` and the next, without padding."""
    both = None if valid is None else valid[:, first] & valid[:, first + 1]
    return mean_over_plan(error, both)
