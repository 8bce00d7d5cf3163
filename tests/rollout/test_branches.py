from __future__ import annotations

import json

import numpy as np
import pytest
from branch_fake_envs import Fragile

from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.policies.base import ChunkedPolicy
from diffpolicy.policies.rows import row_noise
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.labelling.clips import ClipRenderer
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.record.branches import Branching, Repeats, collect_rollouts
from diffpolicy.rollout.record.pairing import Scoring, rollout_records, write_pairs
from diffpolicy.rollout.record.steps import InOrder
from diffpolicy.rollout.record.tracks import Job, ReplayError, TrackRunner
from diffpolicy.rollout.rows import AllFailedError

POINT = EnvSpec("rollout_fake_envs:rollout_fakes/Point-v0")
SERIAL = Workers(num_envs=5, num_workers=0)
SMALL = Branching(points=2, branches=3, lookahead=5)


class NoisyPolicy(ChunkedPolicy):
    """Plans are the row's noise alone; remembers what every plan was made of."""

    def __init__(self, ta=3, to=2, obs_dim=3):
        dims = {"obs_dim": obs_dim, "action_dim": 2, "horizon": ta + to}
        super().__init__(**dims, n_obs_steps=to, n_action_steps=ta)
        self.batches, self.seen = [], []

    def make_plans(self, state, *, deterministic):
        self.batches.append(len(state))
        self.seen += zip(state.seed.tolist(), state.counter.tolist(), state.history, strict=True)
        return row_noise(state.seed, state.counter, (self.horizon, 2)), np.ones(len(state), int)

    def to_actions(self, normalised):
        return np.clip(normalised, -1, 1)


def _collect(tmp_path, name="a", seeds=range(3), settings=SMALL, spec=POINT, policy=None, **more):
    return collect_rollouts(
        policy or NoisyPolicy(),
        spec,
        seeds,
        store_path=tmp_path / f"{name}.zarr",
        prefs_path=tmp_path / f"{name}.jsonl",
        settings=settings,
        **{"workers": SERIAL, "progress": False, **more},
    )


def _contents(store):
    fields = {name: store.read(name, 0, store.num_steps).tobytes() for name in store.fields}
    return store.episode_attrs, store.episode_ends.tolist(), fields


def _of(store, kind):
    """Index, attributes and fields of the episodes of a kind."""
    fields = {name: store.read(name, 0, store.num_steps) for name in store.fields}
    ends, lengths = store.episode_ends, store.episode_lengths
    return [
        (
            i,
            attrs,
            {name: column[ends[i] - lengths[i] : ends[i]] for name, column in fields.items()},
        )
        for i, attrs in enumerate(store.episode_attrs)
        if attrs["kind"] == kind
    ]


def test_branches_begin_with_the_base_episodes_own_observations(tmp_path):
    store = _collect(tmp_path).store
    branches = _of(store, "branch")
    assert len(branches) == 3 * 2 * 3
    bases = {i: base for i, _, base in _of(store, "base")}
    for _, attrs, branch in branches:
        base = bases[attrs["base"]]
        assert store.episode_attrs[attrs["base"]]["seed"] == attrs["seed"]
        step, start = attrs["step"], attrs["start"]
        assert start == min(1, step)
        np.testing.assert_array_equal(
            branch["obs"][: start + 1], base["obs"][step - start : step + 1]
        )
        np.testing.assert_array_equal(branch["action"][:start], base["action"][step - start : step])
        assert len(branch["obs"]) - start <= 5
        if len(branch["obs"]) - start < 5:
            assert branch["terminated"][-1] or branch["truncated"][-1]


def test_the_policy_sees_the_history_that_the_base_episode_had(tmp_path):
    policy = NoisyPolicy(to=3)
    store = _collect(tmp_path, policy=policy).store
    first = {seed: history for seed, counter, history in policy.seen if counter == 0}
    bases = {i: base["obs"] for i, _, base in _of(store, "base")}
    for _, attrs, _ in _of(store, "branch"):
        base, step = bases[attrs["base"]], attrs["step"]
        expected = base[np.maximum(np.arange(step - 2, step + 1), 0)]
        np.testing.assert_array_equal(first[attrs["policy_seed"]], expected)


def test_branches_share_their_noise_after_the_first_chunk(tmp_path):
    store = _collect(tmp_path, settings=Branching(points=1, branches=3, lookahead=9)).store
    own = _collect(
        tmp_path, "own", settings=Branching(points=1, branches=3, lookahead=9, common_noise=False)
    ).store
    compared = 0
    for where, same in ((store, True), (own, False)):
        groups = {}
        for _, attrs, branch in _of(where, "branch"):
            if len(branch["action"]) >= attrs["start"] + 6:
                key = (attrs["seed"], attrs["step"])
                groups.setdefault(key, []).append(branch["action"][attrs["start"] :][:6])
        for group in groups.values():
            for other in group[1:]:
                compared += 1
                assert not np.array_equal(group[0][:3], other[:3])
                assert np.array_equal(group[0][3:6], other[3:6]) == same
    assert compared >= 4


def test_the_better_branch_is_chosen(tmp_path):
    preferences = _collect(tmp_path, settings=Branching(points=2, branches=4, lookahead=5))
    store, pairs = preferences.store, preferences.pairs()
    assert len(pairs) == 6
    branches = _of(store, "branch")
    for pair in pairs:
        (chosen,), (rejected,) = pair.chosen, pair.rejected
        attrs = store.episode_attrs[chosen.episode]
        returns = {
            i: episode["reward"][a["start"] :].astype(np.float64).sum()
            for i, a, episode in branches
            if (a["seed"], a["step"]) == (attrs["seed"], attrs["step"])
        }
        assert len(returns) == 4
        assert returns[chosen.episode] == max(returns.values())
        assert returns[rejected.episode] == min(returns.values())
        assert pair.info["scores"] == pytest.approx([max(returns.values()), min(returns.values())])
        assert (pair.info["seed"], pair.info["step"]) == (attrs["seed"], attrs["step"])
        assert (pair.source, chosen.start) == ("rollout", attrs["start"])
        left = int(store.episode_lengths[chosen.episode]) - chosen.start
        assert chosen.length == min(3, left)  # the chunk that the branches differ by


def test_rows_plan_together_in_batches_of_constant_size(tmp_path):
    policy = NoisyPolicy()
    settings = Branching(every=100, branches=30, lookahead=3)
    store = _collect(tmp_path, seeds=[0], settings=settings, policy=policy).store
    assert set(policy.batches) == {8}
    assert len(policy.batches) < sum(-(-length // 3) for length in store.episode_lengths)


def test_serial_and_parallel_agree_exactly(tmp_path):
    one = _collect(tmp_path, "a")
    two = _collect(tmp_path, "b", workers=Workers(num_envs=7, num_workers=2))
    assert _contents(one.store) == _contents(two.store)
    assert one.records == two.records


def test_goes_on_where_it_stopped(tmp_path):
    whole = _collect(tmp_path, "whole")
    _collect(tmp_path, "part", seeds=range(2))
    policy = NoisyPolicy()
    again = _collect(tmp_path, "part", policy=policy)
    assert _contents(whole.store) == _contents(again.store)
    assert whole.records == again.records
    policy.batches.clear()
    assert _collect(tmp_path, "part", policy=policy).records == whole.records
    assert policy.batches == []
    made = again.store.attrs["rollouts"]
    assert made["env_steps"] == whole.store.attrs["rollouts"]["env_steps"]
    assert made["failed"] == {}


def test_an_interrupted_run_keeps_whole_seeds(tmp_path):
    class Stops(NoisyPolicy):
        def make_plans(self, state, *, deterministic):
            if len(self.seen) > 200:
                raise KeyboardInterrupt
            return super().make_plans(state, deterministic=deterministic)

    with pytest.raises(KeyboardInterrupt):
        _collect(tmp_path, "cut", policy=Stops())
    kept = EpisodeStore.open(tmp_path / "cut.zarr")
    assert 0 < kept.num_episodes < 3 * 7
    assert kept.num_episodes % 7 == 0
    assert _contents(_collect(tmp_path, "cut").store) == _contents(_collect(tmp_path, "a").store)


def test_environments_that_do_not_repeat_themselves(tmp_path):
    spec = EnvSpec("branch_fake_envs:branch_fakes/Restless-v0")
    with pytest.raises(
        ReplayError, match=r"does not repeat itself.*seed 0, step 0.*self.np_random"
    ):
        _collect(tmp_path, spec=spec, seeds=[0], settings=Branching(every=1, lookahead=2))
    repeats = Repeats(episodes=2)  # these need no replay
    assert len(_collect(tmp_path, "e", spec=spec, settings=repeats).pairs()) == 3


def test_a_failure_is_tried_again_and_then_recorded(tmp_path):
    def spec(**fault):
        fault = {"kind": "raise", "seed": 1, "step": 4, **fault}
        return EnvSpec(POINT.id, {"fault": fault})

    healed = _collect(tmp_path, "h", spec=spec(once=str(tmp_path / "marker")))
    assert [p.info["seed"] for p in healed.pairs()] == [0, 0, 1, 1, 2, 2]
    broken = _collect(tmp_path, "b", spec=spec())
    assert {p.info["seed"] for p in broken.pairs()} == {0, 2}
    failed = broken.store.attrs["rollouts"]["failed"]
    assert list(failed) == ["1/-1/0"]
    assert "the gripper is on fire" in failed["1/-1/0"]
    with pytest.raises(AllFailedError, match=r"all 1 rollouts failed.*gripper is on fire"):
        _collect(tmp_path, "n", spec=spec(), seeds=[1])


def test_a_branch_that_fails_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Fragile, "resets", 0)
    spec = EnvSpec("branch_fake_envs:branch_fakes/Fragile-v0")
    settings = Branching(points=1, branches=3, lookahead=5)
    one_by_one = Workers(num_envs=1, num_workers=0, retries=0)
    for _ in range(2):  # the record of it outlives another call
        more = {"seeds": [1], "settings": settings, "workers": one_by_one}
        made = _collect(tmp_path, spec=spec, **more).store
        ((key, why),) = made.attrs["rollouts"]["failed"].items()
        assert (key.split("/")[0], key.split("/")[2]) == ("1", "1")
        assert "broken" in why
        assert [attrs["branch"] for _, attrs, _ in _of(made, "branch")] == [0, 2]


def test_several_episodes_of_each_seed(tmp_path):
    preferences = _collect(tmp_path, settings=Repeats(episodes=3))
    store = preferences.store
    assert [a["seed"] for a in store.episode_attrs] == [s for s in range(3) for _ in range(3)]
    starts = store.read("obs", 0, store.num_steps)[store.episode_ends - store.episode_lengths]
    assert len(np.unique(starts, axis=0)) == 3
    for pair in preferences.pairs():
        (chosen,), (rejected,) = pair.chosen, pair.rejected
        members = [i for i, a in enumerate(store.episode_attrs) if a["seed"] == pair.info["seed"]]
        returns = {i: store.episode_attrs[i]["return"] for i in members}
        assert returns[chosen.episode] == max(returns.values())
        assert returns[rejected.episode] == min(returns.values())
        assert chosen == Span(chosen.episode, 0, int(store.episode_lengths[chosen.episode]))


def test_another_score_needs_no_new_rollouts(tmp_path):
    store = _collect(tmp_path).store
    every = rollout_records(store, Scoring(pairs="all"))
    assert len(every) == 3 * 2 * 3
    gaps = np.array([p.info["scores"][0] - p.info["scores"][1] for p in every])
    assert (gaps > 0).all()
    cut = float(np.median(gaps))
    kept = rollout_records(store, Scoring(pairs="all", min_gap=cut))
    assert kept == [p for p, gap in zip(every, gaps, strict=True) if gap >= cut]

    def nearest(rewards, successes):
        return float(rewards.max())

    mine = rollout_records(store, Scoring(nearest))
    assert [(p.chosen, p.rejected) for p in mine] == [
        (p.chosen, p.rejected) for p in rollout_records(store, Scoring("max_reward"))
    ]
    assert mine[0].info["score"].endswith("nearest")
    ranking = rollout_records(store, Scoring(pairs="ranking"))[0]
    assert len(ranking.items) == 3
    assert ranking.info["scores"] == sorted(ranking.info["scores"], reverse=True)
    with pytest.raises(ValueError, match="scores must be finite; got nan"):
        rollout_records(store, Scoring(lambda r, s: float("nan")))
    longer = rollout_records(store, Scoring(span=4))
    assert max(p.chosen[0].length for p in longer) == 4
    written = write_pairs(store, tmp_path / "other.jsonl", Scoring("max_reward"))
    assert PreferenceSet.open(tmp_path / "other.jsonl").records == written.records
    assert written.attrs["scoring"]["score"] == "max_reward"


def test_scores():
    rewards, successes = np.array([1.0, 4.0, 2.0]), np.array([False, True, True])
    assert Scoring().rate(rewards, successes) == 7
    assert Scoring(discount=0.5).rate(rewards, successes) == 1 + 2 + 0.5
    assert Scoring("max_reward").rate(rewards, successes) == 4
    assert Scoring("max_reward", discount=0.25).rate(rewards, successes) == 1
    assert Scoring("success").rate(rewards, successes) == 1
    assert Scoring("success", discount=0.5).rate(rewards, successes) == 0.5
    assert Scoring("success").rate(rewards, ~successes | False) == 1
    assert Scoring("success").rate(rewards, np.zeros(3, bool)) == 0
    assert Scoring().rate(rewards, successes, 5) == 7
    assert Scoring(after_end="hold").rate(rewards, successes, 5) == 11
    assert Scoring(lambda r, s: s.sum(), after_end="hold").rate(rewards, successes, 5) == 4


def test_branch_points():
    points = Branching(points=4).steps(7, 200, 8)
    assert points == Branching(points=4).steps(7, 200, 8)
    assert points != Branching(points=4).steps(8, 200, 8)
    assert [p // 49 for p in points] == [0, 1, 2, 3] or len(points) == 4
    assert max(points) <= 192
    assert Branching(every=50).steps(7, 200, 8) == [0, 50, 100, 150]
    assert Branching(every=1).steps(7, 10, 8) == [0, 1, 2]
    assert Branching(points=4).steps(7, 5, 8) == [0]


def test_a_persons_answers_are_not_overwritten(tmp_path):
    preferences = _collect(tmp_path)
    answer = Pair((Span(0, 0, 2),), (Span(1, 0, 2),), source="human")
    preferences.append(answer)
    with pytest.raises(FileExistsError, match="answers of a person"):
        _collect(tmp_path)
    assert PreferenceSet.open(tmp_path / "a.jsonl").records[-1] == answer


def test_a_store_of_other_settings_is_refused(tmp_path):
    _collect(tmp_path)
    with pytest.raises(ValueError, match=r"was collected with .*'lookahead': 5.* choose another"):
        _collect(tmp_path, settings=Branching(points=2, branches=3, lookahead=6))
    with pytest.raises(ValueError, match="was collected with"):
        _collect(tmp_path, policy=NoisyPolicy(ta=2))


def test_messages(tmp_path, fake_policy):
    with pytest.raises(ValueError, match="seeds must differ"):
        _collect(tmp_path, seeds=[1, 1])
    with pytest.raises(ValueError, match="there are no seeds"):
        _collect(tmp_path, seeds=[])
    with pytest.raises(ValueError, match=r"FakePolicy has no method observe.*DiffusionPolicy"):
        _collect(tmp_path, policy=fake_policy)
    with pytest.raises(ValueError, match=r"no pairs: .* by more than min_gap=1000000000"):
        _collect(tmp_path, settings=Branching(points=1, lookahead=2, scoring=Scoring(min_gap=1e9)))
    plain = EpisodeStore.from_arrays({"obs": np.zeros((3, 1))}, [3])
    with pytest.raises(ValueError, match="not made by `diffpolicy data prefs collect`"):
        rollout_records(plain, Scoring())
    for bad, text in (
        ({"branches": 1}, "at least 2"),
        ({"lookahead": 0}, "lookahead must be"),
        ({"points": 0}, "points must be"),
        ({"every": 0}, "every must be"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=text):
            Branching(**bad)
    with pytest.raises(ValueError, match="at least 2"):
        Repeats(episodes=1)
    for bad, text in (
        ({"score": "best"}, r"unknown score 'best'; expected one of"),
        ({"discount": 0.0}, "discount"),
        ({"min_gap": -1.0}, "min_gap"),
        ({"pairs": "some"}, "unknown pairs"),
        ({"after_end": "stop"}, "unknown after_end"),
        ({"span": 0}, "span"),
    ):
        with pytest.raises(ValueError, match=text):
            Scoring(**bad)


def test_success_where_the_environment_never_says(tmp_path):
    spec = EnvSpec("branch_fake_envs:branch_fakes/Silent-v0")
    with pytest.raises(ValueError, match="never said whether an episode succeeded"):
        _collect(tmp_path, spec=spec, settings=Branching(scoring=Scoring("success")))
    kept = EpisodeStore.open(tmp_path / "a.zarr")
    assert json.dumps(kept.episode_attrs[0]["success"]) == "null"


def test_what_is_given_beside_the_observations_is_not_stored(tmp_path):
    spec = EnvSpec("rollout_fake_envs:rollout_fakes/Recorded-v0")
    store = _collect(tmp_path, seeds=[0], spec=spec).store
    assert not any(name.startswith("info.") for name in store.fields)


def test_branches_can_be_drawn(tmp_path):
    store = _collect(tmp_path, seeds=[0, 1]).store
    with ClipRenderer(store, side=64) as renderer:
        for episode, attrs in enumerate(store.episode_attrs):
            if attrs["kind"] == "branch":
                frames = renderer.frames((Span(episode, attrs["start"], 1),))
                assert frames[0, 0, 0, 0] == 10 * attrs["step"]  # the picture says the step


def test_push_t_repeats_itself_exactly():
    pytest.importorskip("gym_pusht")
    spec = EnvSpec("diffpolicy_envs:diffpolicy/PushT-v0", {}, 40)

    class Pushes(NoisyPolicy):
        def to_actions(self, normalised):
            return 256 + 120 * np.clip(normalised, -2, 2)

    with WorkerPool(spec, Workers(num_envs=3, num_workers=0)) as pool:
        runner = TrackRunner(Pushes(ta=8, obs_dim=pool.info.obs_dim), pool)
        tracks = {}

        def base_done(job, track):
            tracks[job.key] = track
            return _further(job, track) if len(job.key) == 1 else []

        runner.run([Job(s, s, key=(s,)) for s in range(2)], base_done, InOrder(range(2)))
    assert len(tracks) == 2 + 2 * 4  # every replay was compared with its record, bit by bit
    for key, track in tracks.items():
        assert not isinstance(track, str)
        if len(key) == 2:
            base = tracks[key[:1]].columns["obs"]
            np.testing.assert_array_equal(track.columns["obs"][0], base[30])
            assert len(track) == 4


def _further(job, track):
    more = {"prefix": track, "replayed": 30, "limit": 4}
    return [Job(job.seed, 100 + k, key=(*job.key, k), **more) for k in range(4)]


def test_rollouts_that_were_interrupted_go_on_to_the_same_bits(tmp_path, make_diffusion_policy):
    """In an environment that magnifies the last bit of an action."""
    more = {
        "policy": make_diffusion_policy({"type": "mlp", "width": 256, "depth": 2}),
        "spec": EnvSpec("rollout_fake_envs:rollout_fakes/Chaos-v0"),
        "settings": Repeats(episodes=2),
    }
    whole = _collect(tmp_path, "whole", seeds=[7, 8, 9], **more)
    _collect(tmp_path, "part", seeds=[7], **more)
    rest = _collect(tmp_path, "part", seeds=[7, 8, 9], workers=Workers(3, 0), **more)
    assert _contents(whole.store) == _contents(rest.store)
