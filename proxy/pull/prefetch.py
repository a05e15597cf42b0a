"""Blobs of an image are fetched when its manifest is pulled, before its client asks for them.

Clients ask for a few layers at a time (containerd for three), and for the config first. With
``cache.prefetch = "manifest"`` everything that a pulled manifest names begins at once, as flights
that nobody reads (flight.py): they stand in the last class of the queue, so every pull that
somebody waits for goes first, and whoever asks for one of them joins it, and it stands where his
would.

What is fetched is the image that was asked for: an index names images of other platforms, so it
brings nothing. Bytes come through the repository whose manifest names them (DESIGN D12).

A manifest that is a hit brings what is missing too: layers were evicted, or the first pull of them
was cut. So do the hits that the hot path answers (``at_hand.py``: it looks anew when a blob has
gone, and every moment besides), and those of followers, which tell the leader (``team/``).

A prefetch is a guess, and costs nobody anything who knows what he wants. It takes at most half of
the room that is not in use, and no blob a second time within ``AGAIN`` seconds, however that went;
its failure is a line in the log. With the drain those that nobody has joined end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from cachetools import TTLCache

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor, Manifest
from proxy.pull.flight import Flight, Flights
from proxy.store.store import Store
from proxy.upstream.mirrored import MirroredClient

#: Flights that nobody has asked for, at most; they stand in the queue like all others.
MAX_FLIGHTS = 256
#: Seconds in which no blob is fetched so twice.
AGAIN = 60.0
#: Blobs that are remembered for that.
MEMORY = 16_384


def chosen(
    children: Iterable[Descriptor], is_there: Callable[[Digest], bool], room: int, most: int
) -> list[Descriptor]:
    """What to fetch of these, in order: at most ``most``, and as many as ``room`` bytes hold."""
    found: list[Descriptor] = []
    for child in children:
        if len(found) == most:
            break
        if child.size <= room and not is_there(child.digest):
            found.append(child)
            room -= child.size
    return found


class Prefetch:
    """Begins flights for what a manifest names."""

    def __init__(
        self,
        *,
        store: Store,
        flights: Flights,
        clients: Mapping[str, MirroredClient],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._flights = flights
        self._clients = clients
        self._metrics = metrics
        self._begun: set[Flight] = set()
        self._lately: TTLCache[Digest, None] = TTLCache(MEMORY, AGAIN, timer=clock)
        self._is_draining = False

    def begin(self, upstream: str, repository: str, manifest: Manifest) -> None:
        """Fetch what is missing of an image that was pulled through this repository."""
        if self._is_draining or manifest.is_index:
            return
        self._begun = {flight for flight in self._begun if not flight.is_over}
        most, room = MAX_FLIGHTS - len(self._begun), self._store.state().spare // 2
        client = self._clients[upstream]
        for child in chosen(manifest.children, self._is_there, room, most):
            source = client.blob(repository, child.digest)
            flight = self._flights.begin(source, child.size)
            if flight is not None:
                self._lately[child.digest] = None
                self._begun.add(flight)
                self._metrics.prefetches.inc()

    def _is_there(self, digest: Digest) -> bool:
        """Is it held, on its way, or was it tried a moment ago?"""
        return (
            self._store.size_of(digest) is not None
            or self._flights.find(digest) is not None
            or digest in self._lately
        )

    def drain(self) -> None:
        """Begin nothing any more, and end what nobody has asked for."""
        self._is_draining = True
        for flight in self._begun:
            flight.stop_unread()

    def __repr__(self) -> str:
        return f"<Prefetch {len(self._begun)} begun>"
