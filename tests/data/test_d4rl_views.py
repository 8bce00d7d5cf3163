"""D4RL's two functions against plain loops, row for row, over every quirk of its files."""

import numpy as np
import pytest

from diffpolicy.data import load_d4rl, qlearning_dataset, sequence_dataset

h5py = pytest.importorskip("h5py")
LIMIT = 7
KEYS = ("observations", "actions", "next_observations", "rewards", "terminals")


def loop_transitions(data, terminate_on_end, limit):
    """One row after the other, with D4RL's counter."""
    found = {key: [] for key in KEYS}
    counter = 0
    for i in range(len(data["rewards"]) - 1):
        terminal = bool(data["terminals"][i])
        timeout = bool(data["timeouts"][i]) if "timeouts" in data else counter == limit - 1
        if timeout and not terminate_on_end:
            counter = 0
            continue
        if terminal or timeout:
            counter = 0
        found["observations"].append(data["observations"][i].astype(np.float32))
        found["actions"].append(data["actions"][i].astype(np.float32))
        found["next_observations"].append(data["observations"][i + 1].astype(np.float32))
        found["rewards"].append(np.float32(data["rewards"].reshape(-1)[i]))
        found["terminals"].append(terminal)
        counter += 1
    return {key: np.array(rows) for key, rows in found.items()}


def loop_trajectories(data, limit):
    found, rows, counter = [], [], 0
    for i in range(len(data["rewards"])):
        rows.append(i)
        timeout = bool(data["timeouts"][i]) if "timeouts" in data else counter == limit - 1
        if bool(data["terminals"][i]) or timeout:
            found.append({key: values[rows] for key, values in data.items()})
            rows, counter = [], 0
        counter += 1
    return found


def make(seed, n=120, *, timeouts=True, both=False, column=False, wide=False, following=False):
    """Random rows with short trajectories; `both` sets both flags here and there."""
    rng = np.random.default_rng(seed)
    kind = np.float64 if wide else np.float32
    data = {
        "observations": rng.normal(size=(n, 3)).astype(kind),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(kind),
        "rewards": rng.normal(size=n).astype(kind),
        "terminals": rng.random(n) < 0.1,
        "infos/qpos": rng.normal(size=(n, 4)),
    }
    if timeouts:
        data["timeouts"] = (rng.random(n) < 0.1) & (both | ~data["terminals"])
    if following:
        data["next_observations"] = data["observations"] + 1
    if column:
        for key in ("rewards", "terminals"):
            data[key] = data[key][:, None]
    return data


QUIRKS = [
    {},
    {"both": True},
    {"timeouts": False},
    {"timeouts": False, "wide": True, "column": True},
    {"column": True, "following": True},
    {"wide": True, "both": True, "following": True},
]


def equal(found, want):
    assert set(found) == set(want)
    for key in want:
        assert found[key].dtype == want[key].dtype
        np.testing.assert_array_equal(found[key], want[key], strict=True)


@pytest.mark.parametrize("quirk", QUIRKS)
@pytest.mark.parametrize("terminate_on_end", [False, True])
def test_transitions(quirk, terminate_on_end):
    for seed in range(20):
        data = make(seed, **quirk)
        found = qlearning_dataset(data, terminate_on_end, max_episode_steps=LIMIT)
        equal(found, loop_transitions(data, terminate_on_end, LIMIT))


@pytest.mark.parametrize("quirk", QUIRKS)
def test_trajectories(quirk):
    for seed in range(20):
        data = make(seed, **quirk)
        found = list(sequence_dataset(data, max_episode_steps=LIMIT))
        flat = {
            k: v[:, 0] if k in ("rewards", "terminals") and v.ndim > 1 else v
            for k, v in data.items()
        }
        want = loop_trajectories(flat, LIMIT)
        assert len(found) == len(want)
        for one, other in zip(found, want, strict=True):
            equal(one, other)


@pytest.mark.parametrize("limit", [1, 2, 3, 60, 200])
@pytest.mark.parametrize("terminate_on_end", [False, True])
def test_counting_at_the_edges(limit, terminate_on_end):
    for seed in range(10):
        data = make(seed, 50, timeouts=False)
        found = qlearning_dataset(data, terminate_on_end, max_episode_steps=limit)
        want = loop_transitions(data, terminate_on_end, limit)
        for key, rows in want.items():
            np.testing.assert_array_equal(found[key].reshape(rows.shape), rows)
        lengths = [len(t["rewards"]) for t in sequence_dataset(data, max_episode_steps=limit)]
        assert lengths == [len(t["rewards"]) for t in loop_trajectories(data, limit)]


def test_d4rl_counts_one_step_less_after_the_first_trajectory():
    data = make(0, 23, timeouts=False) | {"terminals": np.zeros(23, bool)}
    lengths = [len(t["rewards"]) for t in sequence_dataset(data, max_episode_steps=7)]
    assert lengths == [7, 6, 6]  # and a tail of 4


def test_files_give_the_same_as_arrays(tmp_path):
    data = make(3, column=True, wide=True, timeouts=False)
    path = tmp_path / "mine.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file[key] = values
        file["metadata/algorithm"] = "BC"
        file["metadata/policy/weight"] = np.zeros((4, 4))
    with load_d4rl(path, max_episode_steps=100) as file:
        equal(qlearning_dataset(file), loop_transitions(data, False, 100))
        found = list(sequence_dataset(file))
        assert len(found) == len(list(sequence_dataset(data, max_episode_steps=100)))
        assert set(found[0]) == set(data)
        assert found[0]["observations"].dtype == np.float64
    with load_d4rl(
        path, transforms=["reward_scale:2", "reward_shift:-1"], max_episode_steps=100
    ) as file:
        scaled = qlearning_dataset(file)["rewards"]
    want = 2 * qlearning_dataset(data, max_episode_steps=100)["rewards"] - 1
    np.testing.assert_allclose(scaled, want, rtol=1e-6, atol=1e-6)


def test_bad_input(tmp_path):
    data = make(0, timeouts=False)
    with pytest.raises(ValueError, match="give max_episode_steps"):
        qlearning_dataset(data)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        qlearning_dataset(data, max_episode_steps=0)
    with pytest.raises(ValueError, match=r"no field \['terminals'\]"):
        next(sequence_dataset({k: v for k, v in data.items() if k != "terminals"}))
    with pytest.raises(ValueError, match=r"needs 120 rows.*'actions': \(119, 2\)"):
        qlearning_dataset(data | {"actions": data["actions"][1:]}, max_episode_steps=3)
