"""A reader: one client's way through a flight (DESIGN §4.5, D10, D14).

It hands out *pieces*: spans of the staging file, for sendfile, or bytes of a window or of a turn of
its own. It never waits for anything but the flight's next step, and holds no slot while its client
is slow.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.oci.errors import PullError
from proxy.store.blobs import FileLease
from proxy.upstream.blob import BlobSource
from proxy.upstream.turns import Ticket, class_for_blob

if TYPE_CHECKING:
    from proxy.pull.flight import Flight

#: Bytes of a reader's own turn: read into memory before the client gets them.
OWN_TURN_BYTES = 4 << 20


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
    """One client following a flight, from ``open`` to ``close``."""

    def __init__(self, flight: Flight, source: BlobSource, client: str) -> None:
        self.flight = flight
        self.source = source
        self.client = client
        self.refusal: PullError | None = None
        self.position = 0
        self._lease: FileLease | None = None

    @property
    def ahead(self) -> int:
        """How many turns are granted before this one's, at most; told to the user."""
        return self.source.ahead

    async def started(self) -> int | None:
        """Wait until the flight's bytes come; returns the size, ``None`` if nobody knows it."""
        while self.flight.is_waiting:
            self._check()
            await self.flight.changed()
        self._check()
        return self.flight.size

    def _check(self) -> None:
        error = self.refusal or self.flight.error
        if error is not None:
            raise error

    async def pieces(self, start: int, stop: int | None) -> AsyncGenerator[Piece, None]:
        """The bytes from ``start`` to ``stop`` (``None``: the end), as they can be had.

        Raises the flight's error, or the refusal of this reader's source.
        """
        self.position = start
        await self.started()
        while stop is None or self.position < stop:
            self._check()
            piece = self._at_hand(stop)
            if piece is not None:
                yield piece
                self._went_on(piece.length if isinstance(piece, FileSpan) else len(piece))
            elif self.flight.is_verified and stop is None and self.position >= self.flight.mark:
                return
            elif self._needs_own_turn():
                async with contextlib.aclosing(self._own_turn(stop)) as own:
                    async for data in own:
                        yield data
                        self._went_on(len(data))
            else:
                await self.flight.changed()

    def _went_on(self, length: int) -> None:
        """What was yielded has been sent: only now may a window give it up."""
        self.position += length
        self.flight.reader_moved()

    def _at_hand(self, stop: int | None) -> Piece | None:
        """The next bytes that need no waiting."""
        flight, position = self.flight, self.position
        limit = flight.mark if stop is None else min(stop, flight.mark)
        if position >= limit:
            return None
        on_file = flight.staging.mark if flight.staging is not None else 0
        if position < on_file:
            return FileSpan(self._file(), position, min(limit, on_file))
        if flight.window is not None and flight.window.holds(position):
            return flight.window.piece(position)[: limit - position]
        return None

    def _file(self) -> FileLease:
        if self._lease is None:
            assert self.flight.staging is not None
            self._lease = self.flight.staging.lease()
        return self._lease

    def _needs_own_turn(self) -> bool:
        flight = self.flight
        if self.position - flight.mark > flight.settings.far:
            return True
        return flight.window is not None and self.position < flight.window.start

    async def _own_turn(self, stop: int | None) -> AsyncGenerator[bytes, None]:
        """One turn for this reader alone. Its bytes are not kept (they are not verified)."""
        length = OWN_TURN_BYTES if stop is None else min(OWN_TURN_BYTES, stop - self.position)
        if self.flight.size is not None:
            length = min(length, self.flight.size - self.position)
        ticket = Ticket(class_for_blob(length), [self.client])
        held: list[bytes] = []
        async with self.source.open(self.position, length, ticket) as body:
            while data := await body.read():
                if self.source.ranged:
                    held.append(data)
                    continue
                # Without Range the turn is the whole body; it ends when the reader has its part.
                yield data[:length]
                length -= len(data)
                if length <= 0:
                    return
        for data in held:  # the slot has gone back before the client is served
            yield data

    def close(self) -> None:
        """Leave the flight and give the file back. Idempotent."""
        self.flight.leave(self)
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def __repr__(self) -> str:
        return f"<Reader of {self.flight.digest} at {self.position} for {self.client}>"
