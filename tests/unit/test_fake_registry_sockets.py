"""What the fake registry counts, and how its connections begin and end."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest
import trustme

from benchmarks.parts import free_port
from proxy.testing import (
    Cut,
    FakeImage,
    FakeRegistry,
    Fault,
    Hang,
    Kind,
    Stall,
    make_image,
)
from tests.unit.fake_kit import (
    IMAGE,
    LAYER,
    ask,
    blob_url,
    dial,
    hang_up,
    manifest_url,
    ping,
)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        registry.push(IMAGE)
        yield registry


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


class TestCounters:
    async def test_everything_that_arrives_is_counted(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        for _ in range(2):
            async with client.get(blob_url(registry)) as answer:
                await answer.read()
        async with client.get(manifest_url(registry), params={"ns": "docker.io"}) as answer:
            await answer.read()
        counters = registry.counters
        assert counters.count(Kind.BLOB) == counters.count("blob", "GET") == 2
        assert counters.manifests == 1
        assert counters.gets == {LAYER.digest: 2, IMAGE.digest: 1}
        assert counters.bytes_by_digest[LAYER.digest] == 2 * LAYER.size
        assert counters.bytes_sent == 2 * LAYER.size + len(IMAGE.manifest)
        last = counters.seen[-1]
        assert (last.method, last.path) == ("GET", "/v2/team/app/manifests/v1")
        assert (last.query, last.status) == ({"ns": "docker.io"}, 200)
        assert last.headers["user-agent"].startswith("Python")

    async def test_reset_forgets_all_but_the_open_sockets(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        async with client.get(manifest_url(registry)) as answer:
            await answer.read()
        registry.counters.reset()
        totals = registry.counters.as_json()
        assert totals.pop("sockets_now") == totals.pop("peak_sockets") == 1
        assert not any(totals.values())

    async def test_a_kind_that_does_not_exist_is_refused(self, registry: FakeRegistry) -> None:
        with pytest.raises(ValueError, match="blobs"):
            registry.counters.count("blobs")
        with pytest.raises(ValueError, match="blobs"):
            Fault(Hang(), kind="blobs")
        with pytest.raises(ValueError, match="blobs"):
            registry.hold(kind="blobs")

    async def test_bytes_that_the_kernel_did_not_take_are_not_counted(self) -> None:
        big = make_image("team/big", "v1", layers=[32 << 20], seed=1, tarred=False)
        async with FakeRegistry() as registry:
            registry.push(big)
            registry.script(Fault(Stall(after=16 << 20), kind="blob"))
            reader, writer = await asyncio.open_connection("127.0.0.1", registry.port)
            path = urlsplit(blob_url(registry, big.layers[0].digest, "team/big")).path
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
            await registry.close()
            assert registry.counters.bytes_sent < 32 << 20


class TestSockets:
    async def test_the_peak_is_the_most_sockets_at_once(self, registry: FakeRegistry) -> None:
        pairs = [await dial(registry) for _ in range(3)]
        await ping(*pairs[-1])
        assert registry.counters.sockets_now == 3
        for _, writer in pairs:
            await hang_up(writer)
        assert registry.counters.sockets_now == 0
        assert registry.counters.peak_sockets == 3

    async def test_a_socket_whose_peer_has_closed_is_not_counted(
        self, registry: FakeRegistry
    ) -> None:
        for _ in range(5):
            reader, writer = await dial(registry)
            await ping(reader, writer)
            await hang_up(writer)
        assert registry.counters.peak_sockets == 1

    async def test_requests_beyond_the_limit_get_harbors_answer(self) -> None:
        async with FakeRegistry(limit=1) as registry:
            registry.push(IMAGE)
            within = await dial(registry)
            beyond = await dial(registry)
            head, body = await ask(*beyond, "/v2/team/app/manifests/v1")
            assert b"401" in head.splitlines()[0]
            assert b"WWW-Authenticate: \r\n" in head
            assert b"too many clients" in body
            assert await beyond[0].read() == b""
            assert registry.counters.refused == 1
            head, _ = await ask(*within, "/v2/team/app/manifests/v1")
            assert b"200 OK" in head.splitlines()[0]
            await hang_up(within[1])
            await hang_up(beyond[1])

    async def test_a_freed_place_may_be_taken(self) -> None:
        async with FakeRegistry(limit=1, over_limit_status=503) as registry:
            for _ in range(3):
                reader, writer = await dial(registry)
                head, _ = await ask(reader, writer, "/v2/")
                assert b"200 OK" in head
                await hang_up(writer)
            assert registry.counters.refused == 0

    async def test_idle_connections_can_be_dropped(self, registry: FakeRegistry) -> None:
        registry.script(Fault(Hang(), kind="ping"))
        idle, busy = await dial(registry), await dial(registry)
        busy[1].write(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        await registry.stalls.arrived()
        await registry.drop_connections(idle_only=True)
        assert await idle[0].read() == b""
        registry.release()
        assert b"200 OK" in await busy[0].readline()
        await hang_up(idle[1])
        await hang_up(busy[1])


class TestLifetime:
    async def test_closing_ends_requests_in_every_state(self) -> None:
        stalled: FakeImage = make_image("a/b", "v1", layers=[20 << 20], seed=1, tarred=False)
        registry = FakeRegistry()
        await registry.start()
        registry.push(stalled)
        registry.script(Fault(Hang(), kind="tags"), Fault(Stall(after=5), kind="manifest"))
        hold = registry.hold(kind="ping")
        paths = ["/v2/a/b/tags/list", "/v2/a/b/manifests/v1", "/v2/"]
        paths.append(urlsplit(blob_url(registry, stalled.layers[0].digest, "a/b")).path)
        writers = []
        for path in paths:
            _, writer = await dial(registry)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            writers.append(writer)
        await registry.stalls.arrived(2)
        await hold.arrived()
        await registry.close()
        await registry.close()
        assert registry.counters.sockets_now == 0
        assert (registry.stalls.waiting, hold.waiting) == (0, 0)
        for writer in writers:
            writer.transport.abort()

    async def test_the_port_is_free_again_at_once(self) -> None:
        port = free_port()
        for _ in range(2):
            async with FakeRegistry(port=port) as registry:
                assert registry.netloc == f"127.0.0.1:{port}"

    async def test_tls_serves_and_survives_a_failed_handshake(self) -> None:
        authority = trustme.CA()
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost").configure_cert(server)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        async with FakeRegistry(ssl_context=server, name="localhost") as registry:
            registry.push(IMAGE)
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await session.get(blob_url(registry), ssl=ssl.create_default_context())
                registry.script(Fault(Cut(after=400_000), kind="blob"))
                async with session.get(blob_url(registry), ssl=trusting) as answer:
                    with pytest.raises(aiohttp.ClientPayloadError):
                        await answer.read()
                async with session.get(blob_url(registry), ssl=trusting) as answer:
                    assert await answer.read() == LAYER.data


class TestProcess:
    @pytest.mark.one_loop
    async def test_the_command_serves_images_and_tells_its_counters(
        self, client: aiohttp.ClientSession
    ) -> None:
        command = ["-m", "proxy.testing", "registry", "--images", "2", "--layer-size", "1000"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        assert [image["name"] for image in ready["images"]] == ["demo/app-0", "demo/app-1"]
        image = ready["images"][1]
        for blob in image["blobs"]:
            url = f"{ready['url']}/v2/{image['name']}/blobs/{blob['digest']}"
            async with client.get(url) as answer:
                assert len(await answer.read()) == blob["size"]
        async with client.get(f"{ready['control']}/_counters") as answer:
            counters = await answer.json()
        assert counters["requests"] == {"blob GET": len(image["blobs"])}
        assert counters["bytes_sent"] == sum(blob["size"] for blob in image["blobs"])
        assert counters["sockets_now"] == 1
        async with client.post(f"{ready['control']}/_reset") as answer:
            assert answer.status == 204
        async with client.get(f"{ready['control']}/_counters") as answer:
            assert (await answer.json())["bytes_sent"] == 0
        process.terminate()
        assert await process.wait() == 0
