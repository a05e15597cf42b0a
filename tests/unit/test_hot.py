"""The hot path: what it may answer, and above all until when."""

import asyncio
import io
import ipaddress
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from proxy.pull.asks import Ask
from proxy.pull.at_hand import Hit
from proxy.store.store import Store
from proxy.testing import FakeClock, make_image
from proxy.testing.registry import FakeRegistry
from proxy.upstream.routing import Route
from proxy.web.hot import IDS, MAX_HEADS, MOST, RENEW, RENEWALS, HotPath, renew_after
from proxy.web.server import BEGUN
from tests.unit.hot_kit import Connection, MemoryTransport, Side, make_side, request, two_sides
from tests.unit.proxy_kit import (
    IMAGE,
    NAME,
    UPSTREAM,
    Pullpool,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    until,
)

SMALL = IMAGE.layers[1]
MANIFEST = manifest_path(IMAGE.digest)
TAG = manifest_path("v1")
MOVED = make_image(NAME, "v1", layers=[7_000], seed=9, tarred=False)


class Hot:
    """A server with the hot path over a proxy that holds IMAGE, and a connection to it."""

    def __init__(self, side: Side, pool: Pullpool, fake: FakeRegistry, clock: FakeClock) -> None:
        self.side = side
        self.pool = pool
        self.fake = fake
        self.clock = clock
        self.connection = Connection(side.server)

    @property
    def path(self) -> HotPath:
        path = self.side.server._hot
        assert path is not None
        return path

    @property
    def store(self) -> Store:
        return self.pool.proxy.store

    async def ask(self, target: str, method: str = "GET", **headers: str) -> str:
        """The answer's head."""
        return await self.send(request(target, method, **headers))

    async def send(self, data: bytes) -> str:
        self.connection.transport.written.clear()
        await self.connection.send(data)
        await self.connection.settle()
        return bytes(self.connection.transport.written).partition(b"\r\n\r\n")[0].decode()

    async def is_hot(self, target: str, method: str = "GET", **headers: str) -> bool:
        """Is this answered by the hot path?"""
        before = self.side.hot_hits
        answer = await self.ask(target, method, **headers)
        assert answer.startswith(("HTTP/1.1 200 ", "HTTP/1.1 304 ")), answer
        return self.side.hot_hits > before

    async def warm(self, *targets: str) -> None:
        """These are answered hot from now on."""
        for target in targets:
            await self.ask(target)
            assert await self.is_hot(target), target

    def ask_of(self, name: str = NAME) -> Ask:
        upstream = self.pool.proxy.clients[UPSTREAM].upstream
        return Ask(Route(upstream, name, name, None), "somebody", asyncio.get_running_loop().time())


@pytest_asyncio.fixture
async def hot(tmp_path: Path) -> AsyncIterator[Hot]:
    clock = FakeClock()
    async with two_sides(tmp_path, clock) as (fast, _, pool, fake):
        await pool.get(TAG)
        for blob in IMAGE.blobs:
            await pool.get(blob_path(blob.digest))
        await pool.stored()
        yield Hot(fast, pool, fake, clock)


@pytest.mark.parametrize("target", [MANIFEST, TAG, blob_path(SMALL.digest)])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_second_request_is_answered_hot(hot: Hot, target: str, method: str) -> None:
    assert not await hot.is_hot(target, method)
    assert await hot.is_hot(target, method)


async def test_head_of_a_blob_of_any_size_is_hot_and_its_body_is_not(hot: Hot) -> None:
    target = blob_path(IMAGE.layers[0].digest)
    await hot.ask(target, "HEAD")
    assert await hot.is_hot(target, "HEAD")
    assert hot.path.table.held < 10_000


async def test_another_connection_is_hot_at_its_first_request(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.connection = Connection(hot.side.server)
    assert await hot.is_hot(MANIFEST)


async def test_a_connection_is_hot_again_after_the_handler_has_answered(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    assert not await hot.is_hot("/v2/")
    assert await hot.is_hot(MANIFEST)


async def test_what_comes_while_the_handler_ends_is_still_hot(hot: Hot) -> None:
    """Under load the next request of each connection comes before aiohttp has come to itself."""
    await hot.warm(MANIFEST)
    connection, before = hot.connection, hot.side.hot_hits
    protocol: Any = connection.protocol
    connection.transport.written.clear()
    await connection.send(request("/v2/"))
    while not connection.transport.written:  # noqa: ASYNC110 -- turn by turn: it lasts for one
        await asyncio.sleep(0)
    assert protocol._waiter is None
    await connection.send(request(MANIFEST))
    await connection.send(request(MANIFEST))
    await connection.settle()
    assert hot.side.hot_hits == before + 2


async def test_answers_keep_the_order_of_their_requests(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.connection.transport.written.clear()
    await hot.connection.send(request("/v2/"))
    await hot.connection.send(request(MANIFEST))
    await hot.connection.settle()
    lengths = re.findall(rb"Content-Length: (\d+)", hot.connection.transport.written)
    assert lengths == [b"2", str(len(IMAGE.manifest)).encode()]


async def test_nothing_is_hot_while_a_request_waits_in_line_for_the_handler(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    connection, before = hot.connection, hot.side.hot_hits
    connection.transport.written.clear()
    for _ in range(BEGUN):  # as many others as may go in a turn
        hot.side.server.line.passes(lambda: None)
    connection.protocol.data_received(request("/v2/"))
    for _ in range(2):
        connection.protocol.data_received(request(MANIFEST))
    await connection.settle()
    lengths = re.findall(rb"Content-Length: (\d+)", connection.transport.written)
    assert lengths == [b"2", *2 * [str(len(IMAGE.manifest)).encode()]]
    assert hot.side.hot_hits == before
    assert await hot.is_hot(MANIFEST)


@pytest.mark.parametrize(
    "unusual",
    [b"GET /v2/ HT", request("/v2/", Content_Length="0"), b"\r\n", request("/v2/", Te="x") * 2],
)
async def test_after_anything_unusual_a_connection_stays_slow(hot: Hot, unusual: bytes) -> None:
    await hot.warm(MANIFEST)
    await hot.send(unusual)
    if unusual.endswith(b"HT"):
        await hot.send(b"TP/1.1\r\nHost: pullpool\r\n\r\n")
    assert not await hot.is_hot(MANIFEST)
    assert not await hot.is_hot(MANIFEST)


# -- until when ------------------------------------------------------------------------------------


async def gone(hot: Hot, digest: Digest) -> None:
    """The store gives it up, as for room."""
    shelf = hot.store._shelf
    assert shelf.ledger.remove(digest)
    await shelf.evict([digest], "room")


async def test_an_evicted_manifest_is_hot_no_more(hot: Hot) -> None:
    await hot.warm(MANIFEST, TAG)
    await gone(hot, IMAGE.digest)
    assert not await hot.is_hot(MANIFEST)
    assert not await hot.is_hot(TAG)


async def test_an_evicted_blob_is_fetched_and_not_answered_from_memory(hot: Hot) -> None:
    target = blob_path(SMALL.digest)
    await hot.warm(target)
    await gone(hot, SMALL.digest)
    assert "X-Pullpool-Cache: miss" in await hot.ask(target)


async def test_an_eviction_is_seen_in_the_turn_in_which_it_is_decided(hot: Hot) -> None:
    target = blob_path(SMALL.digest)
    await hot.warm(target)
    assert hot.store._ledger.remove(SMALL.digest)
    evicting = asyncio.ensure_future(hot.store._shelf.evict([SMALL.digest], "room"))
    await asyncio.sleep(0)
    assert not evicting.done()  # the file is still there
    assert "X-Pullpool-Cache: miss" in await hot.ask(target)
    await evicting


async def test_what_was_fetched_again_is_hot_again(hot: Hot) -> None:
    target = blob_path(SMALL.digest)
    await hot.warm(target)
    await gone(hot, SMALL.digest)
    assert (await hot.pool.get(target)).word == "miss"
    await hot.pool.stored()
    await hot.warm(target)


async def test_a_repository_that_lost_its_link_is_asked_for(hot: Hot) -> None:
    target = blob_path(SMALL.digest)
    await hot.warm(target)
    await hot.store.unlink(UPSTREAM, NAME, SMALL.digest)
    assert "X-Pullpool-Cache: revalidated" in await hot.ask(target)


async def test_another_repository_gets_nothing_of_the_first_ones(hot: Hot) -> None:
    await hot.warm(blob_path(SMALL.digest), MANIFEST)
    for target in (blob_path(SMALL.digest, "other/app"), manifest_path(IMAGE.digest, "other/app")):
        assert (await hot.ask(target)).startswith("HTTP/1.1 404")
        assert (await hot.ask(target)).startswith("HTTP/1.1 404")


async def test_a_tag_is_hot_until_its_ttl_is_over(hot: Hot) -> None:
    await hot.warm(TAG)
    hot.clock.advance(29.9)
    assert await hot.is_hot(TAG)
    hot.clock.advance(0.2)
    assert "X-Pullpool-Cache: revalidated" in await hot.ask(TAG)
    assert await hot.is_hot(TAG)


async def test_a_digest_is_hot_for_ever(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.clock.advance(1e6)
    assert await hot.is_hot(MANIFEST)


async def test_a_moved_tag_is_seen_as_soon_as_anybody_has_asked(hot: Hot) -> None:
    await hot.warm(TAG)
    hot.fake.push(MOVED)
    await hot.pool.proxy.puller.refresh(hot.ask_of(), Tag.parse("v1"))
    assert str(MOVED.digest) in await hot.ask(TAG)
    assert str(MOVED.digest) in await hot.ask(TAG)


async def test_a_doubted_tag_is_asked_for(hot: Hot) -> None:
    await hot.warm(TAG)
    book = hot.pool.proxy.puller._manifests._book
    book.doubt((UPSTREAM, NAME, "v1"))
    assert "X-Pullpool-Cache: revalidated" in await hot.ask(TAG)


async def test_a_refused_tag_is_served_no_more(hot: Hot) -> None:
    await hot.warm(TAG)
    hot.fake.remove(NAME, "v1")
    book = hot.pool.proxy.puller._manifests._book
    assert await book.refuse((UPSTREAM, NAME, "v1"), asked=hot.clock())
    assert (await hot.ask(TAG)).startswith("HTTP/1.1 404")


async def test_a_confirmed_tag_stays_hot_without_the_handler(hot: Hot) -> None:
    await hot.warm(TAG)
    hot.clock.advance(29.0)
    book = hot.pool.proxy.puller._manifests._book
    await book.confirm((UPSTREAM, NAME, "v1"), IMAGE.digest)
    hot.clock.advance(29.0)
    assert await hot.is_hot(TAG)


async def test_an_answer_that_is_not_true_any_more_when_it_leaves_is_not_prepared(
    hot: Hot,
) -> None:
    """The tag moves while the handler's answer is on its way."""
    connection = hot.connection
    protocol: Any = connection.protocol
    connection.transport.limit = 0
    await connection.send(request(TAG))
    await until(lambda: connection.transport.is_full)
    assert protocol._request_in_progress
    hot.fake.push(MOVED)
    await hot.pool.proxy.puller.refresh(hot.ask_of(), Tag.parse("v1"))
    connection.transport.limit = None
    connection.transport.drain()
    await connection.settle()
    assert str(MOVED.digest) in await hot.ask(TAG)
    assert str(MOVED.digest) in await hot.ask(TAG)


# -- the same again --------------------------------------------------------------------------------


async def test_the_same_bytes_are_not_read_again(hot: Hot) -> None:
    await hot.warm(TAG)
    protocol: Any = hot.connection.protocol
    assert protocol._again is None  # it may have been the only one
    assert await hot.is_hot(TAG)
    again = protocol._again
    assert await hot.is_hot(TAG)
    assert protocol._again is again is not None
    assert await hot.is_hot(TAG, User_Agent="another")
    assert protocol._again is again  # a head that is seen for the first time may hold anything
    assert await hot.is_hot(TAG, User_Agent="another")
    assert protocol._again is not again
    assert await hot.is_hot(TAG)
    agents = [line["agent"] for line in hot.side.lines()]
    assert agents[-4:] == ["-", "another", "another", "-"]


async def test_nothing_is_remembered_for_who_asks_for_one_thing_after_the_other(hot: Hot) -> None:
    await hot.warm(TAG, MANIFEST)
    protocol: Any = hot.connection.protocol
    hot.side.lines()
    for _ in range(2):
        assert await hot.is_hot(TAG)
        assert await hot.is_hot(MANIFEST, User_Agent="another")
        assert await hot.is_hot(MANIFEST, User_Agent="another", If_None_Match="*")
    assert protocol._again is None
    told = [(line["path"], line["agent"], line["status"]) for line in hot.side.lines()]
    assert told == [(TAG, "-", 200), (MANIFEST, "another", 200), (MANIFEST, "another", 304)] * 2


async def test_another_id_in_the_same_place_is_not_read_either(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    for number in range(3):
        assert await hot.is_hot(MANIFEST, X_Id=f"{number}")
    protocol: Any = hot.connection.protocol
    again = protocol._again
    assert again is not None
    for value in ("17", "3f2b8c1e-77aa-4f0e-9d3c-0123456789ab"):
        assert await hot.is_hot(MANIFEST, X_Id=value)
        assert protocol._again is again
    # What is not letters and digits alone is read, and is no end of anything.
    assert await hot.is_hot(MANIFEST, X_Id="a b")
    assert await hot.is_hot(MANIFEST, X_Id="18")
    answer = await hot.ask(MANIFEST, X_Id="19\r\nIf-None-Match: *")
    assert answer.startswith("HTTP/1.1 304 ")
    assert await hot.is_hot(MANIFEST, X_Id="20")
    answer = await hot.ask(MANIFEST, X_Id="21\r\nRange: bytes=0-1")
    assert "X-Pullpool-Cache: hit" in answer
    assert hot.side.hot_hits == 10


async def _nothing(_hot: Hot) -> None:
    return


async def _evicted(hot: Hot) -> None:
    await gone(hot, IMAGE.digest)


async def _unlinked(hot: Hot) -> None:
    await hot.store.unlink(UPSTREAM, NAME, IMAGE.digest)


async def _doubted(hot: Hot) -> None:
    hot.pool.proxy.puller._manifests._book.doubt((UPSTREAM, NAME, "v1"))


async def _too_old(hot: Hot) -> None:
    hot.clock.advance(30.0)


async def _draining(hot: Hot) -> None:
    hot.side.draining[0] = True


async def _dropped(hot: Hot) -> None:
    for line in list(hot.path.table.entries):
        hot.path.table.drop(line)


async def _paused(hot: Hot) -> None:
    hot.connection.protocol.pause_writing()
    asyncio.get_running_loop().call_soon(hot.connection.protocol.resume_writing)


@pytest.mark.parametrize(
    ("event", "stays"),
    [
        (_nothing, True),
        (_evicted, False),
        (_unlinked, False),
        (_doubted, False),
        (_too_old, False),
        (_draining, False),
        (_dropped, False),
        (_paused, False),
    ],
)
async def test_the_same_again_is_hot_for_as_long_as_anything_is(
    hot: Hot, event: Any, stays: bool
) -> None:
    await hot.warm(TAG)
    assert await hot.is_hot(TAG)
    protocol: Any = hot.connection.protocol
    assert protocol._again is not None
    await event(hot)
    before = hot.side.hot_hits
    await hot.ask(TAG)
    assert (hot.side.hot_hits > before) is stays


async def test_nothing_is_said_again_while_the_handler_owes_an_answer(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    connection, protocol = hot.connection, hot.connection.protocol
    connection.transport.written.clear()
    protocol.data_received(request("/v2/"))
    protocol.data_received(request(MANIFEST))
    await connection.settle()
    lengths = re.findall(rb"Content-Length: (\d+)", connection.transport.written)
    assert lengths == [b"2", str(len(IMAGE.manifest)).encode()]


async def test_a_head_with_a_secret_is_not_remembered_for_the_next_time(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    assert await hot.is_hot(MANIFEST)
    protocol: Any = hot.connection.protocol
    for number in range(4):
        assert await hot.is_hot(MANIFEST, Authorization="Basic c2VjcmV0", X_Id=f"{number}")
        assert b"c2Vj" not in protocol._again.data + protocol._again.start


# -- use -------------------------------------------------------------------------------------------


async def test_hot_hits_count_as_use(hot: Hot) -> None:
    await hot.warm(MANIFEST, blob_path(SMALL.digest))
    other = make_image("team/other", "v1", layers=[9_000], seed=3, tarred=False)
    hot.fake.push(other)
    await hot.pool.get(manifest_path("v1", other.name))
    await until(lambda: hot.store.size_of(other.digest) is not None)
    assert list(hot.store._ledger)[-1] == other.digest
    hot.clock.advance(RENEW)
    assert await hot.is_hot(MANIFEST)
    assert list(hot.store._ledger)[-1] == IMAGE.digest
    hot.clock.advance(RENEW)
    assert await hot.is_hot(blob_path(SMALL.digest))
    assert list(hot.store._ledger)[-1] == SMALL.digest


async def test_so_many_hits_are_looked_for_a_second_however_many_are_asked_for(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    table = hot.path.table
    (entry,) = table.entries.values()
    for number in range(3 * RENEWALS - 1):
        table.put(b"GET /v2/other-%d HTTP/1.1" % number, entry)
    looks: list[Hit | None] = []
    again = entry.again

    def look() -> Hit | None:
        looks.append(again())
        return looks[-1]

    entry.again = look
    hot.clock.advance(RENEW)
    assert await hot.is_hot(MANIFEST)
    assert len(looks) == 1
    hot.clock.advance(RENEW)
    assert await hot.is_hot(MANIFEST)
    assert len(looks) == 1
    hot.clock.advance(3.0 - RENEW)
    assert await hot.is_hot(MANIFEST)
    assert len(looks) == 2


async def test_when_all_hits_are_due_at_once_they_are_looked_for_over_several_seconds(
    hot: Hot,
) -> None:
    await hot.warm(MANIFEST)
    hot.clock.advance(RENEW)
    now = hot.clock()
    assert sum(hot.path._may_renew(now) for _ in range(3 * RENEWALS)) == RENEWALS
    (entry,) = hot.path.table.entries.values()
    again, looks = entry.again, []

    def look() -> Hit | None:
        looks.append(hot.clock())
        return again()

    entry.again = look
    assert await hot.is_hot(MANIFEST)  # as true as its marks
    assert looks == []
    hot.clock.advance(1.0)
    assert await hot.is_hot(MANIFEST)
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("answers", "seconds"), [(0, RENEW), (RENEWALS, RENEW), (10 * RENEWALS, 10.0)]
)
def test_many_hits_are_looked_for_later_each(answers: int, seconds: float) -> None:
    assert renew_after(answers) == seconds


async def test_the_caches_behind_keep_what_is_only_asked_for_hot(hot: Hot) -> None:
    await hot.warm(TAG)
    puller = hot.pool.proxy.puller
    order = puller._manifests._book._memory
    puller._manifests._book._memory[UPSTREAM, NAME, "v0"] = order[UPSTREAM, NAME, "v1"]
    hot.clock.advance(RENEW)
    assert await hot.is_hot(TAG)
    assert order.popitem()[0] == (UPSTREAM, NAME, "v0")  # the least recently used


# -- conditions ------------------------------------------------------------------------------------


async def test_an_unchanged_manifest_is_304(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    assert await hot.is_hot(MANIFEST, If_None_Match=f'"{IMAGE.digest}"')
    answer = await hot.ask(MANIFEST, If_None_Match=f'"{IMAGE.digest}"')
    assert answer.startswith("HTTP/1.1 304 Not Modified\r\n")
    assert "Content-Length" not in answer
    assert (await hot.ask(MANIFEST, If_None_Match='"else"')).startswith("HTTP/1.1 200 OK\r\n")


async def test_who_does_not_take_the_type_is_the_handlers(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    assert (await hot.ask(MANIFEST, Accept="text/plain")).startswith("HTTP/1.1 404")
    assert await hot.is_hot(MANIFEST, Accept=IMAGE.media_type)
    assert not await hot.is_hot(blob_path(SMALL.digest), If_None_Match='"else"')


async def test_a_draining_proxy_answers_nothing_hot(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.draining[0] = True
    answer = await hot.ask(MANIFEST)
    assert answer.startswith("HTTP/1.1 503")
    assert "\r\nConnection: close" in answer
    assert hot.connection.transport.ended == "closed"


async def test_every_answer_moves_the_keep_alive_time_on(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    protocol: Any = hot.connection.protocol
    protocol._next_keepalive_close_time = 0.0
    assert await hot.is_hot(MANIFEST)
    now = asyncio.get_running_loop().time()
    assert protocol._next_keepalive_close_time == pytest.approx(now + 75, abs=5)


@pytest.mark.parametrize("ending", ["close", "force_close"])
async def test_a_connection_that_ends_answers_no_more(hot: Hot, ending: str) -> None:
    await hot.warm(MANIFEST)
    connection = hot.connection
    connection.transport.written.clear()
    getattr(connection.protocol, ending)()
    connection.protocol.data_received(request(MANIFEST))
    await asyncio.sleep(0)
    assert not connection.transport.written


# -- bounds ----------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_costs_a_bounded_number_of_bytes(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    transport = MemoryTransport(limit=64 << 10)
    connection = Connection(hot.side.server, transport)
    sent = 0
    for _ in range(500):
        if transport.reads:
            await connection.send(request(MANIFEST) * 100, turns=3)
            sent += 100
    assert not transport.reads
    room = (64 << 10) + MOST + 40 * (len(IMAGE.manifest) + 1024)
    assert len(transport.written) < room
    answered = 0
    while not connection.is_idle or not transport.reads:
        answered += transport.written.count(b"HTTP/1.1 200")
        transport.drain()
        await asyncio.sleep(0)
    assert answered + transport.written.count(b"HTTP/1.1 200") == sent
    await connection.end()


async def test_a_large_burst_is_answered_in_order_and_whole(hot: Hot) -> None:
    await hot.warm(MANIFEST, blob_path(SMALL.digest))
    connection = Connection(hot.side.server)
    pair = request(MANIFEST) + request(blob_path(SMALL.digest))
    await connection.send(pair * 60)
    await connection.settle()
    lengths = re.findall(rb"\r\nContent-Length: (\d+)", connection.transport.written)
    assert [int(one) for one in lengths] == [len(IMAGE.manifest), SMALL.size] * 60
    await connection.end()


async def test_what_is_remembered_of_heads_is_bounded_and_holds_no_secret(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    for number in range(MAX_HEADS + 50):
        assert await hot.is_hot(MANIFEST, User_Agent=f"agent/{number}")
    for _ in range(3):
        assert await hot.is_hot(MANIFEST, Authorization="Basic c2VjcmV0OnNlY3JldA==", X_Same="1")
        assert await hot.is_hot(MANIFEST, X_Same="2")
    assert len(hot.path.heads) <= MAX_HEADS
    assert any(b"X-Same: 2" in head for head in hot.path.heads)
    assert not any(b"c2Vj" in head for head in hot.path.heads)


async def test_heads_that_differ_in_an_id_are_read_for_all_else_that_they_say(hot: Hot) -> None:
    """After two such heads in a row the connection knows the third by what they have in common."""
    await hot.warm(MANIFEST)
    for number in range(4):
        assert await hot.is_hot(MANIFEST, X_Id=f"{number}")
    answer = await hot.ask(MANIFEST, X_Id="4", Accept="text/plain")
    assert answer.startswith("HTTP/1.1 404 ")
    for number in range(5, 8):
        assert (await hot.ask(MANIFEST, X_Id=f"{number}")).startswith("HTTP/1.1 200 ")
        assert await hot.is_hot(MANIFEST, X_Id=f"{number}", User_Agent="another")
    answer = await hot.ask(MANIFEST, X_Id="8", If_None_Match="*")
    assert answer.startswith("HTTP/1.1 304 ")
    assert not await hot.is_hot(blob_path(SMALL.digest), X_Id="9")
    assert await hot.is_hot(blob_path(SMALL.digest), X_Id="10")
    agents = [line["agent"] for line in hot.side.lines()[-9:-3]]
    assert agents == ["-", "another"] * 3
    answer = await hot.ask(blob_path(SMALL.digest), X_Id="11", Range="bytes=0-1")
    assert answer.startswith("HTTP/1.1 206 ")


async def test_prepared_answers_are_bounded_in_bytes(tmp_path: Path) -> None:
    memory = {"manifest_memory": 6_000, "blob_memory": 0}
    async with two_sides(tmp_path, FakeClock(), cache=memory) as (fast, _, pool, fake):
        images = [make_image(f"team/a{n}", "v1", layers=[100], seed=n) for n in range(6)]
        hot = Hot(fast, pool, fake, FakeClock())
        for image in images:
            fake.push(image)
            await hot.ask(manifest_path("v1", image.name))
            await pool.stored()
        assert 0 < hot.path.table.held <= 6_000
        assert len(hot.path.table) < len(images)


# -- the log ---------------------------------------------------------------------------------------


async def test_lines_are_written_in_the_turn_of_their_answers(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.lines()
    for _ in range(6):
        hot.connection.protocol.data_received(request(MANIFEST) * 50)
    assert len(hot.side.stream.getvalue().splitlines()) == 256  # as many as are held, at once
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(hot.side.stream.getvalue().splitlines()) == 300


async def test_no_line_is_lost_at_the_end(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.lines()
    hot.connection.protocol.data_received(request(MANIFEST) * 3)
    ending = asyncio.ensure_future(hot.side.server.shutdown(0.1))
    await ending
    assert len(hot.side.lines()) == 3


async def test_request_ids_differ_and_stand_in_the_log(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.lines()
    hot.connection.transport.written.clear()
    await hot.connection.send(request(MANIFEST) * 20, turns=3)
    told = re.findall(rb"X-Request-Id: ([0-9a-f]{16})\r", hot.connection.transport.written)
    lines = [json.loads(line) for line in hot.side.stream.getvalue().splitlines()]
    assert [line["request_id"] for line in lines] == [one.decode() for one in told]
    assert len(set(told)) == 20


async def test_ids_differ_from_one_lot_to_the_next(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.lines()
    for _ in range(IDS // 100 + 1):
        hot.connection.protocol.data_received(request(MANIFEST) * 50)
        hot.connection.protocol.data_received(request(MANIFEST) * 50)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    told = re.findall(rb"X-Request-Id: ([0-9a-f]{16})\r", hot.connection.transport.written)
    count = 100 * (IDS // 100 + 1)
    assert len(set(told[-count:])) == count > IDS
    lines = [json.loads(line) for line in hot.side.stream.getvalue().splitlines()]
    assert [line["request_id"] for line in lines] == [one.decode() for one in told[-count:]]


async def test_the_time_of_a_turn_stands_in_its_answers_and_lines(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.lines()
    dates, stamps = [], []
    for wall in (1e9, 1e9 + 0.25, 1e9 + 1, 1e9 - 1):
        hot.path.wall = lambda wall=wall: wall  # type: ignore[misc]
        dates += re.findall("Date: .* (\\S+) GMT", await hot.ask(MANIFEST))
        stamps.append(json.loads(hot.side.stream.getvalue().splitlines()[-1])["timestamp"])
    assert dates == ["01:46:40", "01:46:40", "01:46:41", "01:46:39"]
    assert stamps == [
        "2001-09-09T01:46:40Z",
        "2001-09-09T01:46:40.250000Z",
        "2001-09-09T01:46:41Z",
        "2001-09-09T01:46:39Z",
    ]


async def test_a_line_says_how_long_its_answer_took(hot: Hot) -> None:
    class Slow(MemoryTransport):
        def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
            super().write(data)
            hot.clock.advance(0.0123)

    await hot.warm(MANIFEST)
    hot.side.lines()
    hot.connection = Connection(hot.side.server, Slow())
    for _ in range(3):
        await hot.ask(MANIFEST)
    lines = [json.loads(line) for line in hot.side.stream.getvalue().splitlines()]
    assert [(line["ms"], line["first_byte_ms"]) for line in lines] == [(12.3, 12.3)] * 3
    labels = {"kind": "manifest", "cache": "hit"}
    assert hot.side.count("http_request_duration_seconds_bucket", le="0.02", **labels) == 5
    assert hot.side.count("http_request_duration_seconds_bucket", le="0.005", **labels) == 2
    assert hot.side.hot_hits == 4


@pytest.mark.parametrize("colour", [False, True])
async def test_lines_for_people_are_the_handlers_too(hot: Hot, colour: bool) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return colour

    side = make_side(hot.pool, hot=True, clock=FakeClock(), log_format="console", stream=Screen())
    connection = Connection(side.server)
    agent = 'an "agent" 100% =\x1b[1m'.replace("\x1b", "")
    for _ in range(2):
        await connection.send(request(MANIFEST + "?a=%20&token=x", User_Agent=agent))
        await connection.settle()
    slow, fast = (
        re.sub(r"20\d\d-[-0-9T:.]*Z|(?<=[=m])[0-9a-f]{16}|(?<=ms=)\S*\d\.\d", "", line)
        for line in side.stream.getvalue().splitlines()
    )
    assert side.hot_hits == 1
    assert "[redacted]" in fast
    assert fast == slow
    await connection.end()


async def test_slow_hot_answers_are_counted_where_they_belong(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    tally = hot.path.metrics.tally("manifest", "GET", "200")
    hot.path.metrics.count_hot(tally, 0.3, 100)
    labels = {"kind": "manifest", "cache": "hit"}
    buckets = {
        bound: hot.side.count("http_request_duration_seconds_bucket", le=bound, **labels)
        for bound in ("0.25", "0.5")
    }
    assert buckets["0.5"] == buckets["0.25"] + 1


# -- who asks --------------------------------------------------------------------------------------


async def lines_for(pool: Pullpool, peer: object, trusted: str, **headers: str) -> list[str]:
    """The clients in the log, of the handler's line and of the hot path's."""
    network = (ipaddress.ip_network(trusted),)
    side = make_side(pool, hot=True, clock=FakeClock(), trusted=network)
    connection = Connection(side.server, MemoryTransport(peer))
    for _ in range(2):
        await connection.send(request(MANIFEST, **headers))
        await connection.settle()
    await connection.end()
    assert side.hot_hits == 1
    return [line["client"] for line in side.lines()]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        (("192.0.2.7", 1), "198.51.100.9", "198.51.100.9"),
        (("192.0.2.7", 1), "203.0.113.1, 198.51.100.9", "198.51.100.9"),
        (("192.0.2.7", 1), "nonsense", "192.0.2.7"),
        (("203.0.113.5", 1), "198.51.100.9", "203.0.113.5"),
        ("unix", "198.51.100.9", "unix"),
        (None, "198.51.100.9", "unknown"),
    ],
)
async def test_the_client_is_whom_the_handler_would_name(
    hot: Hot, peer: object, forwarded: str, client: str
) -> None:
    found = await lines_for(hot.pool, peer, "192.0.2.0/24", X_Forwarded_For=forwarded)
    assert found == [client, client]


async def test_a_certificates_name_stands_in_the_line(hot: Hot) -> None:
    await hot.warm(MANIFEST)
    hot.side.lines()
    subject = ((("commonName", 'node "1" 100%'),),)
    transport = MemoryTransport(peercert={"subject": subject})
    connection = Connection(hot.side.server, transport)
    await connection.send(request("/v2/"), turns=5)
    await connection.settle()
    await connection.send(request(MANIFEST), turns=5)
    slow, fast = hot.side.lines()
    assert fast["user"] == slow["user"] == 'node "1" 100%'
    assert list(fast)[: len(list(slow)) - 3] == list(slow)[:-3]
    await connection.end()


async def test_a_connection_behind_the_proxy_protocol_is_hot(tmp_path: Path) -> None:
    settings = {"proxy_protocol": True, "trusted_proxies": ["127.0.0.0/8"]}
    async with pulling(tmp_path, **settings) as (pool, _):
        ask = request(MANIFEST).decode().replace("\r\n", "\n")
        for number in (1, 2):
            async with RawClient.connected(pool.address) as client:
                await client.send("PROXY TCP4 198.51.100.9 192.0.2.1 1 2\n" + ask)
                await client.rest(len(IMAGE.manifest))
            await until(lambda count=number: len(pool.access_log) == count)  # type: ignore[misc]
        assert pool.count("http_hot_requests_total", kind="manifest") == 1
        assert [line["client"] for line in pool.access_log] == ["198.51.100.9"] * 2


# -- switched off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"hot_path": False}, {"client_rate": "100MiB/s"}])
async def test_nothing_is_hot_where_it_may_not_be(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    async with pulling(tmp_path, **settings) as (pool, _):
        for _ in range(3):
            assert (await pool.get(MANIFEST)).status == 200
        assert pool.count("http_hot_requests_total", kind="manifest") == 0


async def test_without_memory_small_blobs_come_from_their_files(tmp_path: Path) -> None:
    async with pulling(tmp_path, cache={"blob_memory": 0}) as (pool, _):
        for _ in range(3):
            assert (await pool.get(blob_path(SMALL.digest))).body == SMALL.data
            await pool.stored()
        assert pool.count("http_hot_requests_total", kind="blob") == 0


async def test_over_the_wire_it_is_counted_and_logged(served: Served) -> None:
    pool, _ = served
    for _ in range(5):
        assert (await pool.get(MANIFEST)).body == IMAGE.manifest
    assert pool.count("http_hot_requests_total", kind="manifest") == 4
    labels = {"kind": "manifest", "method": "GET", "code": "200", "cache": "hit"}
    assert pool.count("http_requests_total", **labels) == 4
    assert pool.count("http_response_bytes_total", cache="hit") == 4 * len(IMAGE.manifest)
    assert [line["cache"] for line in pool.access_log] == ["miss", *["hit"] * 4]
