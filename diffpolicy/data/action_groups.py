"""Actions as plans say them: relative to the current state, as changes, with rotations, by choice.

A policy's network may say an action in other numbers than the environment takes. Which, is declared
per group of dimensions (:class:`ActionGroup`); :class:`Representation` translates, both ways. Two
translations lie between an action and what the network says:

- *entries*: a quaternion's four numbers become six, one of n choices becomes n. They depend on
  nothing, so plans of different times can be compared, shifted and averaged in them. This is how
  policies remember plans.
- *relative entries*: those of groups that are relative to the state in which the plan is made. This
  is what networks learn and say.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffpolicy.data.observation import ObsFields, by_store_field, store_field
from diffpolicy.data.rotations import SIZES, from_matrix, to_matrix
from diffpolicy.settings import check_choice, check_range, named_settings, near_miss

KINDS = ("absolute", "relative", "delta")


@named_settings
@dataclass(frozen=True)
class ActionGroup:
    """Some dimensions of an action, and how plans say them.

    Args:
        dims: their indices, in the order that ``rotation`` or ``of`` gives them a meaning in.
        kind: ``"absolute"``: as they are; ``"relative"``: every action of a plan relative to the
            state at the plan's current step (Chi et al. 2024, UMI, arXiv 2402.10329); ``"delta"``:
            each relative to the one before it, that of the current step to the state; those before
            it each as the change to the next.
        of: that state: entries of the observation with the meaning of ``dims``, one for each.
        obs: the name of the observation that ``of`` are entries of, where there are several.
        rotation: the form of a rotation in the data, one of
            :data:`~diffpolicy.data.rotations.SIZES`; it is then relative to another by
            ``R_state^-1 R_action``. ``None``: plain numbers, which are subtracted.
        obs_rotation: the form in the observation, where it is another one.
        plan_rotation: the form in plans; ``None``: ``"rot6d"``, which networks learn best.
        pose: the first three dimensions are a position, before the rotation. What is relative is
            then seen from the state's own frame: ``R_state^-1 (p_action - p_state)``.
        choices: n: the dimension is a whole number, one of n, and plans hold n numbers, of which
            the largest is executed.
        first: the lowest of these whole numbers.
        whole: NumPy's integer type of dimensions that are whole numbers and no choice, such as
            ``"int32"``: plans say them as they are, what is executed is rounded.

    Raises:
        ValueError: settings that do not belong together, or of wrong lengths.

    Example:
        >>> ActionGroup(dims=(0, 1, 2), kind="relative", of=(0, 1, 2))  # a position
        >>> ActionGroup(dims=(3, 4, 5, 6), rotation="quaternion_xyzw")  # six numbers in plans
    """

    dims: tuple[int, ...]
    kind: str = "absolute"
    of: tuple[int, ...] = ()
    obs: str = ""
    rotation: str | None = None
    obs_rotation: str | None = None
    plan_rotation: str | None = None
    pose: bool = False
    choices: int | None = None
    first: int = 0
    whole: str | None = None

    def __post_init__(self) -> None:
        check_choice("kind of action group", self.kind, KINDS)
        check_range("[1, inf)", choices=self.choices)
        for form in (self.rotation, self.obs_rotation, self.plan_rotation):
            if form is not None:
                check_choice("rotation", form, SIZES)
        if not self.dims or len(set(self.dims)) < len(self.dims) or min(self.dims) < 0:
            raise ValueError(f"dims are different indices of the action, got {self.dims}")
        forms = self.obs_rotation is not None or self.plan_rotation is not None
        if self.rotation is None and (forms or self.pose):
            raise ValueError("obs_rotation, plan_rotation and pose need the data's rotation")
        moves = self.kind != "absolute"
        if self.choices is not None and (self.rotation or moves or len(self.dims) > 1):
            raise ValueError("choices are of one dimension, absolute and no rotation")
        if self.first and self.choices is None:
            raise ValueError(f"first={self.first} needs choices=, how many there are from there on")
        self._check_whole()
        if not moves and (self.of or self.obs):
            raise ValueError("of and obs say what a group is relative to; this one is absolute")
        self._check_length("dims", self.dims, self.rotation)
        if moves:
            self._check_length("of", self.of, self.obs_rotation or self.rotation)

    def _check_whole(self) -> None:
        if self.whole is None:
            return
        known = [np.dtype(code).name for code in np.typecodes["AllInteger"]]
        check_choice("type of whole numbers", self.whole, list(dict.fromkeys(known)))
        if self.rotation or self.choices is not None:
            raise ValueError("whole numbers are no rotation, and choices are whole as it is")

    def _check_length(self, name: str, given: tuple[int, ...], form: str | None) -> None:
        if len(given) != (size := self._numbers(form)):
            what = "as many entries as dims" if form is None else f"the {size} entries of {form}"
            what += " after those of a position" if self.pose else ""
            raise ValueError(f"{name} must name {what}, got {given}")

    @property
    def plain(self) -> bool:
        """Whether plans say these dimensions as they are."""
        return self.kind == "absolute" and self.rotation is None and self.choices is None

    @property
    def size(self) -> int:
        """Entries of a plan that say these dimensions."""
        return self._numbers(self._planned) if self.choices is None else self.choices

    def _numbers(self, form: str | None) -> int:
        """How many numbers say these dimensions, with the rotation in this form."""
        return len(self.dims) if form is None else 3 * self.pose + SIZES[form]

    @property
    def _planned(self) -> str | None:
        return None if self.rotation is None else self.plan_rotation or "rot6d"

    def entries(self, action: Tensor) -> Tensor:
        """Entries ``[..., size]`` that say these dimensions ``[..., len(dims)]``, absolutely."""
        if self.choices is not None:
            numbers = torch.arange(self.choices, device=action.device) + self.first
            return (action.round() == numbers).to(action.dtype)
        return self._written(self._read(action, self.rotation), self._planned)

    def action(self, entries: Tensor) -> Tensor:
        """The inverse of :meth:`entries`; of choices the largest entry's number."""
        if self.choices is not None:
            return entries.argmax(-1, keepdim=True).to(entries.dtype) + self.first
        return self._written(self._read(entries, self._planned), self.rotation)

    def relative(self, entries: Tensor, state: Tensor, now: int) -> Tensor:
        """Entries ``[n, H, size]`` relative to a state ``[n, len(of)]`` at position ``now``."""
        if self.kind == "absolute":
            return entries
        own = self._read(entries, self._planned)
        start = self._read(state, self.obs_rotation or self.rotation).map(lambda x: x[:, None])
        if self.kind == "delta":
            # From the state outwards, so that what was is no part of what will be.
            begin = own.map(lambda x: x[:, :now]), start, own.map(lambda x: x[:, now:-1])
            start = _Place.join(begin)
            own = own.map(lambda x: torch.cat([x[:, 1 : now + 1], x[:, now:]], 1))
        return self._written(own.seen_from(start), self._planned)

    def absolute(self, entries: Tensor, state: Tensor, now: int) -> Tensor:
        """The inverse of :meth:`relative`."""
        if self.kind == "absolute":
            return entries
        change = self._read(entries, self._planned)
        start = self._read(state, self.obs_rotation or self.rotation).map(lambda x: x[:, None])
        if self.kind == "relative":
            return self._written(change.placed_at(start), self._planned)
        steps = [change.map(lambda x, p=p: x[:, p : p + 1]) for p in range(entries.shape[1])]
        ahead: list[_Place] = [steps[now].placed_at(start)]
        behind: list[_Place] = []
        for step in steps[now + 1 :]:
            ahead.append(step.placed_at(ahead[-1]))
        for step in reversed(steps[:now]):
            behind.append(step.leading_to(behind[-1] if behind else ahead[0]))
        return self._written(_Place.join([*reversed(behind), *ahead]), self._planned)

    def _read(self, values: Tensor, form: str | None) -> _Place:
        if form is None:
            return _Place(values, None)
        turn = to_matrix(form, values[..., 3 * self.pose :])
        return _Place(values[..., :3] if self.pose else None, turn)

    def _written(self, place: _Place, form: str | None) -> Tensor:
        parts = [] if place.position is None else [place.position]
        if form is not None:
            parts.append(from_matrix(form, place.turn))
        return torch.cat(parts, -1)


class _Place(NamedTuple):
    """A position ``[..., D]``, a rotation ``[..., 3, 3]``, or both; also a change of them."""

    position: Any  # None: there is none
    turn: Any

    def map(self, function: Any) -> _Place:
        return _Place(*(None if part is None else function(part) for part in self))

    @staticmethod
    def join(places: Sequence[_Place]) -> _Place:
        """Along the positions of a plan."""
        pairs = zip(*places, strict=True)
        return _Place(*(None if part[0] is None else torch.cat(part, 1) for part in pairs))

    def seen_from(self, start: _Place) -> _Place:
        """The change that leads from ``start`` here."""
        back = None if start.turn is None else start.turn.transpose(-1, -2)
        position = None if self.position is None else self.position - start.position
        return _Place(_turned(back, position), None if back is None else back @ self.turn)

    def placed_at(self, start: _Place) -> _Place:
        """Where this change leads from ``start``."""
        away = _turned(start.turn, self.position)
        position = None if away is None else start.position + away
        return _Place(position, None if self.turn is None else start.turn @ self.turn)

    def leading_to(self, end: _Place) -> _Place:
        """Where this change leads to ``end`` from."""
        turn = None if self.turn is None else end.turn @ self.turn.transpose(-1, -2)
        away = _turned(turn, self.position)
        return _Place(None if away is None else end.position - away, turn)


def _turned(turn: Any, vector: Any) -> Any:
    return vector if turn is None or vector is None else (turn @ vector[..., None])[..., 0]


class Representation:
    """The translation between actions and plans, for all groups of an action.

    Dimensions that no group names stay as they are. Entries of a plan stand in the order of their
    groups' lowest dimensions.

    Args:
        groups: of :class:`ActionGroup`.
        action_dim: A, numbers of an action.
        observed: what is observed in a step, for ``of``.
        now: position of the current step in a plan, To - 1.

    Attributes:
        dim: P, entries of a plan per step.
        moves: whether entries depend on the state in which a plan is made.
        plain: whether plans hold actions as they are.

    Raises:
        ValueError: dimensions that are named twice or do not exist, or an ``of`` that does not.
    """

    def __init__(
        self, groups: Sequence[ActionGroup], action_dim: int, observed: ObsFields, now: int
    ) -> None:
        named = [dim for group in groups for dim in group.dims]
        if len(set(named)) < len(named) or max(named, default=0) >= action_dim:
            raise ValueError(
                f"every dimension of the action, 0 to {action_dim - 1}, belongs to one group at "
                f"most; the groups name {named}"
            )
        for group in groups:
            _check_state(group, by_store_field(observed))
        ends = sorted({0, action_dim, *named, *(dim + 1 for dim in named)})
        runs = [tuple(range(*pair)) for pair in itertools.pairwise(ends)]
        rest = [ActionGroup(run) for run in runs if run[0] not in named]
        self.groups = tuple(sorted((*groups, *rest), key=lambda group: min(group.dims)))
        self.now, self.action_dim = now, action_dim
        self.dim = sum(group.size for group in self.groups)
        self.moves = any(group.kind != "absolute" for group in self.groups)
        order = [dim for group in self.groups for dim in group.dims]
        self._back = sorted(range(action_dim), key=order.__getitem__)
        self.plain = all(group.plain for group in self.groups) and order == self._back

    def entry(self, dim: int) -> int:
        """The entry of a plan that is a dimension of the action as it is.

        Raises:
            ValueError: plans say this dimension in another way.
        """
        before = 0
        for group in self.groups:
            if dim in group.dims:
                if group.plain:
                    return before + group.dims.index(dim)
                raise ValueError(f"dimension {dim} is not said as it is in plans: {group}")
            before += group.size
        raise ValueError(f"dimension {dim} is not below action_dim={self.action_dim}")

    def entries(self, actions: Tensor) -> Tensor:
        """Entries ``[..., P]`` that say actions ``[..., A]`` absolutely."""
        return torch.cat([g.entries(_columns(actions, g.dims)) for g in self.groups], -1)

    def actions(self, entries: Tensor) -> Tensor:
        """The inverse of :meth:`entries`, up to the sign of quaternions."""
        parts = zip(self.groups, self._apart(entries), strict=True)
        return _columns(torch.cat([group.action(part) for group, part in parts], -1), self._back)

    def relative(self, entries: Tensor, obs: Any) -> Tensor:
        """Absolute entries ``[n, H, P]`` as plans say them in a state.

        Args:
            entries: of plans whose current step is that of ``obs``.
            obs: raw observation of that step, ``[n, O]`` or by name.
        """
        return self._in_state("relative", entries, obs)

    def absolute(self, entries: Tensor, obs: Any) -> Tensor:
        """The inverse of :meth:`relative`, with the same arguments."""
        return self._in_state("absolute", entries, obs)

    def _in_state(self, how: str, entries: Tensor, obs: Any) -> Tensor:
        parts = []
        for group, part in zip(self.groups, self._apart(entries), strict=True):
            seen = obs[group.obs] if isinstance(obs, Mapping) and group.of else obs
            state = _columns(seen, group.of).to(part.dtype) if group.of else part
            parts.append(getattr(group, how)(part, state, self.now))
        return torch.cat(parts, -1)

    def _apart(self, entries: Tensor) -> tuple[Tensor, ...]:
        return torch.split(entries, [group.size for group in self.groups], -1)


def _columns(values: Tensor, which: Sequence[int]) -> Tensor:
    """``values[..., which]``; neighbours as a slice, which copies no indices to a device."""
    first, last = which[0], which[-1]
    if list(which) == list(range(first, last + 1)):
        return values[..., first : last + 1]
    return values[..., list(which)]


def _check_state(group: ActionGroup, fields: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the state that a group is relative to is observed."""
    if not group.of:
        return
    name = store_field(group.obs)
    if name not in fields:
        known = [known.partition(".")[2] for known in fields]
        hint = near_miss(group.obs, known, listing="there are" if any(known) else "")
        fix = (
            "say which, obs=NAME" if any(known) else "the observation is one vector: leave obs out"
        )
        raise ValueError(f"an action group is relative to obs={group.obs!r}{hint}; {fix}")
    size = fields[name].size
    if fields[name].is_image or min(group.of) < 0 or max(group.of) >= size:
        raise ValueError(f"of={group.of} must be entries of {name!r}, a vector of {size}")
