"""PSO, pairwise sample optimisation: preferences between the moves of few-step samplers.

Miao et al. 2024 (arXiv 2410.03190). A preference loss at levels that the sampler never visits
spoils what a few-step policy does at the levels that it does visit. Here what is compared is the
log-probability of the sampler's own transitions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import one_hot
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, Method, Reward, judged, plan_shape, rows_and_cond
from diffpolicy.learn.preferences.few_step import FewStep, MaskedSteps, PlanSteps
from diffpolicy.learn.preferences.formulas import Anchoring, pso_loss
from diffpolicy.learn.preferences.items import Items, batch_items, joined, pair_items
from diffpolicy.learn.preferences.scores import DenoisingScore, MaskedScore, Score, drawn_error
from diffpolicy.learn.reference import Referenced
from diffpolicy.learn.reward.sequence_tuning import SequenceMethod
from diffpolicy.settings import one_of, ranged


@dataclass(frozen=True, kw_only=True)
class PSO(Anchoring, FewStep, Method):
    """PSO and the sampler whose moves it compares.

    With ``l_k = log p(x_next | x) - log p_ref(x_next | x)`` of step k, summed over the scored
    entries of an item, the loss of a pair is the mean over k of ``-log sigmoid(kl_beta (l_k(chosen)
    - l_k(rejected)))``, each ``l_k`` clamped. Released code takes the mean of log-probabilities
    over the D entries of a state instead: its ``beta = 50`` is ``kl_beta = 50 / D`` here (1.6 for
    16 actions of 2 numbers).

    ``compare="path"`` adds up ``l_k`` over steps first: the loss is then that of DPO on whole
    chains. With items labelled by a Bradley-Terry model of a reward r, which prefers 1 to 2 with
    chance ``sigmoid((r_1 - r_2) / s)``, its optimum is ``p_ref(chain) exp(r / (s kl_beta)) / Z``,
    with one Z per start and order of reveals, which the chains of a pair share. If Z depends on
    neither, as for a masked reference that is one law in every order, then the items have the law
    ``p_ref exp(r / (s kl_beta)) / Z``. Comparing steps has no such closed form. Where policy and
    reference agree its gradient is that of the chance to win against another draw of the policy
    (by REINFORCE), and it ends where clamps and ``kl_beta`` hold it. If the greater reward always
    wins, they alone do.

    Args:
        online: pairs are drawn from the policy and judged by a reward, rather than given.
        kl_beta: in sum units, positive; larger stays closer to the reference.
        clip: in (0, 1): ``exp(l_k / D)``, the ratio per scored entry (number or token; the
            geometric mean), is clamped to ``1 -+ clip``, and beyond it has no gradient. None: not
            clamped. That of released code, for any D.
        compare: ``"step"`` (as published) or ``"path"``.
        label_scale: online: None: the greater reward wins. A number s, in units of the reward: the
            loss is the expected one for labels with chance ``sigmoid((r_1 - r_2) / s)``.
        shared_start: online, of plans: both chains begin in the same noise.
        anchor_weight: of the behaviour-cloning error at the sampler's own levels that is added:
            mean squared error per entry (nats per token of sequences).
        anchor: what it is the error of: ``"demonstrations"`` (the chosen items, or those of the
            batch, where there are none; online always), ``"chosen"``, or ``"both"``, the sum of
            what is there.

    Raises:
        ValueError: values out of range, unknown names.
    """

    command: ClassVar[str] = "prefer"

    online: bool = False
    kl_beta: float = ranged("(0, inf)", 1.0)
    clip: float | None = ranged("(0, 1)", 0.1)
    compare: str = one_of("step", "path")
    label_scale: float | None = ranged("(0, inf)", None)
    shared_start: bool = True

    def reads(self) -> frozenset[str]:
        """Pairs, or what is needed to compare own chains.

        Own chains are cloned as demonstrations alone: own plans would be the policy's rollouts.
        """
        if not self.online:
            return frozenset({"pairs"})
        anchor = {"demonstrations"} if self.clones_demonstrations else set()
        return frozenset({"observations", "reward", *anchor})

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """See :class:`PSOLoss`."""
        if not self.online:
            return PSOLoss(denoiser, self)
        steps = material.steps.to(next(denoiser.parameters()).device)
        return PSOLoss(denoiser, self, reward=material.reward, steps=steps)


@dataclass(frozen=True, kw_only=True)
class SequencePSO(SequenceMethod, PSO):
    """PSO on own sequences whose labels make ``p_ref exp(r / kl_weight)`` the optimum of chains.

    Args:
        kl_weight: alpha, reward per nat; ``label_scale`` is ``kl_weight / kl_beta`` unless given.
    """

    online: bool = True
    kl_weight: float = ranged("(0, inf)", 0.1)

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """See :class:`PSOLoss`."""
        settings = replace(self, label_scale=self.label_scale or self.kl_weight / self.kl_beta)
        known = {"reward": material.reward, "reference": material.reference}
        return PSOLoss(denoiser, settings, **known)


class PSOLoss(Referenced):
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
    ``action [B, H, A]``, or ``tokens [B, L]``), of which the condition is taken.

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
        steps: online: bool ``[H]``, the positions of plans that are scored: those that are
            executed. ``None``: all.

    Raises:
        ValueError: a sampler whose steps have no density, and what
            :class:`~diffpolicy.learn.reference.Referenced` refuses.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        settings: PSO | None = None,
        *,
        reward: Reward | None = None,
        reference: BaseDenoiser | None = None,
        steps: Tensor | None = None,
    ) -> None:
        super().__init__(denoiser, reference)
        self.settings = settings = settings or PSO()
        self.masked = isinstance(denoiser, MaskedDenoiser)
        if settings.online and reward is None:
            raise ValueError("online=True draws pairs that a reward judges; give reward=...")
        self.steps: Any
        score: Score = MaskedScore()
        if isinstance(denoiser, MaskedDenoiser):
            self.steps = MaskedSteps(denoiser, settings)
        elif isinstance(denoiser.process, GaussianProcess):
            self.steps = PlanSteps(denoiser.process, settings)
            if settings.online:
                plan_shape(denoiser)  # refuses a denoiser that does not tell
            score = DenoisingScore(levels=tuple(self.steps.levels[:-1].flatten().tolist()))
        else:
            raise ValueError(
                f"PSO takes Gaussian noise or a MaskedDenoiser, got {type(denoiser).__name__}"
            )
        self.anchor = score if settings.anchor_weight > 0 else None
        if self.anchor is not None:
            self.anchor.check(denoiser)
        self.scored: Tensor | None
        self.register_buffer("scored", steps, persistent=False)
        self._reward: list[Any] = [
            reward
        ]  # a list: a reward that is a module is not part of this one

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        if self.settings.online:
            out = self._online(batch, generator)
        else:
            out = self.compare(self.bridge(batch, generator))
        if self.anchor is None:
            return out
        cloned = self._anchor_items(batch)
        errors = [drawn_error(self.anchor, self.denoiser, each, generator) for each in cloned]
        error = torch.stack(errors).sum(0)
        loss = out.loss + self.settings.anchor_weight * error
        return LossOutput(loss, {**out.metrics, "anchor": error.detach().mean()})

    def compare(self, paths: Any, chance: Tensor | None = None) -> LossOutput:
        """The loss of B pairs of chains, whoever drew them.

        Args:
            paths: :class:`~diffpolicy.learn.preferences.few_step.PlanPaths`, or a
                :class:`~diffpolicy.learn.reward.rollouts.MaskedRollout`: all chosen ones, then
                all rejected ones.
            chance: that the chosen one is the better, ``[B]``; None: 1.
        """
        policy = self.steps.log_prob(self.denoiser, paths)
        with self.as_reference() as reference:
            other = self.steps.log_prob(reference, paths)
        return pso_loss(self.settings, policy, other, chance)

    @torch.no_grad()
    def draw(self, batch: Batch, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Two chains of the present denoiser per row: all first ones, then all second ones.

        Returns:
            ``2 B`` chains, and their rewards ``[2 B]``.
        """
        size, given = rows_and_cond(self.denoiser, batch)
        cond = None if given is None else torch.cat([given, given])
        steps = None if self.scored is None else self.scored.expand(2 * size, -1)
        like = next(self.denoiser.parameters()).detach()
        if self.masked:
            order = self.steps.shared(self.denoiser, size, generator)
            paths = self.steps.draw(self.denoiser, order, generator, cond=cond)
            clean = one_hot(paths.tokens, self.steps.vocab_size)[..., :-1]
            items, extra = clean.to(like.dtype), None
        else:
            copies = 2 if self.settings.shared_start else 1
            shape = (2 * size // copies, *plan_shape(self.denoiser))
            start = self.steps.process.draw_noise(shape, generator, like).repeat(copies, 1, 1)
            paths = self.steps.draw(self.denoiser, start, generator, cond=cond, steps=steps)
            items, extra = paths.items.x0, cond
        return paths, judged(self._reward[0], items, extra).to(items)

    def bridge(self, batch: Batch, generator: torch.Generator) -> Any:
        """Chains that end in the chosen items of a batch, then those that do in the rejected."""
        chosen, rejected = pair_items(self.denoiser, batch, masked=self.masked)
        if self.masked:
            shared = self.steps.shared(self.denoiser, len(chosen.x0), generator)
        else:
            shape = (len(self.steps) + 1, *chosen.x0.shape)
            shared = self.steps.process.draw_noise(shape, generator, chosen.x0).repeat(1, 2, 1, 1)
        return self.steps.bridge(joined(chosen, rejected), shared)

    def _online(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        paths, reward = self.draw(batch, generator)
        first, second = reward.chunk(2)
        ahead, (one, two) = second > first, torch.arange(len(reward), device=first.device).chunk(2)
        better, worse = torch.where(ahead, two, one), torch.where(ahead, one, two)
        lead, scale = reward[better] - reward[worse], self.settings.label_scale
        chance = 0.5 + 0.5 * lead.sign() if scale is None else (lead / scale).sigmoid()
        out = self.compare(self.steps.take(paths, torch.cat([better, worse])), chance)
        found = {"reward": reward.mean(), "ties": (lead == 0).to(reward).mean()}
        return LossOutput(out.loss, {**out.metrics, **found})

    def _anchor_items(self, batch: Batch) -> list[Items]:
        """What is cloned, one kind or two."""
        demos = batch_items(self.denoiser, batch, "anchor", masked=self.masked)
        if self.settings.online:
            if demos is None:  # those that the chains take their conditions of
                whole = {f"anchor_{name}": value for name, value in batch.items()}
                demos = batch_items(self.denoiser, whole, "anchor", masked=self.masked)
            if demos is None:
                wanted = "anchor_tokens" if self.masked else "anchor_obs and anchor_action"
                raise ValueError(f"anchor_weight needs a batch with {wanted}; got {sorted(batch)}")
            return [demos]
        chosen = batch_items(self.denoiser, batch, "chosen", masked=self.masked)
        assert chosen is not None  # it was compared
        if demos is None or self.settings.anchor == "chosen":
            return [chosen]
        return [demos, chosen] if self.settings.anchor == "both" else [demos]
