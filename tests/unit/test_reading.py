"""A cache directory read by a process that does not lead: what it remembers, and for how long."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.oci.digest import Digest
from proxy.store.durability import Durability
from proxy.store.files import Layout
from proxy.store.reading import Reading
from tests.unit.store_kit import blob, name, opened

A, B = blob(1, 3000), blob(2, 3000)
LINK = ("registry.example.com", "team/app", name(A))


@asynccontextmanager
async def reading(directory: Path, *, boot: str = "this boot") -> AsyncIterator[Reading]:
    one = await Reading.open(directory, boot=lambda: boot)
    try:
        yield one
    finally:
        await one.close()


@asynccontextmanager
async def shared(directory: Path) -> AsyncIterator[Reading]:
    """A directory in which a store holds A, as a follower sees it."""
    async with opened(directory) as store:
        await store.put(name(A), A)
        await store.link(*LINK[:2], [(name(A), len(A))])
        async with reading(directory) as one:
            yield one


async def holds(one: Reading, digest: Digest) -> bool:
    lease = await one.lease(digest)
    if lease is not None:
        lease.close()
    return lease is not None


async def test_what_was_seen_is_marked_until_it_is_taken_back(tmp_path: Path) -> None:
    async with shared(tmp_path) as one:
        assert one.held(name(A)) is None  # not seen yet
        assert one.known_link(*LINK) is None
        assert await holds(one, name(A))
        assert await one.linked(*LINK) is not None
        held, linked = one.held(name(A)), one.known_link(*LINK)
        assert held is not None
        assert linked is not None
        one.forget([name(B)])
        assert held.holds
        one.forget([name(A)])
        assert not held.holds
        assert one.size_of(name(A)) is None
        one.unlink(LINK)
        assert not linked.holds
        assert one.known_link(*LINK) is None


async def test_what_is_read_while_something_is_taken_back_is_not_remembered(
    tmp_path: Path,
) -> None:
    async with shared(tmp_path) as one:
        for take_back in (partial(one.forget, [name(A)]), partial(one.unlink, LINK)):
            looking: list[asyncio.Future[Any]] = [
                asyncio.ensure_future(holds(one, name(A))),
                asyncio.ensure_future(one.read(name(A))),
                asyncio.ensure_future(one.linked(*LINK)),
            ]
            await asyncio.sleep(0)
            take_back()
            assert all(await asyncio.gather(*looking))
            assert one.size_of(name(A)) is None
            assert one.known_link(*LINK) is None


async def test_without_a_leader_everything_is_looked_for_each_time(tmp_path: Path) -> None:
    async with shared(tmp_path) as one:
        assert await holds(one, name(A))
        held = one.held(name(A))
        assert held is not None
        one.lose()
        assert not held.holds
        assert await holds(one, name(A))
        assert await one.linked(*LINK) is not None
        assert one.held(name(A)) is None
        assert one.known_link(*LINK) is None
        await asyncio.to_thread(Layout(tmp_path).blob(name(A)).unlink)
        assert not await holds(one, name(A))


@pytest.mark.parametrize("durability", [Durability.NONE, Durability.FILE])
async def test_what_may_have_lost_bytes_is_served_only_when_it_is_proved(
    tmp_path: Path, durability: Durability
) -> None:
    first, second = (lambda: "first boot"), (lambda: "second boot")
    async with opened(tmp_path, durability=durability, boot=first) as store:
        await store.recovered()
        await store.put(name(A), A)
        async with reading(tmp_path, boot="first boot") as one:
            assert await holds(one, name(A))
    async with reading(tmp_path, boot="second boot") as one:
        assert await holds(one, name(A)) is (durability is not Durability.NONE)
        async with opened(tmp_path, durability=durability, boot=second) as store:
            await store.recovered()
            assert await holds(one, name(A))
