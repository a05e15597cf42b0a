"""Stripes of a flight under way, for other nodes: what there is of them, and what comes.

Whoever takes one holds a lease of the file, and so outlives the flight.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from proxy.fleet.pieces import Pieces, StripeHasher
from proxy.fleet.stripes import stripe_size
from proxy.oci.digest import Chunk, Digest
from proxy.oci.errors import NotFound, StoreFailed
from proxy.pull.reader import FileSpan, Piece
from proxy.store.blobs import FileLease
from proxy.store.work import finish

#: Bytes that are read at once to hash a stripe that has come.
HASH_STEP = 1 << 20


class Lender(Protocol):
    """The flight's part in the fleet."""

    digest: Digest
    size: int

    def reached(self, stripe: int, position: int) -> int | None:
        """How far from ``position`` in the stripe its bytes are there; None: no more will come."""

    async def changed(self) -> None:
        """Wait for the next piece, or that something else has changed."""

    def closed(self, stripe: int) -> None:
        """One who received it does not any more."""


class LentStripe:
    """A stripe of a flight under way, for one who receives it."""

    def __init__(self, lender: Lender, stripe: int, pieces: Pieces, lease: FileLease) -> None:
        self.pieces = pieces
        self._lender = lender
        self._stripe = stripe
        self._lease = lease
        self._is_closed = False

    async def read(self, start: int) -> AsyncGenerator[Piece, None]:
        """Its bytes from ``start`` on as they are verified. Raises ``NotFound`` when no more come
        than there are."""
        lender, position = self._lender, start
        offset = self._stripe * stripe_size(lender.size)
        while position < self.pieces.length:
            reached = lender.reached(self._stripe, position)
            if reached is None:
                what = f"stripe {self._stripe} of {lender.digest}"
                raise NotFound("blob", f"{what} does not come any more")
            if reached == position:
                await lender.changed()
                continue
            yield FileSpan(self._lease, offset + position, offset + reached)
            position = reached

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._lease.close()
            self._lender.closed(self._stripe)

    def __repr__(self) -> str:
        return f"<LentStripe {self._stripe} of {self._lender!r}>"


async def hashed(lease: FileLease, start: int, length: int) -> Pieces:
    """The digests of a stripe that is in the file, whose lease this closes. Raises
    ``StoreFailed``."""
    with lease:
        loop = asyncio.get_running_loop()
        return await finish(loop.run_in_executor(None, hash_stripe, lease, start, length))


def hash_stripe(lease: FileLease, start: int, length: int) -> Pieces:
    """The digests of a stripe that is in the file; in a thread. Raises ``StoreFailed``."""
    hasher = StripeHasher(length)
    while hasher.taken < length:
        step = min(HASH_STEP, length - hasher.taken)
        try:
            data = os.pread(lease.fileno(), step, start + hasher.taken)
        except OSError as error:
            raise StoreFailed(
                f"the cache could not read what it wrote: {error.strerror}"
            ) from error
        if not data:
            raise StoreFailed("a cached file has become shorter than it was")
        hasher.update(data)
    return hasher.pieces()


def apart(chunks: Sequence[Chunk], count: int) -> tuple[list[Chunk], list[Chunk]]:
    """The first ``count`` bytes of the chunks, and the others."""
    head: list[Chunk] = []
    rest: list[Chunk] = []
    for chunk in chunks:
        if count:
            head.append(chunk[:count])
        if count < len(chunk):
            rest.append(chunk[count:])
        count = max(0, count - len(chunk))
    return head, rest
