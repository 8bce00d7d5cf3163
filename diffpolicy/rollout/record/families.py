"""Which rollouts belong together, and the store that they go to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.store import EpisodeStore, FieldSpec
from diffpolicy.rollout.env_spec import EnvInfo
from diffpolicy.rollout.record.branching import Branching, Repeats
from diffpolicy.rollout.record.repeats import Job, ObservingPolicy, Prefix, Track

_BASE, _BRANCH, _COMMON = 1, 2, 3  # third words of the seeds of a policy's random streams


def policy_seed(*words: int) -> int:
    """A random stream of a policy, as a pure function of some numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


class Families:
    """All rollouts of a seed, appended together and in the order of the seeds.

    Args:
        store: where they go.
        policy: whose they are.
        settings: how many there are.
        seeds: of the environment, those that are not in the store.
        bar: of progress, a step per seed.
    """

    def __init__(
        self,
        store: EpisodeStore,
        policy: ObservingPolicy,
        settings: Branching | Repeats,
        seeds: list[int],
        bar: Any,
    ) -> None:
        self._store, self._settings, self._seeds, self._bar = store, settings, seeds, bar
        self._history = policy.n_obs_steps - 1
        self._chunk = policy.n_action_steps
        self._missing: dict[int, int] = {}  # per seed, jobs that are not done
        self._tracks: dict[int, dict[tuple[int, ...], tuple[Job, Track]]] = {}
        # Failures of seeds that are not in the store are tried again.
        stored = {int(attrs["seed"]) for attrs in store.episode_attrs}
        before: dict[str, str] = store.attrs["rollouts"]["failed"]
        self.failed = {k: why for k, why in before.items() if int(k.split("/")[0]) in stored}
        self._position = 0

    def first_jobs(self) -> Iterator[Job]:
        """The base episode of each seed, or all its episodes."""
        count = self._settings.episodes if isinstance(self._settings, Repeats) else 1
        for seed in self._seeds:
            self._missing[seed], self._tracks[seed] = count, {}
            for k in range(count):
                stream = policy_seed(self._settings.seed, seed, _BASE, k)
                yield Job((seed, -1, k), seed, stream)

    def done(self, job: Job, result: Track | str) -> list[Job]:
        """Keeps a track; what follows from a base episode are its branches."""
        further: list[Job] = []
        if isinstance(result, str):
            self.failed["/".join(map(str, job.key))] = result
        else:
            self._tracks[job.seed][job.key] = (job, result)
            if isinstance(self._settings, Branching) and job.prefix is None:
                further = self._branches(self._settings, job.seed, result)
        self._missing[job.seed] += len(further) - 1
        self._append_finished()
        return further

    def _branches(self, settings: Branching, seed: int, base: Track) -> list[Job]:
        jobs = []
        for step in settings.steps(seed, len(base.reward), self._chunk):
            prefix = Prefix(base.obs[: step + 1], base.action[:step], base.reward[:step])
            common = policy_seed(settings.seed, seed, _COMMON, step)
            jobs += [
                Job(
                    key=(seed, step, branch),
                    seed=seed,
                    policy_seed=policy_seed(settings.seed, seed, _BRANCH, step, branch),
                    later_seed=common if settings.common_noise else None,
                    prefix=prefix,
                    limit=settings.lookahead,
                )
                for branch in range(settings.branches)
            ]
        return jobs[::-1]  # the longest first, so that rows run dry together

    def _append_finished(self) -> None:
        while self._position < len(self._seeds):
            seed = self._seeds[self._position]
            if self._missing.get(seed, 1) > 0:
                return
            self._position += 1
            self._append(seed)
            self._bar.update()

    def _append(self, seed: int) -> None:
        tracks = self._tracks.pop(seed)
        if not tracks:
            return
        index = self._store.num_episodes
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _FIELDS}
        lines, lengths = [], []
        base = next((t for job, t in tracks.values() if job.prefix is None), None)
        for _, (job, track) in sorted(tracks.items()):
            step, branch = job.key[1:]
            start = min(self._history, max(step, 0))
            for name in _FIELDS:
                rows = getattr(track, name)
                if start:
                    rows = np.concatenate([getattr(base, name)[step - start : step], rows])
                columns[name].append(rows)
            lengths.append(start + len(track.reward))
            lines.append(_attributes(self._settings, job, track, step, branch, start, index))
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        self._store.extend(arrays, np.cumsum(lengths), lines)

    def write_report(self, steps: int) -> None:
        """What failed, and the steps of the environments that this call took."""
        made = self._store.attrs["rollouts"]
        report = {"failed": self.failed, "env_steps": made["env_steps"] + steps}
        self._store.update_attrs({"rollouts": {**made, **report}})


_FIELDS = ("obs", "action", "reward", "terminated", "truncated", "success")


def _attributes(
    settings: Branching | Repeats,
    job: Job,
    track: Track,
    step: int,
    branch: int,
    start: int,
    base: int,
) -> dict[str, Any]:
    kind = "episode" if isinstance(settings, Repeats) else "base" if step < 0 else "branch"
    said = bool(track.success.any()) if track.says_success else None
    place = {"step": step, "base": base} if kind == "branch" else {}
    return {
        "seed": job.seed,
        "kind": kind,
        "start": start,
        **place,
        **({} if kind == "base" else {"branch": branch}),
        "policy_seed": job.policy_seed,
        "return": float(np.sum(track.reward, dtype=np.float64)),
        "max_reward": float(track.reward.max()),
        "success": said,
        "says_success": track.says_success,
    }


def open_rollouts(
    path: Path, info: EnvInfo, policy: ObservingPolicy, settings: Branching | Repeats
) -> EpisodeStore:
    """The store of rollouts at ``path``, made or opened to go on.

    Raises:
        ValueError: it was made with another environment, policy or other settings.
    """
    identity = {
        "env_id": info.spec.id,
        "env_kwargs": dict(info.spec.kwargs),
        "max_episode_steps": info.max_episode_steps,
    }
    made = {
        "kind": "branches" if isinstance(settings, Branching) else "episodes",
        "settings": settings.collected(),
        "n_obs_steps": policy.n_obs_steps,
        "n_action_steps": policy.n_action_steps,
        "sampler": _sampler(policy),
        "policy": _fingerprint(policy),
    }
    if not path.exists():
        fields = {
            "obs": FieldSpec((info.obs_dim,), "float32"),
            "action": FieldSpec((info.action_dim,), "float32"),
            "reward": FieldSpec((), "float32"),
            **{name: FieldSpec((), "bool") for name in ("terminated", "truncated", "success")},
        }
        rollouts = {**made, "failed": {}, "env_steps": 0}
        attrs = {**identity, "versions": info.versions, "rollouts": rollouts}
        return EpisodeStore.create(path, fields, attrs=attrs)
    store = EpisodeStore.open(path, "a")
    was = store.attrs.get("rollouts", {})
    asked = {**identity, **made}
    found = {n: store.attrs.get(n, was.get(n)) for n in asked}
    if found != asked:
        store.close()
        raise ValueError(
            f"{path} was collected with {found}, not with {asked}; choose another path, or the "
            "same settings and policy to go on with it"
        )
    return store


def _sampler(policy: ObservingPolicy) -> dict[str, Any] | None:
    """How the policy draws plans, as JSON values."""
    spec = getattr(policy, "spec", None)
    if spec is None:
        return None
    found: dict[str, Any] = json.loads(json.dumps(spec.to_config()["sampler"]))
    return found


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
