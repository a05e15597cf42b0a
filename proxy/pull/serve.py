"""The pull layer's front: one object that answers every kind of request (DESIGN §4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from urllib.parse import urlencode

from proxy.oci.digest import Digest
from proxy.oci.errors import InternalError
from proxy.oci.manifest import Manifest
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Reference, Tag
from proxy.pull.asking import Questions
from proxy.pull.asks import Ask, BlobAnswer, CacheWord, ManifestAnswer
from proxy.pull.at_hand import AtHand
from proxy.pull.blobs import Blobs
from proxy.pull.deadlines import Waits
from proxy.pull.flight import Flights
from proxy.pull.manifests import Checked, Manifests
from proxy.pull.permissions import Permissions
from proxy.pull.prefetch import Prefetch
from proxy.store.store import Store
from proxy.upstream.client import Page
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.turns import Ticket


class Answerer(Protocol):
    """What the listeners ask: a ``Puller``, or whatever stands for one in another process."""

    async def manifest(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer: ...

    async def refresh(self, ask: Ask, tag: Tag) -> Checked: ...

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer: ...

    async def listing(
        self, ask: Ask, kind: Kind, tail: str, query: Sequence[tuple[str, str]]
    ) -> Page: ...


class Puller:
    """Answers requests; owns the flights and everything else that is under way."""

    def __init__(
        self,
        *,
        clients: Mapping[str, MirroredClient],
        manifests: Manifests,
        blobs: Blobs,
        flights: Flights,
        permissions: Permissions,
        listings: Questions[Page],
        waits: Waits,
        store: Store,
        prefetch: Prefetch | None = None,
    ) -> None:
        self._prefetch = prefetch
        self._clients = clients
        self._manifests = manifests
        self._blobs = blobs
        self._permissions = permissions
        self._listings = listings
        self._waits = waits
        self.flights = flights
        self._store = store
        self.at_hand = AtHand(store, manifests, blobs, prefetch)

    async def manifest(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer:
        """GET or HEAD of a manifest, answered before the manifest deadline. Raises PullError."""
        work = self._manifests.answer(ask, reference, head=head)
        answer = await self._waits.short(ask, work)
        # A stale answer says that the upstream is in no state to be asked for more.
        is_useful = not head and answer.cache is not CacheWord.STALE
        if self._prefetch is not None and is_useful and answer.manifest is not None:
            self._prefetch.begin(ask.upstream, ask.repository, answer.manifest)
        return answer

    async def alone(self, ask: Ask, digest: Digest) -> Manifest:
        """GET of a manifest by somebody who sees to its blobs himself. Raises PullError."""
        answer = await self._waits.short(ask, self._manifests.answer(ask, digest, head=False))
        if answer.manifest is None:
            raise InternalError("a manifest without its bytes")
        return answer.manifest

    @property
    def wants_pulls(self) -> bool:
        """Is it of use to be told of hits that another process answers?"""
        return self._prefetch is not None

    async def pulled(self, upstream: str, repository: str, digest: Digest) -> None:
        """Another process has answered this manifest: a hit like one here. Raises PullError."""
        if self._prefetch is None:
            return
        manifest = await self._manifests.held(digest)
        linked = await self._store.linked(upstream, repository, digest)
        if manifest is not None and linked is not None:
            self._prefetch.begin(upstream, repository, manifest)

    def fresh_for(self, ask: Ask, tag: Tag, digest: Digest) -> float:
        """Seconds for which ``tag`` is ``digest`` without a question."""
        return self._manifests.fresh_for(ask, tag, digest)

    async def refresh(self, ask: Ask, tag: Tag) -> Checked:
        """Ask the upstream what the tag is now, whatever is known. Raises PullError."""
        return await self._waits.short(ask, self._manifests.refresh(ask, tag))

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer:
        """GET or HEAD of a blob. The answer must be closed. Raises PullError."""
        if head:
            return await self._waits.short(ask, self._blobs.head(ask, digest))
        return await self._blobs.answer(ask, digest, wanted)

    async def listing(
        self, ask: Ask, kind: Kind, tail: str, query: Sequence[tuple[str, str]]
    ) -> Page:
        """A page of tags or referrers, passed through. Raises PullError."""
        client = self._clients[ask.upstream]

        async def page(ticket: Ticket) -> Page:
            return await client.page(kind, ask.repository, tail, query, ticket)

        key = (ask.upstream, ask.repository, tail, urlencode(query))
        work = self._listings.ask(ask, key, page)
        found, _ = await self._waits.short(ask, work)
        return found

    @property
    def questions(self) -> int:
        """Requests that wait for a short answer of an upstream: a manifest, a HEAD, a listing."""
        return self._manifests.waiting + self._permissions.waiting + self._listings.waiting

    def drain(self) -> None:
        """End what nobody waits for."""
        if self._prefetch is not None:
            self._prefetch.drain()

    async def close(self) -> None:
        """Stop everything under way; nothing is left running."""
        await self.flights.close()
        await self._blobs.close()
        await self._manifests.close()
        await self._listings.close()
        await self._permissions.close()
