"""Which combinations of installed packages are known to be broken, and what mends them.

Versions are read from the packages' metadata: nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

CORE = (
    *("torch", "numpy", "scipy", "safetensors", "zarr", "filelock", "gymnasium", "hydra-core"),
    "tqdm",
)
OPTIONAL = (
    *("stable-baselines3", "scikit-learn", "websockets", "msgpack", "h5py", "minari", "pyarrow"),
    *("pillow", "onnx", "onnxruntime", "openvino", "matplotlib", "imageio-ffmpeg", "tensorboard"),
)
TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tf-nightly")
# Only looked at because of what they break, or what breaks them.
TROUBLE = (
    *("d4rl", "mujoco", "mujoco-core", "mujoco-studio", "packaging", *TENSORFLOW),
    *("gymnasium-robotics", "gym-pusht", "pymunk", "metaworld"),
)
Level = Literal["ok", "info", "warning", "error"]


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


# ------------------------------------------------------------------------------ known to be broken


class Broken(NamedTuple):
    """A combination of packages that is known to be broken.

    Attributes:
        level: of the finding.
        when: what is installed then, by distribution: ``"<3"``, ``">=3.12"`` or ``"!=3.3.0"``, or
            ``""`` for any version and ``None`` for not installed. The first one is to blame.
        message: what it leads to; ``{name}`` stands for a package with its version.
        fix: what to do about it.
    """

    level: Level
    when: Mapping[str, str | None]
    message: str
    fix: str

    def found(self, versions: Mapping[str, str]) -> Finding | None:
        """Return the finding, if this combination is among the installed ``versions``."""
        if not all(_fits(versions.get(name), bound) for name, bound in self.when.items()):
            return None
        named = {name: f"{name} {versions[name]}" for name in self.when if name in versions}
        return Finding(self.level, next(iter(self.when)), self.message.format_map(named), self.fix)


BROKEN = (
    Broken(
        "error",
        {"mujoco": ">=3.12", "gymnasium-robotics": "<1.5"},
        "{mujoco} with {gymnasium-robotics}: Fetch and FrankaKitchen fail with an AssertionError "
        "in set_joint_qpos",
        'in a fresh virtual environment: pip install "mujoco>=3.3,<3.12"',
    ),
    *(
        Broken(
            "warning",
            {name: "", "stable-baselines3": ""},
            f"{{{name}}} beside stable-baselines3: the latter imports it through TensorBoard, "
            "after which rendering with MUJOCO_GL=egl crashes the process",
            f"pip uninstall -y {name}",
        )
        for name in TENSORFLOW
    ),
    Broken(
        "error",
        {"pymunk": ">=7", "gym-pusht": ""},  # which registers collision handlers that are gone
        "{pymunk}: {gym-pusht} needs pymunk < 7",
        'pip install "pymunk>=6.6,<7"',
    ),
    Broken(
        "warning",
        {"d4rl": ""},
        "{d4rl} cannot be imported (it wants a MuJoCo 2.1 that pip does not install); diffpolicy "
        "reads its files without it",
        "pip uninstall -y d4rl",
    ),
    Broken(
        "warning",
        {"hydra-core": "<1.3.8"},
        "{hydra-core} is older than 1.3.8, which fixes advisories",
        'pip install "hydra-core>=1.3.8"',
    ),
    Broken(
        "error",
        {"zarr": "<3.1.6"},
        "{zarr} cannot read or write episode stores",
        'pip install "zarr>=3.1.6"',
    ),
    Broken(
        "error",
        {"metaworld": "", "packaging": None},
        "metaworld imports packaging without declaring it",
        "pip install packaging",
    ),
    Broken(
        "error",
        {"metaworld": "", "mujoco": "!=3.3.0"},
        "metaworld needs mujoco 3.3.0, found {mujoco}",
        "in a fresh virtual environment: pip install metaworld mujoco==3.3.0",
    ),
    Broken(
        "error",
        {"numpy": ">=2", "torch": "<2.3"},
        "{torch} was built against numpy 1, found {numpy}",
        'pip install "torch>=2.6"',
    ),
)


def check_installation(versions: Mapping[str, str], libraries: Sequence[str] = ()) -> list[Finding]:
    """Look for every known-broken combination.

    Args:
        versions: version by distribution name; what is not installed is not in it.
        libraries: file names in the folder of the mujoco package, see `mujoco_libraries`.

    Returns:
        One finding per combination that is present.
    """
    findings = [
        check_core(versions),
        check_mujoco_downgrade(versions, libraries),
        *(broken.found(versions) for broken in BROKEN),
    ]
    return [finding for finding in findings if finding is not None]


def check_core(versions: Mapping[str, str]) -> Finding | None:
    """Find the packages that are missing and without which the library cannot be imported."""
    missing = ", ".join(name for name in CORE if name not in versions)
    fix = "pip install --force-reinstall diffpolicy"
    return Finding("error", "core packages", f"not installed: {missing}", fix) if missing else None


def check_mujoco_downgrade(versions: Mapping[str, str], libraries: Sequence[str]) -> Finding | None:
    """Find a MuJoCo 4 downgraded to 3 in place: importing fails, though `pip check` is content."""
    if not _fits(versions.get("mujoco"), "<4"):
        return None
    leftovers = [name for name in ("mujoco-core", "mujoco-studio") if name in versions]
    major = versions["mujoco"].partition(".")[0]
    leftovers += [
        library
        for library in libraries
        if (number := re.search(r"\.so\.(\d+)", library)) and number[1] != major
    ]
    if not leftovers:
        return None
    message = f"mujoco {versions['mujoco']} with remains of another version: {', '.join(leftovers)}"
    fix = (
        "pip uninstall -y mujoco mujoco-core mujoco-studio, delete site-packages/mujoco, "
        'then pip install "mujoco>=3.3,<3.12"; or start from a fresh virtual environment'
    )
    return Finding("error", "mujoco", message, fix)


def _fits(version: str | None, bound: str | None) -> bool:
    if version is None or bound is None:
        return version is bound
    number = bound.lstrip("<>!=")
    have, want = release(version), release(number)
    return {"": True, "<": have < want, ">=": have >= want, "!=": have != want}[
        bound.removesuffix(number)
    ]


def release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 13, 0) for "2.13.0+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def installed_versions() -> dict[str, str]:
    """Read the versions of the packages this module knows about, without importing any.

    Returns:
        Version by distribution name; packages that are not installed are left out.
    """
    versions = {}
    for name in ("diffpolicy", *CORE, *OPTIONAL, *TROUBLE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def mujoco_libraries() -> tuple[str, ...]:
    """List the MuJoCo libraries in the installed package's folder, without importing it.

    Returns:
        Names such as ``"libmujoco.so.3.3.0"``; empty where MuJoCo is not installed.
    """
    try:
        folder = Path(str(importlib.metadata.distribution("mujoco").locate_file("mujoco")))
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(sorted(path.name for path in folder.glob("*mujoco*.so*") if path.is_file()))


# --------------------------------------------------------------------------------- D4RL's own table


def check_d4rl_table(folder: Path | None = None) -> Finding | None:
    """Compare our table of D4RL's datasets with an installed d4rl package.

    Only its ``infos.py`` is loaded, by path: importing the package itself would fail.

    Args:
        folder: of the package; by default that of the installed one.

    Returns:
        ``ok`` if ids, file names and reference scores are equal, ``error`` with the first
        differences, ``warning`` if it cannot be read; None where d4rl is not installed.
    """
    if folder is None:
        spec = importlib.util.find_spec("d4rl")
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
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
    infos = runpy.run_path(str(path))
    low, high = infos["REF_MIN_SCORE"], infos["REF_MAX_SCORE"]
    return {
        name: (url.rpartition("/")[2], low.get(name), high.get(name))
        for name, url in infos["DATASET_URLS"].items()
    }
