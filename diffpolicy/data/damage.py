"""What goes wrong when files are read, as one kind of error."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from zarr.storage import WrapperStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


class StoreDamagedError(ValueError):
    """What was published cannot be read back: a file is missing, cut short or altered."""


class MissingChunkError(Exception):
    """A chunk that is not there; zarr would make up its values."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the chunk {key} is missing")
        self.key = key


class StrictStore(WrapperStore[Any]):
    """Files in which a missing chunk is an error, whatever its type.

    By itself zarr reads it as fill values: a `terminated` that got lost would say False and train.
    """

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value: Buffer | None = await self._store.get(key, prototype, byte_range)
        if value is None and not key.endswith(_METADATA):
            raise MissingChunkError(key)
        return value

    def __str__(self) -> str:
        return str(self._store)


@contextlib.contextmanager
def reading(what: str, where: str) -> Iterator[None]:
    """Say of any error inside that `what`, of the store `where`, is damaged.

    zarr, its codecs, zip files, JSON and the system each raise their own, and none names the file.

    Raises:
        StoreDamagedError: Whatever was raised inside.
    """
    try:
        yield
    except StoreDamagedError:
        raise
    except Exception as error:
        raise StoreDamagedError(
            f"{what} cannot be read ({reason(error)}): copy it again from where the store is whole;"
            f" `diffpolicy data check {where}` names every damaged file and its episodes"
        ) from error


def reason(error: Exception) -> str:
    """What an error says, in a few words."""
    text = str(error) or type(error).__name__
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is no JSON: {text}"
    if isinstance(error, KeyError):
        return f"{text} is missing in it"
    if isinstance(error, MissingChunkError):
        return (
            f"{text}. If its writer leaves out chunks of zeros, as zarr does by default, let it "
            "write them with write_empty_chunks=True"
        )
    return text if len(text) <= 300 else f"{text[:300]}..."
