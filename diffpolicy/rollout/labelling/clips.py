"""Pictures of stored segments: stored frames, or an episode repeated from its seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffpolicy.data.observation import Obs, concat, count, obs_fields, take
from diffpolicy.data.preferences.records import Segment, Span
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec, stored_env_id
from diffpolicy.rollout.pool.slots import EnvSlot
from diffpolicy.rollout.record.steps import difference, read_obs
from diffpolicy.rollout.results import EpisodeVideo
from diffpolicy.rollout.video import GREEN, GREY, RED, beside, framed, images_of, shows, write_mp4
from diffpolicy.settings import check_range


class ClipError(ValueError):
    """A segment that cannot be shown."""


class ClipRenderer:
    """Draws the steps of segments, one frame per step.

    Four ways, the first that applies:

    1. frames in the store: field ``img``, ``[T, height, width, 3]`` or ``[T, 3, height, width]``
       uint8;
    2. the environment of the store (attributes ``env_id``, ``env_kwargs``,
       ``max_episode_steps``), reset to the episode's attribute ``seed`` and fed the stored actions,
       for a branch those of its base episode first. What it shows must be the stored observations,
       number by number, so a picture is never one of another episode;
    3. an environment with a method ``show_observation(obs [O])`` (found by
       ``env.get_wrapper_attr``) that puts it into the state of an observation. A person's recorded
       demonstrations have no seed and need this;
    4. without an environment, the images that were observed, side by side.

    The environment runs in this process. Use the renderer as a context manager, or call
    :meth:`close`.

    Args:
        store: the episodes.
        env: used instead of the store's own environment.
        side: longest side of a frame in pixels.
        before: further steps shown before a segment, as far as the episode has them.
        after: likewise, after it.

    Raises:
        ClipError: the store has neither frames nor images nor an environment.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        store: EpisodeStore,
        *,
        env: EnvSpec | None = None,
        side: int = 256,
        before: int = 0,
        after: int = 0,
    ) -> None:
        check_range("[1, inf)", side=side)
        check_range("[0, inf)", before=before, after=after)
        self.store, self._side, self._margin = store, side, (before, after)
        self._ends, self._lengths = store.episode_ends, store.episode_lengths
        spec = _environment(store) if env is None else env
        self.stored = _pictures(store, ["img"]) or (
            _pictures(store, obs_fields(store)) if spec is None else []
        )
        self._slot = None if spec is None else EnvSlot(spec, side)
        if not self.stored and self._slot is None:
            raise ClipError(
                f"{store.name} cannot be shown: it has neither frames (a field img, "
                "[T, height, width, 3] uint8), nor images among its observations, nor says its "
                "environment (attribute env_id). Give the environment: with a seed per episode its "
                "actions are repeated, else it needs "
                "a method show_observation(obs)"
            )

    def frames(self, segment: Segment) -> np.ndarray:
        """The frames of a segment, ``[F, height, width, 3]`` uint8.

        Frame i shows what was seen before the i-th action.

        Raises:
            ClipError: why it cannot be shown.
        """
        return np.concatenate([self._span(self._wider(span)) for span in segment])

    def close(self) -> None:
        """End the environment; harmless when called twice."""
        if self._slot is not None:
            self._slot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wider(self, span: Span) -> Span:
        before, after = self._margin
        first = max(span.start - before, 0)
        last = min(span.start + span.length + after, int(self._lengths[span.episode]))
        return Span(span.episode, first, last - first)

    def _place(self, episode: int, start: int, stop: int) -> tuple[int, int]:
        """The rows of the store of some steps of an episode."""
        first = int(self._ends[episode] - self._lengths[episode])
        return first + start, first + stop

    def _span(self, span: Span) -> np.ndarray:
        start, stop = span.start, span.start + span.length
        if self.stored:
            rows = self._place(span.episode, start, stop)
            images = {name: self.store.read(name, *rows) for name in self.stored}
            steps = [images_of(take(images, i)) for i in range(count(images))]
            whole = np.stack([beside(None, *pictures) for pictures in steps])
            step = -(-max(whole.shape[1], whole.shape[2] // len(images)) // self._side)
            return np.ascontiguousarray(whole[:, ::step, ::step])
        assert self._slot is not None
        try:
            if "seed" in self.store.episode_attrs[span.episode]:
                return np.stack(self._replayed(self._slot, span))
            known = read_obs(self.store, *self._place(span.episode, start, stop))
            return np.stack(self._shown(self._slot, known))
        except Exception:
            self.close()  # the next span is drawn by a new environment
            raise

    def _replayed(self, slot: EnvSlot, span: Span) -> list[np.ndarray]:
        attrs = self.store.episode_attrs[span.episode]
        first, stop = span.start, span.start + span.length
        parts = [(span.episode, 0, stop)]
        if attrs.get("kind") == "branch":
            # Its rows begin some steps before the branch point; the base episode has all of them.
            skipped = attrs["step"] - attrs["start"]
            parts.insert(0, (attrs["base"], 0, skipped))
            first += skipped
        obs = concat([read_obs(self.store, *self._place(*part)) for part in parts])
        actions = np.concatenate([self.store.read("action", *self._place(*part)) for part in parts])
        pictures: list[np.ndarray] = []
        outcome = slot.reset(attrs["seed"], frame=first == 0)
        for step in range(len(actions)):
            if difference(take(obs, step), outcome.obs):
                raise ClipError(
                    f"episode {span.episode} cannot be shown: from its seed and with its actions "
                    f"the environment came to another observation at step {step} than the store "
                    "has. The stored actions are not those executed (collected with noise?), the "
                    "environment does not repeat itself, or its version changed"
                )
            if step >= first:
                pictures.append(_picture(outcome.frame, outcome.note))
            if step + 1 < len(actions):
                outcome = slot.step(actions[step], frame=step + 1 >= first)
        return pictures

    def _shown(self, slot: EnvSlot, observations: Obs) -> list[np.ndarray]:
        slot.reset(0)
        if not slot.env.has_wrapper_attr("show_observation"):
            raise ClipError(
                f"the episodes of {self.store.name} have no seed, so they cannot be repeated, and "
                "the environment has no method show_observation(obs), so it cannot be put into "
                "their states. Store frames (a field img), or give an environment with that method"
            )
        show = slot.env.get_wrapper_attr("show_observation")
        pictures = []
        for step in range(count(observations)):
            show(take(observations, step))
            pictures.append(_picture(*slot.render()))
        return pictures


def _picture(frame: np.ndarray | None, note: str) -> np.ndarray:
    if frame is None:
        raise ClipError(f"the environment draws no picture: {note}")
    return frame


def _environment(store: EpisodeStore) -> EnvSpec | None:
    name = store.attrs.get("env_id")
    if name is None:
        return None
    stored_env_id(name, store.name, instead="env=")
    kwargs: dict[str, Any] = store.attrs.get("env_kwargs", {})
    return EnvSpec(name, kwargs, store.attrs.get("max_episode_steps"))


def _pictures(store: EpisodeStore, names: Sequence[str]) -> list[str]:
    """Those of some fields that the store has as images."""
    specs = {name: store.fields[name] for name in names if name in store.fields}
    return [name for name, spec in specs.items() if shows(spec.shape, spec.dtype)]


def side_by_side(
    left: np.ndarray, right: np.ndarray, *, better: str | None = None, border: int = 4
) -> np.ndarray:
    """Two clips beside each other; the shorter one holds its last frame.

    Args:
        left: ``[F, height, width, 3]`` uint8.
        right: likewise, of the same size but any length.
        better: ``"left"`` or ``"right"`` gets a green frame and the other a red one; None: both
            grey.
        border: width of the frames in pixels.

    Returns:
        ``[max(F), height + 2 border, 2 (width + 2 border), 3]`` uint8; odd sides are one longer.

    Raises:
        ValueError: sizes that differ.
    """
    if left.shape[1:] != right.shape[1:]:
        raise ValueError(f"the clips differ in size: {left.shape[1:]} and {right.shape[1:]}")
    count = max(len(left), len(right))
    halves = []
    for name, clip in (("left", left), ("right", right)):
        held = np.pad(clip, [(0, count - len(clip)), (0, 0), (0, 0), (0, 0)], mode="edge")
        colour = GREY if better is None else GREEN if better == name else RED
        halves.append(framed(held, colour, border))
    return np.concatenate(halves, axis=2)


def pair_video(
    renderer: ClipRenderer, left: Segment, right: Segment, better: str | None
) -> EpisodeVideo:
    """The two clips of a pair as a film, see :func:`side_by_side`.

    It bears the seed of the left episode, or its index where it has none.
    """
    frames = side_by_side(renderer.frames(left), renderer.frames(right), better=better)
    episode = left[0].episode
    seed = renderer.store.episode_attrs[episode].get("seed", episode)
    return EpisodeVideo(int(seed), None, frames)


def write_pair(path: str | Path, video: EpisodeVideo, *, fps: int = 10) -> Path:
    """Write the film of a pair; its last frame stays for a second.

    Raises:
        ImportError: imageio or its ffmpeg is missing (with the pip command).
    """
    held = np.pad(video.frames, [(0, fps), (0, 0), (0, 0), (0, 0)], mode="edge")
    return write_mp4(path, [video._replace(frames=held)], fps=fps)


def choose_pairs(total: int, count: int, chosen: Sequence[int] | None = None) -> list[int]:
    """Which of ``total`` pairs to draw: those chosen, or ``count`` of them, evenly spaced.

    Raises:
        ValueError: a number that is none of them.
    """
    if chosen is not None:
        wrong = [i for i in chosen if not 0 <= i < total]
        if wrong:
            raise ValueError(f"pairs are numbered 0..{total - 1}; got {wrong}")
        return list(chosen)
    return sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()))
