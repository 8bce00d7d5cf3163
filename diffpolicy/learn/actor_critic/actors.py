"""Plans that a denoiser makes while it is trained: by the whole chain, or in one evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampling import prepare, sample
from diffpolicy.core.solvers import Row, Solver
from diffpolicy.core.starts import prior_start
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.learn.cloning.denoising import standard_normal


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
        self.levels, solver = settings.grid(process), settings.make()
        self.solver = _Table(solver.rows(process, self.levels), stochastic=solver.stochastic)
        nfe = len(self.solver.table)
        if settings.grad_steps is not None and settings.grad_steps > nfe:
            raise ValueError(
                f"grad_steps={settings.grad_steps} is more than the {nfe} evaluations of "
                f"{settings.num_steps} steps of {settings.solver}"
            )

    def run(
        self,
        denoiser: Denoiser,
        cond: Tensor,
        like: Tensor,
        generator: torch.Generator,
        *,
        grad_steps: int | None = None,
        checkpoint: bool = False,
    ) -> Tensor:
        """Plans of the shape of ``like``, ``[B, H, A]``.

        Args:
            denoiser: whose plans.
            cond: ``[B, C]``.
            like: their shape, dtype and device.
            generator: source of all noise.
            grad_steps: see :func:`diffpolicy.core.sampling.sample`.
            checkpoint: likewise.
        """
        # The weights changed since the last step, and the grid holds embeddings made by them.
        grid = prepare(denoiser, self.solver, self.levels, like)
        draws = 1 + len(self.solver.table) * self.solver.stochastic
        noise = standard_normal((draws, *like.shape), like, generator)
        plan = sample(
            denoiser,
            self.solver,
            prior_start(denoiser.process, noise[0]),
            grid,
            cond=cond,
            noise=noise[1:] if self.solver.stochastic else None,
            grad_steps=grad_steps,
            checkpoint=checkpoint,
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
    x_t = denoiser.process.add_noise(x0, t, noise)
    output = denoiser.raw(x_t, t, cond)
    error = (output - denoiser.target(x0, noise, t)).square().mean(-1)
    c_x, c_out, _, _ = denoiser.coefficients(t)
    x0_hat = torch.addcmul(c_x * x_t, c_out, output)
    x0_hat = x0_hat.clamp(-1, 1) if denoiser.clip else x0_hat
    if valid is None:
        return error.mean(-1), x0_hat
    weight = valid.to(error.dtype)
    return (error * weight).sum(-1) / weight.sum(-1).clamp_min(1), x0_hat
