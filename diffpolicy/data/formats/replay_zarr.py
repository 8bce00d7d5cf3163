"""Diffusion Policy replay buffers: `data/<field>` and `meta/episode_ends` in a zarr group.

Zarr format 2 or 3, a directory or a zip; our own stores have the same layout and are read too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpolicy.data.store import EpisodeStore

if TYPE_CHECKING:
    from pathlib import Path

    from diffpolicy.data.formats import EpisodeSource


def matches(path: Path) -> bool:
    """Whether `path` is a zarr directory or a zip."""
    if path.is_dir():
        return any((path / name).exists() for name in (".zgroup", ".zattrs", "zarr.json"))
    return path.suffix == ".zip"


def open_source(path: Path) -> EpisodeStore:
    """Open it for reading.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a replay buffer.
    """
    return EpisodeStore.open(path)


def default_fields(source: EpisodeSource) -> dict[str, str | list[str]]:
    """`obs`, or else `state`; and `action`."""
    names = [n for n in ("obs", "state") if n in source.fields]
    obs: dict[str, str | list[str]] = {"obs": names[:1]} if names else {}
    return obs | ({"action": "action"} if "action" in source.fields else {})
