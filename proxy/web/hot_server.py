"""Connections that answer hot where they may: who may answer when, and what each remembers.

The theory of operation is in ``hot.py``. A connection remembers the last request whose head is
known, up to two heads of ``MAX_STENCIL`` bytes, and its last answer's row: nothing that grows, and
nothing that holds a secret.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from aiohttp import web

from proxy.web.hot import END, HotPath
from proxy.web.plain import Head, Stencil, has_secret
from proxy.web.prepared import Prepared
from proxy.web.rows import Row
from proxy.web.server import ClientProtocol, RegistryServer
from proxy.web.tls import certificate_name

#: Bytes of a head that a connection remembers, at most, to compare others with it.
MAX_STENCIL = 2 << 10


class HotServer(RegistryServer):
    """A server whose connections answer hot where they can. ``hot`` None: nowhere."""

    def __init__(self, *args: Any, hot: HotPath | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._hot = hot

    def __call__(self) -> web.RequestHandler:
        return (
            super().__call__() if self._hot is None else self._made(partial(_HotClient, self._hot))
        )

    async def shutdown(self, timeout: float | None = None) -> None:
        await super().shutdown(timeout)
        if self._hot is not None:
            self._hot.rows.flush()


class _HotClient(ClientProtocol):
    __slots__ = (
        "_has_given",
        "_held",
        "_hot",
        "_last",
        "_last_head",
        "_last_line",
        "_last_prepared",
        "_last_unlike",
        "_peer_and_user",
        "_row",
        "_row_head",
        "_stencil",
    )

    def __init__(self, hot: HotPath, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._hot: HotPath | None = hot  # None: slow for good
        self._has_given = False  # anything to aiohttp
        self._held: list[bytes] = []  # received, and neither answered nor given
        self._peer_and_user: tuple[str, str | None] | None = None
        # The last request whose head was known as it stands: most ask the same again.
        self._last = b""
        self._last_line = b""
        self._last_head: Head
        # The last head that was not, and what others like it have in common (see ``_read``).
        self._last_unlike: tuple[bytes, Head] | None = None
        self._stencil: tuple[Stencil, Head] | None = None
        # What was answered last, for which head, and its row in the log.
        self._last_prepared: Prepared | None = None
        self._row_head: Head | None = None
        self._row: Row

    def data_received(self, data: bytes) -> None:
        hot = self._hot
        # Without data it is aiohttp's own call, to parse what it holds.
        if hot is None or self._header is not None or not data:
            super().data_received(data)
            return
        if self._held:
            self._held.append(bytes(data))
        elif self._is_free():
            self._take(hot, bytes(data))
        elif self._messages or self._request_in_progress:
            self._give(hot, bytes(data))
        else:
            # The handler has ended and the client has its answer, but aiohttp hears of that in this
            # turn of the loop. (Or the handler begins in it: then this is its turn's, afterwards.)
            self._held.append(bytes(data))
            self._loop.call_soon(self._go_on, hot)

    def _go_on(self, hot: HotPath) -> None:
        held, self._held = self._held, []
        for data in held:
            if self._hot is not None and self._is_free():
                self._take(hot, data)
            else:
                self._give(hot, data)

    def _is_free(self) -> bool:
        """Does the slow path owe nothing?"""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return not self._has_given
        return not self._messages

    def _take(self, hot: HotPath, data: bytes) -> None:
        """Answer what can be answered, and give the rest to the slow path."""
        if self._close or self._force_close or self.transport is None:
            return
        done = 0
        if not self._paused and not hot.is_draining():
            began = hot.clock()
            line, head = self._read(hot, data)
            if head is not None:
                answer = hot.find(line, head, began)
                if answer is not None:
                    self._say(hot, answer, head, began)
                    return
            elif data.find(END) + 4 != len(data) and hot.are_plain(data):
                # Else none: aiohttp answers nothing that came together with what is malformed.
                found, done = hot.find_all(data, began)
                for answer, head in found:
                    self._say(hot, answer, head, began)
        if done < len(data):
            self._give(hot, data[done:])

    def _read(self, hot: HotPath, data: bytes) -> tuple[bytes, Head | None]:
        """The request line and the head, if this is one whole request and its head is plain.

        In the order of what it costs: the same bytes as before; a head that is known (which ends
        with the empty line and holds no other); one that differs from the last two in one value
        that does not matter; any other."""
        if data == self._last:
            return self._last_line, self._last_head
        eol = data.find(b"\r\n")
        line, rest = data[:eol], data[eol:]
        head = hot.heads.get(rest)
        if head is not None:  # it holds no secret: else it would not be known
            self._last, self._last_line, self._last_head = data, line, head
        elif self._stencil is not None and self._stencil[0].fits(rest):
            head = self._stencil[1]
        elif data.find(END) + 4 == len(data) and line in hot.table.entries:
            head = hot.head(rest)
            if head is not None and len(rest) <= MAX_STENCIL:
                self._compare(rest, head)
        return line, head

    def _compare(self, rest: bytes, head: Head) -> None:
        """Two heads in a row that come to the same: has the next one to differ from them only where
        they differ from one another?"""
        before, self._last_unlike = self._last_unlike, (rest, head)
        if before is not None and before[1] is head:
            stencil = Stencil.of(before[0], rest)
            self._stencil = None if stencil is None else (stencil, head)
        if has_secret(rest):
            self._last_unlike = None

    def _say(self, hot: HotPath, prepared: Prepared, head: Head, began: float) -> None:
        """Send this answer, count it, note it for the log."""
        if self.transport is None:
            return
        wall = time.time()
        name, body = hot.name(), prepared.body
        parts = prepared.first, name.encode(), prepared.second, hot.date(wall), body
        self.transport.write(b"".join(parts))
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        seconds, rows = hot.clock() - began, hot.rows
        hot.metrics.count_hot(prepared.tally, seconds, len(body))
        if rows.is_on:
            if prepared is not self._last_prepared or head is not self._row_head:
                self._last_prepared, self._row_head = prepared, head
                self._row = hot.row(prepared, head, *self._whom())
            rows.note(self._row, name, wall, seconds)

    def _whom(self) -> tuple[str, str | None]:
        """Who is at the other end: the same for all its requests."""
        if self._peer_and_user is None:
            peer = self.peername
            name = str(peer[0] if isinstance(peer, list | tuple) else peer or "unknown")
            certificate = self.transport and self.transport.get_extra_info("peercert")
            self._peer_and_user = name, certificate_name(certificate or None)
        return self._peer_and_user

    def _give(self, hot: HotPath, data: bytes) -> None:
        """This is the slow path's; for good, unless it ends where a plain request does."""
        if not hot.are_plain(data):
            self._hot = None
        self._has_given = True
        super().data_received(data)
