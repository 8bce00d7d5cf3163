"""Files and directories at every kill point, foreign files, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from diffpolicy import files, locks
from diffpolicy.files import (
    ForeignFilesError,
    atomic_file,
    remove_leftovers,
    remove_owned,
    replaced_directory,
    settled,
    write_atomic,
)
from diffpolicy.locks import BusyError, WriterLock

DEAD = f"{locks.machine()}-4194304-1-0"  # a process number that Linux never gives


def run(code: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *more], stdout=subprocess.PIPE, text=True
    )


def make(path: Path, content: str) -> None:
    with replaced_directory(path) as new:
        (new / "part").mkdir()
        (new / "part" / "a").write_text(content)
        (new / "b").write_text(content)


def contents(path: Path) -> set[str]:
    place = settled(path)
    return {(place / "part" / "a").read_text(), (place / "b").read_text()}


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    target = write_atomic(tmp_path / "new" / "x.json", "old")
    with contextlib.suppress(RuntimeError), atomic_file(target) as partial:
        assert partial.suffix == ".json"
        partial.write_text("ne")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["x.json"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*x\.json"), atomic_file(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_behind_a_link_is_replaced_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


@pytest.mark.parametrize("foreign", ["thesis.tex", "part/notes", "data/", "deep/er/x", "link"])
def test_directories_with_foreign_files_stay_as_they_are(tmp_path: Path, foreign: str) -> None:
    make(tmp_path / "mine", "old")
    place = tmp_path / "mine" / foreign
    place.parent.mkdir(exist_ok=True, parents=True)
    if foreign == "link":
        place.symlink_to(tmp_path)
    elif foreign == "data/":
        place.mkdir()
    else:
        place.write_text("x")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(ForeignFilesError, match=foreign):
        make(tmp_path / "mine", "new")
    with pytest.raises(ForeignFilesError, match=foreign):
        remove_owned(tmp_path / "mine")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert contents(tmp_path / "mine") == {"old"}


def test_what_is_put_there_while_we_write_stays(tmp_path: Path) -> None:
    make(tmp_path / "mine", "old")
    with pytest.raises(ForeignFilesError), replaced_directory(tmp_path / "mine"):
        (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert {p.name for p in (tmp_path / "mine").iterdir()} >= {"thesis.tex", "b"}


@pytest.mark.parametrize("manifest", ["{}", '{"files": {"thesis.tex": {}}, "sha256": "0"}', "["])
def test_only_our_manifest_is_a_proof(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "mine" / "MANIFEST.json").write_text(manifest)
    with pytest.raises(ForeignFilesError, match=r"thesis\.tex"):
        make(tmp_path / "mine", "new")


def test_own_and_empty_directories_are_replaced_and_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for content in ("one", "two"):
        make(tmp_path / "mine", content)
        assert contents(tmp_path / "mine") == {content}
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    remove_owned(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_every_kill_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Die before the n-th system call that changes something, for each n."""
    target, seen = tmp_path / "mine", set()
    make(target, "old")
    for n in range(100):
        status = killed_before(n, lambda: make(target, "new"))
        found = contents(target)
        assert found in ({"old"}, {"new"}), n
        seen |= found
        if status == 0:
            break
        make(target, "old")
        assert [p.name for p in tmp_path.iterdir()] == ["mine"], n  # nothing is left for ever
    assert (status, n > 10, seen) == (0, True, {"old", "new"})


def killed_before(count: int, work: Callable[[], None]) -> int:
    """Do ``work`` in a forked process that dies before change ``count`` of the file system."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = itertools.count(count, -1)
    changes = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open")

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in changes and next(left) == 0:
            os._exit(9)

    sys.addaudithook(watch)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("mover", [DEAD, "0badcafe-4194304-1-0"])
def test_what_was_moved_aside_and_not_put_back_is_replaced_in_its_place(
    tmp_path: Path, mover: str
) -> None:
    make(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / f".x.old-{mover}")
    assert contents(tmp_path / "x") == {"old"}
    make(tmp_path / "x", "new")
    assert (tmp_path / "x" / "b").read_text() == "new"
    assert contents(tmp_path / "x") == {"new"}


def test_only_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    mine = files._beside(tmp_path / "x", "partial").name
    stay = {mine, ".x.partial-0badcafe-4194304-1-0", ".x.partial", ".git", f".y.old-{DEAD}"}
    for name in {*stay, f".x.partial-{DEAD}", f".x.gone-{DEAD}"}:
        (tmp_path / name).mkdir()
    (tmp_path / f".z.png.partial-{DEAD}.png").write_text("x")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == stay


HOLD = """
    import sys, time
    from diffpolicy.locks import WriterLock
    lock = WriterLock(sys.argv[1], "training").acquire()
    print("held", flush=True)
    time.sleep(60)
    """


def test_a_lock_names_its_holder_and_survives_its_crash(tmp_path: Path) -> None:
    with run(HOLD, str(tmp_path / "run")) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"process {child.pid} on .* is training since"):
            WriterLock(tmp_path / "run").acquire()
        child.kill()
    with WriterLock(tmp_path / "run"):
        assert (tmp_path / ".run.lock").exists()
    assert not list(tmp_path.iterdir())


def test_one_thread_may_take_its_lock_again_and_forks_and_other_threads_do_not_have_it(
    tmp_path: Path,
) -> None:
    outer = WriterLock(tmp_path / "run", "training").acquire()
    with WriterLock(tmp_path / "run"):
        pass
    assert (tmp_path / ".run.lock").exists()
    with (
        ThreadPoolExecutor(1) as other,
        pytest.raises(BusyError, match="another thread of this process is training"),
    ):
        other.submit(WriterLock(tmp_path / "run").acquire).result()
    if (pid := os.fork()) == 0:
        outer.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert (tmp_path / ".run.lock").exists()
    del outer  # forgotten: given back
    assert not (tmp_path / ".run.lock").exists()


def test_a_lock_without_a_name_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without kernel locks the file is the lock, and its text is filelock's."""
    monkeypatch.setattr(locks, "FileLock", filelock.SoftFileLock)
    with (
        ThreadPoolExecutor(1) as other,
        WriterLock(tmp_path / "run"),
        pytest.raises(BusyError, match=r"If nothing writes there, remove .*"),
    ):
        other.submit(WriterLock(tmp_path / "run").acquire).result()
    assert not list(tmp_path.iterdir())


def test_a_directory_beside_which_nothing_can_be_written_is_locked_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(locks.os, "access", lambda path, mode: Path(path) != tmp_path)
    with WriterLock(tmp_path / "run"):
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    assert not list((tmp_path / "run").iterdir())


def test_two_processes_never_write_at_once(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from diffpolicy.locks import WriterLock
        file = Path(sys.argv[1])
        for _ in range(20):
            with WriterLock(file, wait_s=60):
                file.write_text(str(int(file.read_text()) + 1))
        """
    (tmp_path / "count").write_text("0")
    children = [run(code, str(tmp_path / "count")) for _ in range(3)]
    for child in children:
        child.communicate(timeout=60)
    assert (tmp_path / "count").read_text() == "60"


def test_a_lock_under_which_nothing_was_written_leaves_no_trace(tmp_path: Path) -> None:
    with WriterLock(tmp_path / "a" / "b" / "run"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with WriterLock(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "mine").write_text("x")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine"]
    with pytest.raises(NotADirectoryError, match="is a file"), WriterLock(tmp_path / "a/mine/run"):
        pass
