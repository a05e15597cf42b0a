"""A pulled manifest brings its blobs before anybody asks for them, and behind whoever asks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor
from proxy.pull.prefetch import AGAIN, chosen
from proxy.testing import Answer, FakeClock, FakeRegistry, Fault, make_image, make_index
from tests.unit.proxy_kit import (
    IMAGE,
    LAYER,
    NAME,
    UPSTREAM,
    Pullpool,
    blob_path,
    manifest_path,
    running,
    until,
    waiting,
)

BLOBS = {str(blob.digest): blob for blob in (IMAGE.config, *IMAGE.layers)}


@contextlib.asynccontextmanager
async def prefetching(
    directory: Path, clock: FakeClock | None = None, **cache: object
) -> AsyncIterator[tuple[Pullpool, FakeRegistry]]:
    """A proxy with one slot that fetches ahead."""
    async with FakeRegistry() as fake:
        fake.push(IMAGE)
        settings = {"prefetch": "manifest", **cache}
        one = {UPSTREAM: {"max_connections": 1}}
        async with running(directory, fake.url, cache=settings, upstreams=one, clock=clock) as pool:
            yield pool, fake


async def pull(pool: Pullpool, reference: object = "v1") -> None:
    assert (await pool.get(manifest_path(reference))).status == 200


def blobs_asked(fake: FakeRegistry) -> list[str]:
    """The blobs that the upstream was asked for, in order."""
    seen = fake.counters.seen
    gets = [one.path for one in seen if (one.kind, one.method) == ("blob", "GET")]
    return [path.rpartition("/")[2] for path in gets]


async def test_a_manifest_alone_brings_all_that_it_names_once(tmp_path: Path) -> None:
    async with prefetching(tmp_path) as (pool, fake):
        await pull(pool)
        assert await pool.stored() == {*BLOBS, str(IMAGE.digest)}
        assert pool.count("prefetches_total") == len(BLOBS)
        await pull(pool)
        for digest, blob in BLOBS.items():
            answer = await pool.get(blob_path(digest))
            assert (answer.word, answer.body) == ("hit", blob.data)
        size = sum(blob.size for blob in BLOBS.values())
        assert pool.count("upstream_bytes_total", upstream=fake.netloc) == size + len(
            IMAGE.manifest
        )
        assert sorted(blobs_asked(fake)) == sorted(BLOBS)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_off_and_by_head_nothing_is_fetched(tmp_path: Path, method: str) -> None:
    setting = "manifest" if method == "HEAD" else "off"
    async with prefetching(tmp_path, prefetch=setting) as (pool, fake):
        for _ in range(2):
            assert (await pool.ask(method, manifest_path("v1"))).status == 200
        await pool.get("/v2/")
        assert not blobs_asked(fake)
        assert not len(pool.proxy.puller.flights)


async def test_an_index_brings_nothing_and_its_image_only_itself(tmp_path: Path) -> None:
    images = [
        make_image(NAME, "x", layers=[4000], seed=seed, tarred=False, architecture=architecture)
        for seed, architecture in ((1, "amd64"), (2, "arm64"))
    ]
    index = make_index(NAME, "multi", images)
    async with prefetching(tmp_path) as (pool, fake):
        fake.push(index)
        await pull(pool, "multi")
        assert not len(pool.proxy.puller.flights)
        await pull(pool, images[0].digest)
        await pool.stored()
        wanted = {str(images[0].config.digest), *(str(one.digest) for one in images[0].layers)}
        assert set(blobs_asked(fake)) == wanted


async def test_whoever_asks_goes_first(tmp_path: Path) -> None:
    async with prefetching(tmp_path) as (pool, fake):
        with fake.hold(kind="blob") as hold:
            await pull(pool)
            await hold.arrived()  # one of the image's blobs has the only slot
            await until(lambda: waiting(pool) == len(BLOBS) - 1)
            last = blobs_asked(fake)[-1]
            asked = [digest for digest in BLOBS if digest != last][-1]
            reader = asyncio.create_task(pool.get(blob_path(asked)))
            await until(lambda: depth(pool, "abandoned") == len(BLOBS) - 2)
            hold.release()
            answer = await reader
        assert (answer.word, answer.body) == ("joined", BLOBS[asked].data)
        await pool.stored()
        order = blobs_asked(fake)
        assert order.index(asked) == order.index(last) + 1
        assert sorted(order[-len(BLOBS) :]) == sorted(BLOBS)


def depth(pool: Pullpool, name: str) -> int:
    [gate] = pool.proxy.origins.states()
    return gate.depth[name]


async def test_a_failure_is_logged_once_and_harms_nobody(tmp_path: Path) -> None:
    clock = FakeClock()
    async with prefetching(tmp_path, clock=clock) as (pool, fake):
        fake.script(Fault(Answer(403), kind="blob", reference=str(LAYER.digest)))
        await pull(pool)
        kept = {*BLOBS, str(IMAGE.digest)} - {str(LAYER.digest)}
        assert await pool.stored() == kept
        await pull(pool)  # within a moment nothing is tried again
        assert await pool.stored() == kept
        assert len(pool.events("fill_failed")) == 1
        assert blobs_asked(fake).count(str(LAYER.digest)) == 1
        assert (await pool.get(blob_path())).body == LAYER.data
        await pool.stored()
        clock.advance(AGAIN + 1)
        await pull(pool)
        assert blobs_asked(fake).count(str(LAYER.digest)) == 2


async def test_what_has_no_room_is_left_to_whoever_asks(tmp_path: Path) -> None:
    sizes = 2 * (IMAGE.layers[1].size + IMAGE.config.size) + 2 * len(IMAGE.manifest) + 1000
    async with prefetching(tmp_path, max_size=sizes) as (pool, fake):
        await pull(pool)
        await pool.stored()
        assert set(blobs_asked(fake)) == set(BLOBS) - {str(LAYER.digest)}
        assert not pool.events("fill_without_disk")
        assert (await pool.get(blob_path())).body == LAYER.data


async def test_the_drain_ends_what_nobody_asked_for_and_nothing_else(tmp_path: Path) -> None:
    async with prefetching(tmp_path) as (pool, fake):
        with fake.hold(kind="blob") as hold:
            await pull(pool)
            await hold.arrived()
            held = blobs_asked(fake)[0]
            reader = asyncio.create_task(pool.get(blob_path(held)))
            flights = pool.proxy.puller.flights
            flight = flights.find(Digest.parse(held))
            assert flight is not None
            await until(lambda: len(flight.readers) == 1)
            pool.proxy.drain()
            await until(lambda: len(flights) == 1)
            hold.release()
            assert (await reader).body == BLOBS[held].data
        assert await pool.stored() == {held, str(IMAGE.digest)}
        assert not pool.events("fill_failed")


# -- manifests that are hits -----------------------------------------------------------------------

BY_DIGEST = manifest_path(IMAGE.digest)


async def evicted(pool: Pullpool, digest: Digest) -> None:
    """The store gives it up, as for room."""
    shelf = pool.proxy.store._shelf
    assert shelf.ledger.remove(digest)
    await shelf.evict([digest], "room")


async def is_hot(pool: Pullpool, method: str = "GET", **headers: str) -> bool:
    """Is the manifest answered by the hot path?"""
    before = pool.count("http_hot_requests_total", kind="manifest")
    answer = await pool.ask(method, BY_DIGEST, **headers)
    assert (answer.status, answer.word) in ((200, "hit"), (304, "hit"))
    return pool.count("http_hot_requests_total", kind="manifest") > before


async def hot_and_not_lately(pool: Pullpool, clock: FakeClock) -> None:
    """The image is held, its manifest is hot, and what it has begun is a while ago."""
    await pull(pool)
    await pool.stored()
    for method in ("GET", "HEAD"):
        await pool.ask(method, BY_DIGEST)
    clock.advance(AGAIN + 1)
    for method in ("GET", "HEAD"):  # renewed now: the next answers come straight from the table
        assert await is_hot(pool, method)
    assert pool.count("prefetches_total") == len(BLOBS)


@pytest.mark.parametrize("digest", BLOBS)
@pytest.mark.parametrize("headers", [{}, {"If_None_Match": f'"{IMAGE.digest}"'}])
async def test_a_hot_hit_brings_what_was_evicted(
    tmp_path: Path, digest: str, headers: dict[str, str]
) -> None:
    clock = FakeClock()
    async with prefetching(tmp_path, clock) as (pool, fake):
        await hot_and_not_lately(pool, clock)
        await evicted(pool, Digest.parse(digest))
        assert await is_hot(pool, **headers)
        assert await pool.stored() == {*BLOBS, str(IMAGE.digest)}
        assert blobs_asked(fake).count(digest) == 2
        for _ in range(3):
            assert await is_hot(pool, **headers)
        assert len(blobs_asked(fake)) == len(BLOBS) + 1


async def test_a_hot_hit_brings_what_was_never_there(tmp_path: Path) -> None:
    clock = FakeClock()
    async with prefetching(tmp_path, clock) as (pool, fake):
        fake.script(Fault(Answer(403), kind="blob", reference=str(LAYER.digest)))
        await pull(pool)
        await pool.stored()
        assert not await is_hot(pool)
        assert await is_hot(pool)
        assert blobs_asked(fake).count(str(LAYER.digest)) == 1
        clock.advance(AGAIN + 1)
        assert await is_hot(pool)
        assert str(LAYER.digest) in await pool.stored()


async def test_a_hot_head_brings_nothing(tmp_path: Path) -> None:
    clock = FakeClock()
    async with prefetching(tmp_path, clock) as (pool, fake):
        await hot_and_not_lately(pool, clock)
        await evicted(pool, LAYER.digest)
        clock.advance(AGAIN + 1)
        assert await is_hot(pool, "HEAD")
        assert str(LAYER.digest) not in await pool.stored()
        assert len(blobs_asked(fake)) == len(BLOBS)


def picked(
    children: Sequence[Descriptor], is_there: Callable[[Digest], bool], room: int, most: int
) -> list[Digest]:
    return [child.digest for child in chosen(children, is_there, room, most)]


def test_as_many_are_chosen_as_there_is_room_for() -> None:
    sizes = (50, 30, 200, 20, 10)
    children = [Descriptor("x", Digest.of(bytes([n])), size) for n, size in enumerate(sizes)]
    first, second, third, fourth, fifth = (child.digest for child in children)
    nothing = frozenset[Digest]()
    assert picked(children, nothing.__contains__, 100, 9) == [first, second, fourth]
    assert picked(children, {first}.__contains__, 100, 9) == [second, fourth, fifth]
    assert picked(children, nothing.__contains__, 1000, 2) == [first, second]
    assert picked(children, nothing.__contains__, 1000, 0) == []
    assert third not in picked(children, nothing.__contains__, 199, 9)
