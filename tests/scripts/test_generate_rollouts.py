"""Files joined into one: exact concatenation, flags, what the file says."""

import json

import numpy as np
import pytest

from generators.layout import write_d4rl
from generators.rollouts import generate_rollouts, read_rollouts, summary

h5py = pytest.importorskip("h5py", reason="needs the hdf5 extra")


def rollouts(seed, ends, terminal_ends, obs_dim=3):
    rng = np.random.default_rng(seed)
    steps = ends[-1]
    terminals = np.zeros(steps, bool)
    terminals[np.array(terminal_ends, int) - 1] = True
    return {
        "observations": rng.standard_normal((steps, obs_dim)).astype(np.float32),
        "actions": rng.standard_normal((steps, 2)).astype(np.float32),
        "rewards": rng.standard_normal(steps).astype(np.float32),
        "terminals": terminals,
        "episode_ends": np.array(ends),
    }


@pytest.fixture
def sources(tmp_path):
    medium = rollouts(0, [3, 5, 9], [5])
    expert = rollouts(1, [4, 6], [])
    for name, arrays in (("medium", medium), ("expert", expert)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    return medium, expert


def test_concatenation_is_exact_and_in_order(tmp_path, sources):
    names = [tmp_path / "medium.npz", tmp_path / "expert.npz"]
    path = generate_rollouts(names, tmp_path / "both.hdf5")
    with h5py.File(path) as file:
        for name in ("observations", "actions", "rewards", "terminals"):
            expected = np.concatenate([source[name] for source in sources])
            assert np.array_equal(file[name], expected)
            assert file[name].dtype == expected.dtype
        # Row 4 is terminal; every other end of an episode is a time-out.
        assert np.flatnonzero(file["terminals"]).tolist() == [4]
        assert np.flatnonzero(file["timeouts"]).tolist() == [2, 8, 12, 14]
        described = json.loads(file.attrs["sources"])
        assert "not comparable" in file.attrs["note"]
    assert [(d["file"], d["episodes"], d["steps"]) for d in described] == [
        ("medium.npz", 3, 9),
        ("expert.npz", 2, 6),
    ]
    rewards = sources[1]["rewards"].astype(np.float64)
    assert described[1]["return_mean"] == pytest.approx((rewards.sum()) / 2)


def test_hdf5_sources_keep_the_groups_that_all_have(tmp_path, sources):
    first = generate_rollouts([tmp_path / "medium.npz"], tmp_path / "a.hdf5")
    arrays, _ = read_rollouts(first)
    goal = np.arange(9.0)[:, None]
    write_d4rl(first, {**arrays, "infos/goal": goal, "infos/odd": goal}, {"seed": 5})
    second = write_d4rl(tmp_path / "b.hdf5", {**arrays, "infos/goal": goal + 9}, {})
    path = generate_rollouts([first, second], tmp_path / "both.hdf5")
    both, attrs = read_rollouts(path)
    assert both["infos/goal"][:, 0].tolist() == list(range(18))
    assert "infos/odd" not in both
    assert attrs["sources"][0]["attrs"] == {"seed": 5}
    assert np.array_equal(both["timeouts"], np.tile(arrays["timeouts"], 2))


def test_a_partial_tail_does_not_run_into_the_next_source(tmp_path, sources):
    arrays = rollouts(2, [4, 7], [])
    arrays["episode_ends"] = np.array([4])  # rows 4..6 are an unfinished episode
    np.savez(tmp_path / "tail.npz", **arrays)
    read, _ = read_rollouts(tmp_path / "tail.npz")
    assert np.flatnonzero(read["timeouts"]).tolist() == [3, 6]
    flags = {"terminals": np.zeros(7, bool), "timeouts": np.arange(7) == 3}
    file = write_d4rl(tmp_path / "tail.hdf5", {**read, **flags}, {})
    assert np.flatnonzero(read_rollouts(file)[0]["timeouts"]).tolist() == [3, 6]
    both, _ = read_rollouts(
        generate_rollouts([file, tmp_path / "expert.npz"], tmp_path / "both.hdf5")
    )
    assert np.flatnonzero(both["timeouts"]).tolist() == [3, 6, 10, 12]


def test_summary_by_hand():
    arrays = {
        "rewards": np.float32([1, 2, 3, 4]),
        "terminals": np.array([False, True, False, False]),
        "timeouts": np.zeros(4, bool),
    }
    assert summary(arrays) == {"steps": 4, "episodes": 2, "return_mean": 5.0, "return_std": 2.0}


def test_bad_sources_are_explained(tmp_path, sources):
    target = tmp_path / "x.hdf5"
    with pytest.raises(ValueError, match="sources is empty"):
        generate_rollouts([], target)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        generate_rollouts([tmp_path / "absent.npz"], target)
    np.savez(tmp_path / "wide.npz", **rollouts(3, [4], [], obs_dim=5))
    with pytest.raises(ValueError, match="not the same task"):
        generate_rollouts([tmp_path / "medium.npz", tmp_path / "wide.npz"], target)
    np.savez(tmp_path / "poor.npz", observations=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="lacks actions, rewards, terminals, episode_ends"):
        generate_rollouts([tmp_path / "poor.npz"], target)
    np.savez(tmp_path / "odd.npz", **{**rollouts(3, [4], []), "episode_ends": np.array([3, 2])})
    with pytest.raises(ValueError, match=r"episode_ends of odd\.npz must ascend"):
        generate_rollouts([tmp_path / "odd.npz"], target)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"expected a \.npz of rollouts or a \.hdf5"):
        generate_rollouts([tmp_path / "notes.txt"], target)
    with pytest.raises(ValueError, match=r"x\.hdf5 lacks timeouts"):
        write_d4rl(target, {k: v for k, v in sources[0].items() if k != "episode_ends"}, {})
    assert not target.exists()


def test_pickled_arrays_are_refused(tmp_path, sources):
    bad = {**sources[0], "rewards": np.array([{}] * 9, dtype=object)}
    np.savez(tmp_path / "pickled.npz", **bad)
    with pytest.raises(ValueError, match="allow_pickle"):
        generate_rollouts([tmp_path / "pickled.npz"], tmp_path / "x.hdf5")


def test_our_reader_reads_it(tmp_path, sources):
    from diffpolicy.data import load_d4rl

    with load_d4rl(generate_rollouts([tmp_path / "medium.npz"], tmp_path / "a.hdf5")) as file:
        assert file.num_episodes == 3
        assert np.array_equal(file.episode(2)["obs"], sources[0]["observations"][5:])
        assert file.episode(1)["terminated"].tolist() == [False, True]
