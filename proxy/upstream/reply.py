"""An upstream's answer inside its turn: its body read within bounds, and where it leads.

Whatever an upstream sends, no more of it is held than somebody has asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Chunk
from proxy.oci.errors import RedirectRefused, TooLarge
from proxy.throttle import Stream
from proxy.upstream.endpoint import OriginKey
from proxy.upstream.errors import translated
from proxy.upstream.origin import Origin, Turn
from proxy.upstream.reach import ANYWHERE, Reach

#: Bytes read of an answer that is only read to keep its connection, or for its error text.
MAX_ERROR_BODY = 64 << 10
#: Seconds such an answer may take: its socket is worth no more.
DRAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer whose body has not been read, inside its turn."""

    response: aiohttp.ClientResponse
    turn: Turn
    url: URL
    metrics: Metrics
    reach: Reach = ANYWHERE  # how near the upstream may lead from here
    stream: Stream | None = None  # through the cap on the upstream's bytes, if there is one

    async def borrow(self) -> Chunk:
        """The next bytes of the body, counted; ``b""`` at its end. Raises ``UpstreamError``.

        They are good until the next call, or the end of the turn.
        """
        most = -1 if self.stream is None else self.stream.piece
        with translated(self.origin.key.label, self.metrics):
            data = await self.turn.borrow(most)
        self.origin.count_bytes(len(data))
        if self.stream is not None and data:
            await self.stream.take(len(data))
        return data

    def more(self, most: int) -> Chunk:
        """In a thread: what has come since; see ``Incoming``. Nothing where bytes are rationed."""
        return self.turn.more(most) if self.stream is None else b""

    def settle(self, count: int) -> None:
        """So many bytes were taken by ``more``."""
        self.origin.count_bytes(count)
        self.turn.settle(count)

    async def read(self) -> bytes:
        """The same, to keep."""
        return bytes(await self.borrow())

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    @property
    def origin(self) -> Origin:
        return self.turn.origin


def next_hop(url: URL, location: str) -> URL:
    """Where a redirect from ``url`` leads. Raises ``RedirectRefused`` (D8).

    A Location that can be sent as it is stays as it is, because it may be signed. User information
    in it is dropped: it would become an Authorization header.
    """
    if not location:
        raise RedirectRefused(f"{url.host}: a redirect without Location")
    is_plain = location.isascii() and location.isprintable() and " " not in location
    try:
        target = url.join(URL(location, encoded=is_plain))
        OriginKey.of(target)
        if target.raw_user is not None or target.raw_password is not None:
            target = target.with_user(None)
    except ValueError as error:
        raise RedirectRefused(f"{url.host}: a redirect to what is no http(s) URL") from error
    if url.scheme == "https" and target.scheme != "https":
        raise RedirectRefused(f"{url.host}: a redirect from https to {target.scheme} is refused")
    return target


async def read_bounded(reply: Reply, limit: int, what: str) -> bytes:
    """The whole body, at most ``limit`` bytes. Raises ``TooLarge``."""
    length = reply.response.content_length
    if length is not None and length > limit:
        raise TooLarge(limit, f"{reply.origin.key.label}: {what} of {length} bytes")
    body = bytearray()
    while data := await reply.read():
        body += data
        if len(body) > limit:
            raise TooLarge(limit, f"{reply.origin.key.label}: {what} of more than {limit} bytes")
    return bytes(body)


async def drain(response: aiohttp.ClientResponse, patience: float = DRAIN_SECONDS) -> bytes:
    """Read what is left, so that the socket stays usable.

    The head has said what counts: a rest that is long, late or broken is left to be aborted.
    """
    body = bytearray()
    with contextlib.suppress(aiohttp.ClientError, OSError):  # TimeoutError is an OSError
        async with asyncio.timeout(patience):
            while len(body) < MAX_ERROR_BODY and (data := await response.content.readany()):
                body += data
    return bytes(body)
