"""Values that can be read, are numbers, and are probably wrong all the same.

Each is judged by what is usual in the same store: outliers, entries that freeze for a while, and
actions that belong to another step or episode. The limits lie far from what demonstrations of
people, scripted experts and simulated robots hold, so that an alarm deserves a look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.blocks import Ints, by_episode, spans
from diffpolicy.data.opening import ZarrArray

Values = NDArray[Any]
Floats = NDArray[np.float64]

FAR = 10.0  # outliers: so many times the range of 98 % of the values beyond it
_NARROW = 1e-4  # a range that counts as constant, as for normalisers
FROZEN_STEPS = 8
FROZEN_TIMES = 5  # and so many times the usual longest stay
STILL = 0.05  # share of steps without a change above which an entry may stay
_LAGS = (0, -3, -2, -1, 1, 2, 3)
_EXPLAINS = 0.3  # share of the changes from which on actions count as their cause
_FOREIGN = -0.5  # share explained below which actions are not this episode's; real ones: -0.2 to 1
_MARGIN = 4  # steps at an episode's ends that are not used, for the lags
_MIN_ROWS = 200
_MAX_VALUES = 2**25


class Suspect(NamedTuple):
    """One finding.

    Attributes:
        field: The field.
        kind: ``outliers``, ``frozen``, ``shifted`` or ``foreign``.
        episode: Its place among the ends; None: the whole store.
        row: The first row, counted over the store.
        message: What is odd.
        fix: What to do.
    """

    field: str
    kind: str
    episode: int | None
    row: int | None
    message: str
    fix: str


def suspects(arrays: Mapping[str, ZarrArray], ends: Ints) -> Iterator[Suspect]:
    """Yield what is suspicious in fields whose rows are vectors of finite numbers.

    A large store is judged by parts of whole episodes, so that memory stays bounded.

    Args:
        arrays: The fields.
        ends: ``[E]`` cumulative ends, strictly increasing.
    """
    width = sum(a.shape[1] for a in arrays.values())
    first, begin = 0, 0
    while arrays and first < len(ends):
        last = int(np.searchsorted(ends, begin + _MAX_VALUES // width, side="right"))
        last = max(last, first + 1)
        stop = int(ends[last - 1])
        part = {n: np.asarray(a[begin:stop]) for n, a in arrays.items()}
        for found in _of_part(part, ends[first:last] - begin):
            if found.episode is None or found.row is None:  # of the whole
                yield found
            else:
                yield found._replace(episode=found.episode + first, row=found.row + begin)
        first, begin = last, stop


def _of_part(part: Mapping[str, Values], ends: Ints) -> Iterator[Suspect]:
    for name, values in part.items():
        yield from outliers(name, values, ends)
        yield from frozen(name, values, ends)
    if {"obs", "action"} <= set(part):
        yield from shifted(part["obs"], part["action"], ends)


def outliers(name: str, values: Values, ends: Ints) -> Iterator[Suspect]:
    """Yield episodes with entries far outside of what all other rows span."""
    count = len(values)
    drop = max(1, count // 100)
    if count < 20:
        return
    ordered = np.partition(values, (drop, count // 2, count - 1 - drop), axis=0)
    low, middle, high = ordered[drop], ordered[count // 2], ordered[count - 1 - drop]
    width = high - low
    # A rare flag spans nothing in 98 % of the rows: there only the absurd is far.
    slack = np.where(width < _NARROW, 1e3 * np.maximum(np.abs(middle), 1.0), FAR * width)
    far = (values > high + slack) | (values < low - slack)
    fix = "correct the values, leave the episode out, or normalise by quantiles"
    for index, rows in by_episode(np.flatnonzero(far.any(axis=1)), ends):
        row = int(rows[0])
        entry = int(far[row].argmax())
        message = (
            f"outliers in {len(rows)} steps, first {values[row, entry]:.6g} in entry {entry}, "
            f"of which 98 % of all rows lie in [{low[entry]:.4g}, {high[entry]:.4g}]"
        )
        yield Suspect(name, "outliers", index, row, message, fix)


def frozen(name: str, values: Values, ends: Ints) -> Iterator[Suspect]:
    """Yield episodes with entries that stay the same for long, but otherwise change all the time.

    Args:
        name: The field; of actions it is normal to stay at their extremes.
        values: ``[T, D]``.
        ends: ``[E]`` cumulative ends.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    still, runs, places = [], [], spans(ends)
    for start, stop in places:
        rows = values[start:stop]
        same = rows[1:] == rows[:-1]
        if name == "action":
            same &= (rows[1:] > low) & (rows[1:] < high)
        still.append(same.mean(axis=0) if len(same) else np.zeros(values.shape[1]))
        runs.append([longest_run(entry) for entry in same.T])
    stays, begins = np.array(runs).transpose(2, 0, 1)  # [E, D] each
    limit = np.maximum(FROZEN_STEPS, FROZEN_TIMES * np.median(stays, axis=0))
    odd = (stays >= limit) & (np.median(np.array(still), axis=0) <= STILL)
    fix = "leave the episode out, and look whether the recorder lost these entries"
    for index in np.flatnonzero(odd.any(axis=1)).tolist():
        entries = np.flatnonzero(odd[index])
        first, steps = int(begins[index, entries[0]]), int(stays[index, entries[0]])
        message = (
            f"entries {entries.tolist()} stay exactly the same, entry {entries[0]} in steps "
            f"{first}..{first + steps - 1} of the episode; elsewhere they change at nearly every "
            "step: a frozen sensor"
        )
        yield Suspect(name, "frozen", index, places[index][0] + first, message, fix)


def moving(arrays: Mapping[str, ZarrArray], ends: Ints) -> NDArray[np.bool_]:
    """Return ``[T]`` whether any vector changed by a share of its range since the row before.

    Where there are no vectors, everything counts as moving.
    """
    found = np.full(int(ends[-1]), not arrays)
    for array in arrays.values():
        values = np.asarray(array[: len(found)])
        far = _NARROW * np.maximum(values.max(axis=0) - values.min(axis=0), 1e-12)
        found[1:] |= (np.abs(np.diff(values, axis=0)) > far).any(axis=1)
    return found


def longest_run(same: NDArray[np.bool_]) -> tuple[int, int]:
    """Return length and begin of the longest run of equal values, of flags between neighbours."""
    cuts = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
    lengths = np.diff(cuts)
    longest = int(lengths.argmax())
    return int(lengths[longest]), int(cuts[longest])


class _Part(NamedTuple):
    """One episode without its margins: what changes, what is seen, and all of its actions."""

    episode: int
    start: int
    change: Floats
    seen: Floats
    action: Floats

    @classmethod
    def of(cls, episode: int, start: int, obs: Values, action: Values) -> _Part:
        inner = slice(_MARGIN, len(obs) - _MARGIN - 1)
        steps = np.diff(obs.astype(np.float64), axis=0)
        before = np.concatenate([steps[:1], steps])
        seen = np.concatenate([obs, before], axis=1)[inner]
        return cls(episode, start, steps[inner], seen, action.astype(np.float64))

    def actions(self, lag: int) -> Floats:
        return self.action[_MARGIN + lag : _MARGIN + lag + len(self.change)]


def shifted(obs: Values, action: Values, ends: Ints) -> Iterator[Suspect]:
    """Yield where actions explain the changes of observations of other steps better than their own.

    A linear model on top of position and velocity is fitted; by how much actions of ``lag`` steps
    later improve it says when they act.
    """
    parts = [
        _Part.of(index, start, obs[start:stop], action[start:stop])
        for index, (start, stop) in enumerate(spans(ends))
        if stop - start > 3 * _MARGIN
    ]
    if sum(len(p.change) for p in parts) < _MIN_ROWS + 20 * (2 * obs.shape[1] + action.shape[1]):
        return
    # What observations alone do not explain of the changes, and the observations' basis.
    seen = _standard(np.concatenate([p.seen for p in parts]))
    seen = np.concatenate([seen, np.ones((len(seen), 1))], axis=1)
    change = _standard(np.concatenate([p.change for p in parts]))
    change = change - seen @ _solve(seen, change)
    shares = {lag: _explained(change, seen, parts, lag) for lag in _LAGS}
    scores = {lag: float(np.sort(share)[-3:].mean()) for lag, share in shares.items()}
    best = max(scores, key=lambda lag: scores[lag])
    if scores[best] < _EXPLAINS:
        return
    if best and scores[best] > 1.15 * scores[0]:
        yield _shift(None, None, best, scores[best], scores[0])
    if best == 0:
        yield from _odd_episodes(change, seen, parts, np.argsort(shares[0])[-3:])


def _shift(episode: int | None, row: int | None, lag: int, score: float, own: float) -> Suspect:
    when = f"{abs(lag)} steps {'later' if lag > 0 else 'earlier'}"
    message = (
        f"the actions look shifted in time: those of {when} explain {100 * score:.0f} % of how the "
        f"observations change, those of the same step {100 * max(own, 0):.0f} %"
    )
    fix = "pair obs[t] with the action computed from it; if the robot answers late, it is fine"
    return Suspect("action", "shifted", episode, row, message, fix)


def _explained(change: Floats, seen: Floats, parts: list[_Part], lag: int) -> Floats:
    """The share of each entry's changes that actions of a lag explain."""
    action = _standard(np.concatenate([p.actions(lag) for p in parts]))
    action = action - seen @ _solve(seen, action)
    left = change - action @ _solve(action, change)
    power = (change**2).mean(axis=0)  # nearly none where an entry is constant, or known already
    return np.where(power > 1e-4, 1 - (left**2).mean(axis=0) / np.maximum(power, 1e-4), 0.0)


def _odd_episodes(
    change: Floats, seen: Floats, parts: list[_Part], entries: Ints
) -> Iterator[Suspect]:
    """Episodes whose actions fit the others' model only when they are moved, or not at all."""
    own = np.concatenate([p.actions(0) for p in parts])
    center, scale = own.mean(axis=0), np.maximum(own.std(axis=0), 1e-9)
    own = (own - center) / scale
    basis = _solve(seen, own)
    weights = _solve(own - seen @ basis, change)[:, entries]
    cuts = np.cumsum([len(p.change) for p in parts])[:-1]
    fits: list[dict[int, float]] = []
    for part, target, known in zip(
        parts, np.split(change[:, entries], cuts), np.split(seen @ basis, cuts), strict=True
    ):
        left = {k: target - ((part.actions(k) - center) / scale - known) @ weights for k in _LAGS}
        power = float((target**2).sum()) + 1e-9
        fits.append({lag: 1 - float((rest**2).sum()) / power for lag, rest in left.items()})
    if np.median([fit[0] for fit in fits]) < _EXPLAINS:
        return
    for part, fit in zip(parts, fits, strict=True):
        lag = max(fit, key=lambda k: fit[k])
        if len(part.change) < 10:
            continue
        if lag and fit[lag] > _EXPLAINS and fit[0] < 0.5 * fit[lag]:
            yield _shift(part.episode, part.start, lag, fit[lag], fit[0])
        elif fit[0] < _FOREIGN:
            text = (
                "the actions do not act as in the other episodes: a model of those predicts the "
                "changes of observations worse than none"
            )
            fix = "look for flipped signs, another order of the entries, or another recording"
            yield Suspect("action", "foreign", part.episode, part.start, text, fix)


def _standard(values: Floats) -> Floats:
    found: Floats = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)
    return found


def _solve(basis: Floats, target: Floats) -> Floats:
    """Least squares with a little ridge, for entries that depend on each other."""
    gram = basis.T @ basis + 1e-6 * len(basis) * np.eye(basis.shape[1])
    return np.asarray(np.linalg.solve(gram, basis.T @ target), np.float64)
