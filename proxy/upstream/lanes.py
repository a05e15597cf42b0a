"""The lanes of one origin: which slots have a socket, and how many sockets that makes.

A lane is made when its slot is first used. What is *held* is every slot that is granted and every
lane whose socket is not closed: as many sockets as there are, or may be in a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import aiohttp

from proxy.oci.errors import LeaseLost, ShuttingDown
from proxy.upstream.conduct import Conduct
from proxy.upstream.dns import OriginResolver
from proxy.upstream.egress import EgressProxy
from proxy.upstream.endpoint import OriginSettings
from proxy.upstream.gate import Gate
from proxy.upstream.lane import Lane
from proxy.upstream.leases import Leases


class Lanes:
    """An origin's lanes, by the number of their slot. ``granted`` are slots in use."""

    def __init__(
        self,
        label: str,
        settings: OriginSettings,
        leases: Leases,
        *,
        granted: Callable[[], Collection[int]],
        clock: Callable[[], float],
        proxy: EgressProxy | None,
        on_replay: Callable[[], None],
    ) -> None:
        self.cuts = 0  # how often all sockets were dropped
        self._label = label
        self._settings = settings
        self._leases = leases
        self._granted = granted
        self._clock = clock
        self._proxy = proxy
        self._on_replay = on_replay
        self._lanes: dict[int, Lane] = {}
        self._resolver: OriginResolver | None = None
        self._is_closed = False

    def find(self, number: int) -> Lane | None:
        """The slot's lane, if it was ever used."""
        return self._lanes.get(number)

    def lane(self, number: int) -> Lane:
        """The slot's lane. Raises ``ShuttingDown``."""
        if self._is_closed:
            raise ShuttingDown
        lane = self._lanes.get(number)
        if lane is None:
            settings = self._settings
            if self._resolver is None:
                self._resolver = OriginResolver(
                    aiohttp.DefaultResolver(), patience=settings.connect_timeout, clock=self._clock
                )
            lane = self._lanes[number] = Lane(
                tls=settings.tls,
                resolver=self._resolver,
                connect_timeout=settings.connect_timeout,
                read_timeout=settings.read_timeout,
                on_replay=self._on_replay,
                on_dial=self._expect_lease,
                proxy=self._proxy,
                proxy_tls=settings.proxy_tls,
            )
        return lane

    def _expect_lease(self) -> None:
        """A socket is about to be made: it is one of those held. Raises ``LeaseLost``."""
        if self.held > (allowed := self._leases.allowed):
            raise LeaseLost(f"{self._label}: {self.held} sockets needed, {allowed} are leased")

    @property
    def held(self) -> int:
        """Sockets that are not closed, and those that granted slots may open."""
        held = set(self._granted())
        held.update(number for number, lane in self._lanes.items() if lane.is_open)
        return len(held)

    async def make_room(self, limit: int) -> None:
        """Close idle sockets until no more than ``limit`` are held, if there are so many.

        A lane that is given a turn while its socket is being closed here was counted already.
        """
        for number, lane in list(self._lanes.items()):
            if self.held <= limit:
                return
            if number not in self._granted():
                await lane.shut()

    async def shut_idle(self) -> None:
        """Close every socket that no turn uses."""
        await self.make_room(0)

    def cut(self) -> None:
        """Drop every socket, those included that are being made."""
        self.cuts += 1
        for lane in self._lanes.values():
            lane.cut()

    @property
    def is_any_open(self) -> bool:
        """Is there a socket that is not yet closed on our side?"""
        return any(lane.is_open for lane in self._lanes.values())

    def is_open(self, number: int) -> bool:
        lane = self._lanes.get(number)
        return lane is not None and lane.is_open

    def is_warm(self, number: int) -> bool:
        lane = self._lanes.get(number)
        return lane is not None and lane.is_warm

    async def close(self) -> None:
        """Close every socket; turns that are in use fail."""
        self._is_closed = True
        for lane in self._lanes.values():
            await lane.close()
        if self._resolver is not None:
            await self._resolver.close()

    def __repr__(self) -> str:
        return f"<Lanes of {self._label}: {self.held} held>"


class Borrowing:
    """What an origin's leases ask of its parts: the ``Borrower``."""

    def __init__(self, gate: Gate, lanes: Lanes, conduct: Conduct) -> None:
        self._gate = gate
        self._lanes = lanes
        self._conduct = conduct

    @property
    def held(self) -> int:
        return self._lanes.held

    @property
    def busy(self) -> int:
        return len(self._gate.granted)

    @property
    def pressing(self) -> int:
        return self._gate.pressing

    @property
    def spare(self) -> int:
        return self._gate.spare_waiters

    @property
    def metadata(self) -> int:
        return self._gate.metadata

    @property
    def cap(self) -> tuple[int, int | None]:
        cap = self._conduct.cap
        return cap.limit, cap.ceiling

    def regrant(self) -> None:
        self._gate.regrant()

    async def shut_idle(self, keep: int) -> None:
        await self._lanes.make_room(keep)

    def cut(self) -> None:
        self._lanes.cut()

    def adopt(self, limit: int, ceiling: int | None) -> None:
        self._conduct.adopt(limit, ceiling)

    def __repr__(self) -> str:
        return f"<Borrowing {self._gate!r} {self._lanes!r}>"
