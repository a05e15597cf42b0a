"""The body of one answer, as its turn reads it: by aiohttp, and what is large past it.

However the bytes come, they are borrowed: a piece may be used until the next one is asked for, or
the turn ends. Whoever keeps it longer copies it. Only waiting for the upstream counts as its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import aiohttp

from proxy.oci.digest import Chunk
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.receive import BodyReceiver, detached
from proxy.upstream.ring import RING_BYTES, Rings
from proxy.upstream.stall import StallLimit, StallMeter
from proxy.upstream.watch import Watch

#: Bytes of one piece, at most: writing and hashing them takes longer than the way to a thread.
PIECE = 2 << 20
#: Bytes that come ahead of a reader who is throttled, at least: what aiohttp holds as well.
LEAST_AHEAD = 512 << 10


class Giver(Protocol):
    """Whom a body comes from; ``stalled`` makes, and counts, the error of one that is too slow.
    Without ``rings`` all of it is left to aiohttp."""

    settings: OriginSettings
    clock: Callable[[], float]
    rings: Rings | None

    def stalled(self, limit: StallLimit) -> Exception: ...


class Incoming:
    """Reads one answer's body. ``end`` gives back what it holds."""

    def __init__(self, response: aiohttp.ClientResponse, stall: StallLimit, origin: Giver) -> None:
        self._response = response
        self._rings = origin.rings
        self._silence = origin.settings.read_timeout
        self._receiver: BodyReceiver | None = None
        self._consumed = 0
        self._watch = Watch(
            StallMeter(stall),
            clock=origin.clock,
            stalled=lambda: origin.stalled(stall),
            fail=self._fail,
        )

    async def borrow(self, most: int = -1) -> Chunk:
        """The next bytes, up to ``most`` (-1: as many as are at hand); ``b""`` at the end.

        Raises what aiohttp raises, and what the origin's ``stalled`` makes.
        """
        data: Chunk = b""
        if not self._is_ready:
            self._watch.begin()
        try:
            data = await self._next(most)
        finally:
            self._watch.end(len(data))
        self._consumed += len(data)
        if self._receiver is None and self._rings is not None:
            # Now, while aiohttp's stream is empty: by the next time more has come.
            self._detach(self._rings, most)
        return data

    def more(self, most: int) -> Chunk:
        """In a thread: what has come since the last bytes were borrowed, at most ``most``, in place
        of them; ``b""`` when that is not worth a piece. Who takes it says so (``settle``)."""
        if self._receiver is None:
            return b""
        return self._receiver.more(min(most, PIECE))

    def settle(self, count: int) -> None:
        """So many bytes were taken by ``more``."""
        self._consumed += count
        if self._receiver is not None:
            self._receiver.resume()

    async def _next(self, most: int) -> Chunk:
        if self._receiver is not None:
            return await self._receiver.borrow(min(most, PIECE) if most >= 0 else PIECE)
        content = self._response.content
        return await (content.readany() if most < 0 else content.read(most))

    @property
    def _is_ready(self) -> bool:
        """Is there something to read without waiting?"""
        if self._receiver is not None:
            return self._receiver.is_ready
        content = self._response.content
        return content.total_bytes > self._consumed or content.is_eof()

    def _detach(self, rings: Rings, most: int) -> None:
        ahead = RING_BYTES if most < 0 else max(LEAST_AHEAD, 2 * most)
        self._receiver = detached(self._response, self._consumed, rings, ahead=ahead)
        if self._receiver is not None:
            self._watch.silence = self._silence  # aiohttp minded it until now

    def _fail(self, error: Exception) -> None:
        if self._receiver is not None:
            self._receiver.set_exception(error)
        else:
            self._response.content.set_exception(error)

    def end(self) -> None:
        """Nobody reads on; of a complete body the connection stays. Idempotent."""
        self._watch.close()
        receiver, self._receiver = self._receiver, None
        if receiver is not None and self._rings is not None:
            receiver.hand_back()
            if receiver.is_handed_back:
                self._rings.give(receiver.ring)

    def __repr__(self) -> str:
        return f"<Incoming {self._consumed} bytes, {self._receiver or 'by aiohttp'!r}>"
