"""kill -9 at every step of the write protocol, then a look at what the next start makes of it.

A child process runs a scenario on a disk whose calls stop at a named step: it says that it is
there and waits on a pipe for ever. The parent kills it and opens the directory itself.
"""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.store.store import NoRoom, Store, StoreFull
from tests.unit.store_kit import (
    MIB,
    blob,
    count,
    name,
    opened,
    roomy,
    silent,
    staging_files,
    stored_files,
)

pytestmark = pytest.mark.one_loop

ROOT = Path(__file__).parents[2]
OLD, NEW = blob(1, 3000), blob(2, 3000)
BOTH, ONE = 10_000, 4000  # sizes of a cache that holds two of them, and one

BEFORE_THE_NAME = [
    "before write",
    "after write",
    "before sync",
    "after sync",
    "before rename",
]
AFTER_THE_NAME = ["after rename", "before sync_directory", "after sync_directory"]


@pytest.mark.parametrize("step", BEFORE_THE_NAME)
async def test_killed_before_the_rename_the_blob_is_absent(tmp_path: Path, step: str) -> None:
    await kill_at(step, tmp_path, BOTH)
    metrics = Metrics()
    async with opened(tmp_path, metrics=metrics) as store:
        await store.recovered()
        assert store.size_of(name(NEW)) is None
        assert await store.read(name(OLD)) == OLD
        await consistent(store, tmp_path)
    assert count(metrics, "pullpool_store_recovered_temp_total") == 1


@pytest.mark.parametrize("step", AFTER_THE_NAME)
async def test_killed_after_the_rename_the_blob_is_whole_and_adopted(
    tmp_path: Path, step: str
) -> None:
    await kill_at(step, tmp_path, BOTH)
    async with opened(tmp_path) as store:
        assert store.size_of(name(NEW)) is None  # no row: not before its hash is right
        await store.recovered()
        assert await store.read(name(NEW)) == NEW
        await consistent(store, tmp_path)


async def test_killed_after_the_commit_the_blob_is_held_at_once(tmp_path: Path) -> None:
    await kill_at("committed", tmp_path, BOTH)
    async with opened(tmp_path) as store:
        assert store.size_of(name(NEW)) == len(NEW)
        await consistent(store, tmp_path)


@pytest.mark.parametrize("step", ["before unlink", "after unlink"])
async def test_killed_while_it_evicts_rows_and_files_agree_afterwards(
    tmp_path: Path, step: str
) -> None:
    await kill_at(step, tmp_path, ONE)
    async with opened(tmp_path) as store:
        await store.recovered()
        is_gone = step == "after unlink"
        assert (store.size_of(name(OLD)) is None) == is_gone
        assert store.size_of(name(NEW)) is None
        await consistent(store, tmp_path)


async def test_killed_again_and_again_the_directory_stays_usable(tmp_path: Path) -> None:
    for step in (*BEFORE_THE_NAME, *AFTER_THE_NAME):
        await kill_at(step, tmp_path, BOTH)
    async with opened(tmp_path) as store:
        await store.recovered()
        await consistent(store, tmp_path)
        await store.put(name(NEW), NEW)
        assert await store.read(name(NEW)) == NEW


async def consistent(store: Store, directory: Path) -> None:
    """Every file is whole, and files, ledger and rows are the same set."""
    files = stored_files(directory)
    assert files == {str(digest) for digest in store._ledger}
    assert files == {row[0] for row in (await store._index.load()).blobs}
    assert staging_files(directory) == []
    assert store._ledger.reserved == 0


async def kill_at(step: str, directory: Path, max_size: int) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        str(directory),
        str(max_size),
        step,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"reached\n", f"the child never came to {step!r}"
    child.kill()
    await child.communicate()


# A real file system that is full. Needs the right to mount.


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
async def test_a_file_system_that_is_really_full_refuses_and_recovers(tmp_path: Path) -> None:
    command = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -m "$3" "$1" full'
    child = await asyncio.create_subprocess_exec(
        "unshare", "-m", "sh", "-c", command, "sh", tmp_path, sys.executable, __name__,
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    output, _ = await child.communicate()
    assert child.returncode == 0
    assert output == b"full, evicted, stored\n"


# In the child


def main(arguments: list[str]) -> None:
    directory = Path(arguments[0])
    if arguments[1] == "full":
        asyncio.run(fill_up(directory))
    else:
        asyncio.run(store_two(directory, int(arguments[1]), arguments[2]))


def stop_here() -> None:
    os.write(1, b"reached\n")
    os.read(0, 1)  # until killed: nobody writes


async def store_two(directory: Path, max_size: int, wanted: str) -> None:
    """Store one blob on an honest disk, then another one on a disk that stops."""
    own = roomy()
    is_second = False

    def stopping(step: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if is_second and wanted == f"before {step}":
                stop_here()
            result = getattr(own, step)(*arguments)
            if is_second and wanted == f"after {step}":
                stop_here()
            return result

        return call

    steps = ("write", "sync", "rename", "sync_directory", "unlink")
    disk = replace(own, **{step: stopping(step) for step in steps})  # type: ignore[arg-type]  # fields
    async with opened(directory, max_size=max_size, disk=disk) as store:
        await store.recovered()
        await store.put(name(OLD), OLD)
        await store._shelf.examine(name(NEW), lambda: False, "so that it is stored anew")
        is_second = True
        await store.put(name(NEW), NEW)
        if wanted == "committed":
            stop_here()


async def fill_up(directory: Path) -> None:
    """On a file system of 4 MiB: the ledger believes in more, the disk does not."""
    store = await Store.open(
        directory,
        max_size=1 << 30,
        metrics=Metrics(),
        log=silent(),
        disk=roomy(),
    )
    data = blob(1, 3 * MIB)
    fill = await store.create(Digest.of(data), None)
    await fill.append([data])
    with pytest.raises(StoreFull) as refusal:
        await fill.append([data])
    assert isinstance(refusal.value.__cause__, OSError)
    assert refusal.value.__cause__.errno == errno.ENOSPC
    assert fill.mark == len(data)
    await fill.commit()
    other = blob(2, 3 * MIB)
    await store.put(name(other), other)  # costs the first one
    assert store.size_of(name(data)) is None
    assert await store.read(name(other)) == other
    await store.close()
    # The real figures of the disk now: what does not fit is refused before a byte is written.
    store = await Store.open(directory, max_size=1 << 30, metrics=Metrics(), log=silent())
    try:
        await store.create(name(data), 64 * MIB)
    except NoRoom:
        await store.put(name(data), data)
        assert await store.read(name(data)) == data
        os.write(1, b"full, evicted, stored\n")
    await store.close()


if __name__ == "__main__":
    main(sys.argv[1:])
