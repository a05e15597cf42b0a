"""An upstream's answer whose body has not been read, as its turn hands it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.upstream.errors import translated
from proxy.upstream.origin import Origin, Turn
from proxy.upstream.throttle import Stream


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer whose body has not been read, inside its turn."""

    response: aiohttp.ClientResponse
    turn: Turn
    url: URL
    metrics: Metrics
    stream: Stream | None = None  # through the cap on the upstream's bytes, if there is one

    async def read(self) -> bytes:
        """The next bytes of the body, counted; ``b""`` at its end. Raises ``UpstreamError``."""
        most = -1 if self.stream is None else self.stream.piece
        with translated(self.origin.key.label, self.metrics):
            data = await self.turn.read(most)
        self.origin.count_bytes(len(data))
        if self.stream is not None and data:
            await self.stream.take(len(data))
        return data

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    @property
    def origin(self) -> Origin:
        return self.turn.origin
