"""Data sets from nothing: the same set for any number of workers and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data.store import EpisodeStore
from diffpolicy.data.store_digest import store_digest
from diffpolicy.rollout import declared as module
from diffpolicy.rollout.declared import declared, install_hint
from diffpolicy.rollout.env_spec import EnvSpecError, stored_env_id
from diffpolicy.rollout.record.datasheet import datasheet, sheet_path
from diffpolicy.rollout.record.making import UnknownSetError, find_recipe, make_set
from diffpolicy.rollout.rows import AllFailedError

HELPERS = Path(__file__).parents[1] / "helpers"

DECLARED = """
from diffpolicy_envs.recipes import Recipe

HOMES = {"rollout_fake_envs": "", "toy_simulator": "sim"}
_SAID = {"about": "a point", "licence": "MIT", "extra": "", "minutes": 1, "megabytes": 1}
_ENV = "rollout_fake_envs:rollout_fakes/"
RECIPES = {
    "toy/points": Recipe(env=_ENV + "ExpertPoint-v0", episodes=12, noise=0.1, **_SAID),
    "toy/all": Recipe(env=_ENV + "Recorded-v0", episodes=6, keep="all",
                      fields=("place", "moves"), **_SAID),
    "toy/near": Recipe(env=_ENV + "Point-v0", kwargs={"radius": 0.5}, episodes=6,
                       derived="toy/all", relabel="rollout_fake_envs:relabel", **_SAID),
    "toy/hopeless": Recipe(env=_ENV + "ExpertPoint-v0", episodes=1, noise=1e-9,
                           seeds_from=99_999, **_SAID),
    "toy/wrong": Recipe(env=_ENV + "Recorded-v0", episodes=1, fields=("velocity",), **_SAID),
}
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A package of a stranger's, installed: its declaration, and its entry point."""
    home = tmp_path / "site"
    info = home / "toys-1.2.dist-info"
    info.mkdir(parents=True)
    (home / "toys_declared.py").write_text(DECLARED)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[diffpolicy.envs]\ntoys = toys_declared\n")
    monkeypatch.syspath_prepend(home)
    monkeypatch.delenv("DIFFPOLICY_TRUST_ENVS")
    monkeypatch.chdir(tmp_path)
    declared.cache_clear()
    yield home
    declared.cache_clear()
    sys.modules.pop("toys_declared", None)


def _files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_the_same_bytes_for_any_number_of_workers(toys, tmp_path):
    stores = {}
    for workers in (0, 1, 2, 4):
        path = tmp_path / f"{workers}.zarr"
        stores[workers] = make_set("toy/points", path, workers=workers, progress=False)
        if workers:  # this process may have loaded other packages, whose versions are noted
            assert _files(path) == _files(tmp_path / "1.zarr")
    seeds = [attrs["seed"] for attrs in stores[4].episode_attrs]
    assert seeds == [seed for seed in range(14) if seed % 7 != 3]  # exactly 12 are kept
    assert len({store_digest(store) for store in stores.values()}) == 1


def test_after_a_kill_it_goes_on_to_the_same_bytes(toys, tmp_path):
    path = tmp_path / "killed.zarr"
    script = f"""
import sys
sys.path[:0] = {[str(p) for p in sys.path if p]!r}
from diffpolicy.rollout.record.making import make_set
make_set("toy/points", {str(path)!r}, episodes=4_000, workers=2, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and _episodes(path) < 8:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    count = _episodes(path) + 6
    assert 14 <= count < 4_000
    again = make_set("toy/points", path, episodes=count, workers=1, progress=False)
    whole = make_set("toy/points", tmp_path / "b.zarr", episodes=count, workers=2, progress=False)
    assert store_digest(again) == store_digest(whole)
    assert again.attrs == whole.attrs
    assert _files(path) == _files(tmp_path / "b.zarr")


def _episodes(path):
    try:
        return EpisodeStore.open(path).num_episodes
    except (FileNotFoundError, ValueError, KeyError):
        return 0  # being made


def test_the_datasheet_is_true(toys):
    store = make_set("toy/points", workers=0, progress=False)
    assert store.path == Path("data/toy/points.zarr")
    sheet = json.loads(sheet_path(store.path, ".json").read_text())
    returns = [store.episode(i)["reward"].sum() for i in range(store.num_episodes)]
    assert sheet["returns"]["mean"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert sheet["returns"]["min"] == pytest.approx(np.min(returns), rel=1e-5)
    assert sheet["episodes"] == {"tried": 14, "kept": 12}
    assert sheet["expert"] == {"tried": 14, "succeeded": 12, "success_rate": 12 / 14}
    assert sheet["seeds"] == {"first": 0, "last": 13}
    assert sheet["sha256"] == store_digest(store)
    assert sheet["maker"] == "toys 1.2"
    assert sheet["command"] == "diffpolicy data make toy/points episodes=12"
    assert sheet["settings"]["noise"] == 0.1
    assert sheet["versions"]["numpy"] == np.__version__
    text = sheet_path(store.path, ".md").read_text()
    assert sheet["sha256"] in text
    assert "12 of 14 succeeded (85.7%)" in text
    before = _files(store.path.parent)
    make_set("toy/points", workers=0, progress=False)  # it is whole, and stays as it is
    assert _files(store.path.parent) == before


def test_a_datasheet_counts_the_episodes_of_each_task(toys):
    arrays = {"obs": np.zeros((4, 2)), "action": np.zeros((4, 1)), "reward": np.zeros(4)}
    recipe = find_recipe("toy/points")
    attrs = {"versions": {}, "maker": "toys 1.2", "recipe": {}}
    store = EpisodeStore.create("a.zarr", {"obs": (2,), "action": (1,), "reward": ()}, attrs=attrs)
    for seed, task in enumerate(["push", "reach", "push"]):
        store.append(arrays, seed=seed, task=task, success=True, **{"return": 0.0})
    assert datasheet(store, "toy/points", recipe, "0")["tasks"] == {"push": 2, "reach": 1}
    store.close()


def test_more_are_appended_and_fewer_or_others_are_refused(toys, tmp_path):
    path = tmp_path / "a.zarr"
    make_set("toy/points", path, episodes=3, workers=0, progress=False)
    more = make_set("toy/points", path, episodes=9, workers=0, progress=False)
    nine = make_set("toy/points", tmp_path / "b.zarr", episodes=9, workers=0, progress=False)
    assert store_digest(more) == store_digest(nine)
    with pytest.raises(ValueError, match="holds 9 episodes, more than 4"):
        make_set("toy/points", path, episodes=4, workers=0, progress=False)
    other = {"reward_scale": 2.0}
    with pytest.raises(ValueError, match="was collected with"):
        make_set("toy/points", path, episodes=9, kwargs=other, workers=0, progress=False)


def test_other_versions_are_no_part_of_a_set(toys, tmp_path):
    path = tmp_path / "a.zarr"
    make_set("toy/points", path, episodes=3, workers=0, progress=False)
    with EpisodeStore.open(path, "a") as store:
        store.update_attrs({"versions": {**store.attrs["versions"], "numpy": "1.0"}})
    with pytest.raises(ValueError, match=r"was begun with numpy 1\.0 \(now"):
        make_set("toy/points", path, episodes=9, workers=0, progress=False)


def test_what_is_recorded_beside_the_observations(toys):
    store = make_set("toy/all", workers=2, progress=False)
    episode = store.episode(0)
    assert store.fields["info.place"].dtype == "float64"
    np.testing.assert_array_equal(episode["info.place"].astype(np.float32), episode["obs"][:, :2])
    assert episode["info.moves"].tolist() == list(range(len(episode["obs"])))
    with pytest.raises(ValueError, match=r"no field \['velocity'\]; it has \['moves', 'place'\]"):
        make_set("toy/wrong", workers=0, progress=False)


def test_a_set_derived_from_another_by_new_rewards(toys):
    store = make_set("toy/near", workers=0, progress=False)
    base = EpisodeStore.open("data/toy/all.zarr")  # made on the way
    assert "info.place" not in store.fields
    text = sheet_path(store.path, ".md").read_text()
    assert "diffpolicy data make toy/near episodes=6\n" in text  # the recipe knows its arguments
    near = np.linalg.norm(base.read("info.place"), axis=1) < 0.5
    np.testing.assert_array_equal(store.read("terminated"), near)
    np.testing.assert_array_equal(store.read("reward"), near - 1.0)
    np.testing.assert_array_equal(store.read("obs"), base.read("obs"))
    first = store.episode_attrs[0]
    assert first["return"] == store.episode(0)["reward"].sum()
    assert first["success"] == bool(near[: store.episode_ends[0]].any())
    assert store.attrs["env_id"].endswith("Point-v0")
    sheet = json.loads(sheet_path(store.path, ".json").read_text())
    assert sheet["settings"]["derived"] == "toy/all"
    assert sheet["made_of"] == {"name": "toy/all", "sha256": store_digest(base)}
    assert sheet["expert"] is None


def test_bad_names_and_experts(toys):
    with pytest.raises(UnknownSetError, match="did you mean 'toy/points'"):
        make_set("toy/point")
    with pytest.raises(AllFailedError, match="none of the 1 episodes was kept"):
        make_set(
            "toy/hopeless",
            kwargs={"fault": {"kind": "raise", "seed": 99_999, "step": 1}},
            workers=0,
            progress=False,
        )


def test_what_breaks_by_chance_is_no_part_of_a_set(toys, tmp_path):
    fault = {"fault": {"kind": "kill", "seed": 2, "step": 1, "once": str(tmp_path / "once")}}
    made = make_set(
        "toy/points", tmp_path / "a.zarr", episodes=4, kwargs=fault, workers=2, progress=False
    )
    assert [attrs["seed"] for attrs in made.episode_attrs] == [0, 1, 2, 4]
    del fault["fault"]["once"]
    with pytest.raises(ValueError, match=r"seed 2 of .*b\.zarr died.*run this again"):
        make_set(
            "toy/points", tmp_path / "b.zarr", episodes=4, kwargs=fault, workers=2, progress=False
        )


def test_packages_that_are_installed_are_trusted_and_others_not(toys, monkeypatch):
    assert stored_env_id("rollout_fake_envs:rollout_fakes/Point-v0", "a file")
    assert stored_env_id("diffpolicy_envs:diffpolicy/PushT-v0", "a file")
    with pytest.raises(EnvSpecError, match=r"branch_fake_envs.*code that you did not choose"):
        stored_env_id("branch_fake_envs:Point-v0", "a file")  # can be imported, is not declared
    assert install_hint("No module named 'toy_simulator'") == ' Try: pip install "toys[sim]"'
    (toys / "toys-1.2.dist-info" / "entry_points.txt").unlink()
    declared.cache_clear()
    with pytest.raises(EnvSpecError, match="code that you did not choose"):
        stored_env_id("rollout_fake_envs:rollout_fakes/Point-v0", "a file")


def test_a_declaration_that_cannot_be_read_costs_the_others_nothing(toys, monkeypatch):
    (toys / "toys_declared.py").write_text("raise RuntimeError('no licence')")
    declared.cache_clear()
    assert "fetch/push" in declared().recipes
    assert declared().broken == {"toys": "toys_declared: RuntimeError: no licence"}
    monkeypatch.setattr(module, "OWN", "no_such_package.declared")
    declared.cache_clear()
    assert "gymnasium" in declared().homes
