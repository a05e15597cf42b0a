"""Connections that answer hot where they may: who may answer when, and what each remembers.

The theory of operation is in ``hot.py``. A connection remembers the last request that it answered,
with its answer and its row, and up to two heads, each of ``MAX_STENCIL`` bytes at most: nothing
that grows, and nothing that holds a secret.

**The same again.** Whoever asks often mostly asks the same again, in the same bytes or with another
id in them. Then nothing is read: while an ``Again`` is there its answer is given as soon as its
entry is seen to be good. It is there once an answer was given twice in a row, only while the slow
path owes nothing, and goes when anything is given to it. This is what most hits cost, so it is
written for that: a call of Python takes as long as three lines here. Whoever asks for one thing
after the other, as a node that pulls an image does, has none made in vain.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from aiohttp import web

from proxy.observe.metrics import QUICK
from proxy.web.hot import END, IDS, HotPath
from proxy.web.plain import MAX_HEAD, Head, Stencil, has_secret
from proxy.web.prepared import Entry, Prepared
from proxy.web.rows import Row
from proxy.web.server import ClientProtocol, RegistryServer
from proxy.web.tls import certificate_name

#: Bytes of a head or request that a connection remembers, at most, to compare others with it.
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


class Again:
    """The answer to a request, and to those that begin with ``start`` and end with ``stop`` and
    have nothing but letters, digits and dashes in between. ``row`` None: nothing is logged."""

    __slots__ = ("at", "data", "end", "entry", "prepared", "row", "start", "stop")

    def __init__(self, data: bytes, entry: Entry, prepared: Prepared, row: Row | None) -> None:
        self.data = data
        self.entry = entry
        self.prepared = prepared
        self.row = row
        self.start = self.stop = data
        self.at = self.end = 0

    def allow(self, line: bytes, stencil: Stencil) -> None:
        """The request is this line and a head that fits ``stencil``: so may others be."""
        start = line + stencil.start
        self.start = self.data[: len(start) + self.data.startswith(b" ", len(start))]
        self.stop = stencil.stop
        self.at, self.end = len(self.start), -len(self.stop)


class _HotClient(ClientProtocol):
    __slots__ = (
        "_again",
        "_has_given",
        "_held",
        "_hot",
        "_last",
        "_last_unlike",
        "_peer_and_user",
        "_stencil",
    )

    def __init__(self, hot: HotPath, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._hot: HotPath | None = hot  # None: slow for good
        self._has_given = False  # anything to aiohttp
        self._held: list[bytes] = []  # received, and neither answered nor given
        self._peer_and_user: tuple[str, str | None] | None = None
        # What was answered last, and twice in a row. None unless the slow path owes nothing.
        self._again: Again | None = None
        self._last: Prepared | None = None  # what was answered last by what was read
        # The last head that was not known as it stands, and what others like it have in common.
        self._last_unlike: tuple[bytes, Head] | None = None
        self._stencil: tuple[Stencil, Head] | None = None

    def data_received(self, data: bytes) -> None:
        again, hot = self._again, self._hot
        if (
            again is None
            or hot is None
            or (
                data != again.data
                and not (
                    data.startswith(again.start)
                    and data.endswith(again.stop)
                    and data[again.at : again.end].replace(b"-", b"").isalnum()
                    and len(data) <= MAX_HEAD
                )
            )
        ):
            self._receive(data)
            return
        began, entry = hot.clock(), again.entry
        if (
            began < entry.until  # as ``Entry.is_good``, for half of what a call takes
            and entry.held.holds
            and entry.linked.holds
            and entry.named.holds
            and not (self._paused or self._close or self._force_close)
            and (hot.is_in_turn or hot.may_begin_turn())
        ):
            self._say(hot, again.prepared, began, again.row)
        else:
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        """Answer this or give it to the slow path, now or in a turn."""
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
        if self._late:
            return False
        waiter = self._waiter
        if waiter is None or waiter.done():
            return not self._has_given
        return not self._messages

    def _take(self, hot: HotPath, data: bytes) -> None:
        """Answer what can be answered, and give the rest to the slow path."""
        if self._close or self._force_close or self.transport is None:
            return
        done = 0
        if not self._paused and (hot.is_in_turn or hot.may_begin_turn()):
            began = hot.clock()
            line, head, is_open = self._read(hot, data)
            if head is not None:
                prepared = hot.find(line, head, began)
                if prepared is not None:
                    is_again, self._last = prepared is self._last, prepared
                    if not is_again or not is_open or len(data) > MAX_STENCIL:
                        self._say(hot, prepared, began, head=head)
                        return
                    row = self._row(hot, prepared, head)
                    self._say(hot, prepared, began, row)
                    again = self._again = Again(data, hot.table.entries[line], prepared, row)
                    self._widen(again, line, head)
                    return
            elif data.find(END) + 4 != len(data) and hot.are_plain(data):
                # Else none: aiohttp answers nothing that came together with what is malformed.
                found, done = hot.find_all(data, began)
                for prepared, head in found:
                    self._say(hot, prepared, began, head=head)
        if done < len(data):
            self._give(hot, data[done:])

    def _read(self, hot: HotPath, data: bytes) -> tuple[bytes, Head | None, bool]:
        """The request line and the head, if this is one whole request and its head is plain; and
        whether it is known to hold no secret.

        In the order of what it costs: a head that is known (which ends with the empty line and
        holds no other); one that differs from the last two in one value that does not matter; any
        other."""
        eol = data.find(b"\r\n")
        line, rest = data[:eol], data[eol:]
        head = hot.heads.get(rest)
        if head is not None:  # it holds no secret: else it would not be known
            return line, head, True
        if self._stencil is not None and self._stencil[0].fits(rest):
            return line, self._stencil[1], True
        if data.find(END) + 4 == len(data) and line in hot.table.entries:
            head = hot.head(rest)
            if head is not None and len(rest) <= MAX_STENCIL:
                self._compare(rest, head)
        return line, head, False

    def _compare(self, rest: bytes, head: Head) -> None:
        """Two heads in a row that come to the same: has the next one to differ from them only where
        they differ from one another?"""
        before, self._last_unlike = self._last_unlike, (rest, head)
        if before is not None and before[1] is head:
            stencil = Stencil.of(before[0], rest)
            self._stencil = None if stencil is None else (stencil, head)
        if has_secret(rest):
            self._last_unlike = None

    def _widen(self, again: Again, line: bytes, head: Head) -> None:
        """Give the same answer to what differs in a value that does not matter, if that is known of
        heads like this."""
        if self._stencil is not None and self._stencil[1] is head:
            stencil = self._stencil[0]
            if stencil.fits(again.data[len(line) :]):
                again.allow(line, stencil)

    def _say(
        self,
        hot: HotPath,
        prepared: Prepared,
        began: float,
        row: Row | None = None,
        head: Head | None = None,
    ) -> None:
        """Send this answer, count it, note it for the log: by its row, or as one to this head."""
        transport = self.transport
        if transport is None:
            return
        body, ids = prepared.body, hot.ids
        ids.low = low = (ids.low + 1) % IDS
        if not low:
            ids.count()
        second = prepared.second
        parts = prepared.first, ids.high_bytes, ids.low_bytes[low], second, hot.date, body
        transport.write(b"".join(parts))
        self._next_keepalive_close_time = hot.loop_time + self._keepalive_timeout
        seconds = hot.clock() - began
        if seconds <= QUICK:  # as ``count_hot``
            tally = prepared.tally
            tally.count += 1
            tally.seconds += seconds
            tally.sent += len(body)
        else:
            hot.metrics.count_hot(prepared.tally, seconds, len(body))
        if row is not None:
            hot.rows.note(row, ids.high + ids.lows[low], seconds, hot.stamp)
        elif head is not None and hot.rows.is_on:
            request_id = ids.high + ids.lows[low]
            hot.note_once(prepared, head, *self._whom(), request_id, seconds)

    def _row(self, hot: HotPath, prepared: Prepared, head: Head) -> Row | None:
        return hot.row(prepared, head, *self._whom()) if hot.rows.is_on else None

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
        self._again = None
        if not hot.are_plain(data):
            self._hot = None
        self._has_given = True
        super().data_received(data)
