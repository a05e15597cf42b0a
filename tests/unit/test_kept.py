"""Files of stored blobs that stay open: who gets one, and above all when they go."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.store.kept import KeptFiles
from proxy.store.reading import Reading
from proxy.store.store import FileLease, Store
from tests.unit.store_kit import blob, name, opened

DATA = blob(1, 100_000)
DIGEST = name(DATA)


def open_files(directory: Path) -> int:
    """How many files of blobs are open in this process."""
    paths = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is(fd)]
    return sum(path.startswith(str(directory / "blobs")) for path in paths)


def _is(fd: str) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def at_once(store: Store | Reading) -> FileLease:
    """A lease that nobody has to wait for."""
    lease: FileLease | None = None
    asking = store.lease(DIGEST)
    try:
        asking.send(None)
    except StopIteration as answer:
        lease = answer.value
    finally:
        asking.close()
    assert lease is not None, "a thread had to open the file"
    return lease


async def test_the_next_reader_gets_the_file_without_a_thread(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(DIGEST, DATA)
        first = await store.lease(DIGEST)
        assert first is not None
        with first, at_once(store) as second, at_once(store) as third:
            numbers = {lease.fileno() for lease in (first, second, third)}
            assert len(numbers) == 3
            for lease in (first, second, third):
                assert os.pread(lease.fileno(), len(DATA), 0) == DATA
                assert lease.size == len(DATA)
        with at_once(store) as fourth:
            assert os.pread(fourth.fileno(), 10, 5) == DATA[5:15]
    assert open_files(tmp_path) == 0


async def test_a_kept_file_stands_in_nobodys_way(tmp_path: Path) -> None:
    async with opened(tmp_path, max_size=250_000) as store:
        await store.put(DIGEST, DATA)
        (await store.lease(DIGEST) or pytest.fail("not held")).close()
        assert open_files(tmp_path) == 1
        for seed in (2, 3):
            other = blob(seed, 100_000)
            await store.put(name(other), other)
        assert store.size_of(DIGEST) is None
        assert open_files(tmp_path) == 0  # so its room has come back
        assert await store.lease(DIGEST) is None


async def test_what_is_being_read_is_not_evicted_however_it_was_opened(tmp_path: Path) -> None:
    async with opened(tmp_path, max_size=250_000) as store:
        await store.put(DIGEST, DATA)
        (await store.lease(DIGEST) or pytest.fail("not held")).close()
        with at_once(store) as lease:
            for seed in (2, 3):
                other = blob(seed, 100_000)
                await store.put(name(other), other)
            assert store.size_of(DIGEST) == len(DATA)
            assert os.pread(lease.fileno(), len(DATA), 0) == DATA
        assert not store._ledger.is_pinned(DIGEST)


@pytest.mark.parametrize("what", ["removed", "cut", "replaced"])
async def test_what_was_done_to_the_file_is_seen_as_before(tmp_path: Path, what: str) -> None:
    async with opened(tmp_path) as store:
        await store.put(DIGEST, DATA)
        (await store.lease(DIGEST) or pytest.fail("not held")).close()
        path = store._shelf.layout.blob(DIGEST)
        path.chmod(0o600)
        if what == "removed":
            path.unlink()
        elif what == "cut":
            os.truncate(path, 10)
        else:
            (tmp_path / "new").write_bytes(blob(9, 50))
            (tmp_path / "new").rename(path)
        assert await store.lease(DIGEST) is None
        assert store.size_of(DIGEST) is None
        assert open_files(tmp_path) == 0


async def test_a_blob_that_is_found_bad_leaves_nothing_open(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(DIGEST, DATA)
        (await store.lease(DIGEST) or pytest.fail("not held")).close()
        await store._shelf.examine(DIGEST, lambda: False, "a test")
        assert open_files(tmp_path) == 0
        await store.put(DIGEST, DATA)
        lease = await store.lease(DIGEST)
        assert lease is not None
        with lease:
            assert os.pread(lease.fileno(), len(DATA), 0) == DATA


async def test_a_reader_who_is_cancelled_leaves_nothing_but_the_kept_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(DIGEST, DATA)
        reading = asyncio.create_task(store.lease(DIGEST))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert open_files(tmp_path) == len(store._shelf.kept)
        assert not store._ledger.is_pinned(DIGEST)


async def test_one_who_follows_keeps_files_until_the_leader_says_that_they_go(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        await store.put(DIGEST, DATA)
        reading = await Reading.open(tmp_path)
        try:
            (await reading.lease(DIGEST) or pytest.fail("not held")).close()
            with at_once(reading) as lease:
                assert os.pread(lease.fileno(), len(DATA), 0) == DATA
            assert open_files(tmp_path) == 1
            reading.forget([DIGEST])
            assert open_files(tmp_path) == 0
            (await reading.lease(DIGEST) or pytest.fail("not held")).close()
            assert open_files(tmp_path) == 1
            reading.lose()
            assert open_files(tmp_path) == 0
            (await reading.lease(DIGEST) or pytest.fail("not held")).close()
            assert open_files(tmp_path) == 0  # nobody would say that it goes
        finally:
            await reading.close()


# -- bounds ----------------------------------------------------------------------------------------


@contextmanager
def some_files(directory: Path, count: int) -> Iterator[list[Path]]:
    (directory / "blobs").mkdir()
    paths = [directory / "blobs" / str(number) for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(blob(number, 100))
    yield paths


def kept_of(paths: list[Path], kept: KeptFiles) -> list[int]:
    """Which of these are kept; asking for one is a use."""
    found = []
    for number, _ in enumerate(paths):
        file = kept.lend(name(blob(number, 100)), 100)
        if file is not None:
            file.close()
            found.append(number)
    return found


def keep(kept: KeptFiles, number: int, path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        kept.keep(name(blob(number, 100)), file)


async def test_so_many_are_kept_and_the_one_read_last_goes_last(tmp_path: Path) -> None:
    with some_files(tmp_path, 4) as paths:
        kept = KeptFiles(most=2)
        keep(kept, 0, paths[0])
        keep(kept, 1, paths[1])
        assert kept_of(paths[:1], kept) == [0]
        keep(kept, 2, paths[2])
        assert kept_of(paths, kept) == [0, 2]
        keep(kept, 2, paths[2])  # again
        assert len(kept) == open_files(tmp_path) == 2
        kept.close()
        assert open_files(tmp_path) == 0


async def test_one_that_nobody_reads_is_closed_after_a_while(tmp_path: Path) -> None:
    with some_files(tmp_path, 2) as paths:
        kept = KeptFiles(seconds=1e6)
        keep(kept, 0, paths[0])
        keep(kept, 1, paths[1])
        kept.sweep()
        assert kept_of(paths[:1], kept) == [0]
        kept.sweep()
        assert kept_of(paths, kept) == [0]
        kept.sweep()
        kept.sweep()
        assert len(kept) == open_files(tmp_path) == 0
        assert kept._sweeping is None  # nothing is left that would have to end
        keep(kept, 1, paths[1])
        assert kept_of(paths, kept) == [1]
        kept.close()


async def test_they_go_first_when_descriptors_run_out(tmp_path: Path) -> None:
    with some_files(tmp_path, 1) as paths:
        kept = KeptFiles()
        keep(kept, 0, paths[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            assert kept.lend(name(blob(0, 100)), 100) is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(kept) == open_files(tmp_path) == 0
