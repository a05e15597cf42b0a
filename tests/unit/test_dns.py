"""Addresses: asked for once by all, used again while they are good, and better old than none."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from proxy.testing import FakeClock
from proxy.upstream.dns import FRESH, STALE, OriginResolver
from tests.unit.upstream_kit import until

HOST = "harbor.example.com"


def address(host: str) -> ResolveResult:
    return ResolveResult(hostname=HOST, host=host, port=443, family=2, proto=0, flags=0)


class NameService(AbstractResolver):
    """Answers when it is let, with what it is told."""

    def __init__(self, *hosts: str) -> None:
        self.hosts: tuple[str, ...] | OSError = hosts
        self.asked = 0
        self.is_closed = False
        self.open = asyncio.Event()
        self.open.set()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked += 1
        await self.open.wait()
        if isinstance(self.hosts, OSError):
            raise self.hosts
        return [address(host) for host in self.hosts]

    async def close(self) -> None:
        self.is_closed = True


def resolver_of(
    service: NameService, clock: FakeClock | None = None, patience: float = 60.0
) -> OriginResolver:
    return OriginResolver(service, patience=patience, clock=clock or FakeClock())


async def hosts(resolver: OriginResolver) -> list[str]:
    return [result["host"] for result in await resolver.resolve(HOST, 443)]


async def test_one_lookup_serves_everybody_who_asks_while_it_runs() -> None:
    service = NameService("10.0.0.1")
    service.open.clear()
    resolver = resolver_of(service)
    asking = [asyncio.create_task(hosts(resolver)) for _ in range(8)]
    await until(lambda: service.asked == 1)
    asking[0].cancel()
    service.open.set()
    found = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [["10.0.0.1"]] * 7
    assert service.asked == 1


async def test_an_answer_is_good_for_a_while_and_then_asked_for_again() -> None:
    clock, service = FakeClock(), NameService("10.0.0.1")
    resolver = resolver_of(service, clock)
    await hosts(resolver)
    clock.advance(FRESH - 0.1)
    await hosts(resolver)
    assert service.asked == 1
    service.hosts = ("10.0.0.2",)
    clock.advance(0.2)
    assert await hosts(resolver) == ["10.0.0.2"]


async def test_several_addresses_take_turns_in_going_first() -> None:
    resolver = resolver_of(NameService("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    first = [(await hosts(resolver))[0] for _ in range(6)]
    assert sorted(first[:3]) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert first[3:] == first[:3]


async def test_an_old_answer_is_better_than_none() -> None:
    clock, service = FakeClock(), NameService("10.0.0.1")
    resolver = resolver_of(service, clock)
    await hosts(resolver)
    service.hosts = OSError("the name service is gone")
    clock.advance(STALE - 1)
    assert await hosts(resolver) == ["10.0.0.1"]
    clock.advance(2)
    with pytest.raises(OSError, match="gone"):
        await hosts(resolver)


async def test_a_name_service_that_does_not_answer_is_not_waited_for_long() -> None:
    service = NameService("10.0.0.1")
    service.open.clear()
    resolver = resolver_of(service, patience=0)
    with pytest.raises(TimeoutError):
        await hosts(resolver)
    service.open.set()  # the thread comes back at last, and what it found is used
    await until(lambda: resolver._lookup is None)
    assert await hosts(resolver) == ["10.0.0.1"]
    assert service.asked == 1


async def test_a_name_without_addresses_is_not_found() -> None:
    with pytest.raises(OSError, match="no addresses"):
        await hosts(resolver_of(NameService()))


async def test_closing_ends_the_lookup_under_way() -> None:
    service = NameService("10.0.0.1")
    service.open.clear()
    resolver = resolver_of(service)
    asking = asyncio.create_task(hosts(resolver))
    await until(lambda: service.asked == 1)
    await resolver.close()
    assert service.is_closed
    with pytest.raises(OSError, match="closed"):
        await asking
