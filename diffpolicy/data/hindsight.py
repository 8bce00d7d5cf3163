"""Goals in hindsight: a state that an episode came to is what its earlier actions were for.

Play data have no goals. A policy that is shown one (``obs.desired_goal``) learns from them all the
same if, for every window, some state that came later in the same episode stands for the goal (HER,
Andrychowicz et al. 2017; goal-conditioned cloning in OGBench, Park et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpolicy.data.blocks import Ints
from diffpolicy.data.fields import FieldSpec
from diffpolicy.data.joined import Joined
from diffpolicy.data.reader import EpisodeReader
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows
from diffpolicy.settings import check_settings, named_settings, ranged, settings_of

STATE, GOAL = "obs.observation", "obs.desired_goal"
_EXAMPLES = 1 << 24  # so many (window, goal) pairs come before any comes again


@named_settings
@dataclass(frozen=True)
class Hindsight:
    """Which states stand for the goals of windows; names and defaults are OGBench's for actors.

    Args:
        p_trajgoal: share of the windows whose goal is a later state of the same episode.
        p_curgoal: share whose goal is the state of now.
        p_randomgoal: share whose goal is a state of any episode.
        geom_sample: a later state is k steps ahead with probability ``(1 - discount) discount^(k -
            1)``, the episode's last where that is beyond it; otherwise all later states are equally
            probable.
        discount: of that law, in (0, 1).
        flat: the observation is one vector, the state and behind it the goal, as planners take it.

    Raises:
        ValueError: shares that do not add up to 1, or a value out of range.
    """

    p_trajgoal: float = ranged("[0, 1]", 1.0)
    p_curgoal: float = ranged("[0, 1]", 0.0)
    p_randomgoal: float = ranged("[0, 1]", 0.0)
    geom_sample: bool = False
    discount: float = ranged("(0, 1)", 0.99)
    flat: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        shares = self.p_trajgoal, self.p_curgoal, self.p_randomgoal
        if abs(sum(shares) - 1) > 1e-9:
            names = "p_trajgoal, p_curgoal and p_randomgoal"
            raise ValueError(f"{names} are shares, which add up to 1; got {shares}")

    def steps(self, left: Ints, uniform: NDArray[np.float64]) -> Ints:
        """How many steps ahead a later state is.

        Args:
            left: ``[B]``, steps from now to the last of the episode.
            uniform: ``[B]`` in [0, 1), what is drawn.

        Returns:
            ``[B]``, 1..left; 0 where nothing is left.
        """
        if self.geom_sample:  # the inverse of the law's distribution function
            ahead = 1 + np.floor(np.log1p(-uniform) / np.log(self.discount)).astype(np.int64)
        else:
            ahead = 1 + np.floor(uniform * left).astype(np.int64)
        found: Ints = np.minimum(ahead, left)
        return found


class Relabelled(EpisodeReader):
    """A store whose observations hold a goal; made by :func:`relabelled`."""

    def __init__(self, store: EpisodeReader, hindsight: Hindsight) -> None:
        self.store, self.hindsight = store, hindsight
        self.path, self.name, self.is_native = store.path, store.name, store.is_native
        self._of = "obs" if "obs" in store.fields else STATE
        given = store.fields
        if self._of not in given:
            raise ValueError(
                f"hindsight makes goals of the field 'obs', or {STATE!r} beside others; "
                f"{store.name} has {sorted(given)}"
            )
        if GOAL in given and given[GOAL] != given[self._of]:
            raise ValueError(
                f"in {store.name} goals {GOAL!r} are {given[GOAL]}, states {given[self._of]}: "
                "hindsight is for goals that are states"
            )
        state, flat = given.pop(self._of), hindsight.flat
        if flat and (self._of != "obs" or len(state.shape) != 1):
            raise ValueError(f"flat=true wants one vector 'obs'; {store.name} has {sorted(given)}")
        whole = FieldSpec((2 * state.size,), state.dtype) if flat else state
        self._fields = given | ({"obs": whole} if flat else {STATE: state, GOAL: state})
        self._ends, self._episode_attrs = store.episode_ends, store.episode_attrs

    @property
    def attrs(self) -> dict[str, Any]:
        """Those of the store; what actions are relative to has the name that it has here."""
        known = self.store.attrs
        if self.hindsight.flat or self._of != "obs" or "action_groups" not in known:
            return known
        of_state = {"obs": STATE.removeprefix("obs.")}
        groups = [{**g, **(of_state if g.get("of") else {})} for g in known["action_groups"]]
        return {**known, "action_groups": groups}

    def close(self) -> None:
        """Let go of the files."""
        cast("EpisodeStore", self.store).close()

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Those of the store; goals have those of states, which they are."""
        known = dict(self.store.statistics)
        state = known.pop(self._of)
        if not self.hindsight.flat:
            return {**known, STATE: state, GOAL: state}
        twice = {k: v * 2 if isinstance(v, list) else v for k, v in state.items()}
        return {**known, "obs": twice}

    def chunk_rows(self, field: str) -> int:
        """Return the rows in one chunk of ``field``."""
        own = self._of if field in ("obs", STATE, GOAL) else field
        return self.store.chunk_rows(own)

    def read(self, field: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows of one field; a goal is then the last state of its episode."""
        if field not in self._fields:
            raise KeyError(f"{self.name} has no field {field!r}; it has {sorted(self._fields)}")
        if field not in ("obs", STATE, GOAL):
            return self.store.read(field, start, stop)
        states = self.store.read(self._of, start, stop) if field != GOAL else None
        if field == STATE:
            return cast("NDArray[Any]", states)
        first, last, _ = slice(start, stop).indices(self.num_steps)
        episodes = np.searchsorted(self._ends, np.arange(first, last), side="right")
        ends = {e: self.store.read(self._of, e - 1, e) for e in np.unique(self._ends[episodes])}
        rows = [ends[e] for e in self._ends[episodes]]
        goals = np.concatenate([self.store.read(self._of, 0, 0), *rows])
        return goals if states is None else np.concatenate([states, goals], 1)


def relabelled(
    store: EpisodeReader, hindsight: Hindsight | Mapping[str, Any] | None = None
) -> EpisodeStore:
    """A store, for reading, whose observations hold goals in hindsight.

    Its observation, ``obs`` ``[O]``, becomes ``obs.observation`` and ``obs.desired_goal``, as a
    goal-conditioned environment's; with ``flat`` it becomes ``obs`` ``[2 O]``. Training windows of
    it have goals drawn anew (:class:`HindsightWindows`); read as it is, goals are the last states
    of the episodes.

    Args:
        store: with ``obs``, or ``obs.observation`` beside others.
        hindsight: which goals, or its plain values; default :class:`Hindsight`'s.

    Raises:
        ValueError: a store without states, or with goals that are none.

    Example:
        >>> store = relabelled(EpisodeStore.open("data/ogbench/scene-play.zarr"))
        >>> policy = DiffusionPolicy.from_dataset(store, spec={"horizon": 16})
    """
    given = {} if hindsight is None else hindsight
    made = settings_of(Hindsight, given, "goals") if isinstance(given, Mapping) else given
    if isinstance(store, Joined):
        parts = {name: relabelled(part, made) for name, part in store.parts.items()}
        return cast("EpisodeStore", Joined(parts, store.weights))
    return cast("EpisodeStore", Relabelled(store, made))


def hindsight_of(store: EpisodeReader) -> Hindsight | None:
    """Which goals the windows of a store have; None unless it is :func:`relabelled`."""
    one = next(iter(store.parts.values())) if isinstance(store, Joined) else store
    return getattr(one, "hindsight", None)


class HindsightWindows:
    """Windows whose goals are drawn in hindsight: a source of the trainer.

    Every window is an example as often as ``draws`` says, each time with a goal of its own that
    depends on the example's number alone, so that a resumed run finds the same ones. Plans that
    hold observations end at their goal, which is then the last state of the window.

    Args:
        windows: of a :func:`relabelled` store.
        hindsight: which goals.
        whole: whether plans hold observations.
        draws: goals of a window; None: as many as it takes for 16 million examples.
    """

    def __init__(
        self, windows: Windows, hindsight: Hindsight, *, whole: bool, draws: int | None = None
    ) -> None:
        self.windows, self.hindsight, self.whole = windows, hindsight, whole
        self.draws = -(-_EXAMPLES // len(windows)) if draws is None else draws
        self.horizon, self.n_obs_steps = windows.horizon, windows.n_obs_steps

    def __len__(self) -> int:
        return len(self.windows) * self.draws

    def identity(self) -> dict[str, Any]:
        """What the examples are, for telling one run from another."""
        return {"windows": self.windows, "hindsight": self.hindsight, "draws": self.draws}

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of windows with their goals; ``desired_goal`` ``[B, To, *shape]`` is constant."""
        place, ahead = self.goals(indices)
        batch = self.windows.gather(indices % len(self.windows))
        if not self.hindsight.flat:
            goal = self.windows.later(STATE, place, ahead).unsqueeze(1)
            batch[GOAL] = goal.expand_as(batch[GOAL]).to(batch[GOAL].device).clone()
            return batch
        size = batch["obs"].shape[-1] // 2
        goal = self.windows.later("obs", place, ahead)[:, None, :size]
        batch["obs"][..., size:] = goal.to(batch["obs"].device)
        return batch

    def goals(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Where the goals of examples are: from which window's now, and how many steps ahead."""
        count = len(self.windows)
        place = indices % count
        left = self.windows.left(place)
        if self.whole:
            return place, left.clamp(max=self.horizon - self.n_obs_steps)
        numbers = indices.cpu().numpy().astype(np.uint64)
        kind, how, where = (torch.from_numpy(_uniform(numbers, salt)) for salt in (1, 2, 3))
        ahead = torch.from_numpy(self.hindsight.steps(left.cpu().numpy(), how.numpy()))
        now = kind >= self.hindsight.p_trajgoal
        other = kind >= self.hindsight.p_trajgoal + self.hindsight.p_curgoal
        anywhere = (where * count).long()
        return torch.where(other, anywhere, place.cpu()), torch.where(now, 0, ahead)


def _uniform(numbers: NDArray[np.uint64], salt: int) -> NDArray[np.float64]:
    """A number in [0, 1) of each, by splitmix64 (Steele et al. 2014): a pure function of it."""
    with np.errstate(over="ignore"):
        z = (numbers * np.uint64(4) + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.float64] = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64)
    return found * 2.0**-53
