"""Which digests have no link, from memory: proxy/store/hints.py."""

from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.store.hints import LinkHints
from proxy.store.index import Index
from proxy.store.store import Link
from tests.unit.store_kit import blob, name, opened

DIGESTS = [name(blob(seed, 100)) for seed in range(10)]


def never() -> bool:
    return False


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[Index]:
    index = await Index.open(tmp_path / "index.db")
    yield index
    await index.close()


async def link(index: Index, digests: list[Digest]) -> None:
    for number, digest in enumerate(digests):
        await index.link(f"up-{number % 2}", f"team/{number % 3}", [(str(digest), None)], 1.0)


@pytest.mark.parametrize("lot", [1, 2, 3, 100])
async def test_every_link_is_learned_lot_by_lot(index: Index, lot: int) -> None:
    await link(index, DIGESTS[:6])
    hints = LinkHints()
    await hints.learn(index, never, lot=lot)
    assert [hints.exclude(digest) for digest in DIGESTS] == [False] * 6 + [True] * 4


async def test_nothing_is_certain_before_all_links_are_learned(index: Index) -> None:
    await link(index, DIGESTS[:6])
    hints = LinkHints()
    assert not hints.exclude(DIGESTS[9])
    ends = iter([False, True])
    await hints.learn(index, lambda: next(ends), lot=1)
    assert not hints.exclude(DIGESTS[9])
    assert "to be learned" in repr(hints)


async def test_an_index_that_fails_excludes_nothing(index: Index) -> None:
    await index.run(lambda connection: connection.execute("DROP TABLE link"))
    hints = LinkHints()
    await hints.learn(index, never)
    assert not hints.exclude(DIGESTS[0])


async def test_digests_that_share_a_bit_are_not_told_apart(index: Index) -> None:
    hints = LinkHints(bits=8)
    await hints.learn(index, never)
    others = [name(blob(seed, 200)) for seed in range(400)]
    assert all(hints.exclude(digest) for digest in (*DIGESTS, *others))
    for digest in others:  # of any 400, none of the eight bits is left out
        hints.add(digest.hex)
    assert not any(hints.exclude(digest) for digest in DIGESTS)


def steps(work: Coroutine[object, object, Link | None]) -> int:
    """How often it waits before it ends; it is not waited for."""
    try:
        work.send(None)
    except StopIteration:
        return 0
    work.close()
    return 1


async def test_what_was_never_seen_is_not_looked_for_in_the_index(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.link("up", "app", [(DIGESTS[0], 10)])
    async with opened(tmp_path) as store:
        assert steps(store.linked("up", "app", DIGESTS[1])) == 1  # nothing is known of it yet
        await store._shelf.record(store._index.tag("", "", ""))  # learning was before this
        await store._shelf.record(store._index.tag("", "", ""))
        await store._shelf.record(store._index.tag("", "", ""))
        assert steps(store.linked("up", "app", DIGESTS[1])) == 0
        assert await store.linked("up", "app", DIGESTS[1]) is None
        assert await store.linked("up", "app", DIGESTS[0]) == Link(10)


async def test_what_is_linked_is_found_when_memory_has_lost_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.recovered()
        await store.link("up", "app", [(DIGESTS[0], 10)])
        store._links.clear()
        assert await store.linked("up", "app", DIGESTS[0]) == Link(10)
