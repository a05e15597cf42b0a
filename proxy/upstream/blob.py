"""A blob of one upstream's repository as a source of bytes, range by range (DESIGN D2, D8).

``BlobSource.open`` is one turn: it yields a ``Body`` for a bounded range. The source remembers
where the registry redirected to, so that the turns of one blob do not each ask the registry again;
after any failure there, or when the signed URL has expired, the registry is asked anew (fault 21 of
``reliability.md``). It also remembers that the upstream ignores Range, or answers with another one
than was asked for: then every turn is for the whole body, what is already held is skipped, no turn
is cut, and a metric says so.

Several turns of one source may be open at once (D9). What it remembers is no more than a hint of
how to ask next, so it does not matter which of them wrote it last.

Whether a repository may be read is for its registry to say: a refusal by the storage behind a
redirect is a failure that may pass, not a denial.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from yarl import URL

from proxy.oci.digest import Chunk, Digest
from proxy.oci.errors import PullError, UpstreamUnavailable
from proxy.oci.paths import Kind
from proxy.oci.ranges import parse_content_range
from proxy.upstream.client import UpstreamClient
from proxy.upstream.endpoint import OriginKey
from proxy.upstream.errors import refusal
from proxy.upstream.hurry import Leisure
from proxy.upstream.origin import OVERRUN, TURN_SECONDS, Origin
from proxy.upstream.reach import Reach
from proxy.upstream.reply import Reply, drain
from proxy.upstream.turns import Ticket, TurnClass

#: What a CDN answers when a signed URL has expired.
_EXPIRED_URL = frozenset({400, 401, 403, 404, 410})


class Body:
    """The bytes of one turn: from ``start`` on, after ``skip`` of the answer's, at most ``length``
    (``None``: as many as come)."""

    def __init__(
        self, reply: Reply, *, start: int, skip: int = 0, length: int | None, total: int | None
    ) -> None:
        self.start = start
        self.total = total  # the whole blob's size, if the upstream said it
        self._reply = reply
        self._skip = skip
        self._length = length
        self._began = reply.origin.clock()
        self._received = 0
        self._taken = 0  # of what is asked for, by ``borrow``
        self._more = 0  # and by ``more``
        self._settled = 0  # of these, that were counted
        self._spared_until: float | None = None  # once it was not cut as it would end soon

    async def borrow(self) -> Chunk:
        """The next bytes as they come; ``b""`` at the end of the turn's range. They are good until
        the next call, or the end of the turn.

        Raises ``UpstreamError``, also when the upstream sends more than it announced.
        """
        while data := await self._reply.borrow():
            self._received += len(data)
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            if skipped < len(data):
                return self._counted(data[skipped:])
        return b""

    async def read(self) -> bytes:
        """The same, to keep."""
        return bytes(await self.borrow())

    def more(self, most: int) -> Chunk:
        """For the thread that takes in what was borrowed: what has come since, at most ``most``, in
        place of it; ``b""`` if that is not worth a piece, or nobody knows."""
        if self._skip:
            return b""
        if self._length is not None:
            most = min(most, self._length - self._taken - self._more)
        data = self._reply.more(most) if most > 0 else b""
        self._more += len(data)
        return data

    def settle(self) -> None:
        """Count what was taken by ``more``, and let as much come in its place."""
        count = self._more - self._settled
        if count:
            self._settled += count
            self._received += count
            self._reply.settle(count)

    def _counted(self, data: Chunk) -> Chunk:
        self._taken += len(data)
        if self._length is not None and self._taken + self._more > self._length:
            label = self._reply.origin.key.label
            raise UpstreamUnavailable(f"{label}: more bytes came than its Content-Range says")
        return data

    @property
    def is_part(self) -> bool:
        """Is it the range that was asked for, rather than the whole body?"""
        return self._reply.status == 206

    @property
    def is_overdue(self) -> bool:
        """Should the turn be cut for somebody who waits? Only if the next one can go on here, and
        if it would last: what is on its way when it is cut is lost, as is the connection."""
        return self.is_part and self._reply.turn.is_overdue and not self._is_spared()

    def _is_spared(self) -> bool:
        """Does its rest come within the time of a turn? It has that time once: a body that came
        fast and trickles now would seem to end soon for as long as it has come so far."""
        now = self._reply.origin.clock()
        if not self._ends_soon(now):
            return False
        if self._spared_until is None:
            self._spared_until = now + TURN_SECONDS * OVERRUN
        return now <= self._spared_until

    def _ends_soon(self, now: float) -> bool:
        """Would the rest come within the time of a turn, at the pace at which it has come?"""
        if self._length is None:
            return False
        taken = self._taken + self._more
        return (self._length - taken) * (now - self._began) <= taken * TURN_SECONDS * OVERRUN

    def learn(self) -> None:
        """Tell the origin how fast this turn was."""
        origin = self._reply.origin
        origin.learn_rate(self._received, origin.clock() - self._began)


class BlobSource:
    """One digest through one repository of one upstream."""

    def __init__(self, client: UpstreamClient, repository: str, digest: Digest) -> None:
        self.repository = repository
        self.digest = digest
        self._client = client
        self._url = client.url(repository, f"blobs/{digest}")
        self._location: URL | None = None
        self._reach: Reach | None = None  # of the reply that led there
        self._origin: Origin = client.origin  # where the bytes came from last
        self.ranged = True
        self.was_used = False  # there was a body

    @property
    def key(self) -> tuple[str, str]:
        """The permission this source stands for (D12)."""
        return (self._client.name, self.repository)

    @property
    def turn_bytes(self) -> int:
        """How much one turn should ask for at this source's speed."""
        return self._origin.turn_bytes

    @property
    def active(self) -> int:
        """Turns under way where its bytes come from, whoever's they are."""
        return self._origin.state().active

    @property
    def knows_rate(self) -> bool:
        """Is its speed known?"""
        return self._origin.knows_rate

    @property
    def segments(self) -> int:
        """How many turns it may be fetched by at once."""
        return self._client.segments if self.ranged and self._origin.conduct.trusts_ranges else 1

    @property
    def spare(self) -> int:
        """How many more turns could begin at once where its bytes come from."""
        return self._origin.slots.spare

    @property
    def widens(self) -> bool | None:
        """Do several turns bring more than one? None: nobody has tried of late."""
        return self._origin.conduct.widens

    def learn_widening(self, widens: bool) -> None:
        """Several turns did, or did not, bring more than one."""
        self._origin.conduct.learn_widening(widens)

    def distrust(self) -> None:
        """Its ranges did not make up the blob: ask for whole bodies, and no segments of others."""
        self.ranged = False
        self._origin.conduct.distrust_ranges()

    @property
    def ahead(self) -> int:
        """Turns waiting at this source's gate, but for those that wait for everybody else."""
        depth = self._client.origin.state().depth
        return sum(count for name, count in depth.items() if name != TurnClass.SEGMENT)

    @contextlib.asynccontextmanager
    async def open(
        self, start: int, length: int | None, ticket: Ticket, *, hurry: Leisure | None = None
    ) -> AsyncIterator[Body]:
        """One turn for ``length`` bytes from ``start`` (``None``: to the end).

        ``hurry`` bounds the time until the head of the answer.
        """
        client = self._client if hurry is None else self._client.within(hurry)
        try:
            while True:
                location = self._location
                url = location or self._url
                async with self._at(client, url, start, length, ticket) as reply:
                    if location is not None and reply.status in _EXPIRED_URL:
                        if self._location is location:  # else another turn knows a newer one
                            self._location = None
                    elif reply.status == 416 and start == 0 and self.ranged:
                        # Nothing satisfies a range of an empty blob (RFC 9110 §15.5.17).
                        self.ranged = False
                    else:
                        yield self._body(reply, start, length)
                        return
                    await drain(reply.response)
        except PullError:
            self._location = None
            raise

    def _at(
        self, client: UpstreamClient, url: URL, start: int, length: int | None, ticket: Ticket
    ) -> contextlib.AbstractAsyncContextManager[Reply]:
        headers = {}
        if self.ranged and (start or length is not None):
            stop = "" if length is None else str(start + length - 1)
            headers["Range"] = f"bytes={start}-{stop}"
        reach = self._reach if url is self._location else None
        return client.exchange("GET", url, self.repository, ticket, headers, reach=reach)

    def _body(self, reply: Reply, start: int, length: int | None) -> Body:
        is_elsewhere = OriginKey.of(reply.url) != self._client.origin.key
        if reply.status in (200, 206):
            self._location = reply.url if is_elsewhere else None
            self._reach = reply.reach
            self._origin = reply.origin
            self.was_used = True
            if reply.status == 206:
                return self._part(reply, start, length)
            return self._whole(reply, start)
        name = f"blob {self.digest} in {self.repository}"
        if reply.status == 416:
            raise UpstreamUnavailable(f"{self._client.name}: {name} ends before byte {start}")
        if is_elsewhere and reply.status in _EXPIRED_URL - {404}:
            raise UpstreamUnavailable(f"{reply.origin.key.label} answered {reply.status} to {name}")
        raise refusal(self._client.name, reply.status, reply.headers, Kind.BLOB, name)

    def _part(self, reply: Reply, start: int, length: int | None) -> Body:
        text = reply.headers.get("Content-Range", "")
        span = parse_content_range(text)
        if span is None or span.start != start or (length and span.stop > start + length):
            self._without_range(reply)
            raise UpstreamUnavailable(
                f"{self._client.name}: asked for bytes from {start}, got {text[:80]!r}"
            )
        return Body(reply, start=start, length=span.length, total=span.size)

    def _whole(self, reply: Reply, start: int) -> Body:
        if "Range" in reply.response.request_info.headers:
            self._without_range(reply)
        total = reply.response.content_length
        return Body(reply, start=start, skip=start, length=None, total=total)

    def _without_range(self, reply: Reply) -> None:
        self.ranged = False
        self._client.metrics.upstream_without_range.labels(reply.origin.key.label).inc()

    def __repr__(self) -> str:
        return f"<BlobSource {self.digest} through {self._client.name}/{self.repository}>"
