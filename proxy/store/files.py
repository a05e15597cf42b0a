"""The files of a cache directory: where each lies, and the steps that are done to one.

What is here knows neither fills nor readers nor what is held: it takes paths and descriptors, and
most of it is called in a thread. The order of the steps, and what a crash between two of them
leaves, is told in blobs.py. The calls that a full or dying disk fails are in `Disk`, so that a test
can fail them.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from proxy.oci.digest import Chunk, Digest
from proxy.store.counted import remove_count
from proxy.store.durability import Durability, is_marked

# The kernel takes so many buffers in one call (IOV_MAX).
_BUFFERS = 1024
# Bytes of a file that are read and hashed at once.
HASH_STEP = 1 << 20


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the file system of `directory`."""
    figures = os.statvfs(directory)
    return figures.f_bavail * figures.f_frsize


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Disk:
    """The calls that a full or dying disk fails, in the order of the write protocol."""

    free: Callable[[Path], int] = free_bytes
    write: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    sync: Callable[[int], None] = os.fsync
    rename: Callable[[Path, Path], None] = os.replace
    sync_directory: Callable[[Path], None] = sync_directory
    unlink: Callable[[Path], None] = os.unlink


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a cache directory."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "LOCK"

    @property
    def index(self) -> Path:
        return self.root / "index.db"

    @property
    def boot(self) -> Path:
        """During which boot all that is marked was written or proved (durability.py)."""
        return self.root / "BOOT"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    def blob(self, digest: Digest) -> Path:
        """Two hex digits of fan-out keep directories short; the name is the digest itself."""
        return self.blobs / digest.algorithm / digest.hex[:2] / digest.hex


@dataclass(frozen=True, slots=True)
class StagingFile:
    """The open descriptors of a fill: one that writes, one that readers duplicate."""

    path: Path
    writer: int
    reader: int

    @classmethod
    def create(cls, path: Path, durability: Durability = Durability.FULL) -> "StagingFile":
        """Make the file, which must not exist. Raises OSError and leaves nothing then."""
        flags, mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, durability.mode
        try:
            writer = os.open(path, flags, mode)
        except FileNotFoundError:  # somebody has emptied the cache directory under us
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = os.open(path, flags, mode)
        return cls.beside(path, writer)

    @classmethod
    def beside(cls, path: Path, writer: int) -> "StagingFile":
        """The file that `writer` writes. Raises OSError; then neither is left."""
        try:
            reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(writer)
            os.unlink(path)
            raise
        return cls(path, writer, reader)

    def close(self) -> None:
        os.close(self.writer)
        os.close(self.reader)


# In a thread


def write_at(
    write: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    chunks: Sequence[Chunk],
    offset: int,
) -> None:
    """Write all chunks from `offset` on, however little the kernel takes at a time."""
    left = [memoryview(chunk) for chunk in chunks if chunk]
    while left:
        taken = write(fd, left[:_BUFFERS], offset)
        if taken <= 0:
            raise OSError(errno.EIO, "the file takes no bytes")
        offset += taken
        while left and taken >= len(left[0]):
            taken -= len(left.pop(0))
        if taken:
            left[0] = left[0][taken:]


def store_file(
    disk: Disk, file: StagingFile, target: Path, durability: Durability
) -> OSError | None:
    """The steps that make a staging file a blob. Raises OSError when it is not one afterwards.

    Returns the error of the last step, which does no harm: a name that a power cut takes away is
    a blob to be fetched again, never a short one.
    """
    # A file system that keeps no mark (vfat, say) could not tell the next start what to doubt.
    if durability is not Durability.NONE or not is_marked(os.fstat(file.writer).st_mode):
        disk.sync(file.writer)
    target.parent.mkdir(parents=True, exist_ok=True)
    disk.rename(file.path, target)
    with contextlib.suppress(OSError):  # it says nothing any more: the next start removes it
        remove_count(file.path)
    if durability is not Durability.FULL:
        return None
    try:
        disk.sync_directory(target.parent)
    except OSError as error:
        return error
    return None


def open_blob(path: Path, size: int) -> BinaryIO | None:
    """Open a stored blob; None when the file does not have the size that it should."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 -- handed to a lease
    if os.fstat(file.fileno()).st_size == size:
        return file
    file.close()
    return None


def read_blob(path: Path, digest: Digest) -> bytes | None:
    """All bytes of a small blob; None when they are not (any more) what the name says."""
    data = path.read_bytes()
    return data if Digest.of(data, digest.algorithm) == digest else None


def hash_file(path: Path, digest: Digest, stopped: Callable[[], bool]) -> bool | None:
    """Whether a file is what its name says; None when stopped before the end."""
    running = hashlib.new(digest.algorithm)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_STEP):
            if stopped():
                return None
            running.update(chunk)
    return running.hexdigest() == digest.hex
