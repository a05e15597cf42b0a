"""Whole proxies that have images brought by one another, told by the API and by the command."""

from pathlib import Path

import pytest

from benchmarks.parts import free_port
from proxy.testing.registry import FakeRegistry
from tests.unit.proxy_kit import Pullpool, Served, running
from tests.unit.redis_kit import needs_redis, redis_server, until
from tests.unit.task_kit import all_hits, ask, over
from tests.unit.test_fleet import IMAGE, NAME, UNIQUE, fleet
from tests.unit.test_task_commands import command

TAG = f"{NAME}:v1"


def admin(pool: Pullpool) -> str:
    return f"--admin={pool.proxy.admin_address}"


@needs_redis
@pytest.mark.real_seconds  # nodes look for orders now and then
class TestFleet:
    async def test_all_nodes_have_it_and_the_upstream_was_asked_once(self, tmp_path: Path) -> None:
        async with FakeRegistry() as registry, redis_server(tmp_path) as server:
            registry.push(IMAGE)
            async with fleet(tmp_path, registry, server, 3) as nodes:
                body = {"kind": "prefetch", "images": [TAG], "nodes": "all"}
                status, task = await ask(nodes[1], "POST", body=body)
                assert (status, task["nodes"]) == (202, "all")
                ended = await over(nodes[1], task)
                assert ended["state"] == "SUCCEEDED"
                assert [one["node"] for one in ended["by_node"]] == ["node-0", "node-1", "node-2"]
                assert ended["bytes_done"] == 3 * sum(blob.size for blob in IMAGE.blobs)
                assert registry.counters.bytes_sent == UNIQUE
                for node in nodes:
                    await all_hits(node, IMAGE)

    async def test_the_command_names_each_node_and_what_failed(self, tmp_path: Path) -> None:
        async with FakeRegistry() as registry, redis_server(tmp_path) as server:
            registry.push(IMAGE)
            async with fleet(tmp_path, registry, server, 2) as nodes:
                words = ("prefetch", admin(nodes[0]), "--wait", "--nodes=1", TAG)
                result = await command(*words)
                assert (result.exit_code, result.stderr) == (0, "")
                assert "SUCCEEDED, 1 image on 1 node," in result.stdout
                assert result.stdout.count("\nnode node-") == 1
                result = await command(*words[:3], "--nodes=all", f"{NAME}:gone")
                assert result.exit_code == 1
                assert "node node-0: FAILED: " in result.stderr
                assert "node node-1: FAILED: " in result.stderr
                result = await command("tasks", "ls", admin(nodes[0]))
                assert f"{NAME}:gone on nodes: all" in result.stdout

    async def test_cancelled_at_one_node_it_ends_at_all(self, tmp_path: Path) -> None:
        async with FakeRegistry() as registry, redis_server(tmp_path) as server:
            registry.push(IMAGE)
            async with fleet(tmp_path, registry, server, 2) as nodes:
                with registry.hold() as hold:
                    result = await command("prefetch", admin(nodes[0]), "--nodes=all", TAG)
                    await hold.arrived()
                    await until(lambda: is_so(nodes[0], ["RUNNING", "RUNNING"]))
                    await until(lambda: is_so(nodes[1], ["RUNNING"]))
                    task = result.stdout.strip()
                    result = await command("tasks", "cancel", admin(nodes[0]), task)
                    assert result.stdout == f"{task}: CANCELLED\n"
                    await until(lambda: is_so(nodes[0], ["CANCELLED", "CANCELLED"]))
                    await until(lambda: is_so(nodes[1], ["CANCELLED"]))

    async def test_without_a_secret_it_is_refused(self, tmp_path: Path) -> None:
        async with FakeRegistry() as registry, redis_server(tmp_path) as server:
            port = free_port()
            settings = {
                "directory": server.url,
                "listen": f"127.0.0.1:{port}",
                "advertise": f"http://127.0.0.1:{port}",
            }
            async with running(tmp_path / "node", registry.url, fleet=settings) as pool:
                await refused(pool)
                assert await server.ask("EXISTS", "pp:{orders}:live") == 0


async def is_so(node: Pullpool, states: list[str]) -> bool:
    """Are the tasks of this node in just these states?"""
    return [task["state"] for task in (await ask(node, "GET"))[1]["tasks"]] == states


async def refused(pool: Pullpool) -> None:
    body = {"kind": "prefetch", "images": [TAG], "nodes": "all"}
    status, answer = await ask(pool, "POST", body=body)
    assert status == 400
    assert "set fleet.directory and fleet.secret" in answer["error"]
    result = await command("prefetch", admin(pool), "--nodes=all", TAG)
    assert result.exit_code == 1
    assert "set fleet.directory and fleet.secret" in result.stderr


async def test_a_server_that_is_in_no_fleet_refuses_it(served: Served) -> None:
    pool, _ = served
    await refused(pool)
    body = {"kind": "prefetch", "images": [TAG], "nodes": "some"}
    status, answer = await ask(pool, "POST", body=body)
    assert status == 400
    assert 'nodes are "all"' in answer["error"]
