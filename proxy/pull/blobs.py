"""Blobs: from the store, from the flight that is bringing them, or from a flight of their own.

The policy of one blob request (DESIGN §4, D7, D12), in the order of its questions: may this
repository have it, do we hold it, is it on its way, else fetch it. The answer's headers go out when
the flight's first bytes come, or at ``header_deadline`` without them: nobody waits in silence. The
one thing that is never answered early is a blob whose permission is still being proved.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from proxy.oci.digest import Digest
from proxy.oci.errors import PullError, QueueTimeout
from proxy.oci.ranges import ByteRange, Span
from proxy.pull.asking import COME_AGAIN, before
from proxy.pull.asks import Ask, BlobAnswer, CacheWord
from proxy.pull.flight import Flight, Flights
from proxy.pull.permissions import Permissions
from proxy.pull.reader import FileSpan, Piece, Reader
from proxy.store.blobs import FileLease
from proxy.store.store import Link, Store
from proxy.upstream.mirrored import MirroredClient


@dataclass(frozen=True, slots=True)
class Deadlines:
    """D7, in seconds from the request's arrival. ``spill`` names the upstreams that send clients
    away before ``header`` instead of answering early."""

    header: float = 20.0
    blob: float = 180.0
    manifest: float = 20.0
    spill: frozenset[str] = frozenset()


class Blobs:
    """Answers for blobs, of all upstreams."""

    def __init__(
        self,
        *,
        store: Store,
        flights: Flights,
        clients: Mapping[str, MirroredClient],
        permissions: Permissions,
        deadlines: Deadlines,
    ) -> None:
        self._store = store
        self._flights = flights
        self._clients = clients
        self._permissions = permissions
        self._deadlines = deadlines

    async def answer(self, ask: Ask, digest: Digest, wanted: ByteRange | None) -> BlobAnswer:
        """A GET. Raises ``PullError``; else the caller owns the answer and must close it."""
        word = CacheWord.HIT
        while True:
            link = await self._link(ask, digest)
            if link is None and self._needs_proof(ask, digest):
                link = await before(ask, self._deadlines.header, self._prove(ask, digest))
                word = CacheWord.REVALIDATED
            if link is not None and self._store.size_of(digest) is not None:
                lease = await self._store.lease(digest)
                if lease is not None:
                    self._store.touch(digest)
                    return _stored(digest, lease, wanted, word)
            # From here to join() nothing suspends, so no fill can land or begin unseen.
            if link is not None or not self._needs_proof(ask, digest):
                return await self._flown(ask, digest, link, wanted)

    async def head(self, ask: Ask, digest: Digest) -> BlobAnswer:
        """A HEAD: from what is known, else from the upstream."""
        link = await self._link(ask, digest)
        flight = self._flights.find(digest)
        if link is not None:
            size = self._store.size_of(digest)
            if size is not None:
                return _known(digest, size, CacheWord.HIT)
            size = _size(flight, link) if flight is not None else None
            if size is not None:
                return _known(digest, size, CacheWord.JOINED)
        client = self._clients[ask.upstream]
        proof = await self._permissions.prove_blob(ask, digest, client, named=link is not None)
        size = self._store.size_of(digest)
        if size is not None:
            return _known(digest, size, CacheWord.REVALIDATED)
        return _known(digest, proof.size, CacheWord.MISS)

    async def _link(self, ask: Ask, digest: Digest) -> Link | None:
        """The repository's link; a flight that is bringing the blob through it is as good."""
        link = await self._permissions.link(ask, digest)
        flight = self._flights.find(digest)
        if link is None and flight is not None and (ask.upstream, ask.repository) in flight.proved:
            return Link(flight.size)
        return link

    async def _prove(self, ask: Ask, digest: Digest) -> Link:
        return await self._permissions.prove_blob(ask, digest, self._clients[ask.upstream])

    def _needs_proof(self, ask: Ask, digest: Digest) -> bool:
        """Would this repository, without a link, get bytes that only others have shown to have?"""
        if self._store.size_of(digest) is not None:
            return True
        flight = self._flights.find(digest)
        return flight is not None and (ask.upstream, ask.repository) not in flight.sources

    async def _flown(
        self, ask: Ask, digest: Digest, link: Link | None, wanted: ByteRange | None
    ) -> BlobAnswer:
        if link is None:
            self._permissions.check(ask, str(digest))
        source = self._clients[ask.upstream].blob(ask.repository, digest)
        size = link.size if link else None
        reader, joined = self._flights.join(source, ask.client, size=size, named=link is not None)
        try:
            early = await self._started(ask, reader, link)
            return self._answer(ask, reader, link, wanted, joined=joined, early=early)
        except BaseException as error:
            reader.close()
            if isinstance(error, PullError):
                self._forget(ask, digest, link, error)
            raise

    async def _started(self, ask: Ask, reader: Reader, link: Link | None) -> str | None:
        """Wait for the first bytes until the header deadline; a warning if they have not come."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(ask.arrived + self._deadlines.header):
                await self._cleared(ask, reader, link)
        except TimeoutError:
            if ask.upstream in self._deadlines.spill:
                raise QueueTimeout(COME_AGAIN) from None
            return f"queued, {reader.ahead} ahead"
        finally:
            waited = loop.time() - ask.arrived
            ask.timing.queue = min(waited, reader.flight.ticket.waited)
            ask.timing.upstream = waited - ask.timing.queue
        return None

    async def _cleared(self, ask: Ask, reader: Reader, link: Link | None) -> None:
        """Wait for the flight's first bytes; they may have come through another repository."""
        await reader.started()
        if link is None and reader.source.key not in reader.flight.proved:
            await self._prove(ask, reader.flight.digest)

    def _answer(
        self,
        ask: Ask,
        reader: Reader,
        link: Link | None,
        wanted: ByteRange | None,
        *,
        joined: bool,
        early: str | None,
    ) -> BlobAnswer:
        size = _size(reader.flight, link)
        span = wanted.resolve(size) if wanted is not None and size is not None else None
        start, stop = (span.start, span.stop) if span else (0, size)
        return BlobAnswer(
            digest=reader.flight.digest,
            size=size,
            span=span,
            cache=CacheWord.JOINED if joined else CacheWord.MISS,
            pieces=self._bounded(ask, reader, link, start, stop),
            close=reader.close,
            warning=early,
        )

    async def _bounded(
        self, ask: Ask, reader: Reader, link: Link | None, start: int, stop: int | None
    ) -> AsyncGenerator[Piece, None]:
        """The reader's pieces; the first bytes come before the blob deadline or never."""
        try:
            async with asyncio.timeout_at(ask.arrived + self._deadlines.blob):
                await self._cleared(ask, reader, link)
        except TimeoutError:
            raise QueueTimeout(COME_AGAIN) from None
        pieces = reader.pieces(start, stop)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    def _forget(self, ask: Ask, digest: Digest, link: Link | None, error: PullError) -> None:
        """Remember a refusal, but never of a digest that a manifest names."""
        if link is None:
            self._permissions.remember(ask, str(digest), error)


def _size(flight: Flight, link: Link | None) -> int | None:
    """What the upstream says, else what a manifest says."""
    if flight.size is None and link is not None:
        return link.size
    return flight.size


def _known(digest: Digest, size: int | None, word: CacheWord) -> BlobAnswer:
    return BlobAnswer(digest, size, None, word, None, lambda: None)


def _stored(
    digest: Digest, lease: FileLease, wanted: ByteRange | None, word: CacheWord
) -> BlobAnswer:
    try:
        span = wanted.resolve(lease.size) if wanted is not None else None
    except BaseException:
        lease.close()
        raise
    part = span or Span(0, lease.size, lease.size)
    pieces = _spans(FileSpan(lease, part.start, part.stop))
    return BlobAnswer(digest, lease.size, span, word, pieces, lease.close)


async def _spans(span: FileSpan) -> AsyncGenerator[Piece, None]:
    if span.length:
        yield span
