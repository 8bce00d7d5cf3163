"""What an evaluation found: episodes, their summary, and the file they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpolicy.files import write_json
from diffpolicy.rollout.intervals import mean_interval, wilson_interval
from diffpolicy.rollout.tasks import summarise_tasks


class EpisodeVideo(NamedTuple):
    """Frames ``[F, height, width, 3]`` uint8 of the episode of ``seed``."""

    seed: int
    success: bool | None
    frames: np.ndarray


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode; the defaults are those of one that could not be run, a failure without numbers.

    Attributes:
        seed: of the environment's reset (and of the policy's noise).
        episode_return: sum of the rewards; NaN for an error.
        max_reward: largest reward of a step; NaN for an error.
        length: steps; 0 for an error.
        success: at any step; None if the task has no notion of success; False for an error.
        final_success: at the last step; likewise.
        terminated: Gymnasium's, of the last step.
        truncated: Gymnasium's, of the last step.
        nfe: network evaluations of the whole episode.
        plans: plans made in the whole episode.
        attempts: how often it was tried.
        error: why the last attempt failed; None if it did not.
        failed_attempts: why earlier attempts failed.
        task: the name that the environment gave in ``info["task"]``; None if it gave none.
    """

    seed: int
    episode_return: float = math.nan
    max_reward: float = math.nan
    length: int = 0
    success: bool | None = False
    final_success: bool | None = False
    terminated: bool = False
    truncated: bool = False
    nfe: int = 0
    plans: int = 0
    attempts: int = 1
    error: str | None = None
    failed_attempts: tuple[str, ...] = ()
    task: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the return is called ``return``, what is not known is None."""
        values = asdict(self)
        values = {"seed": values.pop("seed"), "return": values.pop("episode_return"), **values}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpisodeRecord:
        """The record that :meth:`to_dict` made JSON values of.

        Entries that an earlier version did not write have their defaults; those that it does not
        know are left out.
        """
        known = {one.name for one in fields(cls)}
        own = {**values, "episode_return": values.get("return")}
        own["failed_attempts"] = tuple(own.get("failed_attempts") or ())
        numbers = ("episode_return", "max_reward")
        own |= {name: math.nan for name in numbers if own.get(name) is None}
        return cls(**{name: value for name, value in own.items() if name in known})


@dataclass(frozen=True)
class EvalResult:
    """Episodes in the order of the seeds, their summary, and what they were run on.

    Attributes:
        episodes: one per seed.
        summary: see :func:`summarise`.
        env: labels of the environment: id, kwargs, step limit, package versions.
        settings: of the evaluation, and the machine.
        videos: of the first episodes, if asked for.
        notes: what went wrong without spoiling a score (e.g. why there is no video).
    """

    episodes: tuple[EpisodeRecord, ...]
    summary: dict[str, Any]
    env: dict[str, Any]
    settings: dict[str, Any]
    videos: tuple[EpisodeVideo, ...] = ()
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """The summary as flat numbers for a metrics file; what is not known is left out."""
        flat: dict[str, Any] = {}
        ends = {"": "value", "_low": "low", "_high": "high"}
        for name in ("success", "final_success", "max_reward", "return", "length"):
            part = self.summary[name] or {}
            flat |= {name + end: part.get(key) for end, key in ends.items()}
        names = ("n_episodes", "n_errors", "nfe_per_plan", "wall_s")
        flat |= {name: self.summary[name] for name in names}
        if self.summary["ms_per_plan"] is not None:
            flat["ms_per_plan"] = self.summary["ms_per_plan"]["mean"]
        return {name: float(value) for name, value in flat.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, as JSON values."""
        return {
            "summary": self.summary,
            "env": self.env,
            "settings": self.settings,
            "notes": list(self.notes),
            "episodes": [episode.to_dict() for episode in self.episodes],
        }

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read what :meth:`save` wrote, without the frames.

        Args:
            path: the file, a directory that holds ``eval.json``, or a run whose evaluation is in
                ``eval/eval.json``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no evaluation.
        """
        given = Path(path)
        places = [given, given / "eval.json", given / "eval" / "eval.json"]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"no evaluation at {given}: neither a file, nor eval.json or eval/eval.json in it; "
                "`diffpolicy eval RUN` makes one"
            )
        if not _is_evaluation(file):
            raise ValueError(f"{file} is no evaluation; give what `diffpolicy eval` wrote")
        found = json.loads(file.read_bytes())
        return cls(
            episodes=tuple(EpisodeRecord.from_dict(one) for one in found["episodes"]),
            summary=found["summary"],
            env=found["env"],
            settings=found["settings"],
            notes=tuple(found.get("notes", ())),
        )

    def save(self, path: str | Path) -> Path:
        """Write ``eval.json`` (whole or not at all) and return its path.

        Args:
            path: a directory, or a file name that ends in ``.json``. An earlier evaluation there is
                replaced, anything else is not.

        Raises:
            FileExistsError: something else than an evaluation has that name.
        """
        target = Path(path)
        if target.suffix != ".json":
            target = target / "eval.json"
        if target.exists() and not _is_evaluation(target):
            raise FileExistsError(
                f"{target} is no evaluation, so it is not replaced; save elsewhere, or move it away"
            )
        return write_json(target, self.to_dict())


def _is_evaluation(file: Path) -> bool:
    """Whether a file is what :meth:`EvalResult.save` writes."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"summary", "env", "settings", "episodes"} <= set(found)


def summarise(
    records: Sequence[EpisodeRecord],
    *,
    calls: Sequence[tuple[float, int]] = (),
    wall_s: float = math.nan,
    setup_s: float = math.nan,
    task_groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The summary of an evaluation, as JSON values.

    Args:
        records: one per seed.
        calls: seconds and number of plans of every ``act`` that planned; the first is left out of
            the times as warm-up, unless it is the only one.
        wall_s: of all episodes.
        setup_s: of making the environments before.
        task_groups: names of tasks by group, where the environment declares some.

    Returns:
        ``success`` and ``final_success`` (rates over all episodes, Wilson 95 %; None if the task
        never says), ``max_reward`` (Push-T's protocol: mean over episodes of the largest reward),
        ``return`` and ``length`` (means over the episodes without error, Student's t 95 %): each
        with ``value``, ``low``, ``high``, ``n``. ``n_episodes``, ``n_errors``, ``steps``,
        ``plans``, ``nfe_per_plan``; ``ms_per_call`` (one ``act`` that planned, for all rows that
        planned in it), ``ms_per_plan`` (the same per planned row): mean, p50, p95; ``wall_s``,
        ``steps_per_s`` (of that time), ``setup_s``; and ``tasks`` of
        :func:`~diffpolicy.rollout.tasks.summarise_tasks` where episodes told their task.
    """
    tasks = summarise_tasks(records, task_groups or {})
    sound = [record for record in records if record.error is None]
    steps, plans = sum(r.length for r in sound), sum(r.plans for r in sound)
    timed = list(calls[1:] if len(calls) > 1 else calls)
    return {
        "n_episodes": len(records),
        "n_errors": len(records) - len(sound),
        "success": _rate(records, sound, "success"),
        "final_success": _rate(records, sound, "final_success"),
        "max_reward": mean_interval([r.max_reward for r in sound]).to_dict(),
        "return": mean_interval([r.episode_return for r in sound]).to_dict(),
        "length": mean_interval([float(r.length) for r in sound]).to_dict(),
        "steps": steps,
        "plans": plans,
        "nfe_per_plan": sum(r.nfe for r in sound) / plans if plans else None,
        "ms_per_call": _times([1e3 * seconds for seconds, _ in timed]),
        "ms_per_plan": _times([1e3 * seconds / planned for seconds, planned in timed]),
        "wall_s": wall_s if math.isfinite(wall_s) else None,
        "steps_per_s": steps / wall_s if wall_s > 0 else None,
        "setup_s": setup_s if math.isfinite(setup_s) else None,
        **({} if tasks is None else {"tasks": tasks}),
    }


def _rate(
    everyone: Sequence[EpisodeRecord], sound: Sequence[EpisodeRecord], name: str
) -> dict[str, Any] | None:
    if all(getattr(one, name) is None for one in sound):
        return None  # also if there is none: nobody has earned a 0
    return wilson_interval(
        sum(getattr(one, name) is True for one in everyone), len(everyone)
    ).to_dict()


def _times(ms: list[float]) -> dict[str, float] | None:
    if not ms:
        return None
    p50, p95 = np.quantile(ms, [0.5, 0.95])
    return {"mean": float(np.mean(ms)), "p50": float(p50), "p95": float(p95)}
