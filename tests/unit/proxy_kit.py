"""What the tests over HTTP share: a whole proxy on free ports, its log, its clocks, raw sockets."""

import asyncio
import contextlib
import io
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from proxy.app import Proxy, Surroundings
from proxy.config import HostPort, Settings
from proxy.observe.logs import make_logger
from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock, make_image
from proxy.testing.registry import FakeRegistry
from proxy.upstream.budget import RetryBudget
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.store_kit import staging_files, stored_files
from tests.unit.virtual import VirtualLoop

UPSTREAM = "harbor.example.com"
NAME = "team/app"
IMAGE = make_image(NAME, "v1", layers=[300_000, 5_000], seed=1, tarred=False)
LAYER = IMAGE.layers[0]
SHA512 = make_image("team/strong", "v1", layers=[70_000], seed=5, tarred=False, algorithm="sha512")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The OCI error code of the body."""
        [error] = json.loads(self.body)["errors"]
        assert error["detail"]["request_id"] == self.headers["X-Request-Id"]
        return str(error["code"])

    @property
    def word(self) -> str | None:
        return self.headers.get("X-Pullpool-Cache")


class Pullpool:
    """A running proxy, seen from outside."""

    def __init__(self, proxy: Proxy, session: aiohttp.ClientSession, log: io.StringIO) -> None:
        self.proxy = proxy
        self.session = session
        self._log = log

    @property
    def address(self) -> HostPort:
        return self.proxy.address

    async def ask(self, method: str, path: str, **headers: str) -> Answer:
        """One request; `If_None_Match="…"` sends If-None-Match."""
        named = CIMultiDict((name.replace("_", "-"), value) for name, value in headers.items())
        url = f"{self.proxy.url}{path}"
        async with self.session.request(method, url, headers=named) as response:
            answer = Answer(response.status, response.headers, await response.read())
        # A client may have it all a moment before its handler is done.
        await until(lambda: answer.headers["X-Request-Id"] in self.log)
        return answer

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask("GET", path, **headers)

    async def head(self, path: str, **headers: str) -> Answer:
        return await self.ask("HEAD", path, **headers)

    async def admin(self, path: str) -> Answer:
        async with self.session.get(f"{self.proxy.admin_url}{path}") as response:
            return Answer(response.status, response.headers, await response.read())

    @property
    def log(self) -> str:
        """All that was logged."""
        return self._log.getvalue()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines about one kind of event."""
        lines = map(json.loads, self.log.splitlines())
        return [line for line in lines if line["event"] == name]

    @property
    def access_log(self) -> list[dict[str, Any]]:
        return self.events("request")

    def count(self, sample: str, **labels: str) -> float:
        """A metric's value, 0 when it was never touched."""
        name = f"pullpool_{sample}"
        return self.proxy.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def cache(self) -> Path:
        return self.proxy.settings.cache.dir

    async def stored(self) -> set[str]:
        """The digests under a final name, once no fill is under way; nothing else may be left."""
        await until(lambda: not any(t.get_name().startswith("fill ") for t in asyncio.all_tasks()))
        await asyncio.to_thread(self._no_staging)
        return await asyncio.to_thread(stored_files, self.cache)

    def _no_staging(self) -> None:
        assert staging_files(self.cache) == []


Served = tuple[Pullpool, FakeRegistry]


def waiting(pool: Pullpool) -> int:
    """Requests that wait for a slot of any upstream."""
    return sum(sum(gate.depth.values()) for gate in pool.proxy.origins.states())


@contextlib.asynccontextmanager
async def slots_taken(pool: Pullpool, url: str) -> AsyncIterator[Callable[[], None]]:
    """All slots of the upstream at `url` are somebody's; call the result to give them back."""
    origin = pool.proxy.origins.add(URL(url), OriginSettings())  # the one that is there
    with contextlib.ExitStack() as held:
        for _ in range(origin.slots.limit):
            slot = await origin.slots.acquire(Ticket(TurnClass.METADATA, ["somebody"]))
            held.callback(origin.slots.release, slot)
        yield held.close


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            known = result.get(key)
            if isinstance(known, Mapping) and isinstance(value, Mapping):
                value = merged(known, value)
            result[key] = value
    return result


def settings_for(directory: Path, url: str, **changes: Any) -> Settings:
    """Settings of a proxy on free ports whose one upstream is at `url`."""
    base = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "cache": {"dir": str(directory), "min_free": 0},
        "upstreams": {UPSTREAM: {"url": url}},
        "log_level": "debug",
    }
    return Settings(**merged(base, changes))


class Pauses:
    """A clock on which nothing but pauses between tries takes time."""

    EACH = 15.0

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, _tries: int) -> float:
        self.now += self.EACH
        return 0.0


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    url: str,
    *,
    clock: Callable[[], float] | None = None,
    wall: FakeClock | None = None,
    pause: float = 0.0,
    budget: Callable[[], RetryBudget] = lambda: RetryBudget(reserve=1_000_000),
    **changes: Any,
) -> AsyncIterator[Pullpool]:
    """A proxy in front of `url` that pauses for `pause` seconds between tries; without, its flights
    only believe they do. `changes` are settings."""
    pauses = Pauses()
    log = io.StringIO()
    usual = Surroundings()
    around = Surroundings(
        clock=clock or usual.clock,
        wall=wall or usual.wall,
        short_pause=lambda _: pause,
        fill_pause=(lambda _: pause) if pause else pauses.pause,
        fill_clock=(clock or usual.fill_clock) if pause else pauses,
        budget=budget,
        # Virtual time jumps from timer to timer, and each jump takes a while.
        watch=3600.0 if isinstance(asyncio.get_running_loop(), VirtualLoop) else usual.watch,
    )
    settings = settings_for(directory, url, **changes)
    logger = make_logger("json", log, "debug")
    async with (
        Proxy(settings, log=logger, metrics=Metrics(), around=around) as proxy,
        # A crowd of clients: every request may have a connection of its own.
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
        ) as session,
    ):
        yield Pullpool(proxy, session, log)


@contextlib.asynccontextmanager
async def pulling(directory: Path, **changes: Any) -> AsyncIterator[tuple[Pullpool, FakeRegistry]]:
    """A proxy in front of a fake registry that holds IMAGE and SHA512."""
    async with FakeRegistry() as fake:
        fake.push(IMAGE)
        fake.push(SHA512)
        async with running(directory, fake.url, **changes) as pool:
            yield pool, fake


def manifest_path(reference: object, name: str = NAME) -> str:
    return f"/v2/{name}/manifests/{reference}"


def blob_path(digest: object = LAYER.digest, name: str = NAME) -> str:
    return f"/v2/{name}/blobs/{digest}"


async def until(predicate: Callable[[], bool]) -> None:
    """Let the loop turn until something has become true, for what sets no event."""
    while not predicate():  # noqa: ASYNC110 -- see above
        await asyncio.sleep(0.001)


class RawClient:
    """A client that sees the bytes, and how the connection ends."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.received = bytearray()

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls, address: HostPort, *, receive_buffer: int | None = None
    ) -> AsyncIterator["RawClient"]:
        with socket.socket() as sock:
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
            yield cls(sock)

    async def send(self, text: str) -> None:
        """Send text with CRLF for each line's end."""
        data = text.replace("\n", "\r\n").encode("latin-1")
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def ask(self, target: str, *, method: str = "GET", headers: str = "") -> None:
        await self.send(f"{method} {target} HTTP/1.1\nHost: pullpool\n{headers}\n")

    def finish(self) -> None:
        """Send no more: FIN."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Leave."""
        self._sock.close()

    async def more(self) -> bytes:
        """The next bytes; b"" at FIN. Raises ConnectionResetError at RST."""
        data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
        self.received += data
        return data

    async def until(self, enough: Callable[[bytearray], bool]) -> bytearray:
        """Receive until `enough` of it has come."""
        while not enough(self.received):
            assert await self.more(), f"the connection ended after {self.received[-200:]!r}"
        return self.received

    async def rest(self, length: int) -> bytes:
        """The body of the answer, of which `length` bytes are to come."""
        start = len(await self.head()) + 4
        await self.until(lambda data: len(data) >= start + length)
        return self.body

    async def head(self) -> str:
        """The head of the answer."""
        data = await self.until(lambda data: b"\r\n\r\n" in data)
        return data.partition(b"\r\n\r\n")[0].decode()

    async def ending(self) -> str:
        """Receive to the end: "FIN" or "RST"."""
        try:
            while await self.more():
                pass
        except ConnectionResetError:
            return "RST"
        return "FIN"

    @property
    def body(self) -> bytes:
        return bytes(self.received.partition(b"\r\n\r\n")[2])
