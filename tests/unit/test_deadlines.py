"""Deadlines (D7): from the request's arrival, whatever the phase, and what each client is told."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiohttp import web

from proxy.config import HostPort
from proxy.observe.logs import make_logger
from proxy.observe.metrics import Metrics
from proxy.oci.errors import (
    Overloaded,
    QueueTimeout,
    Throttled,
    UpstreamBusy,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.pull.asks import Timing
from proxy.pull.blobs import KEEP_PLACE
from proxy.pull.deadlines import COME_AGAIN, Deadlines, late
from proxy.testing import Answer as Scripted
from proxy.testing import FakeRegistry, Fault, Hang
from proxy.upstream.routing import Routes, Upstream
from proxy.web.access import AccessLog
from proxy.web.auth import Authentication
from proxy.web.registry import Registry
from proxy.web.server import RegistryServer
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    running,
    slots_taken,
    until,
    waiting,
)
from tests.unit.virtual import now, run_virtually

OTHER = IMAGE.layers[1]
TAGS = f"/v2/{NAME}/tags/list"
#: What Harbor answers when its database is in trouble: a denial that none is.
FALSE_401 = Scripted(401, {"WWW-Authenticate": ""}, b'{"errors":[{"code":"UNAUTHORIZED"}]}')
CONTAINERD, SKOPEO = "containerd/2.3.0", "skopeo/1.9.3"
RETRY = str(int(COME_AGAIN))


class TestArithmetic:
    def test_who_waits_is_answered_at_the_deadlines(self) -> None:
        deadlines = Deadlines(header=20, manifest=25)
        assert (deadlines.headers("a"), deadlines.short("a")) == (20, 25)

    @pytest.mark.parametrize(
        ("header", "manifest", "headers", "short"),
        [(20, 20, 19, 19), (20, 5, 19, 5), (20, 60, 19, 19), (2, 20, 1.8, 1.8)],
    )
    def test_who_spills_answers_everything_before_the_header_deadline(
        self, header: float, manifest: float, headers: float, short: float
    ) -> None:
        deadlines = Deadlines(header=header, manifest=manifest, spill=frozenset({"a"}))
        assert deadlines.headers("a") == pytest.approx(headers)
        assert deadlines.short("a") == pytest.approx(short)
        assert deadlines.headers("b") == header

    @pytest.mark.parametrize("spills", [False, True])
    @pytest.mark.parametrize(
        ("timing", "kind"),
        [
            (Timing(asked=True, is_queued=True), QueueTimeout),
            (Timing(asked=True, is_queued=True, failure=Throttled()), QueueTimeout),
            (Timing(asked=False), QueueTimeout),
            (Timing(asked=True, failure=UpstreamBusy()), UpstreamBusy),
            (Timing(asked=True, failure=Throttled()), Throttled),
        ],
    )
    def test_whoever_had_too_much_to_do_it_is_an_overload(
        self, timing: Timing, kind: type[Overloaded], spills: bool
    ) -> None:
        error = late(UPSTREAM, timing, after=20, spills=spills)
        assert type(error) is kind
        assert error.headers["Retry-After"] == RETRY

    @pytest.mark.parametrize("failure", [None, UpstreamUnavailable("reset")])
    def test_an_upstream_that_says_nothing_is_a_time_out_unless_it_spills(
        self, failure: UpstreamUnavailable | None
    ) -> None:
        timing = Timing(asked=True, failure=failure)
        assert isinstance(late(UPSTREAM, timing, after=20, spills=False), UpstreamTimeout)
        assert isinstance(late(UPSTREAM, timing, after=20, spills=True), UpstreamBusy)

    def test_a_longer_pause_that_the_upstream_asked_for_is_handed_on(self) -> None:
        timing = Timing(asked=True, failure=UpstreamBusy(33))
        assert late(UPSTREAM, timing, after=20, spills=False).headers["Retry-After"] == "33"


Scenario = Callable[[Pullpool, FakeRegistry], Coroutine[Any, Any, None]]


def play(directory: Path, scenario: Scenario, **changes: Any) -> None:
    """A scenario in virtual time, with a proxy whose upstream has one slot."""

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        upstream = {"max_connections": 1, **changes.pop("upstream", {})}
        async with FakeRegistry() as fake:
            fake.push(IMAGE)
            async with running(
                directory, fake.url, clock=clock, upstreams={UPSTREAM: upstream}, **changes
            ) as pool:
                await scenario(pool, fake)

    run_virtually(run())


class Patient:
    """A client that sees when what comes; it sends what containerd sends, and no more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._began = now()

    @classmethod
    @contextlib.asynccontextmanager
    async def asking(
        cls, address: HostPort, path: str, *, method: str = "GET", agent: str = CONTAINERD
    ) -> AsyncIterator["Patient"]:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            client = cls(reader, writer)
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nUser-Agent: {agent}\r\n\r\n"
            writer.write(head.encode())
            yield client
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    @property
    def waited(self) -> float:
        """Seconds since it asked."""
        return now() - self._began

    async def head(self, patience: float = 30.0) -> str:
        """The head of the answer. TimeoutError when it takes longer than `patience`."""
        async with asyncio.timeout(patience):
            return (await self._reader.readuntil(b"\r\n\r\n")).decode()

    async def body(self, length: int) -> bytes:
        return await self._reader.readexactly(length)

    async def rest(self) -> bytes:
        """What comes until the connection ends."""
        return await self._reader.read()


def within(deadline: float) -> Any:
    """An answer at the deadline; the proxy and the client took none of the virtual time."""
    return pytest.approx(deadline, abs=0.01)


class TestWaiting:
    def test_a_client_that_waits_30_s_for_headers_gets_a_blob_whose_slot_takes_60_s(
        self, tmp_path: Path
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))  # tells the size
            async with slots_taken(pool, fake.url) as give_back:
                asyncio.get_running_loop().call_later(60, give_back)
                async with Patient.asking(pool.address, blob_path()) as client:
                    head = await client.head(patience=30)
                    assert client.waited == within(20)
                    assert head.startswith("HTTP/1.1 200 ")
                    assert f"Content-Length: {LAYER.size}\r\n" in head
                    assert f"Docker-Content-Digest: {LAYER.digest}\r\n" in head
                    assert 'Warning: 299 - "queued, 1 ahead"\r\n' in head
                    assert await client.body(LAYER.size) == LAYER.data
                    assert client.waited == within(60)
            await pool.stored()

        play(tmp_path, scenario)

    def test_without_a_size_the_body_is_chunked(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with (
                slots_taken(pool, fake.url),
                Patient.asking(pool.address, blob_path()) as client,
            ):
                head = await client.head()
                assert client.waited == within(20)
                assert "Transfer-Encoding: chunked\r\n" in head
                assert "Content-Length" not in head

        play(tmp_path, scenario)

    def test_a_head_tells_the_size_for_the_early_answer(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.head(blob_path())
            async with (
                slots_taken(pool, fake.url),
                Patient.asking(pool.address, blob_path()) as client,
            ):
                assert f"Content-Length: {LAYER.size}\r\n" in await client.head()

        play(tmp_path, scenario)

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", manifest_path("v1")),
            ("HEAD", manifest_path("v1")),
            ("HEAD", blob_path()),
            ("GET", TAGS),
        ],
    )
    @pytest.mark.parametrize(("agent", "status"), [(CONTAINERD, 503), (SKOPEO, 429)])
    def test_a_short_question_whose_turn_does_not_come_is_an_overload(
        self, tmp_path: Path, method: str, path: str, agent: str, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with slots_taken(pool, fake.url):
                asked = Patient.asking(pool.address, path, method=method, agent=agent)
                async with asked as client:
                    head = await client.head()
                    assert client.waited == within(20)
                    assert head.startswith(f"HTTP/1.1 {status} ")
                    assert f"Retry-After: {RETRY}\r\n" in head
                assert waiting(pool) == 0
            labels = {"upstream": fake.netloc, "class": "metadata"}
            assert pool.count("queue_timeouts_total", **labels) == 1

        play(tmp_path, scenario)

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", manifest_path("v1")),
            ("HEAD", manifest_path("v1")),
            ("GET", manifest_path(IMAGE.digest)),
            ("HEAD", blob_path()),
            ("GET", blob_path(OTHER.digest, "team/other")),  # a proof: the bytes are held
            ("GET", TAGS),
        ],
    )
    @pytest.mark.parametrize(("agent", "status"), [(CONTAINERD, 503), (SKOPEO, 429)])
    def test_an_upstream_that_is_busy_until_the_deadline_is_an_overload(
        self, tmp_path: Path, method: str, path: str, agent: str, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(blob_path(OTHER.digest))
            await pool.stored()
            fake.script(Fault(FALSE_401, times=None))
            async with Patient.asking(pool.address, path, method=method, agent=agent) as client:
                head = await client.head()
                assert client.waited == within(20)
                assert head.startswith(f"HTTP/1.1 {status} ")
                assert f"Retry-After: {RETRY}\r\n" in head
                assert "WWW-Authenticate" not in head
            assert pool.access_log[-1]["reason"] == "upstream_busy"

        play(tmp_path, scenario, pause=0.7)

    @pytest.mark.parametrize(("fault", "status"), [(FALSE_401, 503), (Hang(), 504)])
    def test_bytes_that_came_through_another_repository_are_not_promised_before_the_proof(
        self, tmp_path: Path, fault: Scripted | Hang, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            other = "team/other"
            fake.script(Fault(Scripted(503), kind="blob", repository=other))
            fake.script(Fault(fault, kind="blob", repository=other, times=None))
            with fake.hold(kind="blob", repository=other, method="GET") as hold:
                async with Patient.asking(pool.address, blob_path(name=other)) as stranger:
                    await hold.arrived()
                    owner = asyncio.create_task(pool.get(blob_path()))
                    await until(lambda: pool.count("coalesced_requests_total", kind="blob") == 1)
                    hold.release()
                    # The first source fails for a moment; the second one brings the bytes.
                    assert (await owner).body == LAYER.data
                    assert (await stranger.head()).startswith(f"HTTP/1.1 {status} ")
                    assert stranger.waited == within(20)

        play(tmp_path, scenario, pause=0.7)

    def test_an_upstream_that_hangs_is_a_time_out_of_the_gateway(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(Hang(), times=None))
            async with Patient.asking(pool.address, manifest_path("v1")) as client:
                assert (await client.head()).startswith("HTTP/1.1 504 ")
                assert client.waited == within(20)
            assert fake.counters.sockets_now == 0  # its time was what was left: it is hung up

        play(tmp_path, scenario)


class TestSpill:
    SPILL: ClassVar = {"overload": "spill"}

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", blob_path()),
            ("GET", manifest_path("v1")),
            ("HEAD", manifest_path("v1")),
            ("GET", TAGS),
        ],
    )
    @pytest.mark.parametrize(("agent", "status"), [(CONTAINERD, 503), (SKOPEO, 429)])
    def test_who_would_wait_too_long_is_sent_on_before_the_deadline_and_leaves_the_queue(
        self, tmp_path: Path, method: str, path: str, agent: str, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with slots_taken(pool, fake.url) as give_back:
                asked = Patient.asking(pool.address, path, method=method, agent=agent)
                async with asked as client:
                    head = await client.head()
                    assert client.waited == within(19)
                    assert head.startswith(f"HTTP/1.1 {status} ")
                    assert f"Retry-After: {RETRY}\r\n" in head
                await until(lambda: waiting(pool) == 0)
                assert len(pool.proxy.puller.flights) == 0
                give_back()
                await asyncio.sleep(5)
            assert not fake.counters.seen  # nobody wants it from us any more

        play(tmp_path, scenario, upstream=self.SPILL, queue={"manifest_deadline": "60s"})

    @pytest.mark.parametrize("path", [blob_path(), manifest_path("v1")])
    @pytest.mark.parametrize("fault", [FALSE_401, Hang()], ids=["busy", "hangs"])
    def test_an_upstream_that_does_not_answer_in_time_is_an_overload_then(
        self, tmp_path: Path, path: str, fault: Scripted | Hang
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            fake.script(Fault(fault, times=None))
            async with Patient.asking(pool.address, path, agent=SKOPEO) as client:
                assert (await client.head()).startswith("HTTP/1.1 429 ")
                assert client.waited == within(19)

        play(tmp_path, scenario, upstream=self.SPILL, pause=0.7)

    def test_others_who_wait_keep_the_flight_of_one_that_is_sent_on(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with slots_taken(pool, fake.url) as give_back:
                async with Patient.asking(pool.address, blob_path()) as first:
                    await asyncio.sleep(10)
                    second = asyncio.create_task(pool.get(blob_path()))
                    assert (await first.head()).startswith("HTTP/1.1 503 ")
                assert waiting(pool) == 1
                give_back()
                assert (await second).body == LAYER.data

        play(tmp_path, scenario, upstream=self.SPILL)


class TestBlobDeadline:
    def test_who_got_no_byte_in_time_is_let_go_and_finds_the_old_place_again(
        self, tmp_path: Path
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            async with slots_taken(pool, fake.url) as give_back:
                async with Patient.asking(pool.address, blob_path()) as client:
                    await client.head()
                    await asyncio.sleep(100)
                    later = asyncio.create_task(pool.get(blob_path(OTHER.digest)))
                    assert await client.rest() == b""
                    assert client.waited == within(180)
                await asyncio.sleep(KEEP_PLACE - 1)
                again = asyncio.create_task(pool.get(blob_path()))
                await until(lambda: pool.count("coalesced_requests_total", kind="blob") == 1)
                give_back()
                assert (await again).body == LAYER.data
                assert (await later).body == OTHER.data
            asked = [seen.path for seen in fake.counters.seen if "/blobs/" in seen.path]
            assert asked == [blob_path(), blob_path(OTHER.digest)]
            labels = {"upstream": fake.netloc, "class": "small"}
            assert pool.count("queue_timeouts_total", **labels) == 1
            assert pool.access_log[1]["reason"] == "queue_timeout"
            await pool.stored()

        play(tmp_path, scenario)

    def test_a_client_that_would_give_the_pull_up_waits_until_its_turn_comes(
        self, tmp_path: Path
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            async with slots_taken(pool, fake.url) as give_back:
                asyncio.get_running_loop().call_later(600, give_back)
                agent = "skopeo/1.9.3"
                async with Patient.asking(pool.address, blob_path(), agent=agent) as client:
                    assert (await client.head()).startswith("HTTP/1.1 200 ")
                    assert await client.body(LAYER.size) == LAYER.data
                    assert client.waited == within(600)

        play(tmp_path, scenario)

    def test_a_place_is_not_kept_for_ever(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            async with slots_taken(pool, fake.url):
                async with Patient.asking(pool.address, blob_path()) as client:
                    await client.rest()
                [flight] = pool.proxy.puller.flights.all()
                assert len(flight.readers) == 1
                await asyncio.sleep(KEEP_PLACE + 0.1)
                assert len(flight.readers) == 0

        play(tmp_path, scenario, cache={"on_abandon": "cancel"})

    def test_a_proxy_that_ends_keeps_no_place(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with slots_taken(pool, fake.url):
                async with Patient.asking(pool.address, blob_path()) as client:
                    await client.rest()
                await pool.proxy.__aexit__()
                left = [task for task in asyncio.all_tasks() if "place" in task.get_name()]
                assert not left
                assert now() == within(180)

        play(tmp_path, scenario)

    def test_an_upstream_that_stays_busy_is_no_time_out_of_the_queue(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            await pool.get(manifest_path("v1"))
            fake.script(Fault(FALSE_401, times=None))
            async with Patient.asking(pool.address, blob_path()) as client:
                assert (await client.head()).startswith("HTTP/1.1 200 ")
                assert client.waited == within(20)
                assert await client.rest() == b""
                assert client.waited == within(180)
            assert pool.access_log[-1]["reason"] == "upstream_busy"

        play(tmp_path, scenario, pause=4.7)


class SlowPasswords(Authentication):
    """Lets everybody in, after a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def name(self, request: web.BaseRequest) -> str:
        await asyncio.sleep(self._seconds)
        return "robot"


@contextlib.asynccontextmanager
async def guarded(pool: Pullpool, seconds: float) -> AsyncIterator[HostPort]:
    """Another door to the same proxy, where a password takes so long to check."""
    metrics, clock = Metrics(), asyncio.get_running_loop().time
    registry = Registry(
        puller=pool.proxy.puller,
        routes=Routes([Upstream(UPSTREAM, "http://unused.example.com")], UPSTREAM),
        metrics=metrics,
        access_log=AccessLog(make_logger("json", io.StringIO(), "info"), metrics, clock),
        clock=clock,
        authentication=SlowPasswords(seconds),
    )
    server = RegistryServer(registry, registry.malformed, handler_cancellation=True)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield HostPort("127.0.0.1", int(runner.addresses[0][1]))
    finally:
        await runner.cleanup()


class TestArrival:
    """What came before the question counts too."""

    @pytest.mark.parametrize(("path", "status"), [(blob_path(), 200), (manifest_path("v1"), 503)])
    def test_the_time_that_a_password_took_is_no_extra(
        self, tmp_path: Path, path: str, status: int
    ) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with (
                slots_taken(pool, fake.url),
                guarded(pool, seconds=15) as address,
                Patient.asking(address, path) as client,
            ):
                assert (await client.head()).startswith(f"HTTP/1.1 {status} ")
                assert client.waited == within(20)

        play(tmp_path, scenario)

    def test_a_password_whose_turn_does_not_come_is_an_overload_too(self, tmp_path: Path) -> None:
        async def scenario(pool: Pullpool, fake: FakeRegistry) -> None:
            async with (
                guarded(pool, seconds=1000) as address,
                Patient.asking(address, blob_path(), agent=SKOPEO) as client,
            ):
                assert (await client.head()).startswith("HTTP/1.1 429 ")
                assert client.waited == within(20)
            assert not fake.counters.seen

        play(tmp_path, scenario)
