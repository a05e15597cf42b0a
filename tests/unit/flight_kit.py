"""What the tests of flights share: scripted sources, flights over a real store, and consumers."""

import asyncio
import inspect
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import proxy.pull.flight as flight_module
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import PullError, UpstreamUnavailable
from proxy.pull.flight import Flight, Flights
from proxy.pull.flight_settings import FlightSettings
from proxy.pull.ground import Fellows
from proxy.pull.reader import FileSpan, Piece, Reader
from proxy.pull.trial import Trial, try_two
from proxy.store.store import Disk, Store
from proxy.upstream.turns import Ticket, TurnClass
from tests.unit.proxy_kit import Pauses
from tests.unit.store_kit import descriptors, opened, silent, staging_files

KIB = 1 << 10


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until ``condition`` holds."""
    while not condition():  # noqa: ASYNC110 -- conditions of foreign objects, without an event
        await asyncio.sleep(0)


async def a_while() -> None:
    """Let everything else run that can, the store's threads included."""
    for _ in range(20):
        await asyncio.to_thread(lambda: None)
        await asyncio.sleep(0)


# -- sources ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """What a source does in one turn instead of giving what was asked for.

    ``error`` is raised for an answer; ``breaks`` is how many bytes come before the body breaks;
    ``ends`` before it ends as if that were all; ``total`` is another size than the right one.
    """

    error: PullError | None = None
    breaks: int | None = None
    ends: int | None = None
    total: int | None = None


@dataclass
class Turn:
    """What was asked in one turn, and how it went."""

    start: int
    length: int | None
    turn_class: TurnClass
    clients: frozenset[str]
    is_urgent: bool
    retry: str = ""
    sent: int = 0
    is_open: bool = True
    at_end: bool = False  # else its transport would have been aborted


class Valve:
    """Lets bytes before ``limit`` through; None: all."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._changed = asyncio.Event()

    def open(self, limit: int | None = None) -> None:
        self.limit = limit
        self._changed.set()

    def allowed(self, position: int, length: int) -> int:
        return length if self.limit is None else min(length, self.limit - position)

    async def more(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class ScriptedBody:
    def __init__(self, source: "ScriptedSource", turn: Turn, act: Act, *, stop: int) -> None:
        self._source = source
        self._turn = turn
        self._act = act
        self._is_part = source.ranged
        self._at = 0 if not source.ranged else turn.start
        self._stop = stop if act.ends is None else min(stop, self._at + act.ends)
        self.learned = False

    @property
    def total(self) -> int | None:
        if not self._source.says_size:
            return None
        return len(self._source.data) if self._act.total is None else self._act.total

    @property
    def is_part(self) -> bool:
        return self._is_part

    @property
    def is_overdue(self) -> bool:
        return self._source.ranged and self._source.is_overdue(self._turn)

    async def read(self) -> bytes:
        while self._at < self._stop:
            data = await self._receive()
            before, self._at = self._at, self._at + len(data)
            if self._at > self._turn.start:
                return data[max(0, self._turn.start - before) :]
        self._turn.at_end = True
        return b""

    async def borrow(self) -> bytes:
        return await self.read()

    def more(self, most: int) -> bytes:
        """In a thread: what the valve lets through, if the source has more at once."""
        if not self._source.hauls or self._act.breaks is not None:
            return b""
        length = min(self._source.chunk, self._stop - self._at, most)
        length = max(0, self._source.valve.allowed(self._at, length))
        at, self._at = self._at, self._at + length
        self._turn.sent += length
        self._source.hauled += length
        return self._source.data[at : self._at]

    def settle(self) -> None:
        pass

    async def _receive(self) -> bytes:
        breaks = self._act.breaks
        left = self._stop - self._at if breaks is None else breaks - self._turn.sent
        if left <= 0 and breaks is not None:
            raise UpstreamUnavailable(f"the body broke after {breaks} bytes")
        length = min(self._source.chunk, left, self._stop - self._at)
        while (allowed := self._source.valve.allowed(self._at, length)) <= 0:
            await self._source.valve.more()
        await asyncio.sleep(0)
        self._turn.sent += allowed
        return self._source.data[self._at : self._at + allowed]

    def learn(self) -> None:
        self.learned = True


class ScriptedSource:
    """A blob as one repository gives it: rightly, or by ``acts``, of which each turn uses one.

    ``slots`` are shared by the sources of one origin; ``queue`` holds turns back before they begin,
    ``valve`` their bytes.
    """

    def __init__(
        self,
        data: bytes,
        *,
        digest: Digest | None = None,
        upstream: str = "hub.example.com",
        repository: str = "team/app",
        chunk: int = 4 * KIB,
        turn_bytes: int = 1 << 20,
        serves_ranges: bool = True,
        says_size: bool = True,
        acts: list[Act] | None = None,
        slots: asyncio.Semaphore | None = None,
        segments: int = 1,
    ) -> None:
        self.data = data
        self.digest = digest or Digest.of(data)
        self.key = (upstream, repository)
        self.chunk = chunk
        self.turn_bytes = turn_bytes
        self.ranged = True
        self.ahead = 0
        self.segments = segments
        self.spare = segments
        self.is_distrusted = False
        self.widens: bool | None = True
        self.knows_rate = True
        self.hauls = False  # whether a thread finds more of its bodies there
        self.hauled = 0  # bytes that one has found
        self.serves_ranges = serves_ranges
        self.says_size = says_size
        self.acts = deque(acts or [])
        self.turns: list[Turn] = []
        self.waiting = 0
        self.valve = Valve()
        self.queue = asyncio.Event()
        self.queue.set()
        self.slots = slots or asyncio.Semaphore(1000)
        self.is_overdue: Callable[[Turn], bool] = lambda _: False

    @property
    def sent(self) -> int:
        return sum(turn.sent for turn in self.turns)

    def learn_widening(self, widens: bool) -> None:
        self.widens = widens

    def distrust(self) -> None:
        self.is_distrusted = True
        self.ranged = self.serves_ranges = False

    @property
    def active(self) -> int:
        return sum(turn.is_open for turn in self.turns)

    @asynccontextmanager
    async def open(
        self, start: int, length: int | None, ticket: Ticket
    ) -> AsyncIterator[ScriptedBody]:
        self.waiting += 1
        try:
            await self.queue.wait()
            await self.slots.acquire()
            ticket.grants += 1
        finally:
            self.waiting -= 1
        clients = frozenset(ticket.clients)
        turn = Turn(start, length, ticket.turn_class, clients, ticket.urgent, ticket.retry)
        self.turns.append(turn)
        try:
            await asyncio.sleep(0)
            act = self.acts.popleft() if self.acts else Act()
            if act.error is not None:
                raise act.error
            self.ranged = self.ranged and self.serves_ranges
            stop = len(self.data)
            if self.ranged and start >= stop and stop:
                raise UpstreamUnavailable("nothing satisfies this range (416)")
            if self.ranged and length is not None:
                stop = min(stop, start + length)
            yield ScriptedBody(self, turn, act, stop=stop)
        finally:
            turn.is_open = False
            self.slots.release()


# -- flights ---------------------------------------------------------------------------------


@dataclass
class Rig:
    """Flights over a store; at its end nothing may be left of them."""

    directory: Path
    store: Store
    flights: Flights
    metrics: Metrics
    readers: list[Reader] = field(default_factory=list)

    def join(
        self,
        source: ScriptedSource,
        client: str = "alice",
        *,
        size: int | None = None,
        named: bool = True,
    ) -> Reader:
        reader, _ = self.flights.join(source, client, size=size, named=named)
        self.readers.append(reader)
        return reader

    async def pull(
        self, source: ScriptedSource, client: str = "alice", start: int = 0, stop: int | None = None
    ) -> bytes:
        """Join, read everything, leave."""
        reader = self.join(source, client)
        try:
            return await drink(reader, start, stop)
        finally:
            reader.close()

    async def kept(self, digest: Digest) -> bytes | None:
        return await self.store.read(digest)

    def staging(self) -> int:
        return len(staging_files(self.directory))


@asynccontextmanager
async def flying(
    directory: Path,
    *,
    on_abandon: str = "finish",
    window: int = 64 * KIB,
    far: int = 1 << 30,
    patience: float = 1e9,
    pause: Callable[[int], float] | None = None,
    max_size: int = 64 << 20,
    disk: Disk | None = None,
    segment_bytes: int = 20 * KIB,
    gather: float = 0.0,
    clock: Pauses | None = None,
    fellows: Fellows | None = None,
    long_segment: int = 1 << 30,
    trial: Trial = try_two,
) -> AsyncIterator[Rig]:
    """A rig. When it ends well: no task, no open file and no staging file is left."""
    metrics, clock = Metrics(), clock or Pauses()
    async with opened(directory, max_size=max_size, disk=disk, metrics=metrics) as store:
        settings = FlightSettings(
            on_abandon,
            window,
            far,
            patience,
            pause or clock.pause,
            clock,
            segment_bytes,
            gather,
            clock,
            long_segment,
            trial,
        )
        flights = Flights(
            store=store, settings=settings, metrics=metrics, log=silent(), fellows=fellows
        )
        rig = Rig(directory, store, flights, metrics)
        try:
            yield rig
        finally:
            for reader in rig.readers:
                reader.close()
            await flights.close()
        assert not len(flights)
        assert not (left := tasks_of_the_pull_layer()), left
        assert " 0 fills" in repr(store)  # which would drop them when it is closed
        store._shelf.kept.close()  # what stays open for the next reader is no lease
        assert not opened_blobs(directory)
        assert not any(turn.is_open for reader in rig.readers for turn in turns_of(reader))
    assert rig.staging() == 0


def tasks_of_the_pull_layer() -> list[asyncio.Task[object]]:
    """Tasks that run a coroutine of ``proxy.pull``."""
    home = str(Path(flight_module.__file__).parent)
    return [
        task
        for task in asyncio.all_tasks()
        if inspect.iscoroutine(coroutine := task.get_coro())
        and coroutine.cr_code.co_filename.startswith(home)
    ]


def turns_of(reader: Reader) -> list[Turn]:
    return reader.source.turns if isinstance(reader.source, ScriptedSource) else []


def opened_blobs(directory: Path) -> list[str]:
    """Descriptors of staging files and blobs that are open in this process."""
    places = (str(directory / "staging"), str(directory / "blobs"))
    return [path for path in descriptors() if path.startswith(places)]


# -- consumers -------------------------------------------------------------------------------


def read(piece: Piece) -> bytes:
    """A piece's bytes, as a client would get them."""
    if isinstance(piece, FileSpan):
        data = os.pread(piece.lease.fileno(), piece.length, piece.start)
        assert len(data) == piece.length
        return data
    return piece


async def drink(reader: Reader, start: int = 0, stop: int | None = None) -> bytes:
    """Everything a reader gives, as fast as it can be had."""
    got = bytearray()
    async with aclosing(reader.pieces(start, stop)) as pieces:
        async for piece in pieces:
            got += read(piece)
    return bytes(got)


class Sipper:
    """A client that takes piece after piece when it is told to."""

    def __init__(self, reader: Reader, start: int = 0, stop: int | None = None) -> None:
        self.reader = reader
        self.got = bytearray()
        self.piece: Piece = b""  # the last one
        self.pieces: AsyncGenerator[Piece, None] = reader.pieces(start, stop)

    async def sip(self) -> bool:
        """One piece more; false at the end. The piece before it counts as sent now."""
        try:
            self.piece = await anext(self.pieces)
        except StopAsyncIteration:
            return False
        self.got += read(self.piece)
        return True

    async def rest(self) -> bytes:
        while await self.sip():
            pass
        return bytes(self.got)

    async def leave(self) -> None:
        await self.pieces.aclose()
        self.reader.close()


async def ended(flight: Flight) -> None:
    """Wait until the fill has given everything back."""
    while not flight.is_over:
        await flight.changed()
