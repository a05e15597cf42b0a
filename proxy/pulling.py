"""The pull layer as the settings want it; with app.py and wiring.py the composition root."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from proxy.config import Settings
from proxy.fleet.orders import place_of
from proxy.joining import Fleet
from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.pull.asking import PATIENCE_SHARE, Questions
from proxy.pull.blobs import Blobs
from proxy.pull.deadlines import Deadlines, Waits
from proxy.pull.flight import Flights
from proxy.pull.flight_settings import FlightSettings
from proxy.pull.giving_orders import GivingOrders
from proxy.pull.hearsay import Alone
from proxy.pull.images import Images
from proxy.pull.manifests import Manifests
from proxy.pull.permissions import Permissions
from proxy.pull.prefetch import Prefetch
from proxy.pull.serve import Puller
from proxy.pull.tags import TagBook, TagPolicy
from proxy.pull.taking_orders import TakingOrders
from proxy.pull.task import PREFETCH
from proxy.pull.tasks import Tasks
from proxy.store.store import Store
from proxy.surroundings import Surroundings
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.routing import Routes


def make_puller(
    settings: Settings,
    store: Store,
    book: TagBook,
    clients: Mapping[str, MirroredClient],
    metrics: Metrics,
    log: Logger,
    around: Surroundings,
    fleet: Fleet | None = None,
) -> Puller:
    """What answers requests, of all these upstreams; as a part of a fleet, if there is one."""
    permissions = Permissions(
        store,
        proofs=Questions(log=log, pause=around.short_pause, patience=_patience(settings)),
        negative_ttl=settings.tags.negative_ttl,
        clock=around.clock,
    )
    flights = Flights(
        store=store,
        settings=FlightSettings(
            settings.cache.on_abandon, pause=around.fill_pause, clock=around.fill_clock
        ),
        metrics=metrics,
        log=log,
        fellows=None if fleet is None else fleet.fellows,
    )
    waits = _waits(settings, clients, metrics)
    blobs = Blobs(
        store=store,
        flights=flights,
        clients=clients,
        permissions=permissions,
        waits=waits,
        memory=settings.cache.blob_memory,
    )
    return Puller(
        clients=clients,
        manifests=_manifests(
            settings,
            store,
            book,
            clients,
            permissions,
            metrics,
            log,
            around,
            None if fleet is None else fleet.hearsay,
        ),
        blobs=blobs,
        flights=flights,
        permissions=permissions,
        listings=Questions(log=log, pause=around.short_pause, patience=_patience(settings)),
        waits=waits,
        store=store,
        prefetch=_prefetch(settings, store, flights, clients, metrics, around.clock),
    )


async def make_tasks(
    stack: contextlib.AsyncExitStack,
    puller: Puller,
    store: Store,
    clients: Mapping[str, MirroredClient],
    routes: Routes,
    metrics: Metrics,
    log: Logger,
    around: Surroundings,
    fleet: Fleet | None = None,
) -> Tasks:
    """What was left of tasks, and what is to come, also from other nodes of the fleet, until the
    stack is closed."""
    clock, orders = around.clock, None if fleet is None else fleet.orders
    images = Images(
        pulls=puller,
        flights=puller.flights,
        clients=clients,
        store=store,
        routes=routes,
        clock=clock,
        pause=around.short_pause,
        log=log,
    )
    giving = None
    if fleet is not None and orders is not None:
        giving = GivingOrders(
            orders, members=lambda: fleet.members, routes=routes, clock=clock, log=log
        )
        await stack.enter_async_context(giving)
    tasks = Tasks(
        rows=store,
        kinds={PREFETCH: images},
        metrics=metrics.tasks,
        log=log,
        wall=around.wall,
        fleet=giving,
    )
    await tasks.open()
    stack.push_async_callback(tasks.close)
    if fleet is not None and fleet.members is not None and orders is not None:
        place = place_of(fleet.members.node)
        taking = TakingOrders(orders, place, tasks, clock=clock, log=log)
        await stack.enter_async_context(taking)
    return tasks


def _manifests(
    settings: Settings,
    store: Store,
    book: TagBook,
    clients: Mapping[str, MirroredClient],
    permissions: Permissions,
    metrics: Metrics,
    log: Logger,
    around: Surroundings,
    hearsay: Alone | None,
) -> Manifests:
    tags = settings.tags
    policy = TagPolicy(
        ttl=tags.ttl,
        stale_while_revalidate=tags.stale_while_revalidate,
        stale_if_error=tags.stale_if_error,
        negative_ttl=tags.negative_ttl,
        upstream_timeout=tags.upstream_timeout,
        check_deadline=settings.queue.manifest_deadline,
        immutable=tags.immutable,
    )
    return Manifests(
        store=store,
        clients=clients,
        permissions=permissions,
        book=book,
        policy=policy,
        memory=settings.cache.manifest_memory,
        metrics=metrics,
        log=log,
        clock=around.clock,
        pause=around.short_pause,
        patience=_patience(settings),
        hearsay=hearsay,
    )


def _patience(settings: Settings) -> float:
    """Seconds in which a short question is tried again."""
    queue = settings.queue
    return PATIENCE_SHARE * min(queue.header_deadline, queue.manifest_deadline)


def _prefetch(
    settings: Settings,
    store: Store,
    flights: Flights,
    clients: Mapping[str, MirroredClient],
    metrics: Metrics,
    clock: Callable[[], float],
) -> Prefetch | None:
    """What fetches before anybody asks, if it is wanted."""
    if settings.cache.prefetch == "off":
        return None
    return Prefetch(store=store, flights=flights, clients=clients, metrics=metrics, clock=clock)


def _waits(settings: Settings, clients: Mapping[str, MirroredClient], metrics: Metrics) -> Waits:
    """The deadlines of every kind of request."""
    gates = {name: client.label for name, client in clients.items()}
    return Waits(make_deadlines(settings), metrics=metrics, gates=gates)


def make_deadlines(settings: Settings) -> Deadlines:
    """How long a client waits, for what."""
    queue = settings.queue
    return Deadlines(
        header=queue.header_deadline,
        blob=queue.blob_deadline,
        manifest=queue.manifest_deadline,
        spill=frozenset(n for n, up in settings.upstreams.items() if up.overload == "spill"),
    )
