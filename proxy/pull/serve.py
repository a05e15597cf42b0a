"""The pull layer's front: one object that answers every kind of request (DESIGN §4)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from proxy.oci.digest import Digest
from proxy.oci.errors import QueueTimeout
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Reference
from proxy.pull.asks import Ask, BlobAnswer, ManifestAnswer
from proxy.pull.blobs import COME_AGAIN, Blobs, Deadlines
from proxy.pull.flight import Flights
from proxy.pull.manifests import Manifests
from proxy.pull.permissions import Permissions
from proxy.upstream.client import Page, UpstreamClient
from proxy.upstream.turns import Ticket, TurnClass

T = TypeVar("T")


class Puller:
    """Answers requests; owns the flights and everything else that is under way."""

    def __init__(
        self,
        *,
        clients: Mapping[str, UpstreamClient],
        manifests: Manifests,
        blobs: Blobs,
        flights: Flights,
        permissions: Permissions,
        deadlines: Deadlines,
    ) -> None:
        self._clients = clients
        self._manifests = manifests
        self._blobs = blobs
        self._permissions = permissions
        self._deadlines = deadlines
        self.flights = flights

    async def manifest(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer:
        """GET or HEAD of a manifest, answered before the manifest deadline. Raises PullError."""
        return await self._in_time(ask, self._manifests.answer(ask, reference, head=head))

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer:
        """GET or HEAD of a blob. The answer must be closed. Raises PullError."""
        if head:
            return await self._in_time(ask, self._blobs.head(ask, digest))
        return await self._blobs.answer(ask, digest, wanted)

    async def listing(
        self, ask: Ask, kind: Kind, tail: str, query: Sequence[tuple[str, str]]
    ) -> Page:
        """A page of tags or referrers, passed through. Raises PullError."""
        ticket = Ticket(TurnClass.METADATA, [ask.client])
        client = self._clients[ask.upstream]
        return await self._in_time(ask, client.page(kind, ask.repository, tail, query, ticket))

    async def _in_time(self, ask: Ask, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(ask.arrived + self._deadlines.manifest):
                return await work
        except TimeoutError:
            raise QueueTimeout(COME_AGAIN) from None
        finally:
            ask.timing.upstream = loop.time() - ask.arrived

    async def close(self) -> None:
        """Stop everything under way; nothing is left running."""
        await self.flights.close()
        await self._manifests.close()
        await self._permissions.close()
