"""Scripted faults and holds of the fake registry, seen from a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest

from proxy.oci.digest import Digest
from proxy.testing import (
    Answer,
    Corrupt,
    Cut,
    Disconnect,
    FakeRegistry,
    Fault,
    Hang,
    IgnoreRange,
    Oversize,
    Reset,
    ShortLength,
    Stall,
    WrongContentRange,
    WrongDigestHeader,
)
from tests.unit.fake_kit import (
    IMAGE,
    LAYER,
    blob_url,
    dial,
    manifest_url,
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


class TestFaults:
    async def test_an_answer_is_replaced_as_often_as_scripted(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(
            Fault(Answer(429, {"Retry-After": "3"}, b"slow down"), kind="manifest", times=2)
        )
        statuses = []
        for _ in range(3):
            async with client.get(manifest_url(registry)) as answer:
                statuses.append((answer.status, answer.headers.get("Retry-After")))
        assert statuses == [(429, "3"), (429, "3"), (200, None)]
        assert registry.counters.bytes_sent == len(IMAGE.manifest)

    async def test_a_fault_strikes_only_what_it_names(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(
            Fault(Answer(500), reference=LAYER.digest, times=None),
            Fault(Answer(501), kind="manifest", reference=IMAGE.digest),
            Fault(Answer(502), method="HEAD"),
            Fault(Answer(503), repository="other/app"),
        )

        async def status(url: str) -> int:
            async with client.get(url) as answer:
                return answer.status

        assert await status(blob_url(registry, IMAGE.layers[0].digest)) == 200
        assert await status(manifest_url(registry)) == 501  # by tag, named by digest
        assert await status(manifest_url(registry)) == 200
        assert [await status(blob_url(registry)) for _ in range(3)] == [500] * 3
        registry.clear_script()
        assert await status(blob_url(registry)) == 200

    async def test_a_cut_body_ends_after_exactly_that_many_bytes(
        self, registry: FakeRegistry
    ) -> None:
        registry.script(Fault(Cut(after=300_001), kind="blob"))
        head, body, error = await read_to_end(registry)
        assert f"Content-Length: {LAYER.size}".encode() in head
        assert body == LAYER.data[:300_001]
        assert error is None
        assert registry.counters.bytes_sent == 300_001

    async def test_a_reset_body_ends_in_an_error_after_exactly_that_many_bytes(
        self, registry: FakeRegistry
    ) -> None:
        registry.script(Fault(Reset(after=300_001), kind="blob"))
        _, body, error = await read_to_end(registry)
        assert body == LAYER.data[:300_001]
        assert isinstance(error, ConnectionResetError)

    async def test_a_stalled_body_goes_on_when_released(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(Stall(after=1000), kind="blob"))
        async with client.get(blob_url(registry)) as answer:
            assert await answer.content.readexactly(1000) == LAYER.data[:1000]
            await registry.stalls.arrived()
            assert registry.counters.bytes_sent == 1000
            registry.release()
            assert await answer.read() == LAYER.data[1000:]

    async def test_a_stalled_request_ends_with_its_connection(self, registry: FakeRegistry) -> None:
        registry.script(Fault(Stall(after=10), kind="blob"))
        async with aiohttp.ClientSession() as leaving:
            answer = await leaving.get(blob_url(registry))
            await registry.stalls.arrived()
            answer.close()
        await registry.drop_connections()
        assert registry.stalls.waiting == 0

    async def test_a_hanging_request_is_answered_when_released(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(Hang(), kind="manifest"))
        pending = asyncio.create_task(client.get(manifest_url(registry)))
        await registry.stalls.arrived()
        assert registry.counters.seen[-1].status is None
        assert not pending.done()
        registry.release()
        async with await pending as answer:
            assert answer.status == 200

    @pytest.mark.parametrize("reset", [False, True])
    async def test_a_disconnect_answers_nothing(
        self, registry: FakeRegistry, client: aiohttp.ClientSession, reset: bool
    ) -> None:
        registry.script(Fault(Disconnect(reset=reset), kind="blob", times=None))
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get(blob_url(registry))

    async def test_corrupt_bytes_keep_their_length(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(Corrupt(at=-1), kind="blob"))
        async with client.get(blob_url(registry)) as answer:
            data = await answer.read()
        assert len(data) == LAYER.size
        assert data[:-1] == LAYER.data[:-1]
        assert data[-1] != LAYER.data[-1]

    async def test_a_short_length_is_announced_and_kept(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(ShortLength(by=3), kind="blob"))
        async with client.get(blob_url(registry)) as answer:
            assert answer.headers["Content-Length"] == str(LAYER.size - 3)
            assert await answer.read() == LAYER.data[:-3]

    async def test_an_oversize_manifest_is_still_json(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(Oversize(9 << 20), kind="manifest"))
        async with client.get(manifest_url(registry)) as answer:
            data = await answer.read()
        assert len(data) == 9 << 20
        assert json.loads(data) == json.loads(IMAGE.manifest)

    async def test_a_wrong_content_range_comes_with_the_right_bytes(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(WrongContentRange(shift=5), kind="blob"))
        async with client.get(blob_url(registry), headers={"Range": "bytes=10-19"}) as answer:
            assert answer.headers["Content-Range"] == f"bytes 15-24/{LAYER.size}"
            assert await answer.read() == LAYER.data[10:20]

    async def test_a_wrong_digest_header_is_valid_but_not_the_contents(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(WrongDigestHeader(), kind="manifest"))
        async with client.get(manifest_url(registry)) as answer:
            assert Digest.parse(answer.headers["Docker-Content-Digest"]) != IMAGE.digest
            assert await answer.read() == IMAGE.manifest

    async def test_a_range_may_be_ignored_once(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        registry.script(Fault(IgnoreRange(), kind="blob"))
        statuses = []
        for _ in range(2):
            async with client.get(blob_url(registry), headers={"Range": "bytes=1-"}) as answer:
                statuses.append(answer.status)
                await answer.read()
        assert statuses == [200, 206]


async def read_to_end(registry: FakeRegistry) -> tuple[bytes, bytes, OSError | None]:
    """Headers, every byte of the body that arrives, and the error that ended it."""
    reader, writer = await dial(registry)
    writer.write(f"GET {urlsplit(blob_url(registry)).path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    received, error = bytearray(), None
    try:
        while piece := await reader.read(1 << 16):
            received += piece
    except OSError as failure:
        error = failure
    writer.transport.abort()
    return head, bytes(received), error


class TestHolds:
    async def test_held_requests_wait_together_and_leave_in_order(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        hold = registry.hold(kind="blob")
        pending = []
        for _ in range(3):
            pending.append(asyncio.create_task(client.get(blob_url(registry))))
            await hold.arrived(len(pending))
        async with client.get(manifest_url(registry)) as answer:
            assert answer.status == 200
        hold.release(1)
        async with await pending[0] as answer:
            assert await answer.read() == LAYER.data
        assert hold.waiting == 2
        hold.release()
        for task in pending[1:]:
            async with await task as answer:
                assert await answer.read() == LAYER.data
        async with client.get(blob_url(registry)) as answer:
            assert answer.status == 200

    async def test_a_client_that_leaves_waits_no_longer(
        self, registry: FakeRegistry, client: aiohttp.ClientSession
    ) -> None:
        with registry.hold(reference=LAYER.digest) as hold:
            leaving = asyncio.create_task(client.get(blob_url(registry)))
            await hold.arrived()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await registry.drop_connections()
            assert hold.waiting == 0
