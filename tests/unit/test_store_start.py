"""How a store begins and ends: what it finds, whom it refuses, and what it leaves behind."""

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.observe.metrics import Metrics
from proxy.oci.errors import StoreFailed
from proxy.store.index import MIGRATIONS, Index
from proxy.store.store import CacheDirBusy, CacheDirUnusable, Store
from tests.unit.store_kit import (
    Gate,
    blob,
    count,
    descriptors,
    name,
    opened,
    roomy,
    settled,
    silent,
    staging_files,
    stored_files,
    threads_of_stores,
)

A, B, C = blob(1, 1000), blob(2, 1000), blob(3, 1000)


# The start


async def test_unfinished_fills_of_a_dead_process_are_removed_and_counted(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "one").write_bytes(A)
    (tmp_path / "staging" / "two").write_bytes(b"")
    metrics = Metrics()
    async with opened(tmp_path, metrics=metrics):
        assert staging_files(tmp_path) == []
    assert count(metrics, "pullpool_store_recovered_temp_total") == 2


async def test_files_without_a_row_are_adopted_when_their_hash_is_right(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B, C):
            await store.put(name(data), data)
        paths = {data: store._shelf.layout.blob(name(data)) for data in (A, B, C)}
    (tmp_path / "index.db").unlink()
    paths[B].write_bytes(A)  # of the right length, and wrong
    for age, data in enumerate((C, A)):
        os.utime(paths[data], (1000 + age, 1000 + age))
    metrics = Metrics()
    async with opened(tmp_path, metrics=metrics) as store:
        assert store.state().blobs == 0  # counted as bytes, but served only when judged
        assert store.state().bytes == 3000
        await store.recovered()
        assert list(store._ledger) == [name(C), name(A)]
        assert await store.read(name(A)) == A
        assert not paths[B].exists()
    assert count(metrics, "pullpool_digest_mismatch_total", source="store") == 1
    async with opened(tmp_path) as store:
        assert store.state().blobs == 2  # rows now: nothing to be judged


async def test_a_blob_that_waits_to_be_judged_can_be_fetched_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        path = store._shelf.layout.blob(name(A))
    (tmp_path / "index.db").unlink()
    path.write_bytes(B)
    async with opened(tmp_path) as store:
        assert await store.lease(name(A)) is None
        await store.put(name(A), A)
        await store.recovered()
        assert await store.read(name(A)) == A
        assert store.state().bytes == 1000


async def test_rows_without_a_file_and_files_of_another_size_are_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B, C):
            await store.put(name(data), data)
        paths = {data: store._shelf.layout.blob(name(data)) for data in (A, B)}
    paths[A].unlink()
    os.truncate(paths[B], 999)
    async with opened(tmp_path) as store:
        assert store.size_of(name(A)) is None
        assert store.size_of(name(B)) is None
        assert store.size_of(name(C)) == 1000
        await store.recovered()
        assert not paths[B].exists()
        assert [row[0] for row in (await store._index.load()).blobs] == [str(name(C))]


async def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        blob_directory = store._shelf.layout.blob(name(A)).parent
    strangers = [
        tmp_path / "notes.txt",
        tmp_path / "blobs" / "readme",
        tmp_path / "blobs" / "sha256" / "readme",
        blob_directory / "short",
        tmp_path / "blobs" / "sha256" / "zz" / ("zz" + "0" * 62),
        tmp_path / "blobs" / "md5" / "aa" / ("aa" + "0" * 30),
    ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    async with opened(tmp_path) as store:
        await store.recovered()
        assert store.state().blobs == 1
    assert all(path.read_text() == "mine" for path in strangers)


async def test_an_index_that_is_no_database_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
    (tmp_path / "index.db").write_bytes(b"garbage" * 1000)
    async with opened(tmp_path) as store:
        await store.recovered()
        assert await store.read(name(A)) == A
    assert (tmp_path / "index.db.corrupt").exists()


async def test_a_smaller_cache_shrinks_at_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B, C):
            await store.put(name(data), data)
    async with opened(tmp_path, max_size=2500) as store:
        await store.recovered()
        assert store.state().bytes == 2000
        assert store.size_of(name(A)) is None
        assert stored_files(tmp_path) == {str(name(B)), str(name(C))}


async def test_a_directory_in_use_is_refused_and_its_holder_is_not_disturbed(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        fill = await store.create(name(A), len(A))
        with pytest.raises(CacheDirBusy, match=f"pid {os.getpid()}"):
            async with opened(tmp_path):
                pass
        await fill.append([A])
        await fill.commit()


async def test_a_directory_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheDirUnusable, match="Not a directory") as refusal:
        async with opened(tmp_path / "file" / "cache"):
            pass
    assert str(tmp_path / "file" / "cache") in str(refusal.value)
    assert threads_of_stores() == []


async def test_a_directory_whose_parts_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("a file where a directory should be")
    with pytest.raises(CacheDirUnusable, match="File exists"):
        async with opened(tmp_path):
            pass
    (tmp_path / "staging").unlink()
    async with opened(tmp_path):  # the lock was given back
        pass


async def test_a_directory_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    newer = (*MIGRATIONS, ("CREATE TABLE tomorrow (x)",))
    await (await Index.open(tmp_path / "index.db", newer)).close()
    with pytest.raises(CacheDirUnusable, match="schema version"):
        async with opened(tmp_path):
            pass


async def test_an_opening_that_is_cancelled_anywhere_lets_everything_go(tmp_path: Path) -> None:
    for turns in range(30):
        opening = asyncio.create_task(
            Store.open(tmp_path, max_size=1000, metrics=Metrics(), log=silent())
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await opening).close()
        assert threads_of_stores() == []
        assert not any(str(tmp_path) in path for path in descriptors())


# The end


async def test_closing_leaves_no_thread_no_file_and_no_unfinished_fill(tmp_path: Path) -> None:
    before = descriptors()
    store = await Store.open(tmp_path, max_size=10_000, metrics=Metrics(), log=silent())
    await store.put(name(A), A)
    store.touch(name(A))
    fill = await store.create(name(B), len(B))
    await fill.append([B[:10]])
    creating = asyncio.create_task(store.create(name(C), len(C)))
    await asyncio.sleep(0)
    await asyncio.gather(store.close(), store.close())
    await store.close()
    late = await creating  # whoever was creating has to hear of it before its file is back
    assert threads_of_stores() == []
    assert descriptors() == before
    assert staging_files(tmp_path) == []
    with pytest.raises(StoreFailed, match="dropped"):
        await fill.append([B[10:]])
    with pytest.raises(StoreFailed, match="dropped"):
        await late.append([C])


async def test_a_commit_under_way_is_finished_before_the_store_closes(tmp_path: Path) -> None:
    gate = Gate()
    disk = replace(roomy(), sync=gate.before(os.fsync))  # type: ignore[arg-type]  # any call
    store = await Store.open(tmp_path, max_size=10_000, metrics=Metrics(), log=silent(), disk=disk)
    fill = await store.create(name(A), len(A))
    await fill.append([A])
    committing = asyncio.create_task(fill.commit())
    await settled(gate.reached.is_set)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    gate.go.set()
    await asyncio.gather(committing, closing)
    assert threads_of_stores() == []
    async with opened(tmp_path) as store:
        assert store.size_of(name(A)) == len(A)


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        lease = await store.lease(name(A))
    assert lease is not None
    assert os.pread(lease.fileno(), 2000, 0) == A  # a reader's file is the reader's
    lease.close()
    assert "closed" in repr(store)
    for call in (store.lease(name(A)), store.read(name(A)), store.create(name(B), 10)):
        with pytest.raises(StoreFailed, match="closed"):
            await call
