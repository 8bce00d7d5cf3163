"""Bundles: round trip, damage, and a kill at every point of a write."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffpolicy import locks
from diffpolicy.files import ForeignFilesError
from diffpolicy.training import checkpoint
from diffpolicy.training.checkpoint import (
    CheckpointError,
    Snapshots,
    read_bundle,
    read_pointer,
    write_bundle,
)
from diffpolicy.training.saved import find_bundle

FILES = {
    "config.json": {"a": [1, 2.5, None]},
    "sub/w.safetensors": {"x": torch.arange(6.0).view(2, 3)},
}


def test_round_trip_also_from_inside(tmp_path):
    write_bundle(tmp_path / "b", FILES)
    back = read_bundle(tmp_path / "b")
    assert back["config.json"] == FILES["config.json"]
    assert torch.equal(back["sub/w.safetensors"]["x"], FILES["sub/w.safetensors"]["x"])
    assert torch.equal(
        read_bundle(tmp_path / "b" / "sub")["w.safetensors"]["x"], FILES["sub/w.safetensors"]["x"]
    )
    write_bundle(tmp_path / "b", {"other.json": 1})
    assert read_bundle(tmp_path / "b") == {"other.json": 1}


@pytest.mark.parametrize("name", ["config.json", "sub/w.safetensors", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_kind_of_damage_is_one_clear_error(tmp_path, name, damage):
    write_bundle(tmp_path / "b", FILES)
    file = tmp_path / "b" / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x55
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=Path(name).name):
        read_bundle(tmp_path / "b")


class Killed(BaseException):
    pass


def test_killed_at_every_system_call_last_always_loads(tmp_path, monkeypatch):
    """Every fsync, rename and replace of a save is a point where the process may die."""
    calls = {"left": -1}

    def dying(original):
        def wrapped(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(checkpoint.Path, "rename", dying(Path.rename))
    monkeypatch.setattr(checkpoint.Path, "replace", dying(Path.replace))
    snapshots = Snapshots(tmp_path / "checkpoints")
    snapshots.save(1, FILES, {}, is_best=True)
    point, step = 0, 1
    while True:
        point, step = point + 1, step + 1
        calls["left"] = point
        try:
            snapshots.save(step, FILES, FILES, is_best=step % 2 == 0)
        except Killed:
            calls["left"] = -1
            assert int(read_pointer(tmp_path / "checkpoints" / "last")) in range(1, step + 1)
            assert snapshots.load_last()["config.json"] == FILES["config.json"]
            read_bundle(tmp_path / "checkpoints" / read_pointer(tmp_path / "checkpoints" / "best"))
            continue
        break
    assert point > 10
    assert not [
        p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".") and p.is_dir()
    ]


LOOP = """
import sys, torch
from pathlib import Path
from diffpolicy.training.checkpoint import Snapshots
snapshots, step = Snapshots(Path(sys.argv[1])), 0
while True:
    step += 1
    files = {"w.safetensors": {"x": torch.full((50_000,), float(step))}, "state.json": {"n": step}}
    snapshots.save(step, files, {}, is_best=False)
"""


def test_sigkill_while_writing(tmp_path):
    folder = tmp_path / "checkpoints"
    for number in range(4):
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(folder)])
        old = read_pointer(folder / "last")
        while read_pointer(folder / "last") in (None, old):
            time.sleep(0.005)
        time.sleep(0.05 + 0.013 * number)
        process.kill()
        process.wait()
        files = Snapshots(folder).load_last()
        assert torch.equal(
            files["w.safetensors"]["x"], torch.full((50_000,), float(files["state.json"]["n"]))
        )


def test_a_bundle_replaces_only_a_bundle_of_its_kind(tmp_path):
    policy, value = ({"config.json": {"format": name}} for name in ("policy", "value"))
    write_bundle(tmp_path / "mine", policy)
    write_bundle(tmp_path / "mine", policy)
    snapshots = Snapshots(tmp_path / "run" / "checkpoints")
    snapshots.save(1, FILES, policy, is_best=True)
    checkpoint_1 = snapshots.folder / "0000001"
    places = (tmp_path / "run", snapshots.folder, checkpoint_1, checkpoint_1 / "policy")
    for place in places:
        with pytest.raises(ForeignFilesError):
            write_bundle(place, policy)
    with pytest.raises(ForeignFilesError, match="a policy, which a value does not replace"):
        write_bundle(tmp_path / "mine", value)
    assert snapshots.load_last()["config.json"] == FILES["config.json"]


def test_pruning_leaves_what_others_write_or_keep_there(tmp_path):
    snapshots = Snapshots(tmp_path, keep_last=1)
    stay = {"backup", ".git", f".0000009.partial-{locks.machine()}-{os.getppid()}-0-0"}
    for name in stay:
        (tmp_path / name).mkdir()
    dead = tmp_path / f".0000009.partial-{locks.machine()}-4194304-1-0"
    dead.mkdir()
    for step in range(1, 4):
        snapshots.save(step, FILES, {}, is_best=False)
        (tmp_path / "0000001" / "notes.txt").write_text("mine")
    left = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert left == {*stay, "0000001", "0000003"}


def test_while_the_best_is_not_known_none_is_pruned(tmp_path):
    snapshots = Snapshots(tmp_path, keep_last=1)
    state = {"state.json": {"best_score": 0.5}}
    snapshots.save(1, state, {}, is_best=True)
    (tmp_path / "best").write_bytes(b"\xff")
    for step in (2, 3):
        snapshots.save(step, state, {}, is_best=False)
    with pytest.raises(CheckpointError, match=r"best is damaged.*0000003 is intact"):
        snapshots.policy()
    (tmp_path / "best").write_text("0000001\n")
    snapshots.save(4, state, {}, is_best=False)
    assert snapshots._names() == ["0000001", "0000004"]


def test_a_run_stands_for_its_checkpoints_and_never_for_another(tmp_path):
    mine, other = ({"config.json": {"format": "policy", "n": n}} for n in (1, 2))
    snapshots = Snapshots(tmp_path / "checkpoints", keep_last=5)
    for step in (1, 2, 3):
        state = {"state.json": {"best_score": 0.5}}
        snapshots.save(step, state, mine, is_best=step == 1)
    write_bundle(tmp_path / "policy", other)

    def found():
        return find_bundle(tmp_path, "policy", "policy")

    assert found() == snapshots.folder / "0000001" / "policy"
    assert find_bundle(tmp_path / "policy", "policy", "policy") == tmp_path / "policy"
    file = snapshots.folder / "0000001" / "policy" / "config.json"
    whole = file.read_bytes()
    for damage in (b"", b"[" + whole[1:], None):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"config\.json.* is damaged"):
            found()
        file.write_bytes(whole)
    (snapshots.folder / "best").write_text("0000009")
    with pytest.raises(CheckpointError, match=r"0000009.*0000003 is intact: write.*best"):
        found()
    (snapshots.folder / "best").unlink()
    with pytest.raises(CheckpointError, match="best is missing"):
        found()


def test_a_policy_saved_over_another_is_loadable_at_every_kill_point(tmp_path, monkeypatch):
    old, new = ({"config.json": {"format": "policy", "n": n}} for n in (1, 2))
    rename = Path.rename
    for point in range(1, 4):
        write_bundle(tmp_path / "mine", old)
        with monkeypatch.context() as dying:
            left = iter(range(point, -9, -1))

            def killed(self, target, left=left):
                if next(left) <= 1:
                    raise Killed
                return rename(self, target)

            dying.setattr(Path, "rename", killed)
            with contextlib.suppress(Killed):
                write_bundle(tmp_path / "mine", new)
        read_bundle(find_bundle(tmp_path / "mine", "policy", "policy"))
