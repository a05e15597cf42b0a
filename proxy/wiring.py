"""The upstream clients and what is around the pull layer, as the settings want it; with app.py and
pulling.py the composition root."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from aiolimiter import AsyncLimiter
from yarl import URL

from proxy.config import Settings
from proxy.config import Upstream as UpstreamSettings
from proxy.observe.logs import Lines, Logger
from proxy.observe.metrics import Metrics
from proxy.pull.at_hand import Finder
from proxy.seat import Seat, is_sibling
from proxy.store.durability import Durability
from proxy.store.store import Store
from proxy.surroundings import Surroundings
from proxy.team.front import Front
from proxy.team.roles import Lead, Roles
from proxy.throttle import Throttle, Throttles
from proxy.upstream.cap import Learned
from proxy.upstream.certificates import CannotTrust, Tls, TlsFiles
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
from proxy.upstream.egress import Egress, choose_egress
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.learned import CapBook
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.mirrors import Mirrors, MirrorState, State
from proxy.upstream.origins import Origins
from proxy.upstream.routing import Upstream
from proxy.upstream.stall import StallLimit
from proxy.upstream.tokens import Authenticator
from proxy.web.access import AccessLog
from proxy.web.descriptors import BASE, for_clients
from proxy.web.hot import HotPath
from proxy.web.registry import ClientThrottles
from proxy.web.rows import Rows
from proxy.web.server import Proxies

__all__ = [
    "CannotTrust",
    "client_room",
    "common_settings",
    "make_cap_book",
    "make_clients",
    "make_hot_path",
    "make_proxies",
    "make_roles",
    "make_throttles",
    "make_upstreams",
    "open_store",
    "upstream_sockets",
    "url_states",
    "urls_in_use",
]

#: Seconds after which a cache directory is looked at that need not be looked at before it serves.
LOOK_PAUSE = 1.0


async def make_clients(
    settings: Settings,
    origins: Origins,
    metrics: Metrics,
    log: Logger,
    clock: Callable[[], float],
    environ: Mapping[str, str],
) -> dict[str, MirroredClient]:
    """A client for each upstream, by its name. Raises ``CannotTrust``, and ``ValueError`` for what
    ``Settings.missing`` tells of the environment."""
    clients = {}
    around = environ if settings.proxy_from_env else {}
    for name, upstream in settings.upstreams.items():
        egress = choose_egress(upstream.proxy, upstream.no_proxy, around)
        parts = _Parts(name, upstream, egress, settings.queue.max_waiting, metrics, log, clock)
        clients[name] = await parts.client(origins)
    return clients


def upstream_sockets(settings: Settings) -> int:
    """How many sockets to upstreams may be open at once, to the hosts of their content too."""
    return sum(
        len(upstream.urls) * upstream.max_connections + upstream.max_redirect_connections
        for upstream in settings.upstreams.values()
    )


def client_room(settings: Settings, limit: int) -> int:
    """How many connections of clients a process holds at least that may have ``limit`` descriptors;
    what it has open at its start, and so the exact number, is known only then."""
    return for_clients(limit, upstream_sockets(settings)).left(BASE)


def make_roles(
    settings: Settings,
    front: Front,
    lead: Lead,
    around: Surroundings,
    log: Logger,
    seat: Seat | None,
) -> Roles:
    """What makes this process lead or follow; ``lead`` opens what only a leader has."""
    return Roles(
        front,
        lead=lead,
        directory=settings.cache.dir,
        settings=common_settings(settings),
        memory=settings.cache.manifest_memory,
        blob_memory=settings.cache.blob_memory,
        log=log,
        clock=around.clock,
        beat=around.beat,
        patience=around.role_patience,
        is_sibling=is_sibling if seat is not None else lambda _: False,
    )


def make_upstreams(settings: Settings) -> list[Upstream]:
    """Whom requests may be for: a follower knows that without any client of them."""
    return [_upstream(name, one, one.urls[0]) for name, one in settings.upstreams.items()]


def _upstream(name: str, settings: UpstreamSettings, url: str) -> Upstream:
    aliases = tuple(settings.aliases)
    return Upstream(name, url, aliases, settings.repository_prefix, settings.library)


def common_settings(settings: Settings) -> str:
    """A hash of what processes on one cache must agree on: what the names of upstreams stand for.

    The rest may differ, as in two containers: the leader's counts. Secrets are not in it.
    """
    upstreams = settings.model_dump_json(include={"upstreams"})
    return hashlib.sha256(upstreams.encode()).hexdigest()


#: Bytes a second that each client has for manifests, however low its rate is: at a rate that a few
#: manifests use up for minutes, nobody could as much as ask what there is.
MANIFEST_RATE = 64 << 10


def make_throttles(
    settings: Settings, metrics: Metrics, clock: Callable[[], float]
) -> ClientThrottles | None:
    """What holds each client to its byte rate, if there is one."""
    if settings.client_rate is None:
        return None
    rate, waited = settings.client_rate.per_second, metrics.throttled.labels("client").inc
    bulk = Throttles(rate, clock=clock, on_wait=waited)
    if rate >= MANIFEST_RATE:
        return ClientThrottles(bulk, bulk)  # one account: bulk pays for manifests
    return ClientThrottles(bulk, Throttles(MANIFEST_RATE, clock=clock, on_wait=waited))


def make_hot_path(
    settings: Settings,
    at_hand: Finder,
    access_log: AccessLog,
    is_draining: Callable[[], bool],
) -> HotPath | None:
    """The way around the full handler, where there may be one."""
    lines = Lines.of(access_log.log)
    is_open = settings.auth.htpasswd_file is None and settings.client_rate is None
    if not settings.hot_path or not is_open or lines is None:
        return None
    return HotPath(
        at_hand=at_hand,
        access_log=access_log,
        rows=Rows(access_log.log, lines),
        memory=settings.cache.manifest_memory + settings.cache.blob_memory,
        trusted_proxies=settings.trusted_proxies,
        is_draining=is_draining,
    )


def make_proxies(settings: Settings, log: Logger) -> Proxies | None:
    """The peers that speak the PROXY protocol, if any do."""
    if not settings.proxy_protocol:
        return None

    def refused(client: str, reason: str) -> None:
        log.warning("connection_refused", client=client, error=reason)

    return Proxies(settings.trusted_proxies, refused)


async def open_store(
    settings: Settings, metrics: Metrics, log: Logger, wall: Callable[[], float]
) -> Store:
    """The cache directory as the settings want it. Raises ``CacheDirError``."""
    cache = settings.cache
    return await Store.open(
        cache.dir,
        max_size=cache.max_size,
        min_free=cache.min_free,
        high_water=cache.high_water,
        low_water=cache.low_water,
        durability=Durability(cache.durability),
        metrics=metrics,
        log=log,
        wall=wall,
        resume=True,
        pause=LOOK_PAUSE,
    )


async def make_cap_book(store: Store, clock: Callable[[], float]) -> CapBook:
    """What earlier processes learned of the upstreams' caps; what this one learns goes there."""
    rows = (await store.caps()).items()
    known = {origin: Learned(row.value, row.ceiling, row.age) for origin, row in rows}
    return CapBook(known, store.put_cap, clock=clock)


def urls_in_use(clients: Mapping[str, MirroredClient]) -> list[tuple[str, str, bool]]:
    """Every URL of every upstream, and whether it is the one that is asked, for the metrics."""
    return [(one.upstream, one.url, one.state is State.IN_USE) for one in _urls(clients)]


def url_states(clients: Mapping[str, MirroredClient]) -> list[dict[str, object]]:
    """The same for the status, with what is wrong with those that are down."""
    return [
        {
            "upstream": one.upstream,
            "url": one.url,
            "state": one.state.value,
            "error": one.cause or None,
            "retry_in": round(one.retry_in, 1),
        }
        for one in _urls(clients)
    ]


def _urls(clients: Mapping[str, MirroredClient]) -> list[MirrorState]:
    return [state for client in clients.values() for state in client.states()]


class _Parts:
    """What one upstream's client is made of."""

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        egress: Egress,
        max_waiting: int,
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float],
    ) -> None:
        self._name = name
        self._settings = settings
        self._egress = egress
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._log = log
        self._clock = clock

    async def client(self, origins: Origins) -> MirroredClient:
        """A client of each URL, and the one that chooses among them. Raises ``CannotTrust``."""
        settings = self._settings
        foreign = await self._tls(shows_certificate=False)
        own = foreign
        if settings.client_cert_file is not None:
            own = await self._tls(shows_certificate=True)
        limits = self._limits(settings.max_connections, own, foreign)
        redirects = self._limits(settings.max_redirect_connections, foreign, foreign)
        throttle = self._throttle()
        clients = [
            self._client_at(url, origins, replace(limits, starts_low=True), redirects, throttle)
            for url in settings.urls
        ]
        mirrors = Mirrors(self._name, settings.urls, clock=self._clock, on_change=self._url_changed)
        return MirroredClient(clients, mirrors, self._metrics)

    def _throttle(self) -> Throttle | None:
        """One for all that comes from the upstream, whichever URL is asked."""
        if self._settings.max_rate is None:
            return None
        waited = self._metrics.throttled.labels("upstream").inc
        return Throttle(self._settings.max_rate.per_second, clock=self._clock, on_wait=waited)

    def _client_at(
        self,
        url: str,
        origins: Origins,
        limits: OriginSettings,
        redirects: OriginSettings,
        throttle: Throttle | None,
    ) -> UpstreamClient:
        settings = self._settings
        rate = None
        if settings.rate is not None:
            rate = AsyncLimiter(settings.rate.count, settings.rate.seconds)
        return UpstreamClient(
            _upstream(self._name, settings, url),
            origin=origins.add(URL(url), limits, rate),
            origins=origins,
            redirect_settings=redirects,
            authenticator=self._authenticator(url),
            metrics=self._metrics,
            redirect_hosts=settings.redirect_hosts,
            throttle=throttle,
            segments=settings.segments,
        )

    async def _tls(self, *, shows_certificate: bool) -> Tls:
        settings = self._settings
        if settings.ca_file is None and not shows_certificate:
            return None  # aiohttp's own context, which all share, trusts the system's authorities
        tls = TlsFiles(
            ca_file=settings.ca_file,
            cert_file=settings.client_cert_file if shows_certificate else None,
            key_file=settings.client_key_file if shows_certificate else None,
            clock=self._clock,
            on_reload=self._reloaded,
        )
        await tls.context()  # so that what is no use is found at the start
        return tls

    def _reloaded(self, error: CannotTrust | None) -> None:
        if error is None:
            self._log.info("reloaded", upstream=self._name)
        else:
            self._log.error("not_reloaded", upstream=self._name, error=str(error))

    def _url_changed(self, url: str, cause: str | None) -> None:
        if len(self._settings.urls) == 1:
            return  # its failures are in the lines of those who asked
        if cause is None:
            self._log.info("url_up", upstream=self._name, url=url)
        else:
            self._log.warning("url_down", upstream=self._name, url=url, error=cause)

    def _limits(self, connections: int, tls: Tls, proxy_tls: Tls) -> OriginSettings:
        return OriginSettings(
            max_connections=connections,
            max_waiting=self._max_waiting,
            connect_timeout=self._settings.connect_timeout,
            read_timeout=self._settings.read_timeout,
            stall=StallLimit(self._settings.stall_rate.per_second, self._settings.stall_time),
            tls=tls,
            proxy_tls=proxy_tls,
            egress=self._egress,
            fast_receive=self._settings.fast_receive,
        )

    def _authenticator(self, url: str) -> Authenticator:
        name, refreshed = self._name, self._metrics.token_refresh
        return Authenticator(
            name=name,
            url=url,
            credentials=_credentials(self._settings, url, self._clock),
            auth_realms=self._settings.auth_realms,
            clock=self._clock,
            on_refresh=lambda result: refreshed.labels(name, result).inc(),
        )


def _credentials(
    upstream: UpstreamSettings, url: str, clock: Callable[[], float]
) -> CredentialSource | None:
    """Where the credentials for one URL come from; the settings hold one kind at most."""
    host = URL(url).authority
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
