"""Sockets under leases: none is dialled without one, and those that are being dialled end, too."""

from __future__ import annotations

import asyncio

import pytest
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.errors import LeaseLost
from proxy.testing import FakeClock, FakeRegistry
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.leases import Leases, RateLimit, Unshared
from proxy.upstream.origin import Origin
from tests.unit.upstream_kit import LOOPS, Mute, opened, run_on, ticket, tls, until

every_loop = pytest.mark.parametrize("loop", LOOPS)


class Lost(Unshared):
    """Leases that were lost right after a turn had been granted."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.allowed = 0


class Source:
    def open(self, _label: str, capacity: int, _rate: RateLimit | None) -> Leases:
        return Lost(capacity)


def make_origin(url: str, source: Source | None = None) -> Origin:
    settings = OriginSettings(max_connections=2, tls=tls().client)
    key = OriginKey.of(URL(url))
    return Origin(key, settings, metrics=Metrics(), clock=FakeClock(), leases=source)


@every_loop
def test_no_socket_is_dialled_without_a_lease(loop: str) -> None:
    async def main() -> None:
        async with (
            FakeRegistry() as registry,
            opened(make_origin(registry.url, Source())) as origin,
        ):
            async with origin.turn(ticket()) as turn:
                with pytest.raises(LeaseLost):
                    await turn.request("GET", URL(f"{registry.url}/v2/"))
            assert registry.counters.accepted == 0
            assert origin.conduct.health.breaker.run == 0

    run_on(loop, main())


@every_loop
def test_a_socket_that_is_being_dialled_ends_with_its_lease(loop: str) -> None:
    async def main() -> None:
        with Mute() as mute:
            async with opened(make_origin(mute.url)) as origin, origin.turn(ticket()) as turn:
                dial = asyncio.create_task(turn.request("GET", URL(mute.url)))
                await until(lambda: mute.established == 1)
                origin._lanes.cut()
                await until(lambda: mute.established == 0)
                with pytest.raises(LeaseLost):
                    await dial
                await until(lambda: not origin.is_open)
            assert origin.conduct.health.breaker.run == 0

    run_on(loop, main())
