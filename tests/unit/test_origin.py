"""Sockets: how many there are, what becomes of them, and whose gate they stand behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import ShuttingDown
from proxy.testing import Answer, Cut, Disconnect, FakeClock, FakeRegistry, Fault, Hang, Reset
from proxy.testing.faults import Action
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.origin import (
    MAX_TURN_BYTES,
    MIN_TURN_BYTES,
    OVERRUN,
    TURN_SECONDS,
    Origin,
)
from proxy.upstream.origins import Origins
from proxy.upstream.turns import TurnClass
from tests.unit.upstream_kit import LOOPS, MIB, Mute, noise, opened, run_on, ticket, tls, until

every_loop = pytest.mark.parametrize("loop", LOOPS)
plain_and_tls = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])

#: What may be on its way in the buffers of both kernels when a download is given up.
BUFFERS = 16 * MIB


def make_origin(url: str, cap: int, *, clock: FakeClock | None = None, **changes: float) -> Origin:
    settings = OriginSettings(
        max_connections=cap,
        tls=tls().client,
        connect_timeout=changes.get("connect_timeout", 10.0),
        read_timeout=changes.get("read_timeout", 60.0),
    )
    key = OriginKey.of(URL(url))
    return Origin(key, settings, metrics=Metrics(), clock=clock or FakeClock())


class Site:
    """A registry with one blob, and the origin that leads to it."""

    def __init__(self, registry: FakeRegistry, origin: Origin, digest: Digest) -> None:
        self.registry = registry
        self.origin = origin
        self.url = URL(f"{registry.url}/v2/team/app/blobs/{digest}")

    async def pull(self) -> bytes:
        """The whole blob, in a turn of its own."""
        async with self.origin.turn(ticket()) as turn:
            return await (await turn.request("GET", self.url)).read()

    async def leave(self) -> None:
        """Begin to read the blob and leave."""
        async with self.origin.turn(ticket()) as turn:
            await (await turn.request("GET", self.url)).content.readany()

    async def warm_up(self, count: int) -> None:
        """Have ``count`` idle sockets."""
        async with contextlib.AsyncExitStack() as turns:
            for _ in range(count):
                turn = await turns.enter_async_context(self.origin.turn(ticket()))
                await (await turn.request("HEAD", self.url)).read()

    async def closed(self) -> None:
        """Until the registry has seen all sockets go."""
        await until(lambda: self.registry.counters.sockets_now == 0)


@contextlib.asynccontextmanager
async def site(
    cap: int, *, secure: bool = False, size: int = MIB, clock: FakeClock | None = None
) -> AsyncIterator[Site]:
    server = tls().server if secure else None
    async with FakeRegistry(ssl_context=server) as registry:
        digest = registry.put_blob("team/app", noise(size))
        async with opened(make_origin(registry.url, cap, clock=clock)) as origin:
            yield Site(registry, origin, digest)


# -- the cap -----------------------------------------------------------------------------------


@every_loop
@plain_and_tls
def test_a_crowd_that_behaves_badly_never_has_more_sockets_than_the_cap(
    loop: str, secure: bool
) -> None:
    """Read, abandoned, cancelled, cut, reset, disconnected and closed answers, in any order."""

    async def main() -> None:
        chance = random.Random(1)
        async with site(3, secure=secure) as here:
            closing = Answer(200, {"Connection": "close"}, b"x" * 1000)
            faults: list[Action] = [
                Cut(1000),
                Reset(1000),
                Disconnect(),
                Disconnect(reset=True),
                closing,
            ]
            here.registry.script(*(Fault(chance.choice(faults), method="GET") for _ in range(40)))
            pulls = [
                asyncio.create_task(chance.choice([here.pull, here.leave])()) for _ in range(90)
            ]
            for pull in chance.sample(pulls, 20):
                for _ in range(chance.randrange(20)):
                    await asyncio.sleep(0)
                pull.cancel()
            outcomes = await asyncio.gather(*pulls, return_exceptions=True)
            expected = (aiohttp.ClientError, asyncio.CancelledError)
            assert all(isinstance(o, expected) for o in outcomes if isinstance(o, BaseException))
            assert sum(isinstance(o, bytes | None) for o in outcomes) > 20
            assert here.registry.counters.peak_sockets == 3
            state = here.origin.state()
            assert (state.active, sum(state.depth.values())) == (0, 0)
            assert await here.pull() == noise(MIB)

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_socket_is_used_again_after_a_body_that_was_read(loop: str, secure: bool) -> None:
    async def main() -> None:
        async with site(2, secure=secure) as here:
            for _ in range(5):
                assert await here.pull() == noise(MIB)
            assert here.registry.counters.peak_sockets == 1
            assert here.origin.state().idle == 1

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_body_that_nobody_reads_on_stops_coming(loop: str, secure: bool) -> None:
    async def main() -> None:
        async with site(1, secure=secure, size=64 * MIB) as here:
            await here.leave()
            await here.closed()
            assert not here.origin.is_open
            assert here.registry.counters.bytes_sent < BUFFERS

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_request_cancelled_before_its_answer_leaves_no_socket(loop: str, secure: bool) -> None:
    async def main() -> None:
        async with site(1, secure=secure, size=64 * MIB) as here:
            here.registry.script(Fault(Hang()))
            pull = asyncio.create_task(here.pull())
            await here.registry.stalls.arrived()
            pull.cancel()
            await asyncio.wait([pull])
            await here.closed()
            here.registry.release()
            assert not here.origin.is_open
            assert here.registry.counters.bytes_sent == 0
            await here.leave()
            assert here.registry.counters.peak_sockets == 1

    run_on(loop, main())


@every_loop
def test_a_socket_is_closed_before_its_lane_dials_again(loop: str) -> None:
    """Cancelled at every loop turn between the first step and a hanging TLS handshake."""

    async def main() -> None:
        with Mute() as mute:
            async with opened(make_origin(mute.url, 1)) as origin:
                for steps in range(25):
                    async with origin.turn(ticket()) as turn:
                        dial = asyncio.create_task(turn.request("GET", URL(mute.url)))
                        for _ in range(steps):
                            await asyncio.sleep(0)
                        dial.cancel()
                        await asyncio.wait([dial])
                        assert dial.cancelled()
                async with origin.turn(ticket()) as turn:
                    dial = asyncio.create_task(turn.request("GET", URL(mute.url)))
                    await until(lambda: mute.established == 1)
                    dial.cancel()
                    await asyncio.wait([dial])
                await until(lambda: mute.established == 0)
                assert mute.peak == 1
                assert not origin.is_open

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_second_request_in_a_turn_aborts_what_is_left_of_the_first(
    loop: str, secure: bool
) -> None:
    async def main() -> None:
        async with site(1, secure=secure, size=64 * MIB) as here:
            async with here.origin.turn(ticket()) as turn:
                await turn.request("GET", here.url)
                answer = await turn.request("HEAD", here.url)
                assert answer.status == 200
            assert here.registry.counters.peak_sockets == 1
            assert here.registry.counters.bytes_sent < BUFFERS

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_lower_limit_closes_idle_sockets_before_anything_is_sent(loop: str, secure: bool) -> None:
    async def main() -> None:
        async with site(4, secure=secure) as here:
            await here.warm_up(4)
            assert here.registry.counters.sockets_now == 4
            here.origin.gate.limit = 2
            here.registry.limit = 2  # what is accepted beyond it is refused
            async with here.origin.turn(ticket()) as one, here.origin.turn(ticket()) as two:
                await (await one.request("HEAD", here.url)).read()
                assert here.registry.counters.sockets_now == 2
                await two.request("GET", here.url)
                answer = await two.request("GET", here.url)  # on a socket that is dialled
                assert await answer.read() == noise(MIB)
            assert here.registry.counters.refused == 0
            assert here.origin.state().idle == 2

    run_on(loop, main())


@every_loop
@plain_and_tls
def test_a_limit_that_moves_breaks_nobodys_download(loop: str, secure: bool) -> None:
    async def main() -> None:
        chance = random.Random(2)
        async with site(6, secure=secure, size=MIB // 2) as here:
            pulls = [asyncio.create_task(here.pull()) for _ in range(60)]
            while not all(pull.done() for pull in pulls):
                here.origin.gate.limit = chance.randrange(1, 7)
                for _ in range(chance.randrange(60)):
                    await asyncio.sleep(0)
            assert {pull.result() for pull in pulls} == {noise(MIB // 2)}
            assert 1 < here.registry.counters.peak_sockets <= 6

    run_on(loop, main())


async def test_a_cold_lane_is_not_dialled_while_another_has_an_idle_socket() -> None:
    async with site(2) as here:
        await here.warm_up(2)
        await here.leave()
        for _ in range(3):
            await here.pull()
        await until(lambda: here.registry.counters.sockets_now == 1)
        assert here.origin.state().idle == 1


@every_loop
def test_a_keep_alive_socket_that_went_stale_is_replaced_once(loop: str) -> None:
    async def main() -> None:
        async with site(1) as here:
            await here.pull()
            here.registry.script(Fault(Disconnect()))
            assert await here.pull() == noise(MIB)
            assert here.registry.counters.peak_sockets == 1
            here.registry.script(Fault(Disconnect(), times=2))
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await here.pull()

    run_on(loop, main())


async def test_closing_ends_every_socket_and_later_requests_are_refused() -> None:
    async with site(2) as here:
        await here.warm_up(2)
        await here.origin.close()
        await here.closed()
        with pytest.raises(ShuttingDown):
            await here.pull()
        assert here.origin.state().active == 0


async def test_requests_are_counted_by_status_and_timed() -> None:
    clock = FakeClock()
    async with site(1, clock=clock) as here:
        await here.pull()
        assert repr(here.origin).startswith("<Origin 127.0.0.1:")
        value = here.origin._metrics.registry.get_sample_value
        label = {"upstream": here.origin.key.label}
        assert value("pullpool_upstream_requests_total", {**label, "code": "200"}) == 1
        assert value("pullpool_upstream_request_duration_seconds_count", label) == 1


# -- turns -------------------------------------------------------------------------------------


async def test_a_turn_is_overdue_when_its_answer_lasted_and_somebody_waits() -> None:
    clock = FakeClock()
    async with site(1, clock=clock) as here, here.origin.turn(ticket(TurnClass.BLOB)) as turn:
        clock.advance(60)  # the head was long in coming: that is not the answer's fault
        await turn.request("GET", here.url)
        rival = asyncio.create_task(here.pull())
        await until(lambda: sum(here.origin.state().depth.values()) == 1)
        assert not turn.is_overdue
        clock.advance(TURN_SECONDS * OVERRUN + 0.1)
        assert turn.is_overdue
        rival.cancel()
        await asyncio.wait([rival])
        assert not turn.is_overdue


async def test_a_turn_that_has_no_answer_yet_is_not_overdue() -> None:
    clock = FakeClock()
    async with site(1, clock=clock) as here, here.origin.turn(ticket()) as turn:
        clock.advance(3600)
        assert not turn.is_overdue


async def test_ranges_are_sized_to_two_seconds_within_bounds() -> None:
    origin = make_origin("http://harbor.example.com", 1)
    assert origin.turn_bytes == MAX_TURN_BYTES
    origin.learn_rate(8 * MIB, 2.0)  # it is all that is known
    assert origin.turn_bytes == 8 * MIB
    origin.learn_rate(16 * MIB, 2.0)
    assert origin.turn_bytes == 10 * MIB
    for _ in range(40):
        origin.learn_rate(1 << 30, 2.0)
    assert origin.turn_bytes == MAX_TURN_BYTES
    for _ in range(40):
        origin.learn_rate(MIB, 60.0)
    assert origin.turn_bytes == MIN_TURN_BYTES
    origin.learn_rate(1000, 0.0001)  # too little to learn from
    origin.learn_rate(MIB, 0)
    assert origin.turn_bytes == MIN_TURN_BYTES


async def test_bytes_that_all_came_at_once_are_no_measure_for_long() -> None:
    origin = make_origin("http://harbor.example.com", 1)
    origin.learn_rate(MIB, 0.000_1)
    for _ in range(10):
        origin.learn_rate(2 * MIB, 2.0)
    assert origin.turn_bytes < 10 * MIB


# -- origins -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("https://harbor.example.com", "harbor.example.com"),
        ("https://Harbor.Example.com:8443/base", "harbor.example.com:8443"),
        ("http://harbor.example.com", "harbor.example.com:80"),
        ("http://harbor.example.com:443", "harbor.example.com:443"),
        ("https://[fd00::1]:5000", "[fd00::1]:5000"),
    ],
)
def test_no_two_origins_share_a_label(url: str, label: str) -> None:
    assert OriginKey.of(URL(url)).label == label


@pytest.mark.parametrize("url", ["ftp://harbor.example.com", "/v2/", "unix:///run/x"])
def test_sockets_go_by_http_and_https_only(url: str) -> None:
    with pytest.raises(ValueError, match="http or https"):
        OriginKey.of(URL(url))


def origins() -> Origins:
    return Origins(metrics=Metrics(), clock=FakeClock())


async def test_upstreams_that_share_an_origin_share_its_gate() -> None:
    table = origins()
    first = table.add(URL("https://harbor.example.com/one"), OriginSettings(max_connections=2))
    second = table.add(URL("https://harbor.example.com:443/two"), OriginSettings())
    assert first is second
    assert second.state().limit == 2
    plain = table.add(URL("http://harbor.example.com:443"), OriginSettings())
    assert plain is not first
    assert await table.foreign(URL("https://harbor.example.com/token"), OriginSettings()) is first
    assert {state.upstream for state in table.states()} == {
        "harbor.example.com",
        "harbor.example.com:443",
    }
    await table.close()
    assert table.states() == []


async def test_redirect_targets_are_kept_and_the_one_not_used_longest_is_forgotten() -> None:
    table = origins()
    table.MAX_FOREIGN = 2
    urls = [URL(f"https://cdn{number}.example.com") for number in range(3)]
    first = await table.foreign(urls[0], OriginSettings())
    second = await table.foreign(urls[1], OriginSettings())
    assert await table.foreign(urls[0], OriginSettings()) is first
    await table.foreign(urls[2], OriginSettings())
    assert await table.foreign(urls[0], OriginSettings()) is first
    assert await table.foreign(urls[1], OriginSettings()) is not second
    assert len(table.states()) == 2


async def test_a_redirect_target_is_not_forgotten_while_it_has_turns() -> None:
    table = origins()
    table.MAX_FOREIGN = 1
    busy = await table.foreign(URL("https://cdn1.example.com"), OriginSettings())
    async with busy.turn(ticket()):
        await table.foreign(URL("https://cdn2.example.com"), OriginSettings())
        assert await table.foreign(URL("https://cdn1.example.com"), OriginSettings()) is busy
        assert len(table.states()) == 2


async def test_the_sockets_of_a_forgotten_redirect_target_are_closed() -> None:
    table = origins()
    table.MAX_FOREIGN = 1
    async with FakeRegistry() as registry:
        origin = await table.foreign(URL(registry.url), OriginSettings())
        async with origin.turn(ticket()) as turn:
            await (await turn.request("GET", URL(registry.url) / "v2/")).read()
        assert registry.counters.sockets_now == 1
        await table.foreign(URL("https://cdn.example.com"), OriginSettings())
        assert registry.counters.sockets_now == 0
        assert len(table.states()) == 1


async def test_an_origin_asked_for_by_many_at_once_is_made_once() -> None:
    table = origins()
    table.MAX_FOREIGN = 1
    await table.foreign(URL("https://cdn0.example.com"), OriginSettings())
    url = URL("https://cdn1.example.com")
    found = await asyncio.gather(*(table.foreign(url, OriginSettings()) for _ in range(9)))
    assert len(set(map(id, found))) == 1


@every_loop
def test_the_context_of_the_settings_decides_whom_to_trust(loop: str) -> None:
    async def main() -> None:
        async with FakeRegistry(ssl_context=tls().server) as registry:
            url = URL(registry.url)
            settings = OriginSettings(tls=tls().stranger)
            wary = Origin(OriginKey.of(url), settings, metrics=Metrics(), clock=FakeClock())
            async with opened(wary), wary.turn(ticket()) as turn:
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await turn.request("GET", url / "v2/")
                await until(lambda: not wary.is_open)
            trusting = make_origin(registry.url, 1)
            async with opened(trusting), trusting.turn(ticket()) as turn:
                assert (await turn.request("GET", url / "v2/")).status == 200

    run_on(loop, main())
