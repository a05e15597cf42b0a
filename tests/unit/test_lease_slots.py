"""The fleet's ``Slots``: a gate whose slots are leased keeps the rules of one that is alone."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from yarl import URL

from proxy.fleet.lease_call import reserve_of
from proxy.fleet.leases import FleetLeases, OriginLeases
from proxy.observe.metrics import Metrics
from proxy.testing import FakeClock
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.gate import Slots
from proxy.upstream.origin import Origin
from tests.unit.directory_kit import asking
from tests.unit.lease_kit import settle
from tests.unit.redis_kit import Server, needs_redis
from tests.unit.slots_conformance import Crowd, SlotsConformance, crowd
from tests.unit.upstream_kit import opened

pytestmark = needs_redis
hosts = itertools.count()


@pytest.fixture
def port(shared_redis: Server) -> int:
    return shared_redis.port


def capacity_for(limit: int) -> int:
    """The cap of which ``limit`` sockets can be leased."""
    return next(cap for cap in itertools.count(limit) if cap - reserve_of(cap) == limit)


class TestLeasedGateAsSlots(SlotsConformance):
    """One node of a fleet, whose directory is a real server."""

    port: int
    origin: Origin

    @pytest.fixture(autouse=True)
    def _server(self, port: int) -> None:
        self.port = port

    @contextlib.asynccontextmanager
    async def make(self, limit: int, *, max_waiting: int = 1000) -> AsyncIterator[Slots]:
        key = OriginKey.of(URL(f"http://host-{next(hosts)}.example.com:5000"))
        cap = capacity_for(limit)
        settings = replace(OriginSettings(max_connections=cap), max_waiting=max_waiting)
        async with asking(f"redis://127.0.0.1:{self.port}/0") as known:
            await settle(known.directory, key.label, cap)
            metrics, clock = Metrics(), FakeClock()
            leases = FleetLeases(known.directory, node="node", metrics=metrics.fleet, clock=clock)
            origin = Origin(key, settings, metrics=metrics, clock=clock, leases=leases)
            async with opened(origin):
                self.origin = origin
                yield origin.slots

    def crowd(self, slots: Slots) -> contextlib.AbstractAsyncContextManager[Crowd]:
        leases = self.origin.leases
        assert isinstance(leases, OriginLeases)
        return crowd(slots, lambda: leases.is_settled)
