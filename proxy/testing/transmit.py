"""Puts an answer on the wire: in pieces, at a pace, and with the connection faults carried out.

Bodies stay in memory, but for patterns, which are made here. They leave as views of 256 KiB at
most, each awaited until the kernel has it, so 200 concurrent readers cost 200 views. A client that
leaves ends the transfer quietly; only what the kernel had taken by then is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from proxy.testing.faults import Action, Cut, Disconnect, Raw, Reset, Stall
from proxy.testing.holds import Parking
from proxy.testing.listener import Connection
from proxy.testing.pattern import Pattern
from proxy.testing.wire import Reply

_PIECE = 256 * 1024
_SLICES = 50  # pieces per second at least, when a rate is set
_POLL = 0.001  # seconds between two looks at a full buffer
_LATE = 0.02  # seconds after which late bytes follow what the peer's kernel has
_BURST = 0.02  # seconds of sending that an idle connection may catch up on


@dataclass(frozen=True, slots=True)
class Transmitter:
    """How one registry sends. `rate` is bytes per second and connection; None is full speed."""

    rate: int | None
    stalls: Parking
    on_body: Callable[[Reply, int], None]
    on_raw: Callable[[int], None]

    async def send(
        self,
        request: web.BaseRequest,
        connection: Connection,
        reply: Reply,
        action: Action | None = None,
        *,
        close: bool = False,
    ) -> web.StreamResponse:
        """Send `reply` as far as `action` lets it; `close` ends the connection after it."""
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        if reply.status != 304:
            response.content_length = reply.length
        if close:
            response.force_close()
        try:
            if isinstance(action, Disconnect):
                await _hang_up(connection, action)
                return response
            if isinstance(action, Raw):
                await self._send_raw(connection, action)
                return response
            await response.prepare(request)
            if request.method != "HEAD":
                await self._send_body(response, connection, reply, action)
        except ConnectionError:
            pass  # the client left: aiohttp sees the closed transport itself
        return response

    async def _send_raw(self, connection: Connection, action: Raw) -> None:
        """Past aiohttp, which would mend it."""
        transport = connection.transport
        if transport is None:
            return
        transport.write(action.data)
        written = len(action.data)
        try:
            if action.late:
                await connection.taken()
                await asyncio.sleep(_LATE)
                transport.write(action.late)
                written += len(action.late)
            while action.forever and not transport.is_closing():
                transport.write(action.forever)
                written += len(action.forever)
                while transport.get_write_buffer_size() > _PIECE:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(_POLL)
                await asyncio.sleep(action.pause)
            if action.ends:
                connection.finish()
            await connection.lost.wait()
        finally:
            self.on_raw(written - transport.get_write_buffer_size())

    async def _send_body(
        self,
        response: web.StreamResponse,
        connection: Connection,
        reply: Reply,
        action: Action | None,
    ) -> None:
        body = reply.body if isinstance(reply.body, Pattern) else memoryview(reply.body)
        match action:
            case Cut(after):
                await self._send_pieces(response, connection, reply, body[:after])
                connection.finish()
            case Reset(after):
                await self._send_pieces(response, connection, reply, body[:after])
                await connection.reset()
            case Stall(after):
                await self._send_pieces(response, connection, reply, body[:after])
                await self.stalls.enter()
                await self._send_pieces(response, connection, reply, body[after:])
            case _:
                await self._send_pieces(response, connection, reply, body)

    async def _send_pieces(
        self,
        response: web.StreamResponse,
        connection: Connection,
        reply: Reply,
        body: memoryview | Pattern,
    ) -> None:
        step = _PIECE if self.rate is None else max(1, min(_PIECE, self.rate // _SLICES))
        for start in range(0, len(body), step):
            cut = body[start : start + step]
            piece = memoryview(bytes(cut)) if isinstance(cut, Pattern) else cut
            await self._pace(connection, len(piece))
            await self._send_piece(response, connection, reply, piece)

    async def _send_piece(
        self,
        response: web.StreamResponse,
        connection: Connection,
        reply: Reply,
        piece: memoryview,
    ) -> None:
        transport = connection.transport
        left = len(piece)
        try:
            await response.write(piece)
            left = 0
        finally:
            # Cancelled or broken while waiting for the kernel: the rest of it never left.
            if left and transport is not None:
                left = min(left, transport.get_write_buffer_size())
            self.on_body(reply, len(piece) - left)

    async def _pace(self, connection: Connection, count: int) -> None:
        """Wait until the connection's pace allows `count` more bytes."""
        if self.rate is None:
            return
        now = asyncio.get_running_loop().time()
        ready = max(connection.ready_at, now - _BURST)
        connection.ready_at = ready + count / self.rate
        if ready > now:
            await asyncio.sleep(ready - now)


async def _hang_up(connection: Connection, action: Disconnect) -> None:
    if action.reset:
        await connection.reset()
    else:
        connection.finish()
