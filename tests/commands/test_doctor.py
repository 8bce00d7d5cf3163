"""The doctor: every known-broken combination from made-up installations, and one real report."""

import subprocess
import sys

import pytest

from diffpolicy.commands import doctor
from diffpolicy.commands.doctor_benchmarks import Requirement, check_benchmarks
from diffpolicy.commands.doctor_checks import Finding, check_installation

TESTED = {
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
    "scipy": "1.18.1",
    "filelock": "4.3.1",
    "safetensors": "0.8.0",
    "zarr": "3.1.6",
    "gymnasium": "1.4.0",
    "hydra-core": "1.3.8",
    "tqdm": "4.70.1",
    "mujoco": "3.3.0",
    "gymnasium-robotics": "1.4.2",
    "gym-pusht": "0.1.8",
    "pymunk": "6.11.1",
    "stable-baselines3": "2.9.2",
    "packaging": "26.3",
}


def test_the_tested_set_is_fine() -> None:
    versions = {**TESTED, "metaworld": "3.1.1"}
    assert check_installation(versions, ("libmujoco.so.3.3.0",)) == []


@pytest.mark.parametrize(
    ("changes", "level", "message", "fix"),
    [
        ({"mujoco": "3.12.0"}, "error", "mujoco 3.12.0 with gymnasium-robotics 1.4.2", "<3.12"),
        ({"mujoco": "4.0.0", "mujoco-core": "4.0.0"}, "error", "AssertionError", "<3.12"),
        ({"mujoco-core": "4.0.0"}, "error", "remains of another version: mujoco-core", "uninstall"),
        ({"mujoco-studio": "4.0.0"}, "error", "mujoco-studio", "fresh virtual environment"),
        ({"tensorflow": "2.20.0"}, "warning", "EGL|egl", "pip uninstall -y tensorflow"),
        ({"tensorflow-cpu": "2.20.0"}, "warning", "egl", "pip uninstall -y tensorflow-cpu"),
        ({"pymunk": "7.0.1"}, "error", "pymunk 7.0.1", "pymunk>=6.6,<7"),
        ({"d4rl": "1.1"}, "warning", "cannot be imported", "pip uninstall -y d4rl"),
        ({"hydra-core": "1.3.2"}, "warning", "hydra-core 1.3.2", "hydra-core>=1.3.8"),
        ({"zarr": "2.18.7"}, "error", "zarr 2.18.7", "zarr>=3.1.6"),
        ({"metaworld": "3.1.1", "packaging": ""}, "error", "packaging", "pip install packaging"),
        ({"metaworld": "3.1.1", "mujoco": "3.4.0"}, "error", "needs mujoco 3.3.0", "==3.3.0"),
        ({"torch": "2.2.2"}, "error", "numpy 1", "torch>=2.6"),
        ({"safetensors": ""}, "error", "not installed: safetensors", "pip install"),
    ],
)
def test_known_broken_combinations(
    changes: dict[str, str], level: str, message: str, fix: str
) -> None:
    versions = {name: version for name, version in {**TESTED, **changes}.items() if version}
    (finding,) = check_installation(versions)
    assert finding.level == level
    assert any(part in finding.message for part in message.split("|"))
    assert fix in finding.fix


def test_a_library_left_over_by_a_downgrade_is_found() -> None:
    (finding,) = check_installation(TESTED, ("libmujoco.so.3.3.0", "libmujoco.so.4.0.0"))
    assert finding.level == "error"
    assert "libmujoco.so.4.0.0" in finding.message
    assert "libmujoco.so.3.3.0" not in finding.message


@pytest.mark.parametrize(
    "without", ["gymnasium-robotics", "gym-pusht", "stable-baselines3", "mujoco"]
)
def test_a_missing_partner_is_no_conflict(without: str) -> None:
    broken = {**TESTED, "mujoco": "3.12.0", "pymunk": "7.0", "tensorflow": "2.20.0"}
    names = {f.name for f in check_installation(broken)}
    del broken[without]
    fewer = {f.name for f in check_installation(broken)}
    assert len(fewer) == len(names) - 1


def test_threads() -> None:
    assert doctor.check_threads({}, 2).level == "warning"
    assert doctor.check_threads({}, 2).fix == "export OMP_WAIT_POLICY=PASSIVE"
    assert doctor.check_threads({"OMP_WAIT_POLICY": "passive"}, 2).level == "ok"
    assert doctor.check_threads({"OMP_NUM_THREADS": "1"}, 2).level == "ok"
    assert doctor.check_threads({}, 64).level == "ok"


def test_rendering_names_the_debian_packages() -> None:
    nothing = doctor.check_gl({"egl": "no EGL", "osmesa": "no OSMesa"}, None)
    assert nothing.level == "warning"
    assert "libegl1 libegl-mesa0 libgl1-mesa-dri" in nothing.fix
    assert "libosmesa6" in nothing.fix
    chosen = doctor.check_gl({"egl": "", "osmesa": "no OSMesa"}, "osmesa")
    assert chosen.level == "warning"
    assert "export MUJOCO_GL=egl" in chosen.fix
    unset = doctor.check_gl({"egl": "", "osmesa": "no OSMesa"}, None)
    assert unset.level == "ok"
    assert "export MUJOCO_GL=egl" in unset.message
    assert doctor.check_gl({"egl": "", "osmesa": ""}, "egl").level == "ok"


def test_a_subprocess_that_hangs_raises_or_crashes_has_a_reason() -> None:
    assert doctor._run("print(1)", 30.0) == ("1\n", "")
    assert doctor._run("import time; time.sleep(60)", 0.5)[1] == "no answer within 0 s"
    assert doctor._run("raise ValueError('so')", 30.0)[1] == "ValueError: so"
    assert doctor._run("import os; os.abort()", 30.0)[1] == "crashed with signal 6"
    assert doctor._run("raise SystemExit(3)", 30.0)[1] == "exit status 3"


def test_diagnosis_of_this_machine_imports_nothing_heavy() -> None:
    code = """
import sys
from diffpolicy.commands.doctor import diagnose
levels = {finding.level for finding in diagnose(probe=False)}
assert levels <= {"ok", "info", "warning", "error"}
heavy = {"torch", "mujoco", "gymnasium", "hydra", "zarr", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


TOLD = {
    "homes": {
        "gymnasium_robotics": ["diffpolicy", "robotics"],
        "metaworld": ["diffpolicy", "metaworld"],
        "toy_simulator": ["toys", "sim"],
        "gymnasium": ["diffpolicy", ""],
    },
    "sets": [["diffpolicy", "robotics"], ["toys", "sim"], ["toys", "sim"], ["diffpolicy", ""]],
    "broken": {"other": "other_declared: no licence"},
}
REQUIRED = {
    "diffpolicy": (
        'gymnasium-robotics>=1.4.1; extra == "robotics"',
        'mujoco<3.12,>=3.3; extra == "robotics"',
        "mujoco<1; extra == 'other'",
        "zarr<1; python_version < '3'",
    ),
    "metaworld": ("mujoco==3.3", "imageio", "numpy==1.*"),
}


@pytest.mark.parametrize(
    ("mujoco", "level", "message"),
    [
        ("3.3.0", "ok", "gymnasium-robotics 1.4.2; 1 data sets can be made"),
        ("3.12.1", "warning", "mujoco 3.12.1 is not mujoco<3.12,>=3.3"),
    ],
)
def test_simulators_are_there_fit_or_are_installed_so(
    mujoco: str, level: str, message: str
) -> None:
    have = {"gymnasium-robotics": "1.4.2", "metaworld": "3.1.1", "mujoco": mujoco, "numpy": "2.4"}
    read = {name: [Requirement.read(one) for one in texts] for name, texts in REQUIRED.items()}
    robotics, metaworld, toys, other = check_benchmarks(
        TOLD, have.get, lambda name: [one for one in read.get(name, []) if one is not None]
    )
    assert (robotics.level, robotics.message) == (level, message)
    assert metaworld.level == level  # it pins mujoco itself
    assert toys.message == "not installed: toy-simulator (2 data sets need it)"
    assert toys.fix == 'pip install "toys[sim]"'
    assert (other.level, other.message) == ("warning", "other_declared: no licence")


def test_devices_are_listed() -> None:
    finding = doctor.probe_devices()
    assert finding.level == "ok"
    assert finding.message.startswith("cpu")


def test_format() -> None:
    text = doctor.format_findings([Finding("ok", "a", "fine"), Finding("error", "b", "bad", "do")])
    assert text.splitlines() == ["     ok  a: fine", "  error  b: bad", "         fix: do"]


@pytest.mark.mujoco
def test_report_names_versions_and_rendering() -> None:
    pytest.importorskip("mujoco", exc_type=ImportError)
    text = doctor.format_findings(doctor.diagnose())
    assert "[mujoco]: mujoco 3." in text
    assert "data sets can be made" in text
    assert "rendering: " in text
    assert "combinations: none" in text
