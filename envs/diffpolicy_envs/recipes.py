"""What a data set is made by: an environment, its expert and some settings, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a data set is made from nothing (``diffpolicy data make NAME``).

    Args:
        env: Gymnasium id whose environment has a method ``expert_action(rng) -> action [A]``. Of a
            derived set the environment that its rewards are of, which needs no expert.
        kwargs: arguments of the environment, JSON values.
        episodes: how many are kept. Seeds are tried in order until so many were.
        seeds_from: the first seed; demonstrations use 0 to 99,999.
        noise: standard deviation added to what is executed, in units of the action; the clean
            action is stored.
        keep: ``"success"``: only episodes that succeeded at some step; ``"all"``: every one.
        about: one sentence for the list.
        licence: of the simulator and of the expert, as their packages say it.
        extra: the pip extra of ours that installs the simulator; empty: none is needed.
        minutes: CPU minutes that it takes, measured or estimated.
        megabytes: of the store.
        fields: entries of ``info["record"]`` (arrays that the environment gives at the reset and at
            every step) that are stored beside the observations, as ``info.NAME``.
        derived: the name of the set that this one is made from, by new rewards; None: it is
            recorded.
        relabel: of a derived set ``"module:function"``, called as ``function(episode, **kwargs)``.
            ``episode`` has the arrays of one episode of that set, by the names of its fields. It
            returns the arrays that replace fields: ``{"reward": [T], "terminated": [T]}``, and
            ``"success"`` [T], which is not stored, if the task knows one.

    Raises:
        ValueError: no episode, an unknown ``keep``, or only one of ``derived`` and ``relabel``.

    Example:
        >>> RECIPES = {"robot/push": Recipe(env="my_robot:Push-v0", episodes=200,
        ...     about="a scripted push", licence="MIT", extra="", minutes=2, megabytes=3)}
    """

    env: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    episodes: int
    seeds_from: int = 0
    noise: float = 0.0
    keep: Literal["success", "all"] = "success"
    about: str
    licence: str
    extra: str
    minutes: float
    megabytes: float
    fields: tuple[str, ...] = ()
    derived: str | None = None
    relabel: str | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"a recipe needs episodes, got episodes={self.episodes}")
        if self.keep not in ("success", "all"):
            raise ValueError(f'keep must be "success" or "all", got {self.keep!r}')
        if (self.derived is None) != (self.relabel is None):
            raise ValueError(
                "a derived set needs both: the set that it is made from, and its function; got "
                f"derived={self.derived!r} and relabel={self.relabel!r}"
            )
