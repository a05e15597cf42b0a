"""What a follower answers by itself: blobs and manifests that are held (DESIGN D12, D13).

The rule is the leader's (``pull/blobs.py``, ``pull/manifests.py``): a repository that has a link to
a digest may have it, if its bytes are held. Only that case is decided here, and that of a tag which
the leader has called fresh (``fresh.py``). No link, no bytes, another tag, a listing: the leader is
asked, whose answer may be the same hit.

Uses are told to the leader in lots, so that what followers serve is not the first to be evicted.
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
from proxy.pull.blobs import stored
from proxy.store.reading import Reading
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
        touch: Callable[[Collection[Digest]], None],
    ) -> None:
        """``memory`` is how many bytes of manifests are kept in memory."""
        self._reading = reading
        self._tags = tags
        self._touch = touch
        self._memory: LRUCache[Digest, Manifest] = LRUCache(
            memory, getsizeof=lambda manifest: len(manifest.raw)
        )
        self._used: set[Digest] = set()
        self._telling: asyncio.TimerHandle | None = None

    async def manifest(self, ask: Ask, reference: Reference) -> ManifestAnswer | None:
        """The manifest, if this repository is known to have it, it is held, and a tag is fresh."""
        digest = reference
        if isinstance(digest, Tag):
            found = self._tags.find((ask.upstream, ask.repository, str(digest)))
            if found is None:
                return None
            digest = found
        if await self._reading.linked(ask.upstream, ask.repository, digest) is None:
            return None
        manifest = self._memory.get(digest)
        if manifest is None:
            read = await self._reading.manifest(digest)
            if read is None:
                return None
            manifest = Manifest(read[1], read[0], digest)
            if len(manifest.raw) <= self._memory.maxsize:
                self._memory[digest] = manifest
        self._use(digest)
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
        lease = await self._reading.lease(digest)
        if lease is None:
            return None
        if head:
            lease.close()
            return BlobAnswer(digest, lease.size, None, CacheWord.HIT, None, lambda: None)
        self._use(digest)
        return stored(digest, lease, wanted, CacheWord.HIT)

    def _use(self, digest: Digest) -> None:
        self._used.add(digest)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_AFTER, self._tell)

    def _tell(self) -> None:
        used, self._used, self._telling = self._used, set(), None
        self._touch(used)

    async def close(self) -> None:
        """Tell what is left, and close the directory."""
        if self._telling is not None:
            self._telling.cancel()
            self._tell()
        await self._reading.close()

    def __repr__(self) -> str:
        return f"<Hits from {self._reading!r}>"
