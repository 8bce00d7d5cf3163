"""Best of N: several plans per decision, of which a critic chooses one.

An option of every policy that makes plans: Diffusion-QL, IDQL and EDP choose among actions by their
Q, planners among trajectories by their value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffpolicy.data.observation import each
from diffpolicy.policies.base import Array, PolicyState
from diffpolicy.policies.plan_loop import Encoded
from diffpolicy.policies.rows import row_generator
from diffpolicy.settings import check_settings, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True)
class Selection:
    """How one of several candidate plans is chosen.

    Args:
        num_candidates: N, plans sampled per decision, all in one batch.
        rank: ``"argmax"`` takes the best; ``"softmax"`` draws one with probability proportional to
            ``exp(weight * score)`` (Wang et al. 2023, section 4; Hansen-Estruch et al. 2023).
            ``deterministic=True`` takes the best in either case.
        weight: inverse temperature of ``"softmax"``, in 1 / units of the score; scores are divided
            by their standard deviation over the candidates first, so 1 is a sensible value.

    Raises:
        ValueError: values out of range.
    """

    num_candidates: int = ranged("[1, inf)", 10)
    rank: str = one_of("argmax", "softmax")
    weight: float = ranged("(0, inf)", 1.0)

    def __post_init__(self) -> None:
        check_settings(self)


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
        """Plans of n rows, and the evaluations each took (of all its candidates at once).

        Args:
            make_plans: the method of a policy that makes them.
            state: memory of the rows.
            deterministic: passed on to it; the best is taken then.
        """
        many, count = self.settings.num_candidates, len(state)
        if many == 1:
            return make_plans(state, deterministic=deterministic)
        rows = np.repeat(np.arange(count), many)
        if self.reads_cond and "cond" in state.memory:  # candidates repeat that, never an image
            state = state.having(history=each(_without_pixels, state.history))
        expanded = state.take(rows)
        expanded = expanded.remember(candidate=np.tile(np.arange(many), count))
        plans, nfe = make_plans(expanded, deterministic=deterministic)
        cond = expanded.memory.get("cond") if self.reads_cond else None
        seen = expanded.history if cond is None else Encoded(torch.from_numpy(cond))
        scores = self.score(seen, plans).reshape(count, many).astype(np.float64)
        if not deterministic and self.settings.rank == "softmax":
            spread = scores.std(1, keepdims=True)
            scores = scores / np.maximum(spread, 1e-12) * self.settings.weight
            # The argmax of this is a draw from the softmax; candidates use the streams below N.
            streams = zip(state.seed.tolist(), state.counter.tolist(), strict=True)
            draws = [row_generator(*stream, many).gumbel(size=many) for stream in streams]
            scores = scores + np.stack(draws)
        best = scores.argmax(1)
        picked: Array = plans.reshape(count, many, *plans.shape[1:])[np.arange(count), best]
        return picked, nfe.reshape(count, many)[:, 0]


def _without_pixels(history: Array) -> Array:
    """Observations ``[n, To, ...]`` of a kind; of images ``[n, To, h, w, C]`` no row of pixels."""
    return history[:, :, :0] if history.dtype == np.uint8 else history
