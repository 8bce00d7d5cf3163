"""The boundary of a policy: between normalised plans and the actions that an environment takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpolicy.data.action_groups import Representation
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.observation import each, take
from diffpolicy.settings import check_settings, named_settings, one_of, ranged


@named_settings
@dataclass(frozen=True)
class Gripper:
    """An action dimension with two values, its lowest and its highest in the demonstrations.

    Such a dimension jumps across the whole normalised range [-1, 1], which a warm start from a low
    level cannot do (Duan et al. 2025, section III-B). Executed is always one of the two values.

    Args:
        dim: index of the action dimension.
        mode: ``"clip"`` works on any trained policy: the guess of a warm start is thresholded at 0
            and set to ``+-1 / factor``. ``"scale"`` trains on the dimension divided by ``factor``,
            so that a flip is a small change; the guess is left alone.
        factor: see ``mode``; at least 1.

    Raises:
        ValueError: an unknown mode, a negative dimension or a factor below 1.
    """

    dim: int = ranged("[0, inf)")
    mode: str = one_of("clip", "scale", default="scale")
    factor: float = ranged("[1, inf)", 10.0)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def executed(self) -> float:
        """The normalised value, or minus it, that is executed: an end of the data."""
        return 1 / self.factor if self.mode == "scale" else 1.0

    def snap(self, normalised: Any) -> Any:
        """``normalised`` ``[..., A]`` with this dimension set to the nearer end of its data."""
        return self._set(normalised, self.executed)

    def guess(self, plan: Any) -> Any:
        """The guess ``[..., A]`` that a warm start takes to its level."""
        return plan if self.mode == "scale" else self._set(plan, 1 / self.factor)

    def _set(self, values: Any, end: float) -> Any:
        """An array, or a tensor (in a loop that is written to a file), with this dimension set."""
        if isinstance(values, Tensor):
            chosen = torch.arange(values.shape[-1], device=values.device) == self.dim
            return torch.where(chosen, torch.where(values > 0, end, -end), values)
        out = values.copy()
        out[..., self.dim] = np.where(values[..., self.dim] > 0, end, -end)
        return out


def now_of(history: Any) -> Any:
    """The current step's observation in histories ``[n, To, ...]``."""
    return take(history, (slice(None), -1))


class Boundary:
    """From plans to actions, and how plans are said in the state that they are made in.

    The plans that policies remember are *absolute*: normalised entries that depend on no state, so
    a plan is shifted, compared and averaged as it is. What a network takes and answers is relative
    to a state where the policy's action groups say so.

    Args:
        representation: of the policy's action groups; ``None``: it has none.
        normalizer: the policy's.
        grippers: by entries of plans.
        low: lower bounds of actions ``[A]`` in environment units; ``None``: unbounded.
        high: upper bounds.
        whole: dimensions of actions that are rounded.
    """

    def __init__(
        self,
        representation: Representation | None,
        normalizer: Normalizer,
        grippers: Sequence[Gripper],
        low: Sequence[float] | None,
        high: Sequence[float] | None,
        whole: Iterable[int] = (),
    ) -> None:
        self._whole = sorted(whole)
        self.representation, self.grippers = representation, tuple(grippers)
        # On the host, where executed actions are; without groups its copies there are enough.
        self.normalizer = normalizer if representation is None else normalizer.to("cpu")
        self._bounds = [None if b is None else np.asarray(b, np.float32) for b in (low, high)]

    @property
    def moves(self) -> bool:
        """Whether what a network says depends on the state."""
        return self.representation is not None and self.representation.moves

    def relative(self, plan: Tensor, obs: Any) -> Tensor:
        """Absolute plans ``[n, H, P]`` on the host as the network says them.

        Args:
            plan: normalised; what it holds before the P entries of its actions stays as it is.
            obs: raw observation of the plans' current step, arrays or tensors.
        """
        return self._in_state("relative", plan, obs)

    def absolute(self, plan: Tensor, obs: Any) -> Tensor:
        """The inverse of :meth:`relative`, with the same arguments."""
        return self._in_state("absolute", plan, obs)

    def _in_state(self, how: str, plan: Tensor, obs: Any) -> Tensor:
        if not self.moves:
            return plan
        assert self.representation is not None
        seen, said = plan.shape[-1] - self.representation.dim, plan
        if seen:  # of layout "joint": first what is imagined
            said = plan[..., seen:]
        entries = self.normalizer.unnormalize("action", said)
        moved = getattr(self.representation, how)(entries, each(torch.as_tensor, obs))
        moved = self.normalizer.normalize("action", moved)
        return torch.cat([plan[..., :seen], moved], -1) if seen else moved

    def entries(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Absolute normalised entries ``[..., P]`` that say actions ``[..., A]``."""
        if self.representation is not None:
            actions = self.representation.entries(torch.from_numpy(actions)).numpy()
        return self.normalizer.normalize("action", actions)

    def actions(self, plan: Any) -> Any:
        """Environment actions ``[..., A]``, within bounds, for absolute plan entries ``[..., P]``.

        Of arrays, or of tensors in a loop that is written to a file.
        """
        for gripper in self.grippers:
            plan = gripper.snap(plan)
        out = self.normalizer.unnormalize("action", plan)
        if self.representation is not None:
            out = self.representation.actions(torch.as_tensor(out))
            out = out if isinstance(plan, Tensor) else out.numpy()
        if len(self._whole) == out.shape[-1]:
            out = out.round()
        elif self._whole:
            marked = np.isin(np.arange(out.shape[-1]), self._whole)
            tensors = isinstance(out, Tensor)
            which = torch.from_numpy(marked).to(out.device) if tensors else marked
            out = (torch if tensors else np).where(which, out.round(), out)
        low, high = self._bounds
        if isinstance(out, Tensor):
            out = out if low is None else torch.maximum(out, torch.from_numpy(low))
            return out if high is None else torch.minimum(out, torch.from_numpy(high))
        return out if low is None and high is None else np.clip(out, low, high)
