"""What each step of a conversion was told to do: ids of instructions, or vectors of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpolicy.data.formats import EpisodeSource
from diffpolicy.extras import need
from diffpolicy.settings import load_named, near_miss

Encoder = Callable[[list[str]], Any]
"""Makes ``[n, d]`` numbers of n instructions."""

FIELD = "obs.task"
_SENTENCES = "sentence-transformers/"


class Tasks:
    """The column ``obs.task`` of each episode.

    Args:
        source: What is converted.
        name: A field of whole numbers, ids into the source's ``tasks``; or what the source says
            in words of each step, of each episode or of the whole.
        encoder: What makes vectors of instructions, each of which it is given once: a function,
            ``"package:function"``, or ``"sentence-transformers/NAME"``; None: ids are kept.

    Attributes:
        texts: The instructions in the order of their ids.

    Raises:
        ValueError: The source says nothing of that name, or not what numbers stand for that are to
            be encoded.
    """

    def __init__(self, source: EpisodeSource, name: str, encoder: str | Encoder | None) -> None:
        self._source, self._encode = source, _loaded(encoder)
        self.name, self.by_id = name, name in source.fields
        self.texts = list(source.tasks) if self.by_id else []
        self._vectors: list[NDArray[np.float32]] = []
        if not self.by_id and source.texts(0, name) is None:
            known = [*source.fields, *source.attrs, *source.episode_attrs[0], *source.unread]
            hint = near_miss(name, known, listing="there are")
            raise ValueError(f"task={name}: {source.name} has nothing of that name{hint}")
        spec = source.fields.get(name)
        if spec is not None and (spec.size != 1 or not spec.dtype.startswith(("int", "uint"))):
            raise ValueError(
                f"task={name} must be one whole number from 0 a step; got {list(spec.shape)} "
                f"{spec.dtype} in {source.name}"
            )
        if encoder and self.by_id and not self.texts:
            raise ValueError(
                f"task={name} holds numbers in {source.name}, which does not say what they stand "
                "for: there is nothing to encode; leave task_encoder out"
            )

    def column(
        self, index: int, raw: dict[str, NDArray[Any]], steps: int
    ) -> tuple[NDArray[Any], list[str]]:
        """Return ids ``[T, 1]`` int64, or vectors ``[T, d]`` float32, of one episode; and texts.

        Args:
            index: Which episode.
            raw: Its fields, among them the one with ids, if there is one.
            steps: T.

        Raises:
            ValueError: The episode does not say, or the encoder answers something else.
        """
        ids = self._listed(raw[self.name]) if self.by_id else self._told(index, steps)
        texts = [self.texts[i] for i in np.unique(ids)]
        return (ids[:, None] if self._encode is None else self._encoded(ids)), texts

    def _listed(self, values: NDArray[Any]) -> NDArray[np.int64]:
        if values.min() < 0:
            raise ValueError(f"task={self.name} must count from 0; the least is {values.min()}")
        self.texts += map(str, range(len(self.texts), int(values.max()) + 1))
        return values.reshape(-1).astype(np.int64)

    def _told(self, index: int, steps: int) -> NDArray[np.int64]:
        said = self._source.texts(index, self.name)
        if said is None:
            raise ValueError(f"it does not say what task={self.name} is")
        texts = [str(text) for text in (said if isinstance(said, list) else [said] * steps)]
        if len(texts) == 1:
            texts *= steps
        if len(texts) != steps:
            raise ValueError(f"task={self.name} has {len(texts)} instructions for {steps} steps")
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return np.array([self.texts.index(text) for text in texts], np.int64)

    def _encoded(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        assert self._encode is not None
        if new := self.texts[len(self._vectors) :]:
            made = np.asarray(self._encode(new), np.float32)
            if made.ndim != 2 or len(made) != len(new) or not np.isfinite(made).all():
                raise ValueError(
                    f"the task encoder must make finite numbers [{len(new)}, d] of {len(new)} "
                    f"instructions; it made {list(made.shape)}"
                )
            self._vectors += list(made)
        return np.stack([self._vectors[i] for i in ids])


def _loaded(encoder: str | Encoder | None) -> Encoder | None:
    """The encoder that is meant."""
    if not isinstance(encoder, str):
        return encoder
    if encoder.startswith(_SENTENCES):
        encode: Encoder = need("sentence_transformers").SentenceTransformer(encoder).encode
        return encode
    found: Encoder = load_named("task_encoder", encoder)
    return found


def counts_tasks(store: Any) -> bool:
    """Whether a store's ``obs.task`` are ids."""
    return FIELD in store.fields and store.fields[FIELD].dtype.startswith("int")


def told(known: Mapping[str, Any]) -> list[str]:
    """The instructions in the attributes of an episode: ``tasks``, or the one ``task``."""
    return [str(text) for text in known.get("tasks") or [known[k] for k in ("task",) if k in known]]


def instructions(store: Any) -> list[str]:
    """The instructions of a store by their ids; one at least, if need be without words."""
    known = store.attrs.get("tasks")
    texts = [str(text) for text in known] if isinstance(known, list) else []
    if counts_tasks(store):
        ids = range(len(texts), int(np.max(store.statistics[FIELD]["max"])) + 1)
        named = _named_ids(store) if ids else {}
        return texts + [named.get(i, str(i)) for i in ids]
    of_episodes = {text for known in store.episode_attrs for text in told(known)}
    return texts + sorted(of_episodes - set(texts)) or [str(store.attrs.get("task", ""))]


def _named_ids(store: Any) -> dict[int, str]:
    """What ids are called, as far as all episodes that begin with one were told the same."""
    said: dict[int, set[str]] = {}
    for start, known in zip([0, *store.episode_ends], store.episode_attrs, strict=False):
        said.setdefault(int(store.read(FIELD, start, start + 1)[0, 0]), set()).update(told(known))
    return {i: texts.pop() for i, texts in said.items() if len(texts) == 1}
