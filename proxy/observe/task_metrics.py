"""The metrics of tasks (DESIGN D19): how many there are in each state, and how they ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class TaskMetrics(Collector):
    """Counted where they end; the states are read from the table at scrape time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "pullpool_tasks_total",
            "Tasks that are over, by what they ended with",
            ("kind", "result"),
            registry=registry,
        )
        self._counts: Callable[[], Mapping[str, int]] | None = None
        registry.register(self)

    def observe(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Read the number of tasks in each state with this callback at every scrape."""
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        if self._counts is None:
            return
        text = "Tasks that are known, by state"
        family = GaugeMetricFamily("pullpool_tasks", text, labels=("state",))
        for state, count in self._counts().items():
            family.add_metric((state,), count)
        yield family
