"""Whole proxies on one directory: one fetch, one cap, and what happens when parts of it die."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from benchmarks.parts import free_port
from proxy.fleet.claims_redis import VERSION
from proxy.fleet.directory import Directory
from proxy.fleet.tags import SharedTags, Told, Where
from proxy.oci.digest import Digest
from proxy.testing import make_image
from proxy.testing.registry import FakeRegistry
from proxy.testing.wire import Kind
from proxy.upstream.endpoint import OriginKey
from tests.unit.lease_kit import settle
from tests.unit.proxy_kit import UPSTREAM, Pullpool, running, until
from tests.unit.redis_kit import (
    PASSWORD,
    SENTINEL_PASSWORD,
    SENTINEL_USER,
    USER,
    Server,
    needs_redis,
    redis_server,
    redis_with_sentinel_and_tls,
)
from tests.unit.redis_kit import until as server_until

pytestmark = [needs_redis, pytest.mark.real_seconds]

MIB = 1 << 20
NAME = "team/fleet"
IMAGE = make_image(NAME, "v1", layers=[5 * MIB + 17, 3 * MIB, 40_000], seed=9, tarred=False)
FIRST = make_image("team/first", "v1", layers=[10], seed=8, tarred=False)
SECRET = "what only nodes of this fleet know"
UNIQUE = len(IMAGE.manifest) + sum(blob.size for blob in IMAGE.blobs)


def settings_of(server: Server, number: int, **upstream: object) -> dict[str, Any]:
    port = free_port()
    return {
        "fleet": {
            "directory": server.url,
            "listen": f"127.0.0.1:{port}",
            "advertise": f"http://127.0.0.1:{port}",
            "name": f"node-{number}",
            "secret": SECRET,
        },
        "upstreams": {UPSTREAM: {"access": "public", "max_connections": 4, **upstream}},
    }


@asynccontextmanager
async def fleet(
    directory: Path,
    registry: FakeRegistry,
    server: Server,
    count: int,
    *,
    is_settled: bool = True,
    **upstream: object,
) -> AsyncIterator[list[Pullpool]]:
    """So many nodes before one registry, on one directory, whose first epoch of leases is over."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number in range(count):
            settings = settings_of(server, number, **upstream)
            place = directory / f"node-{number}"
            place.mkdir()
            nodes.append(await stack.enter_async_context(running(place, registry.url, **settings)))
        for node in nodes:
            await directory_of(node).wait_up()
        # A directory that is new grants nothing for one lease time: others may hold leases yet.
        if is_settled:  # here nobody does
            await settle(directory_of(nodes[0]), OriginKey.of(URL(registry.url)).label, cap=4)
        registry.push(FIRST)
        await nodes[0].get(f"/v2/{FIRST.name}/manifests/v1")
        registry.counters.reset()
        yield nodes


def directory_of(node: Pullpool) -> Directory:
    assert node.proxy.fleet is not None
    return node.proxy.fleet.directory


async def pull(node: Pullpool) -> None:
    """An image as a client pulls it: tag, config, layers; every byte is compared."""
    manifest = await node.get(f"/v2/{NAME}/manifests/v1")
    assert manifest.body == IMAGE.manifest
    blobs = await asyncio.gather(
        *(node.get(f"/v2/{NAME}/blobs/{blob.digest}") for blob in IMAGE.blobs)
    )
    assert [answer.body for answer in blobs] == [blob.data for blob in IMAGE.blobs]


async def all_pull(nodes: Sequence[Pullpool]) -> None:
    await asyncio.gather(*map(pull, nodes))


async def test_nodes_leave_descriptors_to_what_serves_them(tmp_path: Path) -> None:
    """They may have many sockets to one giver each."""
    async with (
        FakeRegistry() as registry,
        redis_server(tmp_path) as server,
        fleet(tmp_path, registry, server, 1, is_settled=False) as (node,),
    ):
        assert node.proxy.fleet is not None
        assert node.proxy.listener is not None
        listener = node.proxy.fleet.listener
        assert listener is not None
        assert listener._descriptors == node.proxy.listener._descriptors
        assert listener._descriptors.reserve > 0


async def test_a_cold_crowd_of_nodes_fetches_an_image_once(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 4) as nodes:
            await all_pull(nodes)
            assert registry.counters.bytes_sent == UNIQUE
            assert registry.counters.peak_sockets <= 4
            words = [line["cache"] for node in nodes for line in node.access_log]
            assert words.count("peer") > 0


async def test_a_node_that_comes_later_asks_the_upstream_nothing(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 2) as (first, second):
            await pull(first)
            await first.stored()
            registry.counters.reset()
            await pull(second)
            assert registry.counters.bytes_sent == 0
            assert not registry.counters.requests
            assert {line["cache"] for line in second.access_log} == {"peer"}


def keys_of(name: str) -> list[str]:
    """Of the image's blobs in the directory."""
    digests = [Digest.of(IMAGE.manifest), *(blob.digest for blob in IMAGE.blobs)]
    return [f"pp:{{{VERSION}:{digest}}}:{name}" for digest in digests]


async def said(server: Server) -> None:
    """Wait until the directory knows of somebody that has all of each of the image's blobs."""
    names = keys_of("whole")

    async def so() -> bool:
        return bool(await server.ask("EXISTS", *names) == len(names))

    await server_until(so)


async def test_a_node_that_was_restarted_is_asked_before_the_upstream(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 2) as (restarted, other):
            await pull(restarted)
            await restarted.stored()
            await restarted.proxy.__aexit__(None, None, None)
            # What it said before has ended.
            await server.ask("DEL", *keys_of("nodes"), *keys_of("whole"))
            place, settings = tmp_path / "node-0", settings_of(server, 0)
            async with running(place, registry.url, **settings):
                await said(server)
                registry.counters.reset()
                await pull(other)
                assert registry.counters.bytes_sent == 0
                assert not registry.counters.requests
                assert {line["cache"] for line in other.access_log} == {"peer"}


async def test_what_nodes_have_becomes_known_to_a_directory_that_has_forgotten_all(
    tmp_path: Path,
) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 2) as (first, second):
            await pull(second)
            await second.stored()
            await server.flush()
            await settle(directory_of(first), OriginKey.of(URL(registry.url)).label, cap=4)
            await said(server)
            registry.counters.reset()
            await pull(first)
            # What a tag is only the upstream knows then.
            assert {kind for kind, _ in registry.counters.requests} == {Kind.MANIFEST}
            assert registry.counters.bytes_sent <= len(IMAGE.manifest)


async def test_what_is_private_is_not_said_after_a_start_either(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 1, access="shared") as (node,):
            await pull(node)
            await node.stored()
            await node.proxy.__aexit__(None, None, None)
            place, settings = tmp_path / "node-0", settings_of(server, 0, access="shared")
            async with running(place, registry.url, **settings) as again:
                await until(lambda: bool(again.events("announced")))
                assert again.events("announced")[0]["blobs"] == 0
                assert not any(b"sha256" in key for key in await server.ask("KEYS", "*"))


async def test_what_a_node_says_of_a_digest_is_no_other_manifest(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 2) as (liar, victim):
            other = await liar.get(f"/v2/{FIRST.name}/manifests/v1")
            assert liar.proxy.fleet is not None
            tags = SharedTags(
                directory_of(liar),
                node=liar.proxy.fleet.giver.node,
                secret=SECRET.encode(),
                wall=time.time,
            )
            where = Where(liar.proxy.fleet.giver.node, liar.proxy.fleet.giver.url)
            said = Told(
                Digest.of(other.body), other.headers["Content-Type"], len(other.body), where
            )
            asked = Digest.of(IMAGE.manifest)
            await tags.tell((UPSTREAM, NAME, str(asked)), said, 60.0)
            answer = await victim.get(f"/v2/{NAME}/manifests/{asked}")
            assert answer.body == IMAGE.manifest


async def test_the_directory_may_die_and_come_back_in_the_middle_of_a_pull(tmp_path: Path) -> None:
    async with FakeRegistry(rate=8 * MIB) as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 3) as nodes:
            pulls = asyncio.create_task(all_pull(nodes))
            await until(lambda: registry.counters.bytes_sent >= MIB)
            await server.kill()
            await until(lambda: not any(directory_of(node).is_up for node in nodes))
            await server.restart()  # empty
            await pulls
            assert registry.counters.peak_sockets <= 4


async def test_a_directory_may_forget_all_in_the_middle_of_a_pull(tmp_path: Path) -> None:
    async with FakeRegistry(rate=8 * MIB) as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 3) as nodes:
            pulls = asyncio.create_task(all_pull(nodes))
            await until(lambda: registry.counters.bytes_sent >= MIB)
            await server.flush()
            await pulls
            assert registry.counters.peak_sockets <= 4


async def test_a_node_may_die_in_the_middle_of_a_pull(tmp_path: Path) -> None:
    async with FakeRegistry(rate=8 * MIB) as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with contextlib.AsyncExitStack() as stack:
            ready = fleet(tmp_path, registry, server, 3, is_settled=False)
            nodes = await stack.enter_async_context(ready)
            doomed = asyncio.create_task(pull(nodes[0]))
            await until(lambda: registry.counters.bytes_sent >= MIB)
            others = asyncio.create_task(all_pull(nodes[1:]))
            await nodes[0].proxy.__aexit__(None, None, None)
            with pytest.raises(Exception):  # noqa: B017, PT011 - its own client is cut off somehow
                await doomed
            await others
            assert registry.counters.bytes_sent <= 2 * UNIQUE


async def test_a_node_logs_in_to_sentinels_as_its_settings_say(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_with_sentinel_and_tls(tmp_path) as pair:
        papers, password = pair.sentinel.papers, tmp_path / "password"
        assert papers is not None
        password.write_bytes(b"\xff")
        settings = settings_of(pair.sentinel, 0)
        settings["fleet"] |= {
            "directory": pair.url,
            "directory_username": USER,
            "directory_password": PASSWORD,
            "directory_sentinel_username": SENTINEL_USER,
            "directory_sentinel_password_file": password,
            "directory_ca_file": papers.ca_file,
            "directory_cert_file": papers.client_cert_file,
            "directory_key_file": papers.client_key_file,
        }
        async with running(tmp_path, registry.url, **settings) as node:
            await until(lambda: "no UTF-8" in str(directory_of(node).why_down))
            password.write_text(f"{SENTINEL_PASSWORD}\n")  # it is read at every connection
            await directory_of(node).wait_up()
            assert node.proxy.fleet is not None
            assert node.proxy.fleet.members is not None
            assert [one.name for one in await node.proxy.fleet.members.look()] == ["node-0"]


async def test_a_private_upstream_stays_in_its_node(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, redis_server(tmp_path) as server:
        registry.push(IMAGE)
        async with fleet(tmp_path, registry, server, 2, access="shared") as nodes:
            await pull(nodes[0])
            before = registry.counters.bytes_sent
            await pull(nodes[1])
            assert registry.counters.bytes_sent == 2 * before
            keys = await server.ask("KEYS", "*")
            assert not any(b"sha256" in key or b"tag" in key for key in keys)
