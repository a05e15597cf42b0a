"""Hits that can be told in advance: what would be answered out of memory, without asking anybody.

The same questions as in ``manifests.py`` and ``blobs.py`` (is the tag fresh, is it held, may this
repository have it), answered without an await and from memory alone. So what comes out is the truth
of one moment, and the marks in it (``store/marks.py``) hold for as long as it stays true. A tag's
time is up without anybody doing anything: that is for the holder of the hit to look at.

Whatever would need the disk, the index or an upstream is no hit here.

A hit that is found counts as a use wherever an answer would. Where pulled manifests bring their
blobs (``prefetch.py``), a GET of one begins that too, and is good until any blob goes, for that may
be a layer of its own: whoever asks next looks anew and begins anew. What else may have become of a
layer (its fetch was cut) is found when the holder of the hit renews it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from proxy.oci.digest import Digest
from proxy.oci.reference import Reference
from proxy.pull.blobs import Blobs
from proxy.pull.manifests import Manifests
from proxy.pull.prefetch import Prefetch
from proxy.pull.tags import Fresh
from proxy.store.marks import Mark
from proxy.store.store import Store


@dataclass(frozen=True, slots=True)
class Hit:
    """An answer, good while ``held``, ``linked`` and the name hold; see ``Fresh`` for the name.

    ``media_type`` None: a blob. ``body`` is all ``size`` bytes; empty if only HEAD was asked.
    """

    name: Fresh
    size: int
    body: bytes
    held: Mark
    linked: Mark
    media_type: str | None = None

    @property
    def digest(self) -> Digest:
        return self.name.digest


class Finder(Protocol):
    """Looks for hits: ``AtHand``, or whatever stands for one in another process."""

    def manifest(
        self, upstream: str, repository: str, reference: Reference, *, head: bool
    ) -> Hit | None: ...

    def blob(self, upstream: str, repository: str, digest: Digest, *, head: bool) -> Hit | None: ...


class AtHand:
    """Looks for hits."""

    def __init__(
        self,
        store: Store,
        manifests: Manifests,
        blobs: Blobs,
        prefetch: Prefetch | None = None,
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._blobs = blobs
        self._prefetch = prefetch

    def manifest(
        self, upstream: str, repository: str, reference: Reference, *, head: bool
    ) -> Hit | None:
        """The manifest, if a GET of it is a hit."""
        name = self._manifests.fresh(upstream, repository, reference)
        manifest = None if name is None else self._manifests.in_memory(name.digest)
        if name is None or manifest is None:
            return None
        held = self._store.held(name.digest)
        linked = self._store.known_link(upstream, repository, name.digest)
        if held is None or linked is None:
            return None
        self._store.touch(name.digest)
        if self._prefetch is not None and not head:
            self._prefetch.begin(upstream, repository, manifest)
            held = self._store.none_gone()  # so it is held, too
        return Hit(name, len(manifest.raw), manifest.raw, held, linked, manifest.media_type)

    def blob(self, upstream: str, repository: str, digest: Digest, *, head: bool) -> Hit | None:
        """The blob, if it is small and a GET of it is a hit; of any size for a HEAD."""
        size, held = self._store.size_of(digest), self._store.held(digest)
        linked = self._store.known_link(upstream, repository, digest)
        if size is None or held is None or linked is None:
            return None
        if head:  # no use, as everywhere
            return Hit(Fresh(digest), size, b"", held, linked)
        body = self._blobs.in_memory(digest)
        if body is None:
            return None
        self._store.touch(digest)
        return Hit(Fresh(digest), size, body, held, linked)
