"""What a node gives to others: stripes that are verified here, and where their bytes are.

A *shelf* is asked for a stripe and opens it, as the store does for a reader: while it is open its
bytes stay. The listener for peers (web/peer.py) knows no more than that, so a stored blob and a
flight under way are the same to it.

Who gives sends the digests of all pieces of a stripe ahead. For a stored blob nobody has them until
somebody asks: they are hashed from the file in a thread, once for all who ask meanwhile, and kept.
They need no check against the file's later states: what a file of the store says it is was verified
when it was stored, and who takes a stripe verifies it again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from functools import partial
from typing import Protocol

from cachetools import LRUCache, TLRUCache

from proxy.fleet.pieces import PIECE, Pieces, StripeHasher
from proxy.fleet.protocol import StripeAsk
from proxy.fleet.stripes import stripe_size
from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, StoreFailed
from proxy.pull.reader import FileSpan, Piece
from proxy.pull.shared import SharedWork
from proxy.store.blobs import FileLease
from proxy.store.work import finish
from proxy.upstream.turns import Ticket

#: Stripes whose digests are kept, at most: about 2 KiB each.
KEPT = 8192
#: Blobs of which is remembered whether they are shared, at most, and for how many seconds: a blob
#: that has just come may not be linked yet.
ANSWERS = 16_384
SHARED_FOR, KEPT_BACK_FOR = 60.0, 5.0


class OpenStripe(Protocol):
    """A stripe that stays where it is until it is closed."""

    pieces: Pieces

    def read(self, start: int) -> AsyncGenerator[Piece, None]:
        """Its bytes from ``start`` on, as they are verified. Raises ``PullError`` when they are not
        all coming. Close it before the stripe."""

    def close(self) -> None:
        """Nobody reads it any more."""


class Shelf(Protocol):
    """Which stripes there are to give."""

    async def open(self, ask: StripeAsk) -> OpenStripe:
        """The stripe that is asked for. Raises ``NotFound`` and ``Denied``."""


class StoredStripe:
    """A stripe of a blob in the store."""

    def __init__(self, lease: FileLease, start: int, pieces: Pieces) -> None:
        self.pieces = pieces
        self._lease = lease
        self._start = start

    async def read(self, start: int) -> AsyncGenerator[Piece, None]:
        yield FileSpan(self._lease, self._start + start, self._start + self.pieces.length)

    def close(self) -> None:
        self._lease.close()

    def __repr__(self) -> str:
        return f"<StoredStripe from byte {self._start}, {self.pieces!r}>"


class SharingRule:
    """Which blobs other nodes may have: those that are known of an upstream which is shared.

    A blob that a private upstream has as well is the same bytes, and those are public already. One
    that no upstream is known to have is nobody's.
    """

    def __init__(
        self, store: Links, *, shared: Collection[str], clock: Callable[[], float]
    ) -> None:
        """``shared``: upstreams that are public, or whose blobs are shared all the same."""
        self._store = store
        self._shared = frozenset(shared)
        self._answers: TLRUCache[Digest, bool] = TLRUCache(ANSWERS, _until, timer=clock)

    async def may_share(self, digest: Digest) -> bool:
        """May other nodes have it?"""
        known = self._answers.get(digest)
        if known is None:
            known = not self._shared.isdisjoint(await self._store.upstreams_of(digest))
            self._answers[digest] = known
        return known

    def __repr__(self) -> str:
        return f"<SharingRule of {', '.join(sorted(self._shared)) or 'nothing'}>"


def _until(_digest: Digest, may_share: bool, now: float) -> float:
    return now + (SHARED_FOR if may_share else KEPT_BACK_FOR)


class Links(Protocol):
    """What is asked of the store about upstreams."""

    async def upstreams_of(self, digest: Digest) -> frozenset[str]: ...


class Blobs(Protocol):
    """What is asked of the store."""

    async def lease(self, digest: Digest) -> FileLease | None: ...

    def touch(self, digest: Digest) -> None: ...


class StoredShelf:
    """The blobs of the store, whose stripes are those of their sizes."""

    def __init__(
        self, store: Blobs, *, may_share: Callable[[Digest], Awaitable[bool]], kept: int = KEPT
    ) -> None:
        """``may_share``: may other nodes have this blob?"""
        self._store = store
        self._may_share = may_share
        self._known: LRUCache[tuple[Digest, int], Pieces] = LRUCache(kept)
        self._hashing: SharedWork[tuple[Digest, int], Pieces] = SharedWork()

    async def open(self, ask: StripeAsk) -> StoredStripe:
        """See ``Shelf``. Raises ``StoreFailed`` too."""
        lease = await self._leased(ask.digest)
        try:
            if not await self._may_share(ask.digest):
                raise Denied("this blob is not for other nodes")
            start, length = place(lease.size, ask.stripe)
            pieces = await self._pieces(ask.digest, ask.stripe, start, length)
        except BaseException:
            lease.close()
            raise
        self._store.touch(ask.digest)
        return StoredStripe(lease, start, pieces)

    async def _leased(self, digest: Digest) -> FileLease:
        lease = await self._store.lease(digest)
        if lease is None:
            raise NotFound("blob", "this node does not hold it")
        return lease

    async def _pieces(self, digest: Digest, stripe: int, start: int, length: int) -> Pieces:
        known = self._known.get((digest, stripe))
        if known is not None:
            return known

        async def work(_ticket: Ticket) -> Pieces:
            # A lease of its own: whoever began it may leave before it has ended.
            with await self._leased(digest) as lease:
                hashing = partial(_hashed, lease.fileno(), start, length)
                loop = asyncio.get_running_loop()
                return await finish(loop.run_in_executor(None, hashing))

        pieces, _ = await self._hashing.do((digest, stripe), "peers", work)
        self._known[digest, stripe] = pieces
        return pieces

    async def close(self) -> None:
        """Nothing is hashed any more."""
        await self._hashing.close()

    def __repr__(self) -> str:
        return f"<StoredShelf {len(self._known)} stripes known, {len(self._hashing)} hashed now>"


def place(size: int, stripe: int) -> tuple[int, int]:
    """Where a stripe of a blob of ``size`` bytes begins, and its length. Raises ``NotFound``."""
    whole = stripe_size(size)
    start = stripe * whole
    if start >= size:
        raise NotFound("blob", f"a blob of {size} bytes has no stripe {stripe}")
    return start, min(whole, size - start)


def _hashed(fd: int, start: int, length: int) -> Pieces:
    """The digests of a stripe's pieces, from a file; in a thread."""
    hasher = StripeHasher(length)
    while hasher.taken < length:
        try:
            data = os.pread(fd, min(PIECE, length - hasher.taken), start + hasher.taken)
        except OSError as error:
            raise StoreFailed(f"a cached file cannot be read: {error.strerror}") from error
        if not data:
            raise StoreFailed("a cached file has become shorter than it was")
        hasher.update(data)
    return hasher.pieces()
