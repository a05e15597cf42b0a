"""Claims in one process, and in a real Redis: one conformance suite."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from proxy.fleet.board import Board
from proxy.fleet.claims import WHOLE, Giver, Outcome, Terms
from proxy.fleet.claims_redis import RedisClaims
from proxy.fleet.local_claims import LocalClaims
from proxy.testing import FakeClock
from tests.unit.claims_conformance import DIGEST, SIZE, ClaimsConformance, Fleet, one
from tests.unit.directory_kit import asking
from tests.unit.redis_kit import Cluster, Server, needs_redis, until


class TestLocalClaims(ClaimsConformance):
    @contextlib.asynccontextmanager
    async def fleet(self, terms: Terms) -> AsyncIterator[Fleet]:
        clock = FakeClock()
        board = Board(clock=clock, rng=random.Random(1), terms=terms)

        async def forget() -> None:
            board.forget()

        yield Fleet(lambda giver: LocalClaims(board, giver), clock.advance, forget)


@contextlib.asynccontextmanager
async def redis_fleet(
    url: str, terms: Terms, forget: Callable[[], Awaitable[None]]
) -> AsyncIterator[Fleet]:
    """Nodes that ask one directory; time passes since the scripts are told so."""
    clock = FakeClock(0)
    async with asking(url) as asked:
        await asked.directory.wait_up()

        def make(giver: Giver) -> RedisClaims:
            return RedisClaims(
                asked.directory, giver, terms=terms, ahead=lambda: int(1000 * clock())
            )

        yield Fleet(make, clock.advance, forget)


@needs_redis
class TestRedisClaims(ClaimsConformance):
    @pytest.fixture(autouse=True)
    def _server(self, shared_redis: Server) -> None:
        self.server = shared_redis

    @contextlib.asynccontextmanager
    async def fleet(self, terms: Terms) -> AsyncIterator[Fleet]:
        await self.server.flush()
        async with redis_fleet(self.server.url, terms, self.server.flush) as fleet:
            yield fleet


@needs_redis
class TestRedisClaimsOnACluster(ClaimsConformance):
    @pytest.fixture(autouse=True)
    def _cluster(self, shared_cluster: Cluster) -> None:
        self.cluster = shared_cluster

    @contextlib.asynccontextmanager
    async def fleet(self, terms: Terms) -> AsyncIterator[Fleet]:
        await self.cluster.flush()
        async with redis_fleet(self.cluster.url, terms, self.cluster.flush) as fleet:
            yield fleet


@needs_redis
async def test_every_key_of_a_blob_ends_by_itself(shared_redis: Server) -> None:
    server = shared_redis
    await server.flush()
    async with redis_fleet(server.url, Terms(), server.flush) as nodes:
        await nodes.published(2)
        grants = [await one(nodes(number), number % 2) for number in range(2, 6)]
        assert grants[0]
        assert grants[1]
        await nodes(2).give_back(grants[0], Outcome.DONE)
        await nodes(3).give_back(grants[1], Outcome.LIED)
        generation = (await nodes(6).look(DIGEST)).generation
        await nodes(6).hold(DIGEST, generation, 0b11, [grants[0]])
        await nodes(7).hold(DIGEST, generation, WHOLE)
        await nodes(8).drop(DIGEST, generation)
        await nodes.published(1, filler=8)
        keys = await server.ask("KEYS", "*")
        assert len(keys) > 10
        assert [key for key in keys if await server.ask("PTTL", key) < 0] == []


@needs_redis
async def test_nodes_that_are_gone_leave_though_others_keep_the_blob(shared_redis: Server) -> None:
    server = shared_redis
    await server.flush()
    async with redis_fleet(server.url, Terms(part=60.0, whole=3600.0), server.flush) as nodes:
        await nodes.published(1)
        generation = (await nodes(2).look(DIGEST)).generation
        for number in range(10, 40):
            assert await nodes(number).hold(DIGEST, generation, 0b1)
        nodes.advance(120.0)
        for _ in range(10):
            assert await nodes(2).hold(DIGEST, generation, WHOLE)
        assert (await nodes(3).look(DIGEST)).nodes <= 3


@needs_redis
async def test_one_node_that_is_gone_for_good_leaves_nothing_behind(shared_redis: Server) -> None:
    server = shared_redis
    await server.flush()
    terms = Terms(filler=0.02, grant=0.02, part=0.02, whole=0.02, stuck=0.02, ban=0.02)
    async with redis_fleet(server.url, terms, server.flush) as nodes:
        await nodes(1).fill(DIGEST, SIZE)
        await nodes(1).hold(DIGEST, "", WHOLE)

        async def empty() -> bool:
            return bool(await server.ask("DBSIZE") == 0)

        await until(empty)
