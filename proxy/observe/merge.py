"""One exposition out of those of several processes (``--workers``); pure.

Counters and histograms are summed, and so are gauges: connections, requests under way, bytes are
each process's share of a whole, and what only the leader knows has one sample. Some gauges are not
shares: of those the worst, or the oldest, is told.

A process that has died takes its counts with it, and a sum that falls looks to Prometheus like a
restart of everything: ``rate`` would count all the others' again. So the counts of the dead, as
they were last told to anybody, stay in the sum (``counts_only``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

_LARGEST = frozenset(
    {
        "pullpool_event_loop_lag_seconds",
        "pullpool_draining",
        "pullpool_http_accept_paused",
    }
)
_SMALLEST = frozenset({"process_start_time_seconds", "process_max_fds"})
_COUNTS = frozenset({"counter", "histogram"})

_Key = tuple[str, tuple[tuple[str, str], ...]]


def merged(texts: Iterable[str]) -> bytes:
    """The sum of some expositions."""
    return _rendered(text_string_to_metric_families("\n".join(texts)), lambda _: True)


def counts_only(texts: Iterable[str]) -> bytes:
    """The same, of what only grows: what is left to tell of processes that are gone."""
    families = text_string_to_metric_families("\n".join(texts))
    return _rendered(families, lambda family: family.type in _COUNTS)


def _rendered(families: Iterable[Metric], wanted: Callable[[Metric], bool]) -> bytes:
    sums: dict[str, Metric] = {}
    values: dict[str, dict[_Key, float]] = {}
    for family in families:
        if not wanted(family):
            continue
        sums.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        known = values.setdefault(family.name, {})
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.items()))
            add = _combination(sample.name)
            known[key] = add(known[key], sample.value) if key in known else sample.value
    for name, family in sums.items():
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Given(sums.values()))
    return generate_latest(registry)


def _combination(name: str) -> Callable[[float, float], float]:
    if name in _LARGEST or name.endswith("_info"):
        return max
    if name in _SMALLEST or name.endswith("_created"):
        return min
    return lambda one, other: one + other


class _Given(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
