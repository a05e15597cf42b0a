"""A blob of one upstream's repository as a source of bytes, range by range (DESIGN D2, D8).

``BlobSource.open`` is one turn: it yields a ``Body`` for a bounded range. The source remembers
where the registry redirected to, so that the turns of one blob do not each ask the registry again;
a signed URL that has expired is asked for anew (fault 21 of ``reliability.md``). It also remembers
that the upstream ignores Range: then every turn is for the whole body, what is already held is
skipped, and a metric says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from yarl import URL

from proxy.oci.digest import Digest
from proxy.oci.errors import UpstreamUnavailable
from proxy.oci.paths import Kind
from proxy.oci.ranges import parse_content_range
from proxy.upstream.client import Reply, UpstreamClient
from proxy.upstream.errors import refusal
from proxy.upstream.origin import OriginKey
from proxy.upstream.turns import Ticket

#: What a CDN answers when a signed URL has expired.
_EXPIRED_URL = frozenset({400, 401, 403, 404, 410})


class Body:
    """The bytes of one turn: from ``start`` on, at most ``length`` of them."""

    def __init__(self, reply: Reply, *, start: int, skip: int, total: int | None) -> None:
        self.start = start
        self.total = total  # the whole blob's size, if the upstream said it
        self._reply = reply
        self._skip = skip
        self._began = reply.origin.clock()
        self._received = 0

    async def read(self) -> bytes:
        """The next bytes as they come; ``b""`` at the end of the turn's range."""
        while data := await self._reply.read():
            self._received += len(data)
            if self._skip >= len(data):
                self._skip -= len(data)
                continue
            if self._skip:
                data = data[self._skip :]
                self._skip = 0
            return data
        return b""

    @property
    def is_overdue(self) -> bool:
        """Should the turn be cut for somebody who waits?"""
        return self._reply.turn.is_overdue

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
        self.ranged = True

    @property
    def key(self) -> tuple[str, str]:
        """The permission this source stands for (D12)."""
        return (self._client.name, self.repository)

    @property
    def turn_bytes(self) -> int:
        """How much one turn should ask for at this source's speed."""
        return self._client.origin.turn_bytes

    @property
    def ahead(self) -> int:
        """Turns waiting at this source's gate."""
        return sum(self._client.origin.state().depth.values())

    @contextlib.asynccontextmanager
    async def open(self, start: int, length: int | None, ticket: Ticket) -> AsyncIterator[Body]:
        """One turn for ``length`` bytes from ``start`` (``None``: to the end)."""
        if self._location is not None:
            async with self._at(self._location, start, length, ticket) as reply:
                if reply.status not in _EXPIRED_URL:
                    yield self._body(reply, start, length)
                    return
            self._location = None
        async with self._at(self._url, start, length, ticket) as reply:
            if reply.status == 416 and start == 0:
                # Nothing satisfies a range of an empty blob (RFC 9110 §15.5.17).
                self.ranged = False
            else:
                self._remember(reply)
                yield self._body(reply, start, length)
                return
        async with self._at(self._url, start, length, ticket) as reply:
            yield self._body(reply, start, length)

    def _at(
        self, url: URL, start: int, length: int | None, ticket: Ticket
    ) -> contextlib.AbstractAsyncContextManager[Reply]:
        headers = {}
        if self.ranged and (start or length is not None):
            stop = "" if length is None else str(start + length - 1)
            headers["Range"] = f"bytes={start}-{stop}"
        return self._client.exchange("GET", url, self.repository, ticket, headers)

    def _remember(self, reply: Reply) -> None:
        if reply.status in (200, 206) and OriginKey.of(reply.url) != self._client.origin.key:
            self._location = reply.url

    def _body(self, reply: Reply, start: int, length: int | None) -> Body:
        if reply.status == 206:
            return self._part(reply, start, length)
        if reply.status == 200:
            return self._whole(reply, start)
        name = f"blob {self.digest} in {self.repository}"
        if reply.status == 416:
            raise UpstreamUnavailable(f"{self._client.name}: {name} ends before byte {start}")
        raise refusal(self._client.name, reply.status, reply.headers, Kind.BLOB, name)

    def _part(self, reply: Reply, start: int, length: int | None) -> Body:
        text = reply.headers.get("Content-Range", "")
        span = parse_content_range(text)
        if span is None or span.start != start or (length and span.stop > start + length):
            raise UpstreamUnavailable(
                f"{self._client.name}: asked for bytes from {start}, got {text[:80]!r}"
            )
        return Body(reply, start=start, skip=0, total=span.size)

    def _whole(self, reply: Reply, start: int) -> Body:
        if "Range" in reply.response.request_info.headers:
            self.ranged = False
            self._client.metrics.upstream_without_range.labels(reply.origin.key.label).inc()
        return Body(reply, start=start, skip=start, total=reply.response.content_length)

    def __repr__(self) -> str:
        return f"<BlobSource {self.digest} through {self._client.name}/{self.repository}>"
