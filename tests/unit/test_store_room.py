"""Room in the store: who has to go, who must not, and what a full or failing disk costs."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.observe.metrics import Metrics
from proxy.oci.errors import StoreFailed
from proxy.store.store import Disk, NoRoom, StoreFull
from tests.unit.store_kit import (
    FullDisk,
    blob,
    count,
    files_under,
    name,
    opened,
    roomy,
    staging_files,
    stored_files,
)

A, B, C = blob(1, 1000), blob(2, 1000), blob(3, 1000)


# Room


async def test_the_least_recently_used_blob_makes_room(tmp_path: Path) -> None:
    metrics = Metrics()
    async with opened(tmp_path, max_size=2400, metrics=metrics) as store:
        await store.put(name(A), A)
        await store.put(name(B), B)
        store.touch(name(A))
        await store.put(name(C), C)
        assert store.size_of(name(B)) is None
        assert stored_files(tmp_path) == {str(name(A)), str(name(C))}
    assert count(metrics, "pullpool_evictions_total", reason="room") == 1


async def test_uses_are_remembered_over_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B, C):
            await store.put(name(data), data)
        store.touch(name(B))
        store.touch(name(A))
    async with opened(tmp_path) as store:
        assert list(store._ledger) == [name(C), name(B), name(A)]


async def test_uses_are_written_back_while_the_store_is_open(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        await store.put(name(B), B)
        store.touch(name(A))
        timer = store._writing_back
        assert timer is not None
        timer.cancel()
        store._start_write_back()
        await store._shelf.settle()
        contents = await store._index.load()
        assert [digest for digest, _, _ in contents.blobs] == [str(name(B)), str(name(A))]


async def test_a_blob_larger_than_the_cache_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, max_size=2000) as store:
        await store.put(name(A), A)
        with pytest.raises(NoRoom):
            await store.create(name(B), 2001)
        assert store.size_of(name(A)) == len(A)


async def test_what_is_leased_is_never_evicted(tmp_path: Path) -> None:
    async with opened(tmp_path, max_size=1000) as store:
        await store.put(name(A), A)
        lease = await store.lease(name(A))
        assert lease is not None
        with pytest.raises(NoRoom):
            await store.create(name(B), 1000)
        lease.close()
        await store.put(name(B), B)
        assert store.size_of(name(A)) is None


async def test_a_reader_who_joined_while_it_was_filled_pins_the_stored_blob(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, max_size=1000) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A])
        with fill.lease():
            await fill.commit()
            with pytest.raises(NoRoom):
                await store.create(name(B), 1000)
        await store.put(name(B), B)


async def test_a_fill_of_unknown_size_takes_room_as_it_grows(tmp_path: Path) -> None:
    async with opened(tmp_path, max_size=2200) as store:
        await store.put(name(A), A)
        fill = await store.create(name(B + C), None)
        await fill.append([B])
        assert store.size_of(name(A)) == len(A)
        await fill.append([C])
        assert store.size_of(name(A)) is None
        with pytest.raises(NoRoom):
            await fill.append([A[:300]])
        assert fill.mark == fill.verifier.count == 2000
        await fill.commit()
        assert await store.read(name(B + C)) == B + C


async def test_the_disk_keeps_min_free(tmp_path: Path) -> None:
    free = [5000]
    disk = Disk(free=lambda _: free[0])
    async with opened(tmp_path, min_free=3000, disk=disk) as store:
        await store.put(name(A), A)
        free[0] = 4000
        await store.put(name(B), B)
        free[0] = 3000
        await store.put(name(C), C)
        assert store.size_of(name(A)) is None
        free[0] = 100
        with pytest.raises(NoRoom):
            await store.create(name(A), 1000)


async def test_room_on_disk_that_is_promised_is_not_promised_again(tmp_path: Path) -> None:
    async with opened(tmp_path, disk=roomy(1500)) as store:
        fill = await store.create(name(A), 1000)
        with pytest.raises(NoRoom):
            await store.create(name(B), 1000)
        await fill.append([A])  # written: the disk's own figure counts it from now on
        await (await store.create(name(B), 1000)).discard()
        await fill.discard()


async def test_a_disk_that_cannot_tell_its_room_is_no_obstacle(tmp_path: Path) -> None:
    def fail(_: Path) -> int:
        raise OSError(errno.EIO, "Input/output error")

    metrics = Metrics()
    async with opened(tmp_path, disk=Disk(free=fail), metrics=metrics) as store:
        await store.put(name(A), A)
        assert store.size_of(name(A)) == len(A)
    assert count(metrics, "pullpool_store_errors_total", op="free", errno="EIO") == 1


# A disk that fails


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
async def test_bytes_that_a_full_disk_refuses_do_not_count(tmp_path: Path, code: int) -> None:
    full, metrics = FullDisk(room=700, code=code), Metrics()
    disk = replace(roomy(), write=full.write)
    async with opened(tmp_path, disk=disk, metrics=metrics) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A[:500]])
        with pytest.raises(StoreFull):
            await fill.append([A[500:600], A[600:]])
        assert fill.mark == fill.verifier.count == 500
        full.room = 10_000
        await fill.append([A[500:]])
        await fill.commit()
        assert await store.read(name(A)) == A
    label = errno.errorcode[code]
    assert count(metrics, "pullpool_store_errors_total", op="write", errno=label) == 1


async def test_a_full_disk_costs_old_blobs_before_the_fill_gives_up(tmp_path: Path) -> None:
    full, metrics = FullDisk(room=2500), Metrics()

    def unlink(path: Path) -> None:
        full.room += path.stat().st_size
        os.unlink(path)

    disk = replace(roomy(), write=full.write, unlink=unlink)
    async with opened(tmp_path, disk=disk, metrics=metrics) as store:
        for data in (A, B, C):
            await store.put(name(data), data)
        assert store.size_of(name(A)) is None
        assert await store.read(name(C)) == C
    assert count(metrics, "pullpool_evictions_total", reason="disk_full") == 1


async def test_a_staging_file_that_cannot_be_made_is_no_room(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        (tmp_path / "staging").rmdir()
        (tmp_path / "staging").touch()
        with pytest.raises(NoRoom):
            await store.create(name(A), 1000)
        assert store._ledger.reserved == 0
        (tmp_path / "staging").unlink()
        await store.put(name(A), A)


async def test_directories_that_somebody_removed_are_made_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        (tmp_path / "staging").rmdir()
        (tmp_path / "blobs").rmdir()
        await store.put(name(A), A)
        assert stored_files(tmp_path) == {str(name(A))}


@pytest.mark.parametrize("step", ["sync", "rename"])
async def test_a_failed_commit_stores_nothing_and_can_be_discarded(
    tmp_path: Path, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    metrics = Metrics()
    failing: dict[str, Callable[..., None]] = {step: fail}
    disk = replace(roomy(), **failing)  # type: ignore[arg-type]  # one of its own fields
    async with opened(tmp_path, disk=disk, metrics=metrics) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A])
        with pytest.raises(StoreFailed):
            await fill.commit()
        with fill.lease() as lease:
            assert os.pread(lease.fileno(), 2000, 0) == A
        with pytest.raises(StoreFailed, match="broken"):
            await fill.commit()
        await fill.discard()
        assert store.size_of(name(A)) is None
        assert store._ledger.reserved == 0
        assert files_under(tmp_path / "blobs") == files_under(tmp_path / "staging") == []
    assert count(metrics, "pullpool_store_errors_total", op="commit", errno="EIO") == 1


async def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    steps: list[str] = []
    own = roomy()

    def noted(step: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            steps.append(step)
            return getattr(own, step)(*arguments)

        return call

    names = ("write", "sync", "rename", "sync_directory", "unlink")
    disk = replace(own, **{step: noted(step) for step in names})  # type: ignore[arg-type]  # fields
    async with opened(tmp_path, disk=disk) as store:
        await store.put(name(A), A)
    assert steps == ["write", "sync", "rename", "sync_directory"]


async def test_whatever_call_fails_what_is_held_stays_right(tmp_path: Path) -> None:
    """Fail the n-th call to the disk, for every n until nothing fails any more."""
    number = 0
    while True:
        directory = tmp_path / str(number)
        calls = FailingCalls(number)
        async with opened(directory, max_size=2400, disk=calls.disk) as store:
            for data in (A, B, C):
                try:
                    await store.put(name(data), data)
                except (StoreFull, StoreFailed):
                    continue
            held = [data for data in (A, B, C) if store.size_of(name(data)) is not None]
            for data in held:
                assert await store.read(name(data)) == data
            assert store._ledger.reserved == 0
            assert store.state().bytes == 1000 * len(held)
        async with opened(directory, max_size=2400) as store:
            await store.recovered()
            assert stored_files(directory) == {str(digest) for digest in store._ledger}
            assert {name(data) for data in held} <= set(store._ledger)
            assert staging_files(directory) == []
        if not calls.failed:
            break
        number += 1
    assert number > 12  # free, write, sync, rename, sync_directory for each, and an unlink


class FailingCalls:
    """A disk whose n-th call fails."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.failed = False
        own = roomy()
        calls = {step: self._wrap(getattr(own, step)) for step in Disk.__slots__}
        self.disk = replace(own, **calls)  # type: ignore[arg-type]  # every field of it

    def _wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object) -> object:
            self._left -= 1
            if self._left == -1:
                self.failed = True
                raise OSError(errno.EIO, "Input/output error")
            return call(*arguments)

        return counted


async def test_no_room_is_told_though_the_threads_for_slow_work_are_busy(tmp_path: Path) -> None:
    go = threading.Event()
    async with opened(tmp_path, max_size=2000) as store:
        busy = [asyncio.ensure_future(store._threads.slow(go.wait)) for _ in range(4)]
        try:
            with pytest.raises(NoRoom):
                await store.create(name(blob(1, 10)), 10_000)
        finally:
            go.set()
            await asyncio.gather(*busy)
    assert staging_files(tmp_path) == []
