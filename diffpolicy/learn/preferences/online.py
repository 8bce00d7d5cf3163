"""Preference losses on a policy's own plans, compared by a reward while it is tuned (online)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.starts import prior_start
from diffpolicy.data.observation import count, each, from_fields, to_fields
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, Reward, judged, plan_shape
from diffpolicy.learn.preferences.few_step import FewStep, evaluating
from diffpolicy.learn.reference import Referenced
from diffpolicy.settings import one_of, ranged

DRAWN_BY = ("denoiser", "reference")


@dataclass(frozen=True, kw_only=True)
class DrawnPlans(FewStep):
    """How several plans of a policy are drawn for an observation.

    Args:
        candidates: how many; the best and the worst of them are compared.
        num_steps: K, network evaluations of a plan.
        solver: as ``options`` and ``spacing``, see :class:`diffpolicy.core.Sampler`.

    Raises:
        ValueError: values out of range, unknown names.
    """

    candidates: int = ranged("[2, inf)", 4)
    num_steps: int | None = 5
    solver: str = "ddim"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_plans()


@dataclass(frozen=True, kw_only=True)
class OwnPlans(DrawnPlans):
    """How a policy's plans are drawn and compared while it is tuned.

    Args:
        drawn_by: ``"denoiser"``: the present one, so that comparisons follow it; the reward is then
            asked about ever other plans, which one that was learned may not know. ``"reference"``:
            the policy before tuning, whose plans such a reward was learned on.
        label_scale: ``None``: the greater reward wins. A number s, in units of the reward: the
            better one is preferred with chance ``sigmoid((r_1 - r_2) / s)`` (Bradley-Terry).
        **others: see :class:`DrawnPlans`.
    """

    drawn_by: str = one_of(*DRAWN_BY)
    label_scale: float | None = ranged("(0, inf)", None)


@torch.no_grad()
def draw_plans(
    denoiser: BaseDenoiser,
    settings: DrawnPlans,
    obs: Any,
    reward: Reward,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """N plans of a denoiser for each observation, and what they are worth.

    Args:
        denoiser: draws them.
        settings: how; ``drawn_by`` and ``label_scale`` are not looked at.
        obs: ``[B, To, O]``, normalised, or such tensors by name.
        reward: ``(plans [B N, H, D], cond [B N, C]) -> [B N]``.
        generator: of all noise.

    Returns:
        Plans ``[B, N, H, D]``, normalised, and their rewards ``[B, N]``.

    Raises:
        ValueError: rewards of another shape, or not finite.
    """
    many, process = settings.candidates, denoiser.process
    assert isinstance(process, GaussianProcess)
    cond = denoiser.encode(obs).repeat_interleave(many, dim=0)
    like = next(denoiser.parameters()).detach()
    noise = process.draw_noise((len(cond), *plan_shape(denoiser)), generator, like)
    begin = prior_start(process, noise)
    with evaluating(denoiser):
        plans = settings.draw(denoiser, begin, cond=cond, generator=generator)
    worth = judged(reward, plans, cond)
    if not worth.isfinite().all():
        raise ValueError(f"{int((~worth.isfinite()).sum())} of {len(worth)} rewards are not finite")
    return plans.view(-1, many, *plans.shape[1:]), worth.view(-1, many)


class OnlineDPOLoss(Referenced):
    """A preference loss on pairs of the present policy's plans, judged by a reward.

    ``forward(batch, generator)`` takes ``obs [B, To, O]`` (normalised), the observations that plans
    are drawn for, and of losses with an anchor ``anchor_obs`` and ``anchor_action``, the
    demonstrations. All noise comes from ``generator``.

    Metrics: those of :class:`~diffpolicy.learn.preferences.dpo.PreferenceLoss`, ``reward`` (mean of
    all candidates) and ``lead`` (of the best over the worst).

    Args:
        loss: a :class:`~diffpolicy.learn.preferences.dpo.PreferenceLoss` of pairs, whose denoiser
            is tuned and whose reference, if it looks at one, is this one's.
        settings: how plans are drawn.
        reward: ``(plans [N, H, D], cond [N, C]) -> [N]``, called without gradients.
        steps: bool ``[H]``, the positions that are scored: those that are executed. ``None``: all.

    Raises:
        ValueError: a loss of single items, or a denoiser of sequences.
    """

    steps: Tensor | None

    def __init__(
        self, loss: Any, settings: OwnPlans, *, reward: Reward, steps: Tensor | None = None
    ) -> None:
        self.settings = settings
        denoiser, preference = loss.denoiser, loss.settings
        needed = preference.needs_reference or settings.drawn_by == "reference"
        super().__init__(denoiser, loss.reference, needed=needed)
        if not preference.paired or not isinstance(denoiser.process, GaussianProcess):
            got = f"{preference.loss!r}, {type(denoiser.process).__name__}"
            raise ValueError(f"own plans (not sequences) take dpo, ipo or margin; got {got}")
        self._loss = [loss]  # lists: neither the loss nor a reward is a further part of this one
        self._reward = [reward]
        settings.grid(denoiser.process)  # refuses levels that are too close, now
        self.register_buffer("steps", steps, persistent=False)

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        pairs, found = self.draw(from_fields(batch), generator)
        anchors = {k: v for k, v in batch.items() if k.startswith("anchor_")}
        out = self._loss[0]({**pairs, **anchors}, generator)
        return LossOutput(out.loss, {**found, **out.metrics})

    @torch.no_grad()
    def draw(
        self, obs: Any, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One pair of plans per observation, as a batch of the loss; and what there is to log."""
        by_reference = self.settings.drawn_by == "reference"
        drawer = self.as_reference() if by_reference else nullcontext(self.denoiser)
        with drawer as denoiser:
            plans, reward = draw_plans(denoiser, self.settings, obs, self._reward[0], generator)
        rows = torch.arange(count(obs), device=reward.device)
        best, worst = reward.argmax(1), reward.argmin(1)
        lead = reward[rows, best] - reward[rows, worst]
        if self.settings.label_scale is not None:
            u = torch.rand(len(lead), generator=generator, device=generator.device)
            wrong = u.to(lead) > (lead / self.settings.label_scale).sigmoid()
            best, worst = torch.where(wrong, worst, best), torch.where(wrong, best, worst)
        pairs: dict[str, Tensor] = {}
        for name, which in (("chosen", best), ("rejected", worst)):
            pairs |= to_fields(each(lambda one: one.unsqueeze(1), obs), f"{name}_obs")
            pairs[f"{name}_action"] = plans[rows, which].unsqueeze(1)
            if self.steps is not None:
                pairs[f"{name}_steps"] = self.steps.expand(count(obs), 1, -1)
        return pairs, {"reward": reward.mean(), "lead": lead.mean()}
