"""``--multirun``: one command for every combination of values, by Hydra's own sweeper and launcher.

diffpolicy train experiment=demo --multirun seed=0,1,2 trainer.lr=1e-3,1e-4
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from unittest.mock import patch

from diffpolicy.config import run_kind
from diffpolicy.config_compose import (
    config_dir,
    keys_given,
    normal_override,
    own_config_dir,
    quoted,
)

FLAGS = ("--multirun", "-m")


def asked(arguments: Sequence[str]) -> bool:
    """Whether a sweep is asked for."""
    return any(flag in arguments for flag in FLAGS)


def multirun(command: str, arguments: Sequence[str], run: Callable[[Sequence[str]], int]) -> int:
    """Run a command once for every combination of the values that commas part.

    Launchers and sweepers are Hydra's (``hydra/launcher=joblib``, once its plug-in is installed).
    A run's directory ends in what distinguishes it, unless ``run_dir`` is given: with
    ``seed=0,1``, ``runs/demo_seed0`` and ``runs/demo_seed1``.

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

    given = [a for a in arguments if a not in FLAGS]
    swept = [key for key, text in keys_given(given).items() if _is_sweep(text)]
    firsts = {k: v.split(",")[0] if k in swept else v for k, v in keys_given(given).items()}
    kind = run_kind(command, [f"{key}={value}" for key, value in firsts.items()])
    statuses = [0]

    def job(_config: object) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        GlobalHydra.instance().clear()  # the command composes its configuration itself
        if "run_dir" not in keys_given(overrides):
            values = keys_given(overrides)
            ends = "".join(f"_{key.split('.')[-1]}{values[key]}" for key in swept if key in values)
            overrides.append(f"run_dir='runs/${{name}}{ends}'")
        print(f"diffpolicy {command} {' '.join(overrides)}", flush=True)
        try:
            statuses.append(run(overrides))
        except (ValueError, OSError) as error:  # the others are run all the same
            print(f"diffpolicy {command}: {error}", file=sys.stderr)
            statuses.append(1)

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


def _is_sweep(text: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return bool(OverridesParser.create().parse_override(f"key={text}").is_sweep_override())
    except HydraException:
        return False
