"""What is installed, what the machine offers, and which known-broken combinations are present.

Versions are read from the packages' metadata: nothing heavy is imported here. torch and MuJoCo are
asked in subprocesses with a time limit, because in a broken environment they hang or crash.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Level = Literal["ok", "info", "warning", "error"]

CORE = ("torch", "numpy", "safetensors", "zarr", "gymnasium", "hydra-core", "tqdm")
OPTIONAL = (
    "mujoco",
    "gymnasium-robotics",
    "gym-pusht",
    "pymunk",
    "stable-baselines3",
    "h5py",
    "matplotlib",
    "imageio-ffmpeg",
    "tensorboard",
    "metaworld",
)
TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tf-nightly")
# Only looked at because of what they break.
TROUBLE = ("d4rl", "mujoco-core", "mujoco-studio", "packaging", *TENSORFLOW)
GL_PACKAGES = {"egl": "libegl1 libegl-mesa0 libgl1-mesa-dri", "osmesa": "libosmesa6"}
TIME_LIMIT = 60.0


class Finding(NamedTuple):
    """One line of the diagnosis.

    Attributes:
        level: ``"ok"``, ``"info"``, ``"warning"`` (something will be missing) or ``"error"``
            (something will fail).
        name: what was looked at.
        message: what was found.
        fix: what to do about it, a command where there is one; empty for ``ok`` and ``info``.
    """

    level: Level
    name: str
    message: str
    fix: str = ""


def installed_versions() -> dict[str, str]:
    """Versions of the packages this module knows about, without importing any.

    Returns:
        Version by distribution name; packages that are not installed are left out.
    """
    versions = {}
    for name in ("diffpolicy", *CORE, *OPTIONAL, *TROUBLE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def mujoco_libraries() -> tuple[str, ...]:
    """File names of the MuJoCo libraries in the installed package's folder, without importing it.

    Returns:
        Names such as ``"libmujoco.so.3.3.0"``; empty where MuJoCo is not installed.
    """
    try:
        folder = Path(str(importlib.metadata.distribution("mujoco").locate_file("mujoco")))
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(sorted(path.name for path in folder.glob("*mujoco*.so*") if path.is_file()))


def _release(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: (2, 13, 0) for "2.13.0+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


class Installation(NamedTuple):
    """What the checks look at.

    Attributes:
        versions: version by distribution name; what is not installed is not in it.
        libraries: file names in the folder of the mujoco package, see `mujoco_libraries`.
    """

    versions: Mapping[str, str]
    libraries: Sequence[str] = ()

    def named(self, name: str) -> str:
        """A package with its version, as messages show it."""
        return f"{name} {self.versions[name]}"

    def below(self, name: str, *bound: int) -> bool:
        """Whether a package is installed in a version before the bound."""
        return name in self.versions and _release(self.versions[name]) < bound

    def from_version(self, name: str, *bound: int) -> bool:
        """Whether a package is installed in the version of the bound or a later one."""
        return name in self.versions and _release(self.versions[name]) >= bound


def check_core(found: Installation) -> Finding | None:
    """Packages without which the library cannot be imported."""
    missing = [name for name in CORE if name not in found.versions]
    if not missing:
        return None
    fix = "pip install --force-reinstall diffpolicy"
    return Finding("error", "core packages", f"not installed: {', '.join(missing)}", fix)


def check_mujoco_robotics(found: Installation) -> Finding | None:
    """MuJoCo >= 3.12 with gymnasium-robotics <= 1.4: Fetch and FrankaKitchen cannot be reset."""
    if not found.from_version("mujoco", 3, 12) or not found.below("gymnasium-robotics", 1, 5):
        return None
    message = (
        f"{found.named('mujoco')} with {found.named('gymnasium-robotics')}: "
        "Fetch and FrankaKitchen fail with an AssertionError in set_joint_qpos"
    )
    fix = 'in a fresh virtual environment: pip install "mujoco>=3.3,<3.12"'
    return Finding("error", "mujoco", message, fix)


def check_mujoco_downgrade(found: Installation) -> Finding | None:
    """MuJoCo 4 downgraded to 3 in place: `import mujoco` fails although `pip check` is content."""
    if "mujoco" not in found.versions or found.from_version("mujoco", 4):
        return None
    leftovers = [name for name in ("mujoco-core", "mujoco-studio") if name in found.versions]
    major = _release(found.versions["mujoco"])[:1]
    for library in found.libraries:
        match = re.search(r"\.so\.(\d+)", library)
        if match and (int(match.group(1)),) != major:
            leftovers.append(library)
    if not leftovers:
        return None
    message = f"{found.named('mujoco')} with remains of another version: {', '.join(leftovers)}"
    fix = (
        "pip uninstall -y mujoco mujoco-core mujoco-studio, delete site-packages/mujoco, "
        'then pip install "mujoco>=3.3,<3.12"; or start from a fresh virtual environment'
    )
    return Finding("error", "mujoco", message, fix)


def check_tensorflow(found: Installation) -> Finding | None:
    """TensorFlow beside Stable-Baselines3: MuJoCo's EGL rendering then segfaults."""
    present = [name for name in TENSORFLOW if name in found.versions]
    if not present or "stable-baselines3" not in found.versions:
        return None
    message = (
        f"{found.named(present[0])} beside stable-baselines3: the latter imports it through "
        "TensorBoard, after which rendering with MUJOCO_GL=egl crashes the process"
    )
    return Finding("warning", "tensorflow", message, f"pip uninstall -y {present[0]}")


def check_pymunk(found: Installation) -> Finding | None:
    """With pymunk >= 7 the collision handlers are gone that gym-pusht registers."""
    if "gym-pusht" not in found.versions or not found.from_version("pymunk", 7):
        return None
    message = f"{found.named('pymunk')}: {found.named('gym-pusht')} needs pymunk < 7"
    return Finding("error", "pymunk", message, 'pip install "pymunk>=6.6,<7"')


def check_d4rl(found: Installation) -> Finding | None:
    """The package d4rl installs but cannot be imported, and pulls an old gym."""
    if "d4rl" not in found.versions:
        return None
    message = (
        f"{found.named('d4rl')} cannot be imported (it wants a MuJoCo 2.1 that pip does not "
        "install); diffpolicy reads its files without it"
    )
    return Finding("warning", "d4rl", message, "pip uninstall -y d4rl")


def check_hydra(found: Installation) -> Finding | None:
    """A hydra-core before 1.3.8 has published security advisories."""
    if not found.below("hydra-core", 1, 3, 8):
        return None
    message = f"{found.named('hydra-core')} is older than 1.3.8, which fixes advisories"
    return Finding("warning", "hydra-core", message, 'pip install "hydra-core>=1.3.8"')


def check_zarr(found: Installation) -> Finding | None:
    """Episode stores need zarr 3."""
    if not found.below("zarr", 3):
        return None
    message = f"{found.named('zarr')} cannot read or write episode stores"
    return Finding("error", "zarr", message, 'pip install "zarr>=3.0.8"')


def check_metaworld(found: Installation) -> Finding | None:
    """Meta-World needs packaging, which it does not declare, and exactly mujoco 3.3.0."""
    if "metaworld" not in found.versions:
        return None
    if "packaging" not in found.versions:
        message = "metaworld imports packaging without declaring it"
        return Finding("error", "metaworld", message, "pip install packaging")
    if _release(found.versions.get("mujoco", "")) != (3, 3, 0):
        message = f"metaworld needs mujoco 3.3.0, found {found.versions.get('mujoco', 'none')}"
        fix = "in a fresh virtual environment: pip install metaworld mujoco==3.3.0"
        return Finding("error", "metaworld", message, fix)
    return None


def check_numpy_torch(found: Installation) -> Finding | None:
    """A torch before 2.3 was built against numpy 1 and cannot exchange arrays with numpy 2."""
    if not found.from_version("numpy", 2) or not found.below("torch", 2, 3):
        return None
    message = f"{found.named('torch')} was built against numpy 1, found {found.named('numpy')}"
    return Finding("error", "numpy", message, 'pip install "torch>=2.6"')


def d4rl_folder() -> Path | None:
    """Where the package d4rl is installed, found without importing it; None where it is not."""
    spec = importlib.util.find_spec("d4rl")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None


def check_d4rl_table(folder: Path | None) -> Finding | None:
    """Compare our table of D4RL's datasets with an installed d4rl package.

    Only its ``infos.py`` is loaded, by path: importing the package itself would fail.

    Args:
        folder: of the package, see `d4rl_folder`.

    Returns:
        ``ok`` if ids, file names and reference scores are equal, ``error`` with the first
        differences, ``warning`` if it cannot be read; None where d4rl is not installed.
    """
    if folder is None:
        return None
    from diffpolicy.data.d4rl.catalogue import DATASETS

    ours = {i: (d.file, d.ref_min, d.ref_max) for i, d in DATASETS.items()}
    try:
        theirs = _d4rl_infos(folder / "infos.py")
    except Exception as error:  # whatever a foreign file may raise
        message = f"{folder / 'infos.py'} cannot be read: {type(error).__name__}: {error}"
        return Finding("warning", "d4rl table", message, "pip install --force-reinstall d4rl")
    different = [i for i in (*ours, *(theirs.keys() - ours)) if ours.get(i) != theirs.get(i)]
    if different:
        first = different[0]
        message = (
            f"{len(different)} datasets differ from {folder}, such as {first}: "
            f"{ours.get(first)} here, {theirs.get(first)} there"
        )
        fix = "do not publish scores of these datasets before it is clear which are right"
        return Finding("error", "d4rl table", message, fix)
    scored = sum(d.has_score for d in DATASETS.values())
    message = f"all {len(ours)} datasets and {scored} reference scores equal those of {folder}"
    return Finding("ok", "d4rl table", message)


def _d4rl_infos(path: Path) -> dict[str, tuple[str, float | None, float | None]]:
    """File name and reference scores by id, as d4rl's own table has them."""
    spec = importlib.util.spec_from_file_location("_d4rl_infos", path)
    assert spec is not None
    assert spec.loader is not None
    infos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(infos)
    low, high = infos.REF_MIN_SCORE, infos.REF_MAX_SCORE
    return {
        name: (url.rpartition("/")[2], low.get(name), high.get(name))
        for name, url in infos.DATASET_URLS.items()
    }


Check = Callable[[Installation], Finding | None]
CHECKS: tuple[Check, ...] = (
    check_core,
    check_mujoco_downgrade,
    check_mujoco_robotics,
    check_tensorflow,
    check_pymunk,
    check_d4rl,
    check_hydra,
    check_zarr,
    check_metaworld,
    check_numpy_torch,
)


def check_installation(found: Installation) -> list[Finding]:
    """Look for every known-broken combination.

    Args:
        found: versions and files of the packages.

    Returns:
        One finding per combination that is present.
    """
    findings = (check(found) for check in CHECKS)
    return [finding for finding in findings if finding is not None]


def check_threads(environ: Mapping[str, str], cores: int) -> Finding:
    """Whether waiting threads will take time from working ones.

    Args:
        environ: environment variables.
        cores: cores this process may use.

    Returns:
        A finding that names the settings.
    """
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS")
    settings = ", ".join(f"{name}={environ.get(name, 'unset')}" for name in names)
    message = f"{cores} cores; {settings}"
    single = environ.get("OMP_NUM_THREADS") == "1"
    if cores <= 8 and not single and environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        message += "; on few or shared cores waiting threads spin (measured: 5 x the CPU time)"
        return Finding("warning", "threads", message, "export OMP_WAIT_POLICY=PASSIVE")
    return Finding("ok", "threads", message)


def check_gl(works: Mapping[str, str], chosen: str | None) -> Finding:
    """Judge the results of trying MuJoCo's headless backends.

    Args:
        works: by backend (``"egl"``, ``"osmesa"``) an empty string where it drew, else the reason.
        chosen: value of ``MUJOCO_GL``, None where it is unset.

    Returns:
        A finding that names the working backends, or the Debian packages that are missing.
    """
    good = [name for name, reason in works.items() if not reason]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in works.items() if reason)
    if not good:
        fix = f"apt-get install {GL_PACKAGES['egl']} (or {GL_PACKAGES['osmesa']})"
        message = f"no headless backend works ({reasons}): no videos of MuJoCo tasks"
        return Finding("warning", "rendering", message, fix)
    if chosen is not None and works.get(chosen):
        message = f"MUJOCO_GL={chosen} does not work ({works[chosen]}), {good[0]} does"
        fix = f"export MUJOCO_GL={good[0]}, or apt-get install {GL_PACKAGES[chosen]}"
        return Finding("warning", "rendering", message, fix)
    now = f"MUJOCO_GL={chosen}" if chosen else f"MUJOCO_GL is unset: export MUJOCO_GL={good[0]}"
    return Finding("ok", "rendering", f"works headless: {', '.join(good)}; {now}")


_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom size=".1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the image is black"
"""

_DEVICES = """
import json, numpy, torch
torch.from_numpy(numpy.zeros(1))
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
if torch.backends.mps.is_available():
    devices.append("mps")
print(json.dumps({"threads": torch.get_num_threads(), "devices": devices}))
"""


def _run(code: str, time_limit: float, **environ: str) -> tuple[str, str]:
    """Run Python code apart.

    Returns:
        Standard output and an empty reason, or what had been printed and why it failed.
    """
    command = [sys.executable, "-c", code]
    env = {**os.environ, **environ}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {time_limit:.0f} s"
    if done.returncode < 0:
        return done.stdout, f"crashed with signal {-done.returncode}"
    if done.returncode:
        # Some packages print further lines after the exception itself.
        lines = [line for line in done.stderr.splitlines() if re.match(r"\w+(\.\w+)*: ", line)]
        return done.stdout, lines[-1][:200] if lines else f"exit status {done.returncode}"
    return done.stdout, ""


def probe_gl(time_limit: float = TIME_LIMIT) -> Finding:
    """Draw one small image with each headless backend of MuJoCo, in subprocesses.

    Args:
        time_limit: seconds for each backend.

    Returns:
        See `check_gl`.
    """
    works = {name: _run(_DRAW, time_limit, MUJOCO_GL=name)[1] for name in GL_PACKAGES}
    return check_gl(works, os.environ.get("MUJOCO_GL"))


def probe_devices(time_limit: float = TIME_LIMIT) -> Finding:
    """Ask torch for its devices, in a subprocess.

    Args:
        time_limit: seconds for importing torch and asking.

    Returns:
        The devices and torch's number of threads, or why torch cannot be used.
    """
    output, reason = _run(_DEVICES, time_limit)
    if reason:
        fix = 'pip install --force-reinstall "torch>=2.6", or start from a fresh environment'
        return Finding("error", "torch", f"cannot be used: {reason}", fix)
    answer = json.loads(output.splitlines()[-1])
    devices = ", ".join(["cpu", *answer["devices"]])
    return Finding("ok", "devices", f"{devices}; torch uses {answer['threads']} CPU threads")


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def diagnose(*, probe: bool = True) -> list[Finding]:
    """Examine this Python environment and machine.

    Args:
        probe: also start torch and MuJoCo in subprocesses (some seconds) to list devices and to
            find out which rendering backend works.

    Returns:
        Findings, in the order they are worth reading.
    """
    versions = installed_versions()
    findings = [Finding("info", "python", f"{platform.python_version()} on {platform.platform()}")]
    findings += [
        Finding("info", name, versions[name])
        for name in ("diffpolicy", *CORE, *OPTIONAL)
        if name in versions
    ]
    absent = [name for name in OPTIONAL if name not in versions]
    if absent:
        findings.append(Finding("info", "not installed (optional)", ", ".join(absent)))
    findings.append(check_threads(os.environ, _available_cores()))
    if probe and "torch" in versions:
        findings.append(probe_devices())
    if probe and "mujoco" in versions:
        findings.append(probe_gl())
    table = check_d4rl_table(d4rl_folder())
    if table is not None:
        findings.append(table)
    known = check_installation(Installation(versions, mujoco_libraries()))
    return findings + (
        known or [Finding("ok", "combinations", "none of the known-broken ones is present")]
    )


def format_findings(findings: Iterable[Finding]) -> str:
    """Findings as text.

    Args:
        findings: what `diagnose` returned.

    Returns:
        One line per finding, its fix on a line of its own below.
    """
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:>7}  {finding.name}: {finding.message}")
        if finding.fix:
            lines.append(f"{'':>7}  fix: {finding.fix}")
    return "\n".join(lines)


def report() -> str:
    """The whole diagnosis of this machine as text, for ``diffpolicy doctor``."""
    return format_findings(diagnose())
