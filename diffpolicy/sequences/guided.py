"""Sequences under guidance by name: the closed list that configs choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masking import to_tokens
from diffpolicy.guidance.reward import RewardGuidance
from diffpolicy.guidance.search import PARTICLE_METHODS, make_particle_method
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import Reward
from diffpolicy.sequences.spec import ROWS, SequenceSpec, fixed_letters, tokens_of
from diffpolicy.settings import check_choice, check_known

_SETTINGS = {"none": (), "cfg": ("scale", "class_index"), "reward": ("scale", "mode", "order")}
STEERED = tuple(_SETTINGS)
GUIDANCE = (*_SETTINGS, *PARTICLE_METHODS)


class GuidedDraws(NamedTuple):
    """Sequences, and what each of them cost.

    Attributes:
        tokens: int64 ``[N, L]``.
        nfe: network evaluations per sequence.
        reward_calls: reward evaluations per sequence.
    """

    tokens: Tensor
    nfe: int
    reward_calls: int


def check_guidance(config: Mapping[str, Any], model: SequenceModel) -> tuple[str, dict[str, Any]]:
    """Return the type of a guidance and its settings.

    Raises:
        ValueError: sequences of ``model`` cannot be drawn under it.
    """
    values = {key: value for key, value in config.items() if key != "name"}
    kind = str(values.pop("type", None))
    check_choice("guidance type", kind, GUIDANCE)
    if kind in PARTICLE_METHODS:
        make_particle_method(kind, **values)
    else:
        check_known(values, _SETTINGS[kind], f"guidance {kind!r}")
    if kind == "cfg":
        model.guided(values.get("scale", 1.0))
        model.class_cond(_class(values, model))
    return kind, values


def draw_guided(
    model: SequenceModel,
    config: Mapping[str, Any],
    reward: Reward,
    size: int,
    *,
    num_steps: int | None = None,
    generator: torch.Generator,
) -> GuidedDraws:
    """Sequences under guidance.

    Args:
        model: what is guided; without a class it is taken unconditionally.
        config: ``type`` (one of ``GUIDANCE``), a ``name`` that is not looked at, and its settings.
        reward: ``[B, L, V] -> [B]``; with a gradient for ``reward`` (but ``mode="exact"``) and
            ``tds``.
        size: how many.
        num_steps: of their chains; ``None``: one position at a time.
        generator: of everything random.

    Raises:
        ValueError: as :func:`check_guidance`.
    """
    kind, values = check_guidance(config, model)
    spec = model.spec
    free = spec.length - len(fixed_letters(spec.fixed))
    evaluations = free if num_steps is None else num_steps
    if spec.time_free:
        evaluations = min(evaluations, free)
    how: dict[str, Any] = {"num_steps": num_steps, "generator": generator}
    if kind in STEERED:
        denoiser, cond = steered(model, config, reward)
        with torch.no_grad():
            steering: dict[str, Any] = {"denoiser": denoiser, "cond": cond, **how}
            tokens = tokens_of(model.chains(model.masked(size), **steering))
        branches = 2 if kind == "cfg" and values.get("scale") not in (None, 1) else 1
        calls = _reward_calls(denoiser, spec) * evaluations
        return GuidedDraws(tokens, evaluations * branches, calls)
    method = make_particle_method(kind, **values)
    parts, rows = [], max(1, ROWS // method.chains)
    for first in range(0, size, rows):
        shape = (min(rows, size - first), spec.length, spec.vocab_size + 1)
        given = model.expand_cond(None, shape[0])
        parts.append(method.draw(model.denoiser, reward, shape, cond=given, **how))
    tokens = torch.cat([to_tokens(part.x0) for part in parts])
    return GuidedDraws(tokens, parts[0].nfe, parts[0].reward_calls)


def steered(
    model: SequenceModel, config: Mapping[str, Any], reward: Reward
) -> tuple[BaseDenoiser, Tensor | None]:
    """The denoiser under a guidance of ``STEERED``, and the condition ``[C]`` of its sequences.

    It has conditionals at every state, so that its law is known where the model's is
    (:func:`~diffpolicy.sequences.evaluate.exactly`).

    Raises:
        ValueError: as :func:`check_guidance`.
    """
    kind, values = check_guidance(config, model)
    if kind == "cfg":
        return model.guided(values.get("scale")), model.class_cond(_class(values, model))
    if kind == "reward":
        return RewardGuidance(model.denoiser, reward, **values), None
    return model.denoiser, None


def _reward_calls(denoiser: BaseDenoiser, spec: SequenceSpec) -> int:
    """Rewards per sequence in one evaluation of a denoiser, its base's among them."""
    total = 0
    at: Any = denoiser
    while at is not None:
        guide = at if isinstance(at, RewardGuidance) else getattr(at, "base", None)
        total += 0 if guide is None else guide.reward_calls(spec.length, spec.vocab_size)
        at = getattr(at, "denoiser", None)
    return total


def _class(values: Mapping[str, Any], model: SequenceModel) -> int:
    index = int(values.get("class_index", -1))
    return index + model.spec.cond_dim if index < 0 else index
