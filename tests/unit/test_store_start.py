"""How a store begins and ends: what it finds, whom it refuses, and what it leaves behind."""

import asyncio
import contextlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from proxy.observe.metrics import Metrics
from proxy.oci.errors import StoreFailed
from proxy.store.index import MIGRATIONS, Index
from proxy.store.recovery import look
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
HOURS = 10_000.0  # a pause before the look at the directory that no test sees the end of


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


async def test_rows_without_a_file_are_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B):
            await store.put(name(data), data)
        store._shelf.layout.blob(name(A)).unlink()
    async with opened(tmp_path) as store:
        await store.recovered()
        assert store.size_of(name(A)) is None
        assert store.size_of(name(B)) == 1000
        assert store.state().bytes == 1000
        assert [row[0] for row in (await store._index.load()).blobs] == [str(name(B))]


async def test_files_of_another_size_are_dropped_when_they_are_opened(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        path = store._shelf.layout.blob(name(A))
    os.truncate(path, 999)
    async with opened(tmp_path) as store:
        await store.recovered()
        assert await store.lease(name(A)) is None
        assert store.size_of(name(A)) is None
        assert not path.exists()
        assert (await store._index.load()).blobs == []


async def test_what_is_held_is_served_before_anybody_looked_at_the_directory(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B):
            await store.put(name(data), data)
        store._shelf.layout.blob(name(A)).unlink()
    async with opened(tmp_path, pause=HOURS) as store:
        lease = await store.lease(name(B))
        assert lease is not None
        lease.close()
        assert await store.lease(name(A)) is None  # and known to be missing from here on
        assert store.size_of(name(A)) is None
        await store.put(name(A), A)
        assert await store.read(name(A)) == A
    async with opened(tmp_path) as store:
        await store.recovered()
        assert store.state().blobs == 2


async def test_a_blob_that_was_stored_after_the_look_is_not_missing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B):
            await store.put(name(data), data)
            store._shelf.layout.blob(name(data)).unlink()
        seen = store._ledger.entries()
        assert await store.lease(name(A)) is None
        await store.put(name(A), A)
        await store._shelf.lose(seen)
        assert await store.read(name(A)) == A
        assert store.size_of(name(B)) is None
        assert [row[0] for row in (await store._index.load()).blobs] == [str(name(A))]


async def test_very_many_missing_blobs_are_dropped_in_several_turns(tmp_path: Path) -> None:
    bodies = [blob(seed, 10) for seed in range(1100)]
    async with opened(tmp_path) as store:
        for data in bodies:
            store._ledger.add(name(data), 10, 1)
            await store._index.put_blob(str(name(data)), 10, 1)
        path = store._shelf.layout.blob(name(bodies[-1]))
        path.parent.mkdir(parents=True)
        path.write_bytes(bodies[-1])
    gone: list[object] = []
    async with opened(tmp_path, pause=HOURS) as store:
        store.tell(gone=gone.extend, unlinked=lambda _: None)
        assert store.state().blobs == 1100
        store._recovery._rested.set()
        await store.recovered()
        assert store.state().blobs == 1
        assert await store.read(name(bodies[-1])) == bodies[-1]
        assert len((await store._index.load()).blobs) == 1
    assert set(gone) == {name(data) for data in bodies[:-1]}


async def test_a_file_that_only_a_late_look_finds_is_counted_and_adopted_at_its_age(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, wall=lambda: 1000.0) as store:
        await store.put(name(A), A)
    async with opened(tmp_path, wall=lambda: 3000.0) as store:
        await store.put(name(B), B)
    async with opened(tmp_path, pause=HOURS) as store:
        path = store._shelf.layout.blob(name(C))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(C)
        os.utime(path, (2000, 2000))
        assert store.size_of(name(C)) is None
        store._recovery._rested.set()
        await store.recovered()
        assert await store.read(name(C)) == C
        assert list(store._ledger) == [name(A), name(C), name(B)]
        assert store.state().bytes == 3000
    async with opened(tmp_path, pause=HOURS) as store:
        assert store.size_of(name(C)) == 1000  # it has a row


async def test_what_is_being_evicted_is_no_blob_that_a_look_has_found(tmp_path: Path) -> None:
    bodies = [blob(seed, 1000) for seed in range(20)]
    async with opened(tmp_path, max_size=22_000) as store:
        for data in bodies:
            await store.put(name(data), data)
    gate = Gate()
    slow = replace(roomy(), unlink=gate.before(os.unlink))  # type: ignore[arg-type]  # any call
    async with opened(tmp_path, max_size=22_000, pause=HOURS, disk=slow) as store:
        new = blob(99, 2500)
        putting = asyncio.create_task(store.put(name(new), new))
        await settled(gate.reached.is_set)
        held = len(store._ledger)
        assert held < 20
        assert len(stored_files(tmp_path)) == 20
        store._recovery._rested.set()
        await settled(lambda: not store._shelf._noting)
        gate.go.set()
        await store.recovered()
        await putting
        assert len(store._ledger) == held + 1
        assert store._shelf.unverified == set()
    assert len(stored_files(tmp_path)) == held + 1


async def test_a_listing_that_passes_over_a_file_loses_no_blob(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for data in (A, B):
            await store.put(name(data), data)
        layout, held = store._shelf.layout, store._ledger.entries()
        layout.blob(name(B)).unlink()
        looking = partial(look, layout, held, doubts=False, stopped=lambda: False)
        found = await asyncio.to_thread(looking, names=lambda _: [])
        assert found is not None
        assert [digest for digest, _ in found.missing] == [name(B)]


async def test_a_file_that_went_after_the_look_is_not_counted_for_ever(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        path = store._shelf.layout.blob(name(A))
    (tmp_path / "index.db").unlink()
    async with opened(tmp_path, max_size=2000) as store:
        assert store.state().bytes == 1000
        path.unlink()  # before its turn to be hashed has come
        await store.recovered()
        assert store.state().bytes == 0
        assert store.size_of(name(A)) is None


async def test_a_store_that_closes_while_it_rests_closes_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
    before = descriptors()
    async with opened(tmp_path, pause=HOURS) as store:
        assert "resting" in repr(store._recovery)
    assert "ended" in repr(store._recovery)
    assert threads_of_stores() == []
    assert descriptors() == before
    async with opened(tmp_path) as store:
        assert await store.read(name(A)) == A


async def test_rows_that_name_no_digest_are_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(name(A), A)
        await store._index.put_blob("sha256:short", 10, 10)
        await store._index.put_manifest(str(name(A)), "a/type", ["sha256:short", str(name(B))])
    async with opened(tmp_path) as store:
        await store.recovered()
        assert await store.manifest_type(name(A)) == "a/type"
        assert store._ledger._children[name(A)] == (name(B),)
        assert [row[0] for row in (await store._index.load()).blobs] == [str(name(A))]


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
