"""Import the optional simulators, or say in one sentence what to install.

The package itself needs gymnasium and numpy alone; each environment asks here for the simulator it
stands on when it is constructed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import re
from types import ModuleType

from gymnasium.error import DependencyNotInstalled


@functools.cache  # a hundred environments of one process would read it twice each
def installed_version(distribution: str) -> tuple[int, ...] | None:
    """Version of an installed distribution as numbers, read without importing it.

    Args:
        distribution: name as pip knows it, such as ``"gymnasium-robotics"``.

    Returns:
        The leading numbers of the version, ``(3, 11, 0)`` for 3.11.0; None if it is not installed.
    """
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_mujoco(mujoco: tuple[int, ...] | None, robotics: tuple[int, ...] | None) -> None:
    """Refuse the pairs of MuJoCo and gymnasium-robotics in which the Fetch robot cannot be reset.

    Args:
        mujoco: version of mujoco, None if it is not installed.
        robotics: version of gymnasium-robotics, None if it is not installed.

    Raises:
        DependencyNotInstalled: one of the two is missing, or they do not work together.
    """
    if mujoco is None or robotics is None:
        missing = "mujoco" if mujoco is None else "gymnasium-robotics"
        raise DependencyNotInstalled(
            f'{missing} is not installed. Run: pip install "diffpolicy[robotics]"'
        )
    if mujoco >= (3, 12) and robotics < (1, 5):
        found = ".".join(map(str, mujoco)), ".".join(map(str, robotics))
        raise DependencyNotInstalled(
            f"the Fetch environments of gymnasium-robotics {found[1]} fail on mujoco {found[0]}: "
            "its joint accessors assert on the arrays that mujoco returns since 3.12. "
            'In a fresh virtual environment run: pip install "mujoco>=3.3,<3.12"'
        )


def check_pymunk(pymunk: tuple[int, ...] | None, pusht: tuple[int, ...] | None) -> None:
    """Refuse the versions of pymunk that gym-pusht cannot use.

    Args:
        pymunk: version of pymunk, None if it is not installed.
        pusht: version of gym-pusht, None if it is not installed.

    Raises:
        DependencyNotInstalled: one of the two is missing, or pymunk is 7 or newer.
    """
    if pymunk is None or pusht is None:
        missing = "pymunk" if pymunk is None else "gym-pusht"
        raise DependencyNotInstalled(
            f'{missing} is not installed. Run: pip install "diffpolicy[pusht]"'
        )
    if pymunk >= (7,):
        raise DependencyNotInstalled(
            f"gym-pusht needs pymunk < 7 (it calls Space.add_collision_handler), found "
            f'{".".join(map(str, pymunk))}. Run: pip install "pymunk>=6.6,<7"'
        )


def import_robotics(*, fetch: bool) -> None:
    """Import gymnasium-robotics, which registers its environments on import.

    Args:
        fetch: the environment is a Fetch robot, which tolerates fewer versions of MuJoCo.

    Raises:
        DependencyNotInstalled: it or MuJoCo is missing, broken, or in the wrong version.
    """
    mujoco, robotics = installed_version("mujoco"), installed_version("gymnasium-robotics")
    # The mazes run on every MuJoCo; compare them against a version that passes.
    check_mujoco(mujoco if fetch or mujoco is None else (3, 3), robotics)
    try:
        importlib.import_module("mujoco")
        # On import the package prints a notice about other environments, once in every worker.
        with contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module("gymnasium_robotics")
    except (ImportError, OSError, AttributeError) as error:
        # OSError: libmujoco.so.4 left over by a downgrade. AttributeError: MUJOCO_GL=osmesa without
        # the library. Both come out of an installed, importable-looking package.
        raise DependencyNotInstalled(
            f"mujoco or gymnasium-robotics is installed but cannot be imported ({error}). "
            'Run "diffpolicy doctor" to learn why; a fresh virtual environment with '
            'pip install "diffpolicy[robotics]" cures most cases.'
        ) from error


def import_pusht() -> ModuleType:
    """Import gym-pusht.

    Returns:
        The module ``gym_pusht.envs``.

    Raises:
        DependencyNotInstalled: it is missing, broken, or pymunk is in the wrong version.
    """
    check_pymunk(installed_version("pymunk"), installed_version("gym-pusht"))
    # pygame otherwise prints a banner to standard output in every worker process.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        return importlib.import_module("gym_pusht.envs")
    except (ImportError, OSError, AttributeError) as error:
        raise DependencyNotInstalled(
            f"gym-pusht is installed but cannot be imported ({error}). "
            'Run: pip install --force-reinstall "diffpolicy[pusht]"'
        ) from error


def import_benchmark(name: str, *modules: str) -> ModuleType:
    """Import a package of benchmarks, and modules of it; the extra of its name installs it.

    Returns:
        The package.

    Raises:
        DependencyNotInstalled: it is missing or broken.
    """
    why = "is not installed"
    if installed_version(name) is not None:
        try:
            for module in modules:
                importlib.import_module(f"{name}.{module}")
            return importlib.import_module(name)
        except (ImportError, OSError, AttributeError) as error:  # as of import_robotics
            why = f"is installed but cannot be imported ({error})"
    raise DependencyNotInstalled(f'{name} {why}. Run: pip install "diffpolicy[{name}]"')
