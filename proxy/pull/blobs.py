"""Blobs: from the store, from the flight that is bringing them, or from a flight of their own.

The policy of one blob request (DESIGN §4, D7, D12), in the order of its questions: may this
repository have it, do we hold it, is it on its way, else fetch it. The answer's headers go out when
the flight's first bytes come, or at ``header_deadline`` without them: nobody waits in silence. The
one thing that is never answered early is a blob whose permission is still being proved.

Who was answered early and has no byte by ``blob_deadline`` is let go by FIN: a body that may be
asked for again. What clients do then, tried with an answer of no byte at all: containerd 1.6 asks
again at once, three times; dockerd 20.10 five times, after 5, 10, … 25 s, and then docker.io;
podman 4.3 and skopeo 1.9 give the pull up. For those who come back the place in the queue is kept
for ``KEEP_PLACE``: they join the same flight, whose ticket stands where it stood, and have lost
nothing by the deadline. The others have no clock of their own that would have to be met, so for
them there is no deadline: they wait until their turn comes.

Stored blobs of at most ``SMALL`` bytes (the configurations of images, most of all) are answered out
of memory, where as many as ``memory`` bytes of them are kept: to open a file and hand it to the
kernel costs more than they are worth.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from cachetools import LRUCache

from proxy.oci.digest import Digest
from proxy.oci.errors import PullError
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange, Span
from proxy.pull.asks import Ask, BlobAnswer, CacheWord
from proxy.pull.deadlines import Waits
from proxy.pull.flight import Flight, Flights
from proxy.pull.permissions import Permissions
from proxy.pull.reader import FileSpan, Piece, Reader
from proxy.store.blobs import FileLease
from proxy.store.store import Link, Store
from proxy.upstream.mirrored import MirroredClient

#: Seconds that a place is kept for a client whose body was let go without a byte: dockerd comes
#: back after 25 s at the latest.
KEEP_PLACE = 30.0
#: Bytes of a blob that is kept in memory, at most.
SMALL = 64 << 10


@dataclass(frozen=True, slots=True)
class _Missing:
    """A blob that is not held but may be asked for; ``link``: it is known to be there."""

    link: Link | None


class Blobs:
    """Answers for blobs, of all upstreams."""

    def __init__(
        self,
        *,
        store: Store,
        flights: Flights,
        clients: Mapping[str, MirroredClient],
        permissions: Permissions,
        waits: Waits,
        memory: int = 0,
    ) -> None:
        """``memory`` is how many bytes of small blobs are kept in memory."""
        self._store = store
        self._flights = flights
        self._clients = clients
        self._permissions = permissions
        self._waits = waits
        self._places: set[asyncio.Task[None]] = set()
        # Behind the store: what it does not hold is not answered from here.
        self._memory: LRUCache[Digest, bytes] = LRUCache(memory, getsizeof=len)

    async def answer(self, ask: Ask, digest: Digest, wanted: ByteRange | None) -> BlobAnswer:
        """A GET. Raises ``PullError``; else the caller owns the answer and must close it."""
        found: BlobAnswer | _Missing | None = self._missing(ask, digest)
        if found is None:
            found = await self._waits.proof(ask, self._found(ask, digest, wanted))
        # From its look into the store to join() nothing suspends: no fill lands or begins unseen.
        if isinstance(found, _Missing):
            return await self._flown(ask, digest, found.link, wanted)
        return found

    def _missing(self, ask: Ask, digest: Digest) -> _Missing | None:
        """What ``_found`` would give, if memory alone says that the blob is not held and may be
        asked for: then a crowd has nothing to wait for, and each of it no time-out."""
        if self._store.size_of(digest) is not None:
            return None
        is_known, link = self._store.link_in_memory(ask.upstream, ask.repository, digest)
        link = self._or_proved(ask, digest, link)
        if not is_known or (link is None and self._needs_proof(ask, digest)):
            return None
        return _Missing(link)

    async def _found(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None
    ) -> BlobAnswer | _Missing:
        """The blob from the store, if it is held and this repository may have it."""
        word = CacheWord.HIT
        while True:
            link = await self._link(ask, digest)
            if link is None and self._needs_proof(ask, digest):
                link = await self._prove(ask, digest)
                word = CacheWord.REVALIDATED
            if link is not None and (data := await self._small(digest)) is not None:
                self._store.touch(digest)
                return from_memory(digest, data, wanted, word)
            if link is not None and self._store.size_of(digest) is not None:
                lease = await self._store.lease(digest)
                if lease is not None:
                    self._store.touch(digest)
                    return stored(digest, lease, wanted, word)
            if link is not None or not self._needs_proof(ask, digest):
                return _Missing(link)

    async def _small(self, digest: Digest) -> bytes | None:
        """A small blob that is held, from memory or store; None for all others."""
        size = self._store.size_of(digest)
        if size is None or size > min(SMALL, self._memory.maxsize):
            return None
        data = self._memory.get(digest)
        if data is None and (data := await self._store.read(digest)) is not None:
            self._memory[digest] = data
        return data

    def in_memory(self, digest: Digest) -> bytes | None:
        """A small blob, if it needs no look into the store."""
        return self._memory.get(digest)

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
        """The repository's link, or what is as good."""
        return self._or_proved(ask, digest, await self._permissions.link(ask, digest))

    def _or_proved(self, ask: Ask, digest: Digest, link: Link | None) -> Link | None:
        """A flight that is bringing the blob through the repository is as good as a link."""
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
            self._permissions.check(ask, Kind.BLOB, str(digest))
        flight = self._flights.find(digest)
        source = None if flight is None else flight.sources.find((ask.upstream, ask.repository))
        if source is None:
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
            if self._is_clear(reader, link):
                await reader.started()  # does not wait
            else:
                async with self._waits.headers(ask):
                    await self._cleared(ask, reader, link)
        except TimeoutError:
            if self._waits_for_proof(reader, link):
                raise self._waits.late_proof(ask) from None
            if self._waits.spills(ask.upstream):
                error = self._waits.late_blob(ask, reader.flight.ticket)
                reader.give_up()
                raise error from None
            reader.has_answered = True
            return f"queued, {reader.ahead} ahead"
        finally:
            waited = loop.time() - ask.arrived
            ask.timing.queue = min(waited, reader.flight.ticket.waited)
            ask.timing.upstream = waited - ask.timing.queue
        return None

    async def _cleared(self, ask: Ask, reader: Reader, link: Link | None) -> None:
        """Wait for the flight's first bytes; they may have come through another repository."""
        await reader.started()
        if self._waits_for_proof(reader, link):
            await self._prove(ask, reader.flight.digest)

    @staticmethod
    def _waits_for_proof(reader: Reader, link: Link | None) -> bool:
        """Have bytes come, but only through others?"""
        flight = reader.flight
        return link is None and not flight.is_waiting and reader.source.key not in flight.proved

    def _is_clear(self, reader: Reader, link: Link | None) -> bool:
        """Have bytes come that it may have? Then it need not wait for anything."""
        return not reader.flight.is_waiting and not self._waits_for_proof(reader, link)

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
        flight = reader.flight
        is_clear = self._is_clear(reader, link)
        pieces = reader.pieces(start, stop)
        return BlobAnswer(
            digest=flight.digest,
            size=size,
            span=span,
            cache=_word(flight, joined=joined),
            pieces=pieces if is_clear else self._bounded(ask, reader, link, pieces),
            close=reader.close,
            warning=early,
            is_at_hand=is_clear and start < flight.mark and not flight.intake.has_lost(start),
        )

    async def _bounded(
        self, ask: Ask, reader: Reader, link: Link | None, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[Piece, None]:
        """The reader's pieces; the first bytes come before the blob deadline or never."""
        try:
            async with self._waits.first_byte(ask):
                await self._cleared(ask, reader, link)
        except TimeoutError:
            self._keep_place(reader)
            raise self._waits.late_blob(ask, reader.flight.ticket) from None
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    def _keep_place(self, reader: Reader) -> None:
        """Let another reader stand where this one stood, for when its client comes back."""
        flight = reader.flight
        if not flight.is_waiting:
            return
        place = flight.join(reader.source, reader.client, size=reader.promise, named=False)
        task = asyncio.create_task(_hold(place), name=f"place {flight.digest}")
        self._places.add(task)
        # Not in the task: it may be cancelled before its first step.
        task.add_done_callback(lambda _: place.close())
        task.add_done_callback(self._places.discard)

    async def close(self) -> None:
        """Keep no place any more."""
        for task in self._places:
            task.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)

    def _forget(self, ask: Ask, digest: Digest, link: Link | None, error: PullError) -> None:
        """Remember a refusal, but never of a digest that a manifest names."""
        if link is None:
            self._permissions.remember(ask, Kind.BLOB, str(digest), error)


async def _hold(place: Reader) -> None:
    """Stand in line until bytes come, but not for ever."""
    with contextlib.suppress(TimeoutError, PullError):
        async with asyncio.timeout(KEEP_PLACE):
            await place.started()


def _word(flight: Flight, *, joined: bool) -> CacheWord:
    """What brings the blob, as far as that is known when the answer begins."""
    if joined:
        return CacheWord.JOINED
    is_of_peers = flight.sharing is not None and flight.sharing.is_of_peers
    return CacheWord.PEER if is_of_peers else CacheWord.MISS


def _size(flight: Flight, link: Link | None) -> int | None:
    """What the upstream says, else what a manifest says."""
    if flight.size is None and link is not None:
        return link.size
    return flight.size


def _known(digest: Digest, size: int | None, word: CacheWord) -> BlobAnswer:
    return BlobAnswer(digest, size, None, word, None, lambda: None)


def stored(
    digest: Digest, lease: FileLease, wanted: ByteRange | None, word: CacheWord
) -> BlobAnswer:
    """The answer from a file, which it closes. Raises ``RangeNotSatisfiable``."""
    try:
        span = wanted.resolve(lease.size) if wanted is not None else None
    except BaseException:
        lease.close()
        raise
    part = span or Span(0, lease.size, lease.size)
    pieces = _spans(FileSpan(lease, part.start, part.stop))
    return BlobAnswer(digest, lease.size, span, word, pieces, lease.close)


def from_memory(
    digest: Digest, data: bytes, wanted: ByteRange | None, word: CacheWord
) -> BlobAnswer:
    """The answer from all bytes of a blob. Raises ``RangeNotSatisfiable``."""
    span = wanted.resolve(len(data)) if wanted is not None else None
    part = data if span is None else data[span.start : span.stop]
    pieces = _bytes(part)
    return BlobAnswer(digest, len(data), span, word, pieces, lambda: None, is_at_hand=True)


async def _bytes(data: bytes) -> AsyncGenerator[Piece, None]:
    if data:
        yield data


async def _spans(span: FileSpan) -> AsyncGenerator[Piece, None]:
    if span.length:
        yield span
