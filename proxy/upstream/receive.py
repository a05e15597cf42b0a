"""Receiving a large body past aiohttp: from the socket straight into a ring (DESIGN D1, D17).

Theory of operation
-------------------
aiohttp's client reads the head of an answer, and all of most bodies. For a large one that says its
length, its way costs more than the body's journey through the kernel: a fresh ``bytes`` per read, a
parser over it, a slice, a queue, a timer. So when aiohttp has handed out what it had, the transport
gets another protocol, a ``BodyReceiver``: it gives the loop a piece of a ``Ring`` to receive into,
counts down the length, and lends the bytes where they lie.

* *attached*: aiohttp's ``ResponseHandler`` is the transport's protocol, has no bytes of this body
  that were not read, and is not paused. Then, in one step that does not suspend (``detached``),
  its parser goes (it would count on in this body; each request makes a new one), its timer goes
  (``watch.py`` minds silence), and the receiver is the transport's protocol.
* *detached*: the receiver offers no more room than the body has bytes to come, so bytes that follow
  stay in the kernel, where the lane finds them before the next request. A TLS layer may hold them
  already and hand them over: then they are *surplus*, and the connection is not used again. Some
  do so only in the loop's next turn, so there the body is *settled* a turn after its last byte.
* *handed back*, when all bytes are there and settled: the handler is the protocol again, the body's
  stream is told of its end, and aiohttp returns the connection to the lane. Bytes that come now
  make the handler unfit (``should_close``), as on any idle connection.
* *lost*: the connection is, before that. The handler is told, as if it had been there; whoever
  reads gets the bytes that came, and then the error.
* *left*: the turn ends before the body does. Its lane aborts the transport as ever. The ring is not
  used again: nothing says when the last write to it was.

Bytes are *gathered*: who waits is woken when ``GATHER`` bytes have come, or ``GATHER_SECONDS``
after it began to wait, or at the first byte of all. Every piece costs a way to a thread and back,
which for pieces as small as a socket gives them is more than all the rest. Readers are told about
progress in such steps anyway (``pull/progress.py``).

What was borrowed is taken in by a thread, which may go on with what has come meanwhile (``more``).
Loop and thread each move their own count of the ring then, and see of the other's at worst an older
value, by which there is less to read, or less room, than there is. Whoever calls ``more`` lets the
loop know, which then lets more come (``resume``).

Back-pressure: at ``ahead`` bytes that the consumer has not taken, reading is paused. aiofastnet's
TLS must not be paused while its own buffer holds a part of what came (see ``proxy/loop.py``), which
is so when it has filled all the room it was offered. Then it is offered ``SLACK`` more, which is
more than its buffer. Other loops hold more, and may be paused whenever the ring is full.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp.client_proto import ResponseHandler

from proxy.upstream.ring import Ring, Rings

#: Bytes that must still be to come: less is not worth the change of protocols.
LEAST = 256 << 10
#: Bytes and seconds that a piece is waited for.
GATHER = 512 << 10
GATHER_SECONDS = 0.01
#: Room beyond ``ahead`` for what a TLS layer holds: more than ``proxy/loop.py`` gives it.
SLACK = 256 << 10


class BodyReceiver(asyncio.BufferedProtocol):
    """Receives the rest of one body."""

    def __init__(
        self,
        handler: ResponseHandler,
        content: aiohttp.StreamReader,
        length: int,
        ring: Ring,
        *,
        ahead: int,
    ) -> None:
        """``length``: the bytes to come; ``ahead``: that may come before they are asked for.

        From here on it is the protocol of the handler's transport.
        """
        if handler.transport is None:
            raise ValueError("there is no connection to receive from")
        self.ring = ring
        self.is_handed_back = False
        self._content = content
        self._handler = handler
        self._transport = handler.transport
        self._length = length
        self._left = length
        self._ahead = min(ahead, ring.size - SLACK)
        self._is_secure = self._transport.get_extra_info("ssl_object") is not None
        self._is_paused = False
        self._offered = 0
        self._surplus = bytearray(1)
        self._has_surplus = False
        self._is_settled = False  # a TLS layer has had the time to show surplus
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._enough = 1  # bytes that who waits is woken for
        self._gather = min(GATHER, self._ahead // 2)
        # Private: aiohttp has no other way to end a parser. Tests tell when it ceases to work.
        handler._drop_timeout()
        handler._parser = None
        self._become(self)

    def _become(self, protocol: asyncio.BaseProtocol) -> None:
        # uvloop looks at the kind of protocol only when it begins to read.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()

    # -- the consumer ----------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Have all bytes come?"""
        return not self._left

    @property
    def is_ready(self) -> bool:
        """Is there something to tell without waiting: bytes, the end, an error?"""
        return bool(self.ring.unread) or self.is_complete or self._error is not None

    async def borrow(self, most: int) -> memoryview | bytes:
        """The next bytes, at most ``most``, to be used until the next call; ``b""`` at the end.

        Raises ``aiohttp.ClientPayloadError`` when the connection ends before the body does.
        """
        self.ring.free()
        if not self.ring.used:  # a slow body needs no more memory than what comes at once
            self.ring.clear()
        self._resume()
        if not self._has_enough or self._is_unsettled_end:
            await self._wait()
        self._enough = min(self._gather, most)
        self.hand_back()
        if self.ring.unread:
            return self.ring.lend(most)
        if self._error is not None:
            raise self._error
        return b""

    def more(self, most: int) -> memoryview | bytes:
        """What has come since bytes were lent, in place of them, at most ``most``; ``b""`` if that
        is little and more is to come. For the thread that takes in what was borrowed, until the
        next ``borrow``; of all here it alone may be called in another thread than the loop's."""
        is_complete = self.is_complete  # first: then all of it is there
        if self.ring.unread < self._gather and not is_complete:
            return b""
        return self.ring.lend(most)

    def resume(self) -> None:
        """``more`` has made room."""
        self._resume()

    @property
    def _is_unsettled_end(self) -> bool:
        return self.is_complete and not self.ring.unread and not self._is_settled

    @property
    def _has_enough(self) -> bool:
        ended = self.is_complete or self._error is not None
        return ended or self.ring.unread >= self._enough

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(GATHER_SECONDS, self._hurry)
        try:
            await self._waiter
        finally:
            self._waiter = None
            timer.cancel()

    def _hurry(self) -> None:
        """Who waits has waited for many bytes long enough: a single one will do."""
        self._enough = 1
        self._wake()

    def set_exception(self, error: BaseException) -> None:
        """Let whoever reads have this after the bytes that are there."""
        if self._error is None and not self.is_complete:
            self._error = error
        self._wake()

    def hand_back(self) -> None:
        """Give the connection back to aiohttp, if the body is complete and settled."""
        if self.is_handed_back or not self._is_settled:
            return
        self.is_handed_back = True
        if self._has_surplus:
            self._handler.force_close()
            self._transport.abort()
        elif not self._transport.is_closing():
            self._become(self._handler)
        self._content.feed_eof()

    def _resume(self) -> None:
        if self._is_paused and self.ring.used <= self._ahead // 2 and not self._has_surplus:
            self._is_paused = False
            self._transport.resume_reading()

    def _wake(self) -> None:
        has_enough = self._has_enough and not self._is_unsettled_end
        if self._waiter is not None and not self._waiter.done() and has_enough:
            self._waiter.set_result(None)

    # -- the transport ---------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:
        if not self._left:
            return self._surplus
        room = self._ahead - self.ring.used
        space = self.ring.space(min(self._left, room if room > 0 else self.ring.size))
        self._offered = len(space)
        return space

    def buffer_updated(self, nbytes: int) -> None:
        if not self._left:
            self._has_surplus = True
            self._transport.pause_reading()
            return
        self.ring.received(nbytes)
        self._left -= nbytes
        is_drained = nbytes < self._offered or not self._is_secure
        # Only loops that may be paused at any time have more than the slack to hand over.
        may_pause = is_drained or self.ring.used == self.ring.size
        if self.ring.used >= self._ahead and may_pause and self._left:
            self._is_paused = True
            self._transport.pause_reading()
        if not self._left:
            self._settle_soon()
        self._wake()

    def _settle_soon(self) -> None:
        if self._is_secure:
            asyncio.get_running_loop().call_soon(self._settle)
        else:
            self._is_settled = True

    def _settle(self) -> None:
        self._is_settled = True
        self._wake()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.is_complete:
            self._settle()
            self.hand_back()
        else:
            came = self._length - self._left
            error = aiohttp.ClientPayloadError(
                f"the connection ended after {came} of {self._length} bytes: {exc!r}"
            )
            error.__cause__ = exc
            self.set_exception(error)
        self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

    def __repr__(self) -> str:
        return f"<BodyReceiver {self._left} of {self._length} bytes to come, {self.ring!r}>"


def detached(
    response: aiohttp.ClientResponse, consumed: int, rings: Rings, *, ahead: int
) -> BodyReceiver | None:
    """Receive the body past aiohttp, which has handed out ``consumed`` bytes; None if it has to go
    on itself: for now, or because it alone knows where the body ends."""
    connection, content = response.connection, response.content
    if connection is None or connection.protocol is None or connection.transport is None:
        return None
    if content.is_eof() or content.exception() is not None or content.total_bytes != consumed:
        return None
    lengths = response.headers.getall("Content-Length", ())
    if len(lengths) != 1 or not lengths[0].isdecimal() or "Transfer-Encoding" in response.headers:
        return None
    left = int(lengths[0]) - consumed
    if left < LEAST or not connection.transport.is_reading():
        return None
    return BodyReceiver(connection.protocol, content, left, rings.take(), ahead=ahead)
