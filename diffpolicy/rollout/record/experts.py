"""Demonstrations of an environment's own scripted expert, into an episode store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout.env_spec import EnvSpec, only_here
from diffpolicy.rollout.pool.slots import Failure, Outcome
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.record.steps import InOrder, open_record
from diffpolicy.rollout.record.tracks import Job, Track, TrackRunner
from diffpolicy.rollout.rows import AllFailedError, distinct, fitting
from diffpolicy.settings import check_choice, check_range

Keep = Literal["success", "all"]
_NO_SUCCESS = "no success"
_CHANCE = ("timed", "died", "lost", "gone")  # kinds of failures that say nothing of the expert


def collect(
    spec: EnvSpec,
    seeds: Sequence[int],
    store_path: str | Path,
    *,
    workers: Workers | None = None,
    noise: float = 0.0,
    keep: Keep = "success",
    progress: bool = True,
) -> EpisodeStore:
    """Run the environment's scripted expert once per seed and store the episodes.

    The expert runs inside the worker processes. Episodes are appended one by one in the order of
    the seeds, so the store depends on the seeds alone, and a run that was killed goes on where it
    stopped when it is called again: seeds that are in the store are skipped.

    Executed is ``clip(clean + N(0, noise^2))``, on the dimensions of the environment's
    ``expert_noise_mask`` if it has one; stored is the clean action. Fields: ``obs`` (or
    ``obs.NAME`` of each entry of a ``Dict``), ``action`` (float32), ``reward``, ``terminated``,
    ``truncated``. Attributes of each episode: ``seed``, ``success``, ``final_success``, ``return``,
    and ``task`` where the environment tells one (``info["task"]``). The store's attribute
    ``collection`` says how many episodes were tried and kept and which seeds failed.

    Args:
        spec: an environment that ships an expert: a method ``expert_action(rng) -> action [A]``
            that ``env.get_wrapper_attr`` finds.
        seeds: of the episodes, no two alike (the project's demonstrations use 0..99,999).
        store_path: directory of the store; made if it does not exist.
        workers: environments, processes, timeout and retries.
        noise: standard deviation of the noise, in units of the action; of actions that choose
            (``Discrete``, ``MultiDiscrete``) the probability of a random choice.
        keep: ``"success"`` stores only the episodes that succeeded at some step, ``"all"`` every
            one.
        progress: whether to show a bar with the time left.

    Returns:
        The store, open for reading, with statistics.

    Raises:
        AllFailedError: no episode was kept; says why the first was not.
        EnvSpecError: the environment cannot be made.
        ValueError: the environment has no expert or (with ``keep="success"``) does not say whether
            an episode succeeded; the store was made with other settings.
    """
    return record_experts(
        spec, seeds, store_path, Wanted(noise, keep), workers=workers, progress=progress
    )


@dataclass(frozen=True)
class Wanted:
    """Which episodes of an expert are recorded, and what of them.

    Args:
        noise: as for :func:`collect`.
        keep: likewise.
        fields: entries of ``info["record"]`` that are stored as ``info.NAME`` beside the
            observations.
        enough: how many are kept. Seeds are tried in their order until so many were, and none
            after that is stored; None: all that may be kept.

    Raises:
        ValueError: negative noise, an unknown ``keep``, or no episodes.
    """

    noise: float = 0.0
    keep: Keep = "success"
    fields: tuple[str, ...] = ()
    enough: int | None = None

    def __post_init__(self) -> None:
        check_range("[0, inf)", noise=self.noise)
        check_choice("keep", self.keep, ("success", "all"))
        check_range("[1, inf)", episodes=self.enough)

    def settings(self) -> dict[str, Any]:
        """What decides the episodes, as JSON values."""
        beside = {"record": list(self.fields)} if self.fields else {}
        return {"expert_noise": self.noise, "keep": self.keep, **beside}


def record_experts(
    spec: EnvSpec,
    seeds: Sequence[int],
    store_path: str | Path,
    wanted: Wanted,
    *,
    workers: Workers | None = None,
    progress: bool = True,
) -> EpisodeStore:
    """Record what is wanted of an environment's scripted expert; see :func:`collect`.

    Args:
        spec: an environment that ships an expert.
        seeds: of the episodes, in the order in which they are tried.
        store_path: directory of the store; made if it does not exist.
        wanted: which episodes, and what of them.
        workers: environments, processes, timeout and retries.
        progress: whether to show a bar.

    Returns:
        The store, open for reading, with statistics.

    Raises:
        AllFailedError: no episode was kept, or not enough of them.
        EnvSpecError: the environment cannot be made.
        ValueError: as for :func:`collect`; or an entry that ``info["record"]`` does not have.
    """
    numbers = distinct(seeds)
    path, asked = Path(store_path), Workers() if workers is None else workers
    size = min(len(numbers), wanted.enough or len(numbers))
    processes = asked.count(min(asked.num_envs, size))
    few = fitting(asked, size, plan_batch=max(processes, 1))
    if not only_here(spec):
        few = replace(few, num_workers=processes)
    with WorkerPool(spec, few) as pool:
        if not pool.info.has_expert:
            raise ValueError(
                f"{spec.id!r} ships no scripted expert. It needs a method expert_action(rng: "
                "numpy.random.Generator) -> action [A], the clean action in the current state, "
                "that env.get_wrapper_attr finds; expert_noise_mask [A] is optional."
            )
        beside = _specs(pool, numbers[0], wanted.fields)
        with (
            open_record(path, pool.info, wanted.settings(), beside) as store,
            tqdm(desc="collect", unit="episode", disable=not progress) as bar,
        ):
            if wanted.enough is not None:
                _check_versions(store, pool.info.versions)
            report = _Report(store, numbers, wanted, bar)
            try:
                jobs = (Job(seed, seed, key=(seed,)) for seed in report.todo)
                _Experts(pool, wanted, report).run(jobs, report.add, report.order)
            finally:
                store.update_attrs({"collection": report.summary()})
    if report.kept < (wanted.enough or 1):
        why = next(iter(report.failed.values()))
        kept = f"only {report.kept}" if report.kept else "none"
        raise AllFailedError(f"{kept} of the {len(numbers)} episodes was kept; the first: {why}")
    return EpisodeStore.open(path)


def _specs(pool: WorkerPool, seed: int, fields: Sequence[str]) -> dict[str, FieldSpec]:
    """Fields of a store for entries of ``info["record"]``, as the first reset shows them."""
    if not fields:
        return {}
    outcome = pool.reset([0], [seed])[0]
    if isinstance(outcome, Failure):
        raise ValueError(f"the reset of seed {seed} failed: {outcome}")
    record = outcome.record or {}
    check_has(f"{pool.spec.id!r}: info['record']", fields, record)
    return {f"info.{n}": FieldSpec(record[n].shape, record[n].dtype.name) for n in fields}


def _check_versions(store: EpisodeStore, now: Mapping[str, str]) -> None:
    """Refuse to go on with a set of a given size, which is one value, by other versions."""
    begun = store.attrs["versions"]
    changed = [f"{n} {begun[n]} (now {now[n]})" for n in begun if now.get(n, begun[n]) != begun[n]]
    if changed:
        raise ValueError(
            f"{store.name} was begun with {', '.join(changed)}, which may give other values: "
            "choose another path, or remove it and begin anew"
        )


class _Experts(TrackRunner):
    """Episodes in which the environments' own experts act."""

    def __init__(self, pool: WorkerPool, wanted: Wanted, report: _Report) -> None:
        super().__init__(None, pool)
        self.wanted, self.report = wanted, report

    def upcoming(self) -> Job | None:
        enough = self.wanted.enough
        if enough is not None:
            # Each that runs, or waits for one before it, may be kept: no more are begun.
            hopeful = len(self.running) + len(self.report.order)
            if self.report.kept + (hopeful if self.running else 0) >= enough:
                return None
        return super().upcoming()

    def step(self, rows: list[int]) -> dict[int, Outcome | Failure]:
        return self.pool.expert_step(self.wanted.noise, rows)


class _Report:
    """What is in the store, and what was tried in vain."""

    def __init__(self, store: EpisodeStore, seeds: list[int], wanted: Wanted, bar: Any) -> None:
        self._store, self._wanted, self._bar = store, wanted, bar
        before: dict[str, Any] = store.attrs.get("collection", {})
        stored = {int(attrs["seed"]) for attrs in store.episode_attrs}
        self._last = max(stored, default=-1)
        self.failed: dict[int, str] = {
            int(seed): why
            for seed, why in before.get("failed", {}).items()
            # What broke may work now; what the expert could not do it still cannot. A set of a
            # given size goes on behind what it holds.
            if why == _NO_SUCCESS or wanted.enough is not None
        }
        known = stored | set(self.failed)
        self.todo = [seed for seed in seeds if seed not in known]
        self.kept = len(stored & set(seeds))
        if wanted.enough is not None and self.kept > wanted.enough:
            raise ValueError(
                f"{store.name} holds {self.kept} episodes, more than {wanted.enough}; choose "
                "another path, or take the first of them with `diffpolicy data filter`"
            )
        self.order = InOrder(self.todo)
        bar.reset(len(self.todo) if wanted.enough is None else wanted.enough - self.kept)

    def add(self, job: Job, result: Track | str) -> list[Job]:
        """Keep a result, and store those that are next in the order of the seeds."""
        for seed, known in self.order.add(job.seed, result):
            kept = self.kept
            self._store_one(seed, known)
            self._bar.update(1 if self._wanted.enough is None else self.kept - kept)
            self._bar.set_postfix(kept=self.kept, refresh=False)
        return []

    def _store_one(self, seed: int, result: Track | str) -> None:
        why = result if isinstance(result, str) else self._fault(result)
        if why:
            if self._wanted.enough is not None and why.partition(" ")[0].rstrip(":") in _CHANCE:
                raise ValueError(
                    f"seed {seed} of {self._store.name} {why}. Without it the set would not be the "
                    "same everywhere: run this again, and it goes on from here"
                )
            self.failed[seed] = why
            # Told before what follows is stored, so that a kill cannot make them forgotten.
            self._store.update_attrs({"collection": self.summary()})
            return
        assert isinstance(result, Track)
        if self._wanted.enough is not None and seed < self._last:
            raise ValueError(
                f"the expert fails and succeeds with the same seed ({seed}): the environment does "
                "not repeat itself, and its set cannot be made twice"
            )
        self._store.append(
            {name: result.columns[name] for name in self._store.fields},
            seed=seed,
            success=result.success,
            final_success=result.final_success,
            **{"return": result.total},
            **({} if result.task is None else {"task": result.task}),
        )
        self.kept += 1

    def _fault(self, result: Track) -> str:
        """Why an episode is not kept; empty if it is."""
        if self._wanted.keep == "all" or result.success:
            return ""
        if result.success is None:
            raise ValueError(
                "the environment does not say whether an episode succeeded "
                "(info['is_success']); use keep='all'"
            )
        return _NO_SUCCESS

    def summary(self) -> dict[str, Any]:
        return {
            "tried": self._store.num_episodes + len(self.failed),
            "kept": self._store.num_episodes,
            "failed": {str(seed): why for seed, why in sorted(self.failed.items())},
        }
