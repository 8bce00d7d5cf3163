"""Exact laws of small masked models, by dynamic programming over partially masked sequences.

``(V + 1)^L`` states are few enough for 8-mers of DNA (390,625) or four sites of a protein
(194,481). One sweep of the network over all of them gives the law of every sequence, and with it
expected reward, divergences and the gradient of all of these without sampling error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import one_hot
from diffpolicy.core.templated import Templated
from diffpolicy.learn.method import check_sizes
from diffpolicy.learn.reward.chains import categorical_kl

MAX_STATES = 2_000_000


class Edges(NamedTuple):
    """Reveals of one token from all states with equally many masks.

    Attributes:
        source: index of the state ``[E]``.
        entry: index into log-probabilities ``[S, L, V]``, flattened ``[E]``.
        target: index of the state after it ``[E]``.
        chance: of revealing that position: one over the number of masks.
    """

    source: Tensor
    entry: Tensor
    target: Tensor
    chance: float


class StateSpace:
    """All partially masked sequences of ``length`` tokens; the index is that of a number.

    Position 0 is the most significant digit, in base ``vocab_size + 1``; ``vocab_size`` is a mask.

    Args:
        vocab_size: V.
        length: L.

    Raises:
        ValueError: more than two million states.
    """

    def __init__(self, vocab_size: int, length: int) -> None:
        count = (vocab_size + 1) ** length
        if count > MAX_STATES:
            states = f"{vocab_size + 1}^{length} = {count} states"
            raise ValueError(f"{states} are too many (at most {MAX_STATES}); estimate by sampling")
        self.vocab_size, self.length, self.count = vocab_size, length, count
        self.place = (vocab_size + 1) ** torch.arange(length - 1, -1, -1)
        index = torch.arange(count)
        self.states = index[:, None] // self.place % (vocab_size + 1)
        self.masks = (self.states == vocab_size).sum(1)
        self.sequences = index[self.masks == 0]  # in lexicographic order of their tokens
        self.edges = [self._edges(left) for left in range(length, 0, -1)]

    def _edges(self, left: int) -> Edges:
        """Reveals from all states of ``left`` masks."""
        source, position = (self.states == self.vocab_size).nonzero(as_tuple=True)
        here = self.masks[source] == left
        source, position = source[here], position[here]
        token = torch.arange(self.vocab_size)
        entry = (source * self.length + position)[:, None] * self.vocab_size + token
        target = source[:, None] + (token - self.vocab_size) * self.place[position][:, None]
        source = source[:, None].expand_as(target)
        return Edges(source.reshape(-1), entry.reshape(-1), target.reshape(-1), 1 / left)

    def index(self, tokens: Tensor) -> Tensor:
        """Index among the ``V^L`` complete sequences, of tokens ``[N, L]``."""
        place = self.vocab_size ** torch.arange(self.length - 1, -1, -1)
        return (tokens.cpu() * place).sum(-1)

    def log_probs(
        self, denoiser: BaseDenoiser, *, cond: Tensor | None = None, batch_size: int = 32_768
    ) -> Tensor:
        """``log p(x0_i | state)`` of every state, ``[S, L, V]`` on the host, float32.

        Carries a graph if gradients are enabled. The denoiser may be guided: any that answers
        ``aux["log_p"]``.

        Raises:
            ValueError: a denoiser of another size, or one that depends on the noise level.
        """
        masked: Any = denoiser
        while not isinstance(masked, MaskedDenoiser):
            masked = masked.denoiser
        check_sizes("the denoiser", masked, "the state space", vocab_size=self.vocab_size)
        if not masked.time_free:
            raise ValueError("the law of one token at a time is defined for time_free denoisers")
        device = masked.weight.device
        zero = torch.zeros((1, 1, 1), device=device)
        parts = []
        for states in torch.split(self.states, batch_size):
            given = None if cond is None else cond.to(device).expand(len(states), -1)
            states = states.to(device)
            if isinstance(denoiser, MaskedDenoiser):
                log_p = denoiser.log_probs(states, zero, given)
            else:
                log_p = denoiser(one_hot(states, self.vocab_size), zero, given).aux["log_p"]
            parts.append(log_p.cpu())
        return torch.cat(parts)


@dataclass(frozen=True)
class ExactLaw:
    """The law of sequences drawn one token at a time, in uniformly random order.

    Attributes:
        space: the states.
        log_p: ``[S, L, V]``.
        visits: probability of passing through each state ``[S]``, float64.
    """

    space: StateSpace
    log_p: Tensor
    visits: Tensor

    @classmethod
    def of(
        cls, denoiser: BaseDenoiser, space: StateSpace | None = None, *, cond: Any = None
    ) -> ExactLaw:
        """The law of a denoiser, guided or not; differentiable if gradients are enabled.

        Without ``space`` it must be a :class:`~diffpolicy.core.MaskedDenoiser` itself.
        """
        if space is None:
            plain: Any = denoiser
            space = StateSpace(plain.vocab_size, plain.length)
        starts = denoiser.process.starts() if isinstance(denoiser.process, Templated) else None
        return cls.from_log_probs(space, space.log_probs(denoiser, cond=cond), starts)

    @classmethod
    def from_log_probs(
        cls, space: StateSpace, log_p: Tensor, starts: tuple[Tensor, Tensor] | None = None
    ) -> ExactLaw:
        """The law of given log-probabilities ``[S, L, V]``.

        ``starts`` are the states ``[N, L]`` that chains begin with and their probabilities ``[N]``;
        None: all masks.
        """
        flat = log_p.double().flatten().exp()
        visits = torch.zeros(space.count, dtype=torch.float64)
        if starts is None:
            visits[-1] = 1.0  # all masked: every digit is V
        else:
            visits[(starts[0] * space.place).sum(1)] = starts[1]
        for edges in space.edges:
            flow = visits[edges.source] * flat[edges.entry] * edges.chance
            visits = visits.index_add(0, edges.target, flow)
        return cls(space, log_p, visits)

    @property
    def p(self) -> Tensor:
        """Probability of every sequence ``[V^L]``, in lexicographic order, float64."""
        return self.visits[self.space.sequences]

    def path_kl(self, reference: ExactLaw) -> Tensor:
        """KL of the law of whole reveal paths to that of ``reference``; at least the sequences'."""
        log_p, log_q = self.log_p.double(), reference.log_p.double()
        inner = categorical_kl(log_p, log_q)
        masked = self.space.states == self.space.vocab_size
        mean = (inner * masked).sum(1) / self.space.masks.clamp_min(1)
        return (self.visits * mean).sum()


class ExactScores(NamedTuple):
    """Exact figures of a tuned law; all are floats.

    ``J = E[r] - kl_weight KL(p || p_ref)``; ``progress = (J - J_ref) / (J_best - J_ref)``, nan
    where there is nothing to gain.
    """

    reward: float
    kl: float
    entropy: float
    objective: float
    objective_reference: float
    objective_best: float
    progress: float
    kl_to_best: float


def optimum(p_reference: Tensor, reward: Tensor, kl_weight: float) -> Tensor:
    """``p* ~ p_ref exp(r / kl_weight)``, the law that maximises J, ``[V^L]``."""
    return (p_reference.log() + reward.double() / kl_weight).softmax(0)


def exact_scores(p: Tensor, p_reference: Tensor, reward: Tensor, kl_weight: float) -> ExactScores:
    """Compare a law with its reference and with the best one.

    Args:
        p: law of the tuned denoiser ``[V^L]``.
        p_reference: law of the reference ``[V^L]``.
        reward: of every sequence ``[V^L]``.
        kl_weight: weight of the divergence, positive.
    """
    r = reward.double()
    best = optimum(p_reference, r, kl_weight)
    j_ref = float((p_reference * r).sum())
    j_best = float((best * r).sum()) - kl_weight * divergence(best, p_reference)
    mean, kl = float((p * r).sum()), divergence(p, p_reference)
    j = mean - kl_weight * kl
    entropy = -float(torch.special.xlogy(p, p).sum())
    gain = j_best - j_ref
    progress = (j - j_ref) / gain if gain > 1e-12 * max(1.0, abs(j_ref)) else math.nan
    return ExactScores(mean, kl, entropy, j, j_ref, j_best, progress, divergence(p, best))


def divergence(p: Tensor, q: Tensor) -> float:
    """``KL(p || q)`` in nats; infinite where ``q`` is 0 and ``p`` is not."""
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum())
