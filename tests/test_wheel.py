"""The wheel holds everything: built, installed elsewhere and run from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    pytest.importorskip("hatchling", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder


def run(folder: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_configs_ship_inside(installed):
    text = run(installed, "from diffpolicy.cli import main; main(['train', '--help'])")
    assert "pusht_state_small" in text
    where = run(installed, "import diffpolicy.config_compose as c; print(c.config_dir())").strip()
    assert where == str(installed / "site" / "diffpolicy" / "configs")


def test_both_packages_are_typed_and_environments_register(installed):
    for package in ("diffpolicy", "diffpolicy_envs"):
        assert (installed / "site" / package / "py.typed").is_file()
    out = run(installed, "import diffpolicy_envs; print(diffpolicy_envs.__file__)")
    assert str(installed / "site") in out


def test_what_the_environments_declare_is_found_by_its_entry_point(installed):
    code = """
from diffpolicy.rollout import declared as module
module.OWN = "no_such_package.declared"  # which a checkout on the path needs
print(module.declared().homes["diffpolicy_envs"], "fetch/push" in module.declared().recipes)
"""
    assert run(installed, code).strip() == "Home(distribution='diffpolicy', extra='') True"
