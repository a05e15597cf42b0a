"""One process per cache directory; the one that comes second is told who was first."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.store.lock import CacheDirBusy, CacheDirUnusable, DirectoryLock

# Takes the lock, says so, and waits for the end of its standard input.
HOLDER = """
import sys
from pathlib import Path
from proxy.store.lock import DirectoryLock
DirectoryLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def start_holder(path: Path) -> "subprocess.Popen[bytes]":
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_second_process_is_refused_and_told_the_pid_of_the_first(tmp_path: Path) -> None:
    with start_holder(tmp_path / "LOCK") as holder:
        with pytest.raises(CacheDirBusy) as refusal:
            DirectoryLock.acquire(tmp_path / "LOCK")
        assert refusal.value.pid == holder.pid
        assert str(holder.pid) in str(refusal.value)
        assert str(tmp_path) in str(refusal.value)
        assert holder.stdin is not None
        holder.stdin.close()


def test_a_killed_holder_leaves_no_lock_behind(tmp_path: Path) -> None:
    with start_holder(tmp_path / "LOCK") as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock = DirectoryLock.acquire(tmp_path / "LOCK")
    assert (tmp_path / "LOCK").read_text() == f"{os.getpid()}\n"
    lock.release()


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    lock = DirectoryLock.acquire(tmp_path / "LOCK")
    with pytest.raises(CacheDirBusy) as refusal:
        DirectoryLock.acquire(tmp_path / "LOCK")
    assert refusal.value.pid == os.getpid()
    lock.release()


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    first = DirectoryLock.acquire(tmp_path / "LOCK")
    first.release()
    first.release()
    second = DirectoryLock.acquire(tmp_path / "LOCK")
    assert "held" in repr(second)
    second.release()
    assert "free" in repr(second)


def test_a_holder_whose_pid_is_not_legible_is_still_a_holder(tmp_path: Path) -> None:
    lock = DirectoryLock.acquire(tmp_path / "LOCK")
    (tmp_path / "LOCK").write_text("somebody")
    with pytest.raises(CacheDirBusy) as refusal:
        DirectoryLock.acquire(tmp_path / "LOCK")
    assert refusal.value.pid is None
    assert "another process:" in str(refusal.value)
    lock.release()


def test_a_place_where_no_file_can_be_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheDirUnusable) as refusal:
        DirectoryLock.acquire(tmp_path / "file" / "LOCK")
    assert refusal.value.reason == "Not a directory"
    assert str(tmp_path / "file") in str(refusal.value)
