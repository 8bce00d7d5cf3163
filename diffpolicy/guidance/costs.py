"""Costs of plans, ready to be steered by: obstacles, limits, smoothness, consistency with dynamics.

A cost takes plans in physical units and raw observations: who knows the robot can write it down.
Those here say their slope in closed form, so that guidance by them needs no automatic
differentiation and goes into compiled loops and exported files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffpolicy.settings import check_choice, check_range

STEPS = ("polyak", "unit", "gradient")
TINY = 1e-12
RIM = 0.02  # of a sphere's radius: how far plans that are pushed sideways may stay inside it


class Cost(nn.Module):
    """What is wrong with a plan: 0 or more, the higher the worse.

    A cost of your own defines ``forward`` and is named ``package.module:Class`` in settings; its
    slope is then found by automatic differentiation, unless it defines :meth:`slope` as well.

    Args:
        weight: factor of the cost among others that take steps of the same kind.
        step: how far a plan is moved against the slope, see
            :class:`~diffpolicy.guidance.cost_guidance.CostGuidance`: ``"polyak"`` for constraints,
            squares whose least value is 0, so that one step mends a linear violation in whatever
            units; ``"unit"`` or ``"gradient"`` for others. Default: the class's.

    Raises:
        ValueError: a weight that is not positive, or an unknown step.

    Example:
        >>> class Effort(Cost):
        ...     def forward(self, plan, obs):
        ...         return plan.square().sum((1, 2))
    """

    STEP: ClassVar[str] = "unit"

    def __init__(self, *, weight: float = 1.0, step: str | None = None) -> None:
        super().__init__()
        check_range("(0, inf)", weight=weight)
        self.weight, self.step = float(weight), self.STEP if step is None else step
        check_choice("step", self.step, STEPS)

    def _keep(self, name: str, numbers: Any) -> None:
        """Constants that go where the weights go."""
        value = None if numbers is None else torch.tensor(numbers, dtype=torch.float64)
        self.register_buffer(name, value, persistent=False)

    def forward(self, plan: Tensor, obs: Any) -> Tensor:
        """The cost ``[n]``.

        Args:
            plan: ``[n, H, D]`` in the units of the data; step ``To - 1`` is the current one.
            obs: raw observations up to then ``[n, To, O]``, or such tensors by name.
        """
        return self.slope(plan, obs)[0]

    def slope(self, plan: Tensor, obs: Any) -> tuple[Tensor, Tensor]:
        """The cost ``[n]``, and its slope with respect to the plan ``[n, H, D]``."""
        if type(self).forward is Cost.forward:
            raise TypeError(f"{type(self).__name__} must define forward(plan, obs) -> [n]")
        with torch.enable_grad():
            at = plan.detach().requires_grad_()
            cost = self(at, obs)
            if not isinstance(cost, Tensor) or cost.shape != plan.shape[:1]:
                got = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
                raise ValueError(f"a cost gives one number per plan, [{len(plan)}]; got {got}")
            (slope,) = torch.autograd.grad(cost.sum(), at)
        return cost.detach(), slope

    @property
    def closed_form(self) -> bool:
        """Whether its slope is plain arithmetic."""
        return type(self).slope is not Cost.slope


class _OfPositions(Cost):
    """A cost of the positions that a plan leads through.

    Args:
        dims: entries of a plan's step: the position itself, or with ``gain`` the move of a step.
        gain: what an entry of 1 moves the position by in one step, one number or one per entry.
        start: with ``gain``, the entries of the observation that hold the current position.
        field: the name of the observation that holds it, where observations have names.
        how: of :class:`Cost`.

    Raises:
        ValueError: ``gain`` without ``start``, or numbers of entries that differ.
    """

    STEP = "polyak"

    def __init__(
        self,
        dims: Sequence[int],
        *,
        gain: float | Sequence[float] | None = None,
        start: Sequence[int] = (),
        field: str | None = None,
        **how: Any,
    ) -> None:
        super().__init__(**how)
        self.dims, self.start, self.field = tuple(dims), tuple(start), field
        self.moves = gain is not None
        if not self.dims or (self.moves and len(self.start) != len(self.dims)):
            raise ValueError(
                f"positions are the entries dims={list(dims)} of a plan; if these are moves, give "
                f"gain and one entry of the observation for each in start; got {list(start)}"
            )
        self.gains = torch.tensor(1.0 if gain is None else gain).expand(len(self.dims))
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}

    def _keep_each(self, name: str, numbers: Sequence[float] | None) -> None:
        """Constants of which each of ``dims`` has one."""
        count = len(self.dims)
        if numbers is not None and len(numbers) != count:
            raise ValueError(f"{name} must have {count} numbers, as dims has; got {list(numbers)}")
        self._keep(name, numbers)

    def positions(self, plan: Tensor, obs: Any) -> tuple[Tensor, Tensor]:
        """Where the plan is now ``[n, d]``, and after each step from now on ``[n, F, d]``."""
        sums, picks = self._maps(plan, _steps(obs) - 1)
        path = sums @ (plan @ picks)
        if not self.moves:
            return path[:, 0], path
        seen = obs[self.field] if isinstance(obs, Mapping) else obs
        here = _entries(seen[:, -1], self.start).to(path)
        return here, path + here[:, None]

    def pulled(self, slope: Tensor, plan: Tensor) -> Tensor:
        """A slope ``[n, F, d]`` with respect to positions as one with respect to the plan."""
        sums, picks = self._maps(plan, int(plan.shape[1]) - int(slope.shape[1]))
        return sums.T @ (slope @ picks.T)  # a move counts in all later positions

    def _maps(self, plan: Tensor, now: int) -> tuple[Tensor, Tensor]:
        """Matrices ``[F, H]`` over steps and ``[D, d]`` over entries, kept for the next call."""
        horizon, entries = int(plan.shape[1]), int(plan.shape[2])  # numbers, also while traced
        if (key := (horizon, entries, now, plan.dtype, plan.device)) not in self._made:
            if max(self.dims) >= entries:
                raise IndexError(f"dims={list(self.dims)} of plans of {entries} entries")
            sums = torch.ones(horizon, horizon).tril() if self.moves else torch.eye(horizon)
            sums[:, :now] = 0  # what is past moves nothing
            picks = torch.zeros(entries, len(self.dims))
            picks[list(self.dims), range(len(self.dims))] = self.gains
            self._made[key] = sums[now:].to(plan), picks.to(plan)
        return self._made[key]


class Obstacle(_OfPositions):
    """Half the squared depth of every position in a sphere or a box, summed over the plan.

    Args:
        dims: see ``gain``.
        center: of the obstacle, in the units of positions.
        radius: of a sphere.
        half_size: half the edges of a box, in place of ``radius``.
        margin: positions are kept this far away.
        push: ``"normal"``: out of the obstacle the shortest way, the gradient. ``"lateral"``
            (spheres): sideways, orthogonal to the way from here to the plan's end, on the side
            where that way passes the center, to within 2 % of radius and margin: the gradient
            projected so that it does not brake, as in CHOMP (Zucker et al. 2013). A plan that is
            only pushed back may wait in front of an obstacle for ever.
        gain: plans hold moves, not positions: what an entry of 1 moves by in one step.
        how: ``start``, ``field`` (see :class:`Limits`), ``weight`` and ``step`` (:class:`Cost`).

    Raises:
        ValueError: not one of ``radius`` and ``half_size``, or sizes that do not fit.

    Example:
        >>> Obstacle((0, 1, 2), center=(1.3, 0.7, 0.5), radius=0.05, gain=0.031, start=(0, 1, 2))
    """

    center: Tensor
    half_size: Tensor | None

    def __init__(
        self,
        dims: Sequence[int],
        *,
        center: Sequence[float],
        radius: float | None = None,
        half_size: Sequence[float] | None = None,
        margin: float = 0.0,
        push: str = "normal",
        gain: float | Sequence[float] | None = None,
        **how: Any,
    ) -> None:
        super().__init__(dims, gain=gain, **how)
        if (radius is None) == (half_size is None):
            raise ValueError("an obstacle is either a sphere, radius=R, or a box, half_size=...")
        check_range("[0, inf)", margin=margin)
        check_range("(0, inf)", radius=radius)
        check_choice("push", push, ("normal", "lateral"))
        if push == "lateral" and radius is None:
            raise ValueError("push='lateral' goes round spheres; give radius in place of half_size")
        self.push, self.margin, self.radius = push, float(margin), radius
        if radius is not None and push == "lateral":
            odd = (0.53, 0.31, 0.79)  # a way through the very center has no side: no way is
            center = [x + 1e-4 * radius * odd[i % 3] for i, x in enumerate(center)]
        self._keep_each("center", center)
        self._keep_each("half_size", half_size)

    def slope(self, plan: Tensor, obs: Any) -> tuple[Tensor, Tensor]:
        here, path = self.positions(plan, obs)
        center = self.center.to(path)
        if self.push == "lateral":
            depth, out = self._sideways(here - center, path - center)
        else:
            away, out = self._distance(path - center)
            depth = (self.margin - away).clamp_min(0)
        return 0.5 * depth.square().sum(1), self.pulled(-depth[..., None] * out, plan)

    def _distance(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Signed distance ``[n, F]`` of positions from the surface, and its gradient."""
        if self.radius is not None:
            far = q.norm(dim=-1)
            return far - self.radius, q / far.clamp_min(TINY)[..., None]
        assert self.half_size is not None
        beyond = q.abs() - self.half_size.to(q)  # below 0 on every axis: inside
        nearest = beyond == beyond.amax(-1, keepdim=True)
        outside = beyond.clamp_min(0)
        far = outside.norm(dim=-1)
        normal = torch.where(far[..., None] > 0, outside / far.clamp_min(TINY)[..., None], nearest)
        return far + beyond.amax(-1).clamp_max(0), normal * torch.where(q < 0, -1.0, 1.0)

    def _sideways(self, here: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """How far ``[n, F]`` positions must move sideways to be out, and that direction."""
        assert self.radius is not None
        reach = (self.radius + self.margin) ** 2
        way = normalize(q[:, -1] - here, dim=-1)
        side = normalize(here - (here * way).sum(-1, keepdim=True) * way, dim=-1)[:, None]
        along, far = (q * side).sum(-1), q.square().sum(-1)
        # Along the side the sphere begins where along^2 + rest^2 = radius^2. At its rim the root is
        # infinitely steep and would make much of rounding: it is rounded off there.
        soft = RIM * reach**0.5
        room = (reach - far + along.square()).clamp_min(0)
        depth = ((room + soft**2).sqrt() - soft - along).clamp_min(0)
        return depth * (far < reach), side


class Limits(_OfPositions):
    """Half the squared excess over lower and upper bounds, of joints or of a workspace.

    Args:
        dims: entries of a plan's step that are bounded; with ``gain`` their running sum is.
        low: one bound for each of ``dims``, in data units; ``None``: none.
        high: likewise.
        gain: plans hold moves: what an entry of 1 moves by in one step.
        how: ``start``, the entries of the observation that hold the current position, and
            ``field``, its name, both for ``gain``; ``weight`` and ``step`` of :class:`Cost`.

    Raises:
        ValueError: no bound, or one that does not fit ``dims``.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        dims: Sequence[int],
        *,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        gain: float | Sequence[float] | None = None,
        **how: Any,
    ) -> None:
        super().__init__(dims, gain=gain, **how)
        if low is None and high is None:
            raise ValueError("limits need low, high or both, one number for each of dims")
        self._keep_each("low", [-torch.inf] * len(self.dims) if low is None else low)
        self._keep_each("high", [torch.inf] * len(self.dims) if high is None else high)

    def slope(self, plan: Tensor, obs: Any) -> tuple[Tensor, Tensor]:
        _, path = self.positions(plan, obs)
        over = path - path.clamp(self.low.to(path), self.high.to(path))
        return 0.5 * over.square().sum((1, 2)), self.pulled(over, plan)


class Smoothness(Cost):
    """How much a plan changes from step to step, from the current one on.

    Args:
        dims: entries of a plan's step that are to be smooth; empty: all.
        order: of the differences: 1 changes of the entries, 2 changes of these.
        kind: ``"squared"``: half the sum of their squares; ``"tv"``: the total variation, the sum
            of their absolute values (rounded off below ``corner``), which leaves a few large jumps.
        corner: in data units; the smaller, the more a plan's last bits count.
        how: ``weight`` and ``step`` of :class:`Cost`.

    Raises:
        ValueError: an unknown kind or values out of range.
    """

    def __init__(
        self,
        dims: Sequence[int] = (),
        *,
        order: int = 1,
        kind: str = "squared",
        corner: float = 0.02,
        **how: Any,
    ) -> None:
        super().__init__(**how)
        check_range("[1, inf)", order=order)
        check_range("(0, inf)", corner=corner)
        check_choice("kind of smoothness", kind, ("squared", "tv"))
        self.dims, self.order, self.kind, self.corner = tuple(dims), order, kind, float(corner)

    def slope(self, plan: Tensor, obs: Any) -> tuple[Tensor, Tensor]:
        now, horizon = _steps(obs) - 1, plan.shape[1]
        differences = torch.eye(horizon, dtype=plan.dtype, device=plan.device)[now:]
        for _ in range(self.order):
            differences = differences[1:] - differences[:-1]
        change = differences @ plan
        if self.dims:
            change = change * change.new_tensor([i in self.dims for i in range(plan.shape[-1])])
        if self.kind == "squared":
            return 0.5 * change.square().sum((1, 2)), differences.T @ change
        size = (change.square() + self.corner**2).sqrt()
        return (size - self.corner).sum((1, 2)), differences.T @ (change / size)


class Dynamics(Cost):
    """Half the squared residual of ``state[h + 1] = state[h] + gain action[h]``, of whole plans.

    For plans that hold both and must not promise what the actions do not do. A model of another
    form is a cost of your own.

    Args:
        state: entries of a plan's step that are the state.
        action: for each the entry that moves it.
        gain: what an action of 1 moves the state by in one step, one number or one per entry.
        how: ``weight`` and ``step`` of :class:`Cost`.

    Raises:
        ValueError: numbers of entries that differ.
    """

    STEP = "polyak"
    gains: Tensor

    def __init__(
        self,
        state: Sequence[int],
        action: Sequence[int],
        *,
        gain: float | Sequence[float],
        **how: Any,
    ) -> None:
        super().__init__(**how)
        if not state or len(state) != len(action):
            got = f"{list(state)} and {list(action)}"
            raise ValueError(f"dynamics need one entry of action for each of state; got {got}")
        self.state, self.action = tuple(state), tuple(action)
        self._keep("gains", gain)

    def slope(self, plan: Tensor, obs: Any) -> tuple[Tensor, Tensor]:
        state, action = _entries(plan, self.state), _entries(plan, self.action)
        gains = self.gains.to(plan)
        residual = state[:, 1:] - state[:, :-1] - gains * action[:, :-1]
        none = torch.zeros_like(residual[:, :1])
        later, earlier = torch.cat([none, residual], 1), torch.cat([residual, none], 1)
        zeros = torch.zeros_like(plan[..., 0])
        columns = dict(zip(self.state, (later - earlier).unbind(-1), strict=True))
        for i, moved in zip(self.action, (-gains * earlier).unbind(-1), strict=True):
            columns[i] = columns.get(i, zeros) + moved
        slope = torch.stack([columns.get(i, zeros) for i in range(plan.shape[-1])], -1)
        return 0.5 * residual.square().sum((1, 2)), slope


def _entries(values: Tensor, which: Sequence[int]) -> Tensor:
    """``values[..., which]``; a list as index would be copied to the device in every call."""
    if list(which) == list(range(which[0], which[-1] + 1)):
        return values[..., which[0] : which[-1] + 1]
    return torch.stack([values[..., entry] for entry in which], -1)


def _steps(obs: Any) -> int:
    """To of raw observations ``[n, To, ...]``, one or by name."""
    array = next(iter(obs.values())) if isinstance(obs, Mapping) else obs
    return int(array.shape[1])


COSTS: Mapping[str, type[Cost]] = {
    "obstacle": Obstacle,
    "limits": Limits,
    "smoothness": Smoothness,
    "dynamics": Dynamics,
}
