"""Cross-validation of learned rewards: how often they agree with judgements they have not seen."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.preferences.records import Pair, episodes_of
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.learn.values.learning import PreferenceLearning
from diffpolicy.learn.values.reward import RewardModel
from diffpolicy.settings import settings_of
from diffpolicy.training.settings import TrainerConfig, mix_seed

DRAWS = 4000  # of the bootstrap


@dataclass(frozen=True)
class RewardCandidate:
    """One way to learn a reward.

    Args:
        name: for tables.
        spec: entries of :class:`~diffpolicy.learn.values.reward.RewardSpec`.
        learning: entries of :class:`~diffpolicy.learn.values.learning.PreferenceLearning`.
        trainer: entries of :class:`~diffpolicy.training.settings.TrainerConfig`.
    """

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    learning: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


def learn_candidate(
    candidate: RewardCandidate, preferences: PreferenceSet, seed: int, run_dir: Path
) -> RewardModel:
    """A reward model learned from all pairs of a set.

    Args:
        candidate: how.
        preferences: the pairs.
        seed: of weights, bootstrap and order.
        run_dir: of the run; replaced.
    """
    model = RewardModel.for_preferences(preferences, spec=candidate.spec, seed=seed)
    quiet = {"checkpoint_every": None, "log_every": 10**9, "progress": False}
    config = TrainerConfig(**{**quiet, **candidate.trainer, "seed": seed})
    learning = settings_of(PreferenceLearning, candidate.learning, "learning")
    return model.learn(preferences, config, run_dir, learning=learning, overwrite=True)


def cross_validate(
    preferences: PreferenceSet,
    candidates: Sequence[RewardCandidate],
    *,
    folds: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    inner_folds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Nested cross-validation, split by episode: no episode is on both sides of any split.

    For each seed the episodes are dealt into folds anew. In each fold the candidate is chosen by
    cross-validation *within the training episodes* (least log loss), learned from all their pairs,
    and tried on pairs of held-out episodes alone. Pairs of which one segment is a training
    episode's are dropped.

    Args:
        preferences: pairs and rankings; ties are never held out.
        candidates: ways to learn; with a single one nothing is chosen.
        folds: K of the outer split.
        seeds: each a split and a training seed.
        inner_folds: K of the choice.
        progress: is told a line per fold.

    Returns:
        Plain values: ``accuracy`` pooled over all held-out pairs of all seeds, its ``interval``
        (see :func:`interval_by_episode`), ``seeds`` (accuracy of each), ``fold_std`` (over the
        folds), ``pairs`` held out, ``pairs_distinct``, ``log_loss``, ``rows`` (one per fold) and
        ``reward`` (accuracy and interval of the store's own rewards on the same pairs, where it
        has the field).

    Raises:
        ValueError: no candidates, or too few records to split.
    """
    if not candidates or not seeds:
        raise ValueError("cross-validation needs at least one candidate and one seed")
    rows: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    right: list[NDArray[Any]] = []
    with tempfile.TemporaryDirectory(prefix="diffpolicy-reward-") as folder:
        run = Path(folder) / "run"
        for seed in seeds:
            for number, (train, held_out) in enumerate(_sides(preferences, folds, seed)):
                chosen, losses = _choose(candidates, train, inner_folds, seed, run)
                model = learn_candidate(chosen, train, mix_seed(seed, number), run)
                tried = held_out.pairs()
                found = model.evaluate(held_out)
                rows.append(
                    {
                        "seed": seed,
                        "fold": number,
                        "chosen": chosen.name,
                        "inner_log_loss": losses,
                        "train_pairs": len(train.pairs()),
                        "train_accuracy": model.accuracy(train),
                        **found,
                    }
                )
                pairs += tried
                right.append(model.right(held_out, tried))
                if progress is not None:
                    progress(
                        f"seed {seed} fold {number}: {chosen.name}, accuracy "
                        f"{found['accuracy']:.3f} of {len(tried)} pairs"
                    )
    return _summary(preferences, rows, pairs, np.concatenate(right))


def _sides(
    preferences: PreferenceSet, folds: int, seed: int
) -> list[tuple[PreferenceSet, PreferenceSet]]:
    sides = preferences.split_by_episode(folds, seed)
    if any(not held_out.pairs() for _, held_out in sides):
        raise ValueError(f"a fold of {folds} holds out no pairs; use fewer folds, or more records")
    return sides


def _choose(
    candidates: Sequence[RewardCandidate],
    train: PreferenceSet,
    folds: int,
    seed: int,
    run: Path,
) -> tuple[RewardCandidate, dict[str, float]]:
    """The candidate with the least held-out log loss within ``train``, and that of each."""
    if len(candidates) == 1:
        return candidates[0], {}
    sides = _sides(train, folds, seed)
    losses = {}
    for candidate in candidates:
        total, count = 0.0, 0.0
        for inner, held_out in sides:
            found = learn_candidate(candidate, inner, seed, run).evaluate(held_out)
            total, count = total + found["log_loss"] * found["pairs"], count + found["pairs"]
        losses[candidate.name] = total / count
    return min(candidates, key=lambda c: losses[c.name]), losses


def _summary(
    preferences: PreferenceSet,
    rows: list[dict[str, Any]],
    pairs: Sequence[Pair],
    right: NDArray[Any],
) -> dict[str, Any]:
    def of_seed(seed: int) -> float:
        own = [r for r in rows if r["seed"] == seed]
        return float(np.average([r["accuracy"] for r in own], weights=[r["pairs"] for r in own]))

    summary = {
        "accuracy": float(right.mean()),
        "interval": interval_by_episode(pairs, right),
        "seeds": {str(seed): of_seed(seed) for seed in dict.fromkeys(r["seed"] for r in rows)},
        "fold_std": float(np.std([r["accuracy"] for r in rows], ddof=1 if len(rows) > 1 else 0)),
        "log_loss": sum(r["log_loss"] * r["pairs"] for r in rows) / len(pairs),
        "pairs": len(pairs),
        "pairs_distinct": len({(p.chosen, p.rejected) for p in pairs}),
        "rows": rows,
    }
    store = preferences.store
    if "reward" in store.fields:
        own = store.read("reward", 0, store.num_steps).reshape(-1).astype(np.float64)
        gaps = [
            own[preferences.rows(p.chosen)].mean() - own[preferences.rows(p.rejected)].mean()
            for p in pairs
        ]
        agree = (np.sign(gaps) + 1) / 2
        summary["reward"] = {
            "accuracy": float(agree.mean()),
            "interval": interval_by_episode(pairs, agree),
        }
    return summary


def interval_by_episode(
    pairs: Sequence[Pair], right: NDArray[Any], *, level: float = 0.95, seed: int = 0
) -> list[float]:
    """A bootstrap interval of an accuracy over pairs that share episodes.

    Pairs of the same episodes are not independent, and a pair held out under several seeds is the
    same pair. So episodes are drawn with replacement, and a pair counts as often as the product of
    the times that its episodes were drawn (the pigeonhole bootstrap, Owen 2007, which errs on the
    wide side).

    Args:
        pairs: one per outcome.
        right: outcomes in 0..1, ``[P]``.
        level: coverage.
        seed: of the draws.

    Returns:
        Lower and upper end; NaN twice where no draw holds a pair.
    """
    episodes = sorted({e for pair in pairs for e in episodes_of(pair)})
    place = {e: i for i, e in enumerate(episodes)}
    member = np.zeros((len(pairs), len(episodes)), bool)
    for row, pair in enumerate(pairs):
        member[row, [place[e] for e in episodes_of(pair)]] = True
    rng = np.random.default_rng(seed)
    count = len(episodes)
    found = []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        weight = np.where(member, times, 1).prod(1)
        if weight.sum():
            found.append(float((weight * right).sum() / weight.sum()))
    if not found:
        return [math.nan, math.nan]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
