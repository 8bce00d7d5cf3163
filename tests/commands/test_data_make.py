"""`diffpolicy data make`: the list, a small set, and what is said of wrong arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffpolicy import cli
from diffpolicy.commands.demonstrations import _with_cameras
from diffpolicy.data.store import EpisodeStore
from diffpolicy.rollout import declared as module


def test_the_list_needs_no_simulator():
    code = """
import sys
for name in ("mujoco", "gymnasium_robotics", "gym_pusht", "pymunk", "metaworld", "torch"):
    sys.modules[name] = None
from diffpolicy import cli
sys.exit(cli.main(["data", "make", "--list", "fetch"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fetch/pick-and-place" in done.stdout
    assert "pusht/script" not in done.stdout


def test_the_list_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(
        "diffpolicy.commands.demonstrations.installed", lambda module: module != "gym_pusht"
    )
    assert cli.main(["data", "make", "--list"]) == 0
    out = capsys.readouterr().out
    assert '2 of them need: pip install "diffpolicy[pusht]"' in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["pusht/script"].endswith("(to be installed)")
    assert not lines["fetch/push"].endswith("(to be installed)")
    assert cli.main(["data", "make", "--list", "nothing"]) == 1


def test_every_recipe_names_an_environment_and_an_extra_that_there_are():
    known = module.declared()
    extras = {home.extra for home in known.homes.values()}
    for name, recipe in known.recipes.items():
        assert recipe.extra in extras, name
        assert recipe.env.partition(":")[0] in known.homes, name
        assert recipe.minutes > 0, name
        assert recipe.megabytes > 0, name
        assert recipe.derived is None or recipe.derived in known.recipes, name
        assert recipe.episodes + recipe.seeds_from < 100_000, name


def test_help_and_list_are_of_what_was_asked_for(capsys):
    assert cli.main(["data", "make", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: diffpolicy data make NAME")
    assert "cameras=null" in out
    assert "convert" not in out
    assert cli.main(["data", "make", "fetch/push", "--list"]) == 0
    assert "1 sets" in capsys.readouterr().out
    assert cli.main(["data", "--help"]) == 0
    assert "diffpolicy data convert" in capsys.readouterr().out


def test_arguments(capsys):
    assert cli.main(["data", "make", "fetch/pusch"]) == 1
    assert "did you mean 'fetch/push'?" in capsys.readouterr().err
    assert cli.main(["data", "make", "fetch/push", "episode=3"]) == 1
    assert "did you mean 'episodes'?" in capsys.readouterr().err
    assert cli.main(["data", "make", "fetch/push", "cameras=front"]) == 1
    assert "cameras is a table or a list" in capsys.readouterr().err
    wrongs = {"episodes=two": "a whole number", "base=x.zarr": "leave out base"}
    wrongs |= {"size=64": "leave it out", "cameras=[]": "cameras is a table or a list"}
    for wrong, why in wrongs.items():
        assert cli.main(["data", "make", "fetch/push", wrong]) == 1
        assert why in capsys.readouterr().err
    of = {"kwargs": {"speed": 2}, "cameras": ["corner2"], "size": 64}
    assert _with_cameras(of) == {
        "speed": 2,
        "cameras": {"corner2": {"size": 64, "view": "corner2"}},
    }


@pytest.mark.mujoco
def test_a_set_of_a_simulator_and_the_same_by_another_number_of_workers(tmp_path, capsys):
    pytest.importorskip("gymnasium_robotics", exc_type=ImportError)
    for workers in (0, 2):
        out = f"out={tmp_path / str(workers)}.zarr"
        assert (
            cli.main(["data", "make", "fetch/reach", out, "episodes=2", f"workers={workers}"]) == 0
        )
        assert "2 of 2 succeeded" in capsys.readouterr().out
    one, two = (EpisodeStore.open(tmp_path / f"{workers}.zarr") for workers in (0, 2))
    assert one.read("obs").tobytes() == two.read("obs").tobytes()
    sheets = [(tmp_path / f"{workers}.datasheet.json").read_text() for workers in (0, 2)]
    assert sheets[0] == sheets[1]
