"""PSO, pairwise sample optimisation: preferences between the moves of few-step samplers.

Miao et al. 2024 (arXiv 2410.03190). A preference loss at levels that the sampler never visits
spoils what a few-step policy does at the levels that it does visit. Here what is compared is the
log-probability of the sampler's own transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import one_hot
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.preferences.few_step import PlanSteps, plan_shape
from diffpolicy.learn.preferences.items import Items, batch_items
from diffpolicy.learn.preferences.masked_steps import MaskedSteps
from diffpolicy.learn.preferences.pso_formulas import Pairwise, pairwise_loss
from diffpolicy.learn.preferences.scores import make_score
from diffpolicy.learn.reference import Referenced

Reward = Callable[..., Tensor]


class PairwiseLoss(Referenced):
    """PSO as an objective of the trainer, for plans and for masked sequences.

    Offline, ``forward(batch, generator)`` takes pairs of items as
    :class:`~diffpolicy.learn.preferences.dpo.PreferenceLoss` does. Their transitions are drawn from
    the forward process given the item, at the sampler's levels (see
    :meth:`~diffpolicy.learn.preferences.few_step.PlanSteps.bridge`); of sequences, tokens are
    revealed in the sampler's order. Chosen and rejected share noise and order. In expectation over
    the noise of its step, a log-ratio of plans is a difference of two denoising errors, so
    :class:`~diffpolicy.learn.preferences.scores.DenoisingScore` with ``levels`` is a relative of
    less variance. Pairs of ready-made chains go to :meth:`compare`, to which both forms come down.

    Online, two chains of the present denoiser are drawn for every row of the batch, and the reward
    says which is better; a tie says that both are as good. The batch holds ``index [B]`` and, of
    conditional denoisers, ``cond [B, C]`` or ``obs [B, To, O]``; or demonstrations (``obs`` and
    ``action [B, H, A]``, or ``tokens [B, L]``), of which the condition is taken. ``steps [B, H]``
    (bool) are the positions of plans that are scored: those that are executed. All if left out.

    The last step of plans, to clean, adds no noise, has no density and is not compared.

    With ``anchor_weight`` the anchor is ``anchor_obs [B, To, O]`` and ``anchor_action [B, H, A]``,
    or ``anchor_tokens [B, L]`` (``anchor_cond [B, C]``); without them, the demonstrations of the
    batch (online) or the chosen items. ``anchor`` of the settings asks for the chosen items, or
    both.

    Metrics: ``accuracy`` (share of comparisons on their side, one half for equal ones; ties do not
    count), ``gap`` (of the log-ratios of whole chains, before clamps), ``saturated`` (share of
    clamped log-ratios), ``log_ratio`` (mean of all chains; online it estimates their KL to the
    reference), ``error_chosen`` and ``error_rejected``, with ``_reference`` the reference's: minus
    log-probability per scored entry, nats; online ``reward`` (of all chains) and ``ties``;
    ``anchor``, its error.

    Args:
        denoiser: what is tuned.
        settings: None: the defaults.
        reward: online: of plans ``[N, H, D]`` (and their condition ``[N, C]``, if there is one), or
            of one-hot sequences ``[N, L, V]``, to ``[N]``; called without gradients.
        reference: see :class:`~diffpolicy.learn.reference.Referenced`.

    Raises:
        ValueError: a sampler whose steps have no density, settings that have no effect here, and
            what :class:`~diffpolicy.learn.reference.Referenced` refuses.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        settings: Pairwise | None = None,
        *,
        reward: Reward | None = None,
        reference: BaseDenoiser | None = None,
    ) -> None:
        super().__init__(denoiser, reference)
        self.settings = settings = settings or Pairwise()
        self.masked = isinstance(denoiser, MaskedDenoiser)
        self._check_form(has_reward=reward is not None)
        self.steps: Any
        levels = None
        if isinstance(denoiser, MaskedDenoiser):
            self.steps = MaskedSteps(denoiser, settings)
        elif isinstance(denoiser.process, GaussianProcess):
            self.steps = PlanSteps(denoiser.process, settings)
            if settings.online:
                plan_shape(denoiser)  # refuses a denoiser that does not tell
            levels = {"levels": tuple(self.steps.levels[:-1].flatten().tolist())}
        else:
            raise ValueError(
                f"PSO takes plans under Gaussian noise or a MaskedDenoiser, got "
                f"{type(denoiser).__name__} under {type(denoiser.process).__name__}"
            )
        self.anchor = make_score(levels, denoiser) if settings.anchor_weight > 0 else None
        self._reward = [reward]  # a list: a reward that is a module is not part of this one

    def forward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        if self.settings.online:
            out = self._online(batch, generator)
        else:
            out = self.compare(*self.bridge(batch, generator))
        if self.anchor is None:
            return out
        errors = [self._error(items, generator) for items in self._anchor_items(batch)]
        error = torch.stack(errors).sum(0)
        loss = out.loss + self.settings.anchor_weight * error
        return LossOutput(loss, {**out.metrics, "anchor": error.detach().mean()})

    def compare(self, chosen: Any, rejected: Any, chance: Tensor | None = None) -> LossOutput:
        """The loss of B pairs of chains, whoever drew them.

        Args:
            chosen: :class:`~diffpolicy.learn.preferences.few_step.PlanPaths`, or a
                :class:`~diffpolicy.learn.reward.rollouts.MaskedRollout`.
            rejected: of the same steps.
            chance: that the chosen one is the better, ``[B]``; None: 1.
        """
        both = self.steps.pair(chosen, rejected)
        policy = self.steps.log_prob(self.denoiser, both)
        with self.as_reference() as reference:
            other = self.steps.log_prob(reference, both)
        return pairwise_loss(self.settings, policy, other, chance)

    @torch.no_grad()
    def draw(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Any, Tensor]:
        """Two chains of the present denoiser per row: all first ones, then all second ones.

        Returns:
            ``2 B`` chains, and their rewards ``[2 B]``.
        """
        size, given = len(next(iter(batch.values()))), batch.get("cond")
        if given is None and "obs" in batch:
            given = batch["obs"].flatten(1)
        cond, steps = (
            None if v is None else torch.cat([v, v]) for v in (given, batch.get("steps"))
        )
        like = next(self.denoiser.parameters()).detach()
        if self.masked:
            groups, grid = self.steps.order(size, generator)
            order = torch.cat([groups, groups]), grid
            paths = self.steps.draw(self.denoiser, order, generator, cond=cond)
            clean = one_hot(paths.tokens, self.steps.vocab_size)[..., :-1]
            items, extra = clean.to(like.dtype), None
        else:
            copies = 2 if self.settings.shared_start else 1
            shape = (2 * size // copies, *plan_shape(self.denoiser))
            start = self.steps.process.draw_noise(shape, generator, like).repeat(copies, 1, 1)
            paths = self.steps.draw(self.denoiser, start, generator, cond=cond, steps=steps)
            items, extra = paths.items.x0, cond
        return paths, self._judged(items, extra)

    def bridge(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Any, Any]:
        """Chains that end in the chosen, and in the rejected items of a batch."""
        pair = [batch_items(batch, name, masked=self.masked) for name in ("chosen", "rejected")]
        chosen, rejected = pair
        if chosen is None or rejected is None:
            wanted = "chosen and rejected"
            if not self.masked:
                wanted = "chosen_obs, chosen_action, rejected_obs and rejected_action"
            raise ValueError(
                f"PSO on given pairs needs a batch with {wanted}; got {sorted(batch)}. To draw "
                "pairs from the policy set online=True and give reward=..."
            )
        if chosen.x0.shape != rejected.x0.shape:
            raise ValueError(
                "chosen and rejected share their noise and must be of one shape; got rows "
                f"{list(chosen.x0.shape)} and {list(rejected.x0.shape)}; pad the shorter segments "
                "with windows whose steps are all False"
            )
        if self.masked:
            order = self.steps.order(len(chosen.x0), generator)
            first, second = (
                self.steps.bridge(v.x0, order, cond=v.cond) for v in (chosen, rejected)
            )
        else:
            shape = (len(self.steps) + 1, *chosen.x0.shape)
            noise = self.steps.process.draw_noise(shape, generator, chosen.x0)
            first, second = (self.steps.bridge(items, noise) for items in (chosen, rejected))
        return first, second

    def _online(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossOutput:
        wanted = ("index", "tokens") if self.masked else ("index", "obs", "cond")
        if not any(name in batch for name in wanted):
            raise ValueError(
                f"PSO with online=True needs a batch with one of {wanted}; got {sorted(batch)}. "
                "For pairs of a data set set online=False"
            )
        paths, reward = self.draw(batch, generator)
        first, second = reward.chunk(2)
        rows = torch.arange(len(first), device=first.device)
        better = torch.where(second > first, rows + len(rows), rows)
        worse = torch.where(second > first, rows, rows + len(rows))
        lead, scale = reward[better] - reward[worse], self.settings.label_scale
        chance = 0.5 + 0.5 * lead.sign() if scale is None else (lead / scale).sigmoid()
        out = self.compare(self.steps.take(paths, better), self.steps.take(paths, worse), chance)
        found = {"reward": reward.mean(), "ties": (lead == 0).to(reward).mean()}
        return LossOutput(out.loss, {**out.metrics, **found})

    def _judged(self, items: Tensor, cond: Tensor | None) -> Tensor:
        reward = self._reward[0]
        assert reward is not None
        value = reward(items) if cond is None else reward(items, cond)
        if value.shape != items.shape[:1]:
            raise ValueError(
                f"a reward returns one number per item, [{len(items)}]; got {list(value.shape)}"
            )
        return value.detach().to(items)

    def _error(self, items: Items, generator: torch.Generator) -> Tensor:
        assert self.anchor is not None
        draw = self.anchor.draw(self.denoiser, items, generator)
        return self.anchor.error(items, self.anchor(self.denoiser, items, draw))

    def _anchor_items(self, batch: Mapping[str, Tensor]) -> list[Items]:
        """What is cloned, one kind or two."""
        demos = batch_items(batch, "anchor", masked=self.masked)
        if self.settings.online:
            return [self._of_batch(batch) if demos is None else demos]
        chosen = batch_items(batch, "chosen", masked=self.masked)
        assert chosen is not None  # it was compared
        if demos is None or self.settings.anchor == "chosen":
            return [chosen]
        return [demos, chosen] if self.settings.anchor == "both" else [demos]

    def _of_batch(self, batch: Mapping[str, Tensor]) -> Items:
        """The demonstrations that online chains take their conditions of."""
        items = None
        if self.masked:
            items = batch_items(batch, "", masked=True)
        elif {"obs", "action"} <= batch.keys():
            whole = {"anchor_obs": batch["obs"], "anchor_action": batch["action"]}
            items = batch_items(whole, "anchor", masked=False)
        if items is None:
            wanted = "anchor_tokens" if self.masked else "anchor_obs and anchor_action"
            raise ValueError(f"anchor_weight needs a batch with {wanted}; got {sorted(batch)}")
        return items

    def _check_form(self, *, has_reward: bool) -> None:
        settings = self.settings
        if settings.online != has_reward:
            raise ValueError(
                "online=True draws pairs that a reward judges; give PairwiseLoss a reward=..."
                if settings.online
                else "given pairs are labelled already, a reward has no effect; leave it None, or "
                "set online=True"
            )
        if self.masked and not settings.shared_start:
            raise ValueError(
                "shared_start=False has no effect on sequences, which all start from masks; leave "
                "it True"
            )


__all__ = ["Pairwise", "PairwiseLoss", "pairwise_loss"]
