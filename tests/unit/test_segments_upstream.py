"""Blobs in segments over real sockets: a registry that misbehaves, redirects, cap and queue."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import DigestMismatch
from proxy.pull.reader import Reader
from proxy.testing import (
    Answer,
    Corrupt,
    Cut,
    FakeClock,
    FakeRegistry,
    Fault,
    IgnoreRange,
    Kind,
    Reset,
    WrongContentRange,
)
from proxy.throttle import Throttle
from proxy.upstream.blob import BlobSource
from tests.unit.flight_kit import KIB, Rig, Sipper, drink, ended, flying, until
from tests.unit.proxy_kit import UPSTREAM, RawClient, blob_path, running
from tests.unit.store_kit import blob
from tests.unit.upstream_kit import MIB, Puller, noise, sample

NAME = "team/app"
DATA = blob(5, 3 * MIB)
LEAST = 256 * KIB
CAP = 5  # one slot is kept for metadata


@dataclass
class Stack:
    """A registry, perhaps one that it redirects to, the client, and flights over that."""

    registry: FakeRegistry
    puller: Puller
    rig: Rig
    digest: Digest

    def join(self, client: str = "alice", digest: Digest | None = None) -> Reader:
        source = BlobSource(self.puller.client, NAME, digest or self.digest)
        reader, _ = self.rig.flights.join(source, client, size=None, named=True)
        self.rig.readers.append(reader)
        return reader

    async def pull(self, client: str = "alice", digest: Digest | None = None) -> bytes:
        reader = self.join(client, digest)
        try:
            return await drink(reader)
        finally:
            reader.close()

    @property
    def sent(self) -> int:
        return self.registry.counters.bytes_by_digest[self.digest]


@asynccontextmanager
async def stacked(
    directory: Path,
    *faults: Fault,
    cap: int = CAP,
    segments: int = 8,
    cdn: FakeRegistry | None = None,
    clock: FakeClock | None = None,
    throttle: Throttle | None = None,
    limit: int | None = None,
) -> AsyncIterator[Stack]:
    clock = clock or FakeClock()
    async with (
        FakeRegistry(limit=limit or cap, redirect_blobs_to=cdn, clock=clock) as registry,
        Puller(registry, cap=cap, segments=segments, clock=clock, throttle=throttle) as puller,
        flying(directory, segment_bytes=LEAST) as rig,
    ):
        digest = registry.put_blob(NAME, DATA)
        registry.script(*faults)
        yield Stack(registry, puller, rig, digest)
        assert registry.counters.peak_sockets <= cap


def starts(registry: FakeRegistry) -> list[int]:
    """Where the ranges that were asked for begin."""
    ranges = [seen.headers.get("Range", "bytes=0") for seen in registry.counters.seen]
    return [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges]


async def test_a_blob_comes_over_all_slots_but_the_kept_one_and_each_byte_once(
    tmp_path: Path,
) -> None:
    async with stacked(tmp_path) as stack:
        with stack.registry.hold(kind=Kind.BLOB) as hold:
            task = asyncio.create_task(stack.pull())
            await hold.arrived(1)
            assert stack.registry.counters.peak_requests <= 1
            hold.release(1)
            await hold.arrived(CAP - 1)
            hold.release()
            assert await task == DATA
        assert stack.sent == len(DATA)
        assert stack.registry.counters.peak_sockets == CAP - 1
        assert sorted(set(starts(stack.registry))) == sorted(starts(stack.registry))
        await ended(stack.rig.readers[0].flight)
        assert await stack.rig.kept(stack.digest) == DATA


async def test_segments_one_is_one_connection(tmp_path: Path) -> None:
    async with stacked(tmp_path, segments=1) as stack:
        assert await stack.pull() == DATA
        assert stack.registry.counters.peak_requests == 1
        assert stack.registry.counters.gets[stack.digest] == 1


@pytest.mark.parametrize("fault", [Cut(100 * KIB), Reset(100 * KIB), Cut(0), Answer(503)])
async def test_breaks_of_any_part_go_on_at_their_byte(
    tmp_path: Path, fault: Cut | Reset | Answer
) -> None:
    async with stacked(tmp_path) as stack:
        with stack.registry.hold(kind=Kind.BLOB) as hold:
            task = asyncio.create_task(stack.pull())
            await hold.arrived(1)
            hold.release(1)
            await hold.arrived(CAP - 2)
            stack.registry.script(Fault(fault, kind="blob", times=4))
            hold.release()
            assert await task == DATA
        assert stack.sent == len(DATA)


async def test_an_upstream_that_stands_one_request_serves_a_blob_all_the_same(
    tmp_path: Path,
) -> None:
    """Every further turn is answered with an overload: the cap falls, the flight goes on."""
    async with stacked(tmp_path, limit=1) as stack:
        assert await stack.pull() == DATA
        assert stack.puller.origin.gate.limit < CAP
        assert stack.sent == len(DATA)


async def test_an_upstream_without_range_is_read_in_one_stream(tmp_path: Path) -> None:
    async with stacked(tmp_path, Fault(IgnoreRange(), kind="blob", times=None)) as stack:
        assert await stack.pull() == DATA
        assert stack.sent == len(DATA)
        assert stack.registry.counters.peak_requests == 1


@pytest.mark.parametrize("lie", [IgnoreRange(), WrongContentRange(7)])
async def test_an_upstream_that_forgets_or_mistakes_ranges_is_read_in_one_stream(
    tmp_path: Path, lie: IgnoreRange | WrongContentRange
) -> None:
    async with stacked(tmp_path) as stack:
        with stack.registry.hold(kind=Kind.BLOB) as hold:
            task = asyncio.create_task(stack.pull())
            await hold.arrived(1)
            hold.release(1)
            await hold.arrived(CAP - 2)
            stack.registry.script(Fault(lie, kind="blob", times=None))
            hold.release()
            assert await task == DATA
        assert "Range" not in stack.registry.counters.seen[-1].headers
        await ended(stack.rig.readers[0].flight)
        assert await stack.rig.kept(stack.digest) == DATA


async def test_parts_of_another_blob_never_end_cleanly_and_the_next_try_is_one_stream(
    tmp_path: Path,
) -> None:
    clock = FakeClock()
    async with stacked(tmp_path, clock=clock) as stack:
        with stack.registry.hold(kind=Kind.BLOB) as hold:
            sipper = Sipper(stack.join())
            first = asyncio.create_task(sipper.rest())
            await hold.arrived(1)
            hold.release(1)
            await hold.arrived(CAP - 2)
            stack.registry.script(Fault(Corrupt(9), kind="blob"))
            hold.release()
            with pytest.raises(DigestMismatch):
                await first
        assert len(sipper.got) < len(DATA)
        await sipper.leave()
        await ended(sipper.reader.flight)
        assert stack.rig.store.size_of(stack.digest) is None
        stack.registry.counters.reset()
        assert await stack.pull("bob") == DATA
        assert stack.registry.counters.gets[stack.digest] == 1
        clock.advance(601)
        other = stack.registry.put_blob(NAME, blob(6, 3 * MIB))
        assert await stack.pull("bob", other) == blob(6, 3 * MIB)
        assert stack.registry.counters.gets[other] > 1


async def test_signed_urls_of_a_cdn_are_read_in_segments_and_asked_for_anew(
    tmp_path: Path,
) -> None:
    clock = FakeClock()
    async with AsyncExitStack() as stack_of:
        cdn = await stack_of.enter_async_context(FakeRegistry(clock=clock))
        stack = await stack_of.enter_async_context(stacked(tmp_path, cdn=cdn, clock=clock))
        with cdn.hold(kind="blob") as hold:
            task = asyncio.create_task(stack.pull())
            await hold.arrived(1)
            assert stack.registry.counters.gets[stack.digest] == 1
            hold.release(1)
            await hold.arrived(3)
            clock.advance(3600)  # what comes now is too late for the URL it was signed for
            hold.release()
            assert await task == DATA
        assert 1 < cdn.counters.peak_sockets <= 2 * CAP
        assert cdn.counters.bytes_by_digest[stack.digest] == len(DATA)
        assert stack.registry.counters.gets[stack.digest] > 1


async def test_a_byte_rate_holds_for_all_segments_together(tmp_path: Path) -> None:
    clock = FakeClock()
    throttle = Throttle(1 << 40, clock=clock)
    async with stacked(tmp_path, clock=clock, throttle=throttle) as stack:
        assert await stack.pull() == DATA
        assert stack.sent == len(DATA)


async def test_eight_blobs_at_once_each_get_their_turn_before_anybody_gets_a_further_one(
    tmp_path: Path,
) -> None:
    async with stacked(tmp_path) as stack:
        blobs = [blob(100 + n, 2 * MIB) for n in range(8)]
        digests = [stack.registry.put_blob(NAME, data) for data in blobs]
        with stack.registry.hold(kind=Kind.BLOB) as hold:
            tasks = [
                asyncio.create_task(stack.pull(f"client {n}", digest))
                for n, digest in enumerate(digests)
            ]
            await hold.arrived(CAP - 1)
            hold.release()
            assert await asyncio.gather(*tasks) == blobs
        order = [seen.path.rpartition("/")[2] for seen in stack.registry.counters.seen]
        firsts = [order.index(str(digest)) for digest in digests]
        repeated = [place for place, digest in enumerate(order) if digest in order[:place]]
        assert max(firsts) < min(repeated, default=len(order)) + CAP
        for digest, data in zip(digests, blobs, strict=True):
            assert stack.registry.counters.bytes_by_digest[digest] == len(data)


async def test_a_flight_that_comes_later_waits_for_the_end_of_one_segment_only(
    tmp_path: Path,
) -> None:
    async with stacked(tmp_path) as stack:
        other = stack.registry.put_blob(NAME, blob(9, 2 * MIB))
        with stack.registry.hold(kind=Kind.BLOB) as hold:
            first = asyncio.create_task(stack.pull())
            await hold.arrived(1)
            hold.release(1)
            await hold.arrived(CAP - 2)
            second = asyncio.create_task(stack.pull("bob", other))
            await until(lambda: stack.puller.origin.state().depth["blob"] == 1)
            # What was granted a slot before has arrived, too.
            await until(lambda: hold.waiting == stack.puller.origin.state().active)
            before = stack.registry.counters.gets[stack.digest]
            hold.release(1)  # one segment ends: its slot is the other's
            await until(lambda: stack.registry.counters.gets[other] == 1)
            assert stack.registry.counters.gets[stack.digest] == before
            hold.release()
            assert await first == DATA
            assert await second == blob(9, 2 * MIB)
        assert sample(stack.puller.metrics, "upstream_without_range_total") == 0


# -- a whole proxy -------------------------------------------------------------------------------

#: Bytes a second of a connection: fewer than are taken in, or it would remain the only one.
RATE = 20_000_000
#: Large enough for several segments of the size that a proxy gives them.
LARGE = noise(24 * MIB)


async def test_parts_go_on_at_another_url_of_the_upstream(tmp_path: Path) -> None:
    async with FakeRegistry(rate=RATE) as first, FakeRegistry(rate=RATE) as second:
        digest = first.put_blob(NAME, LARGE)
        second.put_blob(NAME, LARGE)
        urls = {UPSTREAM: {"url": first.url, "fallback_urls": [second.url]}}
        async with running(tmp_path, first.url, upstreams=urls) as pool:
            with first.hold(kind=Kind.BLOB) as hold:
                task = asyncio.create_task(pool.get(blob_path(digest)))
                await hold.arrived(1)
                hold.release(1)
                await hold.arrived(2)
                first.script(Fault(Answer(503), kind="blob", times=None))
                hold.release()
                answer = await task
            assert answer.status == 200
            assert answer.body == LARGE
            sent = [one.counters.bytes_by_digest[digest] for one in (first, second)]
            assert all(sent)
            assert sum(sent) == len(LARGE)
            assert await pool.stored() == {str(digest)}


async def test_a_client_of_wrong_parts_is_reset_and_the_next_one_is_served(tmp_path: Path) -> None:
    async with FakeRegistry(rate=RATE) as registry:
        digest = registry.put_blob(NAME, LARGE)
        async with (
            running(tmp_path, registry.url) as pool,
            RawClient.connected(pool.address) as client,
        ):
            with registry.hold(kind=Kind.BLOB) as hold:
                await client.ask(blob_path(digest))
                await hold.arrived(1)
                hold.release(1)
                await hold.arrived(2)
                registry.script(Fault(Corrupt(9), kind="blob"))
                hold.release()
                assert await client.ending() == "RST"
            assert len(client.body) < len(LARGE)
            assert await pool.stored() == set()
            answer = await pool.get(blob_path(digest))
            assert answer.body == LARGE
            assert await pool.stored() == {str(digest)}
