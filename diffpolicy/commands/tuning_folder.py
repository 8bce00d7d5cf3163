"""The directory of a policy's tuning: whether it may be written, emptied, and what it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from diffpolicy.config import PolicyTuningConfig
from diffpolicy.settings import ConfigError

ROLLOUTS, PREFERENCES, VALUE = "rollouts.zarr", "preferences.jsonl", "value"
PLANS, PLAN_PAIRS = "plans.zarr", "plans.jsonl"
OF_A_ROUND = ("checkpoints", "metrics.csv", ".candidate", "tb", VALUE, PLANS, PLAN_PAIRS)
COLLECTED = (ROLLOUTS, PREFERENCES)
OF_A_RUN = ("policy", "report.json", "report.md", "score_by_nfe.png", "curves.png")


def check_free(config: PolicyTuningConfig) -> None:
    """Raise ``ConfigError`` if a new run would meet what an earlier one has left."""
    run_dir = Path(config.run_dir)
    names = (*OF_A_ROUND, *OF_A_RUN, *(COLLECTED if config.collect is not None else ()))
    if any((run_dir / name).exists() for name in names) or _rounds(run_dir):
        raise ConfigError(
            f"{run_dir} already holds a run; continue it with `diffpolicy resume {run_dir}`, "
            "replace it with overwrite=true, or choose another run_dir"
        )


def clear(run_dir: Path, inputs: Mapping[str, Path]) -> None:
    """Remove everything that an earlier run left, so that nothing of it gets into the next.

    Args:
        run_dir: of the runs.
        inputs: what the next run is to read, by the name of its setting.

    Raises:
        ConfigError: one of ``inputs`` is among what would be removed.
        FileExistsError: answers of a person are.
    """
    found = [run_dir / name for name in (*OF_A_ROUND, *COLLECTED, *OF_A_RUN)]
    found = [path for path in found if path.exists()] + _rounds(run_dir)
    removed = [path.resolve() for path in found]
    for name, path in inputs.items():
        needed = path.resolve()
        if needed == run_dir.resolve() or any(needed.is_relative_to(gone) for gone in removed):
            raise ConfigError(
                f"{name}={path} is a part of the run that overwrite=true would remove; choose "
                "another run_dir, or move it away first"
            )
    if found:
        for folder in (run_dir, *_rounds(run_dir)):
            _check_answers(folder)
    for only_check in (True, False):  # nothing is removed if anything must stay
        for folder in (*_rounds(run_dir), run_dir):
            _remove(folder, only_check=only_check)


def _remove(folder: Path, *, only_check: bool) -> None:
    """Remove what a tuning leaves in one folder, and the folder if nothing else is in it.

    Raises:
        ValueError: something else is in a directory that would be removed.
    """
    from diffpolicy.data.store_layout import clear_target
    from diffpolicy.files import check_owned, remove_owned
    from diffpolicy.training.run_files import clear_run

    clear_run(folder, only_check=only_check)
    if (folder / VALUE).exists():
        _remove(folder / VALUE, only_check=only_check)
    for name in (ROLLOUTS, PLANS):
        clear_target(folder / name, overwrite=True, remove=not only_check)
    (check_owned if only_check else remove_owned)(folder / "policy")
    if not only_check:
        for name in (PREFERENCES, PLAN_PAIRS):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def trained_policy(folder: Path) -> Path:
    """Return the policy of a finished training: its best checkpoint, or without scores the last.

    A ``policy`` beside the checkpoints may be of another training.
    """
    from diffpolicy.training.checkpoint import Snapshots

    return Snapshots(folder / "checkpoints").policy()


def _rounds(run_dir: Path) -> list[Path]:
    return sorted(p for p in run_dir.glob("round_*") if p.name[6:].isdecimal() and p.is_dir())


def _check_answers(folder: Path) -> None:
    """Raise ``FileExistsError`` if a person has judged what is there.

    Answers to questions about a folder's rollouts stand beside them, and are lost without these.
    """
    from diffpolicy.data.preferences.file import PreferenceFileError
    from diffpolicy.learn.plan_pairs import check_replaceable
    from diffpolicy.rollout.record.pairing import check_target

    for file in sorted(folder.glob("*.jsonl")):
        if file.name == PLAN_PAIRS:
            check_replaceable(file)
        elif file.name == PREFERENCES:
            check_target(file)
        elif (folder / ROLLOUTS).exists():
            with contextlib.suppress(PreferenceFileError):  # which is none of ours, and stays
                check_target(file)
