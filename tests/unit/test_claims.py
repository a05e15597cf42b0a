"""Claims in one process, and in a real Redis: one conformance suite."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from proxy.fleet.claims import WHOLE, Giver, Outcome, Terms
from proxy.fleet.claims_redis import RedisClaims
from proxy.fleet.local_claims import Board, LocalClaims
from proxy.testing import FakeClock
from tests.unit.claims_conformance import DIGEST, SIZE, ClaimsConformance, Fleet, one
from tests.unit.directory_kit import asking
from tests.unit.redis_kit import needs_redis, redis_cluster, redis_server, until


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
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path

    @contextlib.asynccontextmanager
    async def fleet(self, terms: Terms) -> AsyncIterator[Fleet]:
        async with (
            redis_server(self.path) as server,
            redis_fleet(server.url, terms, server.flush) as fleet,
        ):
            yield fleet


@needs_redis
class TestRedisClaimsOnACluster(ClaimsConformance):
    @pytest.fixture(autouse=True)
    def _path(self, tmp_path: Path) -> None:
        self.path = tmp_path

    @contextlib.asynccontextmanager
    async def fleet(self, terms: Terms) -> AsyncIterator[Fleet]:
        async with redis_cluster(self.path) as cluster:

            async def forget() -> None:
                for server in cluster.servers:
                    await server.flush()

            async with redis_fleet(cluster.url, terms, forget) as fleet:
                yield fleet


@needs_redis
async def test_every_key_of_a_blob_ends_by_itself(tmp_path: Path) -> None:
    async with (
        redis_server(tmp_path) as server,
        redis_fleet(server.url, Terms(), server.flush) as nodes,
    ):
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
async def test_one_node_that_is_gone_for_good_leaves_nothing_behind(tmp_path: Path) -> None:
    terms = Terms(filler=0.02, grant=0.02, part=0.02, whole=0.02, stuck=0.02, ban=0.02)
    async with (
        redis_server(tmp_path) as server,
        redis_fleet(server.url, terms, server.flush) as nodes,
    ):
        await nodes(1).fill(DIGEST, SIZE)
        await nodes(1).hold(DIGEST, "", WHOLE)

        async def empty() -> bool:
            return bool(await server.ask("DBSIZE") == 0)

        await until(empty)
