"""Tuning methods by name: the closed list that configurations choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffpolicy.learn.cloning.denoising import Cloning
from diffpolicy.learn.distill.consistency import Consistency
from diffpolicy.learn.distill.guided import Guided
from diffpolicy.learn.distill.halving import Halving
from diffpolicy.learn.distill.rectified import Rectified
from diffpolicy.learn.method import Method
from diffpolicy.learn.preferences.dpo import DPO, SequenceDPO
from diffpolicy.learn.preferences.dro import DRO
from diffpolicy.learn.preferences.pso import PSO, SequencePSO
from diffpolicy.learn.reward.pathwise import Pathwise
from diffpolicy.learn.reward.plan_chain import PlanChain
from diffpolicy.learn.reward.policy_gradient import PolicyGradient
from diffpolicy.learn.reward.stepwise import Stepwise
from diffpolicy.learn.reward.weighted import WeightedDenoising
from diffpolicy.networks.registry import class_of
from diffpolicy.settings import ConfigError, from_values

METHODS: dict[str, type[Method]] = {
    "plan_chain": PlanChain,
    "pathwise": Pathwise,
    "policy_gradient": PolicyGradient,
    "weighted": WeightedDenoising,
    "stepwise": Stepwise,
    "cloning": Cloning,
    "consistency": Consistency,
    "guided": Guided,
    "halving": Halving,
    "rectified": Rectified,
    "dpo": DPO,
    "pso": PSO,
    "dro": DRO,
    "sequence_dpo": SequenceDPO,
    "sequence_pso": SequencePSO,
}
"""Every method by the name that configurations give as ``type``; entries may be added."""


def make_method(values: Mapping[str, Any]) -> Method:
    """A method from plain values.

    Args:
        values: ``type`` (a name of :data:`METHODS`, or ``package.module:Class`` of a subclass of
            :class:`Method`), a ``name`` that is not looked at, and the settings of the method,
            groups of them as nested values.

    Example:
        >>> make_method({"type": "dpo", "loss": "ipo", "score": {"draws": 2}})

    Raises:
        ValueError: an unknown method or setting, with the nearest known one.
    """
    given = dict(values)
    if "type" not in given:
        raise ConfigError(f"a method needs a type, one of {', '.join(METHODS)}; got {given}")
    kind = given.pop("type")
    given.pop("name", None)
    return from_values(method_class(kind), given, f"{kind}.")


def method_class(name: object) -> type[Method]:
    """The class of a name of :data:`METHODS`, or of ``package.module:Class``.

    Raises:
        ValueError: what :func:`~diffpolicy.networks.registry.class_of` refuses.
    """
    return class_of(METHODS, name, "method", Method)


def method_of(
    method: Method | Mapping[str, Any], command: str | None = None, *, items: str | None = None
) -> Method:
    """A method, made from plain values where needed, that does what is asked for.

    Args:
        method: a method, or values for :func:`make_method`.
        command: ``"tune"``, ``"prefer"`` or ``"distill"``; None: any.
        items: ``"plans"`` or ``"sequences"``; None: either.

    Raises:
        ValueError: a method of the other command, or of other items.
    """
    made = method if isinstance(method, Method) else make_method(method)
    name = type(made).__name__
    if command not in (None, made.command):
        use = f"policy.{made.command}(...) or `diffpolicy {made.command}`"
        raise ValueError(f"{name} is a method of {made.command!r}, not of {command!r}: use {use}")
    if items not in (None, made.items):
        known = ", ".join(key for key, kind in METHODS.items() if kind.items == items)
        raise ValueError(f"{name} tunes models of {made.items}, not {items} as {known} do")
    return made
