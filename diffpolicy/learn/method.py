"""What a tuning method is: its settings, what it reads, its objective and the source of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.data.observation import from_fields, holds
from diffpolicy.settings import check_settings

Batch = Mapping[str, Tensor]
"""What an objective learns from: tensors of as many rows each, by name."""

Reward = Callable[..., Tensor]
"""What items are worth: of plans, and their condition where there is one, or of sequences."""

READABLE = ("pairs", "labels", "observations", "demonstrations", "reward")


def judged(reward: Reward, items: Tensor, cond: Tensor | None = None) -> Tensor:
    """The reward of items ``[B]``, given their condition if there is one.

    Raises:
        ValueError: unless it is one number for each.
    """
    value = reward(items) if cond is None else reward(items, cond)
    if value.shape != items.shape[:1]:
        shape = list(value.shape)
        raise ValueError(f"a reward returns one number per item, [{len(items)}]; got {shape}")
    return value


def check_sizes(what: str, module: object, other: str, **sizes: int | None) -> None:
    """Raise ``ValueError`` if a module says another size than what it is used with has.

    Args:
        what: the module's name in the message.
        module: its attributes are looked at; what it does not say is not checked.
        other: the name of what it is used with.
        **sizes: what that has, by the names of the attributes; ``None``: it does not say.
    """
    for name, wanted in sizes.items():
        got = getattr(module, name, None)
        if None not in (got, wanted) and got != wanted:
            raise ValueError(f"{what} has {name}={got}, {other} {wanted}")


def encoded(denoiser: BaseDenoiser, batch: Batch, key: str = "obs") -> Tensor | None:
    """The condition ``[B, C]`` of a batch's observations ``key``; None: it holds none."""
    return denoiser.encode(from_fields(batch, key)) if holds(batch, key) else None


def plan_shape(denoiser: BaseDenoiser) -> tuple[int, int]:
    """``(H, D)`` of the plans that a denoiser's network (without one, the denoiser) makes.

    Raises:
        ValueError: a denoiser that does not tell.
    """
    network = getattr(denoiser, "network", denoiser)
    horizon, dim = (getattr(network, name, None) for name in ("horizon", "dim"))
    if horizon is None or dim is None:
        name = type(network).__name__
        raise ValueError(f"{name} does not tell plans' shape by its attributes horizon and dim")
    return int(horizon), int(dim)


def rows_and_cond(denoiser: BaseDenoiser, batch: Batch) -> tuple[int, Tensor | None]:
    """How many rows a batch has, and their condition ``[B, C]``: given, or of observations."""
    cond = batch.get("cond")
    if cond is None:
        cond = encoded(denoiser, batch)
    return len(next(iter(batch.values()))), cond


class Source(Protocol):
    """What the trainer draws its batches from."""

    def __len__(self) -> int:
        """How many examples there are."""

    def gather(self, indices: Tensor, /) -> dict[str, Tensor]:
        """The examples of these indices as a batch."""


class Method:
    """A way to tune a denoiser; subclasses are frozen dataclasses whose fields are the settings.

    A method is one file with such a class and its loss, and a line of
    :data:`diffpolicy.learn.methods.METHODS`.

    Attributes:
        command: ``"tune"`` (by a reward), ``"prefer"`` (by comparisons) or ``"distill"`` (by the
            policy's own plans): who offers it.
        items: ``"plans"`` of policies or ``"sequences"``: what it tunes.

    Example:
        >>> @dataclass(frozen=True)
        ... class Mine(Method):
        ...     command: ClassVar[str] = "prefer"
        ...     margin: float = 0.1
        ...     def reads(self): return frozenset({"pairs"})
        ...     def objective(self, denoiser, material): return MyLoss(denoiser, self.margin)
        >>> METHODS["mine"] = Mine
        >>> policy.prefer(data, {"type": "mine", "margin": 0.2}, config, "runs/mine")
    """

    command: ClassVar[str] = "tune"
    items: ClassVar[str] = "plans"

    def __post_init__(self) -> None:
        check_settings(self)

    def reads(self) -> frozenset[str]:
        """What the method cannot do without, some of ``READABLE``."""
        return frozenset({"reward", "observations"})

    @property
    def clones_demonstrations(self) -> bool:
        """Whether behaviour cloning of demonstrations is added, where there are some."""
        return False

    @property
    def scored_steps(self) -> tuple[int, ...]:
        """Numbers of sampling steps that policies are scored with before and after."""
        return (1, 2, 4, 10)

    def begin(self, policy: Any) -> Any:
        """What is tuned: the policy itself, unless the method makes another one of it."""
        return policy

    def objective(self, denoiser: BaseDenoiser, material: Any) -> nn.Module:
        """The loss, a module that holds what is tuned as its ``denoiser``.

        Its ``forward(batch, generator)`` returns a
        :class:`~diffpolicy.learn.cloning.denoising.LossOutput`.

        Args:
            denoiser: what is tuned.
            material: what there is to learn from (its reward and sizes alone may be looked at here,
                because there may be no data yet; batches come from :meth:`source`): a
                :class:`~diffpolicy.learn.material.PlanMaterial`, or of sequences a
                :class:`~diffpolicy.learn.material.SequenceMaterial`.

        Raises:
            ValueError: settings that do not fit the denoiser.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no objective(denoiser, material)")

    def source(self, material: Any) -> Source:
        """The batches of a method of plans: by default what :meth:`reads` says."""
        source: Source = material.source(self)
        return source
