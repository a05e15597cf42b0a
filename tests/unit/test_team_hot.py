"""The hot path of a follower: as fast as the leader's, and not true for longer (D15)."""

import asyncio
from pathlib import Path

from proxy.oci.digest import Digest
from proxy.pull.prefetch import AGAIN
from proxy.testing import FakeClock, make_image
from tests.unit.proxy_kit import (
    IMAGE,
    NAME,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    until,
)
from tests.unit.team_kit import leading, pair

LARGE, SMALL = IMAGE.layers
TAG, MANIFEST = manifest_path("v1"), manifest_path(IMAGE.digest)


def hot_hits(pool: Pullpool) -> float:
    return sum(pool.count("http_hot_requests_total", kind=kind) for kind in ("manifest", "blob"))


async def is_hot(pool: Pullpool, path: str, method: str = "GET") -> bool:
    """Is this a hit, answered by the hot path?"""
    before = hot_hits(pool)
    answer = await pool.ask(method, path)
    return (answer.status, answer.word) == (200, "hit") and hot_hits(pool) > before


async def warm(leader: Pullpool, follower: Pullpool) -> None:
    """The follower answers the image hot."""
    await leader.get(TAG)
    for blob in IMAGE.blobs:
        await leader.get(blob_path(blob.digest))
    await leader.stored()
    # A tag is believed when the leader has been asked for it once.
    for path in (TAG, TAG, MANIFEST, blob_path(SMALL.digest)):
        await follower.get(path)
    for path in (TAG, MANIFEST, blob_path(SMALL.digest)):
        assert await is_hot(follower, path), path


async def evicted(leader: Pullpool, follower: Pullpool, digest: Digest) -> None:
    """The leader gives it up, as for room, and the follower has heard of it."""
    shelf = leader.proxy.store._shelf
    assert shelf.ledger.remove(digest)
    await shelf.evict([digest], "room")
    hits = follower.proxy.front._hits
    assert hits is not None
    await until(lambda: hits._reading.size_of(digest) is None)


async def test_a_follower_answers_plain_hits_hot(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        asked = await follower.get(blob_path(SMALL.digest))
        assert asked.body == SMALL.data
        for path in (TAG, MANIFEST):
            assert (await follower.get(path)).body == IMAGE.manifest
        await follower.get(blob_path())
        await follower.head(blob_path())
        assert await is_hot(follower, blob_path(), "HEAD")
        assert not await is_hot(follower, blob_path())  # a file
        part = await follower.get(blob_path(SMALL.digest), Range="bytes=3-9")
        assert (part.status, part.body) == (206, SMALL.data[3:10])


async def test_another_repository_gets_nothing_hot_of_the_first_ones(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        other = "other/app"
        for path in (blob_path(SMALL.digest, other), manifest_path(IMAGE.digest, other)):
            for _ in range(2):
                assert (await follower.get(path)).status == 404


async def test_a_blob_that_the_leader_evicts_no_follower_answers_from_memory(
    tmp_path: Path,
) -> None:
    path = blob_path(SMALL.digest)
    async with pair(tmp_path) as (leader, follower, fake):
        await warm(leader, follower)
        await evicted(leader, follower, SMALL.digest)
        assert (await follower.get(path)).word == "miss"
        assert fake.counters.gets[SMALL.digest] == 2
        await leader.stored()
        assert not await is_hot(follower, path)
        assert await is_hot(follower, path)  # it is held again


async def test_a_manifest_that_the_leader_evicts_is_hot_no_more(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        await evicted(leader, follower, IMAGE.digest)
        for path in (TAG, MANIFEST):
            assert not await is_hot(follower, path)
            assert (await follower.get(path)).body == IMAGE.manifest


async def test_a_link_that_the_leader_takes_back_is_no_followers(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        await leader.proxy.store.unlink(UPSTREAM, NAME, SMALL.digest)
        hits = follower.proxy.front._hits
        assert hits is not None
        key = (UPSTREAM, NAME, SMALL.digest)
        await until(lambda: hits._reading.known_link(*key) is None)
        assert (await follower.get(blob_path(SMALL.digest))).word == "revalidated"


async def test_a_tag_that_moves_is_hot_at_no_follower(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, fake):
        await warm(leader, follower)
        other = make_image(NAME, "v1", layers=[1000], seed=9, tarred=False)
        fake.push(other)
        assert await is_hot(follower, TAG)
        url = f"{follower.proxy.admin_url}/api/v1/refresh"
        async with follower.session.post(url, json={"images": [f"{UPSTREAM}/{NAME}:v1"]}):
            pass
        for _ in range(3):
            assert (await follower.get(TAG)).body == other.manifest
        assert await is_hot(follower, TAG)


async def test_without_a_leader_nothing_is_hot_and_hits_go_on(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        remote = follower.proxy.roles._remote
        assert remote is not None
        before = hot_hits(follower)
        remote.close()
        for path in (MANIFEST, blob_path(SMALL.digest)):
            assert (await follower.get(path)).word == "hit"
        assert hot_hits(follower) == before


async def test_a_follower_that_leads_answers_hot_by_its_own_lights(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        await leader.proxy.__aexit__(None, None, None)
        await leading(follower)
        path = blob_path(SMALL.digest)
        assert not await is_hot(follower, path)
        assert await is_hot(follower, path)
        shelf = follower.proxy.store._shelf
        assert shelf.ledger.remove(SMALL.digest)
        evicting = asyncio.ensure_future(shelf.evict([SMALL.digest], "room"))
        await asyncio.sleep(0)
        assert (await follower.get(path)).word == "miss"
        await evicting


async def test_hot_hits_of_a_follower_count_as_used(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        used, hits = list[Digest](), follower.proxy.front._hits
        assert hits is not None
        await until(lambda: not hits._used)
        leader.proxy.leader.touch = used.append
        while SMALL.digest not in used:
            assert await is_hot(follower, blob_path(SMALL.digest))
            await asyncio.sleep(0.05)


PREFETCH = {"cache": {"prefetch": "manifest"}}


async def fetched_ahead(leader: Pullpool, follower: Pullpool, clock: FakeClock) -> float:
    """A layer is evicted that nothing has brought lately; how many were prefetched until then."""
    clock.advance(AGAIN + 1)
    await evicted(leader, follower, LARGE.digest)
    return leader.count("prefetches_total")


async def test_a_hot_hit_of_a_follower_makes_the_leader_fetch_ahead(tmp_path: Path) -> None:
    clock = FakeClock()
    async with pair(tmp_path, clock=clock, **PREFETCH) as (leader, follower, fake):
        await warm(leader, follower)
        before = await fetched_ahead(leader, follower, clock)
        assert await is_hot(follower, MANIFEST)
        await until(lambda: leader.count("prefetches_total") == before + 1)
        assert str(LARGE.digest) in await leader.stored()
        assert fake.counters.gets[LARGE.digest] == 2


async def test_what_a_follower_answers_by_its_handler_counts_too(tmp_path: Path) -> None:
    clock, off = FakeClock(), {"hot_path": False}
    async with pair(tmp_path, clock=clock, **off, **PREFETCH) as (leader, follower, _):
        await leader.get(TAG)
        await leader.stored()
        await follower.get(MANIFEST)
        before = await fetched_ahead(leader, follower, clock)
        leader.proxy.puller._manifests._fetching._memory.clear()  # a leader that has never seen it
        assert (await follower.get(MANIFEST)).word == "hit"
        await until(lambda: leader.count("prefetches_total") == before + 1)
        await leader.stored()


async def test_a_follower_tells_of_no_manifest_that_was_only_asked_about(tmp_path: Path) -> None:
    async with pair(tmp_path, **PREFETCH) as (leader, follower, _):
        await leader.get(MANIFEST)
        await leader.stored()
        hits, told = follower.proxy.front._hits, list[object]()
        assert hits is not None
        hits._tell_pulled = told.append
        for _ in range(3):
            assert (await follower.head(MANIFEST)).word == "hit"
        await until(lambda: not hits._used)
        assert not told
        assert (await follower.get(MANIFEST)).word == "hit"
        await until(lambda: told == [{(UPSTREAM, NAME, IMAGE.digest)}])


async def test_a_follower_tells_nothing_to_a_leader_that_does_not_fetch_ahead(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (_, follower, _):
        hits = follower.proxy.front._hits
        assert hits is not None
        assert hits._tell_pulled is None


async def test_a_draining_follower_answers_nothing_hot(tmp_path: Path) -> None:
    async with pair(tmp_path) as (leader, follower, _):
        await warm(leader, follower)
        follower.proxy.drain()
        before = hot_hits(follower)
        for path in (TAG, MANIFEST, blob_path(SMALL.digest)):
            assert (await follower.get(path)).status == 503
        assert hot_hits(follower) == before
