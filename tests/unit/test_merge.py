"""The metrics of several processes as one exposition."""

from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.merge import counts_only, merged
from proxy.observe.metrics import GateState, ListenerState, Metrics, StoreState


def samples(text: bytes) -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def process(requests: int, *, leads: bool = False, lag: float = 0.0) -> Metrics:
    metrics = Metrics()
    metrics.build_info.info({"version": "1"})
    metrics.http_inflight.inc(requests)
    metrics.loop_lag.set(lag)
    for _ in range(requests):
        metrics.http_requests.labels("blob", "GET", "200", "hit").inc()
        metrics.http_duration.labels("blob", "hit").observe(0.1)
    if leads:
        metrics.observe_store(lambda: StoreState(5, 10, 3))
        metrics.observe_gates(lambda: [GateState("h", 2, 1, 8, {"blob": 4}, 100, 1.5)])
    return metrics


def test_one_process_stays_as_it_is() -> None:
    text = process(3, leads=True).render()
    assert samples(merged([text.decode()])) == samples(text)
    assert {line for line in merged([text.decode()]).splitlines() if b"# TYPE" in line} == {
        line for line in text.splitlines() if b"# TYPE" in line
    }


def test_shares_are_summed_and_the_worst_is_told_of_the_rest() -> None:
    texts = [
        process(3, leads=True, lag=0.2).render().decode(),
        process(4, lag=0.7).render().decode(),
    ]
    found = samples(merged(texts))
    labels = [("cache", "hit"), ("code", "200"), ("kind", "blob"), ("method", "GET")]
    assert found[f"pullpool_http_requests_total{labels}"] == 7
    assert found["pullpool_http_requests_inflight[]"] == 7
    of_blobs = [("cache", "hit"), ("kind", "blob")]
    assert found[f"pullpool_http_request_duration_seconds_count{of_blobs}"] == 7
    assert found["pullpool_event_loop_lag_seconds[]"] == 0.7
    assert found["pullpool_build_info[('version', '1')]"] == 1
    assert found["pullpool_store_blobs[]"] == 3
    assert found["pullpool_upstream_connections_limit[('upstream', 'h')]"] == 8


def test_hot_hits_and_listeners_are_counted_over_all() -> None:
    def worker(hits: int, *, paused: bool) -> Metrics:
        metrics = process(1)
        metrics.observe_listener(lambda: ListenerState(open=hits, limit=100, paused=paused))
        for _ in range(hits):
            metrics.count_hot(metrics.tally("blob", "GET", "200"), 0.0001, 10)
        return metrics

    texts = [
        one.render().decode()
        for one in (worker(3, paused=True), worker(4, paused=False), worker(5, paused=True))
    ]
    found = samples(merged(texts))
    labels = [("cache", "hit"), ("code", "200"), ("kind", "blob"), ("method", "GET")]
    assert found[f"pullpool_http_requests_total{labels}"] == 15
    assert found["pullpool_http_hot_requests_total[('kind', 'blob')]"] == 12
    assert found["pullpool_http_response_bytes_total[('cache', 'hit')]"] == 120
    assert found["pullpool_http_connections[]"] == 12
    assert found["pullpool_http_connections_limit[]"] == 300
    assert found["pullpool_http_accept_paused[]"] == 1
    gone = samples(merged([counts_only(texts).decode(), worker(1, paused=False).render().decode()]))
    assert gone["pullpool_http_hot_requests_total[('kind', 'blob')]"] == 13
    assert gone["pullpool_http_connections[]"] == 1


def test_of_the_dead_only_what_grows_is_told() -> None:
    text = counts_only([process(3, leads=True, lag=0.2).render().decode()])
    names = {name.partition("[")[0] for name in samples(text)}
    assert "pullpool_http_requests_total" in names
    assert "pullpool_http_request_duration_seconds_bucket" in names
    assert not names & {"pullpool_http_requests_inflight", "pullpool_store_blobs"}
    both = samples(merged([text.decode(), process(4).render().decode()]))
    assert both["pullpool_http_requests_inflight[]"] == 4
    labels = [("cache", "hit"), ("code", "200"), ("kind", "blob"), ("method", "GET")]
    assert both[f"pullpool_http_requests_total{labels}"] == 7
