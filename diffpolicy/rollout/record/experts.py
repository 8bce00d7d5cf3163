"""Demonstrations of an environment's own scripted expert, into an episode store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

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
    numbers = distinct(seeds)
    check_range("[0, inf)", noise=noise)
    check_choice("keep", keep, ("success", "all"))
    path, asked = Path(store_path), Workers() if workers is None else workers
    processes = asked.count(min(asked.num_envs, len(numbers)))
    few = fitting(asked, len(numbers), plan_batch=max(processes, 1))
    if not only_here(spec):
        few = replace(few, num_workers=processes)
    with WorkerPool(spec, few) as pool:
        if not pool.info.has_expert:
            raise ValueError(
                f"{spec.id!r} ships no scripted expert. It needs a method expert_action(rng: "
                "numpy.random.Generator) -> action [A], the clean action in the current state, "
                "that env.get_wrapper_attr finds; expert_noise_mask [A] is optional."
            )
        settings = {"expert_noise": noise, "keep": keep}
        with (
            open_record(path, pool.info, settings) as store,
            tqdm(desc="collect", unit="episode", disable=not progress) as bar,
        ):
            report = _Report(store, numbers, keep, bar)
            try:
                jobs = [Job(seed, seed, key=(seed,)) for seed in report.todo]
                _Experts(pool, noise).run(jobs, report.add, report.order)
            finally:
                store.update_attrs({"collection": report.summary()})
    if report.kept == 0:
        why = next(iter(report.failed.values()))
        raise AllFailedError(f"none of the {len(numbers)} episodes was kept; the first: {why}")
    return EpisodeStore.open(path)


class _Experts(TrackRunner):
    """Episodes in which the environments' own experts act."""

    def __init__(self, pool: WorkerPool, noise: float) -> None:
        super().__init__(None, pool)
        self.noise = noise

    def step(self, rows: list[int]) -> dict[int, Outcome | Failure]:
        return self.pool.expert_step(self.noise, rows)


class _Report:
    """What is in the store, and what was tried in vain."""

    def __init__(self, store: EpisodeStore, seeds: list[int], keep: Keep, bar: Any) -> None:
        self._store, self._keep, self._bar = store, keep, bar
        before: dict[str, Any] = store.attrs.get("collection", {})
        stored = {int(attrs["seed"]) for attrs in store.episode_attrs}
        self.failed: dict[int, str] = {
            int(seed): why
            for seed, why in before.get("failed", {}).items()
            # What broke may work now; what the expert could not do it still cannot.
            if why == _NO_SUCCESS
        }
        known = stored | set(self.failed)
        self.todo = [seed for seed in seeds if seed not in known]
        self.kept = len(stored & set(seeds))
        self.order = InOrder(self.todo)
        bar.reset(len(self.todo))

    def add(self, job: Job, result: Track | str) -> list[Job]:
        """Keep a result, and store those that are next in the order of the seeds."""
        for seed, known in self.order.add(job.seed, result):
            self._store_one(seed, known)
            self._bar.update()
            self._bar.set_postfix(kept=self.kept, refresh=False)
        return []

    def _store_one(self, seed: int, result: Track | str) -> None:
        if isinstance(result, str):
            self.failed[seed] = result
            return
        if self._keep == "success":
            if result.success is None:
                raise ValueError(
                    "the environment does not say whether an episode succeeded "
                    "(info['is_success']); use keep='all'"
                )
            if not result.success:
                self.failed[seed] = _NO_SUCCESS
                return
        self._store.append(
            {name: result.columns[name] for name in self._store.fields},
            seed=seed,
            success=result.success,
            final_success=result.final_success,
            **{"return": result.total},
            **({} if result.task is None else {"task": result.task}),
        )
        self.kept += 1

    def summary(self) -> dict[str, Any]:
        return {
            "tried": self._store.num_episodes + len(self.failed),
            "kept": self._store.num_episodes,
            "failed": {str(seed): why for seed, why in sorted(self.failed.items())},
        }
