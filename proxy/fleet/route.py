"""Which server holds a hash tag's keys: the only one, the one Sentinels name, or one of a Cluster.

``find`` answers from what was learnt last; ``learn`` asks again. Whoever asks a Sentinel or a
Cluster does so on a connection of its own, which ends with the answer, and asks them in an order of
its own, so that a hundred nodes do not all ask the first one.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as ConnectionLost

from proxy.fleet.link import Access, Link
from proxy.fleet.place import Address, Place


class Route(Protocol):
    """See above; ``known`` are all servers that hold keys."""

    def find(self, slot: int) -> Address | None: ...

    def known(self) -> set[Address]: ...

    async def learn(self) -> None:
        """Raises RedisError or OSError when nobody tells."""


def route_to(place: Place, access: Access, chance: random.Random) -> Route:
    if place.kind == "server":
        return OneServer(place.addresses[0])
    if place.kind == "sentinel":
        return Sentinels(place.addresses, place.service, access, chance)
    return ClusterMap(place.addresses, access, chance)


class OneServer:
    def __init__(self, address: Address) -> None:
        self._address = address

    def __repr__(self) -> str:
        return f"<OneServer {self._address}>"

    def find(self, slot: int) -> Address | None:
        return self._address

    def known(self) -> set[Address]:
        return {self._address}

    async def learn(self) -> None:
        """There is nothing to learn."""


class Sentinels:
    """Ask Sentinels who the primary is, with the login that is theirs, or with none."""

    def __init__(
        self, addresses: Sequence[Address], service: str, access: Access, chance: random.Random
    ) -> None:
        self._addresses = addresses
        self._service = service
        self._access = replace(access, login=access.sentinel_login)
        self._chance = chance
        self._primary: Address | None = None

    def __repr__(self) -> str:
        return f"<Sentinels {self._service} primary={self._primary}>"

    def find(self, slot: int) -> Address | None:
        return self._primary

    def known(self) -> set[Address]:
        return set() if self._primary is None else {self._primary}

    async def learn(self) -> None:
        faults = []
        for address in _shuffled(self._addresses, self._chance):
            try:
                async with _asked(address, self._access) as link:
                    words = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
                    found = await link.call(*words)
            except AuthenticationError as error:  # often that of the servers is taken for theirs
                faults.append(f"{address}: {error} (directory_sentinel_password is for Sentinels)")
                continue
            except (RedisError, OSError) as error:
                faults.append(f"{address}: {error}")
                continue
            if found is None:
                faults.append(f"{address}: knows no service {self._service!r}")
                continue
            self._primary = Address(found[0].decode(), int(found[1]))
            return
        raise ConnectionLost(f"no Sentinel tells the primary: {'; '.join(faults)}")


class ClusterMap:
    """Ask any server of a Cluster who holds which slots."""

    def __init__(self, seeds: Sequence[Address], access: Access, chance: random.Random) -> None:
        self._seeds = seeds
        self._access = access
        self._chance = chance
        self._ranges: list[tuple[int, int, Address]] = []
        self._moved: dict[int, Address] = {}  # told by servers since we last learnt

    def __repr__(self) -> str:
        return f"<ClusterMap servers={len(self.known())} moved={len(self._moved)}>"

    def find(self, slot: int) -> Address | None:
        if slot in self._moved:
            return self._moved[slot]
        held = (owner for first, last, owner in self._ranges if first <= slot <= last)
        return next(held, None)

    def known(self) -> set[Address]:
        return {owner for _, _, owner in self._ranges}

    def move(self, slot: int, address: Address) -> None:
        """A server says that another one holds this slot now."""
        self._moved[slot] = address

    async def learn(self) -> None:
        faults = []
        others = [one for one in self._seeds if one not in self.known()]
        for address in [*_shuffled(self.known(), self._chance), *_shuffled(others, self._chance)]:
            try:
                async with _asked(address, self._access) as link:
                    ranges = _ranges(await link.call("CLUSTER", "SLOTS"), address)
            except (RedisError, OSError) as error:
                faults.append(f"{address}: {error}")
                continue
            if not ranges:
                faults.append(f"{address}: knows no slots")
                continue
            self._ranges, self._moved = ranges, {}
            return
        raise ConnectionLost(f"no server of the Cluster tells its slots: {'; '.join(faults)}")


def _ranges(reply: Any, asked: Address) -> list[tuple[int, int, Address]]:
    """The answer of CLUSTER SLOTS; who does not know its own host is where we asked it."""
    found = []
    for first, last, (host, port, *_), *_replicas in reply:
        name = (host or b"").decode()
        found.append((first, last, Address(asked.host if name in ("", "?") else name, port)))
    return sorted(found)


def _shuffled(addresses: Iterable[Address], chance: random.Random) -> list[Address]:
    ordered = sorted(addresses)
    chance.shuffle(ordered)
    return ordered


@contextlib.asynccontextmanager
async def _asked(address: Address, access: Access) -> AsyncIterator[Link]:
    link = await Link.open(address, access)
    try:
        yield link
    finally:
        await link.close()
