"""Truncated diffusion policies: several guesses solved from a low level, the best one executed.

Anchors, the last plan (real-time iteration) and a draft of the policy itself can compete; all start
from one level in one batch, and are ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.sampler import Sampler
from diffpolicy.data.normalize import Normalizer
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.plan_loop import Encoded, Loop, PlanLoop, encoded, repeated
from diffpolicy.settings import check_choice, named_settings, one_of, ranged

SOURCES = ("anchors", "previous", "draft", "autoregressive")


@named_settings
@dataclass(frozen=True, kw_only=True)
class Truncated(Sampler):
    """How plans are drawn from guesses; a :class:`~diffpolicy.core.sampler.Sampler` of few steps.

    Args:
        t_start: level the guesses are noised to; ``None``: what the anchors' quantisation error
            asks for (:meth:`~diffpolicy.policies.anchors.Anchors.default_t_start`).
        num_steps: solver steps from there.
        solver: a deterministic one.
        sources: guesses that compete: ``"anchors"``, ``"previous"`` (the shifted last plan, where a
            row has one), ``"draft"`` (one evaluation from pure noise) and ``"autoregressive"`` (the
            policy's head of type ``draft``, as Trajectory Diffuser has it). A single guess is not
            ranked.
        rank: ``"confidence"``, the head of a network trained for it (type ``anchored``);
            ``"denoising"``, how little the denoiser changes the plan when it is noised to
            ``rank_t``, one evaluation more; ``"prior"``, the anchors' probability in this state.
        rank_t: level of that evaluation.
        continuity: weight of the mean squared distance to the shifted last plan, subtracted from
            the score: how much a new mode must be better to be taken.
        choose: ``"best"`` executes the plan with the highest score, so that of several modes a
            state's best is executed always; ``"draw"`` draws one in proportion to its probability
            (``"prior"``: the anchors' in this state; ``"confidence"``: the calibrated one), a pure
            function of the row's seed and counter. ``deterministic=True`` takes the best anyway.

    Raises:
        ValueError: settings out of range, or sources that ``rank`` cannot compare.
    """

    t_start: float | None = ranged("(0, 1]", None)
    num_steps: int = 2
    sources: tuple[str, ...] = ("anchors",)
    rank: str = one_of("confidence", "denoising", "prior", default="denoising")
    rank_t: float = ranged("(0, 1]", 0.3)
    continuity: float = ranged("[0, inf)", 0.0)
    choose: str = one_of("best", "draw")

    def __post_init__(self) -> None:
        super().__post_init__()
        for source in self.sources or ("none",):
            check_choice("source", source, SOURCES)
        if self.sources == ("previous",):
            raise ValueError("the last plan alone cannot begin an episode: use rti, or add anchors")
        if self.make().stochastic:
            raise ValueError(f"truncated plans take a deterministic solver, not {self.solver!r}")
        self._check_rank()

    def _check_rank(self) -> None:
        if self.choose == "draw" and self.rank == "denoising":
            raise ValueError("choose 'draw' needs probabilities: rank 'prior' or 'confidence'")
        if self.rank == "prior" and self.sources != ("anchors",):
            raise ValueError("rank 'prior' knows anchors only; use 'denoising' for other sources")
        if self.rank == "confidence" and "draft" in self.sources:
            raise ValueError("rank 'confidence' takes no source draft: it is not trained at t = 1")

    def loop_grid(
        self, kind: str, process: GaussianProcess, anchors: Anchors | None
    ) -> tuple[Tensor, str]:
        """Levels and kind of start of a loop.

        A draft is the clean estimate at ``t = 1`` and a rank the one at ``rank_t``: one step each.
        """
        if kind == "draft":
            return self.grid(process, num_steps=1), "prior"
        if kind == "rank":
            return self.grid(process, self.rank_t, num_steps=1), "noised"
        first = self.t_start
        if first is None:
            assert anchors is not None  # check_anchors
            first = anchors.default_t_start(process)
        return self.grid(process, first), "noised"

    @property
    def loops(self) -> tuple[str, ...]:
        """Kinds of sampling loops that it runs."""
        draft = ("draft",) if "draft" in self.sources else ()
        rank = ("rank",) if self.ranks else ()
        return ("guesses", *draft, *rank)

    @property
    def ranks(self) -> bool:
        """Whether an evaluation is spent on ranking the guesses."""
        return self.rank == "denoising" and self.sources not in (("draft",), ("autoregressive",))


class ScoredPlans(NamedTuple):
    """Candidate plans with scores.

    Attributes:
        plans: ``[n, M, H, A]`` normalised.
        scores: ``[n, M]``; the higher the better, comparable within a row only.
        nfe: network evaluations, each of all ``n * M`` plans.
        gumbel: ``[n, M]`` draws of the Gumbel law, where one plan is drawn with probability
            proportional to ``exp(score)``; ``None`` where the best is taken.
    """

    plans: Tensor
    scores: Tensor
    nfe: int
    gumbel: Tensor | None = None

    def best(self) -> Tensor:
        """The plan with the highest score, ``[n, H, A]``."""
        return self._at(self.scores)

    def chosen(self) -> Tensor:
        """The plan that is executed, ``[n, H, A]``: the best, or the one that was drawn.

        The argmax of scores plus Gumbel noise is a draw from their softmax.
        """
        return self._at(self.scores if self.gumbel is None else self.scores + self.gumbel)

    def _at(self, keys: Tensor) -> Tensor:
        rows = torch.arange(len(self.plans), device=self.plans.device)
        return self.plans[rows, keys.argmax(1)]


def gumbel_noise(noise: Tensor, count: int) -> Tensor:
    """``count`` Gumbel draws ``[n, count]`` made of standard normal ones ``[n, 2 count or more]``.

    Half the sum of two squares is an exponential variable, and minus its logarithm a Gumbel one:
    plain arithmetic, which also goes into an exported file.
    """
    pairs = noise[:, : 2 * count].reshape(-1, count, 2)
    exponential = 0.5 * pairs.square().sum(2)
    return -exponential.clamp_min(torch.finfo(noise.dtype).tiny).log()


@dataclass(frozen=True)
class Candidates:
    """Truncated settings with the anchors and loops they run on.

    Attributes:
        settings: see :class:`Truncated`.
        anchors: typical plans; ``None`` without that source.
        normalizer: the policy's.
        loops: by kind, as ``settings.loops`` names them.
        write: from raw observations ``[n, To, O]`` to plans ``[n, H, D]``, for the source
            ``"autoregressive"``.
        deterministic: take the best, whatever the settings' ``choose`` is.
    """

    settings: Truncated
    anchors: Anchors | None
    normalizer: Normalizer
    loops: Mapping[str, Loop]
    write: Callable[[Tensor], Tensor] | None = None
    deterministic: bool = False

    @property
    def anchor_count(self) -> int:
        """Anchors offered per row."""
        anchors = self.anchors if "anchors" in self.settings.sources else None
        return 0 if anchors is None else anchors.count

    @property
    def guess_count(self) -> int:
        """Plans that compete per row."""
        others = set(self.settings.sources) - {"anchors"}
        return self.anchor_count + len(others)

    @property
    def draws(self) -> int:
        """Slices of noise per row: one per guess, for the draft, to rank, and to draw one."""
        made = self.guess_count + ("draft" in self.settings.sources) + self.settings.ranks
        return made + self._choice_slices

    @property
    def _choice_slices(self) -> int:
        """Slices of noise, the last ones, with two numbers for every guess."""
        if self.settings.choose == "best" or self.deterministic:
            return 0
        loop = self.loops["guesses"]
        return -(-2 * self.guess_count // (loop.horizon * loop.action_dim))

    @property
    def nfe(self) -> int:
        """Network evaluations per plan, each of all guesses at once."""
        return sum(self.loops[kind].nfe for kind in self.settings.loops)

    def propose(
        self, history: Any, previous: Tensor, has_previous: Tensor, noise: Tensor, told: Any = None
    ) -> ScoredPlans:
        """Solve and rank every guess.

        Args:
            history: raw observations ``[n, To, O]``, or such tensors by name.
            previous: shifted last plans ``[n, H, A]``, normalised.
            has_previous: bool ``[n]``, rows where ``previous`` means anything.
            noise: standard normal ``[R, n, H, A]`` with R = ``draws``.
            told: ``history`` encoded, where it was already.

        Returns:
            Plans in the order anchors, previous, autoregressive, draft. A row without a last plan
            has score -inf there.
        """
        loop = self.loops["guesses"]
        told = history if told is None else told
        if loop.takes_encoded and not isinstance(told, Encoded):  # once for all candidates
            told = encoded(loop.condition, told)
        guess, log_prob = self._guesses(history, told, previous, noise)
        count, many = guess.shape[:2]
        slices = noise[:many].transpose(0, 1).flatten(0, 1)[None]
        each_told = repeated(told, many)
        if self.settings.rank == "confidence":
            assert isinstance(loop, PlanLoop)
            solved, logit = loop.with_confidence(each_told, guess.flatten(0, 1), slices)
            scores = logit.view(count, many)
            if self._choice_slices:  # the sigmoid of a logit is the anchor's probability
                scores = logsigmoid(scores)
        else:
            solved = loop(each_told, guess.flatten(0, 1), slices)
            scores = log_prob
        if self.settings.ranks:
            shared = noise[-1].repeat_interleave(many, 0)[None]  # the same noise for every guess
            again = self.loops["rank"](each_told, solved, shared)
            scores = -(solved - again).square().mean((1, 2)).view(count, many)
        plans = solved.view(guess.shape)
        if self.settings.continuity > 0:
            distance = (plans - previous[:, None]).square().mean((2, 3))
            scores = scores - self.settings.continuity * distance * has_previous[:, None]
        if "previous" in self.settings.sources:
            scores = scores.clone()
            column = scores[:, self.anchor_count]
            scores[:, self.anchor_count] = column.masked_fill(~has_previous, -torch.inf)
        if not self._choice_slices:
            return ScoredPlans(plans, scores, self.nfe)
        drawn = noise[-self._choice_slices :].transpose(0, 1).flatten(1)
        return ScoredPlans(plans, scores, self.nfe, gumbel_noise(drawn, many))

    def _guesses(
        self, history: Any, told: Any, previous: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts, log_prob = [], noise.new_zeros(noise.shape[1], 0)
        if self.anchor_count:
            assert self.anchors is not None
            ready = isinstance(told, Encoded)
            state = told if ready else encoded(self.loops["guesses"].condition, history)
            placed, log_prob = self.anchors.guesses(history, self.normalizer, state.cond)
            parts.append(placed)
        if "previous" in self.settings.sources:
            parts.append(previous[:, None])
        if "autoregressive" in self.settings.sources:
            assert self.write is not None
            parts.append(self.write(history)[:, None])
        if "draft" in self.settings.sources:
            own = noise[sum(part.shape[1] for part in parts) + 1]
            parts.append(self.loops["draft"](told, previous, own[None])[:, None])
        guess = torch.cat(parts, 1)
        return guess, log_prob if log_prob.shape[1] == guess.shape[1] else guess[..., 0, 0] * 0
