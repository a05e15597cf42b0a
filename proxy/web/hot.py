"""The hot path: plain hits answered from prepared bytes, in front of aiohttp's handler.

Theory of operation
-------------------
A hit through aiohttp costs a parsed message, a request, a task, a response and a log event: ten
times what the kernel takes to carry it. But which bytes answer a plain request (``plain.py``) does
not depend on any of that. So each connection looks at what it received before aiohttp does:

    data_received -> request line in the table? -> rest of the head known? -> hit still good?
         |  no to any of them                                                    |  yes
         v                                                                       v
    aiohttp's parser, handler (the *slow path*)                          prepared bytes, out

**Who may answer.** Answers leave in the order of their requests. So a connection answers hot only
while the slow path owes it nothing: nothing was ever given to it, or its handler waits for the next
request with no message queued. (Its handler's end and that are a turn of the loop apart; what comes
in between is held for that turn.) And the parser must stand between two requests: it does as long
as it was only given whole plain requests. Once it was given anything else (half a head, a body,
what is not plain), the connection is *slow for good*: nobody but the parser knows where the next
request begins.

**Where entries come from.** Only the slow path makes them: it offers a request that it has just
answered, and the pull layer says what the next one like it would be answered with out of memory
(``AtHand``). That and the entry into the table are one step; there is no await between them.

**When an entry ends.** It never outlives its truth. Each has three marks (the blob is held, the
repository has it, the tag is that digest), withdrawn in the step in which that changes: eviction,
a refusal, a refresh, a new answer about the tag. A tag's ttl is looked at each time. Whoever finds
the hit no longer good looks for it anew, as at a request of the slow path, and else goes there. So
between an eviction and the answer there is either no turn of the loop, or a mark that is seen. In a
process that follows another one, the step is that in which the leader's word arrives (``team/``).

**Use.** Looking anew counts as a use for the store and for the caches behind it, and as a pull for
what is fetched ahead. For what is asked for it is done every ``RENEW`` seconds, with many answers
as often as makes ``RENEWALS`` a second in all (``renew_after``): the order of eviction is right to
that, and what is not looked for in time is as true as its marks. It costs several times what an
answer does; ten thousand that are asked for in turn, each a second after the last time, would
otherwise be looked for at every request.

**What is never hot**: clients that show a password (its verdict may change) or have a byte rate;
a proxy that drains; another Accept than the manifest's type; If-None-Match of a blob. Whether the
peer is a proxy, and what its certificate says, is looked at once a connection, X-Forwarded-For as
the slow path does it.

**Back-pressure.** A client that asks and does not read costs what the transport holds before it
pauses us, and ``MOST`` bytes of answers at most; whatever else it has sent is the slow path's,
which waits. **The end.** Rows of the log are written in the loop turn in which they were made, a
whole turn's at once, and at the end; the counts are plain integers until a scrape asks. The
keep-alive time of aiohttp counts from the last answer, so it is moved on here.

**Time** is told once a turn, as nginx does: all answers of a turn have its date, and all their rows
say that it was then; how long each took is measured. That the proxy drains is seen from the next
turn on.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from functools import partial

from aiohttp import HttpVersion11, web

from proxy.oci.answers import etag_matches
from proxy.oci.digest import Digest
from proxy.oci.manifest import acceptable
from proxy.oci.paths import Kind, Target
from proxy.pull.asks import Ask, CacheWord
from proxy.pull.at_hand import Finder, Hit
from proxy.upstream.routing import Route
from proxy.web.access import AccessLog, Visit
from proxy.web.forwarded import Network, client_address
from proxy.web.plain import Head, has_secret, is_plain_line, parse_head, settled
from proxy.web.prepared import Entry, Prepared, Table
from proxy.web.registry import content_headers, contract_headers
from proxy.web.rows import Row, Rows, Shape

#: Seconds after which a hit is looked for anew, at least; and how many may be, each second.
RENEW = 1.0
RENEWALS = 200
#: Bytes of answers that are made before the transport is asked whether it takes more.
MOST = 64 << 10
#: Heads that are remembered, at most, and media types of which a head knows whether it takes them.
MAX_HEADS, MAX_TYPES = 1024, 64
#: Ids that differ only in the end.
IDS = 1 << 12
#: The end of a head.
END = b"\r\n\r\n"

#: What a request is answered with, and the head that it had.
Answer = tuple[Prepared, Head]


class Ids:
    """The ids of requests, counted up from anywhere: ``high``, and ``lows[low]``. To look that up
    costs half of what it costs to write a number. Whoever takes one moves ``low`` on, and has
    ``high`` counted after each ``IDS``."""

    lows = tuple(f"{number:03x}" for number in range(IDS))
    low_bytes = tuple(low.encode() for low in lows)

    def __init__(self) -> None:
        self._number = secrets.randbits(52)
        self.low = 0
        self.count()

    def count(self) -> None:
        """The next so many begin otherwise."""
        self._number = (self._number + 1) % (1 << 52)
        self.high = f"{self._number:013x}"
        self.high_bytes = self.high.encode()


class HotPath:
    """What all connections of a listener share: prepared answers, heads, rows, counts."""

    def __init__(
        self,
        *,
        at_hand: Finder,
        access_log: AccessLog,
        rows: Rows,
        memory: int,
        trusted_proxies: tuple[Network, ...] = (),
        is_draining: Callable[[], bool] = lambda: False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """``memory`` is how many bytes of prepared answers are kept."""
        self.table = Table(memory)
        self.clock = access_log.clock
        self.wall = wall
        self.is_draining = is_draining
        self.ids = Ids()
        # What all answers of a turn of the loop have in common: see ``may_begin_turn``.
        self.is_in_turn = False
        self.loop_time = 0.0
        self.date = b""  # the last header with the empty line
        self.stamp = ""  # as rows have it
        self.rows = rows
        self.metrics = access_log.metrics
        self._at_hand = at_hand
        self._access_log = access_log
        self._trusted = trusted_proxies
        self.heads: dict[bytes, Head] = {}
        self._seen = [0] * MAX_HEADS
        self._loop = asyncio.get_running_loop()
        self._second = -1
        self._stamp = ""
        self._renewals, self._renewals_end = 0, 0.0  # left in this second, and when it ends

    def __repr__(self) -> str:
        return f"<HotPath {self.table} {len(self.heads)} heads {self.rows}>"

    # -- the table -------------------------------------------------------------------------

    def offer(self, request: web.BaseRequest, route: Route, target: Target) -> None:
        """The slow path has answered this request; prepare the next answer, if it will be a hit."""
        line = f"{request.method} {request.raw_path} HTTP/1.1".encode(errors="surrogateescape")
        is_plain = request.version == HttpVersion11 and is_plain_line(line)
        if not is_plain or line in self.table.entries:  # one that is good no more goes when asked
            return
        again = self._looking(request.method, route, target)
        hit = None if again is None else again()
        if again is not None and hit is not None:
            try:
                self.table.put(line, self._entry(request, route, target.kind, hit, again))
            except ValueError:  # a media type that the slow path has to refuse
                return

    def _looking(
        self, method: str, route: Route, target: Target
    ) -> Callable[[], Hit | None] | None:
        upstream, repository, reference = route.upstream.name, route.repository, target.reference
        is_head = method == "HEAD"
        if reference is not None and target.kind is Kind.MANIFEST:
            return partial(self._at_hand.manifest, upstream, repository, reference, head=is_head)
        if isinstance(reference, Digest) and target.kind is Kind.BLOB:
            return partial(self._at_hand.blob, upstream, repository, reference, head=is_head)
        return None

    def _entry(
        self,
        request: web.BaseRequest,
        route: Route,
        kind: Kind,
        hit: Hit,
        again: Callable[[], Hit | None],
    ) -> Entry:
        visit = Visit(request, "", self.clock, "")
        visit.kind, visit.cache, visit.ask = kind, CacheWord.HIT, Ask(route, "", 0.0)
        visit.answered(200)
        headers = contract_headers(visit, content_headers(hit.digest, hit.media_type, None))
        fields = self._access_log.fields(visit, 0.0)

        def prepared(status: str, body: bytes, **more: str) -> Prepared:
            tally = self.metrics.tally(kind.value, request.method, status[:3])
            named = {**headers, **{name.replace("_", "-"): text for name, text in more.items()}}
            return Prepared(status, named, body, tally=tally, fields=fields)

        body = b"" if request.method == "HEAD" else hit.body
        whole = prepared("200 OK", body, Content_Length=str(hit.size))
        unchanged = prepared("304 Not Modified", b"") if kind is Kind.MANIFEST else None
        return Entry(hit, again, self._renew_at(self.clock()), whole, unchanged)

    def find(self, line: bytes, head: Head, now: float) -> Prepared | None:
        """The answer to a request line with this head; None: ask the slow path."""
        entry = self.table.entries.get(line)
        if entry is None:
            return None
        if not entry.is_good(now):
            if entry.is_true(now) and not self._may_renew(now):
                entry.put_off(self._renewals_end)
            elif not self._renewed(line, entry, now):
                return None
        hit = entry.hit
        if hit.media_type is not None:
            takes = head.takes.get(hit.media_type)
            if not (self._takes(head, hit.media_type) if takes is None else takes):
                return None
        if head.if_none_match is None:
            return entry.whole
        if entry.unchanged is None:
            return None
        return entry.unchanged if etag_matches(head.if_none_match, hit.digest) else entry.whole

    def find_all(self, data: bytes, now: float) -> tuple[list[Answer], int]:
        """The answers to the first of several plain requests, and how many bytes those were."""
        found: list[Answer] = []
        done = size = 0
        while done < len(data) and size < MOST:
            end, eol = data.find(END, done) + 4, data.find(b"\r\n", done)
            head = self.head(data[eol:end])
            answer = None if head is None else self.find(data[done:eol], head, now)
            if head is None or answer is None:
                break
            found.append((answer, head))
            done, size = end, size + answer.size
        return found, done

    def _renewed(self, line: bytes, entry: Entry, now: float) -> bool:
        """Look for the hit anew; is it still the same answer?"""
        hit = entry.again()
        if hit is None or (hit.digest, hit.media_type) != (entry.hit.digest, entry.hit.media_type):
            self.table.drop(line)
            return False
        self.table.put(line, entry)
        entry.renew(hit, self._renew_at(now))
        return True

    def _may_renew(self, now: float) -> bool:
        """Is there one left of those that may be looked for in this second? All may be due at once,
        when nobody has asked for a while."""
        if now >= self._renewals_end:
            self._renewals_end, self._renewals = now + 1.0, RENEWALS
        self._renewals -= 1
        return self._renewals >= 0

    def _renew_at(self, now: float) -> float:
        return now + renew_after(len(self.table))

    @staticmethod
    def _takes(head: Head, media_type: str) -> bool:
        if len(head.takes) >= MAX_TYPES:
            head.takes.clear()
        takes = head.takes[media_type] = acceptable(media_type, head.accept)
        return takes

    def head(self, rest: bytes) -> Head | None:
        """Read a head; None when it is not plain."""
        known = self.heads.get(rest)
        if known is not None:
            return known
        left = settled(rest)
        if left is None:
            return None
        head = self.heads.get(left)
        if head is None:
            head = parse_head(left)
            if head is None:
                return None
            self._remember(left, head)
        elif left != rest:
            # As it stands only when it comes a second time: else each id for tracing that somebody
            # sends would push out a head that is asked with again and again.
            mark = hash(rest)
            if self._seen[mark % MAX_HEADS] == mark and not has_secret(rest):
                self._remember(rest, head)
            self._seen[mark % MAX_HEADS] = mark
        return head

    def are_plain(self, data: bytes) -> bool:
        """Is this one whole plain request after the other?"""
        done = 0
        while (end := data.find(END, done) + 4) > 3:
            eol = data.find(b"\r\n", done)
            if not is_plain_line(data[done:eol]) or self.head(data[eol:end]) is None:
                return False
            done = end
        return done == len(data)

    def _remember(self, rest: bytes, head: Head) -> None:
        if len(self.heads) >= MAX_HEADS:
            del self.heads[next(iter(self.heads))]
        self.heads[rest] = head

    # -- the turn --------------------------------------------------------------------------

    def may_begin_turn(self) -> bool:
        """Begin this turn of the loop, whose first answer is to be made; or there is none."""
        if self.is_draining():
            return False
        self.is_in_turn = True
        self._loop.call_soon(self._end_turn)
        self.loop_time, wall = self._loop.time(), self.wall()
        second = int(wall)
        if second != self._second:
            self._second = second
            self.date = f"Date: {formatdate(second, usegmt=True)}\r\n\r\n".encode()
            self._stamp = datetime.fromtimestamp(second, UTC).isoformat().removesuffix("+00:00")
        micros = int((wall - second) * 1_000_000)
        # As isoformat has it: without a fraction when that is zero.
        self.stamp = f"{self._stamp}.{micros:06d}Z" if micros else f"{self._stamp}Z"
        return True

    def _end_turn(self) -> None:
        self.is_in_turn = False
        self.rows.flush()

    def row(self, prepared: Prepared, head: Head, peer: str, user: str | None) -> Row:
        """The log line of this answer to this client."""
        client = self._client(peer, head)
        return self.rows.row(self._shape(prepared, user), client, head.agent, user)

    def note_once(
        self,
        prepared: Prepared,
        head: Head,
        peer: str,
        user: str | None,
        request_id: str,
        seconds: float,
    ) -> None:
        """Note a request whose answer mostly is not the next one, too."""
        client = self._client(peer, head)
        shape = self._shape(prepared, user)
        self.rows.note_once(shape, client, head.agent, user, request_id, seconds, self.stamp)

    def _client(self, peer: str, head: Head) -> str:
        return client_address(peer, head.forwarded, self._trusted) if self._trusted else peer

    def _shape(self, prepared: Prepared, user: str | None) -> Shape:
        named = user is not None
        shape = prepared.shapes.get(named)
        if shape is None:
            shape = prepared.shapes[named] = self.rows.shape(prepared.fields, named=named)
        return shape


def renew_after(answers: int) -> float:
    """Seconds until one of so many answers is looked for anew, if it is asked for."""
    return max(RENEW, answers / RENEWALS)
