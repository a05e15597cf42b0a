"""The kit of Redis servers does what its users rely on."""

import asyncio
import contextlib
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from tests.unit.redis_kit import (
    USER,
    Cable,
    needs_redis,
    redis_cluster,
    redis_server,
    redis_with_sentinel,
    redis_with_tls,
    until,
)

pytestmark = [needs_redis, pytest.mark.real_seconds]


async def test_a_server_answers_is_flushed_and_restarts_with_nothing(tmp_path: Path) -> None:
    async with redis_server(tmp_path, "maxmemory 64mb") as server:
        await server.ask("SET", "pp:{x}:y", "1")
        before = await server.info("server", "run_id")
        assert await server.calls("set") == 1
        await server.flush()
        assert await server.ask("GET", "pp:{x}:y") is None
        await server.restart()
        assert await server.info("server", "run_id") != before
        assert await server.ask("CONFIG", "GET", "maxmemory") == [b"maxmemory", b"67108864"]
    with pytest.raises((RedisError, OSError)):
        await server.ask("PING")


async def test_a_paused_server_says_nothing_until_it_goes_on(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server:
        server.pause()
        asked = asyncio.create_task(server.ask("PING"))
        done, _ = await asyncio.wait([asked], timeout=0.3)
        assert not done
        server.resume()
        assert await asked == b"PONG"


async def test_a_server_with_tls_wants_a_certificate_and_knows_its_users(tmp_path: Path) -> None:
    async with redis_with_tls(tmp_path) as server:
        assert await server.ask("ACL", "WHOAMI") == b"admin"
        for allowed in ("TIME", "INFO", "PING"):
            assert await server.ask("ACL", "DRYRUN", USER, allowed) == b"OK"
        for forbidden in ("FLUSHALL", "SHUTDOWN", "ACL"):
            assert b"no permissions" in await server.ask("ACL", "DRYRUN", USER, forbidden, "LIST")


async def test_a_sentinel_moves_the_service_to_the_replica(tmp_path: Path) -> None:
    async with redis_with_sentinel(tmp_path) as pair:
        first = await pair.primary()
        assert first is pair.servers[0]
        await first.ask("SET", "a", "b")

        async def replicated() -> bool:
            return bool(await pair.servers[1].ask("GET", "a") == b"b")

        await until(replicated)
        second = await pair.fail_over()
        assert second is pair.servers[1]
        assert (await second.ask("ROLE"))[0] == b"master"
        assert await second.ask("GET", "a") == b"b"


async def test_a_sentinel_notices_a_primary_that_is_silent(tmp_path: Path) -> None:
    async with redis_with_sentinel(tmp_path, patience=300) as pair:
        pair.servers[0].pause()

        async def moved() -> bool:
            return await pair.primary() is pair.servers[1]

        await until(moved)
        assert await pair.settled() is pair.servers[1]


async def test_a_cluster_spreads_its_keys_and_gives_slots_away(tmp_path: Path) -> None:
    async with redis_cluster(tmp_path) as cluster:
        keys = [f"pp:{{{n}}}:x" for n in range(30)]
        assert {await cluster.holder(key) for key in keys} == set(cluster.servers)
        holder = await cluster.holder(keys[0])
        other = next(server for server in cluster.servers if server is not holder)
        await holder.ask("SET", keys[0], "1")
        await cluster.move(keys[0], other)
        assert await cluster.holder(keys[0]) is other
        assert await other.ask("SET", keys[0], "2") == b"OK"


async def test_a_cable_that_is_cut_is_silent_and_then_passes_all(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, Cable(server.port) as cable:
        reader, writer = await asyncio.open_connection("127.0.0.1", cable.port)
        writer.write(b"PING\r\n")
        assert await reader.readline() == b"+PONG\r\n"
        cable.cut()
        writer.write(b"PING\r\n")
        answer = asyncio.create_task(reader.readline())
        done, _ = await asyncio.wait([answer], timeout=0.2)
        assert not done
        cable.mend()
        assert await answer == b"+PONG\r\n"
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
