"""The upstream clients and the deadlines as the settings want them; with app.py the composition
root."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from aiolimiter import AsyncLimiter
from yarl import URL

from proxy.config import Settings
from proxy.config import Upstream as UpstreamSettings
from proxy.observe.metrics import Metrics
from proxy.pull.deadlines import Deadlines, Waits
from proxy.store.store import Store
from proxy.upstream.cap import Learned
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
from proxy.upstream.learned import CapBook
from proxy.upstream.origin import Origins, OriginSettings
from proxy.upstream.routing import Upstream
from proxy.upstream.stall import StallLimit
from proxy.upstream.throttle import Throttle, Throttles
from proxy.upstream.tokens import Authenticator


class CannotTrust(Exception):
    """An upstream's file of authorities cannot be used."""


async def make_clients(
    settings: Settings, origins: Origins, metrics: Metrics, clock: Callable[[], float]
) -> dict[str, UpstreamClient]:
    """A client for each upstream, by its name. Raises ``CannotTrust``."""
    clients = {}
    for name, upstream in settings.upstreams.items():
        tls = None  # aiohttp's own context, which all share, trusts the system's authorities
        if upstream.ca_file is not None:
            tls = await asyncio.to_thread(_tls_context, upstream.ca_file)
        parts = _Parts(name, upstream, tls, settings.queue.max_waiting)
        clients[name] = parts.client(origins, metrics, clock)
    return clients


def make_waits(
    settings: Settings, clients: Mapping[str, UpstreamClient], metrics: Metrics
) -> Waits:
    """The deadlines of every kind of request."""
    queue = settings.queue
    deadlines = Deadlines(
        header=queue.header_deadline,
        blob=queue.blob_deadline,
        manifest=queue.manifest_deadline,
        spill=frozenset(n for n, up in settings.upstreams.items() if up.overload == "spill"),
    )
    gates = {name: client.origin.key.label for name, client in clients.items()}
    return Waits(deadlines, metrics=metrics, gates=gates)


def make_throttles(
    settings: Settings, metrics: Metrics, clock: Callable[[], float]
) -> Throttles | None:
    """What holds each client to its byte rate, if there is one."""
    if settings.client_rate is None:
        return None
    waited = metrics.throttled.labels("client").inc
    return Throttles(settings.client_rate.per_second, clock=clock, on_wait=waited)


async def make_cap_book(store: Store, clock: Callable[[], float]) -> CapBook:
    """What earlier processes learned of the upstreams' caps; what this one learns goes there."""
    rows = (await store.caps()).items()
    known = {origin: Learned(row.value, row.ceiling, row.age) for origin, row in rows}
    return CapBook(known, store.put_cap, clock=clock)


class _Parts:
    """What one upstream's client is made of."""

    def __init__(
        self, name: str, settings: UpstreamSettings, tls: ssl.SSLContext | None, max_waiting: int
    ) -> None:
        self._name = name
        self._settings = settings
        self._tls = tls
        self._max_waiting = max_waiting

    def client(
        self, origins: Origins, metrics: Metrics, clock: Callable[[], float]
    ) -> UpstreamClient:
        settings = self._settings
        rate = None
        if settings.rate is not None:
            rate = AsyncLimiter(settings.rate.count, settings.rate.seconds)
        throttle = None
        if settings.max_rate is not None:
            waited = metrics.throttled.labels("upstream").inc
            throttle = Throttle(settings.max_rate.per_second, clock=clock, on_wait=waited)
        limits = replace(self._limits(settings.max_connections), starts_low=True)
        return UpstreamClient(
            Upstream(
                self._name,
                settings.url,
                tuple(settings.aliases),
                settings.repository_prefix,
                settings.library,
            ),
            origin=origins.add(URL(settings.url), limits, rate),
            origins=origins,
            redirect_settings=self._limits(settings.max_redirect_connections),
            authenticator=self._authenticator(metrics, clock),
            metrics=metrics,
            throttle=throttle,
        )

    def _limits(self, connections: int) -> OriginSettings:
        return OriginSettings(
            max_connections=connections,
            max_waiting=self._max_waiting,
            connect_timeout=self._settings.connect_timeout,
            read_timeout=self._settings.read_timeout,
            stall=StallLimit(self._settings.stall_rate.per_second, self._settings.stall_time),
            tls=self._tls,
        )

    def _authenticator(self, metrics: Metrics, clock: Callable[[], float]) -> Authenticator:
        name, refreshed = self._name, metrics.token_refresh
        return Authenticator(
            name=name,
            url=self._settings.url,
            credentials=_credentials(self._settings, clock),
            auth_realms=self._settings.auth_realms,
            clock=clock,
            on_refresh=lambda result: refreshed.labels(name, result).inc(),
        )


def _tls_context(ca_file: Path) -> ssl.SSLContext:
    """The system's authorities and those of the file."""
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:  # ssl.SSLError among them: not PEM, or nothing in it
        raise CannotTrust(f"ca_file {ca_file}: {error.strerror or error}") from error
    return context


def _credentials(upstream: UpstreamSettings, clock: Callable[[], float]) -> CredentialSource | None:
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
