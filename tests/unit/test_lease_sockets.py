"""Nodes that share an upstream's cap, on a real directory: sockets are counted at the upstream,
whatever happens to the directory and to the way there."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from aiolimiter import AsyncLimiter
from yarl import URL

from proxy.fleet.lease_call import reserve_of
from proxy.fleet.leases import FleetLeases, OriginLeases
from proxy.fleet.ledger import Terms
from proxy.observe.metrics import Metrics
from proxy.oci.errors import LeaseLost
from proxy.testing import FakeRegistry
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.leases import RateLimit
from proxy.upstream.origin import Origin
from proxy.upstream.turns import TurnClass
from tests.unit.directory_kit import asking
from tests.unit.lease_kit import settle
from tests.unit.redis_kit import (
    Cable,
    Server,
    needs_redis,
    redis_server,
    redis_with_sentinel,
)
from tests.unit.upstream_kit import noise, sample, ticket

pytestmark = [needs_redis, pytest.mark.real_seconds]

#: Short, so that no test waits long for the end of a lease; long for a loop that runs late.
TERMS = Terms(lease=2.5, margin=1.0, hold=12.0, lag=0.2, quantum=0.3, poll=0.05)
KIB = 1 << 10
LOOK_AGAIN = 0.01
TURN = 0.05


async def seen(condition: Callable[[], bool]) -> None:
    """Until it is true."""
    while not condition():  # noqa: ASYNC110 - nothing announces what is waited for
        await asyncio.sleep(LOOK_AGAIN)


class Node:
    """One node: its own way to the directory, its leases, its origin."""

    def __init__(self, name: str, origin: Origin, metrics: Metrics, url: URL) -> None:
        self.name = name
        self.origin = origin
        self.metrics = metrics
        self.url = url
        self.cable: Cable | None = None
        self.losses = 0
        self.turns = 0

    @property
    def leases(self) -> OriginLeases:
        leases = self.origin.leases
        assert isinstance(leases, OriginLeases)
        return leases

    async def pull(self) -> bytes:
        """The whole blob, begun anew when its lease is lost."""
        while True:
            try:
                return await self.try_to_pull()
            except LeaseLost:
                self.losses += 1

    async def try_to_pull(self) -> bytes:
        body = bytearray()
        async with self.origin.turn(ticket(TurnClass.BLOB)) as turn:
            await turn.request("GET", self.url)
            while data := await turn.borrow():
                body += data
            turn.was_answered(well=True)
        return bytes(body)

    async def warm_up(self, count: int) -> None:
        """Have ``count`` idle sockets."""
        async with contextlib.AsyncExitStack() as turns:
            for _ in range(count):
                turn = await turns.enter_async_context(self.origin.turn(ticket(TurnClass.BLOB)))
                await (await turn.request("HEAD", self.url)).read()

    async def ask_again_and_again(self) -> None:
        """One short turn after the other, for ever."""
        while True:
            async with self.origin.turn(ticket(TurnClass.BLOB)) as turn:
                await (await turn.request("HEAD", self.url)).read()
                await asyncio.sleep(TURN)
            self.turns += 1

    async def hold(self) -> None:
        """Take a turn, and keep it until others wait for it."""
        async with self.origin.turn(ticket(TurnClass.BLOB)) as turn:
            await (await turn.request("HEAD", self.url)).read()
            await seen(lambda: self.origin.slots.has_rival(turn.slot))


class Site:
    """Nodes in front of one registry."""

    def __init__(self, registry: FakeRegistry, nodes: list[Node], blob: bytes) -> None:
        self.registry = registry
        self.nodes = nodes
        self.blob = blob

    async def pull_everywhere(self, each: int) -> None:
        pulls = [node.pull() for node in self.nodes for _ in range(each)]
        for body in await asyncio.gather(*pulls):
            assert body == self.blob


@contextlib.asynccontextmanager
async def site(
    url: str,
    count: int,
    cap: int,
    *,
    size: int = 256 * KIB,
    rate: int | None = None,
    port: int | None = None,
    starts_low: bool = False,
    limit: RateLimit | None = None,
    is_settled: bool = True,
    terms: Terms = TERMS,
) -> AsyncIterator[Site]:
    """``port``: of the server, when each node's way to it can be cut. ``rate``: of each body."""
    async with contextlib.AsyncExitStack() as stack:
        registry = await stack.enter_async_context(FakeRegistry(rate=rate))
        blob = noise(size)
        digest = registry.put_blob("team/app", blob)
        place = URL(f"{registry.url}/v2/team/app/blobs/{digest}")
        key = OriginKey.of(URL(registry.url))
        nodes = []
        for number in range(count):
            cable = None
            if port is not None:
                cable = await stack.enter_async_context(Cable(port))
            way = url if cable is None else f"redis://127.0.0.1:{cable.port}/0"
            known = await stack.enter_async_context(
                asking(way, patience=0.5, answer_timeout=0.3, connect_timeout=0.3)
            )
            if number == 0 and is_settled:
                await settle(known.directory, key.label, cap, 4 if starts_low else None)
            metrics, clock = Metrics(), asyncio.get_running_loop().time
            leases = FleetLeases(
                known.directory,
                node=f"node-{number}",
                metrics=metrics.fleet,
                clock=clock,
                nodes=lambda: [f"node-{one}" for one in range(count)],
                terms=terms,
                chance=random.Random(number),
            )
            settings = replace(OriginSettings(max_connections=cap), starts_low=starts_low)
            origin = Origin(key, settings, metrics=metrics, clock=clock, leases=leases, rate=limit)
            stack.push_async_callback(origin.close)
            node = Node(f"node-{number}", origin, metrics, place)
            node.cable = cable
            nodes.append(node)
        yield Site(registry, nodes, blob)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with redis_server(tmp_path) as server:
        yield server


# -- sharing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 3, 8])
async def test_a_crowd_on_many_nodes_has_no_more_sockets_than_the_cap(
    server: Server, cap: int
) -> None:
    async with site(server.url, 4, cap, size=64 * KIB) as here:
        await here.pull_everywhere(15)
        assert 0 < here.registry.counters.peak_sockets <= cap - reserve_of(cap)
        assert not any(node.losses for node in here.nodes)


async def test_what_nobody_else_wants_goes_to_who_wants_it(server: Server) -> None:
    async with site(server.url, 3, 8) as here:
        holds = [asyncio.create_task(here.nodes[0].hold()) for _ in range(6)]
        await seen(lambda: here.registry.counters.sockets_now >= 6)
        for hold in holds:
            hold.cancel()
        await asyncio.gather(*holds, return_exceptions=True)


async def test_idle_sockets_give_way_when_another_node_waits(server: Server) -> None:
    async with site(server.url, 2, 3) as here:
        first, second = here.nodes
        await first.warm_up(3)
        assert here.registry.counters.sockets_now == 3 == first.origin.state().idle
        assert await second.pull() == here.blob
        assert here.registry.counters.peak_sockets <= 3


async def test_a_node_with_five_hundred_waiting_gets_no_more_than_one_with_five(
    server: Server,
) -> None:
    async with site(server.url, 2, 8) as here:
        greedy, modest = here.nodes
        many = [asyncio.create_task(greedy.ask_again_and_again()) for _ in range(500)]
        await seen(lambda: greedy.origin.state().active == 6)  # one is kept, one the reserve
        few = [asyncio.create_task(modest.ask_again_and_again()) for _ in range(5)]
        await seen(lambda: modest.origin.state().active == 3)
        turns = greedy.turns, modest.turns
        await seen(lambda: modest.turns - turns[1] >= 60)
        assert greedy.turns - turns[0] <= 1.5 * (modest.turns - turns[1])
        for task in (*many, *few):
            task.cancel()
        await asyncio.gather(*many, *few, return_exceptions=True)
        assert here.registry.counters.peak_sockets <= 7


async def test_more_nodes_than_leases_take_turns(server: Server) -> None:
    async with site(server.url, 5, 2, size=KIB) as here:
        await here.pull_everywhere(6)
        assert here.registry.counters.peak_sockets <= 2


async def test_who_is_cancelled_while_it_waits_for_a_lease_leaves_nothing(server: Server) -> None:
    async with site(server.url, 3, 3) as here:
        chance = random.Random(1)
        pulls = [asyncio.create_task(chance.choice(here.nodes).pull()) for _ in range(60)]
        for pull in chance.sample(pulls, 40):
            await asyncio.sleep(0.003)
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        assert here.registry.counters.peak_sockets <= 3
        await here.pull_everywhere(1)
        for node in here.nodes:
            assert node.origin.state().active == 0


async def test_a_node_that_ends_gives_its_leases_back(server: Server) -> None:
    long = replace(TERMS, lease=60.0, hold=60.0)  # nobody waits for the end of one
    async with site(server.url, 2, 2, terms=long) as here:
        first, second = here.nodes
        await asyncio.gather(first.pull(), first.pull())
        before = asyncio.get_running_loop().time()
        await first.origin.close()
        await asyncio.gather(second.pull(), second.pull())
        assert asyncio.get_running_loop().time() - before < long.lease - long.margin


async def test_an_overload_seen_by_one_node_lowers_the_cap_of_all(server: Server) -> None:
    async with site(server.url, 3, 8) as here:
        await here.pull_everywhere(2)
        first, *others = here.nodes
        now = asyncio.get_running_loop().time()
        first.origin.conduct.was_too_much("team/app", now, "status 503")
        assert first.origin.conduct.cap.limit == 4
        await seen(lambda: all(node.origin.conduct.cap.limit == 4 for node in others))
        for node in others:  # the same overload: they had sent before they knew
            node.origin.conduct.was_too_much("team/app", now, "status 503")
        await here.pull_everywhere(2)
        assert {node.origin.conduct.cap.limit for node in here.nodes} <= {4, 5}


async def test_successes_of_all_nodes_let_the_cap_grow_by_one(server: Server) -> None:
    async with site(server.url, 3, 16, size=KIB, starts_low=True) as here:
        while not all(node.origin.conduct.cap.limit >= 7 for node in here.nodes):
            await here.pull_everywhere(8)
        assert here.registry.counters.peak_sockets >= 5


async def test_the_request_rate_is_one_for_all_nodes(server: Server) -> None:
    loop = asyncio.get_running_loop()
    async with site(server.url, 3, 3, size=KIB, limit=AsyncLimiter(10, 1)) as here:
        began = loop.time()
        await here.pull_everywhere(12)  # 36 requests, of which 10 at once
        assert loop.time() - began >= 2.5


# -- faults ------------------------------------------------------------------------------------


async def no_fault(_server: Server, _here: Site) -> None:
    await asyncio.sleep(TERMS.lease)


async def is_slow(server: Server, _here: Site) -> None:
    for _ in range(6):
        server.pause()
        await asyncio.sleep(0.25)
        server.resume()
        await asyncio.sleep(0.05)


async def is_paused(server: Server, _here: Site) -> None:
    server.pause()
    await asyncio.sleep(1.5 * TERMS.lease)
    server.resume()


async def is_restarted(server: Server, _here: Site) -> None:
    await server.restart()


async def is_gone_for_long(server: Server, _here: Site) -> None:
    await server.kill()
    await asyncio.sleep(1.5 * TERMS.lease)
    await server.start()


async def is_flushed(server: Server, _here: Site) -> None:
    await server.flush()


async def loses_a_node(_server: Server, here: Site) -> None:
    cable = here.nodes[0].cable
    assert cable is not None
    cable.cut()
    await asyncio.sleep(1.5 * TERMS.lease)
    cable.mend()


FAULTS = [
    no_fault,
    is_slow,
    is_paused,
    is_restarted,
    is_gone_for_long,
    is_flushed,
    loses_a_node,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_the_cap_holds_whatever_happens_to_the_directory_and_it_heals(
    server: Server, fault: Callable[[Server, Site], Awaitable[None]]
) -> None:
    """Bodies that take longer than a lease, so that there is one on every socket all the time."""
    cap = 8
    async with site(server.url, 4, cap, size=512 * KIB, rate=160 * KIB, port=server.port) as here:
        pulls = [asyncio.create_task(here.pull_everywhere(4))]
        most = cap - reserve_of(cap)
        await seen(lambda: here.registry.counters.sockets_now >= most - 1)
        await fault(server, here)
        assert here.registry.counters.peak_sockets <= cap
        await asyncio.gather(*pulls)  # every one of them is exact
        assert here.registry.counters.peak_sockets <= cap
        for node in here.nodes:
            state = node.origin.state()
            assert (state.active, sum(state.depth.values())) == (0, 0)


async def test_sockets_are_dropped_before_a_lease_that_is_not_renewed_ends(
    server: Server,
) -> None:
    async with site(server.url, 1, 3, rate=KIB) as here:
        node, loop = here.nodes[0], asyncio.get_running_loop()
        pull = asyncio.create_task(node.try_to_pull())
        await seen(lambda: here.registry.counters.sockets_now == 1)
        server.pause()
        began = loop.time()
        with pytest.raises(LeaseLost):
            await pull
        await seen(lambda: here.registry.counters.sockets_now == 0)
        assert loop.time() - began < TERMS.lease
        server.resume()
        assert sample(node.metrics, "fleet_leases_lost_total", upstream=node.leases.label) == 1
        assert node.origin.conduct.health.breaker.run == 0  # nothing is held against the upstream


async def test_the_reserve_is_used_while_the_directory_is_gone_and_only_then(
    server: Server,
) -> None:
    async with site(server.url, 3, 8) as here:
        while not any(node.leases._ledger.owned for node in here.nodes):
            await here.pull_everywhere(1)
            await asyncio.sleep(0.1)
        owner = next(node for node in here.nodes if node.leases._ledger.owned)
        await here.pull_everywhere(3)
        assert here.registry.counters.peak_sockets <= 7
        await server.kill()
        await seen(lambda: not any(node.leases._ledger.leased(_now()) for node in here.nodes))
        pulls = [asyncio.create_task(node.pull()) for node in here.nodes for _ in range(2)]
        done, waiting = await asyncio.wait(pulls, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 2:
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert len(waiting) == 4  # those of the others
        assert here.registry.counters.sockets_now == 1
        assert owner.origin.is_open
        await server.start()
        await asyncio.gather(*pulls)
        assert here.registry.counters.peak_sockets <= 8
        await seen(lambda: not owner.leases._ledger.is_engaged)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_fail_over_that_loses_the_last_writes_grants_nothing_twice(
    tmp_path: Path,
) -> None:
    async with (
        redis_with_sentinel(tmp_path) as servers,
        site(servers.url, 3, 8, size=512 * KIB, rate=160 * KIB) as here,
    ):
        pulls = asyncio.create_task(here.pull_everywhere(3))
        await seen(lambda: here.registry.counters.sockets_now >= 6)
        await (await servers.primary()).kill()
        await pulls
        assert here.registry.counters.peak_sockets <= 8


async def test_a_first_epoch_grants_nothing_for_a_lease_time(server: Server) -> None:
    async with site(server.url, 1, 3, is_settled=False) as here:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await here.nodes[0].pull()
        assert loop.time() - began >= TERMS.lease
