"""One fetch per digest that any number of readers share (DESIGN D2, D8, D10, D12, D14).

Theory of operation
-------------------
A *flight* is the one fetch of a digest. The first reader opens it, later ones join it at any time
and start at any byte; a task owned by the ``Flights`` table fills it, so it outlives the client
that began it. Bytes go socket → staging file and running hash (one thread hop per batch, the next
batch is received meanwhile); readers follow the growing file at their own pace and are told about
progress in steps, not per chunk.

States, and who moves them (always the fill task, but for the last row):

* WAITING   nothing has come yet: the ticket stands in a gate's queue
* FILLING   the size and the place (staging file or window) are settled; ``mark`` grows
* VERIFIED  every byte is there and the digest is right: readers may have the last bytes. Until then
            the bytes of the last batch are held back (D10)
* LANDED    fsynced, renamed, indexed; out of the table, the store serves it from here on
* FAILED    ``error`` says why; nothing is kept; every reader raises it
* ABANDONED the last reader left and ``on_abandon`` is ``cancel`` (or there is no file to finish):
            moved by ``leave``, which takes it out of the table at once, so that a reader who comes
            in the same loop turn opens a flight of its own, with a staging file of its own

A flight takes its bytes in turns from its *sources*, the repositories its readers came through. An
upstream's denial removes that source and the readers who came through it, no others (D12). A body
that breaks goes on at its byte (D8). With no room on the disk the bytes go through a ``Window``
that the readers share; a reader who is far ahead of the mark, or has fallen out of the window,
takes turns of its own, bounded and read into memory first, so that a slow client never holds a
slot.

Cancellation: a reader is a plain object, cancelling its task only runs ``close``. Cancelling the
fill task (shutdown, abandonment) waits for the append under way in its thread, discards the staging
file and fails the flight. A crash leaves a staging file that the store removes at the next start.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest, Verifier
from proxy.oci.errors import (
    Denied,
    DigestMismatch,
    InternalError,
    NotFound,
    PullError,
    ShuttingDown,
    SizeMismatch,
    StoreFailed,
    Throttled,
    TokenServiceFailed,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.pull.pump import Pump
from proxy.pull.reader import Reader
from proxy.pull.window import Window
from proxy.store.blobs import NoRoom, Staging, StoreFull
from proxy.store.store import Store
from proxy.upstream.blob import BlobSource, Body
from proxy.upstream.turns import Ticket, TurnClass, class_for_blob

#: Bytes of a window (D14): half of it is one turn, the other half lets readers differ.
WINDOW_BYTES = 16 << 20
#: A reader this far ahead of the mark takes turns of its own.
FAR = 16 << 20
#: Tries without a single new byte before a flight fails.
TRIES = 6
#: Tries for a blob that the upstream does not have yet although a manifest names it.
LATE_TRIES = 4
#: Readers are told about progress after this many bytes …
STEP_BYTES = 1 << 20
#: … or after this many seconds.
STEP_SECONDS = 0.02


#: The longest pause that a Retry-After may ask for inside a flight, in seconds.
MAX_PAUSE = 30.0
#: What is worth another try; everything else ends a flight or a source at once.
PASSING = (UpstreamUnavailable, UpstreamTimeout, Throttled, TokenServiceFailed)


class State(StrEnum):
    WAITING = "waiting"
    FILLING = "filling"
    VERIFIED = "verified"
    LANDED = "landed"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class FlightSettings:
    """What a flight may do. ``pause`` gives the seconds to wait before try ``n`` (1, 2, …)."""

    on_abandon: str = "finish"
    window_bytes: int = WINDOW_BYTES
    far: int = FAR
    pause: Callable[[int], float] = lambda n: random.uniform(0, min(5.0, 0.1 * 2**n))


class Flight:
    """The one fetch of ``digest``."""

    def __init__(
        self,
        digest: Digest,
        size: int | None,
        *,
        store: Store,
        settings: FlightSettings,
        metrics: Metrics,
        log: Logger,
        on_gone: Callable[[Flight], None],
    ) -> None:
        self.digest = digest
        self.size = size
        self.state = State.WAITING
        self.error: PullError | None = None
        self.is_over = False  # the fill task has given everything back
        self.mark = 0  # bytes that readers may have
        self.ticket = Ticket(class_for_blob(size))
        self.sources: dict[tuple[str, str], BlobSource] = {}
        self.proved: set[tuple[str, str]] = set()
        self.readers: set[Reader] = set()
        self.staging: Staging | None = None
        self.window: Window | None = None
        self.verifier: Verifier = digest.verifier()
        self.settings = settings
        self.metrics = metrics
        self._store = store
        self._log = log
        self._on_gone = on_gone
        self._named: set[tuple[str, str]] = set()
        self._clients: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._told = 0
        self._told_at = 0.0
        self._task: asyncio.Task[None] | None = None

    # -- readers ---------------------------------------------------------------------------

    def join(self, source: BlobSource, client: str, *, named: bool) -> Reader:
        """A new reader, through ``source``, on behalf of ``client``. Starts the fill if need be.

        ``named`` says that a manifest of the source's repository names the digest.
        """
        source = self.sources.setdefault(source.key, source)
        if named:
            self._named.add(source.key)
        reader = Reader(self, source, client)
        self.readers.add(reader)
        self._clients[client] += 1
        self.ticket.join(client)
        self.ticket.move(class_for_blob(self.size))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"fill {self.digest}")
        return reader

    def leave(self, reader: Reader) -> None:
        """``reader`` is gone; the last one decides what becomes of the fill."""
        if reader not in self.readers:
            return
        self.readers.discard(reader)
        self._clients[reader.client] -= 1
        if not self._clients[reader.client]:
            del self._clients[reader.client]
            self.ticket.leave(reader.client)
        self.reader_moved()
        if not self.readers and self.state in (State.WAITING, State.FILLING):
            self._abandon()

    def _abandon(self) -> None:
        keeps = self.settings.on_abandon == "finish" and self.window is None
        self.metrics.fills_abandoned.labels("finish" if keeps else "cancel").inc()
        if keeps:
            self.ticket.move(TurnClass.ABANDONED)
            return
        self.state = State.ABANDONED
        self._on_gone(self)
        self.cancel()

    def cancel(self) -> asyncio.Task[None] | None:
        """Stop the fill; returns its task for whoever wants to wait for the end."""
        if self._task is not None:
            self._task.cancel()
        return self._task

    def reader_moved(self) -> None:
        """A reader went on or left: a window that waits for its readers may move on."""
        if self.window is not None:
            self._wake()

    async def changed(self) -> None:
        """Wait for the next step of progress, or the end."""
        await self._changed.wait()

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    # -- the fill --------------------------------------------------------------------------

    async def _run(self) -> None:
        landed = False
        try:
            await self._fill()
            self._verify()
            landed = await self._land()
        except asyncio.CancelledError:
            self._fail(ShuttingDown())
            raise
        except PullError as error:
            self._fail(error)
        except Exception as error:  # a defect of ours must reach readers, not hang them
            self._log.exception("flight_defect", digest=str(self.digest))
            self._fail(InternalError(f"{type(error).__name__} in a flight"))
        finally:
            if self.staging is not None and not landed:
                await asyncio.shield(self.staging.discard())
            self.is_over = True
            self._on_gone(self)
            self._wake()

    async def _fill(self) -> None:
        tries = 0
        while not self._is_complete:
            before, source = self.received, self._next_source()
            try:
                await self._turn(source)
                self.ticket.urgent = False
                if self.received == before and not self._is_complete:
                    raise UpstreamUnavailable(f"{source.key[0]}: an answer without a byte")
                tries = 0
            except (Denied, NotFound) as error:
                tries += 1
                if not self._may_come(error, source, tries):
                    self._refused(source, error)
                    continue
                await self._pause(source, tries, error)
            except PASSING as error:
                tries = 1 if self.received > before else tries + 1
                if tries >= TRIES:
                    raise
                await self._pause(source, tries, error)

    def _may_come(self, error: PullError, source: BlobSource, tries: int) -> bool:
        """A blob that a fresh manifest names is not missing, it is late (eventual consistency)."""
        return isinstance(error, NotFound) and source.key in self._named and tries < LATE_TRIES

    @property
    def is_waiting(self) -> bool:
        """Has nothing come yet?"""
        return self.state is State.WAITING

    @property
    def is_verified(self) -> bool:
        """Is every byte there, and the digest right?"""
        return self.state in (State.VERIFIED, State.LANDED)

    @property
    def received(self) -> int:
        """Bytes taken in, whether or not readers may have them yet."""
        return self.verifier.count

    @property
    def _is_complete(self) -> bool:
        return self.size is not None and self.received == self.size and self._has_place

    @property
    def _has_place(self) -> bool:
        return self.staging is not None or self.window is not None

    def _next_source(self) -> BlobSource:
        """Proved sources first, in the order their readers came."""
        for key, source in self.sources.items():
            if key in self.proved:
                return source
        return next(iter(self.sources.values()))

    async def _pause(self, source: BlobSource, tries: int, error: PullError) -> None:
        upstream, _ = source.key
        self.metrics.upstream_resumes.labels(upstream).inc()
        self._log.info(
            "fill_resumes", digest=str(self.digest), at=self.received, tries=tries, cause=str(error)
        )
        if self.sources.pop(source.key, None) is not None:
            self.sources[source.key] = source  # another source, if there is one, goes next
        self.ticket.urgent = self.received > 0
        asked = min(error.retry_after or 0.0, MAX_PAUSE)
        await asyncio.sleep(max(asked, self.settings.pause(tries)))

    def _refused(self, source: BlobSource, error: PullError) -> None:
        """The upstream denies ``source``: it and its readers go, no others (D12)."""
        self.sources.pop(source.key, None)
        self.proved.discard(source.key)
        for reader in self.readers:
            if reader.source.key == source.key:
                reader.refusal = error
        self._wake()
        if not self.sources:
            raise error

    async def _turn(self, source: BlobSource) -> None:
        length = await self._turn_length(source)
        async with source.open(self.received, length, self.ticket) as body:
            await self._settle(source, body)
            whole = await Pump(self._take).run(body)
            body.learn()
            if self.size is None and whole:
                self.size = self.received  # a body without a length ends where it ends

    async def _turn_length(self, source: BlobSource) -> int:
        """How much to ask for. A window asks for no more than its readers leave room for."""
        if self.window is None:
            return source.turn_bytes
        await self._room_in_window()
        return self.window.capacity // 2

    async def _settle(self, source: BlobSource, body: Body) -> None:
        """The first answer settles size and place; later ones must agree with it."""
        self.proved.add(source.key)
        if body.total is not None:
            if self.size is not None and body.total != self.size:
                raise SizeMismatch(self.size, body.total)
            self.size = body.total
        if self._has_place:
            return
        if self.readers:
            self.ticket.move(class_for_blob(self.size))
        try:
            self.staging = await self._store.create(self.digest, self.size)
            self.verifier = self.staging.verifier
        except NoRoom as error:
            self._log.info("fill_without_disk", digest=str(self.digest), cause=str(error))
            self._open_window()
        self.state = State.FILLING
        self._wake()

    def _open_window(self) -> None:
        self.window = Window(self.received, self.settings.window_bytes)
        if not self.readers:
            raise StoreFailed(f"no room for {self.digest} and nobody reads it")

    async def _take(self, chunks: list[bytes]) -> None:
        """Take in one batch: to the file, or through the window when the file cannot grow."""
        total = self.received + sum(map(len, chunks))
        if self.size is not None and total > self.size:
            raise SizeMismatch(self.size, total)
        if self.window is None and self.staging is not None:
            try:
                await self.staging.append(chunks)
            except StoreFull as error:
                self._log.warning("fill_without_disk", digest=str(self.digest), cause=str(error))
                self._open_window()
        if self.window is not None:
            await self._through_window(self.window, chunks)
        self._advance()

    async def _through_window(self, window: Window, chunks: list[bytes]) -> None:
        for chunk in chunks:
            await self._room_in_window()
            await asyncio.to_thread(self.verifier.update, chunk)
            window.append(chunk)

    async def _room_in_window(self) -> None:
        """Wait until the fastest reader is within half a window of the end."""
        window = self.window
        while window is not None and self.readers:
            if max(r.position for r in self.readers) >= window.end - window.capacity // 2:
                return
            self._advance(now=True)
            await self.changed()

    def _advance(self, *, now: bool = False) -> None:
        """Let readers have what has come, but for what completes the blob (D10)."""
        if self.received == self.size:
            return
        self.mark = self.received
        time = asyncio.get_running_loop().time()
        step = self.mark - self._told >= STEP_BYTES or time - self._told_at >= STEP_SECONDS
        if step or now:
            self._told, self._told_at = self.mark, time
            self._wake()

    def _verify(self) -> None:
        if not self.verifier.matches():
            self.metrics.digest_mismatch.labels("upstream").inc()
            raise DigestMismatch(self.digest, self.verifier.actual())
        self.mark = self.received
        self.state = State.VERIFIED
        self._wake()

    async def _land(self) -> bool:
        """Into the store. Failing here costs the cache entry, not the readers."""
        if self.staging is None or self.window is not None:
            return False
        try:
            await self.staging.commit()
        except StoreFailed as error:
            self._log.error("fill_not_kept", digest=str(self.digest), cause=str(error))
            return False
        for upstream, repository in self.proved:
            await self._store.link(upstream, repository, [(self.digest, self.size)])
        self.state = State.LANDED
        return True

    def _fail(self, error: PullError) -> None:
        if self.is_verified:
            return  # the readers have, or can have, every byte
        self.error = error
        self._wake()
        if self.state is not State.ABANDONED:
            self.state = State.FAILED
            self.metrics.fill_failures.labels(error.reason).inc()
            self._log.warning(
                "fill_failed", digest=str(self.digest), at=self.received, cause=str(error)
            )

    def __repr__(self) -> str:
        return (
            f"<Flight {self.digest} {self.state} {self.mark}/{self.size}, "
            f"{len(self.readers)} readers, {len(self.sources)} sources>"
        )


class Flights:
    """The table of flights: at most one per digest."""

    def __init__(
        self, *, store: Store, settings: FlightSettings, metrics: Metrics, log: Logger
    ) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._flights: dict[Digest, Flight] = {}
        # Strong references until the task ends, abandoned flights included.
        self._running: set[Flight] = set()

    def __len__(self) -> int:
        return len(self._flights)

    def all(self) -> Collection[Flight]:
        return self._flights.values()

    def find(self, digest: Digest) -> Flight | None:
        return self._flights.get(digest)

    def join(
        self, source: BlobSource, client: str, *, size: int | None, named: bool
    ) -> tuple[Reader, bool]:
        """Join the flight of the source's digest, or open it; the second value says it was there.

        Does not suspend: between the caller's look into the store and this no fill can land unseen.
        """
        flight = self._flights.get(source.digest)
        joined = flight is not None
        if flight is None:
            flight = Flight(
                source.digest,
                size,
                store=self._store,
                settings=self._settings,
                metrics=self._metrics,
                log=self._log,
                on_gone=self._gone,
            )
            self._flights[source.digest] = flight
            self._running.add(flight)
        else:
            self._metrics.coalesced.labels("blob").inc()
        return flight.join(source, client, named=named), joined

    def _gone(self, flight: Flight) -> None:
        """``flight`` takes no more readers; called again when its task ends."""
        if self._flights.get(flight.digest) is flight:
            del self._flights[flight.digest]
        if flight.is_over:
            self._running.discard(flight)

    async def close(self) -> None:
        """Stop every fill and wait until each has given back what it held."""
        tasks = [task for flight in self._running if (task := flight.cancel()) is not None]
        if tasks:
            await asyncio.wait(tasks)
        self._flights.clear()
        self._running.clear()

    def __repr__(self) -> str:
        return f"<Flights {len(self._flights)} in the air>"
