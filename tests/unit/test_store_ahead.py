"""Bytes of a fill that come out of order: written at their place, hashed when it is their turn."""

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.oci.errors import StoreFailed
from proxy.store.blobs import READ_STEP
from proxy.store.store import StoreFull
from tests.unit.store_kit import (
    FullDisk,
    Gate,
    blob,
    name,
    opened,
    roomy,
    settled,
    staging_files,
    stored_files,
)

A, B = blob(1, 1000), blob(2, 1000)


async def test_what_came_out_of_order_is_a_blob_once_all_of_it_is_hashed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        await fill.put(700, [A[700:]])
        await fill.put(300, [A[300:350], A[350:700]])
        assert (fill.mark, fill.verifier.count, fill.ahead) == (0, 0, 700)
        await fill.append([A[:300]])
        assert fill.mark == 300
        assert not fill.verified()
        await fill.advance(500)
        assert (fill.mark, fill.ahead) == (500, 500)
        await fill.advance(1000)
        await fill.advance(1000)
        assert fill.verifier.count == 1000
        await fill.commit()
        assert await store.read(name(A)) == A


@pytest.mark.parametrize("beyond", [-1, 0, 1, READ_STEP])
async def test_what_is_read_again_by_steps_is_hashed_once(tmp_path: Path, beyond: int) -> None:
    data = blob(3, 2 * READ_STEP + beyond)
    async with opened(tmp_path) as store:
        fill = await store.create(name(data), len(data))
        await fill.put(7, [data[7:]])
        await fill.append([data[:7]])
        await fill.advance(READ_STEP // 2)  # the next step leaves bytes of this one in its buffer
        await fill.advance(len(data))
        await fill.commit()
        assert await store.read(name(data)) == data


async def test_a_fill_with_a_hole_cannot_be_committed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A[:300]])
        await fill.put(400, [A[400:]])
        with pytest.raises(StoreFailed, match="not complete"):
            await fill.commit()
        await fill.discard()
        with pytest.raises(StoreFailed):
            await fill.put(300, [A[300:400]])
        with pytest.raises(StoreFailed):
            await fill.advance(400)


async def test_what_is_hashed_is_never_written_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A[:300]])
        with pytest.raises(ValueError, match="byte 299 again"):
            await fill.put(299, [B[299:400]])
        await fill.append([A[300:]])
        await fill.commit()
        assert await store.read(name(A)) == A


async def test_a_hole_that_a_process_left_behind_is_nobodys_blob(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    async with opened(before) as store:
        fill = await store.create(name(A), len(A))
        await fill.append([A[:300]])
        await fill.put(400, [A[400:]])
        shutil.copytree(before, after)  # what the disk holds when the process is killed here
        [left] = [file for file in staging_files(after) if not file.suffix]
        assert left.read_bytes() == A[:300] + bytes(100) + A[400:]
    async with opened(after) as store:
        assert store.size_of(name(A)) is None
        assert staging_files(after) == []
        assert stored_files(after) == set()


async def test_bytes_ahead_that_a_full_disk_refuses_change_nothing(tmp_path: Path) -> None:
    full = FullDisk(100)
    async with opened(tmp_path, disk=replace(roomy(), write=full.write)) as store:
        fill = await store.create(name(A), len(A))
        with pytest.raises(StoreFull):
            await fill.put(500, [A[500:]])
        assert (fill.mark, fill.ahead) == (0, 0)
        full.room = 10_000
        await fill.append([A])
        await fill.commit()
        assert await store.read(name(A)) == A


async def test_a_file_that_lost_its_end_is_told_and_not_hashed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        await fill.put(300, [A[300:]])
        await fill.append([A[:300]])
        os.truncate(fill.file.path, 600)
        with pytest.raises(StoreFailed, match="could not read"):
            await fill.advance(1000)
        assert fill.mark == fill.verifier.count == 600


async def test_a_put_that_is_cancelled_ends_before_the_file_is_given_back(tmp_path: Path) -> None:
    gate = Gate()
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, disk=disk) as store:
        fill = await store.create(name(A), len(A))
        putting = asyncio.create_task(fill.put(500, [A[500:]]))
        await settled(gate.reached.is_set)
        putting.cancel()
        discarding = asyncio.create_task(fill.discard())
        await asyncio.sleep(0)
        assert not putting.done()
        assert not discarding.done()
        gate.go.set()
        with pytest.raises(asyncio.CancelledError):
            await putting
        await discarding
        assert staging_files(tmp_path) == []


async def test_room_that_is_written_ahead_is_not_promised_twice(tmp_path: Path) -> None:
    left = 2000

    def free(_directory: Path) -> int:
        return left

    async with opened(tmp_path, disk=replace(roomy(), free=free)) as store:
        fill = await store.create(name(A), len(A))
        await fill.put(100, [A[100:]])
        left = 1100  # of which 100 are the first fill's
        other = await store.create(name(B), len(B))
        await other.discard()
        fill.forget_ahead()  # … and now all that it will write again
        with pytest.raises(StoreFull):
            await store.create(name(B), len(B))
        await fill.discard()
