"""Taking stripes from other nodes: verified, bounded, and left at once when it does not go on.

Theory of operation. A *transfer* is one stripe of one giver, or the rest of one:

* asked: a connection to the giver (sockets.py), and the request, with its seal if nodes share a
  secret. An idle connection that its giver has closed meanwhile is replaced by a fresh one, once.
* checked: the head of the answer has the seal, the status and the length that it must have, and
  digests of pieces that make up the stripe's hash. Redirects are refusals like any other.
* received: each piece is handed out when it is complete and its digest is right, hashed in a
  thread while the next one comes. The taker may pass it on from then on.
* ended: complete, and the connection is kept; or not, and its socket is aborted (D1): the giver
  failed, lied or was busy, or the taker has left, by whatever way it leaves.

``PeerFailed``, ``PeerBusy`` and ``PeerLied`` are the ways in which a giver does not give; what to
make of them is the caller's. ``PeerLied`` means that a giver which has proved to be one of ours
sent what no honest one sends; what is no answer, or has no right seal, may be anybody's: it failed.

Where there is a cap on bytes received, each piece is taken out of it before it is waited for, all
of it at once: what has come then is passed on at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from proxy.fleet.answer import Head
from proxy.fleet.claims import Grant
from proxy.fleet.connection import Connection, Lost
from proxy.fleet.pieces import PIECE, Pieces, piece_digest
from proxy.fleet.protocol import PIECES, RANK, SEAL, STRIPE, StripeAsk, read_pieces
from proxy.fleet.seal import Seal, Sealer, Unsealed, answer_said, request_said
from proxy.fleet.sockets import Place, Sockets
from proxy.fleet.traffic import ALTOGETHER
from proxy.observe.peers import PeerMetrics
from proxy.oci.digest import Chunk
from proxy.oci.errors import PeerBusy, PeerFailed, PeerLied
from proxy.oci.ranges import Span, parse_content_range
from proxy.throttle import Stream, Throttle

#: Seconds that a giver gets for a connection, for a head, and for each bit of progress.
PATIENCE = 5.0
#: Where the downlink is slow, so many times as long as a piece takes when all comes at once that
#: may. Whoever passes a stripe on sends nothing while its own next piece comes. With 5 s for each,
#: 24 nodes with lines of 0.75 MB/s gave up 321 transfers that went on, 1,925 more failed behind
#: those, and for 1,975 stripes they asked 4,221 times; with 13 s it was 1,996 times for 1,978.
PIECE_TIMES = 3.0
MOST_PATIENCE = 30.0
#: Bytes that come ahead of those that are verified.
AHEAD = 1 << 20
#: Sockets to one giver, at most: for as many stripes as it may be asked for of a few blobs at once.
#: With fewer, one that waits for a stripe which has not come to its giver holds up those that have.
SOCKETS = 16
#: Idle sockets in all, at most, and the seconds that one is kept.
IDLE = 64
IDLE_SECONDS = 30.0
#: Bytes of a refusal that are read to keep its connection.
REFUSAL = 4 << 10
#: Seconds that a busy giver may ask us to stay away for.
LONGEST_PAUSE = 60.0

_SECONDS = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a grant stands for: a stripe of ``length`` bytes with this hash (None: nobody knows it),
    from ``start`` on."""

    length: int
    stripe_hash: bytes | None
    start: int = 0


def patience_of(downlink: Throttle | None) -> float:
    """Seconds for each bit of progress, of a node with this downlink."""
    if downlink is None:
        return PATIENCE
    pieces = PIECE_TIMES * ALTOGETHER * PIECE / downlink.rate
    return max(PATIENCE, min(MOST_PATIENCE, pieces))


class Transfer:
    """One stripe on its way; asynchronously iterable: its pieces, each in the chunks it came in."""

    def __init__(
        self, connection: Connection, pieces: Pieces, start: int, stream: Stream | None
    ) -> None:
        self.pieces = pieces  # the digests of all of them, for those to whom it is passed on
        self.position = start  # in the stripe: what is before has been handed out
        self._connection = connection
        self._spans = pieces.spans(start)
        self._stream = stream

    @property
    def is_complete(self) -> bool:
        """Has all of it been handed out?"""
        return self.position == self.pieces.length

    def __aiter__(self) -> Transfer:
        return self

    async def __anext__(self) -> Sequence[Chunk]:
        """The next piece. Raises ``PeerFailed`` and ``PeerLied``."""
        span = next(self._spans, None)
        if span is None:
            raise StopAsyncIteration
        start, stop = span
        if self._stream is not None:
            await self._stream.take(stop - start)
        chunks = await self._connection.gather(stop - start)
        actual = await asyncio.get_running_loop().run_in_executor(None, piece_digest, chunks)
        if actual != self.pieces.digest(start // PIECE):
            raise PeerLied(f"the piece at byte {start} is not the one that it announced")
        self.position = stop
        return chunks

    def __repr__(self) -> str:
        return f"<Transfer {self.position} of {self.pieces!r}>"


class Peers:
    """Asks other nodes for stripes."""

    def __init__(
        self,
        *,
        metrics: PeerMetrics,
        sealer: Sealer | None = None,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        downlink: Throttle | None = None,
        patience: float | None = None,
        sockets: int = SOCKETS,
        idle: int = IDLE,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """``tls`` gives the context to dial with, which shows our certificate, if nodes speak TLS.
        Without it and without ``sealer`` only givers on this machine are asked. ``patience`` in
        seconds; None: as the downlink has it."""
        self._metrics = metrics
        self._sealer = sealer
        self._downlink = downlink
        self._sockets = Sockets(
            tls=tls,
            is_local=sealer is None and tls() is None,
            most=sockets,
            idle_most=idle,
            idle_seconds=idle_seconds,
            patience=PATIENCE if patience is None else patience,
            progress=patience_of(downlink) if patience is None else patience,
            ahead=AHEAD,
        )

    def __len__(self) -> int:
        """Sockets to givers that are not closed on our side."""
        return len(self._sockets)

    @property
    def idle(self) -> int:
        """Of these, those that no transfer uses."""
        return self._sockets.idle

    @property
    def held(self) -> int:
        """Bytes that have come and were not handed out yet."""
        return self._sockets.held

    @property
    def waiting(self) -> int:
        """Transfers that wait for a socket to their giver."""
        return self._sockets.waiting

    @contextlib.asynccontextmanager
    async def taking(self, grant: Grant, wanted: Wanted) -> AsyncIterator[Transfer]:
        """A transfer of what is granted, until the block ends.

        Raises ``PeerFailed``, ``PeerBusy`` and ``PeerLied``, as do the pieces.
        """
        outcome = "left"
        try:
            ask = StripeAsk(
                grant.digest, grant.stripe, grant.rank, wanted.start, wanted.stripe_hash
            )
            place = Place.of(grant.giver.url)
            async with self._answered(place, grant.giver.node, ask) as (connection, head, seal):
                pieces = await self._checked(connection, head, seal, wanted)
                stream = None if self._downlink is None else self._downlink.stream(prompt=False)
                transfer = Transfer(connection, pieces, wanted.start, stream)
                yield transfer
                if transfer.is_complete:
                    outcome = "done"
        except PeerFailed as error:
            outcome = error.outcome
            raise
        finally:
            self._metrics.takes.labels(outcome).inc()

    @contextlib.asynccontextmanager
    async def _answered(
        self, place: Place, node: str, ask: StripeAsk
    ) -> AsyncIterator[tuple[Connection, Head, Seal | None]]:
        """A connection on which the head of the answer has come, until the block ends."""
        fresh = False
        while True:
            berth, connection = await self._sockets.take(place, fresh=fresh)
            before = connection.received
            try:
                is_first = connection.asked == 0
                try:
                    seal, request = self._request(place, node, ask)
                    head = await connection.ask(request)
                except Lost as error:
                    if is_first:
                        raise PeerFailed(str(error)) from error
                    fresh = True  # the giver had closed it: on another one, a nonce of its own
                    continue
                yield connection, head, seal
                return
            except PeerLied:
                connection.spoil()
                raise
            finally:
                # A refusal that was read to its end leaves it to the next request; what was not
                # read to its end, for whatever reason, aborts it.
                self._metrics.bytes.labels("received").inc(connection.received - before)
                self._sockets.give(place, berth)

    def _request(self, place: Place, node: str, ask: StripeAsk) -> tuple[Seal | None, bytes]:
        rank = str(ask.rank)
        lines = [f"GET {ask.path} HTTP/1.1", f"Host: {place}", f"{RANK}: {rank}"]
        told = None if ask.stripe_hash is None else ask.stripe_hash.hex()
        if told is not None:
            lines.append(f"{STRIPE}: {told}")
        if ask.range is not None:
            lines.append(f"Range: {ask.range}")
        seal = None
        if self._sealer is not None:
            seal = self._sealer.seal(node, request_said("GET", ask.path, rank, ask.range, told))
            lines.append(f"{SEAL}: {seal}")
        return seal, "\r\n".join([*lines, "", ""]).encode("ascii")

    async def _checked(
        self, connection: Connection, head: Head, seal: Seal | None, wanted: Wanted
    ) -> Pieces:
        """The digests of the stripe's pieces, if it is what is wanted."""
        self._check_seal(connection, head, seal)
        if head.status != (206 if wanted.start else 200):
            await self._refused(connection, head)
        if head.length != wanted.length - wanted.start:
            raise PeerLied(f"it has {head.length} bytes to send of {wanted}")
        if wanted.start:
            span = parse_content_range(head.get("Content-Range"))
            right = Span(wanted.start, wanted.length, wanted.length)
            if span != right:
                raise PeerLied(f"it sends another range than that from byte {wanted.start}")
        try:
            pieces = read_pieces(head.get(PIECES) or "", wanted.length)
        except ValueError as error:
            raise PeerLied(str(error)) from error
        if wanted.stripe_hash not in (None, pieces.stripe_hash):
            raise PeerLied("the digests of its pieces do not make up the stripe's hash")
        return pieces

    def _check_seal(self, connection: Connection, head: Head, seal: Seal | None) -> None:
        if self._sealer is None or seal is None:
            return
        said = answer_said(
            head.status,
            length=head.get("Content-Length"),
            content_range=head.get("Content-Range"),
            pieces=head.get(PIECES),
            retry_after=head.get("Retry-After"),
        )
        try:
            self._sealer.check_answer(seal, head.get(SEAL), said)
        except Unsealed as error:
            connection.spoil()
            raise PeerFailed(f"{error} (its status is {head.status})") from error

    async def _refused(self, connection: Connection, head: Head) -> None:
        """Raise what a refusal means; a short one leaves its connection to the next request."""
        if head.length > REFUSAL:
            connection.spoil()
        else:
            await connection.gather(head.length)
        if head.status in (429, 503):
            after = head.get("Retry-After") or ""
            pause = float(after) if _SECONDS.fullmatch(after) else 1.0
            raise PeerBusy(answered=head.status, retry_after=min(pause, LONGEST_PAUSE))
        raise PeerFailed(f"it answered {head.status}", answered=head.status)

    async def close(self) -> None:
        """Abort every socket; no transfer begins any more."""
        await self._sockets.close()

    def __repr__(self) -> str:
        return f"<Peers {self._sockets!r}>"
