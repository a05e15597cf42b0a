"""One fetch per digest that any number of readers share (DESIGN D2, D8, D10, D12, D14).

Theory of operation
-------------------
A *flight* is the one fetch of a digest. The first reader opens it (or prefetch.py, before anybody
reads), later ones join it at any time and start at any byte; a task owned by the ``Flights`` table
fills it, so it outlives the client that began it. Bytes go socket → staging file and running hash
(one thread hop per batch, the next batch is received meanwhile); readers follow the growing file at
their own pace and are told about progress in steps, not per chunk. ``fill.py`` is where the bytes
come from, ``intake.py`` where they go, ``reader.py`` how they reach a client.

States, and who moves them (always the fill task, but for the last row):

* WAITING   nothing has come yet: the ticket stands in a gate's queue
* FILLING   an upstream gives it, or another node, or there is something of it; ``mark`` grows
* VERIFIED  every byte is there and the digest is right: readers may have the last bytes. Until then
            the bytes of the last batch are held back, or the last byte while the size is unknown
            (D10)
* LANDED    fsynced, renamed, indexed: the store serves it from here on
* FAILED    ``error`` says why; nothing is kept; every reader raises it
* ABANDONED the last reader left and ``on_abandon`` is ``cancel`` (or there is no file to finish):
            moved by ``leave``

A *backer* (a task, tasks.py) wants the blob in the store and does not read it. While nobody reads,
the flight stands in the last class of the queue, in its backers' names, so that tasks take turns
there; while somebody does, for its readers alone. It goes on for a backer as for a reader.

A flight that is FAILED or ABANDONED leaves the table in the same loop turn, so that whoever comes
then opens a flight of its own, with a staging file of its own. One that is VERIFIED stays there
until its task has ended, so that nothing is fetched again while it is being stored.

Cancellation: a reader is a plain object, cancelling its task only runs ``close``. Cancelling the
fill task (shutdown, abandonment) waits for the append under way in its thread, discards the staging
file and fails the flight; ``_ended`` runs even if the task was cancelled before its first step. The
staging file's descriptor is given back by whichever goes last, the task or the last reader. A crash
leaves a staging file that the store removes at the next start.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from enum import StrEnum

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    DigestMismatch,
    InternalError,
    PullError,
    ShuttingDown,
    StoreFailed,
)
from proxy.pull.fill import Fill
from proxy.pull.flight_settings import FlightSettings
from proxy.pull.ground import Fellows
from proxy.pull.intake import Intake
from proxy.pull.reader import Crowd, Piece, Reader
from proxy.pull.sharing import Sharing, share
from proxy.pull.sources import Key, Source, Sources
from proxy.pull.window import WindowBudget
from proxy.store.store import Store
from proxy.store.work import finish
from proxy.upstream.turns import Ticket, TurnClass

__all__ = ["Flight", "FlightSettings", "Flights", "State"]


class State(StrEnum):
    WAITING = "waiting"
    FILLING = "filling"
    VERIFIED = "verified"
    LANDED = "landed"
    FAILED = "failed"
    ABANDONED = "abandoned"


class Flight:
    """The one fetch of ``digest``."""

    def __init__(
        self,
        digest: Digest,
        *,
        store: Store,
        settings: FlightSettings,
        windows: WindowBudget,
        metrics: Metrics,
        log: Logger,
        on_gone: Callable[[Flight], None],
        image: Key | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """``on_gone`` is called when it takes no more readers, and again when its task ends.
        ``image``: the repository whose turns it takes, its first reader's. ``sharing``: its part in
        a fleet."""
        self.digest = digest
        self.state = State.WAITING
        self.error: PullError | None = None
        self.is_over = False  # the fill task has given everything back
        self.readers = Crowd()
        self._backers: Counter[str] = Counter()
        self._is_backed_only = True  # nobody else has ever wanted it
        self.settings = settings
        self._fill = Fill(
            digest,
            crowd=self.readers,
            settings=settings,
            windows=windows,
            metrics=metrics,
            log=log,
            store=store,
            on_begun=self._begun,
            on_full=self._disk_full,
            image=image,
            sharing=sharing,
        )
        self.sharing = sharing
        self._metrics = metrics
        self._store = store
        self._log = log
        self._on_gone = on_gone
        self._task: asyncio.Task[None] | None = None

    @property
    def is_waiting(self) -> bool:
        """Has nothing come yet?"""
        return self.state is State.WAITING

    @property
    def is_verified(self) -> bool:
        """Is every byte there, and the digest right?"""
        return self.state in (State.VERIFIED, State.LANDED)

    @property
    def is_stored(self) -> bool:
        """Is it in the store?"""
        return self.state is State.LANDED

    @property
    def size(self) -> int | None:
        """In bytes, as the upstream says it; ``None`` until then."""
        return self._fill.size

    @property
    def mark(self) -> int:
        """Bytes that readers may have."""
        return self._fill.progress.mark

    @property
    def received(self) -> int:
        """Bytes taken in, whether or not readers may have them yet."""
        return self._fill.received

    @property
    def ticket(self) -> Ticket:
        """What stands in a gate's queue for all readers."""
        return self._fill.ticket

    @property
    def sources(self) -> Sources:
        """The repositories that may be asked."""
        return self._fill.sources

    @property
    def proved(self) -> Collection[Key]:
        """The repositories through which the upstream has given bytes of it."""
        return self._fill.sources.proved

    @property
    def intake(self) -> Intake:
        return self._fill.intake

    # -- readers ---------------------------------------------------------------------------

    def join(self, source: Source, client: str, *, size: int | None, named: bool) -> Reader:
        """A new reader, through ``source``, on behalf of ``client``. Starts the fill if need be.

        ``size`` is what the reader's client may be told before the upstream answers; ``named`` says
        that a manifest of the source's repository names the digest.
        """
        source = self.sources.add(source, named=named)
        reader = Reader(self, source, client, size)
        if size is not None:
            self._fill.doubt_size(size)
        reader.check_promise(self.size)
        if self.size is None and size is not None and size < self._fill.came:
            reader.check_promise(self._fill.came)
        self.readers.add(reader)
        self._is_backed_only = False
        for backer in self._backers:
            self.ticket.leave(backer)
        self._fill.join(client)
        self.reader_moved()
        self._start()
        return reader

    def begin(self, source: Source) -> None:
        """Fetch it through ``source``, which a manifest names it for, though nobody reads it yet:
        behind everybody else, until somebody joins."""
        self.sources.add(source, named=True)
        self._is_backed_only = False
        self.ticket.move(TurnClass.ABANDONED)
        self._start()

    def back(self, source: Source, client: str) -> None:
        """The same, in the name of ``client``, who sees to it that it goes on until ``unback``."""
        self.sources.add(source, named=True)
        self._backers[client] += 1
        if not self.readers:
            self.ticket.move(TurnClass.ABANDONED)
            self.ticket.join(client)
        self._start()

    def unback(self, client: str) -> None:
        """``client`` wants it no more."""
        self._backers[client] -= 1
        if self._backers[client]:
            return
        del self._backers[client]
        self.ticket.leave(client)
        if self._backers or self.readers or not self._is_under_way:
            return
        keeps = self.settings.on_abandon == "finish" and not self._is_backed_only
        if not keeps:
            self._abandon(keep=False)

    def stop_unread(self) -> None:
        """End a fetch that nobody reads, nor backs."""
        if not self.readers and not self._backers and self._is_under_way:
            self._abandon(keep=False)

    @property
    def _is_under_way(self) -> bool:
        return self.state in (State.WAITING, State.FILLING)

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"fill {self.digest}")
            self._task.add_done_callback(self._ended)

    def leave(self, reader: Reader, *, for_good: bool = False) -> None:
        """``reader`` is gone; the last one decides what becomes of the fill. One that is gone
        ``for_good`` wants nothing begun."""
        if reader not in self.readers:
            return
        if self.readers.discard(reader):
            self._fill.leave(reader.client)
        self.reader_moved()
        if self.readers:
            return
        if self.is_over:
            self.intake.release()
        elif self._is_under_way:
            keep = self.settings.on_abandon == "finish" and not (for_good and self.is_waiting)
            self._abandon(keep=(keep or bool(self._backers)) and self.intake.window is None)

    def _disk_full(self) -> None:
        """There is no file to finish any more."""
        if not self.readers:
            self._abandon(keep=False)

    def _abandon(self, *, keep: bool) -> None:
        """Nobody reads any more: go on behind everybody else, or stop."""
        self._metrics.fills_abandoned.labels("finish" if keep else "cancel").inc()
        if keep:
            self.ticket.move(TurnClass.ABANDONED)
            for backer in self._backers:
                self.ticket.join(backer)
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
        """A reader came, went on or left: a window that waits for its readers may move on."""
        self.intake.reader_moved()

    async def changed(self, *, beyond: bool = False) -> None:
        """Wait for the next step of progress, ``beyond`` the mark as well, or the end."""
        await self._fill.progress.changed(beyond=beyond)

    async def let_others_go(self) -> None:
        """Go on in a later turn of the loop: there is more at hand than one turn is to send."""
        await self._fill.progress.let_others_go()

    def front(self, position: int) -> int:
        """How far that has come which will bring the byte at ``position``."""
        return self._fill.front(position)

    def ahead(self, position: int, limit: int) -> Piece | None:
        """Bytes beyond the mark, at most to ``limit``, if those at ``position`` are there."""
        return self._fill.ahead(position, limit)

    # -- the task --------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._fill.run()
            await self._verify()
            await self._land()
        except asyncio.CancelledError:
            self._fail(ShuttingDown())
            raise
        except PullError as error:
            self._fail(error)
        except Exception as error:  # a defect of ours must reach readers, not hang them
            self._log.exception("flight_defect", digest=str(self.digest))
            self._fail(InternalError(f"{type(error).__name__} in a flight"))
        finally:
            try:
                if self.sharing is not None:
                    await finish(asyncio.ensure_future(self.sharing.close()))
            finally:
                await self.intake.discard()

    def _begun(self) -> None:
        if self.state is State.WAITING:
            self.state = State.FILLING

    async def _verify(self) -> None:
        verifier = self.intake.verifier
        if not verifier.matches():
            self._metrics.digest_mismatch.labels("upstream").inc()
            self._fill.distrust()
            if self.sharing is not None:
                await self.sharing.was_wrong()
            raise DigestMismatch(self.digest, verifier.actual())
        self.state = State.VERIFIED
        self._fill.progress.reach(self.received)
        self._fill.progress.tell()
        if self.sharing is not None:
            await self.sharing.was_right()

    async def _land(self) -> None:
        """Into the store. Failing here costs the cache entry, not the readers."""
        try:
            if not await self.intake.commit():
                return
        except StoreFailed as error:
            self._log.error("fill_not_kept", digest=str(self.digest), cause=str(error))
            return
        self.state = State.LANDED
        if self.sharing is not None:
            await self.sharing.landed()
        for upstream, repository in tuple(self.proved):
            await self._store.link(upstream, repository, [(self.digest, self.size)])

    def _fail(self, error: PullError) -> None:
        """End without a verified blob. Does nothing if there is a result already."""
        if self.is_verified or self.error is not None:
            return
        self.error = error
        if self.state is not State.ABANDONED:
            self.state = State.FAILED
            self._metrics.fill_failures.labels(error.reason).inc()
            self._log.warning(
                "fill_failed", digest=str(self.digest), at=self.received, cause=str(error)
            )
        self._on_gone(self)
        self._fill.progress.tell()

    def _ended(self, _task: asyncio.Task[None]) -> None:
        """The task is over, perhaps cancelled before its first step."""
        self._fail(ShuttingDown())  # unless there is a result already
        self.is_over = True
        if not self.readers:
            self.intake.release()
        self._on_gone(self)
        self._fill.progress.tell()

    def __repr__(self) -> str:
        return (
            f"<Flight {self.digest} {self.state} {self.mark}/{self.size}, "
            f"{len(self.readers)} readers, {len(self.sources)} sources>"
        )


class Flights:
    """The table of flights: at most one per digest."""

    def __init__(
        self,
        *,
        store: Store,
        settings: FlightSettings,
        metrics: Metrics,
        log: Logger,
        fellows: Fellows | None = None,
    ) -> None:
        """``fellows``: with whom blobs are shared, in a fleet."""
        self._store = store
        self._fellows = fellows
        self._settings = settings
        self._windows = WindowBudget(settings.window_bytes)
        self._metrics = metrics
        self._log = log
        self._flights: dict[Digest, Flight] = {}
        # Strong references until the task ends, abandoned flights included.
        self._running: set[Flight] = set()
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._flights)

    def all(self) -> Collection[Flight]:
        return self._flights.values()

    def find(self, digest: Digest) -> Flight | None:
        return self._flights.get(digest)

    def join(
        self, source: Source, client: str, *, size: int | None, named: bool
    ) -> tuple[Reader, bool]:
        """Join the flight of the source's digest, or open it; the second value says it was there.

        Does not suspend: between the caller's look into the store and this no fill can land unseen.
        Raises ``ShuttingDown``.
        """
        if self._is_closing:
            raise ShuttingDown()
        flight = self._flights.get(source.digest)
        joined = flight is not None
        if flight is None:
            flight = self._open(source, size if named else None)
        else:
            self._metrics.coalesced.labels("blob").inc()
        return flight.join(source, client, size=size, named=named), joined

    def begin(self, source: Source, size: int | None = None) -> Flight | None:
        """Open a flight that nobody reads; None if there is one of its digest, or none may start.
        ``size`` in bytes, as the manifest says that names it.

        Does not suspend, like ``join``.
        """
        if self._is_closing or source.digest in self._flights:
            return None
        flight = self._open(source, size)
        flight.begin(source)
        return flight

    def back(self, source: Source, client: str, size: int | None = None) -> Flight:
        """The flight of the source's digest, opened if need be, with ``client`` as a backer, who
        has to ``unback`` it; ``size`` as for ``begin``. Does not suspend, like ``join``. Raises
        ``ShuttingDown``."""
        if self._is_closing:
            raise ShuttingDown()
        flight = self._flights.get(source.digest) or self._open(source, size)
        flight.back(source, client)
        return flight

    def _open(self, source: Source, size: int | None) -> Flight:
        """``size`` is known of a blob that a manifest names: others may bring it then."""
        sharing = None
        if self._fellows is not None:
            sharing = share(self._fellows, source.key[0], source.digest, size)
        flight = Flight(
            source.digest,
            store=self._store,
            settings=self._settings,
            windows=self._windows,
            metrics=self._metrics,
            log=self._log,
            on_gone=self._gone,
            image=source.key,
            sharing=sharing,
        )
        self._flights[source.digest] = flight
        self._running.add(flight)
        return flight

    def _gone(self, flight: Flight) -> None:
        if self._flights.get(flight.digest) is flight:
            del self._flights[flight.digest]
        if flight.is_over:
            self._running.discard(flight)

    async def close(self) -> None:
        """Stop every fill and wait until each has given back what it held."""
        self._is_closing = True
        tasks = [task for flight in self._running if (task := flight.cancel()) is not None]
        if tasks:
            await asyncio.wait(tasks)

    def __repr__(self) -> str:
        return f"<Flights {len(self._flights)} in the air>"
