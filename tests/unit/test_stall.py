"""A body that comes too slowly is given up; one that we do not read is not (DESIGN D8, D18)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from proxy.oci.digest import Chunk
from proxy.oci.errors import UpstreamStalled
from proxy.pull.pump import pump
from proxy.pull.sources import TRIES
from proxy.testing import FakeClock, FakeRegistry, Fault, Stall
from proxy.throttle import Throttle
from proxy.upstream.blob import BlobSource
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.origin import Origin
from proxy.upstream.stall import StallLimit, StallMeter
from tests.unit.fake_kit import IMAGE
from tests.unit.flight_kit import a_while
from tests.unit.proxy_kit import NAME, UPSTREAM, blob_path, pulling, until
from tests.unit.upstream_kit import (
    LOOPS,
    MIB,
    ROBOT,
    Puller,
    noise,
    run_on,
    sample,
    ticket,
    tls,
)

KIB = 1 << 10
#: By the injected clock a window is as long as it says; by the loop's, which only wakes who looks
#: at the former, it is no time at all.
QUICK = StallLimit(rate=1024.0, window=0.01)


# -- the meter ---------------------------------------------------------------------------------


def test_silence_is_a_stall_after_the_window() -> None:
    meter = StallMeter(StallLimit(1024, 30))
    assert meter.patience == 30
    meter.received(0, 29.9)
    assert meter.patience == pytest.approx(0.1)
    meter.received(0, 0.1)
    assert meter.patience <= 0


def test_a_body_at_the_rate_is_no_stall_however_long_it_lasts() -> None:
    meter = StallMeter(StallLimit(1024, 30))
    for _ in range(10_000):
        meter.received(1024, 1.0)
        assert meter.patience > 0


def test_a_body_below_the_rate_is_a_stall_though_it_is_never_silent() -> None:
    meter = StallMeter(StallLimit(1024, 30))
    waits = 0
    while meter.patience > 0:
        meter.received(1000, 1.0)
        waits += 1
    assert waits == 30


def test_a_fast_body_that_goes_silent_is_a_stall_one_window_later() -> None:
    meter = StallMeter(StallLimit(1024, 30))
    for _ in range(1000):
        meter.received(MIB, 0.01)
    meter.received(0, 29.0)
    assert 0 < meter.patience < 1.1
    meter.received(0, 1.1)
    assert meter.patience <= 0


def test_what_it_remembers_is_bounded() -> None:
    meter = StallMeter(StallLimit(1024, 30))
    for _ in range(100_000):
        meter.received(1, 0.0001)
    assert len(meter._reads) <= 33


@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 12)), max_size=60))
def test_the_meter_says_what_adding_up_the_window_says(waits: Sequence[tuple[int, int]]) -> None:
    """Against the definition; whole seconds, so that no two reads are put together."""
    limit = StallLimit(1024, 30)
    meter, reads, now = StallMeter(limit), list[tuple[int, int]](), 0
    for count, seconds in waits:
        now += seconds
        before = sum(n for at, n in reads if at > now - limit.window)
        # Asked just before these bytes came, and just after.
        assert (meter.patience - seconds <= 0) is (now >= 30 and before < 1024 * 30)
        meter.received(count, seconds)
        reads.append((now, count))
        inside = sum(n for at, n in reads if at > now - limit.window)
        assert (meter.patience <= 0) is (now >= 30 and inside < 1024 * 30)


async def stand_still(
    clock: FakeClock, is_over: Callable[[], bool], *, stalled: Callable[[], bool] = lambda: True
) -> None:
    """Let what has been sent arrive, and time pass while something is ``stalled``, until it is
    over. On a busy machine what is under way would seem to stall as well."""
    while not is_over():
        await a_while()
        if stalled():
            clock.advance(1.0)


# -- a turn ------------------------------------------------------------------------------------


both_paths = pytest.mark.parametrize("fast", [True, False], ids=["fast", "aiohttp"])


@contextlib.asynccontextmanager
async def puller(
    registry: FakeRegistry,
    clock: FakeClock,
    *,
    throttle: Throttle | None = None,
    fast: bool = True,
) -> AsyncIterator[Puller]:
    settings = OriginSettings(tls=tls().client, stall=QUICK, fast_receive=fast)
    async with Puller(registry, cap=1, settings=settings, clock=clock, throttle=throttle) as one:
        yield one


async def read_all(origin: Origin, url: URL) -> bytes:
    received = bytearray()
    async with origin.turn(ticket()) as turn:
        await turn.request("GET", url)
        while data := await turn.read():
            received += data
    return bytes(received)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@both_paths
def test_a_stalled_body_ends_its_socket_and_the_slot_goes_on(
    loop: str, secure: bool, fast: bool
) -> None:
    async def main() -> None:
        clock = FakeClock()
        server = tls().server if secure else None
        async with (
            FakeRegistry(ssl_context=server) as registry,
            puller(registry, clock, fast=fast) as one,
        ):
            digest = registry.put_blob(NAME, noise(MIB))
            url = URL(registry.url + blob_path(digest))
            registry.script(Fault(Stall(after=300 * KIB)))
            reading = asyncio.create_task(read_all(one.origin, url))
            await registry.stalls.arrived()
            await stand_still(clock, reading.done)
            with pytest.raises(UpstreamStalled, match="less than 1024 bytes a second came for"):
                await reading
            await until(lambda: registry.counters.sockets_now == 0)
            assert await read_all(one.origin, url) == noise(MIB)
            label = one.origin.key.label
            assert sample(one.metrics, "upstream_stalls_total", upstream=label) == 1
            assert (registry.counters.accepted, registry.counters.peak_sockets) == (2, 1)

    run_on(loop, main())


@both_paths
async def test_a_body_is_not_given_up_while_the_clock_says_that_there_is_time(fast: bool) -> None:
    """The loop's timer fires again and again; the verdict is the injected clock's."""
    clock, looks = FakeClock(), 0

    def counting() -> float:
        nonlocal looks
        looks += 1
        return clock()

    async with FakeRegistry() as registry, puller(registry, clock, fast=fast) as one:
        one.origin.clock = counting
        digest = registry.put_blob(NAME, noise(MIB))
        registry.script(Fault(Stall(after=300 * KIB)))
        url = URL(registry.url + blob_path(digest))
        reading = asyncio.create_task(read_all(one.origin, url))
        await registry.stalls.arrived()
        before = looks
        await until(lambda: looks > before + 8)
        registry.release()
        assert await reading == noise(MIB)


@both_paths
async def test_a_disk_that_is_slow_for_days_is_no_stall(fast: bool) -> None:
    """The pump stops reading, TCP stops the upstream, and its bytes are there when it reads on."""
    clock, size = FakeClock(), 48 * MIB
    begun, go = asyncio.Event(), asyncio.Event()
    taken = bytearray()

    async def take(chunks: list[Chunk]) -> None:
        begun.set()
        await go.wait()
        taken.extend(b"".join(chunks))

    async with FakeRegistry() as registry, puller(registry, clock, fast=fast) as one:
        digest = registry.put_blob(NAME, noise(size))
        async with one.origin.turn(ticket()) as turn:
            await turn.request("GET", URL(registry.url + blob_path(digest)))
            pumping = asyncio.create_task(pump(turn, take))
            await begun.wait()
            sent = -1
            while sent < registry.counters.bytes_sent:  # until TCP holds the upstream back
                sent = registry.counters.bytes_sent
                await asyncio.sleep(0.05)
            assert sent < size
            clock.advance(1e6)
            go.set()
            assert await pumping
        assert taken == noise(size)


@both_paths
async def test_a_cap_on_bytes_is_no_stall(fast: bool) -> None:
    """An hour for every piece is slower than the limit, by our own doing."""
    clock = FakeClock()
    throttle = Throttle(4 * MIB, clock=clock)
    async with (
        FakeRegistry() as registry,
        puller(registry, clock, throttle=throttle, fast=fast) as one,
    ):
        digest = registry.put_blob(NAME, noise(8 * MIB))
        reading = asyncio.create_task(one.read(BlobSource(one.client, NAME, digest)))
        hours = 0
        while not reading.done():
            if throttle.waiting:
                clock.advance(3600.0)
                hours += 1
            await asyncio.sleep(0)
        assert hours > 1
        assert reading.result() == noise(8 * MIB)


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An answer of a million bytes, one byte at a time, as fast as they are taken."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0)
    writer.close()


async def ignore(_chunks: list[Chunk]) -> None:
    """Where nobody looks at them."""


async def test_a_trickle_is_a_stall() -> None:
    clock, seconds = FakeClock(), itertools.count()  # every look at the clock is a second later
    async with FakeRegistry() as unused, puller(unused, clock) as one:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        url = URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        origin = await one.origins.foreign(url, OriginSettings(stall=StallLimit(1e6, 30.0)))
        origin.clock = lambda: float(next(seconds))
        async with origin.turn(ticket()) as turn:
            await turn.request("GET", url)
            with pytest.raises(UpstreamStalled):
                await pump(turn, ignore)
        server.close()
        await server.wait_closed()


# -- what a pull is made of --------------------------------------------------------------------


async def test_a_manifest_that_stalls_is_given_up() -> None:
    clock = FakeClock()
    async with FakeRegistry() as registry, puller(registry, clock) as one:
        registry.push(IMAGE)
        registry.script(Fault(Stall(after=10), kind="manifest"))
        asking = asyncio.create_task(one.client.manifest(IMAGE.name, IMAGE.tag, ticket()))
        await registry.stalls.arrived()
        await stand_still(clock, asking.done)
        with pytest.raises(UpstreamStalled):
            await asking
        assert (await one.client.manifest(IMAGE.name, IMAGE.tag, ticket()))[0] == IMAGE.manifest


async def test_a_token_that_stalls_is_given_up() -> None:
    clock = FakeClock()
    users = {ROBOT.username: ROBOT.password}
    async with FakeRegistry(auth="bearer", users=users) as registry:
        registry.push(IMAGE)
        settings = OriginSettings(stall=QUICK)
        async with Puller(registry, credentials=ROBOT, settings=settings, clock=clock) as one:
            registry.script(Fault(Stall(after=10), kind="token"))
            asking = asyncio.create_task(one.client.manifest(IMAGE.name, IMAGE.tag, ticket()))
            await registry.stalls.arrived()
            await stand_still(clock, asking.done)
            with pytest.raises(UpstreamStalled):
                await asking
            label = one.origin.key.label
            assert sample(one.metrics, "upstream_stalls_total", upstream=label) == 1
            assert (await one.client.manifest(IMAGE.name, IMAGE.tag, ticket()))[0] == IMAGE.manifest


# -- through the whole proxy -------------------------------------------------------------------

STALLING = {UPSTREAM: {"stall_time": "1s"}}


async def test_a_blob_that_stalls_goes_on_at_its_byte_on_a_fresh_socket(tmp_path: Path) -> None:
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock, upstreams=STALLING) as (pool, fake):
        digest = fake.put_blob(NAME, noise(MIB))
        fake.script(Fault(Stall(after=100 * KIB), kind="blob"))
        asking, label = asyncio.create_task(pool.get(blob_path(digest))), fake.netloc
        await fake.stalls.arrived()
        flights = pool.proxy.puller.flights
        await until(lambda: any(flight.mark == 100 * KIB for flight in flights.all()))
        # No longer: the fresh socket must not seem to stall too.
        await stand_still(clock, lambda: pool.count("upstream_stalls_total", upstream=label) == 1)
        answer = await asking
        assert (answer.status, answer.body) == (200, noise(MIB))
        asked = [seen.headers.get("Range", "") for seen in fake.counters.seen]
        assert [text.partition("-")[0] for text in asked] == ["bytes=0", f"bytes={100 * KIB}"]
        assert pool.count("upstream_stalls_total", upstream=label) == 1
        assert pool.count("upstream_resumes_total", upstream=UPSTREAM) == 1
        assert pool.count("upstream_overloads_total", upstream=label) == 0
        assert (fake.counters.accepted, fake.counters.peak_sockets) == (2, 1)
        assert str(digest) in await pool.stored()


async def test_a_far_range_that_stalls_goes_on_at_its_byte(tmp_path: Path) -> None:
    """A turn of a reader's own, beside a fill that stalls as well."""
    clock, size = FakeClock(), 24 * MIB
    async with pulling(tmp_path, clock=clock, upstreams=STALLING) as (pool, fake):
        digest = fake.put_blob(NAME, noise(size))
        fake.script(Fault(Stall(after=100 * KIB), kind="blob", times=2))
        whole = asyncio.create_task(pool.get(blob_path(digest)))
        await fake.stalls.arrived()
        wanted = f"bytes={size - MIB}-{size - 1}"
        part = asyncio.create_task(pool.get(blob_path(digest), Range=wanted))
        await fake.stalls.arrived(2)
        await stand_still(
            clock, lambda: fake.counters.count("blob") >= 4, stalled=lambda: fake.stalls.waiting > 0
        )
        assert (await part).body == noise(size)[-MIB:]
        assert (await whole).body == noise(size)
        assert pool.count("upstream_stalls_total", upstream=fake.netloc) >= 2


async def test_an_upstream_that_stalls_before_every_byte_fails_the_pull(tmp_path: Path) -> None:
    clock = FakeClock()
    async with pulling(tmp_path, clock=clock, upstreams=STALLING) as (pool, fake):
        digest = fake.put_blob(NAME, noise(MIB))
        fake.script(Fault(Stall(after=0), kind="blob", times=None))
        asking = asyncio.create_task(pool.get(blob_path(digest)))
        await stand_still(clock, asking.done)
        with pytest.raises(aiohttp.ClientPayloadError):  # its head had come, and gone on
            await asking
        assert pool.access_log[-1]["reason"] == "upstream_stalled"
        assert pool.count("upstream_stalls_total", upstream=fake.netloc) == TRIES
        fake.release()
