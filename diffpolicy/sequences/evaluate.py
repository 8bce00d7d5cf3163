"""One table row about generated sequences: rewards, divergence, diversity, closeness to the data.

A reward alone invites hacking: the training oracle is reported beside a held-out one, and both
beside how far the model has left its reference (DRAKES, Wang et al. 2025, section 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

import diffpolicy.sequences.exact as exact
import diffpolicy.sequences.metrics as metrics
from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.learn.method import check_sizes
from diffpolicy.learn.reward.chains import categorical_kl
from diffpolicy.sequences.exact import ExactLaw, StateSpace
from diffpolicy.sequences.model import SequenceModel
from diffpolicy.sequences.oracles import Oracles, score
from diffpolicy.sequences.spec import Chain, Drawing
from diffpolicy.sequences.task import (
    SequenceTask,
    check_tokens,
    measured,
    pad_of,
    reward_of,
    valid_rows,
)
from diffpolicy.settings import check_range, check_settings, ranged

ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """Settings of :func:`evaluate_sequences`.

    Args:
        kmer: letters of the k-mers that are counted.
        top_fraction: of the data, by label, that k-mers and profiles are compared with.
        chains: sequences drawn to estimate the divergence from the reference.
        num_steps: of these chains; ``None``: one position at a time.
        elbo_draws: sets of masks per sequence for the likelihood.
        exact: compute the divergence exactly where that is possible (seconds per call for 8-mers),
            in place of estimating it by ``chains``.
        seed: of both.

    Raises:
        ValueError: values out of range.
    """

    EXACT_STATES: ClassVar[int] = 1_000_000

    kmer: int = ranged("[1, inf)", 3)
    top_fraction: float = ranged("(0, 1]", 0.01)
    chains: int = ranged("[1, inf)", 512)
    num_steps: int | None = None
    elbo_draws: int = ranged("[1, inf)", 16)
    exact: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)


def evaluate_sequences(
    model: SequenceModel | None,
    task: SequenceTask,
    tokens: Any,
    *,
    oracles: Oracles,
    reference: SequenceModel,
    settings: Evaluation | None = None,
) -> dict[str, Any]:
    """Everything there is to say about sequences drawn from a tuned model, as JSON values.

    Args:
        model: what they were drawn from, for its divergence from ``reference``; ``None`` for
            methods that have no model of their own (best of N, particles), whose divergence is
            then null.
        task: says which sequences are valid.
        tokens: ``[N, L]``.
        oracles: the rewards.
        reference: the pre-trained model.
        settings: see :class:`Evaluation`.

    Returns:
        ``reward``, ``held_out`` and ``log_likelihood`` (a bound, under the reference) with
        ``median``, ``q25``, ``q75`` and ``mean``; ``kl`` of the unconditional model to the
        reference with ``kl_kind`` (``"exact"`` of sequences, for tables with at most a million
        partially masked states; else ``"path"``, an upper bound of it) and its
        ``kl_standard_error``; ``entropy`` per position in nats; ``diversity`` (mean Hamming
        distance of two sequences); ``unique`` and ``valid`` fractions; ``kmer_correlation`` and
        ``profile_correlation`` with the top of the data; ``wild_type_distance`` where the task
        names a wild type. ``mean_length`` where lengths differ. Undefined figures are null, and so
        is ``held_out`` where nothing judges the reward.

    Raises:
        ValueError: sequences of another size.
    """
    how = Evaluation() if settings is None else settings
    check_tokens(tokens, task.alphabet, task.length, "tokens")
    given = torch.as_tensor(tokens).cpu()
    check_range("[1, inf)", sequences=len(given))
    held, vocab_size = given.numpy(), len(task.alphabet)
    masks = torch.Generator(reference.device).manual_seed(how.seed)
    bound = reference.log_likelihood(given, draws=how.elbo_draws, generator=masks)
    row = {
        "count": len(held),
        **{
            name: None if oracle is None else metrics.quartiles(score(oracle, held, vocab_size))
            for name, oracle in oracles.columns.items()
        },
        "log_likelihood": metrics.quartiles(bound.double().cpu().numpy()),
        "entropy": float(metrics.position_entropy(held, vocab_size).mean()),
        "diversity": metrics.mean_pairwise_hamming(held, vocab_size),
        "unique": metrics.unique_fraction(held),
        "valid": float(valid_rows(task, held).mean()),
        **_closeness(task, held, how),
        **_divergence(model, reference, task, how),
    }
    return {name: _finite(value) for name, value in row.items()}


def _closeness(task: SequenceTask, held: Any, how: Evaluation) -> dict[str, Any]:
    vocab_size = len(task.alphabet)
    top = metrics.top_sequences(*measured(task), how.top_fraction)
    kmer = min(how.kmer, task.length)
    pad = pad_of(task)
    found: dict[str, Any] = {
        "kmer_correlation": metrics.kmer_correlation(held, top, kmer, vocab_size, pad=pad),
        "profile_correlation": metrics.profile_correlation(held, top, vocab_size),
    }
    if pad is not None:
        found["mean_length"] = float((held != pad).sum(1).mean())
    wild_type = getattr(task, "wild_type", None)
    if wild_type is not None:
        letters = [task.alphabet.index(letter) for letter in wild_type]
        found["wild_type_distance"] = float(metrics.hamming(held, letters).mean())
    return found


def _divergence(
    model: SequenceModel | None, reference: SequenceModel, task: SequenceTask, how: Evaluation
) -> dict[str, Any]:
    if model is None:
        return {"kl": None, "kl_kind": None, "kl_standard_error": None}
    known = all(can_be_exact(m, task) for m in (model, reference))
    if how.exact and known and how.num_steps is None:
        return {"kl": exact_kl(model, reference), "kl_kind": "exact", "kl_standard_error": 0.0}
    generator = torch.Generator(model.device).manual_seed(how.seed)
    found = path_kl(model, reference, how.chains, num_steps=how.num_steps, generator=generator)
    error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return {"kl": float(found.mean()), "kl_kind": "path", "kl_standard_error": error}


class Exact(NamedTuple):
    """What is known exactly of a tuned model.

    Attributes:
        scores: reward, divergence and progress.
        front: ``(KL, E[r])`` of the best laws for weights from 1 down to 0.01.
    """

    scores: exact.ExactScores
    front: list[tuple[float, float]]


def can_be_exact(model: SequenceModel, task: SequenceTask) -> bool:
    """Whether the law of ``model`` and its reward can be computed for every sequence."""
    states = (len(task.alphabet) + 1) ** task.length
    alike = not model.spec.lengths  # the best law would move lengths, which tuning does not
    small = alike and states <= Evaluation.EXACT_STATES
    return task.kind == "table" and model.spec.time_free and small


@torch.no_grad()
def exactly(
    model: SequenceModel,
    reference: SequenceModel,
    task: SequenceTask,
    kl_weight: float,
    *,
    guided: tuple[BaseDenoiser, Tensor | None] | None = None,
) -> Exact:
    """Compute exact figures of a tuned or guided model (see :func:`can_be_exact`).

    Args:
        model: tuned.
        reference: the pre-trained model.
        task: whose reward it is.
        kl_weight: of the divergence, positive.
        guided: ``model`` under guidance and its condition, see
            :func:`~diffpolicy.sequences.guided.steered`; ``None``: ``model`` itself.
    """
    space, p, q = _laws(model, reference, guided)
    tokens = space.states[space.sequences]
    reward = torch.from_numpy(score(reward_of(task), tokens, space.vocab_size))
    laws = [exact.optimum(q, reward, float(weight)) for weight in torch.logspace(0, -2, 24)]
    front = [(exact.divergence(law, q), float((law * reward).sum())) for law in laws]
    return Exact(exact.exact_scores(p, q, reward, kl_weight), front)


@torch.no_grad()
def exact_kl(model: SequenceModel, reference: SequenceModel) -> float:
    """Compute ``KL(p || p_reference)`` of sequences drawn one position at a time, in nats.

    Models that were trained with a condition are taken unconditionally.

    Raises:
        ValueError: too many states, or models that depend on the noise level.
    """
    _, p, q = _laws(model, reference)
    return exact.divergence(p, q)


def _laws(
    model: SequenceModel,
    reference: SequenceModel,
    guided: tuple[BaseDenoiser, Tensor | None] | None = None,
) -> tuple[StateSpace, Tensor, Tensor]:
    """The laws ``[V^L]`` of two models, unconditional unless guided, and what they are over."""
    space = StateSpace(model.spec.vocab_size, model.spec.length)
    own, cond = (model.denoiser, None) if guided is None else guided
    given = model.expand_cond(cond, 1)
    law = ExactLaw.of(own, space, cond=given)
    theirs = ExactLaw.of(reference.denoiser, space, cond=reference.expand_cond(None, 1))
    return space, law.p, theirs.p


@torch.no_grad()
def path_kl(
    model: SequenceModel, reference: SequenceModel, size: int, **how: Unpack[Drawing]
) -> Tensor:
    """The divergence of a model's chains from the reference's, one unbiased estimate per chain.

    ``sum_steps g / m sum_{i masked} KL(p(x0_i | x_t) || p_reference(x0_i | x_t))`` where a step
    reveals g of m masks (which ones is uniform): its mean is the KL of whole paths, an upper bound
    of that of sequences.

    Args:
        model: whose chains are drawn, unguided or guided.
        reference: scored on the same states, unconditionally.
        size: chains.
        **how: how ``model`` is drawn from, see :class:`~diffpolicy.sequences.spec.Drawing`.

    Returns:
        ``[size]``, not negative.

    Raises:
        ValueError: as :meth:`SequenceModel.draw`; models of different sizes.
    """
    sizes = {name: getattr(reference.spec, name) for name in ("vocab_size", "length")}
    check_sizes("the model", model.spec, "the reference", **sizes)
    chains = model.chains(model.masked(size), rows=ROWS, record=True, **how)
    return torch.cat([_chain_kl(chain, reference) for chain in chains])


def _chain_kl(chain: Chain, reference: SequenceModel) -> Tensor:
    total = torch.zeros(len(chain.x0), device=chain.x0.device)
    cond = reference.expand_cond(None, len(chain.x0))
    for step, transition in enumerate(chain.transitions):
        log_p = transition.denoised.aux["log_p"]
        t = transition.t.to(log_p.device, log_p.dtype)
        log_q = reference.denoiser.log_probs(transition.x, t, cond)
        masked = transition.x[..., -1] == 1
        revealed = ((chain.groups == step) & masked).sum(1)
        inner = (categorical_kl(log_p, log_q) * masked).sum(1)
        total += inner * revealed / masked.sum(1).clamp_min(1)
    return total


def _finite(value: Any) -> Any:
    """Nested values with null in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
