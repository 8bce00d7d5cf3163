"""Policy gradient on reveal probabilities: DDPO, DPOK and GRPO for masked sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.method import Batch
from diffpolicy.learn.reward.rollouts import MaskedRollout, draw_rollout, state_log_probs, step_kl
from diffpolicy.learn.reward.sequence_tuning import SequenceMethod, SequenceTuning, shared_cond
from diffpolicy.settings import check_range, one_of, ranged


@dataclass(frozen=True)
class PolicyGradient(SequenceMethod):
    """Which policy gradient.

    The objective is ``J = E r - kl_weight KL(path || path of the reference)``; a reveal is an
    action, the state it was made in a state.

    Args:
        kl_weight: in units of reward per nat; 0: the reference is not evaluated.
        kl: how the KL enters. ``"reward"``: the log-ratio of each reveal is a cost (DPOK, Fan et
            al. 2023). ``"path"``: the closed-form KL of each step is a loss, and a cost to the
            reveals before it. The same J; ``"path"`` has less variance.
        baseline: ``"mean"`` over the rows; ``"leave_one_out"`` without the row itself (RLOO),
            which has no bias; ``"group"``: mean over groups of rows that share a condition (GRPO,
            Shao et al. 2024). Each step has its own baseline. The two means hold the row itself,
            which makes the expected gradient ``(n - 1) / n`` of that of J with n rows, the KL's
            part like the reward's.
        group_size: consecutive rows that share a condition, of ``group`` (needed) and
            ``leave_one_out`` (None: the whole batch).
        normalize: divide rewards by their standard deviation in the group (not below 0.001), as
            in GRPO; ``kl_weight`` is then in units of that per nat, so that groups of equal
            rewards are held by the KL as firmly as others.
        ratio: ``"token"``: every reveal has its probability ratio, and only the costs that come
            after it (exact, and less variance). ``"sequence"``: one ratio and return per row.
        clip: of the ratio, to ``[1 - clip, 1 + clip]`` (PPO); with ``epochs`` > 1.
        epochs: updates on the same rollout, which is then part of the objective's state.
        rows: batch size, of which a rollout is kept with ``epochs`` > 1; None: that of the trainer.
        num_steps: see :func:`diffpolicy.learn.reward.rollouts.draw_rollout`.
        grad_states: states of each rollout, uniformly drawn, that the gradient passes through in
            an update; None: all. Without bias, cheaper, more variance.

    Raises:
        ValueError: an unknown choice, a value out of range, or settings that do not go together.
    """

    kl_weight: float = ranged("[0, inf)", 0.1)
    kl: str = one_of("path", "reward")
    baseline: str = one_of("leave_one_out", "mean", "group")
    group_size: int | None = ranged("[2, inf)", None)
    normalize: bool = False
    ratio: str = one_of("token", "sequence")
    clip: float = ranged("(0, inf)", 0.2)
    epochs: int = ranged("[1, inf)", 1)
    rows: int | None = ranged("[1, inf)", None)
    num_steps: int | None = ranged("[1, inf)", None)
    grad_states: int | None = ranged("[1, inf)", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "group" and self.group_size is None:
            raise ValueError("baseline='group' needs group_size=N, rows that share a condition")
        if self.baseline == "mean" and self.group_size is not None:
            raise ValueError("baseline='mean' is over all rows; use baseline='group'")
        if self.grad_states is not None and self.ratio == "sequence":
            raise ValueError("the ratio of a sequence needs all its states: leave grad_states out")

    def share(self, rows: int) -> float:
        """The part of J's gradient that the baseline leaves of it, with batches of ``rows``."""
        return 1.0 if self.baseline == "leave_one_out" else 1 - 1 / (self.group_size or rows)

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        """See :class:`PolicyGradientLoss`."""
        settings = replace(self, rows=self.rows or material.batch_size)
        return PolicyGradientLoss(denoiser, material.reference, material.reward, settings)


class PolicyGradientLoss(SequenceTuning):
    """The negative of a surrogate whose gradient is that of ``J`` (see :class:`PolicyGradient`).

    ``forward(batch, generator)`` takes ``index [B]`` and optionally ``cond [B, C]``; with groups
    the first ``B / group_size`` conditions count, once per group. Orders, tokens and the choice of
    states come from ``generator``. With gradient accumulation use ``epochs=1``: a kept rollout
    would serve all parts of an update. Kept rollouts are those of one process.

    Metrics: ``reward`` (mean), ``kl`` (path KL to the reference, unless ``kl_weight`` is 0),
    ``entropy`` (of the path given its order, nats), ``clip_fraction``.

    Args:
        denoiser: trained.
        reference: frozen; None: a copy of ``denoiser`` as it is now.
        reward: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`.
        settings: which.

    Raises:
        ValueError: see :class:`diffpolicy.learn.reward.sequence_tuning.SequenceTuning`, and more
            ``grad_states`` than evaluations, or rows that groups do not divide.
    """

    count: Tensor

    def prepare(self) -> None:
        settings = self.settings
        most = self.evaluations(settings.num_steps)
        check_range(f"[1, {most}]", grad_states=settings.grad_states)
        if settings.epochs > 1:
            if settings.rows is None:
                raise ValueError("epochs > 1 keeps a rollout of rows=<batch size>; give rows")
            self._check_rows(settings.rows)
            row, groups = (
                ((self.denoiser.length,), torch.float32),
                ((self.denoiser.length,), torch.long),
            )
            more = {"groups": groups, "log_p": row, "advantage": row}
            sizes = (settings.rows, settings.rows, settings.epochs)
            self.replay = self.make_replay(sizes, more)
            self.register_buffer("count", torch.tensor(0))

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        settings, size = self.settings, len(batch["index"])
        self._check_rows(size)
        cond = shared_cond(batch, size, settings.group_size or 1)
        if settings.epochs == 1:
            graph = settings.grad_states is None and torch.is_grad_enabled()
            play = self.draw(size, cond, generator, graph=graph)
        elif not self.training:
            play, graph = self.draw(size, cond, generator), False
        else:
            if self.replay.due():
                self._store(self.draw(size, cond, generator))
            play, graph = self._stored(), False
        return self.surrogate(play, generator, graph=graph)

    def surrogate(
        self, play: Play, generator: torch.Generator, *, graph: bool = False
    ) -> LossOutput:
        """The loss of given rollouts, whoever drew them; ``graph``: they carry one, use that."""
        log_p, kl, chosen = self._evaluate(play, generator, graph=graph)
        gain, clipped = self._clipped(play, log_p, chosen)
        loss = -gain
        if kl is not None:
            loss = self.settings.kl_weight * self.settings.share(len(gain)) * kl - gain
        metrics = {
            "reward": play.reward.mean(),
            "entropy": -play.rollout.log_p.detach().sum(1).mean(),
            "clip_fraction": clipped,
        }
        if self.settings.kl_weight > 0:
            metrics["kl"] = play.kl.mean()
        return LossOutput(loss, metrics)

    def draw(
        self, size: int, cond: Tensor | None, generator: torch.Generator, *, graph: bool = False
    ) -> Play:
        """Roll out the present denoiser and judge its reveals; one call of the reward."""
        settings = self.settings
        other = self.reference if settings.kl_weight > 0 else None
        how: dict[str, Any] = {"generator": generator, "num_steps": settings.num_steps}
        rollout = draw_rollout(self.denoiser, size, reference=other, cond=cond, graph=graph, **how)
        reward = self.score(rollout.tokens)
        with torch.no_grad():
            return Play(rollout, reward, *judge(rollout, reward, settings))

    def _evaluate(
        self, play: Play, generator: torch.Generator, *, graph: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Log-probabilities ``[B, L]`` and KL ``[B]`` with a graph, and which reveals count."""
        settings, rollout = self.settings, play.rollout
        needs_kl = settings.kl == "path" and settings.kl_weight > 0
        if graph:
            assert not needs_kl or rollout.step_kl is not None
            return rollout.log_p, rollout.path_kl if needs_kl else None, 1.0
        steps, share = rollout.steps(), 1.0
        if settings.grad_states is not None and settings.grad_states < rollout.nfe:
            shape = len(rollout.tokens), rollout.nfe
            u = torch.rand(shape, generator=generator, device=generator.device)
            steps = u.argsort(1)[:, : settings.grad_states].to(rollout.tokens.device)
            share = rollout.nfe / settings.grad_states
        log_p = state_log_probs(self.denoiser, rollout, steps)
        kl = None
        if needs_kl:
            with torch.no_grad():
                other = state_log_probs(self.reference, rollout, steps)
            kl = share * step_kl(log_p, other, rollout, steps).sum(1)
        here = rollout.groups.unsqueeze(1) == steps.unsqueeze(-1)
        which = rollout.tokens.view(len(here), 1, -1, 1).expand(*here.shape, 1)
        picked = (log_p.gather(-1, which).squeeze(-1) * here).sum(1)
        return picked, kl, share * here.any(1)

    def _clipped(self, play: Play, log_p: Tensor, chosen: Tensor | float) -> tuple[Tensor, Tensor]:
        """The clipped surrogate ``[B]`` to be maximised, and the clipped fraction of ratios."""
        counts = torch.as_tensor(chosen, device=log_p.device) > 0
        log_ratio = torch.where(counts, log_p - play.rollout.log_p.detach(), 0.0)
        advantage = play.advantage
        if self.settings.ratio == "sequence":
            log_ratio, advantage = log_ratio.sum(1, keepdim=True), advantage[:, :1]
            chosen, counts = 1.0, counts.new_ones(1)
        ratio = log_ratio.exp()
        low, high = 1 - self.settings.clip, 1 + self.settings.clip
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        beyond = ((ratio < low) | (ratio > high)) & counts
        clipped = beyond.sum() / counts.expand_as(beyond).sum().clamp_min(1)
        return (gain * chosen).sum(1), clipped.detach()

    # ---------------------------------------------------------------- the kept rollout

    def after_step(self) -> None:
        if self.settings.epochs > 1:
            self.replay.tick()

    def _check_rows(self, size: int) -> None:
        group, rows = self.settings.group_size or 1, self.settings.rows
        if size % group:
            raise ValueError(f"group_size={group} must divide the batch of {size} rows")
        if size < 2:
            raise ValueError("a baseline needs at least 2 rows; got a batch of 1")
        if self.settings.epochs > 1 and self.training and size != rows:
            raise ValueError(f"rows={rows} must be the batch size, which is {size}")

    def _store(self, play: Play) -> None:
        rollout = play.rollout
        self.replay.write({**rollout._asdict(), **play._asdict()})
        self.count.fill_(rollout.nfe)

    def _stored(self) -> Play:
        kept, count = self.replay, int(self.count)
        grid = torch.linspace(1, 0, count + 1, dtype=torch.float64).view(-1, 1, 1, 1)
        cond = kept["cond"] if self.cond_dim else None
        how = count, grid, self.denoiser.vocab_size, kept["log_p"], cond
        rollout = MaskedRollout(kept["tokens"], kept["groups"], *how)
        return Play(rollout, kept["reward"], kept["advantage"], kept["kl"])


class Play(NamedTuple):
    """A rollout and what its reveals were worth; all without a graph but what ``rollout`` holds.

    Attributes:
        rollout: B sequences.
        reward: ``[B]``.
        advantage: of each reveal ``[B, L]``.
        kl: ``[B]``, path KL to the reference, nats.
    """

    rollout: MaskedRollout
    reward: Tensor
    advantage: Tensor
    kl: Tensor


def judge(
    rollout: MaskedRollout, reward: Tensor, settings: PolicyGradient
) -> tuple[Tensor, Tensor]:
    """Advantages ``[B, L]`` of reveals, and the KL ``[B]``.

    A reveal's return is the reward less the costs that it can still change: those of later
    evaluations, and its own log-ratio. Tokens of one evaluation are independent given its state, so
    what else it reveals is not among them.
    """
    size, count = len(reward), rollout.nfe
    if settings.normalize:
        rows = settings.group_size or size
        spread = reward.view(-1, rows).std(1, correction=0).clamp_min(1e-3)
        reward = reward / spread.repeat_interleave(rows)
    zeros = reward.new_zeros(size, count)
    own, later, kl = zeros.new_zeros(rollout.tokens.shape), zeros, reward.new_zeros(size)
    revealed = rollout.groups.clamp_min(0)  # what is known costs nothing, at any step
    at_step = zeros  # cost that each evaluation adds to its own return
    if settings.kl_weight > 0:
        assert rollout.log_reference is not None
        assert rollout.step_kl is not None
        kl = rollout.path_kl.detach()
        costs = settings.kl_weight * rollout.step_kl.detach()
        if settings.kl == "reward":
            own = settings.kl_weight * (rollout.log_p.detach() - rollout.log_reference)
            own = own.to(zeros.dtype)
            costs = at_step = zeros.scatter_add(1, revealed, own)
        later = costs.flip(1).cumsum(1).flip(1) - costs
        total = reward - costs.sum(1)
    else:
        total = reward
    if settings.ratio == "sequence":
        total = total.unsqueeze(1)
        return (total - _baseline(total, settings)).expand_as(own), kl
    steps = reward.unsqueeze(1) - later
    base = _baseline(steps - at_step, settings)
    return (steps - base).gather(1, revealed) - own, kl


def _baseline(returns: Tensor, settings: PolicyGradient) -> Tensor:
    """What returns ``[B, K]`` are compared with, the same shape."""
    rows = len(returns) if settings.group_size is None else settings.group_size
    groups = returns.view(-1, rows, returns.shape[1])
    total = groups.sum(1, keepdim=True)
    if settings.baseline == "leave_one_out":
        base = (total - groups) / (rows - 1)
    else:
        base = (total / rows).expand_as(groups)
    return base.reshape(returns.shape)
