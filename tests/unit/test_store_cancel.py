"""Callers of the store that are cancelled, at any step, and names that change hands."""

import asyncio
import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.store_kit import (
    Gate,
    blob,
    descriptors,
    name,
    opened,
    roomy,
    settled,
    staging_files,
    stored_files,
)

A, B, C = blob(1, 1000), blob(2, 1000), blob(3, 1000)


async def test_an_append_that_is_cancelled_half_way_counts_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    gate = Gate()
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, disk=disk) as store:
        fill = await store.create(name(A), len(A))
        appending = asyncio.create_task(fill.append([A[:600]]))
        await settled(gate.reached.is_set)
        appending.cancel()
        await asyncio.sleep(0)
        assert not appending.done()  # the thread still writes
        gate.go.set()
        with pytest.raises(asyncio.CancelledError):
            await appending
        assert fill.mark == fill.verifier.count == 600
        await fill.append([A[600:]])
        await fill.commit()
        assert await store.read(name(A)) == A


async def test_an_append_that_is_cancelled_before_its_turn_does_nothing(tmp_path: Path) -> None:
    gate = Gate()
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, disk=disk) as store:
        fill = await store.create(name(A), len(A))
        first = asyncio.create_task(fill.append([A[:600]]))
        await settled(gate.reached.is_set)
        second = asyncio.create_task(fill.append([A[600:]]))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.go.set()
        await first
        assert fill.mark == 600
        await fill.discard()


async def test_a_discard_waits_for_the_append_that_is_under_way(tmp_path: Path) -> None:
    gate = Gate()
    disk = replace(roomy(), write=gate.before(os.pwritev))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, disk=disk) as store:
        fill = await store.create(name(A), len(A))
        appending = asyncio.create_task(fill.append([A]))
        await settled(gate.reached.is_set)
        discarding = asyncio.create_task(fill.discard())
        await asyncio.sleep(0)
        assert fill.is_open
        gate.go.set()
        await asyncio.gather(appending, discarding)
        assert staging_files(tmp_path) == []


@pytest.mark.parametrize("step", ["sync", "rename", "sync_directory"])
async def test_a_commit_that_is_cancelled_goes_to_its_end(tmp_path: Path, step: str) -> None:
    gate, own = Gate(), roomy()
    held = {step: gate.before(getattr(own, step))}
    async with opened(tmp_path, disk=replace(own, **held)) as store:  # type: ignore[arg-type]  # ^
        fill = await store.create(name(A), len(A))
        await fill.append([A])
        committing = asyncio.create_task(fill.commit())
        await settled(gate.reached.is_set)
        committing.cancel()
        gate.go.set()
        with pytest.raises(asyncio.CancelledError):
            await committing
        assert store.size_of(name(A)) == len(A)
        assert not fill.is_open
        await fill.commit()
        await fill.discard()
        assert await store.read(name(A)) == A


async def test_a_create_that_is_cancelled_while_it_evicts_promises_nothing(
    tmp_path: Path,
) -> None:
    gate = Gate()
    disk = replace(roomy(), unlink=gate.before(os.unlink))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, max_size=1000, disk=disk) as store:
        await store.put(name(A), A)
        creating = asyncio.create_task(store.create(name(B), 1000))
        await settled(gate.reached.is_set)
        assert store.size_of(name(A)) is None  # gone for readers before its file is
        creating.cancel()
        gate.go.set()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert store._ledger.reserved == 0
        assert staging_files(tmp_path) == []
        await store.put(name(B), B)


async def test_wherever_a_call_is_cancelled_nothing_leaks(tmp_path: Path) -> None:
    """Cancel a put, a create, a lease and a read after n turns of the loop, for many n."""
    async with opened(tmp_path, max_size=2400) as store:
        await store.put(name(A), A)
        for turns in range(25):
            for work in (
                store.put(name(B), B),
                store.create(name(C), 1000),
                store.lease(name(A)),
                store.read(name(A)),
            ):
                await cancel_after(turns, work)
            await store._shelf.settle()
            assert store._ledger.reserved == 0
            assert staging_files(tmp_path) == []
            assert stored_files(tmp_path) == {str(digest) for digest in store._ledger}
            assert not any(store._ledger.is_pinned(digest) for digest in store._ledger)
        gc.collect()
        assert not any("/blobs/" in path or "/staging/" in path for path in descriptors())


async def cancel_after(turns: int, work: object) -> None:
    """Whatever came of it before the cancellation is given back as a caller would."""
    assert asyncio.iscoroutine(work)
    task = asyncio.create_task(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    try:
        result = await task
    except asyncio.CancelledError:
        return
    if hasattr(result, "discard"):
        await result.discard()
    elif hasattr(result, "close"):
        result.close()


async def test_a_victim_that_is_fetched_again_keeps_its_new_file(tmp_path: Path) -> None:
    gate = Gate()
    disk = replace(roomy(), unlink=gate.before(os.unlink))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, disk=disk) as store:
        await store.put(name(A), A)
        await store.put(name(B), B)
        evicting = asyncio.create_task(store._shelf.reclaim(1500))
        await settled(gate.reached.is_set)  # both have left the ledger, both files are there
        again = [asyncio.create_task(store.put(name(data), data)) for data in (A, B)]
        await settled(lambda: store.size_of(name(B)) is not None)  # A's name is still held
        assert store.size_of(name(A)) is None
        gate.go.set()
        await asyncio.gather(evicting, *again)
        assert await store.read(name(A)) == A
        assert await store.read(name(B)) == B
        rows = (await store._index.load()).blobs
        assert {row[0] for row in rows} == stored_files(tmp_path)
