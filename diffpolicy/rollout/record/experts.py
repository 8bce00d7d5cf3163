"""Demonstrations of an environment's own scripted expert, into an episode store."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from diffpolicy.data.store import EpisodeStore, FieldSpec
from diffpolicy.rollout.env_spec import EnvInfo, EnvSpec
from diffpolicy.rollout.local import only_here
from diffpolicy.rollout.pool.slots import Demonstration
from diffpolicy.rollout.pool.workers import Failure, WorkerPool, Workers
from diffpolicy.rollout.rows import AllFailedError

Keep = Literal["success", "all"]


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
    """Runs the environment's scripted expert once per seed and stores the episodes.

    The expert runs inside the worker processes, a whole episode at a time. Episodes are appended
    one by one in the order of the seeds, so the store depends on the seeds alone, and a run that
    was killed goes on where it stopped when it is called again: seeds that are in the store are
    skipped.

    Executed is ``clip(clean + N(0, noise^2))``, on the dimensions of the environment's
    ``expert_noise_mask`` if it has one; stored is the clean action. Fields: ``obs`` and ``action``
    (float32), ``reward``, ``terminated``, ``truncated``. Attributes of each episode: ``seed``,
    ``success``, ``final_success``, ``return``. The store's attribute ``collection`` says how many
    episodes were tried and kept and which seeds failed.

    Args:
        spec: an environment that ships an expert: a method ``expert_action(rng) -> action [A]``
            that ``env.get_wrapper_attr`` finds.
        seeds: of the episodes, no two alike (the project's demonstrations use 0..99,999).
        store_path: directory of the store; made if it does not exist.
        workers: processes, timeout and retries; ``num_envs`` is the largest number of processes.
        noise: standard deviation of the noise, in units of the action.
        keep: ``"success"`` stores only the episodes that succeeded at some step, ``"all"`` every
            one.
        progress: whether to show a bar with the time left.

    Returns:
        The store, open for reading, with statistics.

    Raises:
        AllFailedError: every episode failed.
        EnvSpecError: the environment cannot be made.
        WorkerError: no worker process can be started any more; what was finished is stored.
        ValueError: the environment has no expert or (with ``keep="success"``) does not say whether
            an episode succeeded; the store was made with other settings; no episode was kept.
    """
    numbers = [int(seed) for seed in seeds]
    if len(set(numbers)) != len(numbers):
        raise ValueError("seeds must differ: the same seed is the same episode")
    if not noise >= 0:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    if keep not in ("success", "all"):
        raise ValueError(f"keep must be 'success' or 'all', got {keep!r}")
    path = Path(store_path)
    asked = Workers() if workers is None else workers
    # An expert's episode is one long command, so one environment per process is enough.
    processes = max(asked.count(min(asked.num_envs, len(numbers))), 1)
    several = asked.num_workers if only_here(spec) else asked.count(processes)
    single = Workers(**{**asdict(asked), "num_envs": processes, "num_workers": several})
    with WorkerPool(spec, single) as pool:
        if not pool.info.has_expert:
            raise ValueError(
                f"{spec.id!r} ships no scripted expert. It needs a method expert_action(rng: "
                "numpy.random.Generator) -> action [A], the clean action in the current state, "
                "that env.get_wrapper_attr finds; expert_noise_mask [A] is optional."
            )
        with _open_store(path, pool.info, noise, keep) as store:
            report = _Report(store, numbers, keep)
            todo = [seed for seed in numbers if seed not in report.known]
            try:
                with tqdm(
                    total=len(todo), desc="collect", unit="episode", disable=not progress
                ) as bar:
                    for seed, result in _in_order(pool, todo, noise):
                        report.add(seed, result)
                        bar.update()
                        bar.set_postfix(kept=report.kept, refresh=False)
            finally:
                report.write()
    if report.kept == 0:
        errors = [why for why in report.failed.values() if why != _NO_SUCCESS]
        if errors and len(errors) == len(report.failed):
            raise AllFailedError(
                f"all {len(errors)} episodes failed, so nothing was collected; the first: "
                f"{errors[0]}"
            )
        raise ValueError(f"none of the {len(numbers)} episodes was kept: {report.summary()}")
    return EpisodeStore.open(path)


def _in_order(
    pool: WorkerPool, seeds: Sequence[int], noise: float
) -> Iterator[tuple[int, Demonstration | Failure]]:
    """Results in the order of the seeds; what failed was tried again as often as it may be."""
    queue = deque(seeds)
    attempts = dict.fromkeys(seeds, 0)
    finished: dict[int, Demonstration | Failure] = {}
    position = 0

    def drain() -> Iterator[int]:
        while queue:
            yield queue.popleft()

    while queue:
        for seed, result in pool.run_expert(drain(), noise=noise):
            attempts[seed] += 1
            if isinstance(result, Failure) and result.blameless:
                attempts[seed] -= 1
            if isinstance(result, Failure) and attempts[seed] <= pool.workers.retries:
                queue.appendleft(seed)
                continue
            finished[seed] = result
            while position < len(seeds) and seeds[position] in finished:
                yield seeds[position], finished.pop(seeds[position])
                position += 1


class _Report:
    """What is in the store, and what was tried in vain."""

    def __init__(self, store: EpisodeStore, seeds: list[int], keep: Keep) -> None:
        self._store, self._keep = store, keep
        before: dict[str, Any] = store.attrs.get("collection", {})
        stored = {int(attrs["seed"]) for attrs in store.episode_attrs}
        self.failed: dict[int, str] = {
            int(seed): why
            for seed, why in before.get("failed", {}).items()
            # What broke may work now; what the expert could not do it still cannot.
            if why == _NO_SUCCESS
        }
        self.known = stored | set(self.failed)
        self.kept = len(stored & set(seeds))

    def add(self, seed: int, result: Demonstration | Failure) -> None:
        if isinstance(result, Failure):
            self.failed[seed] = str(result)
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
        arrays = {name: getattr(result, name) for name in _FIELDS}
        attrs = {
            "seed": seed,
            "success": result.success,
            "final_success": result.final_success,
            "return": float(np.sum(result.reward, dtype=np.float64)),
        }
        self._store.append(arrays, **attrs)
        self.kept += 1

    def summary(self) -> dict[str, Any]:
        return {
            "tried": self._store.num_episodes + len(self.failed),
            "kept": self._store.num_episodes,
            "failed": {str(seed): why for seed, why in sorted(self.failed.items())},
        }

    def write(self) -> None:
        self._store.update_attrs({"collection": self.summary()})


_NO_SUCCESS = "no success"
_FIELDS = ("obs", "action", "reward", "terminated", "truncated")


def _open_store(path: Path, info: EnvInfo, noise: float, keep: Keep) -> EpisodeStore:
    settings = {
        "env_id": info.spec.id,
        "env_kwargs": dict(info.spec.kwargs),
        "max_episode_steps": info.max_episode_steps,
        "expert_noise": noise,
        "keep": keep,
    }
    if not path.exists():
        fields = {
            "obs": FieldSpec((info.obs_dim,), "float32"),
            "action": FieldSpec((info.action_dim,), "float32"),
            "reward": FieldSpec((), "float32"),
            "terminated": FieldSpec((), "bool"),
            "truncated": FieldSpec((), "bool"),
        }
        return EpisodeStore.create(path, fields, attrs={**settings, "versions": info.versions})
    store = EpisodeStore.open(path, "a")
    found = {name: store.attrs.get(name) for name in settings}
    if found != settings:
        store.close()
        raise ValueError(
            f"{path} was collected with {found}, not with {settings}; choose another path, or the "
            "same settings to go on with it"
        )
    return store
