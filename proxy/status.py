"""What `/api/v1/status` says of the parts of the process that leads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.pull.serve import Puller
from proxy.store.store import Store
from proxy.upstream.mirrored import MirroredClient
from proxy.upstream.origins import Origins
from proxy.wiring import url_states


def status_of(
    origins: Origins, clients: Mapping[str, MirroredClient], puller: Puller, store: Store
) -> dict[str, Any]:
    """Upstreams, URLs, queue, flights, cache."""
    held = store.state()
    return {
        "upstreams": origins.details(),
        "urls": url_states(clients),
        "queue": {gate.upstream: dict(gate.depth) for gate in origins.states()},
        "flights": [
            {
                "digest": str(flight.digest),
                "state": flight.state.value,
                "received": flight.received,
                "size": flight.size,
                "readers": len(flight.readers),
            }
            for flight in puller.flights.all()
        ],
        "questions": puller.questions,
        "cache": {"bytes": held.bytes, "limit": held.limit, "blobs": held.blobs},
    }
