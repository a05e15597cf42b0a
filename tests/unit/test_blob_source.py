"""A blob as a source of bytes: ranges, redirects that are remembered, and upstreams that cheat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, PullError, UpstreamBusy, UpstreamUnavailable
from proxy.testing import (
    Answer,
    Corrupt,
    Cut,
    FakeClock,
    FakeRegistry,
    Fault,
    IgnoreRange,
    Reset,
    Stall,
    WrongContentRange,
)
from proxy.upstream.blob import BlobSource, Body
from proxy.upstream.origin import OVERRUN, TURN_SECONDS
from proxy.upstream.turns import TurnClass
from tests.unit.upstream_kit import LOOPS, MIB, Puller, noise, run_on, sample, ticket, tls, until

DATA = noise(300_000)
DIGEST = Digest.of(DATA)


def holding(registry: FakeRegistry, data: bytes = DATA) -> FakeRegistry:
    registry.put_blob("team/app", data)
    return registry


def source_of(puller: Puller, digest: Digest = DIGEST) -> BlobSource:
    return BlobSource(puller.client, "team/app", digest)


# -- ranges ------------------------------------------------------------------------------------


async def test_a_blob_comes_range_by_range() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        source = source_of(puller)
        parts = [await puller.read(source, start, 100_000) for start in (0, 100_000, 200_000)]
        assert b"".join(parts) == DATA
        assert await puller.read(source, 299_999, 5) == DATA[-1:]
        assert await puller.read(source) == DATA
        assert await puller.read(source, 100) == DATA[100:]
        assert registry.counters.peak_sockets == 1
        assert (
            sample(puller.metrics, "upstream_bytes_total", upstream=puller.origin.key.label)
            == 2 * len(DATA) + 1 + len(DATA) - 100
        )


async def test_a_turn_tells_where_it_starts_and_how_large_the_blob_is() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        async with source_of(puller).open(7, 10, ticket()) as body:
            assert (body.start, body.total) == (7, len(DATA))
        assert source_of(puller).key == ("upstream", "team/app")
        assert source_of(puller).ahead == 0


async def test_an_upstream_without_range_is_noticed_and_what_is_held_is_skipped() -> None:
    async with holding(FakeRegistry(ranges=False)) as registry, Puller(registry) as puller:
        source = source_of(puller)
        assert await puller.read(source, 0, 1000) == DATA
        assert not source.ranged
        assert await puller.read(source, 123_456, 1000) == DATA[123_456:]
        assert "Range" in registry.counters.seen[0].headers
        assert "Range" not in registry.counters.seen[1].headers
        label = puller.origin.key.label
        assert sample(puller.metrics, "upstream_without_range_total", upstream=label) == 1


async def test_a_range_that_was_ignored_once_is_served_all_the_same() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(IgnoreRange()))
        assert await puller.read(source_of(puller), 200_000, 10) == DATA[200_000:]


async def test_an_empty_blob_has_no_range_and_no_bytes() -> None:
    async with holding(FakeRegistry(), b"") as registry, Puller(registry) as puller:
        source = source_of(puller, Digest.of(b""))
        async with source.open(0, 1000, ticket()) as body:
            assert body.total == 0
            assert await body.read() == b""
        assert puller.origin.state().active == 0


async def test_a_range_behind_the_end_is_the_upstreams_failure() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        with pytest.raises(UpstreamUnavailable, match="ends before"):
            await puller.read(source_of(puller), len(DATA), 10)


CHEATS: Mapping[str, Answer | WrongContentRange] = {
    "another range": WrongContentRange(1),
    "no Content-Range": Answer(206, {}, b"x" * 10),
    "a malformed one": Answer(206, {"Content-Range": "bytes ten of many"}, b"x" * 10),
    "a longer range": Answer(206, {"Content-Range": "bytes 0-10/300000"}, b"x" * 11),
    "more than it says": Answer(206, {"Content-Range": "bytes 0-4/300000"}, b"x" * 10),
    "an encoded body": Answer(200, {"Content-Encoding": "gzip"}, b"x" * 10),
}


@pytest.mark.parametrize("cheat", CHEATS)
async def test_an_answer_that_is_not_what_was_asked_for_is_refused(cheat: str) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(CHEATS[cheat]))
        with pytest.raises(UpstreamUnavailable):
            await puller.read(source_of(puller), 0, 10)
        assert await puller.read(source_of(puller), 0, 10) == DATA[:10]
        assert puller.origin.state().active == 0


async def test_fewer_bytes_than_asked_for_are_a_shorter_turn() -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(206, {"Content-Range": "bytes 0-4/300000"}, DATA[:5])))
        assert await puller.read(source_of(puller), 0, 10) == DATA[:5]


@pytest.mark.parametrize("fault", [Cut(50_000), Reset(50_000)])
async def test_a_body_that_breaks_can_be_gone_on_with_at_its_byte(fault: Cut | Reset) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        registry.script(Fault(fault))
        source, received = source_of(puller), bytearray()

        async def turn() -> None:
            async with source.open(len(received), None, ticket()) as body:
                while data := await body.read():
                    received.extend(data)

        with pytest.raises(UpstreamUnavailable):
            await turn()
        assert 0 <= len(received) <= 50_000
        assert received == DATA[: len(received)]
        await turn()
        assert received == DATA
        assert registry.counters.peak_sockets == 1


async def test_bytes_are_handed_on_as_they_came() -> None:
    """What is wrong with them is found by those who know the digest."""
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Corrupt(3)))
        assert (await puller.read(source_of(puller), 0, 10))[3] == DATA[3] ^ 0xFF


@pytest.mark.parametrize(("status", "error"), [(404, NotFound), (403, Denied), (401, UpstreamBusy)])
async def test_a_refusal_of_the_registry_is_one(status: int, error: type[PullError]) -> None:
    async with holding(FakeRegistry()) as registry, Puller(registry) as puller:
        registry.script(Fault(Answer(status)))
        with pytest.raises(error):
            await puller.read(source_of(puller))


# -- redirects ---------------------------------------------------------------------------------


async def test_the_turns_of_a_blob_do_not_each_ask_the_registry() -> None:
    async with (
        FakeRegistry() as cdn,
        holding(FakeRegistry(redirect_blobs_to=cdn)) as registry,
        Puller(registry) as puller,
    ):
        source = source_of(puller)
        for start in range(0, 300_000, 100_000):
            assert await puller.read(source, start, 100_000) == DATA[start : start + 100_000]
        assert registry.counters.count("blob") == 1
        assert cdn.counters.count("blob") == 3
        assert cdn.counters.authorization_leaks == 0


async def test_a_signed_url_that_expired_is_asked_for_anew() -> None:
    wall = FakeClock()
    cdn = FakeRegistry(clock=wall)
    registry = holding(FakeRegistry(redirect_blobs_to=cdn, signed_url_ttl=60, clock=wall))
    async with cdn, registry, Puller(registry) as puller:
        source = source_of(puller)
        assert await puller.read(source, 0, 10) == DATA[:10]
        wall.advance(61)
        assert await puller.read(source, 10, 10) == DATA[10:20]
        assert registry.counters.count("blob") == 2
        assert cdn.counters.count("blob") == 3  # one of them refused
        assert cdn.counters.peak_sockets == 1
        assert await puller.read(source, 20, 10) == DATA[20:30]
        assert registry.counters.count("blob") == 2


async def test_after_a_failure_the_registry_may_send_elsewhere() -> None:
    async with (
        FakeRegistry() as cdn,
        holding(FakeRegistry(redirect_blobs_to=cdn)) as registry,
        Puller(registry) as puller,
    ):
        source = source_of(puller)
        await puller.read(source, 0, 10)
        cdn.script(Fault(Answer(500)))
        with pytest.raises(UpstreamUnavailable):
            await puller.read(source, 10, 10)
        assert await puller.read(source, 10, 10) == DATA[10:20]
        assert registry.counters.count("blob") == 2


@pytest.mark.parametrize("status", [400, 401, 403, 410])
async def test_a_refusal_of_the_storage_is_not_a_denial_of_the_repository(status: int) -> None:
    async with (
        FakeRegistry() as cdn,
        holding(FakeRegistry(redirect_blobs_to=cdn)) as registry,
        Puller(registry) as puller,
    ):
        cdn.script(Fault(Answer(status)))
        with pytest.raises(UpstreamUnavailable):
            await puller.read(source_of(puller), 0, 10)
        assert await puller.read(source_of(puller), 0, 10) == DATA[:10]


# -- turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_turn_that_is_left_stops_the_download(loop: str, secure: bool) -> None:
    """Through a redirect, so that both origins are seen to come clean."""

    async def main() -> None:
        server = tls().server if secure else None
        async with FakeRegistry(ssl_context=server) as cdn:
            front = FakeRegistry(ssl_context=server, redirect_blobs_to=cdn)
            async with holding(front, noise(64 * MIB)), Puller(front, cap=1) as puller:
                source = source_of(puller, Digest.of(noise(64 * MIB)))
                async with source.open(0, None, ticket()) as body:
                    assert await body.read()
                await until(lambda: cdn.counters.sockets_now == 0)
                assert cdn.counters.bytes_sent < 16 * MIB
                assert all(state.active == 0 for state in puller.origins.states())

    run_on(loop, main())


@pytest.mark.parametrize("ranges", [True, False])
async def test_only_a_turn_that_can_be_gone_on_with_is_cut_for_a_rival(ranges: bool) -> None:
    async with (
        holding(FakeRegistry(ranges=ranges)) as registry,
        Puller(registry, cap=1) as puller,
    ):
        async with source_of(puller).open(0, 1000, ticket(TurnClass.BLOB)) as body:
            rival = asyncio.create_task(puller.read(source_of(puller)))
            await until(lambda: source_of(puller).ahead == 1)
            puller.clock.advance(TURN_SECONDS * OVERRUN + 1)
            assert body.is_overdue == ranges
        assert await rival == DATA


@asynccontextmanager
async def standing_still(came: int) -> AsyncIterator[tuple[Puller, Body]]:
    """A turn that has brought so many bytes and brings no more, and whose slot somebody waits for;
    at the end he has it."""
    async with holding(FakeRegistry()) as registry, Puller(registry, cap=1) as puller:
        registry.script(Fault(Stall(after=came), kind="blob"))
        async with source_of(puller).open(0, len(DATA), ticket(TurnClass.BLOB)) as body:
            taken = 0
            while taken < came:
                taken += len(await body.borrow())
            rival = asyncio.create_task(puller.read(source_of(puller)))
            await until(lambda: source_of(puller).ahead == 1)
            yield puller, body
        registry.release()
        assert await rival == DATA


@pytest.mark.parametrize(("came", "is_cut"), [(200_000, False), (100_000, True)])
async def test_a_turn_whose_rest_would_come_soon_is_not_cut(came: int, is_cut: bool) -> None:
    async with standing_still(came) as (puller, body):
        puller.clock.advance(TURN_SECONDS * OVERRUN + 1)
        assert body.is_overdue == is_cut


async def test_a_turn_that_trickles_shortly_before_its_end_is_cut_all_the_same() -> None:
    async with standing_still(len(DATA) - 1000) as (puller, body):
        puller.clock.advance(20.0)  # nobody had to wait so far
        assert not body.is_overdue
        puller.clock.advance(TURN_SECONDS * OVERRUN)
        assert not body.is_overdue
        puller.clock.advance(1.0)
        assert body.is_overdue


async def test_the_next_turn_is_sized_by_the_speed_of_where_the_bytes_come_from() -> None:
    data = noise(2 * MIB)
    cdn = FakeRegistry()
    async with (
        cdn,
        holding(FakeRegistry(redirect_blobs_to=cdn), data) as registry,
        Puller(registry) as puller,
    ):
        source = source_of(puller, Digest.of(data))
        before = source.turn_bytes
        for _ in range(20):
            async with source.open(0, None, ticket()) as body:
                while await body.read():
                    pass
                puller.clock.advance(2)
                body.learn()
        assert source.turn_bytes < before
        assert abs(source.turn_bytes - 2 * MIB) < MIB // 4
        assert puller.origin.turn_bytes == before
