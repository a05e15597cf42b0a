"""What a request asks of the pull layer, and what it gets: the values between edge and flow."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from proxy.oci.digest import Digest
from proxy.oci.errors import PullError
from proxy.oci.manifest import Manifest
from proxy.oci.ranges import Span
from proxy.pull.reader import Piece
from proxy.upstream.routing import Route


class CacheWord(StrEnum):
    """How a request was answered; the same word in headers, logs and metrics."""

    HIT = "hit"
    MISS = "miss"
    JOINED = "joined"
    PEER = "peer"
    STALE = "stale"
    REVALIDATED = "revalidated"
    NONE = "none"  # nothing to do with the cache: pings, listings, errors


@dataclass(slots=True)
class Timing:
    """Seconds spent before the answer's headers, as far as known then.

    The rest is about the question last given up, and decides what the client is told: whether any
    was ``asked``, was still waiting for its turn, and what its last try had failed with.
    """

    queue: float = 0.0
    upstream: float = 0.0
    asked: bool = False
    is_queued: bool = False
    failure: PullError | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One client's request: where it goes, for whom, and since when: the loop's time, in seconds,
    at which its head had been read. ``is_patient``: its client waits for a body as long as it
    takes, and does not come back when that ends early."""

    route: Route
    client: str
    arrived: float
    is_patient: bool = False
    timing: Timing = field(default_factory=Timing)

    @property
    def upstream(self) -> str:
        return self.route.upstream.name

    @property
    def repository(self) -> str:
        """The repository's name at the upstream."""
        return self.route.repository


@dataclass(frozen=True, slots=True)
class ManifestAnswer:
    """A manifest, or for a HEAD that needed no body only what is known of it."""

    digest: Digest
    media_type: str
    size: int
    cache: CacheWord
    manifest: Manifest | None = None
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class BlobAnswer:
    """A blob or a part of it. ``pieces`` must be closed, and ``close`` called, in any case.

    ``size`` is the whole blob's, ``None`` if nobody knows it yet; ``span`` the part that was asked
    for, ``None`` for all of it. ``is_at_hand``: the first of ``pieces`` needs no waiting, so the
    headers may leave with it.
    """

    digest: Digest
    size: int | None
    span: Span | None
    cache: CacheWord
    pieces: AsyncGenerator[Piece, None] | None
    close: Callable[[], None]
    warning: str | None = None
    is_at_hand: bool = False
