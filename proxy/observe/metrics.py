"""The metrics of one proxy, on a registry of its own, so that two proxies can share a process.

Events are counted where they happen. What has a state (connections, queues, the store) is read from
the live objects at scrape time instead: a gauge that is moved up and down drifts from the truth at
the first forgotten path, a callback cannot.

No label holds a repository, a digest or a client: their number has no bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.observe.fleet import FleetMetrics
from proxy.observe.task_metrics import TaskMetrics

# From a hit out of memory to a large blob over a slow line.
_DURATION = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 900)
#: Seconds of a hit that is quick: those of the first bucket.
QUICK = _DURATION[0]
# Waiting is what this proxy is for: fine steps up to the usual header deadlines (20 s, 30 s).
_WAIT = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 180, 300)


@dataclass(frozen=True, slots=True)
class GateState:
    """One gate at one moment. Connections and waiters are counts; `depth` is by class;
    `round_seconds` is about how long all images that wait take to get a turn each."""

    upstream: str
    active: int
    idle: int
    limit: int
    depth: Mapping[str, int]
    queue_limit: int
    round_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class OriginState:
    """One origin at one moment: its breaker's state; its quota, if any, as (limit, remaining)."""

    upstream: str
    breaker: str
    quota: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class StoreState:
    """The store at one moment: bytes held, bytes it may hold, blobs held, and bytes that it could
    promise if it evicted all that nobody uses."""

    bytes: int
    limit: int
    blobs: int
    spare: int = 0


@dataclass(frozen=True, slots=True)
class ListenerState:
    """The listener for clients at one moment: connections open, how many there are descriptors
    for, and whether it accepts none for now."""

    open: int
    limit: int
    paused: bool


@dataclass(slots=True)
class Tally:
    """Hits of one kind, method and status that were answered hot since the last scrape, none of
    which took longer than the first bucket of the durations."""

    kind: str
    method: str
    code: str
    count: int = 0
    seconds: float = 0.0
    sent: int = 0


class Durations(Histogram):
    """A histogram that takes many observations of the first bucket at once, and finds the bucket of
    one without a look at each."""

    def observe(self, amount: float, exemplar: Mapping[str, str] | None = None) -> None:
        """One observation. Exemplars are not kept."""
        self._sum.inc(amount)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)

    def observe_quick(self, count: int, total: float) -> None:
        """``count`` observations, ``total`` in all, none beyond the first bucket's bound."""
        self._sum.inc(total)
        self._buckets[0].inc(count)


class Metrics:
    """Every metric, all with the prefix `pullpool_`.

    `registry` is where they are registered; a registry takes one `Metrics` only.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._live = _LiveState()
        self.registry.register(self._live)
        self._make_http()
        self._tallies: dict[tuple[str, str, str], Tally] = {}
        self._live.before = self._fold
        self._make_queue()
        self._make_upstream()
        self._make_bodies()
        self._make_flow()
        self._make_process()
        self.fleet = FleetMetrics(self.registry)
        self.tasks = TaskMetrics(self.registry)

    def observe_gates(self, gates: Callable[[], Iterable[GateState]]) -> None:
        """Read the gates with this callback at every scrape."""
        self._live.gates = gates

    def observe_origins(self, origins: Callable[[], Iterable[OriginState]]) -> None:
        """Read the breakers and quotas with this callback at every scrape."""
        self._live.origins = origins

    def observe_urls(self, urls: Callable[[], Iterable[tuple[str, str, bool]]]) -> None:
        """Read the URLs of upstreams at every scrape: upstream, URL, and whether it is in use."""
        self._live.urls = urls

    def observe_store(self, store: Callable[[], StoreState]) -> None:
        """Read the store with this callback at every scrape."""
        self._live.store = store

    def observe_flights(self, flights: Callable[[], int]) -> None:
        """Read the number of flights with this callback at every scrape."""
        self._live.flights = flights

    def observe_listener(self, listener: Callable[[], ListenerState]) -> None:
        """Read the listener for clients with this callback at every scrape."""
        self._live.listener = listener

    def render(self) -> bytes:
        """The text exposition; `content_type` is its media type."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"pullpool_{name}", text, tuple(labels), registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str], buckets: tuple[float, ...]
    ) -> Durations:
        return Durations(
            f"pullpool_{name}", text, tuple(labels), registry=self.registry, buckets=buckets
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"pullpool_{name}", text, registry=self.registry)

    def _make_http(self) -> None:
        labels = ("kind", "cache")
        self.http_requests = self._counter(
            "http_requests_total", "Requests answered", ("kind", "method", "code", "cache")
        )
        self.http_duration = self._histogram(
            "http_request_duration_seconds", "Arrival to last byte", labels, _DURATION
        )
        self.http_first_byte = self._histogram(
            "http_time_to_first_byte_seconds", "Arrival to first body byte", labels, _DURATION
        )
        self.http_bytes = self._counter(
            "http_response_bytes_total", "Body bytes sent to clients", ("cache",)
        )
        self.http_inflight = self._gauge("http_requests_inflight", "Requests being answered")
        self.http_hot = self._counter(
            "http_hot_requests_total", "Requests answered from prepared bytes", ("kind",)
        )
        self.accept_pauses = self._counter(
            "http_accept_pauses_total", "Times that clients were not accepted for a while"
        )

    def count_request(
        self,
        kind: str,
        method: str,
        code: str,
        cache: str,
        *,
        seconds: float,
        first_byte: float | None,
        sent: int,
    ) -> None:
        """A request was answered; ``seconds`` to the last byte, ``first_byte`` to the headers."""
        self.http_requests.labels(kind, method, code, cache).inc()
        self.http_duration.labels(kind, cache).observe(seconds)
        if first_byte is not None:
            self.http_first_byte.labels(kind, cache).observe(first_byte)
        self.http_bytes.labels(cache).inc(sent)

    def tally(self, kind: str, method: str, code: str) -> Tally:
        """Where hits of this kind are counted that are answered hot: plain numbers, which become
        metrics at the next scrape."""
        return self._tallies.setdefault((kind, method, code), Tally(kind, method, code))

    def count_hot(self, tally: Tally, seconds: float, sent: int) -> None:
        """One more of these, answered in so many seconds with a body of ``sent`` bytes."""
        if seconds <= QUICK:
            tally.count += 1
            tally.seconds += seconds
            tally.sent += sent
            return
        self.http_hot.labels(tally.kind).inc()
        self.count_request(
            tally.kind,
            tally.method,
            tally.code,
            "hit",
            seconds=seconds,
            first_byte=seconds,
            sent=sent,
        )

    def _fold(self) -> None:
        for tally in self._tallies.values():
            if tally.count:
                kind = tally.kind
                self.http_requests.labels(kind, tally.method, tally.code, "hit").inc(tally.count)
                self.http_duration.labels(kind, "hit").observe_quick(tally.count, tally.seconds)
                self.http_first_byte.labels(kind, "hit").observe_quick(tally.count, tally.seconds)
                self.http_bytes.labels("hit").inc(tally.sent)
                self.http_hot.labels(kind).inc(tally.count)
                tally.count, tally.seconds, tally.sent = 0, 0.0, 0

    def _make_queue(self) -> None:
        labels = ("upstream", "class")
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "Wait for a slot of the upstream", labels, _WAIT
        )
        self.queue_timeouts = self._counter(
            "queue_timeouts_total", "Waiters whose deadline came before their turn", labels
        )
        self.queue_abandoned = self._counter(
            "queue_abandoned_total", "Waiters that left before their turn", labels
        )

    def _make_upstream(self) -> None:
        labels = ("upstream",)
        self.upstream_requests = self._counter(
            "upstream_requests_total", "Requests to upstreams by status", ("upstream", "code")
        )
        self.upstream_duration = self._histogram(
            "upstream_request_duration_seconds", "Request to last byte", labels, _DURATION
        )
        self.upstream_errors = self._counter(
            "upstream_errors_total", "Failed requests to upstreams", ("upstream", "kind")
        )
        self.upstream_overloads = self._counter(
            "upstream_overloads_total", "Answers that showed an upstream to be overloaded", labels
        )
        self.upstream_retries = self._counter(
            "upstream_retries_total",
            "Tries after the first, by the failure before them",
            ("upstream", "reason"),
        )
        self.upstream_retries_held = self._counter(
            "upstream_retries_held_total", "Retries that waited for the retry budget", labels
        )
        self.upstream_throttled = self._counter(
            "upstream_throttled_seconds_total", "Pauses that upstreams asked for", labels
        )
        self.upstream_failovers = self._counter(
            "upstream_failovers_total", "Questions that went on at another URL", labels
        )
        self.upstream_replays = self._counter(
            "upstream_replays_total", "Requests sent again as their idle socket was closed", labels
        )
        self.token_refresh = self._counter(
            "token_refresh_total", "Token requests by outcome", ("upstream", "result")
        )

    def _make_bodies(self) -> None:
        labels = ("upstream",)
        self.upstream_bytes = self._counter(
            "upstream_bytes_total", "Body bytes received from upstreams", labels
        )
        self.upstream_resumes = self._counter(
            "upstream_resumes_total", "Broken bodies continued at their byte", labels
        )
        self.upstream_segments = self._counter(
            "upstream_segments_total",
            "Further turns of blobs that had one, by outcome",
            ("upstream", "outcome"),
        )
        self.upstream_stalls = self._counter(
            "upstream_stalls_total", "Answers given up because they came too slowly", labels
        )
        self.upstream_without_range = self._counter(
            "upstream_without_range_total", "Ranges answered with the whole body", labels
        )

    def _make_flow(self) -> None:
        self.throttled = self._counter(
            "throttled_seconds_total", "Time that bodies waited for a byte rate", ("side",)
        )
        self.coalesced = self._counter(
            "coalesced_requests_total", "Requests that joined a flight", ("kind",)
        )
        self.prefetches = self._counter(
            "prefetches_total", "Fetches of blobs that nobody had asked for yet"
        )
        self.fill_failures = self._counter(
            "fill_failures_total", "Fills that ended without a stored blob", ("reason",)
        )
        self.fills_abandoned = self._counter(
            "fills_abandoned_total", "Fills that lost their last reader", ("action",)
        )
        self.digest_mismatch = self._counter(
            "digest_mismatch_total", "Content that was not what its digest says", ("source",)
        )
        self.evictions = self._counter("evictions_total", "Blobs evicted", ("reason",))
        self.store_errors = self._counter(
            "store_errors_total", "Failed operations of the store", ("op", "errno")
        )
        self.recovered = self._counter(
            "store_recovered_temp_total", "Unfinished files removed at start"
        )

    def _make_process(self) -> None:
        self.loop_lag = self._gauge("event_loop_lag_seconds", "How late the event loop runs")
        self.draining = self._gauge("draining", "1 while no new work is taken")
        self.build_info = Info("pullpool_build", "Versions of this build", registry=self.registry)


class _LiveState(Collector):
    """Asks the live objects for their state once per scrape; what nobody set is not shown."""

    def __init__(self) -> None:
        self.gates: Callable[[], Iterable[GateState]] | None = None
        self.origins: Callable[[], Iterable[OriginState]] | None = None
        self.store: Callable[[], StoreState] | None = None
        self.flights: Callable[[], int] | None = None
        self.urls: Callable[[], Iterable[tuple[str, str, bool]]] | None = None
        self.before: Callable[[], None] = lambda: None
        self.listener: Callable[[], ListenerState] | None = None

    def collect(self) -> Iterator[Metric]:
        self.before()  # registered first, so the metrics that this moves are read after it
        if self.gates is not None:
            yield from _gate_families(self.gates())
        if self.origins is not None:
            yield from _origin_families(self.origins())
        if self.urls is not None:
            text = "Is the URL of the upstream the one that is asked?"
            labels = ("upstream", "url")
            family = GaugeMetricFamily("pullpool_upstream_url_in_use", text, labels=labels)
            for upstream, url, is_in_use in self.urls():
                family.add_metric((upstream, url), is_in_use)
            yield family
        if self.listener is not None:
            yield from _listener_families(self.listener())
        if self.store is not None:
            yield from _store_families(self.store())
        if self.flights is not None:
            yield GaugeMetricFamily(
                "pullpool_flights", "Fetches that readers share", value=self.flights()
            )


class _Sums:
    """A gauge family whose equal label sets are added up.

    Two gates may carry the same upstream name (two content hosts behind one registry), and an
    exposition with the same series twice is refused as a whole.
    """

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self._family = GaugeMetricFamily(f"pullpool_{name}", text, labels=labels)
        self._sums: dict[tuple[str, ...], float] = {}

    def add(self, value: float, *labels: str) -> None:
        self._sums[labels] = self._sums.get(labels, 0) + value

    def family(self) -> Metric:
        for labels, value in self._sums.items():
            self._family.add_metric(labels, value)
        return self._family


def _gate_families(gates: Iterable[GateState]) -> Iterator[Metric]:
    connections = _Sums("upstream_connections", "Open sockets to the upstream", "upstream", "state")
    limit = _Sums("upstream_connections_limit", "Sockets allowed to the upstream", "upstream")
    depth = _Sums("queue_depth", "Waiters for a slot of the upstream", "upstream", "class")
    queue_limit = _Sums("queue_limit", "Waiters allowed for the upstream", "upstream")
    rounds = _Sums(
        "queue_round_seconds", "Time until every image that waits has had a turn", "upstream"
    )
    for gate in gates:
        rounds.add(gate.round_seconds, gate.upstream)
        connections.add(gate.active, gate.upstream, "active")
        connections.add(gate.idle, gate.upstream, "idle")
        limit.add(gate.limit, gate.upstream)
        queue_limit.add(gate.queue_limit, gate.upstream)
        for name, waiting in gate.depth.items():
            depth.add(waiting, gate.upstream, name)
    for sums in (connections, limit, depth, queue_limit, rounds):
        yield sums.family()


#: What a breaker may be; each has a series, so that a change is seen in both.
_BREAKER_STATES = ("closed", "half_open", "open")


def _origin_families(origins: Iterable[OriginState]) -> Iterator[Metric]:
    breaker = _Sums(
        "upstream_breaker_state", "1 for the state that the breaker is in", "upstream", "state"
    )
    limit = _Sums("upstream_ratelimit_limit", "Pulls that the upstream's quota allows", "upstream")
    remaining = _Sums("upstream_ratelimit_remaining", "Pulls left of the quota", "upstream")
    for origin in origins:
        for state in _BREAKER_STATES:
            breaker.add(state == origin.breaker, origin.upstream, state)
        if origin.quota is not None:
            limit.add(origin.quota[0], origin.upstream)
            remaining.add(origin.quota[1], origin.upstream)
    for sums in (breaker, limit, remaining):
        yield sums.family()


def _listener_families(listener: ListenerState) -> Iterator[Metric]:
    for name, text, value in (
        ("connections", "Connections of clients", listener.open),
        ("connections_limit", "Connections that there are descriptors for", listener.limit),
        ("accept_paused", "1 while no connection is accepted", listener.paused),
    ):
        yield GaugeMetricFamily(f"pullpool_http_{name}", text, value=value)


def _store_families(store: StoreState) -> Iterator[Metric]:
    yield GaugeMetricFamily("pullpool_store_bytes", "Bytes held", value=store.bytes)
    yield GaugeMetricFamily("pullpool_store_limit_bytes", "Bytes allowed", value=store.limit)
    yield GaugeMetricFamily("pullpool_store_blobs", "Blobs held", value=store.blobs)
