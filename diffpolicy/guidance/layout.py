"""What one position of a plan holds: actions, states, or both; and which entries are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpolicy.settings import check_choice, check_range, check_shape

LAYOUTS = ("action", "trajectory", "state", "joint")


@dataclass(frozen=True)
class Layout:
    """The meaning of the entries of a plan ``x [B, H, D]``.

    ``"action"``: actions alone; the observation history is the network's condition.
    ``"trajectory"``: observation, then action (Diffuser, Janner et al. 2022).
    ``"state"``: observations alone (Decision Diffuser, Ajay et al. 2023); actions come from an
    inverse dynamics model.
    ``"joint"``: what will be observed, then action, both given the encoded history (PAD, Guo et al.
    2024): the parts have noise levels of their own, so that the actions can be drawn alone.

    Position k of a plan is the step ``k - (To - 1)`` from now, so that the first To observations
    of ``"trajectory"`` and ``"state"`` are the history. They are *known*: pinned in the plan itself
    instead of conditioning the network (:class:`diffpolicy.guidance.pinned.Pinned`).

    Attributes:
        kind: one of ``LAYOUTS``.
        obs_dim: O.
        action_dim: A.
        horizon: H.
        n_obs_steps: To.
        goal: pairs ``(i, j)``: entry i of the last position's observation is known too. In
            training it is pinned to the window's own value (hindsight), when acting to entry j of
            the current observation, where the task's goal stands.
        constant: entries of the observation that keep their value for a whole episode, such as a
            goal that is part of it: known at every position.
        imagined_dim: of ``"joint"``: F, how many entries of a position are not action.

    Raises:
        ValueError: an unknown kind, a size out of range, or a goal that does not fit.
    """

    kind: str
    obs_dim: int
    action_dim: int
    horizon: int
    n_obs_steps: int
    goal: tuple[tuple[int, int], ...] = ()
    constant: tuple[int, ...] = ()
    imagined_dim: int = 0

    def __post_init__(self) -> None:
        check_choice("layout", self.kind, LAYOUTS)
        sizes = ("action_dim", "horizon", "n_obs_steps")
        check_range("[1, inf)", **{name: getattr(self, name) for name in sizes})
        # Of images alone there is no vector, and such plans hold none.
        check_range("[1, inf)" if self.pinned else "[0, inf)", obs_dim=self.obs_dim)
        check_range(f"[{self.n_obs_steps + self.pinned}, inf)", horizon=self.horizon)
        check_range(
            "[1, inf)" if self.kind == "joint" else "[0, 0]", imagined_dim=self.imagined_dim
        )
        if (self.goal or self.constant) and not self.pinned:
            raise ValueError(
                f"a plan of {self.kind!r} holds no observation whose goal could be pinned"
            )
        # Lists come from JSON and YAML; the value must stay hashable.
        object.__setattr__(self, "goal", tuple(tuple(pair) for pair in self.goal))
        object.__setattr__(self, "constant", tuple(self.constant))
        if any(len(pair) != 2 for pair in self.goal):
            raise ValueError(f"goal must be pairs of integers (i, j), got {self.goal}")
        indices = [*self.constant, *(index for pair in self.goal for index in pair)]
        if not all(isinstance(i, int) and 0 <= i < self.obs_dim for i in indices):
            what = f"indices into an observation of {self.obs_dim} entries"
            raise ValueError(f"goal={self.goal}, constant={self.constant} are not all {what}")
        if len({i for i, _ in self.goal}) != len(self.goal):
            raise ValueError(f"goal pins an entry twice: {self.goal}")

    @property
    def pinned(self) -> bool:
        """Whether the history is pinned in the plan, instead of being the network's condition."""
        return self.kind in ("trajectory", "state")

    @property
    def parts(self) -> tuple[int, int]:
        """Sizes of what a position holds: of observation ``[..., :first]``, and of action."""
        action = 0 if self.kind == "state" else self.action_dim
        return self.obs_dim if self.pinned else self.imagined_dim, action

    @property
    def dim(self) -> int:
        """D, the size of one position."""
        return sum(self.parts)

    @property
    def cond_dim(self) -> int:
        """Size of the condition that flat observations make: To O, or 0 where they are pinned."""
        return 0 if self.pinned else self.n_obs_steps * self.obs_dim

    @property
    def known(self) -> Tensor:
        """Which entries are pinned: bool ``[1, H, D]``, none unless ``pinned``."""
        known = torch.zeros(1, self.horizon, self.dim, dtype=torch.bool)
        if self.pinned:
            known[:, : self.n_obs_steps, : self.obs_dim] = True
            known[:, :, list(self.constant)] = True
            for i, _ in self.goal:
                known[:, -1, i] = True
        return known

    def join(self, obs: Tensor, action: Tensor) -> Tensor:
        """The clean plan of a window.

        Args:
            obs: normalised ``[B, H, O]`` (not looked at for ``"action"``); of ``"joint"`` what is
                imagined ``[B, H, F]``.
            action: normalised ``[B, H, A]`` (not looked at for ``"state"``).

        Returns:
            ``[B, H, D]``.

        Raises:
            ValueError: a part that the plan holds has another shape.
        """
        given = [
            (name, part, size)
            for name, part, size in zip(("obs", "action"), (obs, action), self.parts, strict=True)
            if size
        ]
        for name, part, size in given:
            check_shape(name, part.shape, ("B", self.horizon, size))
        return torch.cat([part for _, part, _ in given], dim=-1) if len(given) > 1 else given[0][1]

    def values(self, history: Tensor, goal_values: Tensor | None = None) -> Tensor:
        """What the known entries are when acting, and 0 elsewhere.

        Args:
            history: the last To observations, normalised ``[B, To, O]``.
            goal_values: for a layout with ``goal``: what to pin there, ``[B, len(goal)]``,
                normalised as the entries i that they are pinned to (see ``goal``).

        Returns:
            ``[B, H, D]``.

        Raises:
            ValueError: shapes that do not fit, or goal values missing or not asked for.
        """
        count = len(history)
        check_shape("history", history.shape, ("B", self.n_obs_steps, self.obs_dim))
        given = history.new_zeros(count, 0) if goal_values is None else goal_values
        check_shape("goal_values", given.shape, (count, len(self.goal)))
        values = history.new_zeros(count, self.horizon, self.dim)
        if not self.pinned:
            return values
        for i in self.constant:
            values[:, :, i] = history[:, -1:, i]
        values[:, : self.n_obs_steps, : self.obs_dim] = history
        for column, (i, _) in enumerate(self.goal):  # a list as index is copied to the device
            values[:, -1, i] = given[:, column]
        return values

    def weights(self, first_action: float = 1.0, next_obs: float = 1.0) -> Tensor:
        """Weights of the entries in a denoising loss, 1 unless said otherwise, 0 where known.

        Args:
            first_action: weight of the first action to be executed, position To - 1 (Diffuser 10).
            next_obs: weight of the next observation, position To (Decision Diffuser 10).
                Either is not looked at where plans hold no such entries.

        Returns:
            ``[1, H, D]``.

        Raises:
            ValueError: a weight that is not positive.
        """
        check_range("(0, inf)", first_action=first_action, next_obs=next_obs)
        weights = torch.ones(1, self.horizon, self.dim)
        if self.kind != "state":
            weights[:, self.n_obs_steps - 1, -self.action_dim :] = first_action
        if self.pinned:
            weights[:, self.n_obs_steps, : self.obs_dim] = next_obs
        return weights.masked_fill(self.known, 0.0)
