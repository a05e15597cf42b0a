"""One process that writes per cache directory (its leader), held by `flock` on the file LOCK.

The kernel drops a flock when its holder dies, however it dies, so there is no stale lock to break.
The file itself stays: removing it would let two processes lock two files of the same name. The
process id inside is for the person who reads the refusal. Nobody leads by it: a worker that starts
knows by it only whether it is worth to wait, because the holder is another worker of its service.
"""

import fcntl
import os
from pathlib import Path

# A pid has at most seven digits on Linux; whatever else is in the file is not ours.
_PID_BYTES = 32


class CacheDirError(Exception):
    """The cache directory cannot be had; the text is meant for the person who chose it."""

    def __init__(self, directory: Path, message: str) -> None:
        super().__init__(message)
        self.directory = directory


class CacheDirBusy(CacheDirError):
    """Another process holds the directory. `pid` as it wrote it, None when it is not legible."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        holder = "another process" if pid is None else f"another process (pid {pid})"
        super().__init__(
            directory,
            f"cache directory {directory} is in use by {holder}: "
            "stop that one, or give this one a directory of its own",
        )
        self.pid = pid


class CacheDirUnusable(CacheDirError):
    """The directory cannot be used; `reason` in the words of the system."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(directory, f"cache directory {directory} cannot be used: {reason}")
        self.reason = reason


class DirectoryLock:
    """The exclusive right to a cache directory, until `release` or the end of the process."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd

    @classmethod
    def acquire(cls, path: Path) -> "DirectoryLock":
        """Lock the file at `path`, which is made if missing. Never waits.

        Raises CacheDirBusy when another holder lives (a second holder in this very process is
        one), CacheDirUnusable when the file cannot be opened or locked at all.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CacheDirUnusable(path.parent, error.strerror or str(error)) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            pid = _read_pid(fd)
            os.close(fd)
            raise CacheDirBusy(path.parent, pid) from None
        except OSError as error:
            os.close(fd)
            raise CacheDirUnusable(path.parent, error.strerror or str(error)) from error
        return cls(path, fd)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __repr__(self) -> str:
        return f"<DirectoryLock {self.path} {'free' if self._fd is None else 'held'}>"


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, _PID_BYTES, 0).strip()
    return int(text) if text.isdigit() else None
