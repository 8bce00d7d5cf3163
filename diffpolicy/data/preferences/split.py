"""Which episodes are held out together when preferences are split into folds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from diffpolicy.data.preferences.records import Record, episode_values, episodes_of
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_range


def split_records(
    store: EpisodeStore, records: Sequence[Record], folds: int, seed: int, group: str | None
) -> list[tuple[list[Record], list[Record]]]:
    """Split records, fold by fold, into those to train on and those held out.

    Raises:
        ValueError: As for ``split_by_episode``.
    """
    fold_of = deal_episodes(store, records, folds, seed, group)
    folds_of = [{fold_of[e] for e in episodes_of(r)} for r in records]
    made = []
    for fold in range(folds):
        train = [r for r, of in zip(records, folds_of, strict=True) if fold not in of]
        held_out = [r for r, of in zip(records, folds_of, strict=True) if of == {fold}]
        if not train or not held_out:
            has = f"{len(train)} records to train on and {len(held_out)} to hold out"
            raise ValueError(f"fold {fold} of {folds} has {has}; use fewer folds, or more records")
        made.append((train, held_out))
    return made


def deal_episodes(
    store: EpisodeStore, records: Sequence[Record], folds: int, seed: int, group: str | None
) -> dict[int, int]:
    """Choose the fold in which each episode is held out.

    Episodes that were compared stay together as long as that makes no unit larger than a fold;
    larger ones fall apart into episodes, or into groups of one attribute. The units are dealt in
    random order, each to the fold that has the fewest records so far.

    Args:
        store: The episodes.
        records: What is split.
        folds: At least 2.
        seed: Of the order.
        group: An episode attribute whose equal values stay together; None: no such.

    Returns:
        Episode -> fold, of the episodes in the records.

    Raises:
        ValueError: Fewer than 2 folds or fewer units than folds, or no such attribute.
    """
    used = sorted({e for r in records for e in episodes_of(r)})
    check_range("[2, inf)", folds=folds)
    atoms = _joined(used, _same_attribute(store, used, group) if group is not None else [])
    compared = _joined(used, [*atoms, *(sorted(episodes_of(r)) for r in records)])
    limit = len(used) / folds
    whole = {e for unit in compared if len(unit) <= limit for e in unit}
    units = [u for u in compared if len(u) <= limit] + [a for a in atoms if a[0] not in whole]
    if len(units) < folds:
        those = f"{len(used)} episodes, {len(units)} of them independent"
        raise ValueError(f"the records are of {those}; {folds} folds need as many")
    weight = Counter(episode for record in records for episode in episodes_of(record))
    load = [0] * folds
    fold_of: dict[int, int] = {}
    for place in np.random.default_rng(seed).permutation(len(units)).tolist():
        fold = load.index(min(load))
        load[fold] += sum(weight[e] for e in units[place])
        fold_of |= dict.fromkeys(units[place], fold)
    return fold_of


def _same_attribute(store: EpisodeStore, used: Sequence[int], name: str) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for episode, value in zip(used, episode_values(store, name, used), strict=True):
        groups.setdefault(json.dumps(value, sort_keys=True), []).append(episode)
    return list(groups.values())


def _joined(members: Sequence[int], links: Iterable[Sequence[int]]) -> list[list[int]]:
    """The connected components of ``members``, each ascending, where every link joins its own."""
    place = {member: i for i, member in enumerate(members)}
    edges = [(place[link[0]], place[other]) for link in links for other in link[1:]]
    rows, columns = np.array(edges, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(place), len(place)))
    _, component = connected_components(graph, directed=False)
    parts: dict[int, list[int]] = {}
    for member, number in zip(members, component.tolist(), strict=True):
        parts.setdefault(number, []).append(member)
    return list(parts.values())
