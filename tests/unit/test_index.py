"""The index: one thread, upserts in batches, and what happens to a file that is not usable."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.store.index import MIGRATIONS, Index, IndexFailed, IndexUnusable
from tests.unit.store_kit import descriptors, files_under, threads_of_stores


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[Index]:
    index = await Index.open(tmp_path / "index.db")
    yield index
    await index.close()


async def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index.db")
    await index.put_blob("sha256:b", 20, 2)
    await index.put_blob("sha256:a", 10, 1)
    await index.put_manifest("sha256:a", "type/x", ["sha256:b", "sha256:c"])
    await index.close()
    index = await Index.open(tmp_path / "index.db")
    contents = await index.load()
    assert list(contents.blobs) == [("sha256:a", 10, 1), ("sha256:b", 20, 2)]
    assert list(contents.manifests) == [("sha256:a", "type/x", "sha256:b sha256:c")]
    assert not index.was_lost
    await index.close()


async def test_a_blob_entered_twice_has_one_row_and_the_later_use(index: Index) -> None:
    await index.put_blob("sha256:a", 10, 5)
    await index.put_blob("sha256:a", 10, 3)
    assert list((await index.load()).blobs) == [("sha256:a", 10, 5)]


async def test_a_touch_brings_no_dropped_blob_back(index: Index) -> None:
    await index.put_blob("sha256:a", 10, 1)
    await index.put_manifest("sha256:a", "type/x", [])
    await index.drop_blobs(["sha256:a"])
    await index.touch([(9, "sha256:a")])
    contents = await index.load()
    assert list(contents.blobs) == []
    assert list(contents.manifests) == []


async def test_touches_are_written_back(index: Index) -> None:
    await index.put_blob("sha256:a", 10, 1)
    await index.touch([(9, "sha256:a")])
    assert list((await index.load()).blobs) == [("sha256:a", 10, 9)]


async def test_a_link_keeps_a_size_that_a_later_one_does_not_know(index: Index) -> None:
    await index.link("up", "team/app", [("sha256:a", 10), ("sha256:b", None)], 1.0)
    await index.link("up", "team/app", [("sha256:a", None), ("sha256:b", 7)], 2.0)
    assert await index.linked("up", "team/app", "sha256:a") == (10,)
    assert await index.linked("up", "team/app", "sha256:b") == (7,)
    assert await index.linked("up", "team/other", "sha256:a") is None
    assert await index.linked("other", "team/app", "sha256:a") is None


async def test_a_link_that_was_taken_back_is_gone(index: Index) -> None:
    await index.link("up", "team/app", [("sha256:a", None)], 1.0)
    assert await index.linked("up", "team/app", "sha256:a") == (None,)
    await index.unlink("up", "team/app", "sha256:a")
    assert await index.linked("up", "team/app", "sha256:a") is None


async def test_old_links_go_unless_their_blob_is_held(index: Index) -> None:
    await index.put_blob("sha256:held", 1, 1)
    old = [("sha256:held", 1), ("sha256:gone", 1)]
    await index.link("up", "team/app", old, 1.0)
    await index.link("up", "team/app", [("sha256:fresh", 1)], 100.0)
    await index.prune_links(50.0)
    assert await index.linked("up", "team/app", "sha256:held") is not None
    assert await index.linked("up", "team/app", "sha256:fresh") is not None
    assert await index.linked("up", "team/app", "sha256:gone") is None


async def test_a_tag_moves_and_goes(index: Index) -> None:
    await index.put_tag("up", "team/app", "v1", "sha256:a", 1.5)
    await index.put_tag("up", "team/app", "v1", "sha256:b", 2.5)
    assert await index.tag("up", "team/app", "v1") == ("sha256:b", 2.5)
    await index.drop_tag("up", "team/app", "v1")
    assert await index.tag("up", "team/app", "v1") is None


async def test_what_is_asked_for_at_once_is_one_transaction(index: Index) -> None:
    statements: list[str] = []
    await index.run(lambda connection: connection.set_trace_callback(statements.append))
    statements.clear()
    await asyncio.gather(*[index.put_blob(f"sha256:{n}", n, n) for n in range(100)])
    begun = [statement for statement in statements if statement.startswith("BEGIN")]
    # The first job starts the thread, the other 99 gather in the meantime.
    assert len(begun) <= 2
    await index.run(lambda connection: connection.set_trace_callback(None))


async def test_a_reader_sees_what_was_asked_for_before_it(index: Index) -> None:
    writing = asyncio.create_task(index.put_tag("up", "app", "v1", "sha256:a", 1.0))
    await asyncio.sleep(0)
    assert await index.tag("up", "app", "v1") == ("sha256:a", 1.0)
    await writing


async def test_a_job_that_cannot_work_fails_alone(index: Index) -> None:
    good = [index.put_blob(f"sha256:{n}", n, n) for n in range(3)]
    bad = index.run(lambda connection: connection.execute("no such statement"))
    results = await asyncio.gather(*good, bad, return_exceptions=True)
    assert isinstance(results[-1], IndexFailed)
    assert results[:3] == [None, None, None]
    assert len((await index.load()).blobs) == 3


async def test_a_mistake_in_a_job_reaches_its_caller_unchanged(index: Index) -> None:
    def wrong(_: sqlite3.Connection) -> None:
        raise KeyError("mistake")

    with pytest.raises(KeyError, match="mistake"):
        await index.run(wrong)
    await index.put_blob("sha256:a", 1, 1)


async def test_a_write_whose_waiter_leaves_is_made_all_the_same(index: Index) -> None:
    leaving = asyncio.create_task(index.put_blob("sha256:a", 1, 1))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert len((await index.load()).blobs) == 1


async def test_closing_finishes_what_was_asked_for_and_leaves_nothing_open(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index.db")
    writing = asyncio.create_task(index.put_blob("sha256:a", 1, 1))
    await asyncio.sleep(0)
    await index.close()
    await index.close()
    await writing
    assert threads_of_stores() == []
    assert not any(str(tmp_path) in path for path in descriptors())
    assert files_under(tmp_path) == [tmp_path / "index.db"]
    with pytest.raises(IndexFailed, match="closed"):
        await index.put_blob("sha256:b", 1, 1)


async def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    opening = asyncio.create_task(Index.open(tmp_path / "index.db"))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert threads_of_stores() == []
    assert not any(str(tmp_path) in path for path in descriptors())


@pytest.mark.parametrize("content", [b"this is no database at all" * 100, b"SQLite format 3\0junk"])
async def test_a_file_that_is_no_database_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.db").write_bytes(content)
    index = await Index.open(tmp_path / "index.db")
    assert index.was_lost
    assert (tmp_path / "index.db.corrupt").read_bytes() == content
    await index.put_blob("sha256:a", 1, 1)
    await index.close()


async def test_an_index_with_pages_overwritten_is_moved_aside(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index.db")
    for start in range(0, 2000, 100):
        digests = [(f"sha256:{n:064x}", n) for n in range(start, start + 100)]
        await index.link("up", "app", digests, 1.0)
    await index.close()
    with (tmp_path / "index.db").open("r+b") as file:
        file.seek(5 * 4096)
        file.write(b"\xff" * 20 * 4096)
    index = await Index.open(tmp_path / "index.db")
    assert index.was_lost
    assert list((await index.load()).blobs) == []
    await index.close()


async def test_somebody_elses_database_is_moved_aside(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "index.db") as other:
        other.execute("CREATE TABLE blob (something TEXT)")
    other.close()
    index = await Index.open(tmp_path / "index.db")
    assert index.was_lost
    await index.close()


async def test_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    newer = (*MIGRATIONS, ("CREATE TABLE tomorrow (x)",))
    await (await Index.open(tmp_path / "index.db", newer)).close()
    before = (tmp_path / "index.db").read_bytes()
    with pytest.raises(IndexUnusable, match=f"schema version {len(newer)}"):
        await Index.open(tmp_path / "index.db")
    assert (tmp_path / "index.db").read_bytes() == before
    assert threads_of_stores() == []


async def test_an_older_version_is_migrated_and_keeps_its_rows(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index.db")
    await index.put_blob("sha256:a", 1, 1)
    await index.close()
    newer = (*MIGRATIONS, ("ALTER TABLE blob ADD COLUMN note TEXT",))
    index = await Index.open(tmp_path / "index.db", newer)
    assert len((await index.load()).blobs) == 1
    version = await index.run(lambda c: c.execute("PRAGMA user_version").fetchone())
    assert version == (len(newer),)
    await index.close()


async def test_the_published_schema_can_be_read_by_this_version(tmp_path: Path) -> None:
    """Version 1 as it was published; only ever add such tests."""
    with sqlite3.connect(tmp_path / "index.db") as old:
        for statement in (
            "CREATE TABLE blob (digest TEXT PRIMARY KEY, size INTEGER, used INTEGER)",
            "CREATE TABLE manifest (digest TEXT PRIMARY KEY, media_type TEXT, children TEXT)",
            "CREATE TABLE link (upstream TEXT, repository TEXT, digest TEXT, size INTEGER,"
            " seen REAL, PRIMARY KEY (upstream, repository, digest))",
            "CREATE TABLE tag (upstream TEXT, repository TEXT, tag TEXT, digest TEXT,"
            " checked_at REAL, PRIMARY KEY (upstream, repository, tag))",
            "INSERT INTO blob VALUES ('sha256:a', 5, 6)",
            "INSERT INTO tag VALUES ('up', 'app', 'v1', 'sha256:a', 7.5)",
            "PRAGMA user_version = 1",
        ):
            old.execute(statement)
    old.close()
    index = await Index.open(tmp_path / "index.db")
    assert not index.was_lost
    assert list((await index.load()).blobs) == [("sha256:a", 5, 6)]
    assert await index.tag("up", "app", "v1") == ("sha256:a", 7.5)
    await index.close()


async def test_a_place_where_no_file_can_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match="unable to open database file"):
        await Index.open(tmp_path / "missing" / "index.db")
    assert threads_of_stores() == []


async def test_a_hundred_thousand_rows_come_back(tmp_path: Path) -> None:
    index = await Index.open(tmp_path / "index.db")
    rows = [(f"sha256:{n:064x}", n, n) for n in range(100_000)]
    await index.run(lambda c: c.executemany("INSERT INTO blob VALUES (?, ?, ?)", rows))
    await index.close()
    index = await Index.open(tmp_path / "index.db")
    assert list((await index.load()).blobs) == rows
    assert "index.db" in repr(index)
    await index.close()


async def test_blobs_of_some_upstreams_come_by_their_last_use(index: Index) -> None:
    rows = [("a", "one"), ("b", "two"), ("c", "one"), ("d", "three"), ("e", "two")]
    for number, (digest, upstream) in enumerate(rows):
        await index.put_blob(digest, 1, number)
        await index.link(upstream, "r", [(digest, 1)], 0.0)
    await index.put_blob("nobody's", 1, 9)
    await index.link("one", "r", [("not here", 1)], 0.0)
    await index.link("three", "r", [("a", 1)], 0.0)
    assert await index.linked_blobs(["one", "two"], 10) == ["e", "c", "b", "a"]
    assert await index.linked_blobs(["three"], 1) == ["d"]
    assert await index.linked_blobs([], 10) == []
