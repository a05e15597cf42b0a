"""All stripes that this node has for others: of flights under way, else of stored blobs."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from proxy.fleet.protocol import StripeAsk
from proxy.oci.digest import Digest
from proxy.oci.errors import StoreFailed
from proxy.pull.flight import Flights
from proxy.pull.giving import Blobs, OpenStripe, StoredShelf


class FleetShelf:
    """What the listener for peers gives from."""

    def __init__(
        self, flights: Flights, store: Blobs, *, may_share: Callable[[Digest], Awaitable[bool]]
    ) -> None:
        """``may_share``: may other nodes have this stored blob? What a flight shares they may."""
        self._flights = flights
        self._stored = StoredShelf(store, may_share=may_share)

    async def open(self, ask: StripeAsk) -> OpenStripe:
        """See ``Shelf``."""
        flight = self._flights.find(ask.digest)
        if flight is not None and flight.sharing is not None and not flight.is_stored:
            # A flight that has just landed has no file to lend any more, but the store has.
            with contextlib.suppress(StoreFailed):
                return await flight.sharing.open(ask.stripe, ask.rank)
        return await self._stored.open(ask)

    async def close(self) -> None:
        """Nothing is hashed any more."""
        await self._stored.close()

    def __repr__(self) -> str:
        return f"<FleetShelf {self._stored!r}>"
