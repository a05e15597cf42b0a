"""The metrics of a node's part in the fleet, all with the prefix `pullpool_fleet_`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# From a script on this machine to the patience that there is with one.
_SCRIPT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3)


class FleetMetrics:
    """Every metric of the fleet; those of live objects are shown once somebody gives them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._live = _LiveState()
        registry.register(self._live)
        self.directory_operations = self._counter(
            "directory_operations_total", "Scripts run on the directory", ("script", "result")
        )
        self.directory_duration = Histogram(
            "pullpool_fleet_directory_operation_duration_seconds",
            "From asking the directory to its answer",
            ("script",),
            registry=registry,
            buckets=_SCRIPT,
        )

    def observe_directory(self, is_up: Callable[[], bool]) -> None:
        """Read with this callback at every scrape whether the directory answers."""
        self._live.gauges["directory_up", "1 while the directory answers"] = is_up

    def observe_members(self, count: Callable[[], int]) -> None:
        """Read the number of nodes that are known to be alive with this callback."""
        self._live.gauges["members", "Nodes known to be alive, this one included"] = count

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"pullpool_fleet_{name}", text, tuple(labels), registry=self._registry)


class _LiveState(Collector):
    def __init__(self) -> None:
        self.gauges: dict[tuple[str, str], Callable[[], float]] = {}

    def collect(self) -> Iterator[Metric]:
        for (name, text), value in self.gauges.items():
            yield GaugeMetricFamily(f"pullpool_fleet_{name}", text, value=float(value()))
