"""Sending a body: files by sendfile where the loop can, by pread and write where it cannot (D17).

Two rules from measured traps (``loop.sendfile`` of aiofastnet keeps the raw descriptor after a
cancel, and a reader's descriptor number may be another file's a moment later):

* whatever interrupts a sendfile, the transport is aborted *before* the file is closed;
* no sendfile reaches past what the flight has published: spans come clamped from the reader.

A body that cannot be finished must not end cleanly. By FIN the client may go on from where it is
(containerd does); by RST it must not trust what it has (D7).
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncGenerator

from aiohttp import web

from proxy.pull.reader import FileSpan, Piece

#: Bytes of one read and write where sendfile is not to be had.
CHUNK = 256 << 10

_NO_LINGER = struct.pack("ii", 1, 0)


class BodyResponse(web.StreamResponse):
    """A response whose body may have to stay unfinished."""

    broken = False

    async def write_eof(self, data: bytes = b"") -> None:
        """End the body, unless it is broken: then there is no end to send."""
        if not self.broken:
            await super().write_eof(data)


class Sender:
    """Writes pieces to a prepared response and counts what has gone."""

    def __init__(self, request: web.BaseRequest, response: BodyResponse) -> None:
        self._request = request
        self._response = response
        self.sent = 0

    async def send_all(self, pieces: AsyncGenerator[Piece, None]) -> None:
        """Every piece, in order. Raises what the pieces raise, and ``ConnectionError``."""
        try:
            async for piece in pieces:
                if isinstance(piece, FileSpan):
                    await self._send_span(piece)
                else:
                    await self._response.write(piece)
                    self.sent += len(piece)
        finally:
            await pieces.aclose()

    async def _send_span(self, span: FileSpan) -> None:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        if transport.get_extra_info("sslcontext") is not None:
            await self._copy_span(span)
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.sendfile(transport, span.lease.file, span.start, span.length, fallback=False)
        except (NotImplementedError, asyncio.SendfileNotAvailableError):
            await self._copy_span(span)
            return
        except BaseException as error:
            # First, whatever it is: see the module's docstring.
            transport.abort()
            task = asyncio.current_task()
            left = isinstance(error, asyncio.CancelledError) and task and not task.cancelling()
            if left:
                # Nobody cancelled this task: the transport was aborted under the sendfile.
                raise ConnectionResetError("the connection was aborted") from None
            raise
        self.sent += span.length

    async def _copy_span(self, span: FileSpan) -> None:
        loop, position = asyncio.get_running_loop(), span.start
        while position < span.stop:
            length = min(CHUNK, span.stop - position)
            data = await loop.run_in_executor(None, os.pread, span.lease.fileno(), length, position)
            if not data:
                raise OSError(f"the file ends at {position}, expected {span.stop}")
            await self._response.write(data)
            position += len(data)
            self.sent += len(data)


def break_off(request: web.BaseRequest, response: BodyResponse, *, reset: bool) -> None:
    """End the connection without ending the body: by FIN, or with ``reset`` by RST."""
    response.broken = True
    response.force_close()
    transport = request.transport
    if transport is None:
        return
    if not reset:
        transport.close()
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()
