"""Rollouts to compare: from the same observation (branches) or from the same start (episodes).

Both are stored as episodes, and pairs of them in a preference file beside the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.policies.rows import usual_batch
from diffpolicy.rollout.env_spec import EnvInfo, EnvSpec
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.record.pairing import Scoring, check_target, write_pairs
from diffpolicy.rollout.record.steps import InOrder, open_record
from diffpolicy.rollout.record.tracks import Job, ObservingPolicy, Track, TrackRunner
from diffpolicy.rollout.rows import AllFailedError, distinct, fitting
from diffpolicy.settings import check_range

# Third words of the seeds of a policy's random streams, and of the branch points.
_BASE, _BRANCH, _COMMON, _POINTS = 1, 2, 3, 4


@dataclass(frozen=True)
class Branching:
    """How rollouts branch off the episodes of a policy.

    Args:
        points: branch points per episode: one at random in each of so many equal parts of it.
        every: instead of ``points``: branch at steps 0, every, 2 every, ...
        branches: at each point.
        lookahead: steps of a branch (fewer where the episode ends).
        common_noise: whether the branches of a point share the policy's noise after their first
            plan (common random numbers), so that they differ because of that plan alone.
        seed: of all the policy's noise and of the branch points; the environment's seeds are
            given beside it.
        scoring: which branch is better.

    Raises:
        ValueError: a number out of range.
    """

    points: int = 4
    every: int | None = None
    branches: int = 6
    lookahead: int = 40
    common_noise: bool = True
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        check_range("[1, inf)", points=self.points, lookahead=self.lookahead, every=self.every)
        check_range("[2, inf)", branches=self.branches)
        check_range("[0, inf)", seed=self.seed)

    def collected(self) -> dict[str, Any]:
        """What decides the rollouts, as JSON values; the scoring does not."""
        values = asdict(self)
        del values["scoring"]
        return {**values, "points": None if self.every else self.points}

    def steps(self, seed: int, length: int, n_action_steps: int) -> list[int]:
        """The branch points of the episode of ``seed``, ascending.

        No point is so late that the episode had no whole chunk left; an episode that is shorter
        than a chunk has the point 0.
        """
        last = max(length - n_action_steps, 0)
        if self.every is not None:
            return list(range(0, last + 1, self.every))
        rng = np.random.default_rng([self.seed, seed, _POINTS])
        edges = np.linspace(0, last + 1, self.points + 1)
        return sorted({int(rng.uniform(low, high)) for low, high in pairwise(edges)})


@dataclass(frozen=True)
class Repeats:
    """Several episodes of each environment seed, with other noise of the policy.

    Args:
        episodes: of each seed.
        seed: of the policy's noise.
        scoring: which episode is better.

    Raises:
        ValueError: a number out of range.
    """

    episodes: int = 4
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        check_range("[2, inf)", episodes=self.episodes)
        check_range("[0, inf)", seed=self.seed)

    def collected(self) -> dict[str, Any]:
        """What decides the rollouts, as JSON values; the scoring does not."""
        return {"episodes": self.episodes, "seed": self.seed}


def collect_rollouts(
    policy: ObservingPolicy,
    spec: EnvSpec,
    seeds: Sequence[int],
    *,
    store_path: str | Path,
    prefs_path: str | Path | None,
    settings: Branching | Repeats,
    workers: Workers | None = None,
    progress: bool = True,
) -> PreferenceSet:
    """Rollouts of a policy that can be compared, and pairs of them.

    :class:`Branching`: one base episode per seed is recorded. At each branch point, N rows repeat
    its actions from ``reset(seed)`` (what they see must be the same numbers), then plan anew there,
    each with its own noise, from the observation history that the base episode had, and go on for
    ``lookahead`` steps. Pairs are of chunks from a branch point on.

    :class:`Repeats`: whole episodes of each seed, which differ in the policy's noise. The
    environment need not repeat itself beyond its reset. Pairs are of whole episodes, unless
    ``scoring.span`` says otherwise.

    All rows that act are in one policy call per step. Stored are the base episodes
    (``kind="base"``), the whole ones (``kind="episode"``) and every branch (``kind="branch"``) with
    the To - 1 observations before its branch point; ``start`` says where it begins. Further
    attributes of an episode: ``seed``, ``step`` (the branch point), ``branch``, ``base`` (the index
    of the base episode), ``policy_seed``, ``return``, ``max_reward``, ``success``,
    ``says_success``. Fields: those of :func:`~diffpolicy.rollout.record.experts.collect`, and
    ``success`` per step.

    A run that was killed goes on where it stopped when it is called again: seeds that are in the
    store are skipped. The store's attribute ``rollouts`` says what failed. The preference file is
    written last, of everything in the store, and replaced by the next call.

    Args:
        policy: makes chunks and can look on (every :class:`DiffusionPolicy`).
        spec: the environment; for branches one that repeats itself, given its seed and actions.
        seeds: of the environment, no two alike. They should be those of no evaluation.
        store_path: the episode store; made if it does not exist.
        prefs_path: the preference file; None: rollouts are not compared.
        settings: which rollouts, and how they are scored.
        workers: environments (rows of a policy call; 50 to 100 use a network well), processes,
            retries.
        progress: whether to show a bar.

    Returns:
        The pairs. Without ``prefs_path`` an empty set, whose store holds the rollouts.

    Raises:
        ReplayError: the environment does not repeat itself.
        AllFailedError: every rollout failed.
        EnvSpecError: the environment cannot be made.
        FileExistsError: the preference file was made by somebody else.
        ValueError: seeds that repeat, a store made with other settings, no pair at all.

    Example:
        >>> collect_rollouts(policy, EnvSpec("diffpolicy_envs:diffpolicy/PushT-v0"), range(50),
        ...     store_path="r.zarr", prefs_path="r.jsonl", settings=Branching(lookahead=40))
    """
    numbers = distinct(seeds)
    if prefs_path is not None:
        check_target(prefs_path)
    path = Path(store_path)
    per_seed = settings.episodes if isinstance(settings, Repeats) else settings.branches
    with WorkerPool(spec, fitting(workers, len(numbers) * per_seed, usual_batch(policy))) as pool:
        runner = TrackRunner(policy, pool)
        with (
            _open_rollouts(path, pool.info, policy, settings) as store,
            tqdm(desc="collect", unit="seed", disable=not progress) as bar,
        ):
            family = _Families(store, policy, settings, numbers, bar)
            try:
                runner.run(family.first_jobs(), family.done, family.order)
            finally:
                family.write_report(runner.steps)
            failed = list(family.failed.values())
            if failed and not store.num_episodes:
                raise AllFailedError(
                    f"all {len(failed)} rollouts failed, so nothing was collected; the first: "
                    f"{failed[0]}"
                )
    rollouts = EpisodeStore.open(path)
    if prefs_path is None:
        return PreferenceSet(rollouts)
    return write_pairs(rollouts, prefs_path, settings.scoring)


def _stream(*words: int) -> int:
    """A random stream of a policy, as a pure function of some numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


class _Families:
    """All rollouts of a seed, appended together and in the order of the seeds."""

    def __init__(
        self,
        store: EpisodeStore,
        policy: ObservingPolicy,
        settings: Branching | Repeats,
        seeds: list[int],
        bar: Any,
    ) -> None:
        self._store, self._settings, self._bar = store, settings, bar
        self._history = policy.n_obs_steps - 1
        self._chunk = policy.n_action_steps
        self._missing: dict[int, int] = {}  # per seed, jobs that are not done
        self._tracks: dict[int, dict[tuple[int, ...], tuple[Job, Track]]] = {}
        # Failures of seeds that are not in the store are tried again.
        stored = {int(attrs["seed"]) for attrs in store.episode_attrs}
        before: dict[str, str] = store.attrs["rollouts"]["failed"]
        self.failed = {k: why for k, why in before.items() if int(k.split("/")[0]) in stored}
        self._seeds = [seed for seed in seeds if seed not in stored]
        self.order = InOrder(self._seeds)
        bar.reset(len(self._seeds))

    def first_jobs(self) -> Iterator[Job]:
        """The base episode of each seed, or all its episodes."""
        count = self._settings.episodes if isinstance(self._settings, Repeats) else 1
        for seed in self._seeds:
            self._missing[seed], self._tracks[seed] = count, {}
            for k in range(count):
                stream = _stream(self._settings.seed, seed, _BASE, k)
                yield Job(seed, stream, key=(seed, -1, k))

    def done(self, job: Job, result: Track | str) -> list[Job]:
        """Keep a track; what follows from a base episode are its branches."""
        further: list[Job] = []
        if isinstance(result, str):
            self.failed["/".join(map(str, job.key))] = result
        else:
            self._tracks[job.seed][job.key] = (job, result)
            if isinstance(self._settings, Branching) and job.prefix is None:
                further = self._branches(self._settings, job.seed, result)
        self._missing[job.seed] += len(further) - 1
        if not self._missing[job.seed]:
            for _, tracks in self.order.add(job.seed, self._tracks.pop(job.seed)):
                self._append(tracks)
                self._bar.update()
        return further

    def _branches(self, settings: Branching, seed: int, base: Track) -> list[Job]:
        jobs = []
        for step in settings.steps(seed, len(base), self._chunk):
            common = _stream(settings.seed, seed, _COMMON, step)
            jobs += [
                Job(
                    key=(seed, step, branch),
                    seed=seed,
                    policy_seed=_stream(settings.seed, seed, _BRANCH, step, branch),
                    later_seed=common if settings.common_noise else None,
                    prefix=base,
                    replayed=step,
                    limit=settings.lookahead,
                )
                for branch in range(settings.branches)
            ]
        return jobs[::-1]  # the longest first, so that rows run dry together

    def _append(self, tracks: dict[tuple[int, ...], tuple[Job, Track]]) -> None:
        if not tracks:
            return
        parts: list[dict[str, np.ndarray]] = []
        lines, lengths, index = [], [], self._store.num_episodes
        for _, (job, track) in sorted(tracks.items()):
            start = min(self._history, job.replayed)
            if job.prefix is not None:  # what the policy saw before its first plan comes along
                seen = slice(job.replayed - start, job.replayed)
                parts.append({k: column[seen] for k, column in job.prefix.columns.items()})
            parts.append(track.columns)
            lengths.append(start + len(track))
            lines.append(_attributes(self._settings, job, track, start, index))
        arrays = {
            name: np.concatenate([part[name] for part in parts]) for name in self._store.fields
        }
        self._store.extend(arrays, np.cumsum(lengths), lines)

    def write_report(self, steps: int) -> None:
        """What failed, and the steps of the environments that this call took."""
        made = self._store.attrs["rollouts"]
        report = {"failed": self.failed, "env_steps": made["env_steps"] + steps}
        self._store.update_attrs({"rollouts": {**made, **report}})


def _attributes(
    settings: Branching | Repeats, job: Job, track: Track, start: int, base: int
) -> dict[str, Any]:
    _, step, branch = job.key
    kind = "episode" if isinstance(settings, Repeats) else "base" if step < 0 else "branch"
    return {
        "seed": job.seed,
        "kind": kind,
        "start": start,
        **({"step": step, "base": base} if kind == "branch" else {}),
        **({} if kind == "base" else {"branch": branch}),
        "policy_seed": job.policy_seed,
        "return": track.total,
        "max_reward": float(track.columns["reward"].max()),
        "success": track.success,
        "says_success": track.success is not None,
    }


def _open_rollouts(
    path: Path, info: EnvInfo, policy: ObservingPolicy, settings: Branching | Repeats
) -> EpisodeStore:
    """The store of rollouts at ``path``, made or opened to go on.

    Raises:
        ValueError: it was made with another environment, policy or other settings.
    """
    made = {
        "kind": "branches" if isinstance(settings, Branching) else "episodes",
        "settings": settings.collected(),
        "n_obs_steps": policy.n_obs_steps,
        "n_action_steps": policy.n_action_steps,
        "sampler": None,
        "policy": _fingerprint(policy),
    }
    spec = getattr(policy, "spec", None)
    if spec is not None:
        made["sampler"] = json.loads(json.dumps(spec.to_config()["sampler"]))
    return open_record(path, info, made, rollouts=True)


def _fingerprint(policy: ObservingPolicy) -> str | None:
    """A digest of all that the policy acts by: rollouts of two policies must not be mixed."""
    if getattr(policy, "denoiser", None) is None:
        return None
    digest = hashlib.sha256()
    spec = getattr(policy, "spec", None)
    if spec is not None:  # a sampler, warm starts, a choice among plans, ...
        digest.update(json.dumps(spec.to_config(), sort_keys=True).encode())
    for part in ("denoiser", "heads", "normalizer", "anchors"):
        held = getattr(policy, part, None)
        if held is None:
            continue
        tensors = held.state_dict() if hasattr(held, "state_dict") else held.to_tensors()
        for name, value in tensors.items():
            digest.update(f"{part}.{name}".encode())
            digest.update(value.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
