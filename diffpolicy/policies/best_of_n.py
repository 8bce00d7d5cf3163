"""Search at inference: several plans per decision, of which a verifier chooses one.

An option of every policy that makes plans: Diffusion-QL, IDQL and EDP choose among actions by their
Q, planners among trajectories by their value, safe controllers by a cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffpolicy.data.observation import each, to_fields
from diffpolicy.policies.base import Array, PolicyState
from diffpolicy.policies.plan_loop import Encoded
from diffpolicy.policies.rows import row_generator
from diffpolicy.settings import check_settings, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True)
class Selection:
    """How one of several candidate plans is chosen.

    Args:
        num_candidates: N, plans sampled per decision: the whole budget, whatever the search.
        rank: ``"argmax"`` takes the best; ``"softmax"`` draws one with probability proportional to
            ``exp(weight * score)`` (Wang et al. 2023, section 4; Hansen-Estruch et al. 2023).
            ``deterministic=True`` takes the best in either case.
        weight: inverse temperature of ``"softmax"``, in 1 / units of the score; scores are divided
            by their standard deviation over the candidates first, so 1 is a sensible value.
        verifier: what scores plans: ``"head"``, the policy's critic or else its value; ``"cost"``,
            minus the costs of its ``guidance``; ``"none"``, coherence alone.
        coherence: weight of the mean squared distance (normalised units) to what is left of the
            last plan, subtracted from the score: backward coherence of bidirectional decoding (Liu
            et al. 2024). Its forward contrast needs samples of a weaker policy and is not made.
        decay: of that distance's weights from one step of the plan to the next, in (0, 1].
        search: ``"best_of_n"``: N independent plans in one batch. ``"zero_order"`` (Ma et al.
            2025): batches of ``neighbours``; the noise of each batch lies near that of the best
            plan so far, and far from it again after a batch without gain.
        neighbours: K, plans of a batch of ``"zero_order"``; evaluations one after the other are
            ``ceil(N / K)`` times those of one batch.

    Raises:
        ValueError: values out of range, or that exclude each other.
    """

    num_candidates: int = ranged("[1, inf)", 10)
    rank: str = one_of("argmax", "softmax")
    weight: float = ranged("(0, inf)", 1.0)
    verifier: str = one_of("head", "cost", "none")
    coherence: float = ranged("[0, inf)", 0.0)
    decay: float = ranged("(0, 1]", 0.9)
    search: str = one_of("best_of_n", "zero_order")
    neighbours: int = ranged("[1, inf)", 4)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.verifier == "none" and self.coherence == 0:
            raise ValueError("verifier='none' leaves coherence to choose by: give it a weight")
        if self.search == "zero_order" and self.rank != "argmax":
            raise ValueError("search='zero_order' keeps the best plan so far: rank='argmax'")

    @property
    def batches(self) -> list[int]:
        """Plans of each batch, N together."""
        if self.search == "best_of_n":
            return [self.num_candidates]
        full, rest = divmod(self.num_candidates, self.neighbours)
        return [self.neighbours] * full + [rest] * (rest > 0)


class Selector:
    """Samples candidates with a policy's own ``make_plans`` and keeps one per row.

    Args:
        settings: how many, and how one is chosen.
        score: ``(raw observations [n, To, ...], plans [n, H, ...]) -> [n]``, higher is better.
        reads_cond: it takes :class:`~diffpolicy.policies.plan_loop.Encoded` observations, where
            the policy encoded them for its plans.
    """

    def __init__(
        self, settings: Selection, score: Callable[[Any, Array], Array], *, reads_cond: bool = False
    ) -> None:
        self.settings, self.score, self.reads_cond = settings, score, reads_cond

    def choose(
        self,
        make_plans: Callable[..., tuple[Array, ...]],
        state: PolicyState,
        *,
        deterministic: bool,
    ) -> tuple[Array, ...]:
        """Plans of n rows, and the evaluations each took one after the other.

        Args:
            make_plans: the method of a policy that makes them.
            state: memory of the rows.
            deterministic: passed on to it; the best is taken then.
        """
        settings, count = self.settings, len(state)
        if settings.num_candidates == 1:
            return make_plans(state, deterministic=deterministic)
        if self.reads_cond and "cond" in state.memory:  # candidates repeat that, never an image
            state = state.having(history=each(_without_pixels, state.history))
        row = np.arange(count)
        batches, made = settings.batches, 0
        best, kept, total = np.full(count, -np.inf), None, np.zeros(count, np.int64)
        # Whose noise each row's next batch is near to: streams, first to last; -1: nobody's.
        near = np.full((count, len(batches)), -1, np.int64)
        lineage = near.copy()  # of the best plan so far
        for many in batches:
            streams = np.tile(np.arange(made, made + many), (count, 1))
            made += many
            lines = _followed(near, streams)
            found = self._candidates(make_plans, state, lines, deterministic)
            plans, nfe, scores = found
            total = total + nfe
            if settings.rank == "softmax" and not deterministic:
                scores = _drawn(scores, settings.weight, state)
            top = scores.argmax(1)
            better = scores[row, top] > best
            plan = plans[row, top]
            kept = plan if kept is None else np.where(better[:, None, None], plan, kept)
            best = np.where(better, scores[row, top], best)
            lineage = np.where(better[:, None], lines[row, top], lineage)
            near = np.where(better[:, None], lineage, -1)
        assert kept is not None
        return kept, total

    def _candidates(
        self,
        make_plans: Callable[..., tuple[Array, ...]],
        state: PolicyState,
        lines: Array,
        deterministic: bool,
    ) -> tuple[Array, Array, Array]:
        """Plans ``[n, K, H, P]`` of noise ``lines [n, K, L]``, evaluations, scores ``[n, K]``."""
        count, many = lines.shape[:2]
        expanded = state.take(np.repeat(np.arange(count), many))
        expanded = expanded.remember(candidate=lines.reshape(count * many, -1))
        plans, nfe = make_plans(expanded, deterministic=deterministic)
        cond = expanded.memory.get("cond") if self.reads_cond else None
        seen: Any = expanded.history
        if cond is not None:
            seen = Encoded(torch.from_numpy(cond), each(torch.from_numpy, expanded.history))
        scores = self.score(seen, plans).reshape(count, many).astype(np.float64)
        shaped = plans.reshape(count, many, *plans.shape[1:])
        if self.settings.coherence > 0:
            distance = backward_distance(shaped, state, self.settings.decay)
            scores = scores - self.settings.coherence * distance
        return shaped, nfe.reshape(count, many)[:, 0], scores


def backward_distance(plans: Array, state: PolicyState, decay: float) -> Array:
    """How far plans ``[n, N, H, P]`` are from what is left of each row's last one, ``[n, N]``.

    The mean over entries of the squared distance, averaged over the steps from now to the end of
    the last plan with weights ``decay^step``; 0 for rows without a last plan.
    """
    horizon, now = plans.shape[2], next(iter(to_fields(state.history).values())).shape[1] - 1
    place = np.arange(horizon)
    old = place + np.clip(state.cursor - now, 0, horizon)[:, None]
    left = (old < horizon) & (place >= now) & state.warm[:, None]
    weight = np.where(left, decay ** np.maximum(place - now, 0.0), 0.0)
    weight = weight / np.maximum(weight.sum(1, keepdims=True), 1e-12)
    last = state.plan[np.arange(len(plans))[:, None], np.minimum(old, horizon - 1)]
    distance: Array = (np.square(plans - last[:, None]).mean(3) * weight[:, None]).sum(2)
    return distance


def _followed(near: Array, streams: Array) -> Array:
    """Lines of noise ``[n, K, L]``: those of ``near [n, L]``, each with a stream of its own after.

    A line that begins anew is that stream alone.
    """
    lines = np.repeat(near[:, None], streams.shape[1], 1)
    place = (near >= 0).sum(1)
    lines[np.arange(len(near))[:, None], np.arange(streams.shape[1]), place[:, None]] = streams
    return lines


def _drawn(scores: Array, weight: float, state: PolicyState) -> Array:
    """Scores ``[n, N]`` whose argmax is a draw from their softmax: with Gumbel noise."""
    many = scores.shape[1]
    spread = scores.std(1, keepdims=True)
    streams = zip(state.seed.tolist(), state.counter.tolist(), strict=True)
    draws = [row_generator(*stream, many).gumbel(size=many) for stream in streams]  # beyond N's own
    drawn: Array = scores / np.maximum(spread, 1e-12) * weight + np.stack(draws)
    return drawn


def _without_pixels(history: Array) -> Array:
    """Observations ``[n, To, ...]`` of a kind; of images ``[n, To, h, w, C]`` no row of pixels."""
    return history[:, :, :0] if history.dtype == np.uint8 else history
