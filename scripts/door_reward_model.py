"""Held-out agreement of a reward model with people who compared demonstrations of a door.

    python scripts/door_reward_model.py data=path/to/adroit_door_human
    python scripts/door_reward_model.py data=... output=door_reward_model.json

The directory has `door_human.npz` (25 demonstrations of the Adroit door) and
`door_human_prefs_unirlhf.npz` (1,348 human choices between segments of 50 steps and 111 ties, of
Uni-RLHF). Folds are split by episode, and segments that go on from one episode into the next are
left out (`crossing=true` keeps them). Of the candidates one is chosen in every fold by the training
episodes alone. `save=DIR` also learns from all pairs and keeps that model.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffpolicy.commands.options import parse
from diffpolicy.data.preferences.published import from_indices
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from reward_validation import RewardCandidate, cross_validate, learn_candidate

DEFAULTS: dict[str, Any] = {
    "data": None,
    "folds": 5,
    "inner_folds": 3,
    "seeds": 3,
    "crossing": False,
    "candidates": None,
    "save": None,
    "output": None,
    "threads": 1,
}
TRAINER = {"steps": 200, "batch_size": 64, "lr": 3e-3, "warmup_steps": 20, "weight_decay": 0.1}


def candidates() -> list[RewardCandidate]:
    """What the training episodes choose from."""
    smooth = {"label_smoothing": 0.05, "ties": True}
    return [
        RewardCandidate("width8", {"width": 8}, {}, TRAINER),
        RewardCandidate("width32", {"width": 32}, {}, TRAINER),
        RewardCandidate("width32-decay", {"width": 32}, {}, {**TRAINER, "weight_decay": 3.0}),
        RewardCandidate("width32-smooth", {"width": 32}, smooth, TRAINER),
    ]


def door_preferences(data: Path, *, crossing: bool) -> PreferenceSet:
    """The demonstrations with their human labels, in memory."""
    demonstrations = np.load(data / "door_human.npz")
    labels = np.load(data / "door_human_prefs_unirlhf.npz")
    fields = {
        "obs": demonstrations["observations"],
        "action": demonstrations["actions"].clip(-1, 1),
        "reward": demonstrations["rewards"],
    }
    store = EpisodeStore.from_arrays(fields, demonstrations["episode_ends"])
    pairs = from_indices(
        store,
        labels["index_1"],
        labels["index_2"],
        labels["human_label"],
        int(labels["seg_len"]),
        raw_index_map=labels["raw_index_map"],
    )
    whole = [p for p in pairs if crossing or len(p.chosen) == len(p.rejected) == 1]
    return PreferenceSet(store, whole)


def table(found: dict[str, Any]) -> str:
    """Markdown: a line per fold, and the pooled figures."""
    lines = [
        "| seed | fold | chosen | train pairs | train acc. | held-out pairs | acc. | log loss |"
    ]
    lines.append("|---" * 8 + "|")
    lines += [
        f"| {row['seed']} | {row['fold']} | {row['chosen']} | {row['train_pairs']} | "
        f"{row['train_accuracy']:.3f} | {row['pairs']:.0f} | {row['accuracy']:.3f} | "
        f"{row['log_loss']:.3f} |"
        for row in found["rows"]
    ]
    seeds = ", ".join(f"{value:.3f}" for value in found["seeds"].values())
    own = found["reward"]
    lines += [
        "",
        f"Held-out accuracy {found['accuracy']:.3f} {_ends(found['interval'])} over "
        f"{found['pairs']} held-out pairs ({found['pairs_distinct']} distinct); seeds {seeds}; "
        f"standard deviation over folds {found['fold_std']:.3f}; log loss {found['log_loss']:.3f}.",
        f"The demonstrations' own reward sums on the same pairs: {own['accuracy']:.3f} "
        f"{_ends(own['interval'])}.",
        f"Chosen: {dict(Counter(row['chosen'] for row in found['rows']))}.",
    ]
    return "\n".join(lines)


def _ends(interval: list[float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def main(arguments: list[str]) -> int:
    """Cross-validate, print, write."""
    options = parse(arguments, [], DEFAULTS)
    if options["data"] is None:
        raise SystemExit("give data=DIRECTORY with door_human.npz and the labels")
    torch.set_num_threads(int(options["threads"]))
    preferences = door_preferences(Path(options["data"]), crossing=options["crossing"])
    names = options["candidates"]
    tried = [c for c in candidates() if names is None or c.name in names]
    if not tried:
        raise SystemExit(f"no such candidates; choose from {[c.name for c in candidates()]}")
    began = time.perf_counter()
    found = cross_validate(
        preferences,
        tried,
        folds=int(options["folds"]),
        seeds=range(int(options["seeds"])),
        inner_folds=int(options["inner_folds"]),
        progress=lambda line: print(line, flush=True),
    )
    print(table(found))
    if options["save"]:
        best = Counter(row["chosen"] for row in found["rows"]).most_common(1)[0][0]
        candidate = next(c for c in tried if c.name == best)
        with tempfile.TemporaryDirectory() as run:
            learn_candidate(candidate, preferences, 0, Path(run) / "run").save(options["save"])
    if options["output"]:
        record = {
            "command": "python scripts/door_reward_model.py " + " ".join(arguments),
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "wall_s": time.perf_counter() - began,
            "trainer": TRAINER,
            **found,
        }
        Path(options["output"]).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
