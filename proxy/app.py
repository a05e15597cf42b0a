"""The composition root: the only place that knows the settings and every part.

``Proxy`` is one running pullpool; two of them live side by side in one process. ``run`` is one for
the command line: loop, signals, exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import uvloop
from aiohttp import web
from aiolimiter import AsyncLimiter
from yarl import URL

from proxy import __version__
from proxy.config import HostPort, Settings
from proxy.config import Upstream as UpstreamSettings
from proxy.observe.logs import Logger, make_logger
from proxy.observe.metrics import Metrics
from proxy.pull.blobs import Blobs, Deadlines
from proxy.pull.flight import Flights, FlightSettings
from proxy.pull.manifests import Manifests
from proxy.pull.permissions import Permissions
from proxy.pull.serve import Puller
from proxy.pull.tags import TagBook, TagPolicy
from proxy.store.lock import CacheDirError
from proxy.store.store import Store
from proxy.upstream.client import UpstreamClient
from proxy.upstream.credentials import (
    Credentials,
    CredentialSource,
    DockerConfigCredentials,
    EnvCredentials,
    FileCredentials,
    HelperCredentials,
    StaticCredentials,
)
from proxy.upstream.origin import Origins, OriginSettings
from proxy.upstream.routing import Routes, Upstream
from proxy.upstream.tokens import Authenticator
from proxy.web.access import AccessLog
from proxy.web.admin import Admin
from proxy.web.registry import Registry
from proxy.web.watch import LoopWatch

#: Seconds an idle client connection is kept, and the most a request's head may take (D18).
KEEPALIVE = 75.0
#: Request heads larger than this are refused.
MAX_HEAD = 16 << 10


class Proxy:
    """One pullpool: ``async with Proxy(settings) as proxy`` serves until the block ends."""

    def __init__(
        self, settings: Settings, *, log: Logger | None = None, metrics: Metrics | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.log = log or make_logger(settings.log_format, sys.stderr, settings.log_level)
        self.address: HostPort = settings.listen
        self.admin_address: HostPort = settings.admin
        self.is_draining = False
        self._stack = contextlib.AsyncExitStack()

    @property
    def url(self) -> str:
        """Where clients pull from."""
        return f"http://{self.address}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_address}"

    async def __aenter__(self) -> Proxy:
        """Open everything. Raises ``CacheDirError`` and ``OSError``; then nothing stays open."""
        async with contextlib.AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        settings, clock = self.settings, time.monotonic
        self.metrics.build_info.info({"version": __version__})
        self.store = await self._open_store(stack)
        self.origins = Origins(metrics=self.metrics, clock=clock)
        stack.push_async_callback(self.origins.close)
        clients = await self._clients(clock)
        self.puller = self._puller(clients, clock)
        stack.push_async_callback(self.puller.close)
        self.metrics.observe_gates(self.origins.states)
        self.metrics.observe_store(self.store.state)
        self.metrics.observe_flights(lambda: len(self.puller.flights))
        watch = await stack.enter_async_context(LoopWatch(self.metrics))
        admin = Admin(
            metrics=self.metrics,
            is_ready=lambda: not self.is_draining,
            loop_lag=watch.lag,
            status=self.status,
        )
        runner: web.BaseRunner = web.AppRunner(
            admin.application(), access_log=None, keepalive_timeout=KEEPALIVE
        )
        self.admin_address = await _listen(stack, runner, settings.admin)
        self.address = await self._serve_registry(stack, clients, clock)
        self.log.info(
            "serving",
            listen=str(self.address),
            admin=str(self.admin_address),
            upstreams=sorted(clients),
            cache=str(settings.cache.dir),
        )

    async def _open_store(self, stack: contextlib.AsyncExitStack) -> Store:
        cache = self.settings.cache
        store = await Store.open(
            cache.dir,
            max_size=cache.max_size,
            min_free=cache.min_free,
            high_water=cache.high_water,
            low_water=cache.low_water,
            metrics=self.metrics,
            log=self.log,
        )
        stack.push_async_callback(store.close)
        return store

    async def _serve_registry(
        self,
        stack: contextlib.AsyncExitStack,
        clients: Mapping[str, UpstreamClient],
        clock: Callable[[], float],
    ) -> HostPort:
        routes = Routes(
            [client.upstream for client in clients.values()], self.settings.default_upstream
        )
        registry = Registry(
            puller=self.puller,
            routes=routes,
            metrics=self.metrics,
            access_log=AccessLog(self.log, self.metrics, clock),
            clock=clock,
            is_draining=lambda: self.is_draining,
        )
        server = web.Server(
            registry,
            access_log=None,
            keepalive_timeout=KEEPALIVE,
            handler_cancellation=True,
            max_line_size=MAX_HEAD,
            max_field_size=MAX_HEAD,
        )
        runner = web.ServerRunner(server, shutdown_timeout=self.settings.shutdown_grace)
        return await _listen(stack, runner, self.settings.listen)

    async def _clients(self, clock: Callable[[], float]) -> dict[str, UpstreamClient]:
        clients = {}
        for name, upstream in self.settings.upstreams.items():
            clients[name] = await self._client(name, upstream, clock)
        return clients

    async def _client(
        self, name: str, upstream: UpstreamSettings, clock: Callable[[], float]
    ) -> UpstreamClient:
        url = URL(upstream.url)
        # Reading the system's authorities takes milliseconds of file work.
        tls = await asyncio.to_thread(_tls_context, upstream.ca_file)
        limits = OriginSettings(
            max_connections=upstream.max_connections,
            max_waiting=self.settings.queue.max_waiting,
            connect_timeout=upstream.connect_timeout,
            read_timeout=upstream.read_timeout,
            tls=tls,
        )
        redirects = OriginSettings(
            max_connections=upstream.max_redirect_connections,
            max_waiting=self.settings.queue.max_waiting,
            connect_timeout=upstream.connect_timeout,
            read_timeout=upstream.read_timeout,
            tls=tls,
        )
        rate = None
        if upstream.rate is not None:
            rate = AsyncLimiter(upstream.rate.count, upstream.rate.seconds)
        refreshed = self.metrics.token_refresh
        return UpstreamClient(
            Upstream(
                name,
                upstream.url,
                tuple(upstream.aliases),
                upstream.repository_prefix,
                upstream.library,
            ),
            origin=self.origins.add(url, limits, rate),
            origins=self.origins,
            redirect_settings=redirects,
            authenticator=Authenticator(
                name=name,
                url=upstream.url,
                credentials=_credentials(name, upstream, clock),
                auth_realms=upstream.auth_realms,
                clock=clock,
                on_refresh=lambda result: refreshed.labels(name, result).inc(),
            ),
            metrics=self.metrics,
        )

    def _puller(self, clients: Mapping[str, UpstreamClient], clock: Callable[[], float]) -> Puller:
        settings, tags, queue = self.settings, self.settings.tags, self.settings.queue
        policy = TagPolicy(
            ttl=tags.ttl,
            stale_while_revalidate=tags.stale_while_revalidate,
            stale_if_error=tags.stale_if_error,
            negative_ttl=tags.negative_ttl,
            upstream_timeout=tags.upstream_timeout,
            immutable=tags.immutable,
        )
        upstreams = settings.upstreams.items()
        deadlines = Deadlines(
            header=queue.header_deadline,
            blob=queue.blob_deadline,
            manifest=queue.manifest_deadline,
            spill=frozenset(name for name, up in upstreams if up.overload == "spill"),
        )
        permissions = Permissions(self.store, negative_ttl=tags.negative_ttl, clock=clock)
        flights = Flights(
            store=self.store,
            settings=FlightSettings(on_abandon=settings.cache.on_abandon),
            metrics=self.metrics,
            log=self.log,
        )
        manifests = Manifests(
            store=self.store,
            clients=clients,
            permissions=permissions,
            book=TagBook(self.store, clock=clock, wall=time.time),
            policy=policy,
            memory=settings.cache.manifest_memory,
            metrics=self.metrics,
            log=self.log,
            clock=clock,
        )
        blobs = Blobs(
            store=self.store,
            flights=flights,
            clients=clients,
            permissions=permissions,
            deadlines=deadlines,
        )
        return Puller(
            clients=clients,
            manifests=manifests,
            blobs=blobs,
            flights=flights,
            permissions=permissions,
            deadlines=deadlines,
        )

    def status(self) -> Mapping[str, Any]:
        """What `/api/v1/status` says: upstreams, flights, queue, cache."""
        gates, store = self.origins.states(), self.store.state()
        return {
            "version": __version__,
            "draining": self.is_draining,
            "upstreams": [
                {
                    "upstream": gate.upstream,
                    "connections": {"active": gate.active, "idle": gate.idle},
                    "limit": gate.limit,
                }
                for gate in gates
            ],
            "queue": {gate.upstream: dict(gate.depth) for gate in gates},
            "flights": [
                {
                    "digest": str(flight.digest),
                    "state": flight.state.value,
                    "received": flight.received,
                    "size": flight.size,
                    "readers": len(flight.readers),
                }
                for flight in self.puller.flights.all()
            ],
            "cache": {"bytes": store.bytes, "limit": store.limit, "blobs": store.blobs},
            "fleet": None,
        }

    def drain(self) -> None:
        """Take no new work: ``/readyz`` turns to 503, new pulls are sent away."""
        self.is_draining = True
        self.metrics.draining.set(1)


async def _listen(
    stack: contextlib.AsyncExitStack, runner: web.BaseRunner, address: HostPort
) -> HostPort:
    """Serve on ``address`` until the stack unwinds; the address with the port the system chose."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, address.host, address.port, backlog=4096)
    await site.start()
    return HostPort(address.host, int(runner.addresses[0][1]))


def _tls_context(ca_file: os.PathLike[str] | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context


def _credentials(
    name: str, upstream: UpstreamSettings, clock: Callable[[], float]
) -> CredentialSource | None:
    """Where the upstream's credentials come from; the settings hold one kind at most."""
    host = URL(upstream.url).authority
    if upstream.docker_config is not None:
        known = "docker.io" if upstream.library else host
        return DockerConfigCredentials(known, upstream.docker_config, clock=clock)
    if upstream.credential_helper is not None:
        return HelperCredentials(upstream.credential_helper, host, clock=clock)
    if upstream.username is None:
        return None
    if upstream.password_file is not None:
        return FileCredentials(upstream.username, upstream.password_file)
    if upstream.password_env is not None:
        return EnvCredentials(upstream.username, upstream.password_env)
    if upstream.password is not None:
        secret = upstream.password.get_secret_value()
        return StaticCredentials(Credentials(upstream.username, secret))
    return None


def loop_factory(*, fast_transport: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop, with aiofastnet's transports on top unless they are switched off (D17)."""
    if not fast_transport:
        return uvloop.new_event_loop
    import aiofastnet

    factory: Callable[[], asyncio.AbstractEventLoop] = aiofastnet.loop_factory(
        uvloop.new_event_loop
    )
    return factory


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second one ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def serve(settings: Settings) -> int:
    """Serve until a signal; drain; the exit code."""
    proxy = Proxy(settings)
    try:
        async with _signals() as stop, proxy:
            await stop.wait()
            proxy.drain()
            proxy.log.info("draining", grace=settings.shutdown_grace)
    except CacheDirError as error:
        proxy.log.error("cannot_start", error=str(error))
        return 1
    except OSError as error:
        proxy.log.error("cannot_start", error=str(error))
        return 1
    proxy.log.info("stopped")
    return 0


def run(settings: Settings) -> int:
    """Serve with these settings on a loop of its own; the exit code."""
    factory = loop_factory(fast_transport=settings.fast_transport)
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(serve(settings))
