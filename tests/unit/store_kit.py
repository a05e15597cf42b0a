"""What the tests of the store share: stores in a directory, blobs, and disks that misbehave."""

import asyncio
import errno
import io
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from proxy.observe.logs import Logger, make_logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.store.durability import Durability
from proxy.store.store import Disk, Store

MIB = 1 << 20


def blob(seed: int, size: int) -> bytes:
    """Bytes that differ from seed to seed."""
    unit = f"{seed:08x}".encode()
    return (unit * (size // len(unit) + 1))[:size]


def name(data: bytes) -> Digest:
    return Digest.of(data)


def silent() -> Logger:
    return make_logger("json", io.StringIO())


@asynccontextmanager
async def opened(
    directory: Path,
    *,
    max_size: int = 64 * MIB,
    min_free: int = 0,
    disk: Disk | None = None,
    metrics: Metrics | None = None,
    wall: Callable[[], float] = lambda: 1_000_000.0,
    durability: Durability = Durability.FULL,
    boot: Callable[[], str | None] = lambda: "this boot",
    pause: float = 0.0,
) -> AsyncIterator[Store]:
    """A store that is closed at the end, on a disk with endless room unless told otherwise."""
    store = await Store.open(
        directory,
        max_size=max_size,
        min_free=min_free,
        metrics=metrics or Metrics(),
        log=silent(),
        wall=wall,
        durability=durability,
        boot=boot,
        disk=disk or roomy(),
        pause=pause,
    )
    try:
        yield store
    finally:
        await store.close()


def roomy(free: int = 1 << 50) -> Disk:
    return Disk(free=lambda _: free)


def count(metrics: Metrics, sample: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(sample, labels) or 0.0


class FullDisk:
    """A disk that takes `room` bytes and then says ENOSPC, until it is given more."""

    def __init__(self, room: int, code: int = errno.ENOSPC) -> None:
        self.room = room
        self._code = code

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.room <= 0:
            raise OSError(self._code, os.strerror(self._code))
        taken = os.pwrite(fd, b"".join(buffers)[: self.room], offset)
        self.room -= taken
        return taken


class Gate:
    """Holds a call in its thread until it is let go; both sides wait on events."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()

    def before(self, call: Callable[..., object]) -> Callable[..., object]:
        def held(*arguments: object) -> object:
            self.reached.set()
            self.go.wait()
            return call(*arguments)

        return held


async def settled(condition: Callable[[], bool]) -> None:
    """Let the loop run until a thread has come somewhere; threads cannot set the loop's events."""
    while not condition():  # noqa: ASYNC110 -- see above
        await asyncio.sleep(0)


def files_under(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def stored_files(directory: Path) -> set[str]:
    """The digests that have a file under their final name; every one of them must be whole."""
    names = set()
    for path in files_under(directory / "blobs"):
        algorithm = path.parent.parent.name
        assert path.parent.name == path.name[:2]
        digest = Digest(algorithm, path.name)
        assert Digest.of(path.read_bytes(), algorithm) == digest, f"{path} is not whole"
        names.add(str(digest))
    return names


def staging_files(directory: Path) -> list[Path]:
    return files_under(directory / "staging")


def threads_of_stores() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("pullpool")]


def descriptors() -> set[str]:
    """What this process has open, by what the descriptors point to."""
    held = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            held.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return held
