"""Images on their way from environments to stores, policies and films: whole, and copied once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from diffpolicy.data import Span, check_store
from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.windows import Windows
from diffpolicy.rollout.env_spec import EnvSpec
from diffpolicy.rollout.evaluate import VideoOptions, evaluate
from diffpolicy.rollout.labelling.clips import ClipRenderer
from diffpolicy.rollout.pool.shared import image_rooms, memory_file
from diffpolicy.rollout.pool.slots import EnvSlot
from diffpolicy.rollout.pool.supervisor import Workers
from diffpolicy.rollout.pool.workers import WorkerPool
from diffpolicy.rollout.record.experts import collect
from diffpolicy.rollout.record.steps import InOrder
from diffpolicy.rollout.record.tracks import Job, TrackRunner
from diffpolicy.rollout.video import beside, images_of

CAMERAS = "rollout_fake_envs:rollout_fakes/Cameras-v0"
BOTH = ("front", "wrist")


def spec(size=12, length=9, **more):
    return EnvSpec(CAMERAS, {"size": size, "length": length, **more})


def said(image):
    """The seed and the step that are drawn into a picture of the front camera."""
    return int(image[0, 0, 0]), int(image[0, 0, 1])


@pytest.fixture
def seeing_policy(make_fake_policy):
    """Notes the seeds and steps that the pictures of every call show."""

    class Seeing(type(make_fake_policy())):
        def __init__(self):
            super().__init__()
            self.seen = []

        def act(self, obs, state, *, deterministic=False):
            self.seen += [said(image) for image in obs["front"]]
            assert np.array_equal(obs["front"], obs["wrist"][:, ::-1])
            place = np.concatenate([obs["place"], obs["place"][:, :1]], axis=1)
            return super().act(place, state, deterministic=True)

    return Seeing()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_picture_reaches_the_policy_once(seeing_policy, num_workers):
    workers = Workers(num_envs=3, num_workers=num_workers)
    evaluate(seeing_policy, spec(), range(5), workers=workers, progress=False)
    assert sorted(seeing_policy.seen) == [(seed, t) for seed in range(5) for t in range(9)]


def test_a_worker_writes_an_image_to_where_the_pool_reads_it():
    """One copy: into memory that both see; what a row showed stays for one more command."""
    with WorkerPool(spec(size=64), Workers(num_envs=2, num_workers=1)) as pool:
        rooms = pool._supervisor.processes[0].rooms
        steps = [pool.reset([0, 1], [7, 8])]
        tracemalloc.start()
        steps += [pool.step(np.zeros((2, 2), np.float32), [0, 1]) for _ in range(2)]
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 64 * 64 * 3  # less than a single image, of eight that came
        for row in (0, 1):
            images = [results[row].obs["front"] for results in steps]
            assert [said(image) for image in images] == [(7 + row, t) for t in (2, 1, 2)]
            places = [np.shares_memory(images[2], room["obs.front"]) for room in rooms[row]]
            assert sorted(places) == [False, True]
    assert said(images[1]) == (8, 1)  # memory outlives the pool that is closed


def test_an_environment_writes_into_that_memory_at_once():
    slot = EnvSlot(spec(size=64))
    slot.reset(0)
    fields = {"obs." + name: None for name in BOTH}
    slot.rooms = image_rooms(memory_file(), slot._fields, [0])[0]
    outcome = slot.step(np.zeros(2))
    for name, field in zip(BOTH, fields, strict=True):
        assert outcome.obs[name] is slot.rooms[1][field]
    assert np.array_equal(outcome.obs["front"], outcome.obs["wrist"][::-1])


def test_states_alone_share_nothing():
    with WorkerPool(EnvSpec("rollout_fake_envs:rollout_fakes/Point-v0"), Workers(2, 1)) as pool:
        assert pool._supervisor.processes[0].rooms == {0: None, 1: None}


def test_a_worker_that_dies_costs_its_pictures_alone(seeing_policy, tmp_path):
    fault = {"kind": "kill", "seed": 1, "step": 3, "once": str(tmp_path / "struck")}
    workers = Workers(num_envs=2, num_workers=2)
    result = evaluate(seeing_policy, spec(fault=fault), range(3), workers=workers, progress=False)
    assert [episode.length for episode in result.episodes] == [9, 9, 9]
    assert result.episodes[1].attempts == 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Episodes of five seeds, by processes."""
    path = tmp_path_factory.mktemp("images") / "cameras.zarr"
    workers = Workers(num_envs=3, num_workers=2)
    collect(spec(), range(5), path, workers=workers, progress=False)
    return EpisodeStore.open(path)


def drawn(seed, t):
    """What the front camera shows."""
    slot = EnvSlot(spec())
    image = slot.reset(seed).obs["front"].copy()
    image[0, 0, 1] = t
    return image


def test_images_are_stored_bit_for_bit(recorded):
    assert recorded.fields["obs.front"].dtype == "uint8"
    assert recorded.episode_lengths.tolist() == [9] * 5
    for seed in range(5):
        episode = recorded.episode(seed)
        for t in range(9):
            assert np.array_equal(episode["obs.front"][t], drawn(seed, t))
            assert np.array_equal(episode["obs.wrist"][t], drawn(seed, t)[::-1])
    assert check_store(recorded) == []


@pytest.mark.parametrize(("n_obs", "horizon"), [(1, 4), (3, 6), (12, 16)])
def test_windows_never_leave_the_episode(recorded, n_obs, horizon):
    """Also where the history is longer than an episode."""
    windows = Windows(recorded, n_obs_steps=n_obs, horizon=horizon, n_action_steps=1)
    rows = torch.randint(len(windows), (40,), generator=torch.Generator().manual_seed(0))
    batch = windows.gather(rows)
    for i in range(len(rows)):
        told = [said(image) for image in np.asarray(batch["obs.front"][i])]
        assert len({seed for seed, _ in told}) == 1
        steps = [t for _, t in told]
        last = steps[-1]
        assert steps == [max(0, last - n_obs + 1 + k) for k in range(n_obs)]
        assert np.array_equal(batch["obs.wrist"][i], np.asarray(batch["obs.front"][i])[:, ::-1])


def test_one_slow_episode_does_not_fill_the_memory_with_others():
    order, most = InOrder(range(40)), []
    with WorkerPool(spec(length=20), Workers(num_envs=2, num_workers=0)) as pool:

        class Runner(TrackRunner):
            def actions(self, rows):
                return np.zeros((len(rows), 2), np.float32)

        def done(job, track):
            kept.extend(seed for seed, _ in order.add(job.seed, track))
            most.append(len(order))
            return []

        kept = []
        jobs = [Job(s, s, key=(s,), limit=1 if s else None) for s in range(40)]
        Runner(None, pool).run(jobs, done, order)
    assert kept == list(range(40))
    assert max(most) <= 4 * 2 + 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_film_shows_what_the_cameras_see(seeing_policy, num_workers):
    workers = Workers(num_envs=2, num_workers=num_workers)
    how = {"workers": workers, "progress": False}
    video = VideoOptions(episodes=1, side=32, cameras=True)
    result = evaluate(seeing_policy, spec(), range(2), video=video, **how)
    (film,) = result.videos
    assert film.frames.shape == (10, 32, 32 + 32 + 32, 3)
    nearest = np.arange(32) * 12 // 32
    for t, frame in enumerate(film.frames):
        assert (frame[:, :32] == 10 * t).all()  # drawn by the environment
        assert np.array_equal(frame[:, 32:64], drawn(0, t)[nearest][:, nearest])
    broken = spec(render_fault="draw")
    film = evaluate(seeing_policy, broken, range(1), video=video, **how).videos[0]
    assert film.frames.shape == (10, 12, 24, 3)  # the cameras alone
    assert np.array_equal(film.frames[4, :, :12], drawn(0, 4))


def test_images_of_other_kinds_beside_a_picture():
    first = np.full((4, 2, 3), 9, np.uint8).transpose(2, 0, 1)
    obs = {"grey": np.full((20, 10), 7, np.uint8), "place": np.zeros(3), "first": first}
    shown = beside(np.zeros((8, 6, 3), np.uint8), *images_of(obs))
    assert shown.shape == (8, 6 + 4 + 4, 3)
    assert (shown[:, 6:10] == 7).all()
    assert (shown[:, 10:] == 9).all()
    assert images_of({"place": np.zeros(3)}) == []


def test_stores_without_an_environment_are_shown_by_their_cameras(recorded):
    episode = recorded.episode(0)
    arrays = {name: episode[name] for name in ("obs.front", "obs.wrist", "obs.place", "action")}
    with ClipRenderer(EpisodeStore.from_arrays(arrays, [9]), side=12) as renderer:
        frames = renderer.frames((Span(0, 2, 3),))
    assert frames.shape == (3, 12, 24, 3)
    assert np.array_equal(frames[0, :, :12], drawn(0, 2))
