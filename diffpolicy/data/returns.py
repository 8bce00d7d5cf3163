"""Discounted returns of stored episodes, and stores with further fields that are computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.store import EpisodeStore
from diffpolicy.settings import check_range


def returns_to_go(store: EpisodeStore, discount: float) -> NDArray[np.float32]:
    """Return ``sum_k discount^k r_{t+k}`` to the end of each step's episode, float32 ``[T]``.

    An episode that a time limit ended counts up to there, as in Diffuser and Decision Diffuser.

    Args:
        store: Episodes with a field ``reward``.
        discount: In (0, 1].

    Raises:
        ValueError: A discount out of range, or no field ``reward``.
    """
    check_range("(0, 1]", discount=discount)
    check_has(store.name, ["reward"], store.fields, ", and returns need rewards")
    reward = store.read("reward", 0, store.num_steps).astype(np.float64).reshape(-1)
    out = np.empty(len(reward), np.float32)
    last = set((store.episode_ends - 1).tolist())
    total = 0.0
    for step in reversed(range(len(reward))):
        total = reward[step] + discount * (0.0 if step in last else total)
        out[step] = total
    return out


def with_fields(store: EpisodeStore, arrays: Mapping[str, NDArray[Any]]) -> EpisodeStore:
    """Return the store, for reading, with further fields ``[T, *shape]`` that are held in memory.

    Raises:
        ValueError: An array of another length than the store, or a name that it has.
    """
    for name, array in arrays.items():
        if len(array) != store.num_steps or name in store.fields:
            got = f"got {len(array)} rows beside the fields {sorted(store.fields)}"
            raise ValueError(f"{name!r} needs {store.num_steps} rows and a new name; {got}")
    return cast("EpisodeStore", _Derived(store, arrays))


class _Derived:
    """Reads like a store; what is not computed is the store's own."""

    def __init__(self, store: EpisodeStore, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._store, self._extra = store, dict(arrays)
        self.fields = store.fields | {k: FieldSpec.of(a) for k, a in arrays.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def chunk_rows(self, field: str) -> int:
        return self._store.chunk_rows("action" if field in self._extra else field)

    def read(self, field: str, start: int, stop: int) -> NDArray[Any]:
        if field in self._extra:
            return self._extra[field][start:stop]
        return self._store.read(field, start, stop)
