"""Sending a body: files by sendfile where the loop can, by pread and write where it cannot (D17).

Three rules from measured traps (``loop.sendfile`` of aiofastnet keeps the raw descriptor after a
cancel, a reader's descriptor number may be another file's a moment later, and sendfile ends
without a word where the file does):

* whatever interrupts a sendfile, the transport is aborted *before* the file is closed;
* no sendfile reaches past what the flight has published: spans come clamped from the reader;
* a body without a length is chunked, which sendfile knows nothing of: it is copied.

What is copied comes from the kernel's memory without a thread, as long as it is there: into one
buffer of the server's, where the transport encrypts it, or copies it, in the same step.

Where clients have a byte rate, a piece goes in parts, each when the client's throttle lets it. To
the flight such a client is a slow one: what it was given counts as sent when all of it is.

A body that cannot be finished must not end cleanly. By FIN the client may go on from where it is
(containerd does); by RST it must not trust what it has (D7).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterator

from aiohttp import web

from proxy.oci.digest import Chunk
from proxy.oci.errors import StoreFailed
from proxy.pull.reader import FileSpan, Piece
from proxy.throttle import Stream
from proxy.web.server import ClientProtocol

#: Bytes of one read and write where sendfile is not to be had: with few clients, and with more than
#: ``FEW``. With the buffers of TLS (loop.py) it is what a slow client costs, and more of them cost
#: less CPU than smaller ones.
CHUNK, SMALL_CHUNK, FEW = 192 << 10, 64 << 10, 64

_NO_LINGER = struct.pack("ii", 1, 0)
#: What a disk says when it fails; other errors of a sendfile are the socket's.
_DISK = frozenset({errno.EIO, errno.ESTALE})


class BodyResponse(web.StreamResponse):
    """A response whose body may have to stay unfinished."""

    broken = False

    def hold_head(self) -> None:
        """Let the head leave with the first bytes, which takes one call of the kernel instead of
        two. It must not have been prepared yet; ``send_head`` lets it go without them."""
        # Private: aiohttp has it for its own responses only. Tests tell when it ceases to work.
        self._send_headers_immediately = False

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

    async def send_all(
        self, pieces: AsyncGenerator[Piece, None], stream: Stream | None = None
    ) -> None:
        """Every piece, in order, through the client's byte rate if there is one.

        Raises what the pieces raise, ``ConnectionError`` when the client has left, and
        ``StoreFailed`` when a file cannot be read."""
        try:
            async for piece in pieces:
                if stream is None:
                    await self._send(piece)
                    continue
                for part in parts(piece, stream.piece):
                    await stream.take(part.length if isinstance(part, FileSpan) else len(part))
                    await self._send(part)
        finally:
            await pieces.aclose()

    async def _send(self, piece: Piece) -> None:
        if isinstance(piece, FileSpan):
            await self._send_span(piece)
        else:
            await self._response.write(piece)
            self.sent += len(piece)

    async def _send_span(self, span: FileSpan) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        encrypted = transport.get_extra_info("sslcontext") is not None
        if encrypted or self._response.content_length is None:
            await self._copy_span(span)
            return
        try:
            await self._send_file(transport, span)
        except (NotImplementedError, asyncio.SendfileNotAvailableError):
            await self._copy_span(span)
            return
        if os.fstat(span.lease.fileno()).st_size < span.stop:
            raise StoreFailed("a cached file has become shorter than it was")
        self.sent += span.length

    async def _send_file(self, transport: asyncio.Transport, span: FileSpan) -> None:
        loop = asyncio.get_running_loop()
        send_head(self._request)
        try:
            await loop.sendfile(transport, span.lease.file, span.start, span.length, fallback=False)
        except (NotImplementedError, asyncio.SendfileNotAvailableError):
            raise
        except BaseException as error:
            # First, whatever it is: see the module's docstring.
            transport.abort()
            if isinstance(error, OSError):
                raise _failed(error) from error
            task = asyncio.current_task()
            cancelled = isinstance(error, asyncio.CancelledError)
            if cancelled and task is not None and not task.cancelling():
                # Nobody cancelled this task: the transport was aborted under the sendfile.
                raise ConnectionResetError("the connection was aborted") from None
            raise

    async def _copy_span(self, span: FileSpan) -> None:
        position, scratch = span.start, scratch_for(self._request, span.length)
        fd = span.lease.fileno()
        while position < span.stop:
            length = min(chunk_for(self._request), span.stop - position)
            data = await read_at(fd, length, position, scratch, before_disk=self._let_head_go)
            if not data:
                raise StoreFailed("a cached file has become shorter than it was")
            await self._response.write(data)
            position += len(data)
            self.sent += len(data)

    def _let_head_go(self) -> None:
        """The first bytes take as long as a disk does."""
        send_head(self._request)


def send_head(request: web.BaseRequest) -> None:
    """Let the head of its answer go, if that was held. Raises ``ConnectionError``."""
    request.writer.send_headers()


def chunk_for(request: web.BaseRequest) -> int:
    """Bytes that are read and written at once for this client, with as many others as there are."""
    client = request.protocol
    others = client.others if isinstance(client, ClientProtocol) else 0
    return CHUNK if others < FEW else SMALL_CHUNK


def scratch_for(request: web.BaseRequest, length: int) -> bytearray | None:
    """Where the chunks of so many bytes may be read to: memory that is anybody's in the next step
    of the loop. None where the transport holds on to what it is given."""
    client, transport = request.protocol, request.transport
    if not isinstance(client, ClientProtocol) or transport is None:
        return None
    # Only aiofastnet's TLS knows the name. What the socket does not take it keeps as a copy.
    if transport.get_extra_info("ssl_outgoing_use_membio") is None:
        return None
    return client.scratch(min(length, CHUNK))


async def read_at(
    fd: int,
    length: int,
    position: int,
    scratch: bytearray | None = None,
    *,
    before_disk: Callable[[], None] = lambda: None,
) -> Chunk:
    """Up to ``length`` bytes, ``b""`` at the end of the file; from memory without a thread, whose
    way there and back costs as much as encrypting them. What is in ``scratch`` is to be used before
    anything else is awaited. ``before_disk`` is called when a disk is to be asked. Raises
    ``StoreFailed``."""
    # A client that takes all at once never makes its sender wait: others need the loop too.
    await asyncio.sleep(0)
    data = read_cached(fd, length, position, scratch)
    if data is not None:
        return data
    before_disk()
    loop = asyncio.get_running_loop()
    try:
        return await loop.run_in_executor(None, os.pread, fd, length, position)
    except OSError as error:
        raise StoreFailed(f"a cached file cannot be read: {error.strerror}") from error


def read_cached(
    fd: int, length: int, position: int, scratch: bytearray | None = None
) -> memoryview | None:
    """What the kernel has in memory, in ``scratch`` or a buffer of its own; None if a disk has to
    be asked."""
    data = memoryview(bytearray(length) if scratch is None else scratch)[:length]
    try:
        count = os.preadv(fd, [data], position, os.RWF_NOWAIT)
    except OSError:  # not in memory, or a file system that cannot say: a thread finds out
        return None
    return data[:count]


def parts(piece: Piece, most: int) -> Iterator[Piece]:
    """The same bytes, at most ``most`` at a time."""
    if isinstance(piece, FileSpan):
        for start in range(piece.start, piece.stop, most):
            yield FileSpan(piece.lease, start, min(start + most, piece.stop))
    else:
        for start in range(0, len(piece), most):
            yield piece[start : start + most]


def _failed(error: OSError) -> Exception:
    """Whose failure an interrupted sendfile was: the disk's, or that of a client that is gone."""
    if error.errno in _DISK:
        return StoreFailed(f"a cached file cannot be read: {error.strerror}")
    if isinstance(error, ConnectionError):
        return error
    return ConnectionResetError(f"the connection broke: {error}")


def break_off(request: web.BaseRequest, response: BodyResponse, *, reset: bool) -> None:
    """End the connection without ending the body: by FIN, or with ``reset`` by RST."""
    response.broken = True
    response.force_close()
    transport = request.transport
    if transport is None:
        return
    with contextlib.suppress(ConnectionError):  # whoever is told of 200 here hears it, too
        send_head(request)
    if not reset and _has_an_end(request, response):
        transport.close()
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        except OSError:  # closed already: nothing is left to be reset
            return
    transport.abort()


def _has_an_end(request: web.BaseRequest, response: BodyResponse) -> bool:
    """Can a client tell that a body was cut short by FIN? Not one of HTTP/1.0 without a length."""
    return response.content_length is not None or request.version >= (1, 1)
