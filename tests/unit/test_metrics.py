"""Metrics: two proxies do not share them, state is read when it is asked for."""

import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.metrics import GateState, Metrics, StoreState


def _samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    samples = [sample for family in families for sample in family.samples]
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples
    }
    assert len(found) == len(samples), "a series was shown twice"
    return found


def _gate(upstream: str, **depth: int) -> GateState:
    return GateState(
        upstream, active=3, idle=1, limit=8, depth=depth, queue_limit=100, round_seconds=7.5
    )


def test_two_proxies_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.http_bytes.labels("hit").inc(10)
    assert _samples(one)["pullpool_http_response_bytes_total", (("cache", "hit"),)] == 10
    assert ("pullpool_http_response_bytes_total", (("cache", "hit"),)) not in _samples(other)


@pytest.mark.parametrize("seconds", [0, 0.001, 0.0010001, 7, 300, 301])
def test_a_duration_counts_in_the_buckets_that_the_library_would_choose(seconds: float) -> None:
    ours, theirs = Metrics().queue_wait, CollectorRegistry()
    buckets = ours._kwargs["buckets"]
    plain = Histogram("w", "", registry=theirs, buckets=buckets)
    ours.labels("hub", "blob").observe(seconds)
    plain.observe(seconds)
    found = [
        [sample.value for sample in next(iter(one.collect())).samples][:-1] for one in (ours, plain)
    ]
    assert found[0] == found[1]


def test_a_registry_can_be_given() -> None:
    registry = CollectorRegistry()
    Metrics(registry).draining.set(1)
    assert registry.get_sample_value("pullpool_draining") == 1


def test_every_metric_can_be_counted_under_its_name_and_labels() -> None:
    metrics = Metrics()
    metrics.http_requests.labels(kind="blob", method="GET", code="200", cache="hit").inc()
    metrics.http_duration.labels(kind="blob", cache="hit").observe(1)
    metrics.http_first_byte.labels(kind="blob", cache="hit").observe(1)
    metrics.http_inflight.set(1)
    for waits in (metrics.queue_timeouts, metrics.queue_abandoned):
        waits.labels("hub", "manifest").inc()
    metrics.queue_wait.labels("hub", "manifest").observe(1)
    metrics.upstream_requests.labels(upstream="hub", code="200").inc()
    metrics.upstream_errors.labels(upstream="hub", kind="reset").inc()
    metrics.upstream_duration.labels("hub").observe(1)
    for counter in (
        metrics.upstream_bytes,
        metrics.upstream_resumes,
        metrics.upstream_without_range,
    ):
        counter.labels(upstream="hub").inc()
    metrics.token_refresh.labels(upstream="hub", result="ok").inc()
    metrics.coalesced.labels(kind="blob").inc()
    metrics.fill_failures.labels(reason="digest_mismatch").inc()
    metrics.fills_abandoned.labels(action="finish").inc()
    metrics.digest_mismatch.labels(source="upstream").inc()
    metrics.evictions.labels(reason="size").inc()
    metrics.store_errors.labels(op="append", errno="ENOSPC").inc()
    metrics.recovered.inc()
    metrics.loop_lag.set(1)
    metrics.draining.set(1)
    metrics.build_info.info({"version": "1"})
    ones = {name for (name, _), value in _samples(metrics).items() if value == 1}
    assert {f"pullpool_{name}" for name in EVENT_METRICS} <= ones


EVENT_METRICS = [
    "http_requests_total",
    "http_request_duration_seconds_count",
    "http_time_to_first_byte_seconds_count",
    "http_requests_inflight",
    "queue_wait_seconds_count",
    "queue_timeouts_total",
    "queue_abandoned_total",
    "upstream_requests_total",
    "upstream_request_duration_seconds_count",
    "upstream_bytes_total",
    "upstream_errors_total",
    "upstream_resumes_total",
    "upstream_without_range_total",
    "token_refresh_total",
    "coalesced_requests_total",
    "fill_failures_total",
    "fills_abandoned_total",
    "digest_mismatch_total",
    "evictions_total",
    "store_errors_total",
    "store_recovered_temp_total",
    "event_loop_lag_seconds",
    "draining",
    "build_info",
]


def test_gates_are_read_at_every_scrape() -> None:
    metrics = Metrics()
    gates = [_gate("hub", manifest=2, blob=5)]
    metrics.observe_gates(lambda: gates)
    shown = _samples(metrics)
    hub = ("upstream", "hub")
    assert shown["pullpool_upstream_connections", (("state", "active"), hub)] == 3
    assert shown["pullpool_upstream_connections", (("state", "idle"), hub)] == 1
    assert shown["pullpool_upstream_connections_limit", (hub,)] == 8
    assert shown["pullpool_queue_depth", (("class", "blob"), hub)] == 5
    assert shown["pullpool_queue_limit", (hub,)] == 100
    assert shown["pullpool_queue_round_seconds", (hub,)] == 7.5
    gates.clear()
    assert not any("hub" in str(labels) for _, labels in _samples(metrics))


def test_gates_of_one_upstream_are_shown_as_their_sum() -> None:
    metrics = Metrics()
    metrics.observe_gates(lambda: iter([_gate("hub", blob=1), _gate("hub", blob=2)]))
    shown = _samples(metrics)
    hub = ("upstream", "hub")
    assert shown["pullpool_upstream_connections", (("state", "active"), hub)] == 6
    assert shown["pullpool_queue_depth", (("class", "blob"), hub)] == 3


def test_the_store_and_the_flights_are_read_at_every_scrape() -> None:
    metrics = Metrics()
    metrics.observe_store(lambda: StoreState(bytes=10, limit=100, blobs=2))
    metrics.observe_flights(lambda: 7)
    shown = _samples(metrics)
    assert shown["pullpool_store_bytes", ()] == 10
    assert shown["pullpool_store_limit_bytes", ()] == 100
    assert shown["pullpool_store_blobs", ()] == 2
    assert shown["pullpool_flights", ()] == 7


def test_what_nobody_reports_is_not_shown() -> None:
    names = {name for name, _ in _samples(Metrics())}
    assert not names & {"pullpool_store_bytes", "pullpool_flights", "pullpool_queue_limit"}


def test_hostile_label_values_do_not_break_the_exposition() -> None:
    metrics = Metrics()
    metrics.observe_gates(lambda: [_gate('a"\n\\b', blob=1)])
    assert ("pullpool_queue_limit", (("upstream", 'a"\n\\b'),)) in _samples(metrics)


def test_the_answer_has_a_media_type() -> None:
    assert Metrics.content_type.startswith("text/plain")
