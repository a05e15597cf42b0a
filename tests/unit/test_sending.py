"""Bodies on the wire, seen by a client that looks at every byte and at how the connection ends."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.oci.digest import Digest
from proxy.testing import Answer as Scripted
from proxy.testing import Corrupt, Cut, Fault, Stall, make_image
from proxy.testing.images import pseudo_random
from proxy.web.sending import CHUNK, FEW, SMALL_CHUNK, chunk_for, read_at, read_cached
from proxy.web.server import RegistryServer
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Pullpool,
    RawClient,
    Served,
    blob_path,
    manifest_path,
    pulling,
    running,
    until,
)
from tests.unit.store_kit import descriptors

MIB = 1 << 20
LARGE = pseudo_random("a blob that no socket buffer holds", 24 * MIB)


@contextlib.asynccontextmanager
async def chunked_upstream(data: bytes) -> AsyncIterator[str]:
    """A registry that answers every request with `data`, and does not say how much it is."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(data), MIB):
            await response.write(data[start : start + MIB])
        return response

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def keep(pool: Pullpool, path: str) -> None:
    """Have the proxy store what is there."""
    assert (await pool.get(path)).status == 200
    await pool.stored()


def leases(pool: Pullpool) -> list[str]:
    """Files of the cache that are open, those aside that nobody reads, the index and the lock."""
    pool.proxy.store._shelf.kept.close()
    root = str(pool.cache)
    return [name for name in descriptors() if name.startswith((f"{root}/blobs", f"{root}/staging"))]


class TestConnections:
    async def test_one_connection_serves_many_requests(self, served: Served) -> None:
        pool, _ = served
        paths = [manifest_path("v1"), blob_path(), "/v2/", manifest_path("none"), "/nothing"]
        async with RawClient.connected(pool.address) as client:
            for number in range(40):
                await client.ask(paths[number % len(paths)])
                await read_answer(client)
        assert len(pool.access_log) == 40

    async def test_pipelined_requests_are_answered_in_order(self, served: Served) -> None:
        pool, _ = served
        ranges = [(n * 1000, n * 1000 + 999) for n in range(30)]
        async with RawClient.connected(pool.address) as client:
            for first, last in ranges:
                await client.ask(blob_path(), headers=f"Range: bytes={first}-{last}\n")
            for first, last in ranges:
                head, body = await read_answer(client)
                assert "206 Partial Content" in head
                assert body == LAYER.data[first : last + 1]

    async def test_a_head_among_gets_does_not_shift_the_answers(self, served: Served) -> None:
        pool, _ = served
        async with RawClient.connected(pool.address) as client:
            for path in (blob_path(), manifest_path("v1"), manifest_path("none"), "/nothing"):
                await client.ask(path, method="HEAD")
                head = await client.head()
                assert client.body == b""
                client.received.clear()
                assert "content-length" in head.lower()
            await client.ask(manifest_path("v1"))
            assert (await read_answer(client))[1] == IMAGE.manifest

    async def test_http_1_0_is_served(self, served: Served) -> None:
        pool, _ = served
        async with RawClient.connected(pool.address) as client:
            await client.send(f"GET {blob_path()} HTTP/1.0\n\n")
            assert await client.ending() == "FIN"
        assert client.body == LAYER.data

    async def test_a_body_of_unknown_length_ends_rightly(self, tmp_path: Path) -> None:
        """No manifest tells the size and neither does the upstream."""
        async with chunked_upstream(LARGE) as url, running(tmp_path, url) as pool:
            path = blob_path(Digest.of(LARGE))
            answer = await pool.get(path)
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert answer.body == LARGE
            await pool.stored()
            stored = await pool.get(path)
            assert (stored.body, stored.headers["Content-Length"]) == (LARGE, str(len(LARGE)))


async def read_answer(client: RawClient) -> tuple[str, bytes]:
    """One answer with a Content-Length; what comes after it stays in `received`."""
    head = await client.head()
    lines = [line.partition(":") for line in head.split("\r\n")]
    [length] = [int(value) for name, _, value in lines if name.lower() == "content-length"]
    start = len(head) + 4
    data = await client.until(lambda data: len(data) >= start + length)
    body = bytes(data[start : start + length])
    del data[: start + length]
    return head, body


class TestBrokenBodies:
    async def test_wrong_bytes_end_in_a_reset_before_the_last_of_them(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.script(Fault(Corrupt(at=7), kind="blob"))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path())
            assert await client.ending() == "RST"
        assert len(client.body) < LAYER.size
        assert str(LAYER.digest) not in await pool.stored()
        assert pool.count("digest_mismatch_total", source="upstream") == 1
        assert pool.access_log[-1]["reason"] == "digest_mismatch"
        assert (await pool.get(blob_path())).body == LAYER.data

    async def test_a_size_that_is_not_the_manifests_ends_in_a_reset(self, tmp_path: Path) -> None:
        async with pulling(tmp_path) as (pool, fake):
            document = json.loads(IMAGE.manifest)
            document["layers"][0]["size"] += 5
            fake.put_manifest(NAME, json.dumps(document).encode(), IMAGE.media_type, tag="lie")
            await pool.get(manifest_path("lie"))
            answer = await pool.get(blob_path())
            assert (answer.status, answer.code) == (502, "SIZE_INVALID")

    async def test_a_body_that_cannot_be_finished_ends_with_fin(self, served: Served) -> None:
        pool, fake = served
        await pool.get(manifest_path("v1"))
        fake.script(
            Fault(Cut(after=100_000), kind="blob"), Fault(Scripted(500), kind="blob", times=None)
        )
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path())
            assert await client.ending() == "FIN"
        assert f"Content-Length: {LAYER.size}".encode() in client.received
        assert client.body == LAYER.data[: len(client.body)]
        assert len(client.body) < LAYER.size
        assert str(LAYER.digest) not in await pool.stored()
        [line] = [line for line in pool.access_log if line["path"] == blob_path()]
        assert (line["status"], line["reason"]) == (200, "upstream_unavailable")
        assert line["bytes"] == len(client.body)

    async def test_without_a_length_http_1_0_cannot_tell_so_it_is_a_reset(
        self, tmp_path: Path
    ) -> None:
        wrong = Digest.of(b"something else")
        async with chunked_upstream(LARGE) as url, running(tmp_path, url) as pool:
            async with RawClient.connected(pool.address) as client:
                await client.send(f"GET {blob_path(wrong)} HTTP/1.0\n\n")
                assert await client.ending() == "RST"
            assert await pool.stored() == set()

    async def test_a_body_that_breaks_goes_on_at_its_byte(self, served: Served) -> None:
        pool, fake = served
        fake.script(*[Fault(Cut(after=50_000), kind="blob") for _ in range(3)])
        assert (await pool.get(blob_path())).body == LAYER.data
        assert fake.counters.bytes_by_digest[LAYER.digest] < LAYER.size * 1.2

    async def test_a_stored_file_that_was_cut_short_is_never_a_whole_answer(
        self, served: Served
    ) -> None:
        pool, fake = served
        digest = fake.put_blob(NAME, LARGE)
        await keep(pool, blob_path(digest))
        file = pool.cache / "blobs/sha256" / digest.hex[:2] / digest.hex
        async with RawClient.connected(pool.address, receive_buffer=4096) as client:
            await client.ask(blob_path(digest))
            await client.head()
            await asyncio.to_thread(_cut, file, MIB)
            assert await client.ending() in ("FIN", "RST")
        assert len(client.body) < len(LARGE)
        assert pool.access_log[-1]["reason"] == "store_failed"


def _cut(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


class TestClientsThatLeave:
    @pytest.mark.parametrize("state", ["stored", "in flight"])
    async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(
        self, served: Served, state: str
    ) -> None:
        pool, fake = served
        digest = fake.put_blob(NAME, LARGE)
        path = blob_path(digest)
        if state == "stored":
            await keep(pool, path)
        before = len(pool.access_log)
        for _ in range(5):
            async with RawClient.connected(pool.address, receive_buffer=4096) as client:
                await client.ask(path)
                await client.head()
                await client.more()
        await until(lambda: len(pool.access_log) == before + 5)
        assert [line["status"] for line in pool.access_log[before:]] == [499] * 5
        assert await pool.stored() >= {str(digest)}
        assert leases(pool) == []
        assert (await pool.get(path)).body == LARGE
        assert pool.count("http_requests_inflight") == 0

    async def test_a_client_that_leaves_a_queue_is_forgotten(self, tmp_path: Path) -> None:
        capped = {UPSTREAM: {"max_connections": 1}}
        async with pulling(tmp_path, upstreams=capped, cache={"on_abandon": "cancel"}) as (
            pool,
            fake,
        ):
            with fake.hold(kind="tags") as hold:
                first = asyncio.create_task(pool.get(f"/v2/{NAME}/tags/list"))
                await hold.arrived()
                async with RawClient.connected(pool.address) as client:
                    await client.ask(blob_path())
                    await until(lambda: len(pool.proxy.puller.flights) == 1)
                await until(lambda: len(pool.proxy.puller.flights) == 0)
            assert (await first).status == 200
            assert fake.counters.count("blob") == 0

    async def test_the_fill_goes_on_when_its_only_client_has_left(self, served: Served) -> None:
        pool, fake = served
        fake.script(Fault(Stall(after=1000), kind="blob"))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path())
            await fake.stalls.arrived()
        await until(lambda: pool.count("fills_abandoned_total", action="finish") == 1)
        fake.release()
        assert await pool.stored() == {str(LAYER.digest)}

    async def test_a_slow_client_slows_nobody(self, served: Served) -> None:
        pool, fake = served
        digest = fake.put_blob(NAME, LARGE)
        async with RawClient.connected(pool.address, receive_buffer=4096) as slow:
            await slow.ask(blob_path(digest))
            await slow.head()
            assert (await pool.get(blob_path(digest))).body == LARGE
            assert await pool.stored() == {str(digest)}
            # And it still gets its own bytes, from the file that was there when it came.
            assert await slow.rest(len(LARGE)) == LARGE
        await until(lambda: leases(pool) == [])

    async def test_bytes_come_before_the_blob_is_whole(self, served: Served) -> None:
        pool, fake = served
        digest = fake.put_blob(NAME, LARGE)
        fake.script(Fault(Stall(after=2 * MIB), kind="blob"))
        async with RawClient.connected(pool.address) as client:
            await client.ask(blob_path(digest))
            await fake.stalls.arrived()
            await client.until(lambda data: len(data) > MIB)
            fake.release()
            assert await client.rest(len(LARGE)) == LARGE


async def test_a_blob_larger_than_the_cache_goes_through(tmp_path: Path) -> None:
    async with pulling(tmp_path, cache={"max_size": "1MiB"}) as (pool, fake):
        digest = fake.put_blob(NAME, LARGE)
        crowd = [asyncio.create_task(pool.get(blob_path(digest))) for _ in range(3)]
        answers = await asyncio.gather(*crowd)
        assert all(answer.body == LARGE for answer in answers)
        part = await pool.get(blob_path(digest), Range="bytes=1000000-1000009")
        assert part.body == LARGE[1_000_000:1_000_010]
        assert await pool.stored() == set()


async def test_who_has_to_wait_for_bytes_that_have_gone_gets_its_head_before(
    tmp_path: Path,
) -> None:
    data = pseudo_random("a blob of which a window holds a part", 48 * MIB)
    settings: dict[str, Any] = {
        "cache": {"max_size": "1MiB"},
        "upstreams": {UPSTREAM: {"max_connections": 1}},
    }
    async with pulling(tmp_path, **settings) as (pool, fake):
        digest = fake.put_blob(NAME, data)
        async with (
            RawClient.connected(pool.address, receive_buffer=4096) as first,
            RawClient.connected(pool.address) as late,
        ):
            await first.ask(blob_path(digest))
            await first.until(lambda received: len(received) > 16 * MIB)
            with fake.hold(kind="blob") as hold:
                reading = asyncio.create_task(first.rest(len(data)))
                await hold.arrived()  # the flight's next turn, which has the only slot
                await late.ask(blob_path(digest), headers="Range: bytes=1000000-1000009\n")
                assert (await late.head()).startswith("HTTP/1.1 206")
                assert late.body == b""
            assert await reading == data
            assert await late.rest(10) == data[1_000_000:1_000_010]


async def test_a_shared_layer_is_one_file(served: Served) -> None:
    pool, fake = served
    other = make_image("team/twin", "v1", layers=[300_000, 5_000], seed=1, tarred=False)
    fake.push(other)
    for name in (NAME, "team/twin"):
        await pool.get(manifest_path("v1", name))
        assert (await pool.get(blob_path(name=name))).body == LAYER.data
        await pool.stored()
    assert fake.counters.gets[LAYER.digest] == 1


# -- reading what is copied --------------------------------------------------------------------


async def test_what_is_in_memory_is_read_where_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        assert await read_at(file.fileno(), 4, 3) == b"3456"
        assert await read_at(file.fileno(), 100, 8) == b"89"
        assert await read_at(file.fileno(), 100, 10) == b""


async def test_what_the_kernel_cannot_read_at_once_is_read_in_a_thread() -> None:
    """The files of /proc are made when they are read: never are they in memory."""
    with open("/proc/self/stat", "rb") as file:  # noqa: ASYNC230 - takes no disk
        assert read_cached(file.fileno(), 10, 0) is None
        assert await read_at(file.fileno(), 4, 0) == str(os.getpid()).encode()[:4]


async def test_reading_from_memory_lets_others_run(tmp_path: Path) -> None:
    path, turns = tmp_path / "blob", 0
    path.write_bytes(bytes(1000))

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(other())
    with path.open("rb") as file:
        for at in range(100):
            await read_at(file.fileno(), 10, at)
    running.cancel()
    assert turns >= 99


async def test_with_many_clients_less_is_read_at_once_for_each() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=str(chunk_for(request)))

    server = RegistryServer(answer, lambda _request, text: web.Response(status=400, text=text))
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]

    async def asked() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        return int(await reader.read(6))

    writers: list[asyncio.StreamWriter] = []
    try:
        assert [await asked() for _ in range(FEW)] == [CHUNK] * FEW
        assert await asked() == SMALL_CHUNK
        for writer in writers[:2]:
            writer.close()
            await writer.wait_closed()
        await until(lambda: len(server.connections) == FEW - 1)
        assert await asked() == CHUNK
    finally:
        for writer in writers:
            writer.close()
        listening.close()
        await server.shutdown(1)
        await listening.wait_closed()
