"""What one position of a plan holds: actions, states, or both; and which entries are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("action", "trajectory", "state")


@dataclass(frozen=True)
class Layout:
    """The meaning of the entries of a plan ``x [B, H, D]``.

    ``"action"``: actions alone; the observation history is the network's condition.
    ``"trajectory"``: observation, then action (Diffuser, Janner et al. 2022).
    ``"state"``: observations alone (Decision Diffuser, Ajay et al. 2023); actions come from an
    inverse dynamics model.

    Position k of a plan is the step ``k - (To - 1)`` from now, so that the first To observations
    of the last two kinds are the history. They are *known*: pinned in the plan itself instead of
    conditioning the network (:class:`diffpolicy.guidance.pinned.Pinned`).

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

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"layout kind must be one of {LAYOUTS}, got {self.kind!r}")
        for name in ("obs_dim", "action_dim", "horizon", "n_obs_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        least = self.n_obs_steps + (self.kind != "action")
        if self.horizon < least:
            raise ValueError(
                f"a {self.kind!r} plan with n_obs_steps={self.n_obs_steps} needs horizon >= "
                f"{least}, got {self.horizon}"
            )
        # Lists come from JSON and YAML; the value must stay hashable.
        object.__setattr__(self, "goal", tuple(_pair(entry) for entry in self.goal))
        object.__setattr__(self, "constant", tuple(self.constant))
        self._check_goal()

    def _check_goal(self) -> None:
        if (self.goal or self.constant) and self.kind == "action":
            raise ValueError("an 'action' plan holds no observation whose goal could be pinned")
        if not all(isinstance(i, int) and 0 <= i < self.obs_dim for i in self.constant):
            raise ValueError(
                f"constant entries are indices into an observation of {self.obs_dim} entries, got "
                f"{self.constant}"
            )
        for entry in self.goal:
            if not all(0 <= index < self.obs_dim for index in entry):
                raise ValueError(
                    f"goal pairs are indices into an observation of {self.obs_dim} entries, got "
                    f"{entry}"
                )
        targets = [i for i, _ in self.goal]
        if len(set(targets)) != len(targets):
            raise ValueError(f"goal pins an entry twice: {self.goal}")

    @property
    def dim(self) -> int:
        """D, the size of one position."""
        obs, action = self.obs_dim, self.action_dim
        return {"action": action, "trajectory": obs + action, "state": obs}[self.kind]

    @property
    def cond_dim(self) -> int:
        """Size of the condition that the observations make: To O if ``"action"``, else 0."""
        return self.n_obs_steps * self.obs_dim if self.kind == "action" else 0

    @property
    def known(self) -> Tensor:
        """Which entries are pinned: bool ``[1, H, D]``, none for ``"action"``."""
        known = torch.zeros(1, self.horizon, self.dim, dtype=torch.bool)
        if self.kind != "action":
            known[:, : self.n_obs_steps, : self.obs_dim] = True
            known[:, :, list(self.constant)] = True
            for i, _ in self.goal:
                known[:, -1, i] = True
        return known

    def join(self, obs: Tensor, action: Tensor) -> Tensor:
        """The clean plan of a window.

        Args:
            obs: normalised ``[B, H, O]`` (not looked at for ``"action"``).
            action: normalised ``[B, H, A]`` (not looked at for ``"state"``).

        Returns:
            ``[B, H, D]``.

        Raises:
            ValueError: a part that the plan holds has another shape.
        """
        parts = []
        if self.kind != "action":
            parts.append(self._checked(obs, "obs", self.horizon, self.obs_dim))
        if self.kind != "state":
            parts.append(self._checked(action, "action", self.horizon, self.action_dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

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
        self._checked(history, "history", self.n_obs_steps, self.obs_dim)
        values = history.new_zeros(len(history), self.horizon, self.dim)
        if (goal_values is not None) != bool(self.goal):
            raise ValueError(
                f"a layout with goal={self.goal} takes "
                f"{'goal_values [B, ' + str(len(self.goal)) + ']' if self.goal else 'none'}, got "
                f"{None if goal_values is None else tuple(goal_values.shape)}"
            )
        if self.kind == "action":
            return values
        for i in self.constant:
            values[:, :, i] = history[:, -1:, i]
        values[:, : self.n_obs_steps, : self.obs_dim] = history
        if goal_values is not None:
            if goal_values.shape != (len(history), len(self.goal)):
                raise ValueError(
                    f"goal_values must be [{len(history)}, {len(self.goal)}], got "
                    f"{list(goal_values.shape)}"
                )
            for column, (i, _) in enumerate(self.goal):  # a list as index is copied to the device
                values[:, -1, i] = goal_values[:, column]
        return values

    def observations(self, x: Tensor) -> Tensor:
        """The observations ``[B, H, O]`` of plans ``[B, H, D]``.

        Raises:
            ValueError: the kind is ``"action"``.
        """
        if self.kind == "action":
            raise ValueError("an 'action' plan holds no observations")
        return x[..., : self.obs_dim]

    def actions(self, x: Tensor) -> Tensor:
        """The actions ``[B, H, A]`` of plans ``[B, H, D]``.

        Raises:
            ValueError: the kind is ``"state"``.
        """
        if self.kind == "state":
            raise ValueError("a 'state' plan holds no actions; an inverse dynamics model has them")
        return x[..., -self.action_dim :]

    def weights(self, first_action: float = 1.0, next_obs: float = 1.0) -> Tensor:
        """Weights of the entries in a denoising loss, 1 unless said otherwise, 0 where known.

        Args:
            first_action: weight of the first action to be executed, position To - 1 (Diffuser 10).
            next_obs: weight of the next observation, position To (Decision Diffuser 10).

        Returns:
            ``[1, H, D]``.

        Raises:
            ValueError: a weight that is not positive, or of something that the plan does not hold.
        """
        if first_action <= 0 or next_obs <= 0:
            raise ValueError(f"weights must be positive, got {first_action} and {next_obs}")
        if (self.kind == "state" and first_action != 1) or (
            self.kind == "action" and next_obs != 1
        ):
            held = (
                "no actions: leave first_action"
                if self.kind == "state"
                else ("no observations: leave next_obs")
            )
            raise ValueError(f"a {self.kind!r} plan holds {held} at 1")
        weights = torch.ones(1, self.horizon, self.dim)
        if self.kind != "state":
            weights[:, self.n_obs_steps - 1, -self.action_dim :] = first_action
        if self.kind != "action":
            weights[:, self.n_obs_steps, : self.obs_dim] = next_obs
        return weights.masked_fill(self.known, 0.0)

    def _checked(self, part: Tensor, name: str, length: int, size: int) -> Tensor:
        if part.dim() != 3 or part.shape[1] != length or part.shape[2] != size:
            raise ValueError(f"{name} must be [B, {length}, {size}], got {list(part.shape)}")
        return part


def _pair(entry: Sequence[int]) -> tuple[int, int]:
    if len(entry) != 2 or not all(isinstance(index, int) for index in entry):
        raise ValueError(f"goal must be pairs of integers (i, j), got {entry!r}")
    return entry[0], entry[1]
