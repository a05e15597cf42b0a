"""What a follower answers by itself: blobs and manifests that are held (DESIGN D12, D13).

The rule is the leader's (``pull/blobs.py``, ``pull/manifests.py``): a repository that has a link to
a digest may have it, if its bytes are held. Only that case is decided here, and that of a tag which
the leader has called fresh (``fresh.py``). No link, no bytes, another tag, a listing: the leader is
asked, whose answer may be the same hit.

What is answered without a look at the disk (manifests, small blobs, and all of the hot path) rests
on what the leader has not taken back (``store/reading.py``, ``fresh.py``). It says so when that
changes, so an answer here may be as much too late as that word is on its way; and without a leader
nothing is answered so.

Uses are told to the leader in lots, so that what followers serve is not the first to be evicted;
and if it fetches ahead, which manifests were pulled, so that it brings what is missing of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from cachetools import LRUCache

from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Reference, Tag
from proxy.pull.asks import Ask, BlobAnswer, CacheWord, ManifestAnswer
from proxy.pull.at_hand import Finder, Hit
from proxy.pull.blobs import SMALL, from_memory, stored
from proxy.pull.tags import Fresh
from proxy.store.reading import Reading
from proxy.store.store import LinkKey
from proxy.team.fresh import FreshTags

#: Seconds in which uses are gathered before they are told.
TELL_AFTER = 1.0


class Hits:
    """Hits out of a directory that the leader writes."""

    def __init__(
        self,
        reading: Reading,
        *,
        tags: FreshTags,
        memory: int,
        blob_memory: int = 0,
        touch: Callable[[Collection[Digest]], None],
        pulled: Callable[[Collection[LinkKey]], None] | None = None,
    ) -> None:
        """``memory`` and ``blob_memory`` are how many bytes of manifests and of small blobs are
        kept in memory; ``pulled`` is told of the manifests that were not only asked about."""
        self._reading = reading
        self._tags = tags
        self._touch = touch
        self._tell_pulled = pulled
        self._memory: LRUCache[Digest, Manifest] = LRUCache(
            memory, getsizeof=lambda manifest: len(manifest.raw)
        )
        # Both are behind the reading: what it does not hold is not answered from here.
        self._blobs: LRUCache[Digest, bytes] = LRUCache(blob_memory, getsizeof=len)
        self.at_hand: Finder = _AtHand(self)
        self._used: set[Digest] = set()
        self._pulled: set[LinkKey] = set()
        self._telling: asyncio.TimerHandle | None = None

    async def manifest(
        self, ask: Ask, reference: Reference, *, head: bool
    ) -> ManifestAnswer | None:
        """The manifest, if this repository is known to have it, it is held, and a tag is fresh."""
        digest = reference
        if isinstance(digest, Tag):
            found = self._tags.find((ask.upstream, ask.repository, str(digest)))
            if found is None:
                return None
            digest = found.digest
        if await self._reading.linked(ask.upstream, ask.repository, digest) is None:
            return None
        manifest = self._memory.get(digest)
        if manifest is None or self._reading.size_of(digest) is None:
            read = await self._reading.manifest(digest)
            if read is None:
                return None
            manifest = Manifest(read[1], read[0], digest)
            if len(manifest.raw) <= self._memory.maxsize:
                self._memory[digest] = manifest
        self._use_manifest(ask.upstream, ask.repository, digest, head=head)
        return ManifestAnswer(
            digest, manifest.media_type, len(manifest.raw), CacheWord.HIT, manifest
        )

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer | None:
        """The blob, if this repository is known to have it and it is held. Raises
        ``RangeNotSatisfiable``."""
        if await self._reading.linked(ask.upstream, ask.repository, digest) is None:
            return None
        data = None if head else await self._small(digest)
        if data is not None:
            self._use(digest)
            return from_memory(digest, data, wanted, CacheWord.HIT)
        lease = await self._reading.lease(digest)
        if lease is None:
            return None
        if head:
            lease.close()
            return BlobAnswer(digest, lease.size, None, CacheWord.HIT, None, lambda: None)
        self._use(digest)
        return stored(digest, lease, wanted, CacheWord.HIT)

    async def _small(self, digest: Digest) -> bytes | None:
        """A small blob that is held; None for all others."""
        size = await self._reading.size(digest)
        if size is None or size > min(SMALL, self._blobs.maxsize):
            return None
        known = self._reading.size_of(digest) is not None
        data = self._blobs.get(digest) if known else None
        if data is None and (data := await self._reading.read(digest)) is not None:
            self._blobs[digest] = data
        return data

    def manifest_at_hand(
        self, upstream: str, repository: str, reference: Reference, *, head: bool
    ) -> Hit | None:
        """The manifest, if a GET of it is a hit out of memory."""
        name: Fresh | None
        if isinstance(reference, Tag):
            name = self._tags.find((upstream, repository, str(reference)))
        else:
            name = Fresh(reference)
        manifest = None if name is None else self._memory.get(name.digest)
        if name is None or manifest is None:
            return None
        held = self._reading.held(name.digest)
        linked = self._reading.known_link(upstream, repository, name.digest)
        if held is None or linked is None:
            return None
        self._use_manifest(upstream, repository, name.digest, head=head)
        return Hit(name, len(manifest.raw), manifest.raw, held, linked, manifest.media_type)

    def blob_at_hand(
        self, upstream: str, repository: str, digest: Digest, *, head: bool
    ) -> Hit | None:
        """The blob, if it is small and a GET of it is a hit; of any size for a HEAD."""
        size, held = self._reading.size_of(digest), self._reading.held(digest)
        linked = self._reading.known_link(upstream, repository, digest)
        if size is None or held is None or linked is None:
            return None
        if head:  # no use, as everywhere
            return Hit(Fresh(digest), size, b"", held, linked)
        body = self._blobs.get(digest)
        if body is None:
            return None
        self._use(digest)
        return Hit(Fresh(digest), size, body, held, linked)

    def _use_manifest(self, upstream: str, repository: str, digest: Digest, *, head: bool) -> None:
        self._use(digest)
        if self._tell_pulled is not None and not head:
            self._pulled.add((upstream, repository, digest))

    def _use(self, digest: Digest) -> None:
        self._used.add(digest)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_AFTER, self._tell)

    def _tell(self) -> None:
        used, self._used, self._telling = self._used, set(), None
        self._touch(used)
        pulled, self._pulled = self._pulled, set()
        if self._tell_pulled is not None and pulled:
            self._tell_pulled(pulled)

    async def close(self) -> None:
        """Tell what is left, and close the directory."""
        if self._telling is not None:
            self._telling.cancel()
            self._tell()
        await self._reading.close()

    def __repr__(self) -> str:
        return f"<Hits from {self._reading!r}>"


class _AtHand:
    """What of these hits needs no await."""

    def __init__(self, hits: Hits) -> None:
        self.manifest = hits.manifest_at_hand
        self.blob = hits.blob_at_hand
