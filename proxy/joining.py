"""A node's part in a fleet, as the settings want it; with app.py, wiring.py and pulling.py the
composition root.

``join`` opens what needs the directory, before the pull layer is made: claims, givers, tags.
``give`` opens the listener for other nodes, when there is something to give. Both last as long as
the process leads. What needs the extra ``fleet`` (redis) is imported here and only when there is a
fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from proxy import __version__
from proxy.config import Fleet as FleetSettings
from proxy.config import Settings
from proxy.fleet.announcer import Announcer
from proxy.fleet.claims import WHOLE, Claims, Giver, Grant
from proxy.fleet.crowd import before_first
from proxy.fleet.keeper import Keeper
from proxy.fleet.orders import OrderBook
from proxy.fleet.peers import Peers, Wanted
from proxy.fleet.seal import LEAST_SECRET, Sealer
from proxy.fleet.secret import Secret
from proxy.fleet.stripes import stripe_count, stripe_length
from proxy.fleet.tags import SharedTags, Told, Where
from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.observe.peers import PeerMetrics
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown, PeerFailed
from proxy.oci.manifest import MAX_MANIFEST
from proxy.pull.giving import SharingRule
from proxy.pull.ground import Fellows
from proxy.pull.hearsay import Hearsay
from proxy.pull.serve import Puller
from proxy.pull.stripes import FleetShelf
from proxy.settings.fleet import User
from proxy.store.store import Store
from proxy.surroundings import Surroundings
from proxy.throttle import Throttle
from proxy.upstream.leases import LeaseSource
from proxy.web.descriptors import Descriptors
from proxy.web.listener import Listener
from proxy.web.peer import PeerContexts, PeerDoor, giving
from proxy.web.reload import Reloader, Unusable
from proxy.web.transfers import Transfers

if TYPE_CHECKING:  # it needs the extra
    from proxy.fleet.directory import Directory
    from proxy.fleet.link import Login
    from proxy.fleet.members import Members

#: Stripes that are given at the same time, at most: each has an equal part of the uplink.
TRANSFERS = 64
#: Nodes that are asked for a manifest when who told of it has it no more.
OTHERS = 2


@dataclass(slots=True)
class Fleet:
    """What one leading process has of its fleet."""

    giver: Giver
    directory: Directory
    fellows: Fellows
    keeper: Keeper
    hearsay: Hearsay | None
    metrics: PeerMetrics
    sealer: Sealer | None
    contexts: PeerContexts | None
    transfers: Transfers
    leases: LeaseSource | None = None
    listener: Listener | None = None
    members: Members | None = None
    orders: OrderBook | None = None  # with a secret

    def status(self) -> Mapping[str, Any]:
        """For `/api/v1/status`."""
        told = {} if self.members is None else self.members.status()
        shunned = self.fellows.shunned.liars(self.fellows.clock())
        own = {"lending": self.transfers.under_way, "held": len(self.keeper)}
        return {**told, **own, "shunned": sorted(shunned)}


async def join(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    metrics: Metrics,
    log: Logger,
    around: Surroundings,
) -> Fleet | None:
    """This node's part, until the stack is closed; None without a directory. Raises ``OSError`` and
    ``Unusable`` for files that are no use."""
    wanted = settings.fleet
    if wanted.directory is None or wanted.advertise is None:
        return None
    name = wanted.name or socket.gethostname()
    giver = Giver(secrets.token_hex(8), name, wanted.zone or "", wanted.advertise)
    directory = await _open_directory(stack, wanted, giver.node, metrics, log, around)
    secret = await _learn_secret(stack, wanted, log, around)
    sealer = None if secret is None else Sealer(secret, giver.node, wall=around.wall)
    contexts = None if wanted.files is None else await PeerContexts.read(wanted.files)
    peer_metrics = PeerMetrics(metrics)
    peers = Peers(
        metrics=peer_metrics,
        sealer=sealer,
        tls=(lambda: None) if contexts is None else contexts.client,
        downlink=_throttle(wanted.downlink, metrics, around.clock, "downlink"),
    )
    stack.push_async_callback(peers.close)
    claims = _claims(directory, giver)
    keeper = await stack.enter_async_context(Keeper(claims, log=log))
    fleet = Fleet(
        giver,
        directory,
        _fellows(giver, directory, claims, keeper, peers, settings, log, around),
        keeper,
        None,
        peer_metrics,
        sealer,
        contexts,
        Transfers(TRANSFERS),
    )
    fleet.leases = _leases(fleet, metrics, log, around)
    if secret is not None:
        fleet.hearsay = _hearsay(fleet, secret, claims, peers, settings, around)
        fleet.orders = OrderBook(directory, secret=secret, wall=around.wall)
    return fleet


def _fellows(
    giver: Giver,
    directory: Directory,
    claims: Claims,
    keeper: Keeper,
    peers: Peers,
    settings: Settings,
    log: Logger,
    around: Surroundings,
) -> Fellows:
    return Fellows(
        giver=giver,
        claims=claims,
        taker=peers,
        clock=around.clock,
        log=log,
        may_share=shareable(settings).__contains__,
        kept=keeper.keep,
        is_up=lambda: directory.is_up,
        before_first=lambda: before_first(directory.nodes, random.random()),
    )


def _hearsay(
    fleet: Fleet,
    secret: Secret,
    claims: Claims,
    peers: Peers,
    settings: Settings,
    around: Surroundings,
) -> Hearsay:
    giver = fleet.giver
    return Hearsay(
        SharedTags(fleet.directory, node=giver.node, secret=secret, wall=around.wall),
        here=Where(giver.node, giver.url),
        fetch=Fetch(peers, giver, claims),
        is_shared=shareable(settings).__contains__,
    )


async def give(
    stack: contextlib.AsyncExitStack,
    fleet: Fleet,
    settings: Settings,
    puller: Puller,
    store: Store,
    metrics: Metrics,
    log: Logger,
    around: Surroundings,
    descriptors: Descriptors,
    is_draining: Callable[[], bool],
) -> None:
    """Answer other nodes until the stack is closed; to the listener they are clients, who leave
    ``descriptors`` to what serves them. Raises ``OSError`` and ``Unusable``."""
    rule = SharingRule(store, shared=shareable(settings), clock=around.clock)
    shelf = FleetShelf(puller.flights, store, may_share=rule.may_share)
    stack.push_async_callback(shelf.close)
    door = PeerDoor(
        shelf,
        transfers=fleet.transfers,
        metrics=fleet.metrics,
        log=log,
        clock=around.clock,
        sealer=fleet.sealer,
        needs_certificate=fleet.contexts is not None,
        uplink=_throttle(settings.fleet.uplink, metrics, around.clock, "uplink"),
        is_draining=is_draining,
    )
    address = settings.fleet.listen
    if address is None:
        raise ValueError("a fleet without a listener")
    serving = giving(
        door,
        address.host,
        address.port,
        descriptors=descriptors,
        log=log,
        contexts=fleet.contexts,
    )
    fleet.listener = await stack.enter_async_context(serving)
    # Last: from now on others may come.
    flights = puller.flights
    members = await _enter(stack, fleet, lambda: len(flights), metrics, around.clock)
    fleet.members = members
    stored = StoredBlobs(store, shareable(settings))
    await stack.enter_async_context(Announcer(fleet.keeper, stored, members, log=log))


async def _open_directory(
    stack: contextlib.AsyncExitStack,
    fleet: FleetSettings,
    node: str,
    metrics: Metrics,
    log: Logger,
    around: Surroundings,
) -> Directory:
    from proxy.fleet.directory import Directory
    from proxy.fleet.link import Access

    place = fleet.directory
    if place is None:
        raise ValueError("a fleet without a directory")
    access = Access(
        tls=place.tls,
        ca_file=fleet.directory_ca_file,
        cert_file=fleet.directory_cert_file,
        key_file=fleet.directory_key_file,
        login=_login(fleet.directory_user, around.environ),
        sentinel_login=_login(fleet.sentinel_user, around.environ),
        client_name=f"pullpool-{node}",
    )
    directory = Directory(place, access, metrics=metrics, log=log, clock=around.clock)
    return await stack.enter_async_context(directory)


def _login(user: User, environ: Mapping[str, str]) -> Callable[[], Awaitable[Login | None]]:
    """Who to log in as, asked before every connection: a file is read each time."""
    from proxy.fleet.link import Login

    password, variable, file = user.password, user.variable, user.file

    async def login() -> Login | None:
        if file is not None:
            try:
                text = await asyncio.to_thread(file.read_text, encoding="utf-8")
            except UnicodeDecodeError as error:  # whoever dials is ready for an OSError
                raise OSError(f"{file} holds no UTF-8 text") from error
            return Login(user.name, text.rstrip("\r\n"))
        if variable is not None:
            return Login(user.name, environ.get(variable, ""))
        return None if password is None else Login(user.name, password.get_secret_value())

    return login


async def _enter(
    stack: contextlib.AsyncExitStack,
    fleet: Fleet,
    flights: Callable[[], int],
    metrics: Metrics,
    clock: Callable[[], float],
) -> Members:
    """Tell the others that this node is there, until the stack is closed."""
    from proxy.fleet.members import Load, Members, Node

    giver, lending = fleet.giver, Lending(fleet.metrics, clock)
    members = Members(
        fleet.directory,
        Node(giver.node, giver.name, giver.zone, giver.url, __version__),
        load=lambda: Load(lending.rate(), flights()),
        metrics=metrics,
        clock=clock,
    )
    return await stack.enter_async_context(members)


class Lending:
    """How many bytes a second go to other nodes, on average since it was asked the last time."""

    def __init__(self, metrics: PeerMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._at, self._sent = clock(), metrics.sent

    def rate(self) -> int:
        now, sent = self._clock(), self._metrics.sent
        seconds, count = now - self._at, sent - self._sent
        self._at, self._sent = now, sent
        return int(count / seconds) if seconds > 0 else 0


def _leases(fleet: Fleet, metrics: Metrics, log: Logger, around: Surroundings) -> LeaseSource:
    from proxy.fleet.leases import FleetLeases

    def nodes() -> list[str]:
        return [] if fleet.members is None else [node.id for node in fleet.members.known]

    leases = FleetLeases(
        fleet.directory,
        node=fleet.giver.node,
        metrics=metrics.fleet,
        clock=around.clock,
        log=log,
        nodes=nodes,
    )
    metrics.fleet.observe_leases(leases.states)
    return leases


def _claims(directory: Directory, giver: Giver) -> Claims:
    from proxy.fleet.claims_redis import RedisClaims

    return RedisClaims(directory, giver)


async def _learn_secret(
    stack: contextlib.AsyncExitStack, fleet: FleetSettings, log: Logger, around: Surroundings
) -> Secret | None:
    """The secret, learned anew when its file changes. Raises OSError."""
    text = await asyncio.to_thread(_read_secret, fleet, around.environ)
    if text is None:
        return None
    secret, file = Secret(text, around.clock), fleet.secret_file

    async def reload() -> None:
        text = await asyncio.to_thread(_read_secret, fleet, around.environ) or b""
        if len(text) < LEAST_SECRET:
            raise Unusable(f"{file}: a secret has at least {LEAST_SECRET} bytes")
        secret.replace(text)

    if file is not None:
        await stack.enter_async_context(Reloader([file], reload, log=log))
    return secret


def _read_secret(fleet: FleetSettings, environ: Mapping[str, str]) -> bytes | None:
    """Reads a file; raises OSError."""
    if fleet.secret is not None:
        return fleet.secret.get_secret_value().encode()
    if fleet.secret_env is not None:
        return environ.get(fleet.secret_env, "").encode()
    return None if fleet.secret_file is None else fleet.secret_file.read_bytes().strip()


def shareable(settings: Settings) -> frozenset[str]:
    """The upstreams of which the fleet may know."""
    return frozenset(
        name
        for name, upstream in settings.upstreams.items()
        if upstream.access == "public" or upstream.share_private
    )


def _throttle(
    rate: Any, metrics: Metrics, clock: Callable[[], float], name: str
) -> Throttle | None:
    if rate is None:
        return None
    return Throttle(rate.per_second, clock=clock, on_wait=metrics.throttled.labels(name).inc)


class StoredBlobs:
    """What the store has for other nodes: blobs of these upstreams."""

    def __init__(self, store: Store, upstreams: frozenset[str]) -> None:
        self._store = store
        self._upstreams = upstreams

    async def recent(self, most: int) -> Sequence[Digest]:
        return await self._store.blobs_of(self._upstreams, most)

    def has(self, digest: Digest) -> bool:
        return self._store.size_of(digest) is not None

    async def recovered(self) -> None:
        await self._store.recovered()


class Fetch:
    """Gets a small blob of other nodes whole: a manifest. Nothing of it is proved yet. It is asked
    of who told of it, and then, since that one may have left, of others that have all of it."""

    def __init__(self, peers: Peers, own: Giver, claims: Claims) -> None:
        self._peers = peers
        self._own = own
        self._claims = claims

    async def __call__(self, told: Told) -> bytes | None:
        where, size = told.where, told.size
        if where is None or not size or size > MAX_MANIFEST:
            return None
        found = await self._of(replace(self._own, node=where.node, url=where.url), told, size)
        if found is not None:
            return found
        for giver in await self._others(told.digest, where.node):
            found = await self._of(giver, told, size)
            if found is not None:
                return found
        return None

    async def _others(self, digest: Digest, asked: str) -> Sequence[Giver]:
        try:
            view = await self._claims.look(digest)
        except DirectoryDown:
            return ()
        wholes = [one.giver for one in view.holdings if one.have == WHOLE]
        return [giver for giver in wholes if giver.node != asked][:OTHERS]

    async def _of(self, giver: Giver, told: Told, size: int) -> bytes | None:
        found = bytearray()
        try:
            for stripe in range(stripe_count(size)):
                grant = Grant(told.digest, "", stripe, giver, rank=1, token="")
                wanted = Wanted(stripe_length(size, stripe), None)
                async with self._peers.taking(grant, wanted) as transfer:
                    async for chunks in transfer:
                        for chunk in chunks:
                            found += chunk
        except PeerFailed:
            return None
        return bytes(found)
