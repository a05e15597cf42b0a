"""What the tests of the upstream side share: loops, certificates, clients of a fake registry."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import trustme
import uvloop
from yarl import URL

from proxy.loop import loop_factory
from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock, FakeRegistry
from proxy.throttle import Throttle
from proxy.upstream.blob import BlobSource
from proxy.upstream.client import UpstreamClient
from proxy.upstream.credentials import Credentials, StaticCredentials
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.origin import Origin
from proxy.upstream.origins import Origins
from proxy.upstream.routing import Upstream
from proxy.upstream.tokens import Authenticator
from proxy.upstream.turns import Ticket, TurnClass

MIB = 1 << 20
T = TypeVar("T")

#: Every loop that pullpool may run on (D17).
LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
    "aiofastnet": loop_factory(fast_transport=True),
}


def run_on(loop: str, work: Coroutine[Any, Any, T]) -> T:
    """Run it on a new loop of this kind."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(work)


async def until(condition: Callable[[], bool]) -> None:
    """Let everybody else run until it is true."""
    while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
        await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Tls:
    """Both ends of a private authority; ``stranger`` trusts another one."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    stranger: ssl.SSLContext
    authority: bytes  # PEM of whom the client trusts


@functools.cache
def tls() -> Tls:
    authority, other = trustme.CA(), trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(server)
    client, stranger = ssl.create_default_context(), ssl.create_default_context()
    authority.configure_trust(client)
    other.configure_trust(stranger)
    return Tls(server, client, stranger, authority.cert_pem.bytes())


@functools.cache
def noise(size: int) -> bytes:
    """Bytes of which no two places look alike."""
    return random.Random(size).randbytes(size)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """A metric's value, 0 if it was never touched."""
    return metrics.registry.get_sample_value(f"pullpool_{name}", labels) or 0.0


@contextlib.asynccontextmanager
async def opened(origin: Origin) -> AsyncIterator[Origin]:
    try:
        yield origin
    finally:
        await origin.close()


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """The URL of a port that refuses connections, and is nobody else's meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # it does not listen
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


class Mute:
    """Accepts connections and never says a word, so that a TLS handshake hangs.

    ``peak`` is the most sockets ESTABLISHED at once, by the kernel, at any accept.
    """

    def __init__(self) -> None:
        self.accepted: list[socket.socket] = []
        self.peak = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setblocking(False)

    @property
    def port(self) -> int:
        return int(self._server.getsockname()[1])

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def established(self) -> int:
        states = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for s in self.accepted]
        return states.count(1)

    def __enter__(self) -> Mute:
        asyncio.get_running_loop().add_reader(self._server, self._accept)
        return self

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.accepted.append(self._server.accept()[0])
        self.peak = max(self.peak, self.established)

    def __exit__(self, *_exc: object) -> None:
        asyncio.get_running_loop().remove_reader(self._server)
        for sock in (self._server, *self.accepted):
            sock.close()


ROBOT = Credentials("robot$pull", "s3cr3t")


class Puller:
    """An ``UpstreamClient`` of one registry, with everything around it."""

    def __init__(
        self,
        registry: FakeRegistry,
        *,
        name: str = "upstream",
        cap: int = 4,
        credentials: Credentials | None = None,
        auth_realms: Sequence[str] = (),
        settings: OriginSettings | None = None,
        origins: Origins | None = None,
        clock: FakeClock | None = None,
        throttle: Throttle | None = None,
        segments: int = 1,
    ) -> None:
        self.clock = clock or FakeClock()
        self.metrics = Metrics()
        self.origins = origins or Origins(metrics=self.metrics, clock=self.clock)
        settings = replace(settings or OriginSettings(tls=tls().client), max_connections=cap)
        self.origin = self.origins.add(URL(registry.url), settings)
        self.refreshes: list[str] = []
        self.client = UpstreamClient(
            Upstream(name, registry.url),
            origin=self.origin,
            origins=self.origins,
            redirect_settings=replace(settings, max_connections=2 * cap),
            authenticator=Authenticator(
                name=name,
                url=registry.url,
                credentials=None if credentials is None else StaticCredentials(credentials),
                auth_realms=auth_realms,
                clock=self.clock,
                on_refresh=self.refreshes.append,
            ),
            metrics=self.metrics,
            throttle=throttle,
            segments=segments,
        )

    async def __aenter__(self) -> Puller:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.origins.close()

    async def read(self, source: BlobSource, start: int = 0, length: int | None = None) -> bytes:
        """One turn's bytes."""
        received = bytearray()
        async with source.open(start, length, ticket()) as body:
            while data := await body.read():
                received += data
        return bytes(received)


def ticket(turn_class: TurnClass = TurnClass.METADATA, client: str = "somebody") -> Ticket:
    return Ticket(turn_class, [client])
