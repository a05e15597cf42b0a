"""The metrics of a node's part in the fleet, all with the prefix `pullpool_fleet_`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# From a script on this machine to the patience that there is with one.
_SCRIPT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """The leases of one origin at one moment: how many this node holds and could use, how many
    other nodes wait for some, and sockets of the reserve that it may use."""

    upstream: str
    held: int
    wanted: int
    rivals: int
    reserve: int


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

        self.leases_lost = self._counter(
            "leases_lost_total",
            "Times that sockets to the upstream were dropped as their leases were not renewed",
            ("upstream",),
        )

    def observe_leases(self, leases: Callable[[], Iterable[LeaseState]]) -> None:
        """Read the leases of the caps that nodes share with this callback at every scrape."""
        self._live.leases = leases

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
        self.leases: Callable[[], Iterable[LeaseState]] | None = None

    def collect(self) -> Iterator[Metric]:
        for (name, text), value in self.gauges.items():
            yield GaugeMetricFamily(f"pullpool_fleet_{name}", text, value=float(value()))
        if self.leases is not None:
            yield from _lease_families(self.leases())


def _lease_families(leases: Iterable[LeaseState]) -> Iterator[Metric]:
    families = [
        GaugeMetricFamily(f"pullpool_fleet_{name}", text, labels=("upstream",))
        for name, text in (
            ("leases", "Sockets to the upstream leased to this node"),
            ("leases_wanted", "Sockets to the upstream that this node could use"),
            ("lease_rivals", "Other nodes that want more leases than they have"),
            ("lease_reserve", "Sockets of the reserve that this node may use now"),
        )
    ]
    for one in leases:
        values = (one.held, one.wanted, one.rivals, one.reserve)
        for family, value in zip(families, values, strict=True):
            family.add_metric((one.upstream,), value)
    yield from families
