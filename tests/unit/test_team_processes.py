"""Two real processes on one cache directory: a leader that is killed, one that is stopped (D15)."""

import asyncio
import signal
from pathlib import Path

import aiohttp
import pytest

from proxy.oci.digest import Digest
from proxy.store.reading import Reading
from proxy.testing import FakeRegistry, Fault, Stall
from tests.unit.process_kit import child
from tests.unit.proxy_kit import IMAGE, NAME, RawClient, blob_path, manifest_path, until
from tests.unit.upstream_kit import MIB, noise

pytestmark = pytest.mark.one_loop


async def test_two_processes_on_one_cache_keep_one_cap_and_fetch_once(tmp_path: Path) -> None:
    """The registry refuses a socket beyond what the leader's cap allows."""
    async with (
        FakeRegistry(limit=16) as fake,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        child(tmp_path, fake.url) as one,
        child(tmp_path, fake.url) as other,
    ):
        blobs = [noise(MIB + number) for number in range(40)]
        digests = [fake.put_blob(NAME, data) for data in blobs]

        async def pull(url: str, number: int) -> None:
            async with session.get(f"{url}{blob_path(digests[number])}") as answer:
                assert await answer.read() == blobs[number]

        urls = (one.url, other.url, other.url)
        await asyncio.gather(*(pull(url, n) for n in range(len(blobs)) for url in urls))
        assert fake.counters.refused == 0
        assert fake.counters.peak_sockets <= 16
        for data, digest in zip(blobs, digests, strict=True):
            assert fake.counters.bytes_by_digest[digest] == len(data)


async def test_a_killed_leaders_fill_goes_on_under_the_follower(tmp_path: Path) -> None:
    """Its client sees one body; what had come is not fetched again."""
    size = 4 * MIB
    async with FakeRegistry() as fake:
        digest = fake.put_blob(NAME, noise(size))
        fake.script(Fault(Stall(2 * MIB), kind="blob"))
        async with child(tmp_path, fake.url) as leader, child(tmp_path, fake.url) as follower:
            assert leader.events("leads")
            assert follower.events("follows")
            async with RawClient.connected(follower.address) as client:
                await client.ask(blob_path(digest))
                await fake.stalls.arrived()
                await client.until(lambda data: len(data) > MIB)
                leader.send(signal.SIGKILL)
                assert await client.rest(size) == noise(size)
            taken = await follower.logged("fill_taken_over")
            assert taken["at"] >= MIB
            assert fake.counters.bytes_by_digest[digest] <= 2 * MIB + size - taken["at"]
            fake.release()


async def test_holes_that_a_killed_leader_left_are_not_taken_for_bytes(tmp_path: Path) -> None:
    """The first part stands still inside a block of the disk, and others have come behind it."""
    size, first = 24 * MIB, 2 * MIB + 100
    async with FakeRegistry() as fake:
        digest = fake.put_blob(NAME, noise(size))
        fake.script(Fault(Stall(first), kind="blob"))
        async with child(tmp_path, fake.url) as leader, child(tmp_path, fake.url) as follower:
            async with RawClient.connected(follower.address) as client:
                await client.ask(blob_path(digest))
                await fake.stalls.arrived()
                await client.until(lambda data: len(data) > MIB)
                await until(lambda: fake.counters.bytes_by_digest[digest] >= first + 8 * MIB)
                await until(lambda: counted(tmp_path / "cache") >= MIB)
                leader.send(signal.SIGKILL)
                assert await client.rest(size) == noise(size)
            taken = await follower.logged("fill_taken_over")
            assert taken["at"] <= first
            fake.release()
        assert not follower.events("fill_failed")


async def test_a_stopped_leader_leaves_hits_and_a_clear_refusal_and_goes_on(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as fake,
        aiohttp.ClientSession() as session,
    ):
        fake.push(IMAGE)
        deadlines = {"manifest_deadline": "4s", "header_deadline": "4s", "blob_deadline": "9s"}
        async with (
            child(tmp_path, fake.url, queue=deadlines) as leader,
            child(tmp_path, fake.url, queue=deadlines) as follower,
        ):
            layer = IMAGE.layers[0]
            async with session.get(f"{follower.url}{blob_path(layer.digest)}") as answer:
                assert await answer.read() == layer.data
            await linked(tmp_path / "cache", fake.netloc, layer.digest)
            leader.send(signal.SIGSTOP)
            async with session.get(f"{follower.url}{manifest_path('v1')}") as answer:
                assert answer.status == 503
                assert "Retry-After" in answer.headers
                assert "does not answer" in (await answer.json())["errors"][0]["message"]
            await follower.logged("leader_gone")
            async with session.get(f"{follower.url}{blob_path(layer.digest)}") as answer:
                assert (answer.status, answer.headers["X-Pullpool-Cache"]) == (200, "hit")
            assert not follower.events("leads")
            leader.send(signal.SIGCONT)
            await follower.logged("follows", 2)
            async with session.get(f"{follower.url}{manifest_path('v1')}") as answer:
                assert (answer.status, await answer.read()) == (200, IMAGE.manifest)
            assert (await leader.status(session))["followers"] == 1


async def test_a_killed_follower_leaves_nothing_at_the_leader(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, aiohttp.ClientSession() as session:
        digest = fake.put_blob(NAME, noise(2 * MIB))
        fake.script(Fault(Stall(MIB), kind="blob"))
        async with child(tmp_path, fake.url) as leader, child(tmp_path, fake.url) as follower:
            async with RawClient.connected(follower.address) as client:
                await client.ask(blob_path(digest))
                await fake.stalls.arrived()
                [flight] = (await leader.status(session))["flights"]
                assert flight["readers"] == 1
                follower.send(signal.SIGKILL)
                gone = await leader.logged("follower_gone")
            assert gone["calls"] == 1
            status = await leader.status(session)
            assert status["followers"] == 0
            assert [flight["readers"] for flight in status["flights"]] == [0]
            fake.release()
            async with session.get(f"{leader.url}{blob_path(digest)}") as answer:
                assert await answer.read() == noise(2 * MIB)


async def linked(cache: Path, upstream: str, digest: Digest) -> None:
    """Wait until the leader has written down that the repository has the blob."""
    reading = await Reading.open(cache)
    try:
        while await reading.linked(upstream, NAME, digest) is None:  # noqa: ASYNC110 -- its disk
            await asyncio.sleep(0.01)
    finally:
        await reading.close()


def counted(cache: Path) -> int:
    """How many bytes of the one fill that was written out of order count."""
    counts = [path.read_bytes() for path in (cache / "staging").glob("*.count")]
    return max((int(text or 0) for text in counts), default=0)
