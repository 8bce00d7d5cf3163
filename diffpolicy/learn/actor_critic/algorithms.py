"""Which actor-critic: an actor, a critic and their settings."""

from __future__ import annotations

from dataclasses import dataclass

from diffpolicy.core.sampler import Sampler
from diffpolicy.settings import named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True, kw_only=True)
class ActorCritic(Sampler):
    """Which actor-critic, and its settings; the discount is the data's.

    Args:
        actor: ``"bc"``: denoising alone; the critic chooses among candidates when acting.
            ``"chain"``: denoising minus ``eta`` times the normalised Q of a plan sampled through
            the whole chain. ``"one_step"``: the same with the clean estimate of the noised data
            plan, from the one evaluation that denoising makes anyway (Kang et al. 2023, eq. 9).
        critic: ``"td"``: Q towards the target critics' least value of next plans that the target
            actor samples. ``"iql"``: V towards an expectile of Q over the data, Q towards V
            (Kostrikov et al. 2022); no plan is sampled.
        eta: weight of Q in the loss of the actors ``chain`` and ``one_step``.
        expectile: tau of ``iql``, in (0, 1).
        target_rate: share of the way that target networks go towards the trained ones after every
            step, in (0, 1].
        max_q_backup: of ``td``, next plans sampled per state of which the best counts; 0: one.
        solver: of the sampled plans; as ``num_steps``, ``options`` and ``spacing``, see
            :class:`diffpolicy.core.Sampler`.
        grad_steps: of ``chain``, the last evaluations that Q's gradient passes through; ``None``:
            all of them.
        checkpoint: of ``chain``, recompute the evaluations in the backward pass to save memory.
        mask_padding: leave positions out of the denoising error that ``valid`` says are padding.

    Raises:
        ValueError: an unknown choice, or a value out of range.
    """

    actor: str = one_of("bc", "chain", "one_step", default="chain", kw_only=False)
    critic: str = one_of("td", "iql", kw_only=False)
    eta: float = ranged("(0, inf)", 1.0)
    expectile: float = ranged("(0, 1)", 0.7)
    target_rate: float = ranged("(0, 1]", 0.005)
    max_q_backup: int = ranged("[0, inf)", 0)
    solver: str = "ddpm"
    num_steps: int = 5
    grad_steps: int | None = ranged("[1, inf)", None)
    checkpoint: bool = False
    mask_padding: bool = False

    @property
    def samples(self) -> bool:
        """Whether training samples plans."""
        return self.actor == "chain" or self.critic == "td"

    @property
    def heads(self) -> tuple[str, ...]:
        """The networks it needs beside the denoiser: ``critic`` and, for ``iql``, state_value."""
        return ("critic", "state_value") if self.critic == "iql" else ("critic",)
