"""What a node gives from its store: stripes of its blobs, to whom may have them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.fleet.claims import Grant
from proxy.fleet.peers import Peers, Wanted
from proxy.fleet.pieces import PIECE
from proxy.fleet.protocol import StripeAsk
from proxy.fleet.stripes import stripe_count, stripe_size
from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, PeerFailed, PeerLied, ShuttingDown
from proxy.pull.giving import KEPT_BACK_FOR, SHARED_FOR, SharingRule, StoredShelf, place
from proxy.store.blobs import FileLease
from proxy.store.store import Store
from proxy.testing import FakeClock
from proxy.testing.peer import pieces_of
from tests.unit.giving_kit import giver
from tests.unit.peer_kit import grant, taking
from tests.unit.store_kit import blob, name, opened

#: Its stripes have one piece each, and the last one a part of one.
BLOB = blob(1, 17 * PIECE + 5)
DIGEST = name(BLOB)
STRIPES = range(stripe_count(len(BLOB)))


def data_of(stripe: int) -> bytes:
    start, length = place(len(BLOB), stripe)
    return BLOB[start : start + length]


def ask(stripe: int = 0, digest: Digest = DIGEST) -> StripeAsk:
    return StripeAsk(digest, stripe, 1)


async def everybody(_digest: Digest) -> bool:
    return True


async def nobody(_digest: Digest) -> bool:
    return False


class CountedStore:
    """A store that counts the leases of blobs: those taken, and those that are open."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.taken: list[FileLease] = []

    @property
    def open(self) -> int:
        return sum(not lease.file.closed for lease in self.taken)

    async def lease(self, digest: Digest) -> FileLease | None:
        lease = await self.store.lease(digest)
        if lease is not None:
            self.taken.append(lease)
        return lease

    def touch(self, digest: Digest) -> None:
        self.store.touch(digest)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CountedStore]:
    async with opened(tmp_path) as made:
        await made.put(DIGEST, BLOB)
        counted = CountedStore(made)
        yield counted
        assert counted.open == 0


@pytest.fixture
async def shelf(store: CountedStore) -> AsyncIterator[StoredShelf]:
    made = StoredShelf(store, may_share=everybody)
    yield made
    await made.close()


@pytest.mark.parametrize("size", [1, PIECE, 16 * PIECE, 17 * PIECE + 5, 300 * PIECE, 999 * PIECE])
def test_the_stripes_of_a_blob_are_all_of_it(size: int) -> None:
    at = 0
    for stripe in range(stripe_count(size)):
        start, length = place(size, stripe)
        assert start == at
        assert 0 < length <= stripe_size(size)
        at += length
    assert at == size
    with pytest.raises(NotFound, match="has no stripe"):
        place(size, stripe_count(size))


def test_an_empty_blob_has_nothing_to_give() -> None:
    with pytest.raises(NotFound):
        place(0, 0)


@pytest.mark.parametrize("stripe", STRIPES)
async def test_a_stored_stripe_has_the_digests_of_its_bytes(
    shelf: StoredShelf, stripe: int
) -> None:
    opened_stripe = await shelf.open(ask(stripe))
    assert opened_stripe.pieces == pieces_of(data_of(stripe))
    opened_stripe.close()


async def test_stored_stripes_travel_from_node_to_node(shelf: StoredShelf) -> None:
    async with giver(shelf) as node, taking() as taker:
        for stripe in STRIPES:
            data = data_of(stripe)
            for start in range(0, len(data), PIECE):
                asked = grant(node.url, digest=DIGEST, stripe=stripe)
                assert await _taken(taker.peers, asked, data, start) == data[start:]


async def _taken(peers: Peers, asked: Grant, data: bytes, start: int = 0) -> bytes:
    wanted = Wanted(len(data), pieces_of(data).stripe_hash, start)
    async with peers.taking(asked, wanted) as transfer:
        return b"".join([b"".join(chunks) async for chunks in transfer])


async def test_digests_are_made_once_for_a_crowd_and_kept(
    store: CountedStore, shelf: StoredShelf
) -> None:
    crowd = await asyncio.gather(*(shelf.open(ask(1)) for _ in range(10)))
    for opened_stripe in crowd:
        opened_stripe.close()
    assert len(store.taken) == 11  # each has its own, and so has who hashed
    (await shelf.open(ask(1))).close()
    assert len(store.taken) == 12
    assert "1 stripes known, 0 hashed now" in repr(shelf)


async def test_so_many_digests_are_kept_and_no_more(store: CountedStore) -> None:
    shelf = StoredShelf(store, may_share=everybody, kept=2)
    for stripe in range(4):
        (await shelf.open(ask(stripe))).close()
    assert "2 stripes known" in repr(shelf)
    await shelf.close()


async def test_what_is_not_held_is_not_given(shelf: StoredShelf) -> None:
    with pytest.raises(NotFound, match="does not hold it"):
        await shelf.open(ask(0, name(b"another")))
    with pytest.raises(NotFound, match="has no stripe"):
        await shelf.open(ask(len(STRIPES)))


async def test_what_is_not_for_others_is_not_given(store: CountedStore) -> None:
    shelf = StoredShelf(store, may_share=nobody)
    with pytest.raises(Denied):
        await shelf.open(ask())
    async with giver(shelf) as node, taking() as taker:
        with pytest.raises(PeerFailed, match="answered 403"):
            await _taken(taker.peers, grant(node.url, digest=DIGEST), data_of(0))
    await shelf.close()


async def test_blobs_of_shared_upstreams_are_given_and_private_ones_are_not(
    store: CountedStore,
) -> None:
    clock = FakeClock()
    sharing = SharingRule(store.store, shared={"public.example"}, clock=clock)
    shelf = StoredShelf(store, may_share=sharing.may_share)
    with pytest.raises(Denied):  # nobody's
        await shelf.open(ask())
    await store.store.link("private.example", "team/app", [(DIGEST, len(BLOB))])
    clock.advance(KEPT_BACK_FOR)
    with pytest.raises(Denied):
        await shelf.open(ask())
    await store.store.link("public.example", "library/app", [(DIGEST, None)])
    with pytest.raises(Denied):  # as was known a moment ago
        await shelf.open(ask())
    clock.advance(KEPT_BACK_FOR)
    (await shelf.open(ask())).close()
    await store.store.unlink("public.example", "library/app", DIGEST)
    clock.advance(SHARED_FOR)
    with pytest.raises(Denied):
        await shelf.open(ask())
    await shelf.close()


async def test_a_stripe_of_which_the_disk_has_made_something_else_is_found_by_its_taker(
    store: CountedStore, shelf: StoredShelf, tmp_path: Path
) -> None:
    (await shelf.open(ask())).close()  # its digests are known from before

    def spoil() -> None:
        [file] = [path for path in tmp_path.rglob(DIGEST.hex) if path.is_file()]
        file.chmod(0o600)
        with file.open("r+b") as opened_file:
            os.pwrite(opened_file.fileno(), bytes([BLOB[3] ^ 1]), 3)

    await asyncio.to_thread(spoil)
    async with giver(shelf) as node, taking() as taker:
        for stripe, words in ((0, "piece at byte"), (1, None)):
            asked, data = grant(node.url, digest=DIGEST, stripe=stripe), data_of(stripe)
            if words is None:
                assert await _taken(taker.peers, asked, data) == data
                continue
            with pytest.raises(PeerLied, match=words):
                await _taken(taker.peers, asked, data)


async def test_who_leaves_while_digests_are_made_leaves_no_lease(
    store: CountedStore, shelf: StoredShelf
) -> None:
    steps, is_done = 0, False
    while not is_done:
        fresh = StoredShelf(store, may_share=everybody)
        task = asyncio.create_task(fresh.open(ask()))
        for _ in range(steps):
            await asyncio.sleep(0)
        is_done = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).close()
        await fresh.close()
        assert store.open == 0
        steps += 1 + steps // 4


async def test_one_that_leaves_a_crowd_costs_the_others_nothing(
    store: CountedStore, shelf: StoredShelf
) -> None:
    first = asyncio.create_task(shelf.open(ask()))
    second = asyncio.create_task(shelf.open(ask()))
    while "1 hashed now" not in repr(shelf):  # noqa: ASYNC110 - threads set no events
        await asyncio.sleep(0)
    first.cancel()
    opened_stripe = await second
    assert opened_stripe.pieces == pieces_of(data_of(0))
    opened_stripe.close()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_shelf_that_is_closed_hashes_nothing(shelf: StoredShelf) -> None:
    await shelf.close()
    with pytest.raises(ShuttingDown):
        await shelf.open(ask())
