"""``--multirun``: one command for every combination of values, by Hydra's own sweeper and launcher.

diffpolicy train experiment=demo --multirun seed=0,1,2 trainer.lr=1e-3,1e-4
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from unittest.mock import patch

from diffpolicy.config import run_kind
from diffpolicy.config_compose import (
    config_dir,
    keys_given,
    normal_override,
    own_config_dir,
    quoted,
)

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FLAGS = ("--multirun", "-m")


def asked(arguments: Sequence[str]) -> bool:
    """Whether a sweep is asked for."""
    return any(flag in arguments for flag in FLAGS)


def multirun(command: str, arguments: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Run a command once for every combination of the values that commas part.

    Launchers and sweepers are Hydra's (``hydra/launcher=joblib``, once its plug-in is installed).
    A run's directory ends in what distinguishes it: with ``seed=0,1``, ``runs/demo_seed0`` and
    ``runs/demo_seed1``.

    Args:
        command: ``"train"``, ``"tune"`` or ``"prefer"``.
        arguments: of the command.
        run: the command, of one combination.

    Returns:
        The worst exit status of the runs of this process.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    shown = [a for a in arguments if a == "--print-config"]
    given = [a for a in arguments if a not in (*FLAGS, *shown)]
    swept = [key for key, text in keys_given(given).items() if _parsed(text).is_sweep_override()]
    firsts = {k: v.split(",")[0] if k in swept else v for k, v in keys_given(given).items()}
    kind = run_kind(command, [f"{key}={value}" for key, value in firsts.items()])
    statuses = [0]

    def job(_config: object) -> None:
        values = keys_given(HydraConfig.get().overrides.task)
        plain = {key: str(_parsed(text).value()) for key, text in values.items()}
        local = HydraConfig.get().runtime.choices["hydra/launcher"] == "basic"
        GlobalHydra.instance().clear()  # the command composes its configuration itself
        named = [key for key in (*swept, "seed") if key in plain and key != "run_dir"]
        ends = "".join(f"_{_short(key)}{_short(plain[key])}" for key in dict.fromkeys(named))
        folder = plain.pop("run_dir", "runs/${name}") + ends
        overrides = [f"{key}={text}" for key, text in values.items() if key != "run_dir"]
        overrides.append(f"run_dir={quoted(folder)}")
        print(f"diffpolicy {command} {' '.join(overrides)}", flush=True)
        try:
            status = run([*overrides, *shown])
        except (ValueError, OSError) as error:  # the others are run all the same
            if not local:
                raise  # a launcher of other processes tells of it
            print(f"diffpolicy {command}: {error}", file=sys.stderr)
            status = 1
        if status in (130, 143):  # the trainer keeps what it has, and the sweep ends with it
            raise KeyboardInterrupt
        statuses.append(status)

    own = own_config_dir()
    settings = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    settings += ["hydra.sweep.dir=runs/multirun"]
    settings += [] if own is None else [f"hydra.searchpath=[{quoted(f'file://{own}')}]"]
    normal = [normal_override(a, sweep=True) for a in given]
    name = kind.replace(" ", "_")
    main = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)
    with patch.object(sys, "argv", [f"diffpolicy {command}", "--multirun", *settings, *normal]):
        main()
    return max(statuses)


def _short(value: object) -> str:
    """A key or a value as a part of a directory's name."""
    last = str(value).rstrip("/").rpartition("/")[2]
    last = last.rpartition(".")[2] if last.replace(".", "").replace("_", "").isalpha() else last
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last)


def _parsed(text: str) -> Override:
    """What Hydra makes of a value; as plain text where it cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    try:
        return parser.parse_override(f"key={text}")
    except HydraException:
        return parser.parse_override(f"key={quoted(text)}")
