"""Rollouts to compare: from the same observation (branches) or from the same start (episodes).

Both are stored as episodes, and pairs of them in a preference file beside the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.policies.rows import usual_batch
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.pool.workers import WorkerPool, Workers
from diffpolicy.rollout.record.families import Branching, Families, Repeats, open_rollouts
from diffpolicy.rollout.record.pairing import check_target, write_pairs
from diffpolicy.rollout.record.tracks import ObservingPolicy, TrackRunner
from diffpolicy.rollout.rows import AllFailedError, distinct, fitting

__all__ = ["Branching", "Repeats", "collect_rollouts"]


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
        with open_rollouts(path, pool.info, policy, settings) as store:
            known = {int(attrs["seed"]) for attrs in store.episode_attrs}
            todo = [seed for seed in numbers if seed not in known]
            with tqdm(total=len(todo), desc="collect", unit="seed", disable=not progress) as bar:
                family = Families(store, policy, settings, todo, bar)
                try:
                    runner.run(family.first_jobs(), family.done)
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
