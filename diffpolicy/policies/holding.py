"""How long the last action is held where no plan is at hand, in executor and simulation alike."""

from __future__ import annotations

from typing import Any

from diffpolicy.policies.base import ChunkedPolicy


def hold_limit(policy: ChunkedPolicy, ticks: int | None = None) -> int:
    """Ticks in a row for which the last action of a plan is repeated, at most.

    Args:
        policy: whose plans are executed.
        ticks: as asked for, 0: never; ``None``: the actions of two plans, so that one plan may be
            lost and the next come late; after that the policy is taken for dead.

    Raises:
        ValueError: no number of ticks.
    """
    if ticks is None:
        return 2 * (policy.horizon - policy.n_obs_steps + 1)
    if isinstance(ticks, bool) or not isinstance(ticks, int) or ticks < 0:
        raise ValueError(
            f"hold_ticks must be a number of ticks >= 0 (0 holds no action), got {ticks!r}"
        )
    return ticks


def holds(since: Any, limit: int) -> Any:
    """Whether the last action is repeated ``since`` ticks after it was a plan's; also of arrays."""
    return since <= limit
