"""Offline actor-critics whose actor is a diffusion policy: Diffusion-QL, IDQL and EDP.

They are combinations of three actors (plain denoising; denoising and Q at the end of the sampling
chain; denoising and Q at the one-step estimate) with two critics (temporal differences to sampled
next plans; implicit Q-learning).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampling import prepare, sample
from diffpolicy.core.starts import prior_start
from diffpolicy.core.steps import Row, Solver
from diffpolicy.data.observation import from_fields
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.learn.cloning.denoising import (
    LossOutput,
    denoising_error,
    mean_over_plan,
    squared_error,
    standard_normal,
)
from diffpolicy.learn.method import Batch, check_sizes
from diffpolicy.settings import check_range


class ActorCriticLoss(nn.Module):
    """Actor and critic in one objective, each learning from its own part of the loss alone.

    ``forward(batch, generator)`` takes a batch of :class:`diffpolicy.data.transitions.Transitions`:
    ``obs`` and ``next_obs`` ``[B, To, O]`` (or by name), ``action [B, H, A]``, ``reward`` and
    ``discount`` ``[B]``, ``valid [B, H]``. The actor's gradient passes through the critic without
    touching its weights, and no gradient of the critic's reaches the actor; an encoder with weights
    learns from both errors, not from the value of the actor's plans. Levels, noise, sampled plans
    and the choice of critic come from ``generator``. Call :meth:`after_step` after every optimiser
    step.

    Args:
        denoiser: the actor.
        heads: ``critic`` (a ``QEnsemble``) and, for the critic ``iql``, ``state_value``; registered
            as they are, as ``heads.<name>``.
        settings: which algorithm.

    Raises:
        ValueError: heads that are missing, superfluous or of the wrong size, levels that the
            process does not have, or more ``grad_steps`` than evaluations.
    """

    def __init__(
        self, denoiser: Denoiser, heads: Mapping[str, nn.Module], settings: ActorCritic
    ) -> None:
        super().__init__()
        wanted, got = sorted(settings.heads), sorted(heads)
        if wanted != got:
            raise ValueError(f"critic={settings.critic!r} trains the heads {wanted}, got {got}")
        names = {"cond_dim": "cond_dim", "horizon": "horizon", "action_dim": "dim"}
        sizes = {mine: getattr(denoiser.network, its, None) for mine, its in names.items()}
        check_sizes("the critic", heads["critic"], "the actor's network", **sizes)
        self.settings = settings
        self.denoiser = denoiser
        self.heads = heads if isinstance(heads, nn.ModuleDict) else nn.ModuleDict(heads)
        self._chain = SamplingChain(denoiser.process, settings) if settings.samples else None
        followed = {"critic": self.heads["critic"]}
        if settings.critic == "td":
            followed["denoiser"] = denoiser
        self.target = nn.ModuleDict({name: copy.deepcopy(m) for name, m in followed.items()})
        self.target.requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode, of all but the target networks."""
        super().train(mode)
        self.target.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the target networks towards the trained ones."""
        for name, target in self.target.items():
            live = self.denoiser if name == "denoiser" else self.heads[name]
            torch._foreach_lerp_(
                list(target.parameters()), list(live.parameters()), self.settings.target_rate
            )
            for mine, theirs in zip(target.buffers(), live.buffers(), strict=True):
                mine.copy_(theirs)

    def forward(self, batch: Batch, generator: torch.Generator) -> LossOutput:
        cond = self.denoiser.encode(from_fields(batch))
        actor, metrics = self._actor(batch, cond, generator)
        learn = self._expectile if self.settings.critic == "iql" else self._temporal
        critic, more = learn(batch, cond, generator)
        everything = {**metrics, **more}
        return LossOutput(actor + critic, {k: v.detach().mean() for k, v in everything.items()})

    def _actor(
        self, batch: Batch, cond: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising, less the value of what the actor makes, ``[B]``."""
        settings, x0 = self.settings, batch["action"]
        t = self.denoiser.process.sample_t((len(x0), 1, 1), generator).to(x0.device, x0.dtype)
        noise = standard_normal(x0.shape, x0, generator)
        valid = batch["valid"] if settings.mask_padding else None
        if settings.actor == "one_step":
            error, plan = denoise_once(self.denoiser, x0, t, noise, cond=cond, valid=valid)
        else:
            error = denoising_error(self.denoiser, x0, t, noise, cond=cond, valid=valid)
            if settings.actor == "bc":
                return error, {"bc": error}
            assert self._chain is not None
            plan = self._chain.run(self.denoiser, cond, x0, generator)
        values = value_for_actor(self.heads["critic"], cond.detach(), plan)
        gain = normalized_value(values, generator)
        return error - settings.eta * gain, {"bc": error, "actor_q": values}

    def _temporal(
        self, batch: Batch, cond: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of Q to the target critics' value of sampled next plans, ``[B]``."""
        target = self.td_target(batch, generator)
        values = self.heads["critic"](cond, batch["action"])
        error = td_error(values, target)
        return error, {"td": error, "q": values, "target": target}

    @torch.no_grad()
    def td_target(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """``r + discount min_m max_n Q_m(s', a'_n)`` with next plans of the target actor, ``[B]``.

        Wang et al. 2023, eq. 4.
        """
        assert self._chain is not None
        many = max(1, self.settings.max_q_backup)
        actor = self.target["denoiser"]
        assert isinstance(actor, Denoiser)
        cond = actor.encode(from_fields(batch, "next_obs")).repeat_interleave(many, dim=0)
        like = batch["action"].repeat_interleave(many, dim=0)
        plan = self._chain.run(actor, cond, like, generator)
        values = best_of_candidates(self.target["critic"](cond, plan), many)
        return batch["reward"] + batch["discount"] * values

    def _expectile(
        self, batch: Batch, cond: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Errors of V to an expectile of Q, and of Q to V, ``[B]`` (IQL, eqs. 5 and 6)."""
        plan = batch["action"]
        with torch.no_grad():
            best = self.target["critic"](cond, plan).amin(0)
        both = torch.cat([cond, self.denoiser.encode(from_fields(batch, "next_obs"))])
        value, after = self.heads["state_value"](both).chunk(2)
        wrong = expectile_error(best - value, self.settings.expectile)
        target = batch["reward"] + batch["discount"] * after.detach()
        values = self.heads["critic"](cond, plan)
        error = td_error(values, target)
        metrics = {"td": error, "v_loss": wrong, "q": values, "v": value, "target": target}
        return error + wrong, metrics


def expectile_error(difference: Tensor, expectile: float) -> Tensor:
    """Asymmetric square ``|tau - 1(u < 0)| u^2`` (Kostrikov et al. 2022, eq. 5), elementwise.

    Its minimiser over a constant v, with ``u = x - v``, is the tau-expectile of x: the mean for tau
    = 0.5, the maximum for tau -> 1.

    Args:
        difference: u, of any shape.
        expectile: tau in (0, 1).
    """
    weight = (expectile - (difference < 0).to(difference.dtype)).abs()
    return weight * difference.square()


def td_error(values: Tensor, target: Tensor) -> Tensor:
    """Squared error of every critic of an ensemble, summed over them.

    Args:
        values: ``[M, B]``.
        target: ``[B]``, no gradient flows into it.

    Returns:
        ``[B]``.
    """
    return (values - target.detach()).square().sum(0)


def best_of_candidates(values: Tensor, candidates: int) -> Tensor:
    """Max-Q backup: each critic's best candidate, then the least of the critics.

    Kumar et al. 2019, as Diffusion-QL uses it (Wang et al. 2023, appendix D).

    Args:
        values: ``[M, B * N]``, the N candidates of a row next to each other.
        candidates: N.

    Returns:
        ``[B]``.
    """
    return values.view(len(values), -1, candidates).amax(-1).amin(0)


def value_for_actor(critic: nn.Module, cond: Tensor, plan: Tensor) -> Tensor:
    """The critics' values ``[M, B]`` with a gradient to the plan and none to their weights."""
    weights = {name: value.detach() for name, value in critic.named_parameters()}
    values: Tensor = torch.func.functional_call(critic, weights, (cond, plan))
    return values


def normalized_value(values: Tensor, generator: torch.Generator) -> Tensor:
    """Q in units of its own size, so that one weight of it serves every scale of reward.

    Of a twin critic a coin per batch decides which is raised; the other's mean absolute value is
    the unit (Wang et al. 2023, section 3.2; the coin is in the authors' code).

    Args:
        values: ``[M, B]``.
        generator: tosses the coin.

    Returns:
        ``[B]``.
    """
    members = len(values)
    member = torch.randint(members, (1,), generator=generator, device=generator.device)
    member = member.to(values.device)
    unit = values.detach().index_select(0, (member + 1) % members).abs().mean()
    return values.index_select(0, member).squeeze(0) / unit.clamp_min(1e-6)


class _Table(Solver):
    """A solver whose rows for one grid were computed before: every training step needs them."""

    def __init__(self, table: list[Row], *, stochastic: bool) -> None:
        self.table, self.stochastic = table, stochastic

    def rows(self, process: GaussianProcess, levels: Tensor) -> list[Row]:
        return self.table


class SamplingChain:
    """Samples plans from pure noise while their denoiser is being trained.

    Args:
        process: of the denoisers to sample.
        settings: solver, steps and the limit of the gradient.

    Raises:
        ValueError: levels that the process does not have, or more ``grad_steps`` than evaluations.
    """

    def __init__(self, process: GaussianProcess, settings: ActorCritic) -> None:
        self.settings, self.levels, solver = settings, settings.grid(process), settings.make()
        self.solver = _Table(solver.rows(process, self.levels), stochastic=solver.stochastic)
        check_range(f"[1, {len(self.solver.table)}]", grad_steps=settings.grad_steps)

    def run(
        self, denoiser: Denoiser, cond: Tensor, like: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Plans of the shape of ``like``, ``[B, H, A]``.

        Args:
            denoiser: whose plans.
            cond: ``[B, C]``.
            like: their shape, dtype and device.
            generator: source of all noise.
        """
        # The weights changed since the last step, and the grid holds embeddings made by them.
        grid = prepare(denoiser, self.solver, self.levels, like)
        draws = 1 + len(self.solver.table) * self.solver.stochastic
        noise = standard_normal((draws, *like.shape), like, generator)
        chain = denoiser, self.solver, prior_start(denoiser.process, noise[0]), grid
        plan = sample(
            *chain,
            cond=cond,
            noise=noise[1:] if self.solver.stochastic else None,
            grad_steps=self.settings.grad_steps,
            checkpoint=self.settings.checkpoint and torch.is_grad_enabled(),
        )
        assert isinstance(plan, Tensor)
        return plan


def denoise_once(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    cond: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoising error ``[B]`` and clean estimate ``[B, H, D]``, both of one evaluation.

    The arguments are those of :func:`diffpolicy.learn.cloning.denoising.denoising_error`; the
    estimate is ``(x_t - sigma eps) / alpha`` for a noise prediction (Kang et al. 2023, eq. 9),
    clipped if the denoiser clips.
    """
    error, x_t, output = squared_error(denoiser, x0, t, noise, cond)
    c_x, c_out, _, _ = denoiser.coefficients(t)
    x0_hat = torch.addcmul(c_x * x_t, c_out, output)
    x0_hat = x0_hat.clamp(-1, 1) if denoiser.clip else x0_hat
    return mean_over_plan(error.mean(-1), valid), x0_hat
