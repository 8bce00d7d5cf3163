"""Which actor-critic: an actor, a critic and their settings, and the published combinations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from diffpolicy.core.sampler import Sampler
from diffpolicy.settings import named_settings, settings_of

ACTORS = ("bc", "chain", "one_step")
CRITICS = ("td", "iql")


@named_settings
@dataclass(frozen=True, kw_only=True)
class ActorCritic(Sampler):
    """Which actor-critic, and its settings; the discount is the data's.

    A setting that the chosen actor and critic do not use must keep its default.

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
        ValueError: an unknown choice, a value out of range, or a setting that would have no effect.
    """

    actor: str = field(default="chain", kw_only=False)
    critic: str = field(default="td", kw_only=False)
    eta: float = 1.0
    expectile: float = 0.7
    target_rate: float = 0.005
    max_q_backup: int = 0
    solver: str = "ddpm"
    num_steps: int = 5
    grad_steps: int | None = None
    checkpoint: bool = False
    mask_padding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actor not in ACTORS or self.critic not in CRITICS:
            raise ValueError(
                f"actor must be one of {ACTORS} and critic one of {CRITICS}, got {self.actor!r} "
                f"and {self.critic!r}"
            )
        for name, holds, expected in (
            ("eta", self.eta > 0, "positive (0 is actor='bc')"),
            ("expectile", 0 < self.expectile < 1, "in (0, 1)"),
            ("target_rate", 0 < self.target_rate <= 1, "in (0, 1]"),
            ("max_q_backup", self.max_q_backup >= 0, "at least 0"),
            ("grad_steps", self.grad_steps is None or self.grad_steps >= 1, "at least 1 or None"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")
        for entry in fields(self):
            user = self._user(entry.name)
            if user is not None and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"{entry.name}={getattr(self, entry.name)!r} has no effect with actor="
                    f"{self.actor!r} and critic={self.critic!r}; it belongs to {user}"
                )

    def _user(self, name: str) -> str | None:
        """Who uses the setting, if the chosen pair does not."""
        used, user = {
            "eta": (self.actor != "bc", "the actors 'chain' and 'one_step'"),
            "expectile": (self.critic == "iql", "the critic 'iql'"),
            "max_q_backup": (self.critic == "td", "the critic 'td'"),
            "solver": (self.samples, "the actor 'chain' and the critic 'td'"),
            "num_steps": (self.samples, "the actor 'chain' and the critic 'td'"),
            "grad_steps": (self.actor == "chain", "the actor 'chain'"),
            "checkpoint": (self.actor == "chain", "the actor 'chain'"),
        }.get(name, (True, ""))
        return None if used else user

    @property
    def samples(self) -> bool:
        """Whether training samples plans."""
        return self.actor == "chain" or self.critic == "td"

    @property
    def heads(self) -> tuple[str, ...]:
        """The networks it needs beside the denoiser: ``critic`` and, for ``iql``, state_value."""
        return ("critic", "state_value") if self.critic == "iql" else ("critic",)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From plain values.

        Raises:
            ValueError: unknown entries, or values out of range.
        """
        return settings_of(cls, config, "actor_critic")


ALGORITHMS: Mapping[str, ActorCritic] = {
    "diffusion_ql": ActorCritic("chain", "td"),  # Wang et al. 2023
    "idql": ActorCritic("bc", "iql"),  # Hansen-Estruch et al. 2023
    "edp": ActorCritic("one_step", "td", solver="dpmpp_2m", num_steps=15),  # Kang et al. 2023
}
