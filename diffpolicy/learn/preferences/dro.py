"""Diffusion-DRO: demonstrations ranked above the policy's own draws, without a reward model.

Wu et al. 2025 (arXiv 2510.18353): maximum-margin inverse reinforcement learning whose reward is
how much better than the reference a denoiser explains an item. Needs demonstrations alone; what
they are ranked above is drawn during training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser, Denoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.data.observation import from_fields
from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch, Method
from diffpolicy.learn.preferences.few_step import FewStep
from diffpolicy.learn.preferences.negatives import Contrast, contrast_plans, contrast_sequences
from diffpolicy.learn.reference import Referenced, frozen_copy
from diffpolicy.learn.reward.chains import categorical_kl
from diffpolicy.learn.reward.rollouts import check_steps
from diffpolicy.settings import check_range, one_of, ranged


@dataclass(frozen=True, kw_only=True)
class DRO(FewStep, Method):
    """Diffusion-DRO and the sampler that draws its negatives.

    With the errors ``L_exp`` of a demonstration and ``L_own`` of the policy's own item, at the same
    level,

        diff = L_exp(policy) - L_exp(ref) - (L_own(policy) - L_own(ref)),
        loss = max(0, diff + margin).

    ``L_exp`` is the denoising error (mean square per entry, of the network's own target) or the
    masked cross-entropy (nats per mask). What ``L_own`` is, ``negative`` says:

    - ``"prediction"``, as published: at a state of the policy's chain, the distance to what the
      policy itself predicts there (mean square; KL of the probabilities of tokens). The policy is
      a copy, made anew every ``sync_every`` updates. Right after that ``L_own`` is 0 and has no
      gradient; with ``sync_every=1``, the value of the released code, always. What is left is
      behaviour cloning (of all demonstrations without a margin) of those that the policy does
      not yet explain better than the reference by ``margin + L_own(ref)``. With n updates between,
      ``L_own`` pushes the policy away from its copy and cancels the curvature of ``L_exp``: they
      are like one update of n times the learning rate, and as stable as that.
    - ``"noised"``: the chain's end, noised (masked) like the demonstration, and the error of its
      denoising. This is the gradient of maximum-margin inverse reinforcement learning at every
      update. It vanishes where the *sampler* makes what the demonstrations are, so the law of a
      few-step sampler, whose steps are too coarse for even the right denoiser, is corrected too;
      choose ``jitter=False`` for that. ``L_own`` has no bound: without the hinge a policy that
      over-fits its demonstrations can raise it without end, and training then diverges (as that of
      ours on 40 demonstrations of Push-T did); keep a margin there.

    Without the hinge (``margin=None``) the mean gradient is 0 where the policy has the law of the
    demonstrations: with ``"prediction"`` it is that of behaviour cloning, with ``"noised"`` both
    errors have the same law. With the hinge this holds as long as the policy is its reference. The
    hinge holds a policy to the reference: a demonstration counts until the policy leads by the
    margin, so ``margin`` is how far it goes. The published 0.001 stops early, the more so with
    ``"noised"``, of which single differences scatter more.

    Args:
        margin: of the hinge, in units of the error; the published 0.001 is of a mean squared error
            of noise. None: no hinge, and no reference.
        negative: ``"prediction"`` or ``"noised"``.
        jitter: of plans and two steps or more: shift the levels of every chain at random, so that
            together they cover all (as published). False: the sampler's own levels alone, which
            few-step policies need.
        states: how many states of a chain are used, each with a demonstration at its level.
        sync_every: updates between synchronisations of the policy's copy.
        num_steps: K, network evaluations of the policy's chain (published: 20, of ``dpmpp_2m``).
            Of masked sequences None reveals one position at a time.
        solver: of plans, any.

    Raises:
        ValueError: values out of range, unknown names.
    """

    command: ClassVar[str] = "prefer"

    num_steps: int | None = 10  # type: ignore[assignment]  # None: not of plans
    solver: str = "dpmpp_2m"
    margin: float | None = ranged("[0, inf)", 0.001)
    negative: str = one_of("prediction", "noised")
    jitter: bool = True
    states: int = ranged("[1, inf)", 1)
    sync_every: int = ranged("[1, inf)", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None:
            check_range(f"[1, {self.num_steps}]", states=self.states)

    def reads(self) -> frozenset[str]:
        """Demonstrations alone."""
        return frozenset({"demonstrations"})

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """See :class:`DROLoss`."""
        return DROLoss(denoiser, self)


class DROLoss(Referenced):
    """Diffusion-DRO as an objective of the trainer, for plans and for masked sequences.

    ``forward(batch, generator)`` takes demonstrations: ``obs [B, To, O]`` and ``action [B, H, A]``,
    normalised, or ``tokens [B, L]`` and optionally ``cond [B, C]``. One chain of the policy is
    drawn for every row, under its condition. Levels, noise, masks and chains come from
    ``generator`` alone. Call :meth:`after_step` after every optimiser step.

    Metrics: ``accuracy`` (share of pairs of which the policy, against the reference, explains the
    demonstration better than its own item: ``diff < 0``, one half for 0), ``gap`` (mean of
    ``-diff``), ``saturated`` (share beyond the hinge, which has no gradient), ``error_expert`` and
    ``error_own``, and with ``_reference`` the reference's. Without a reference (``margin=None``)
    ``diff`` is that of the policy's errors alone.

    Args:
        denoiser: what is tuned.
        settings: None: the defaults.
        reference: the pre-trained denoiser, see
            :class:`~diffpolicy.learn.reference.Referenced`; none is made for ``margin=None``.

    Raises:
        ValueError: a denoiser without a network, a sampler that does not fit, and what
            :class:`~diffpolicy.learn.reference.Referenced` refuses.
    """

    age: Tensor

    def __init__(
        self,
        denoiser: BaseDenoiser,
        settings: DRO | None = None,
        *,
        reference: BaseDenoiser | None = None,
    ) -> None:
        settings = settings or DRO()
        super().__init__(denoiser, reference, needed=settings.margin is not None)
        self.settings = settings
        self.masked = isinstance(denoiser, MaskedDenoiser)
        if isinstance(denoiser, MaskedDenoiser):
            check_steps(denoiser, settings.num_steps)
            check_range(f"[1, {denoiser.length}]", states=settings.states)
        else:
            _check_plans(denoiser, settings)
        # Without updates in between the copy is the denoiser itself.
        self.own = frozen_copy(denoiser) if settings.sync_every > 1 else None
        self.register_buffer("age", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def after_step(self) -> None:
        """Count updates, and synchronise the policy's copy when it is due."""
        self.age += 1
        if self.own is not None and int(self.age) >= self.settings.sync_every:
            self.own.load_state_dict(self.denoiser.state_dict())
            self.age.zero_()

    @property
    def policy(self) -> BaseDenoiser:
        """Whose chains and predictions the negatives are."""
        return self.denoiser if self.own is None else self.own

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        wanted = ("tokens",) if self.masked else ("obs", "action")
        if any(name not in batch for name in wanted):
            raise ValueError(f"DRO needs a batch with {' and '.join(wanted)}; got {sorted(batch)}")
        return self.rank(self.draw(batch, generator), len(batch[wanted[-1]]))

    def rank(self, pairs: Contrast, size: int) -> LossOutput:
        """The loss of given states, ``[size]``: the mean over those of each row."""
        expert, own = self._policy_errors(pairs)
        diff = expert - own
        metrics = {"error_expert": expert.detach().mean(), "error_own": own.detach().mean()}
        margin = self.settings.margin
        if margin is None:
            loss, shut = diff, torch.zeros_like(diff)
        else:
            with self.as_reference() as reference:
                others = self._errors(reference, pairs).chunk(2)
            diff = diff - (others[0] - others[1])
            metrics["error_expert_reference"] = others[0].mean()
            metrics["error_own_reference"] = others[1].mean()
            loss, shut = (diff + margin).relu(), (diff.detach() + margin <= 0).to(diff)
        metrics["accuracy"] = (0.5 - 0.5 * diff.detach().sign()).mean()
        metrics["gap"] = -diff.detach().mean()
        metrics["saturated"] = shut.mean()
        return LossOutput(loss.view(size, -1).mean(1), metrics)

    @torch.no_grad()
    def draw(self, batch: Batch, generator: torch.Generator) -> Contrast:
        """Negatives for a batch of demonstrations, and both at the same levels."""
        settings, policy = self.settings, self.policy
        if isinstance(policy, MaskedDenoiser):
            tokens, cond = batch["tokens"].long(), batch.get("cond")
            return contrast_sequences(policy, settings, tokens, cond, generator)
        assert isinstance(policy, Denoiser)
        cond = policy.encode(from_fields(batch)).detach()
        return contrast_plans(policy, settings, batch["action"], cond, generator)

    # ---------------------------------------------------------------- errors

    def _policy_errors(self, pairs: Contrast) -> tuple[Tensor, Tensor]:
        if self.own is None and self.settings.negative == "prediction":
            expert = self._errors(self.denoiser, pairs.demonstrations())
            return expert, torch.zeros_like(expert)  # what it predicts is what it predicts
        expert, own = self._errors(self.denoiser, pairs).chunk(2)
        return expert, own

    def _errors(self, denoiser: BaseDenoiser, pairs: Contrast) -> Tensor:
        """Mean squared error, or nats per mask, of each state ``[2 N]``."""
        if isinstance(denoiser, Denoiser):
            return (denoiser.raw(pairs.x, pairs.t, pairs.cond) - pairs.target).square().mean((1, 2))
        assert isinstance(denoiser, MaskedDenoiser)
        masks = pairs.x == denoiser.vocab_size
        log_p = denoiser.log_probs(pairs.x, pairs.t, pairs.cond)
        target = pairs.target.clamp_min(-1e4)  # 0 x -inf; its exponential stays 0
        return (categorical_kl(target, log_p) * masks).sum(1) / masks.sum(1)


def _check_plans(denoiser: BaseDenoiser, settings: DRO) -> None:
    settings.check_plans()
    if not isinstance(denoiser, Denoiser):
        what = type(denoiser).__name__
        raise ValueError(f"DRO takes a Denoiser or a MaskedDenoiser (own predictions), got {what}")
    assert settings.num_steps is not None  # check_plans
    if settings.make().nfe(2) != 2:
        solver = settings.solver
        raise ValueError(f"{solver=} evaluates more than once a step; use dpmpp_2m or ddim")
    # Refuses more steps than a discrete process has.
    settings.grid(denoiser.process, num_steps=max(1, settings.num_steps - settings.jitter))
