"""The metrics of what goes from node to node, beside those that every proxy has."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from proxy.observe.metrics import Metrics


class PeerMetrics:
    """Registers with the proxy's own, once."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self.requests = Counter(
            "pullpool_peer_requests_total",
            "Stripes that other nodes asked for, by status",
            ("code",),
            registry=registry,
        )
        self.takes = Counter(
            "pullpool_peer_takes_total",
            "Stripes that other nodes were asked for, by outcome",
            ("outcome",),
            registry=registry,
        )
        self.bytes = Counter(
            "pullpool_peer_bytes_total",
            "Body bytes sent to other nodes and received from them",
            ("direction",),
            registry=registry,
        )
        self.unsealed = Counter(
            "pullpool_peer_unsealed_total",
            "Requests on the peer listener that did not prove to be a node's",
            registry=registry,
        )
        self.transfers = Gauge(
            "pullpool_peer_transfers",
            "Stripes that are being sent to other nodes",
            registry=registry,
        )

    @property
    def sent(self) -> float:
        """Body bytes sent to other nodes so far."""
        return float(self.bytes.labels("sent")._value.get())
