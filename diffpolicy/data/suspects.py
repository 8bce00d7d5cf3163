"""Values that can be read, are numbers, and are probably wrong all the same.

Each is judged by what is usual in the same store: outliers, entries that freeze for a while, and
actions that belong to another step or episode. The limits lie far from what demonstrations of
people, scripted experts and simulated robots hold, so that an alarm deserves a look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from diffpolicy.data.opening import ZarrArray

    Values = NDArray[Any]
    Floats = NDArray[np.float64]

FAR = 10.0  # outliers: so many times the range of 98 % of the values beyond it
_NARROW = 1e-4  # a range that counts as constant, as for normalisers
_FROZEN_STEPS = 8
_FROZEN_TIMES = 5  # and so many times the usual longest stay
_STILL = 0.05  # share of steps without a change above which an entry may stay
_LAGS = (-3, -2, -1, 1, 2, 3)
_FOREIGN = -0.5  # share explained below which actions are not this episode's; real ones: -0.2 to 1
_MARGIN = 4  # steps at an episode's ends that are not used, for the lags
_MIN_ROWS = 200
_MAX_VALUES = 2**25


class Suspect(NamedTuple):
    """One finding.

    Attributes:
        kind: `outliers`, `frozen`, `shifted` or `foreign`.
        episode: Its place among the ends; None: the whole store.
        row: The first row, counted over the store.
        message: What is odd.
        fix: What to do.
    """

    kind: str
    episode: int | None
    row: int | None
    message: str
    fix: str


def suspects(
    arrays: Mapping[str, ZarrArray], ends: NDArray[np.int64]
) -> Iterator[tuple[str, Suspect]]:
    """What is suspicious in fields whose rows are vectors of finite numbers.

    A large store is judged by parts of whole episodes, so that memory stays bounded.

    Args:
        arrays: The fields.
        ends: `[E]` cumulative ends, strictly increasing.

    Yields:
        The field and what was found in it.
    """
    width = sum(a.shape[1] for a in arrays.values())
    first = 0
    while arrays and first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, begin + _MAX_VALUES // width, side="right"))
        last = max(last, first + 1)
        part = {n: np.asarray(a[begin : int(ends[last - 1])]) for n, a in arrays.items()}
        for name, found in _of_part(part, ends[first:last] - begin):
            episode = None if found.episode is None else found.episode + first
            row = None if found.row is None else found.row + begin
            yield name, found._replace(episode=episode, row=row)
        first = last


def _of_part(part: Mapping[str, Values], ends: NDArray[np.int64]) -> Iterator[tuple[str, Suspect]]:
    for name, values in part.items():
        yield from ((name, found) for found in outliers(values, ends))
        saturates = name == "action"
        yield from ((name, found) for found in frozen(values, ends, saturates=saturates))
    if {"obs", "action"} <= set(part):
        yield from (("action", found) for found in shifted(part["obs"], part["action"], ends))


def outliers(values: Values, ends: NDArray[np.int64]) -> Iterator[Suspect]:
    """Entries far outside of what all other rows span."""
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
    rows = np.flatnonzero(far.any(axis=1))
    place = np.searchsorted(ends, rows, side="right")
    for index in np.unique(place).tolist():
        row = int(rows[place == index][0])
        entry = int(far[row].argmax())
        yield Suspect(
            "outliers",
            index,
            row,
            f"outliers in {int((place == index).sum())} steps, first {values[row, entry]:.6g} in "
            f"entry {entry}, of which 98 % of all rows lie in [{low[entry]:.4g}, "
            f"{high[entry]:.4g}]; a normaliser by the range shrinks all others",
            "correct the values, leave the episode out, or normalise by quantiles if they are real",
        )


def frozen(values: Values, ends: NDArray[np.int64], *, saturates: bool) -> Iterator[Suspect]:
    """Entries that stay exactly the same for long, where they otherwise change at every step.

    Args:
        values: `[T, D]`.
        ends: `[E]` cumulative ends.
        saturates: Whether staying at the field's extremes is normal, as for actions.
    """
    starts = np.concatenate([[0], ends[:-1]])
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    low, high = values.min(axis=0), values.max(axis=0)
    still, longest, begins = [], [], []
    for start, stop in spans:
        rows = values[start:stop]
        same = rows[1:] == rows[:-1]
        if saturates:
            same &= (rows[1:] > low) & (rows[1:] < high)
        still.append(same.mean(axis=0) if len(same) else np.zeros(values.shape[1]))
        runs = [_longest_run(same[:, d]) for d in range(values.shape[1])]
        longest.append([length for length, _ in runs])
        begins.append([begin for _, begin in runs])
    stays, shares = np.array(longest), np.median(np.array(still), axis=0)
    limit = np.maximum(_FROZEN_STEPS, _FROZEN_TIMES * np.median(stays, axis=0))
    odd = (stays >= limit) & (shares <= _STILL)
    for index in np.flatnonzero(odd.any(axis=1)).tolist():
        entries = np.flatnonzero(odd[index])
        first = int(begins[index][entries[0]])
        steps = int(stays[index][entries[0]])
        yield Suspect(
            "frozen",
            index,
            spans[index][0] + first,
            f"entries {entries.tolist()} stay exactly the same, entry {entries[0]} in steps "
            f"{first}..{first + steps - 1} of the episode; elsewhere they change at nearly every "
            "step: a frozen sensor",
            "leave the episode out, and look whether the recorder lost these entries",
        )


def shifted(obs: Values, action: Values, ends: NDArray[np.int64]) -> Iterator[Suspect]:
    """Actions that explain the changes of observations of other steps better than their own's.

    A linear model on top of position and velocity is fitted; by how much actions of `lag` steps
    later improve it says when they act.
    """
    starts = np.concatenate([[0], ends[:-1]])
    chosen = [i for i in range(len(ends)) if ends[i] - starts[i] > 3 * _MARGIN]
    parts = [_Part.of(obs, action, int(starts[i]), int(ends[i])) for i in chosen]
    if sum(len(p.change) for p in parts) < _MIN_ROWS + 20 * (2 * obs.shape[1] + action.shape[1]):
        return
    change, seen = _residual_base(parts)
    scores = {lag: _explained(change, seen, parts, lag) for lag in (0, *_LAGS)}
    best = max(scores, key=lambda lag: scores[lag][0])
    if scores[best][0] < 0.3:
        return
    if best and scores[best][0] > 1.15 * scores[0][0]:
        yield Suspect("shifted", None, None, _text(best, scores[best][0], scores[0][0]), _SHIFT_FIX)
    if best == 0:
        yield from _shifted_episodes(change, seen, parts, chosen, starts)


_SHIFT_FIX = (
    "pair obs[t] with the action that was computed from it; if the robot answers late, it is fine"
)


def _text(lag: int, score: float, own: float) -> str:
    when = f"{abs(lag)} steps {'later' if lag > 0 else 'earlier'}"
    return (
        f"the actions look shifted in time: those of {when} explain {100 * score:.0f} % of how the "
        f"observations change, those of the same step {100 * max(own, 0):.0f} %"
    )


class _Part(NamedTuple):
    """One episode: what changes, what is seen, and the actions around each step."""

    change: Floats
    seen: Floats
    action: Floats

    @classmethod
    def of(cls, obs: Values, action: Values, start: int, stop: int) -> _Part:
        values, inner = (
            obs[start:stop].astype(np.float64),
            slice(_MARGIN, stop - start - _MARGIN - 1),
        )
        steps = np.diff(values, axis=0)
        before = np.concatenate([steps[:1], steps])[inner]
        return cls(
            steps[inner],
            np.concatenate([values[inner], before], axis=1),
            action[start:stop].astype(np.float64),
        )

    def actions(self, lag: int) -> Floats:
        return self.action[_MARGIN + lag : _MARGIN + lag + len(self.change)]


def _residual_base(parts: list[_Part]) -> tuple[Floats, Floats]:
    """What observations alone do not explain of the changes, and the observations' basis."""
    seen = _standard(np.concatenate([p.seen for p in parts]))
    seen = np.concatenate([seen, np.ones((len(seen), 1))], axis=1)
    change = _standard(np.concatenate([p.change for p in parts]))
    return change - seen @ _solve(seen, change), seen


def _explained(change: Floats, seen: Floats, parts: list[_Part], lag: int) -> tuple[float, Floats]:
    """The share of the best three entries' changes that actions explain, and what is left."""
    action = _standard(np.concatenate([p.actions(lag) for p in parts]))
    action = action - seen @ _solve(seen, action)
    left = change - action @ _solve(action, change)
    power = (change**2).mean(axis=0)  # nearly none where an entry is constant, or known already
    share = np.where(power > 1e-4, 1 - (left**2).mean(axis=0) / np.maximum(power, 1e-4), 0.0)
    return float(np.sort(share)[-3:].mean()), share


def _shifted_episodes(
    change: Floats, seen: Floats, parts: list[_Part], chosen: list[int], starts: NDArray[np.int64]
) -> Iterator[Suspect]:
    """Episodes whose actions fit the others' model only when they are moved, or not at all."""
    own = np.concatenate([p.actions(0) for p in parts])
    center, scale = own.mean(axis=0), np.maximum(own.std(axis=0), 1e-9)
    own = (own - center) / scale
    basis = _solve(seen, own)
    weights = _solve(own - seen @ basis, change)
    best = np.argsort(_explained(change, seen, parts, 0)[1])[-3:]
    place = 0
    fits: list[dict[int, float]] = []
    for part in parts:
        rows = slice(place, place + len(part.change))
        place += len(part.change)
        target, known = change[rows][:, best], seen[rows] @ basis
        fits.append({})
        for lag in (0, *_LAGS):
            left = target - (((part.actions(lag) - center) / scale - known) @ weights)[:, best]
            fits[-1][lag] = 1 - float((left**2).sum()) / (float((target**2).sum()) + 1e-9)
    usual = float(np.median([fit[0] for fit in fits]))
    for index, part, fit in zip(chosen, parts, fits, strict=True):
        lag, row = max(fit, key=lambda k: fit[k]), int(starts[index])
        if len(part.change) < 10 or usual < 0.3:
            continue
        if lag and fit[lag] > 0.3 and fit[0] < 0.5 * fit[lag]:
            yield Suspect("shifted", index, row, _text(lag, fit[lag], fit[0]), _SHIFT_FIX)
        elif fit[0] < _FOREIGN:
            text = (
                "the actions do not act as in the other episodes: a model of those predicts the "
                "changes of observations worse than none"
            )
            fix = "look for flipped signs, another order of the entries, or another recording"
            yield Suspect("foreign", index, row, text, fix)


def _standard(values: Floats) -> Floats:
    found: Floats = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)
    return found


def _solve(basis: Floats, target: Floats) -> Floats:
    gram = basis.T @ basis + 1e-6 * len(basis) * np.eye(basis.shape[1])
    return np.asarray(np.linalg.solve(gram, basis.T @ target), np.float64)


def _longest_run(same: NDArray[np.bool_]) -> tuple[int, int]:
    """Length and begin of the longest run of equal values, of flags between neighbours."""
    cuts = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
    lengths = np.diff(cuts)
    longest = int(lengths.argmax())
    return int(lengths[longest]), int(cuts[longest])
