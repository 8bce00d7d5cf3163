"""The doctor compares our table of D4RL's datasets with an installed package's, by path."""

import re
import sys

import pytest

from diffpolicy.commands.doctor import diagnose
from diffpolicy.commands.doctor_checks import check_d4rl_table
from diffpolicy.data.d4rl.catalogue import DATASETS


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package d4rl that cannot be imported, with the table that the real one has."""
    folder = tmp_path / "d4rl"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise Exception('You appear to be missing MuJoCo')\n")
    urls = {name: f"http://example.org/some/folder/{d.file}" for name, d in DATASETS.items()}
    low = {name: d.ref_min for name, d in DATASETS.items() if d.has_score}
    high = {name: d.ref_max for name, d in DATASETS.items() if d.has_score}
    (folder / "infos.py").write_text(
        f"DATASET_URLS = {urls!r}\nREF_MIN_SCORE = {low!r}\nREF_MAX_SCORE = {high!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_equal_tables(package):
    finding = check_d4rl_table()
    assert finding is not None
    assert finding.level == "ok"
    assert finding.message == f"all 155 datasets and 147 reference scores equal those of {package}"
    assert "d4rl" not in sys.modules
    assert finding in diagnose(probe=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "REF_MAX_SCORE['hopper-medium-v2'] = 3000.0",
            "1 datasets differ .*hopper-medium-v2: .*3234.3",
        ),
        ("DATASET_URLS['new-v0'] = 'x/new.hdf5'", "1 datasets differ .*new-v0: None here"),
        ("del DATASET_URLS['pen-human-v1']", "1 datasets differ .*pen-human-v1: .*None there"),
    ],
)
def test_differences_are_named(package, line, message):
    with (package / "infos.py").open("a") as file:
        file.write(line + "\n")
    finding = check_d4rl_table(package)
    assert finding.level == "error"
    assert re.search(message, finding.message)
    assert finding.fix


def test_a_broken_package_is_a_warning(package):
    (package / "infos.py").write_text("raise RuntimeError('no')\n")
    finding = check_d4rl_table(package)
    assert finding.level == "warning"
    assert "RuntimeError: no" in finding.message
    (package / "infos.py").unlink()
    assert check_d4rl_table(package).level == "warning"


def test_nothing_is_said_without_d4rl():
    assert check_d4rl_table() is None
