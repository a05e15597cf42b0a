"""The composition root: with wiring.py and pulling.py the only place that knows the settings and
every part.

``Proxy`` is one running pullpool; two of them live side by side in one process. ``run`` is one for
the command line: loop, signals, exit code.

The end of a proxy, in this order: new work is refused (``drain``), what is under way may end
(``finish``), then everything is closed in the reverse order of its opening: sockets of clients,
flights, sockets to upstreams, the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from proxy import __version__
from proxy.config import HostPort, Settings
from proxy.joining import Fleet, give, join
from proxy.loop import loop_factory
from proxy.observe.logs import Logger, make_logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.process import collecting, ending, hold_collecting, unheard
from proxy.pull.tags import TagBook
from proxy.pulling import make_deadlines, make_puller, make_tasks
from proxy.seat import Seat
from proxy.status import status_of
from proxy.store.lock import CacheDirError
from proxy.surroundings import Surroundings as Surroundings
from proxy.team.front import Front
from proxy.team.leader import Leader
from proxy.team.tasks import TeamBoard
from proxy.upstream.learned import CapBook
from proxy.upstream.origins import Origins
from proxy.upstream.routing import Routes
from proxy.web.access import AccessLog
from proxy.web.admin import Admin, all_metrics
from proxy.web.auth import Authentication
from proxy.web.clients import Clients
from proxy.web.descriptors import Descriptors, for_clients, raise_limit
from proxy.web.hot_server import HotServer
from proxy.web.listener import Listener, listening
from proxy.web.passwords import Passwords, read_htpasswd
from proxy.web.refresh import Refresh
from proxy.web.registry import Registry
from proxy.web.reload import Reloader, Unusable
from proxy.web.server import AdminRunner, RegistryRunner
from proxy.web.siblings import Siblings
from proxy.web.tasks import TaskPages
from proxy.web.tls import TlsFiles, server_context
from proxy.web.watch import LoopWatch
from proxy.wiring import (
    CannotTrust,
    common_settings,
    make_cap_book,
    make_clients,
    make_hot_path,
    make_proxies,
    make_roles,
    make_throttles,
    make_upstreams,
    open_store,
    upstream_sockets,
    urls_in_use,
)

#: Seconds an idle client connection is kept, and the most a request's head may take (D18).
KEEPALIVE = 75.0
#: Lines of a request's head longer than this are refused, in bytes.
MAX_HEAD = 16 << 10
#: Seconds that handlers get to end once they are cancelled; `finish` has waited for them before.
CANCEL_PATIENCE = 0.2


class Proxy:
    """One pullpool: ``async with Proxy(settings) as proxy`` serves until the block ends."""

    def __init__(
        self,
        settings: Settings,
        *,
        log: Logger | None = None,
        metrics: Metrics | None = None,
        around: Surroundings | None = None,
        seat: Seat | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.log = log or make_logger(settings.log_format, sys.stderr, settings.log_level)
        self.address: HostPort = settings.listen
        self.admin_address: HostPort = settings.admin
        self.is_draining = False
        self._is_started = False
        self._around = around or Surroundings()
        self._seat = seat
        self._stack = contextlib.AsyncExitStack()
        self.listener: Listener | None = None
        self.certificates: Reloader | None = None
        self.accounts: Reloader | None = None
        self.fleet: Fleet | None = None  # while this process leads

    @property
    def url(self) -> str:
        """Where clients pull from."""
        scheme = "http" if self.settings.tls.files is None else "https"
        return f"{scheme}://{self.address}"

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin_address}"

    def open_connections(self) -> int:
        """Of clients, those that do nothing included."""
        return self.listener.state().open if self.listener else 0

    async def __aenter__(self) -> Proxy:
        """Open everything. Raises ``CacheDirError``, ``CannotTrust``, ``OSError`` and ``Unusable``
        (a certificate, an htpasswd file); then nothing stays open."""
        async with contextlib.AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def drain(self) -> None:
        """Take no new work: ``/readyz`` turns to 503, new pulls are sent away."""
        self.is_draining = True
        self.metrics.draining.set(1)
        if self.front.leads:
            self.puller.drain()
            self.tasks.drain()

    async def finish(self, grace: float) -> bool:
        """Wait until the pulls under way have ended, at most ``grace`` seconds; have they?"""
        try:
            async with asyncio.timeout(grace):
                await self.registry.idle()
        except TimeoutError:
            return False
        return True

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        settings = self.settings
        self.metrics.build_info.info({"version": __version__})
        upstreams = make_upstreams(settings)
        self.front = Front(make_deadlines(settings))
        routes = Routes(upstreams, settings.default_upstream)
        lead = partial(self._lead, routes)
        self.roles = make_roles(settings, self.front, lead, self._around, self.log, self._seat)
        stack.push_async_callback(self.roles.close)
        await self.roles.start()
        watch = await stack.enter_async_context(LoopWatch(self.metrics, self._around.watch))
        self.admin_address = await self._serve_admin(stack, watch, routes)
        self.address = await self._serve_registry(stack, routes)
        self._is_started = True
        self.log.info(
            "serving",
            listen=str(self.address),
            admin=str(self.admin_address),
            upstreams=sorted(settings.upstreams),
            max_clients=self.listener.state().limit if self.listener else 0,
            cache=str(settings.cache.dir),
        )

    async def _lead(self, routes: Routes, stack: contextlib.AsyncExitStack) -> Leader:
        """Open what one process of a cache directory has. Raises ``CacheDirBusy`` if not this."""
        self.store = await open_store(self.settings, self.metrics, self.log, self._around.wall)
        stack.push_async_callback(self.store.close)
        caps = await make_cap_book(self.store, self._around.clock)
        stack.push_async_callback(caps.close)
        fleet = await join(stack, self.settings, self.metrics, self.log, self._around)
        self.fleet = fleet
        await self._open_pulling(stack, caps, fleet)
        self.tasks = await make_tasks(
            stack,
            self.puller,
            self.store,
            self.clients,
            routes,
            self.metrics,
            self.log,
            self._around,
            fleet,
        )
        if self.is_draining:  # the last leader was done before this process
            self.puller.drain()
            self.tasks.drain()
        self._observe()
        self.leader = self._make_leader(routes)
        self._tags.on_doubt = self.leader.doubt
        self.store.tell(gone=self._gone, unlinked=self.leader.unlinked)
        return self.leader

    async def _open_pulling(
        self, stack: contextlib.AsyncExitStack, caps: CapBook, fleet: Fleet | None
    ) -> None:
        """What asks the upstreams and the other nodes, and what gives to these."""
        settings, clock = self.settings, self._around.clock
        self.origins = Origins(
            metrics=self.metrics,
            clock=clock,
            log=self.log,
            caps=caps,
            budget=self._around.budget,
            leases=None if fleet is None else fleet.leases,
        )
        stack.push_async_callback(self.origins.close)
        self.clients = await make_clients(
            settings, self.origins, self.metrics, self.log, clock, self._around.environ
        )
        self._tags = TagBook(self.store, clock=clock, wall=self._around.wall)
        self.puller = make_puller(
            settings,
            self.store,
            self._tags,
            self.clients,
            self.metrics,
            self.log,
            self._around,
            fleet,
        )
        stack.push_async_callback(self.puller.close)
        if fleet is None:
            return
        await give(
            stack,
            fleet,
            settings,
            self.puller,
            self.store,
            self.metrics,
            self.log,
            self._around,
            self._descriptors_for_clients(),
            lambda: self.is_draining,
        )

    def _make_leader(self, routes: Routes) -> Leader:
        return Leader(
            self.puller,
            upstreams=routes.upstreams,
            settings=common_settings(self.settings),
            touch=self.store.touch,
            status=self._leader_status,
            hand_over=self.store.hand_over,
            tasks=self.tasks,
            log=self.log,
            beat=self._around.beat,
        )

    def _gone(self, digests: Sequence[Digest]) -> None:
        """The store has these no more: whoever relies on them hears it."""
        self.leader.gone(digests)
        if self.fleet is not None:
            self.fleet.keeper.gone(digests)

    def _observe(self) -> None:
        self.metrics.observe_gates(self.origins.states)
        self.metrics.observe_origins(self.origins.conditions)
        self.metrics.observe_urls(lambda: urls_in_use(self.clients))
        self.metrics.observe_store(self.store.state)
        self.metrics.observe_flights(lambda: len(self.puller.flights))
        self.metrics.tasks.observe(self.tasks.counts)

    async def _serve_admin(
        self, stack: contextlib.AsyncExitStack, watch: LoopWatch, routes: Routes
    ) -> HostPort:
        host = self.settings.admin.host
        siblings = await self._siblings(stack)
        admin = Admin(
            metrics=self.metrics,
            is_started=lambda: self._is_started,
            is_draining=lambda: self.is_draining,
            loop_lag=watch.lag,
            status=self.status,
            log=self.log,
            refresh=Refresh(puller=self.front, routes=routes, host=host).post,
            siblings=siblings,
            pages=TaskPages(TeamBoard(self.front.board), host=host).routes(),
        )
        runner = AdminRunner(
            admin.application(),
            admin.malformed,
            keepalive_timeout=KEEPALIVE,
            handler_cancellation=True,  # who waits for a task, or listens, may leave
            shutdown_timeout=CANCEL_PATIENCE,
        )
        # It may have all descriptors that are left: who asks what is wrong must be answered.
        serving = listening(
            runner,
            host,
            self.settings.admin.port,
            descriptors=Descriptors(self._around.descriptors()),
            sockets=() if self._seat is None else self._seat.admin,
        )
        return HostPort(host, (await stack.enter_async_context(serving)).port)

    async def _siblings(self, stack: contextlib.AsyncExitStack) -> Siblings | None:
        """The other workers of the same supervisor, if there is one."""
        if self._seat is None:
            return None
        siblings = Siblings(
            self._seat,
            metrics=lambda: all_metrics(self.metrics),
            is_ready=lambda: self._is_started and not self.is_draining,
        )
        return await stack.enter_async_context(siblings)

    async def _serve_registry(self, stack: contextlib.AsyncExitStack, routes: Routes) -> HostPort:
        clock = self._around.clock
        access_log = AccessLog(self.log, self.metrics, clock)
        hot = make_hot_path(self.settings, self.front.at_hand, access_log, lambda: self.is_draining)
        self.registry = Registry(
            puller=self.front,
            routes=routes,
            metrics=self.metrics,
            access_log=access_log,
            clock=clock,
            clients=Clients(self.settings.trusted_proxies),
            authentication=await self._authentication(stack),
            header_deadline=self.settings.queue.header_deadline,
            throttles=make_throttles(self.settings, self.metrics, clock),
            is_draining=lambda: self.is_draining,
            offer=None if hot is None else hot.offer,
        )
        # After the sockets are closed: cancelled handlers give back what they hold.
        stack.push_async_callback(self.registry.idle)
        server = HotServer(
            self.registry,
            self.registry.malformed,
            hot=hot,
            proxies=make_proxies(self.settings, self.log),
            access_log=None,
            keepalive_timeout=KEEPALIVE,
            handler_cancellation=True,
            max_line_size=MAX_HEAD,
            max_field_size=MAX_HEAD,
            auto_decompress=False,  # no body is read, only skipped
        )
        runner = RegistryRunner(server, shutdown_timeout=CANCEL_PATIENCE)
        return await self._listen_to_clients(stack, runner)

    async def _authentication(self, stack: contextlib.AsyncExitStack) -> Authentication | None:
        file = self.settings.auth.htpasswd_file
        if file is None:
            return None
        hashes = await asyncio.to_thread(read_htpasswd, file)
        passwords = Passwords(hashes, clock=self._around.clock)
        stack.callback(passwords.close)

        async def reload() -> None:
            passwords.replace(await asyncio.to_thread(read_htpasswd, file))

        self.accounts = await stack.enter_async_context(Reloader([file], reload, log=self.log))
        return Authentication(passwords)

    def _descriptors_for_clients(self) -> Descriptors:
        return for_clients(self._around.descriptors(), upstream_sockets(self.settings))

    async def _listen_to_clients(
        self, stack: contextlib.AsyncExitStack, runner: RegistryRunner
    ) -> HostPort:
        files, address = self.settings.tls.files, self.settings.listen
        tls = None if files is None else await asyncio.to_thread(server_context, files)
        serving = listening(
            runner,
            address.host,
            address.port,
            tls=tls,
            descriptors=self._descriptors_for_clients(),
            sockets=() if self._seat is None else self._seat.registry,
            on_pause=self._accept_paused,
            on_accept=lambda: self.log.info("accepting_again"),
        )
        listener = self.listener = await stack.enter_async_context(serving)
        self.metrics.observe_listener(listener.state)
        if files is not None:
            self.certificates = await stack.enter_async_context(self._certificates(files, listener))
        return HostPort(address.host, listener.port)

    def _accept_paused(self, error: OSError | None) -> None:
        self.metrics.accept_pauses.inc()
        cause = error.strerror if error else "the descriptors left are not for clients"
        self.log.warning("accept_paused", cause=cause)

    def _certificates(self, files: TlsFiles, listener: Listener) -> Reloader:
        async def reload() -> None:
            listener.replace_tls(await asyncio.to_thread(server_context, files))

        return Reloader(files.all, reload, log=self.log)

    async def status(self) -> Mapping[str, Any]:
        """What `/api/v1/status` says, figures by the leader. Raises ``LeaderMissing``."""
        connections = asdict(self.listener.state()) if self.listener else None
        if self.front.leads:
            return {**self._leader_status(), "connections": connections}
        own = {"draining": self.is_draining, "role": "follower", "connections": connections}
        return {**await self.roles.status(), **own}

    def _leader_status(self) -> Mapping[str, Any]:
        own = {"version": __version__, "draining": self.is_draining, "role": "leader"}
        figures = status_of(self.origins, self.clients, self.puller, self.store)
        tasks = {"tasks": self.tasks.counts()}
        fleet = {"fleet": None if self.fleet is None else self.fleet.status()}
        return {**own, "followers": len(self.leader), **figures, **tasks, **fleet}


async def serve(settings: Settings, seat: Seat | None = None) -> int:
    """Serve until a signal; drain; the exit code."""
    proxy = Proxy(settings, seat=seat)
    lifeline = None if seat is None else seat.lifeline[0]
    asyncio.get_running_loop().set_exception_handler(unheard(proxy.log))
    try:
        async with ending(lifeline) as stop, proxy, collecting(proxy.open_connections):
            await stop.wait()
            proxy.drain()
            proxy.log.info("draining", grace=settings.shutdown_grace)
            is_done = await proxy.finish(settings.shutdown_grace)
    except (CacheDirError, CannotTrust, Unusable, OSError) as error:
        proxy.log.error("cannot_start", error=str(error))
        return 1
    proxy.log.info("stopped", pulls_cut_off=not is_done)
    return 0


def run(settings: Settings, seat: Seat | None = None) -> int:
    """Serve with these settings on a loop of its own; the exit code."""
    raise_limit()
    hold_collecting()
    factory = loop_factory(fast_transport=settings.fast_transport)
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(serve(settings, seat))
