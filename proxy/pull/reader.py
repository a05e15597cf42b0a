"""A reader: one client's way through a flight (DESIGN §4.5, D10, D14).

It hands out *pieces*: spans of the staging file, for sendfile, or bytes of a window or of a turn of
its own. What it does next depends on where it stands:

* bytes are at hand (before the mark, in the file or in the window; or beyond it, where a segment of
  the flight has brought them already): it hands them out
* it is ``far`` ahead of the mark and of any segment that holds its place, or has fallen out of the
  window: it takes a turn of its own
* else it waits for the flight's next step

A turn of its own is read into memory before the client gets a byte of it, so that a slow client
holds no slot; its size follows the client's pace. Only at an upstream without Range the turn lasts
as long as the client takes. Such bytes are not verified and not kept, and those of a segment beyond
the mark not yet. A reader that began at byte 0 never gets past the flight's mark by them, so the
last byte of a whole blob is always a verified one (D10); a range far ahead is its client's to
verify.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from proxy.oci.errors import PullError, QueueFull, SizeMismatch, UpstreamUnavailable
from proxy.pull.sources import PASSING, Row, Source, TurnBody
from proxy.store.blobs import FileLease
from proxy.upstream.turns import Ticket, class_for_blob

if TYPE_CHECKING:
    from proxy.pull.flight import Flight

T = TypeVar("T")

#: Bytes of the file that are handed out at once. A client that takes them as fast as they are sent
#: never makes its reader wait, and a turn of the loop in which eight had 32 MiB each took 92 ms.
SPAN = 2 << 20
#: Bytes of a reader's own turn: at first, and the bounds between which its client's pace moves it.
OWN_TURN_BYTES = 1 << 20
MIN_OWN_TURN = 256 << 10
MAX_OWN_TURN = 4 << 20
#: A client that takes longer than this for a turn's bytes gets smaller turns, in seconds.
SLOW_CLIENT = 1.0


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes ``start`` … ``stop`` of a file that ``lease`` keeps open."""

    lease: FileLease
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


Piece = FileSpan | bytes


class Reader:
    """One client following a flight, from ``join`` to ``close``.

    ``promise`` is the size its client was, or may be, told before the upstream answers. Whoever
    asks for pieces has seen to it that the reader's own repository has the blob: by a manifest, or
    because it is among ``flight.proved``, or by asking (D12). Here only its denial counts.
    """

    def __init__(self, flight: Flight, source: Source, client: str, promise: int | None) -> None:
        self.flight = flight
        self.source = source
        self.client = client
        self.promise = promise
        self.refusal: PullError | None = None  # why its own repository, or its promise, fails
        self.has_answered = False  # its client has its 200, though no byte has come
        self.position = 0
        self.stop: int | None = None
        self._own_bytes = OWN_TURN_BYTES
        self._retry = ""  # why its next own turn is another try
        self._in_turn = False  # has, or waits for, a slot of its own

    @property
    def ahead(self) -> int:
        """How many turns are granted before this one's, at most; told to the user."""
        return self.source.ahead

    def check_promise(self, size: int | None) -> None:
        """Refuse this reader if its client was promised another ``size`` than the real one."""
        if None not in (self.promise, size) and self.promise != size:
            self.refusal = self.refusal or SizeMismatch(self.promise or 0, size or 0)

    async def started(self) -> int | None:
        """Wait until the flight's bytes come; returns the size, ``None`` if nobody knows it.

        Raises the flight's error, or the refusal of this reader's repository.
        """
        while self.flight.is_waiting:
            self._check()
            await self.flight.changed()
        self._check()
        return self.flight.size

    def _check(self) -> None:
        error = self.refusal or self.flight.error
        if error is not None:
            # The error is everybody's: without this its traceback grows with every reader.
            raise error.with_traceback(None)

    async def pieces(self, start: int, stop: int | None) -> AsyncGenerator[Piece, None]:
        """The bytes from ``start`` to ``stop`` (``None``: the end), as they can be had.

        A piece counts as sent when the next one is asked for. Raises what ``started`` raises, and
        ``SizeMismatch`` when the blob ends before ``stop``.
        """
        self.position, self.stop = start, stop
        self.flight.reader_moved()
        await self.started()
        while stop is None or self.position < stop:
            self._check()
            piece = self._at_hand()
            if piece is not None:
                yield piece
                length = piece.length if isinstance(piece, FileSpan) else len(piece)
                self._went_on(length)
                if length == SPAN:
                    await self.flight.let_others_go()
            elif self._has_all():
                return
            elif self.goes_alone:
                async with contextlib.aclosing(self._alone()) as own:
                    async for data in own:
                        yield data
                        self._went_on(len(data))
            else:
                await self.flight.changed(beyond=self.position > self.flight.mark)

    def _went_on(self, length: int) -> None:
        """What was yielded has been sent: only now may a window give it up."""
        self.position += length
        self.flight.reader_moved()

    def _at_hand(self) -> Piece | None:
        """The next bytes that need no waiting."""
        mark = self.flight.mark
        limit = mark if self.stop is None else min(self.stop, mark)
        if self.position < limit:
            return self.flight.intake.piece(self.position, min(limit, self.position + SPAN))
        end = self._end
        if end is None or self.position <= mark:
            return None  # also of what has come but is not hashed: it may be the last (D10)
        return self.flight.ahead(self.position, min(end, self.position + SPAN))

    def _has_all(self) -> bool:
        """Is the blob verified and this its end? Raises ``SizeMismatch`` if more was promised."""
        if not self.flight.is_verified or self.position < self.flight.mark:
            return False
        if self.stop is not None:
            raise SizeMismatch(self.stop, self.flight.mark)
        return True

    # -- turns of its own ------------------------------------------------------------------

    @property
    def is_far(self) -> bool:
        """Is it so far ahead of what will bring its bytes that it does not wait for the flight?"""
        end, flight = self._end, self.flight
        if end is None or self.position >= end:
            return False
        return self.position - flight.front(self.position) > flight.settings.far

    @property
    def _end(self) -> int | None:
        """Where its bytes end, as far as anybody knows."""
        known = [end for end in (self.stop, self.flight.size) if end is not None]
        return min(known, default=None)

    @property
    def goes_alone(self) -> bool:
        """Does it need turns of its own where it stands?"""
        if self.position < self.flight.mark:
            return self.flight.intake.has_lost(self.position)
        return self.is_far

    @property
    def wants_more(self) -> bool:
        """Does it need the flight to go beyond its mark?"""
        if self.refusal is not None or self.is_far:
            return False
        return self.stop is None or self.stop > self.flight.mark

    @property
    def needs_slot(self) -> bool:
        """Does it wait for a turn of its own, or will it as soon as it goes on?"""
        return self._in_turn or self.goes_alone

    def _own_end(self) -> int:
        """Where turns of its own end: far ahead at its end, behind at the mark."""
        if self.is_far and self._end is not None:
            return self._end
        mark = self.flight.mark
        return mark if self.stop is None else min(self.stop, mark)

    async def _alone(self) -> AsyncGenerator[bytes, None]:
        """One turn of its own, asked for again while nothing comes, as a flight does (D8)."""
        row, settings = Row(), self.flight.settings
        while self.goes_alone:
            before = self.position
            try:
                async with contextlib.aclosing(self._own_turn()) as turn:
                    async for data in turn:
                        yield data
                if self.position > before:
                    self._retry = ""
                    return
                raise UpstreamUnavailable(f"{self.source.key[0]}: an answer without a byte")
            except PullError as error:
                if not isinstance(error, (*PASSING, QueueFull)):
                    raise
                row = Row() if self.position > before else row
                row.count(error, settings.clock(), has_begun=True)
                if row.is_over(settings.clock(), has_begun=True):
                    raise
                self._retry = error.retried_as
                await asyncio.sleep(settings.pause_after(row.tries, error))
            self._check()

    async def _own_turn(self) -> AsyncGenerator[bytes, None]:
        length = min(self._own_bytes, self._own_end() - self.position)
        ticket = Ticket(class_for_blob(length), [self.client], image=self.source.key)
        ticket.retry = self._retry
        held: list[bytes] = []
        self._in_turn = True
        self.flight.reader_moved()
        try:
            async with self.source.open(self.position, length, ticket) as body:
                self._check_size(body)
                if self.source.ranged:
                    held = await _read(body, length)
                else:
                    async with contextlib.aclosing(self._through(body)) as pieces:
                        async for data in pieces:
                            yield data
        finally:
            self._in_turn = False
        began = asyncio.get_running_loop().time()
        for data in held:  # the slot has gone back before the client is served
            yield data
        took = asyncio.get_running_loop().time() - began
        self._own_bytes = next_own_turn(self._own_bytes, took)

    async def _through(self, body: TurnBody) -> AsyncGenerator[bytes, None]:
        """A body without Range, to the end: every further turn would be the whole of it again."""
        while self.position < self._own_end() and (data := await body.read()):
            # Its end may move on while the client takes a piece, so cut piece by piece.
            while data and (room := self._own_end() - self.position) > 0:
                yield data[:room]
                data = data[room:]

    def _check_size(self, body: TurnBody) -> None:
        size = self.flight.size
        if body.total is not None and size is not None and body.total != size:
            raise SizeMismatch(size, body.total)

    def close(self) -> None:
        """Leave the flight. Idempotent. No piece may be used after this."""
        self.flight.leave(self)

    def give_up(self) -> None:
        """The same for one whose client goes elsewhere: a flight that has nothing yet, and nobody
        else, leaves the queue."""
        self.flight.leave(self, for_good=True)

    def __repr__(self) -> str:
        return f"<Reader of {self.flight.digest} at {self.position} for {self.client}>"


def next_own_turn(length: int, seconds: float) -> int:
    """Bytes of a client's next turn, after it took ``seconds`` for the ``length`` of the last one:
    it is held in memory while the client takes it."""
    if seconds > SLOW_CLIENT:
        return max(MIN_OWN_TURN, length // 2)
    return min(MAX_OWN_TURN, length * 2)


async def _read(body: TurnBody, length: int) -> list[bytes]:
    """``length`` bytes of a body, or those that came before it broke; raises if none did."""
    held: list[bytes] = []
    try:
        while length > 0 and (data := await body.read()):
            held.append(data[:length])
            length -= len(data)
    except PASSING:
        if not held:
            raise
    return held


class Crowd:
    """The readers of a flight, as its fill sees them."""

    def __init__(self) -> None:
        self._readers: dict[Reader, None] = {}
        self._clients: Counter[str] = Counter()
        self._promises: Counter[int | None] = Counter()
        self._last: int | None = None  # what the last one to leave was promised

    def __len__(self) -> int:
        return len(self._readers)

    def __iter__(self) -> Iterator[Reader]:
        return iter(self._readers)

    def __contains__(self, reader: object) -> bool:
        return reader in self._readers

    def add(self, reader: Reader) -> None:
        self._readers[reader] = None
        self._clients[reader.client] += 1
        self._promises[reader.promise] += 1

    def discard(self, reader: Reader) -> bool:
        """Forget ``reader``; whether its client has no other one here."""
        del self._readers[reader]
        self._last = reader.promise
        _take_one(self._promises, reader.promise)
        return _take_one(self._clients, reader.client)

    @property
    def promise(self) -> int | None:
        """The size that somebody was promised, if anybody was."""
        return next((size for size in self._promises if size is not None), None)

    @property
    def has_answered(self) -> bool:
        """Has a client its 200 already, though no byte has come?"""
        return any(reader.has_answered for reader in self._readers)

    def settle(self, size: int) -> None:
        """The blob has ``size`` bytes: refuse those who were promised something else.

        Raises ``SizeMismatch``, and refuses nobody, when that would be all of them.
        """
        if self._promises and not self._promises.keys() & {None, size}:
            raise SizeMismatch(self.promise or 0, size)
        for reader in self._readers:
            reader.check_promise(size)

    def expect(self, received: int) -> None:
        """So many bytes have come, and nobody knows the size: refuse those who were promised less.

        Without this their clients would have all they were promised before the digest is known.
        Raises ``SizeMismatch``, and refuses nobody, when that would be all of them.
        """
        promises = self._promises.keys() or {self._last}
        short = [size for size in promises if size is not None and size < received]
        if len(short) == len(promises):
            raise SizeMismatch(max(short), received)
        for reader in self._readers if short else ():
            if reader.promise in short:
                reader.check_promise(received)

    def refuse(self, source: Source, error: PullError) -> None:
        """Refuse those who came through ``source``."""
        for reader in self._readers:
            if reader.source.key == source.key:
                reader.refusal = error

    def fastest(self) -> int | None:
        """Where the foremost of those is who need bytes beyond the mark; None: nobody does."""
        return max((r.position for r in self._readers if r.wants_more), default=None)

    def can_go_on(self) -> bool:
        """Will one who needs bytes beyond the mark come closer without a turn of its own?"""
        return any(r.wants_more and not r.needs_slot for r in self._readers)


def _take_one(counter: Counter[T], key: T) -> bool:
    """Count one less of ``key``; whether it was the last."""
    counter[key] -= 1
    if counter[key]:
        return False
    del counter[key]
    return True
