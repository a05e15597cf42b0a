"""Manifests that are not held: asked of the upstream, or of a node of the fleet, once for all.

The bytes of a manifest are kept by digest, like any blob, and the latest also in memory. What a tag
is, and for how long that is believed, is the business of ``manifests.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cachetools import LRUCache

from proxy.fleet.tags import Told
from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import DigestMismatch, ManifestInvalid, PullError, StoreFailed
from proxy.oci.manifest import Manifest, parse_manifest
from proxy.oci.paths import Kind
from proxy.pull.asking import Pause, Questions
from proxy.pull.asks import Ask, CacheWord, ManifestAnswer
from proxy.pull.hearsay import DIGEST_TTL, Alone, Word
from proxy.pull.permissions import Permissions
from proxy.pull.tags import TagBook, TagKey
from proxy.store.blobs import StoreFull
from proxy.store.store import Store
from proxy.upstream.client import Head
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.turns import Ticket

#: Manifests up to this many bytes are parsed on the loop.
SMALL = 256 << 10


@dataclass(frozen=True, slots=True)
class Fetched:
    """A manifest that was not held; ``is_of_peer``: another node gave it."""

    manifest: Manifest
    is_of_peer: bool = False


class Fetching:
    """Gets manifests, of all upstreams."""

    def __init__(
        self,
        *,
        store: Store,
        clients: Mapping[str, MirroredClient],
        permissions: Permissions,
        book: TagBook,
        hearsay: Alone,
        tag_ttl: float,
        memory: int,
        metrics: Metrics,
        log: Logger,
        clock: Callable[[], float],
        pause: Pause,
        patience: float,
    ) -> None:
        """``memory`` in bytes; ``tag_ttl``: seconds that a tag is believed."""
        self._store = store
        self._clients = clients
        self._permissions = permissions
        self._book = book
        self._hearsay = hearsay
        self._tag_ttl = tag_ttl
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._memory: LRUCache[Digest, Manifest] = LRUCache(
            memory, getsizeof=lambda manifest: len(manifest.raw)
        )
        self._fetches: Questions[Fetched] = Questions(log=log, pause=pause, patience=patience)
        self._heads: Questions[Head] = Questions(log=log, pause=pause, patience=patience)

    async def held(self, digest: Digest) -> Manifest | None:
        """The manifest from memory or store, whoever may have it."""
        manifest = self._memory.get(digest)
        if manifest is not None:
            return manifest
        if self._store.size_of(digest) is None:
            return None
        raw, media_type = await self._store.read(digest), await self._store.manifest_type(digest)
        if raw is None or media_type is None:
            return None
        manifest = await _read(raw, media_type, digest)
        self._keep(manifest)
        return manifest

    async def believe(self, ask: Ask, key: TagKey, told: Told) -> Digest:
        """What another node was told of a tag is what this one would have been told then."""
        await self._permissions.grant(ask, told.digest, told.size)
        await self._book.confirm(key, told.digest, age=told.age)
        return told.digest

    def tell(self, word: Word, found: Head, asked: float) -> None:
        if found.digest is not None:
            age = self._clock() - asked
            word.tell(found.digest, found.media_type or "", found.size, age=age)

    def in_memory(self, digest: Digest) -> Manifest | None:
        """The manifest, if it needs no look into the store."""
        return self._memory.get(digest)

    def _keep(self, manifest: Manifest) -> None:
        if len(manifest.raw) <= self._memory.maxsize:
            self._memory[manifest.digest] = manifest

    async def head(
        self, ask: Ask, reference: str, expected: Digest | None, *, named: bool
    ) -> ManifestAnswer | None:
        """What a HEAD says, if it says enough; ``None`` if the bytes are needed for that."""
        client = self._clients[ask.upstream]
        key = (ask.upstream, ask.repository, reference)
        ttl = self._tag_ttl if expected is None else 0.0  # of a digest only its bytes are news

        async def head(ticket: Ticket) -> Head:
            async with self._hearsay.about(key, ttl) as word:
                if word.told is not None:
                    await self.believe(ask, key, word.told)
                    return Head(word.told.digest, word.told.media_type, word.told.size)
                asked = self._clock()
                found = await client.head_manifest(ask.repository, reference, ticket)
                self.tell(word, found, asked)
                if expected is None and found.digest is not None and _says_enough(found):
                    await self._book.confirm(key, found.digest, asked=asked)
                return found

        try:
            found, joined = await self._heads.ask(ask, key, head, named=named)
        except PullError as error:
            if not named:
                self._permissions.remember(ask, Kind.MANIFEST, reference, error)
            raise
        if found.digest is None or found.size is None or not found.media_type:
            return None
        if expected is not None and found.digest != expected:
            return None  # another algorithm's name for it, or a lie: the bytes will tell
        await self._permissions.grant(ask, found.digest, found.size)
        word = self._word(joined)
        return ManifestAnswer(found.digest, found.media_type, found.size, word)

    async def fetch(
        self, ask: Ask, reference: str, expected: Digest | None, *, named: bool
    ) -> tuple[Manifest, CacheWord]:
        """GET it, once for everybody who waits."""

        async def fetch(ticket: Ticket) -> Fetched:
            return await self.get(ask, reference, expected, ticket)

        key = (ask.upstream, ask.repository, reference)
        try:
            fetched, joined = await self._fetches.ask(ask, key, fetch, named=named)
        except PullError as error:
            if not named:
                self._permissions.remember(ask, Kind.MANIFEST, reference, error)
            raise
        return fetched.manifest, self._word(joined, is_of_peer=fetched.is_of_peer)

    def _word(self, joined: bool, *, is_of_peer: bool = False) -> CacheWord:
        if not joined:
            return CacheWord.PEER if is_of_peer else CacheWord.MISS
        self._metrics.coalesced.labels("manifest").inc()
        return CacheWord.JOINED

    async def get(
        self,
        ask: Ask,
        reference: str,
        expected: Digest | None,
        ticket: Ticket,
        *,
        listen: bool = True,
    ) -> Fetched:
        """GET; verify, keep, link. From another node, if one has it."""
        key, asked = (ask.upstream, ask.repository, reference), self._clock()
        ttl = self._ttl(expected)
        async with self._hearsay.about(key, ttl, listen=listen, has_bytes=True) as word:
            told = word.told
            if told is not None and expected not in (None, told.digest):
                told = None  # whatever another node says, a digest is only itself
            if told is not None and expected is None:
                await self.believe(ask, key, told)
            if told is not None and (manifest := await self._of_peer(told)) is not None:
                await self._admit(ask, manifest)
                return Fetched(manifest, is_of_peer=True)
            if told is None or expected is not None:
                manifest = await self._of_upstream(ask, reference, expected, ticket)
                await self._admit(ask, manifest)
                if expected is None:
                    await self._book.confirm(key, manifest.digest, asked=asked)
                age = self._clock() - asked
                word.tell(manifest.digest, manifest.media_type, len(manifest.raw), age=age)
                return Fetched(manifest)
        # The tag is known, and who told it has no bytes: a digest is a question of its own.
        return await self.get(ask, str(told.digest), told.digest, ticket)

    def _ttl(self, digest: Digest | None) -> float:
        """Seconds for which the fleet may be told what a reference is, a digest or a tag."""
        return self._tag_ttl if digest is None else DIGEST_TTL

    async def _of_peer(self, told: Told) -> Manifest | None:
        raw = await self._hearsay.manifest(told)
        if raw is None:
            return None
        try:
            return await _read(raw, told.media_type, told.digest)
        except (DigestMismatch, ManifestInvalid) as error:
            self._metrics.digest_mismatch.labels("peer").inc()
            self._log.warning("peer_lied", digest=str(told.digest), cause=str(error))
            return None

    async def _of_upstream(
        self, ask: Ask, reference: str, expected: Digest | None, ticket: Ticket
    ) -> Manifest:
        client = self._clients[ask.upstream]
        raw, media_type, claimed = await client.manifest(ask.repository, reference, ticket)
        try:
            return await _read(raw, media_type, expected or claimed)
        except DigestMismatch:
            self._metrics.digest_mismatch.labels("upstream").inc()
            raise

    async def _admit(self, ask: Ask, manifest: Manifest) -> None:
        """Keep it, and let its repository have what it names. A full disk costs only the copy."""
        self._keep(manifest)
        try:
            await self._store.put_manifest(manifest)
        except (StoreFailed, StoreFull) as error:
            self._log.warning("manifest_not_kept", digest=str(manifest.digest), cause=str(error))
        links = [(child.digest, child.size) for child in manifest.children]
        links.append((manifest.digest, len(manifest.raw)))
        await self._store.link(ask.upstream, ask.repository, links)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._heads.waiting + self._fetches.waiting

    async def close(self) -> None:
        """Stop what is under way."""
        await self._heads.close()
        await self._fetches.close()

    def __repr__(self) -> str:
        return f"<Fetching {self.waiting} waiting, {len(self._memory)} in memory>"


def _says_enough(head: Head) -> bool:
    """Can a client's HEAD be answered with it?"""
    return head.digest is not None and head.size is not None and bool(head.media_type)


async def _read(raw: bytes, media_type: str, expected: Digest | None) -> Manifest:
    """Check and parse a manifest. Raises ``DigestMismatch``, ``ManifestInvalid``."""

    def read() -> Manifest:
        actual = Digest.of(raw, expected.algorithm if expected else "sha256")
        if expected is not None and actual != expected:
            raise DigestMismatch(expected, actual)
        return parse_manifest(raw, media_type, actual)

    # 8 MiB of JSON take a tenth of a second; nearly all manifests have a few KiB.
    return read() if len(raw) <= SMALL else await asyncio.to_thread(read)
