"""Who may have what: permission and denial by (upstream, repository), bytes by digest (DESIGN D12).

A digest may be served through a repository that is known to have it: the upstream answered 200
through it, or a manifest fetched through it names the digest. Bytes that are held because another
repository brought them must first be *proved* through this one. Denials and "not found" are kept
for a few seconds, so that a client that insists does not become the upstream's problem; never for a
digest that a manifest names, because then the blob is only late (eventual consistency).

A link, once seen, is believed for as long as it is used: what a repository had it keeps, as an
upstream keeps its blobs while a manifest names them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cachetools import TTLCache

from proxy.oci.digest import Digest
from proxy.oci.errors import Denied, NotFound, PullError
from proxy.oci.paths import Kind
from proxy.pull.asking import Key, Questions
from proxy.pull.asks import Ask
from proxy.store.store import Link, Store
from proxy.upstream.client import Head
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.turns import Ticket

#: Denials kept at most.
MAX_DENIALS = 16_384


class Permissions:
    """Links that are known, proofs under way, refusals that are remembered."""

    def __init__(
        self,
        store: Store,
        *,
        proofs: Questions[Head],
        negative_ttl: float,
        clock: Callable[[], float],
    ) -> None:
        """``negative_ttl`` in seconds of ``clock``: how long a refusal is remembered."""
        self._store = store
        self._proofs = proofs
        self._refusals: TTLCache[Key, PullError] = TTLCache(MAX_DENIALS, negative_ttl, timer=clock)

    async def link(self, ask: Ask, digest: Digest) -> Link | None:
        """The repository's link to ``digest``, if it is known to have it."""
        return await self._store.linked(ask.upstream, ask.repository, digest)

    async def grant(self, ask: Ask, digest: Digest, size: int | None) -> None:
        """The repository has been seen to have ``digest``."""
        await self._store.link(ask.upstream, ask.repository, [(digest, size)])

    def check(self, ask: Ask, kind: Kind, reference: str) -> None:
        """Raise the refusal that is remembered for this reference, if there is one.

        By kind, because a registry has no blob by a manifest's digest, and says so.
        """
        error = self._refusals.get((ask.upstream, ask.repository, kind, reference))
        if error is not None:
            raise error.bare()

    def remember(self, ask: Ask, kind: Kind, reference: str, error: PullError) -> None:
        """Keep a refusal for a while, if it is one."""
        if isinstance(error, Denied | NotFound):
            self._refusals[ask.upstream, ask.repository, kind, reference] = error.bare()

    def forget(self, ask: Ask) -> None:
        """Whatever was refused in this repository may be asked for again."""
        for key in [key for key in self._refusals if key[:2] == (ask.upstream, ask.repository)]:
            self._refusals.pop(key, None)

    async def prove_blob(
        self, ask: Ask, digest: Digest, client: MirroredClient, *, named: bool = False
    ) -> Link:
        """Ask the upstream whether this repository has the blob. Raises its refusal.

        ``named`` says that a manifest of this repository names it.
        """

        async def head(ticket: Ticket) -> Head:
            return await client.head_blob(ask.repository, digest, ticket)

        return await self._prove(ask, Kind.BLOB, digest, head, named=named)

    async def prove_manifest(self, ask: Ask, digest: Digest, client: MirroredClient) -> Link:
        """The same for a manifest: a HEAD, which Docker Hub does not count."""

        async def head(ticket: Ticket) -> Head:
            return await client.head_manifest(ask.repository, str(digest), ticket)

        return await self._prove(ask, Kind.MANIFEST, digest, head, named=False)

    async def _prove(
        self,
        ask: Ask,
        kind: Kind,
        digest: Digest,
        head: Callable[[Ticket], Awaitable[Head]],
        *,
        named: bool,
    ) -> Link:
        key = (ask.upstream, ask.repository, kind, str(digest))
        if not named:
            self.check(ask, kind, str(digest))
        try:
            found, _ = await self._proofs.ask(ask, key, head, named=named)
        except PullError as error:
            if not named:
                self.remember(ask, kind, str(digest), error)
            raise
        await self.grant(ask, digest, found.size)
        return Link(found.size)

    @property
    def waiting(self) -> int:
        """Requests that wait for a proof."""
        return self._proofs.waiting

    async def close(self) -> None:
        await self._proofs.close()
