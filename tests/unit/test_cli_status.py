"""`pullpool status`: the state of a running server, and of its fleet, for a person on call."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from yarl import URL

from benchmarks.parts import free_port
from proxy.cli.main import cli
from proxy.testing.registry import FakeRegistry
from proxy.upstream.endpoint import OriginKey
from tests.unit.lease_kit import settle
from tests.unit.proxy_kit import IMAGE, Pullpool, blob_path, running
from tests.unit.redis_kit import Server, needs_redis, redis_server, until


async def told(pool: Pullpool, *arguments: str) -> Result:
    """Run the command against this server, in a thread."""
    words = ("status", "--admin", str(pool.proxy.admin_address), *arguments)
    return await asyncio.to_thread(lambda: CliRunner().invoke(cli, words))


def in_fleet(server: Server, name: str, **more: str) -> dict[str, Any]:
    port = free_port()
    return {
        "directory": server.url,
        "listen": f"127.0.0.1:{port}",
        "advertise": f"http://127.0.0.1:{port}",
        "name": name,
        **more,
    }


@contextlib.asynccontextmanager
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.push(IMAGE)
        yield fake


async def test_a_node_is_told_in_a_few_lines(tmp_path: Path) -> None:
    async with registry() as fake, running(tmp_path, fake.url) as pool:
        await pool.get(blob_path())
        await pool.stored()
        result = await told(pool)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert len(lines) <= 10
        assert lines[0].endswith(", leader")
        assert "flights   0, 0 readers" in lines
        assert any(line.startswith("cache     293.0 KiB of 50.0 GiB, 1 blobs") for line in lines)
        [upstream] = [line.split() for line in lines if line.startswith(fake.netloc)]
        assert upstream[1:] == ["1", "4", "0", "closed"]


async def test_as_json_it_is_what_the_server_says(tmp_path: Path) -> None:
    async with registry() as fake, running(tmp_path, fake.url) as pool:
        result = await told(pool, "--json")
        assert json.loads(result.output)["fleet"] is None
        none = await told(pool, "--fleet")
        assert none.exit_code == 1
        assert "the server is in no fleet" in none.output


def test_a_server_that_is_not_there_has_no_status() -> None:
    result = CliRunner().invoke(cli, ["status", "--admin", f"127.0.0.1:{free_port()}"])
    assert result.exit_code == 1
    assert result.output.startswith("no status: ")


@needs_redis
async def test_a_fleet_is_told_node_by_node(tmp_path: Path) -> None:
    async with redis_server(tmp_path) as server, registry() as fake:
        async with (
            running(tmp_path / "1", fake.url, fleet=in_fleet(server, "n1", zone="a")) as first,
            running(tmp_path / "2", fake.url, fleet=in_fleet(server, "n2")) as second,
        ):

            async def complete() -> bool:
                found = json.loads((await told(first, "--fleet", "--json")).output)
                return [node["name"] for node in found["nodes"]] == ["n1", "n2"]

            await until(complete)
            result = await told(first, "--fleet")
            assert result.exit_code == 0, result.output
            head, titles, one, two = result.output.splitlines()
            assert head.startswith(f"{server.url}: up; nodes: 2, read ")
            assert titles.split() == ["node", "zone", "url", "version", "lends", "flights"]
            assert one.split()[:2] == ["n1*", "a"]
            assert two.split()[:2] == ["n2", "-"]
            assert "fleet     up, 2 nodes" in (await told(first)).output
            assert first.count("fleet_members") == 2
            assert first.count("fleet_directory_up") == second.count("fleet_directory_up") == 1
        assert await server.ask("EXISTS", "pp:{members}:nodes") == 0  # both have left


@needs_redis
@pytest.mark.real_seconds
async def test_a_node_whose_directory_is_gone_serves_what_it_has_and_says_so(
    tmp_path: Path,
) -> None:
    async with (
        redis_server(tmp_path) as server,
        registry() as fake,
        running(tmp_path / "1", fake.url, fleet=in_fleet(server, "n1")) as pool,
    ):
        assert pool.proxy.fleet is not None
        directory = pool.proxy.fleet.directory
        await directory.wait_up()
        await settle(directory, OriginKey.of(URL(fake.url)).label, cap=16)
        assert (await pool.get(blob_path())).status == 200
        await pool.stored()
        await server.kill()
        await until(lambda: has(pool, "directory_down"))
        assert (await pool.get(blob_path())).word == "hit"
        result = await told(pool, "--fleet")
        assert result.exit_code == 1
        assert "DOWN" in result.output
        assert (await told(pool)).exit_code == 0


async def has(pool: Pullpool, event: str) -> bool:
    return bool(pool.events(event))
