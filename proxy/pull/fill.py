"""How a flight gets its bytes: turn by turn, from whichever source gives them (DESIGN D2, D8, D12).

A fill takes turns from its *sources*, the repositories its readers came through, until every byte
has been taken in. A body that breaks goes on at its byte, at another source if there is one; an
upstream's refusal removes that source and the readers who came through it, no others. Where the
bytes go is the business of ``intake.py``.

Sizes: what a manifest says of a blob is a *promise* to the readers who came through it. The fill
believes the upstream (the digest decides in the end); readers who were promised something else are
refused. A source that contradicts every reader's promise, or what is settled, is refused itself. An
upstream that names no size is read to its end.

An upstream without Range gives the whole body in every turn, and what is already held is skipped.
Such a turn is not cut for others, because its successor would start all over; it is cut only when
it stands still.

All this is the business of one task, the *lead*. Of a large blob it may have further turns bring
other parts meanwhile (``spread.py``); what it brings itself is then not what follows the bytes
received, but the first part that nobody brings yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Chunk, Digest
from proxy.oci.errors import PullError, SizeMismatch, UpstreamError, UpstreamUnavailable
from proxy.pull.flight_settings import WHILES, FlightSettings
from proxy.pull.haul import Haul
from proxy.pull.intake import Intake
from proxy.pull.pace import Pace
from proxy.pull.progress import Progress
from proxy.pull.pump import pump
from proxy.pull.reader import Crowd, Piece
from proxy.pull.recall import Recall, Recalled
from proxy.pull.segments import Segment, may_gather
from proxy.pull.shared_fill import SharedFill
from proxy.pull.sharing import Sharing
from proxy.pull.sources import Key, Source, Sources, TurnBody, Verdict
from proxy.pull.spread import Spread
from proxy.pull.window import WindowBudget
from proxy.store.blobs import StoreFull
from proxy.store.store import Store
from proxy.upstream.turns import Ticket, TurnClass, class_for_blob


class Fill:
    """The bytes of one digest, on their way in. Run once, by one task."""

    def __init__(
        self,
        digest: Digest,
        *,
        crowd: Crowd,
        settings: FlightSettings,
        windows: WindowBudget,
        metrics: Metrics,
        log: Logger,
        store: Store,
        on_begun: Callable[[], None],
        on_full: Callable[[], None],
        image: Key | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """``on_begun`` is called when it is known that there are bytes, or there is a place for
        them in ``store``; ``on_full`` when a window takes the place of the file. ``image`` is the
        repository whose turns it takes. ``sharing``: its part in a fleet, if it has one."""
        self.digest = digest
        self.size: int | None = None  # as the upstream says, or found out at the end
        self.sources = Sources()
        self.ticket = Ticket(TurnClass.BLOB, image=image)
        self.progress = Progress()
        self.intake = Intake(
            digest,
            windows=windows,
            patience=settings.patience,
            crowd=crowd,
            progress=self._publish,
            on_full=self._disk_full,
        )
        self._pace = Pace(settings.stopwatch)  # of the lead
        self._spread = Spread(
            str(digest),
            intake=self.intake,
            least=settings.segment_bytes,
            long=settings.long_segment,
            carry=self._carry_segment,
            publish=self._publish,
            pause_after=settings.pause_after,
            count=self._count_segment,
            moved=self._moved,
            delay=settings.gather,
            pace=self._pace,
            stopwatch=settings.stopwatch,
            trial=settings.trial,
            is_disturbed=lambda: sharing is not None and sharing.is_receiving,
        )
        self._crowd = crowd
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._store = store
        self._on_begun = on_begun
        self._on_full = on_full
        self._sharing = sharing
        self._is_begun = False
        self._is_promise = False  # the size: a manifest says it, and no upstream yet
        self._expected = 0  # without a size: who was promised less is refused
        self._recall = Recall(self.ticket)
        self._opening = asyncio.Lock()

    @property
    def received(self) -> int:
        """Bytes taken in, whether or not readers may have them yet."""
        return self.intake.received

    @property
    def came(self) -> int:
        """The bytes that the blob has at least, as long as nobody knows its size."""
        return max(self.received, self.intake.end, self._expected)

    async def run(self) -> None:
        """Take turns until every byte is in.

        Raises ``PullError`` when no source is left that is worth another try.
        """
        await self._take_over()
        async with self._shared():
            try:
                while not self._is_complete:
                    source = self.sources.next()
                    segment = await self._spread.lead(source)
                    if segment is not None and not self._has_all():
                        await self._go_on(source, segment)
            finally:
                await self._spread.close()
        await self.intake.drain()

    def _has_all(self) -> bool:
        """Is all of it there, though its size was doubted when the last of it was to be hashed? The
        upstream would say that nothing follows. Raises ``SizeMismatch``, see ``_settle_size``."""
        if self.size is None and self.received and self.intake.verifier.matches():
            self._settle_size(self.received)
        return self._is_complete

    async def _take_over(self) -> None:
        """Begin where the process before us was, if it has left something (DESIGN D15)."""
        size = await self.intake.go_on(self._store)
        if not self.intake.has_place:
            return
        if size is None and self.intake.verifier.matches():
            size = self.received
        try:
            if size is not None:
                self._settle_size(size)
            else:
                self._expect(self.received)
        except SizeMismatch:  # its readers were promised another blob: the upstream has to say
            await self.intake.begin_anew()
            return
        self._log.info("fill_taken_over", digest=str(self.digest), at=self.received)
        self._begin()
        self._publish(now=True)
        self.progress.tell()

    async def _go_on(self, source: Source, segment: Segment) -> None:
        """One turn for a segment. What it does not bring is not lost: a later one will."""
        try:
            try:
                await self._turn(source, segment)
            finally:
                self._spread.ended(segment)
            if segment.at == segment.start and not self._is_complete:
                raise UpstreamUnavailable(f"{source.key[0]}: an answer without a byte")
            self.sources.went_on()
            self.ticket.urgent = False
            self.ticket.retry = ""
        except Recalled:
            return
        except StoreFull:
            self._spread.go_alone()
        except UpstreamError as error:
            if segment.at > segment.start:
                self.sources.went_on()
            if self._sharing is not None:
                self._sharing.upstream_failed()
            await self._failed(source, error)

    def distrust(self) -> None:
        """What came is not the blob: ranges may be to blame."""
        self._spread.distrust()

    def front(self, position: int) -> int:
        """How far that has come which will bring the byte at ``position``."""
        plan = self._spread.plan
        if plan is None or self.intake.window is not None:
            return self.progress.mark
        return max(plan.front(position), self.progress.mark)

    def ahead(self, position: int, limit: int) -> Piece | None:
        """Bytes beyond the mark, at most to ``limit``, if those at ``position`` are there."""
        plan = self._spread.plan
        if plan is None:
            return None
        return self.intake.piece_ahead(position, min(limit, plan.done_after(position)))

    # -- what a fleet brings ---------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _shared(self) -> AsyncIterator[None]:
        """Take part in the fleet while the block lasts."""
        sharing = self._sharing
        if sharing is None or not self._begin_shared(sharing.size):
            yield
            return

        async def put(segment: Segment, chunks: list[Chunk]) -> None:
            await self._put(segment, chunks, sum(map(len, chunks)))

        ground = SharedFill(
            sharing.size,
            intake=self.intake,
            spread=self._spread,
            opened=self._opened,
            put=put,
            bound=self._recall,
        )
        task = asyncio.create_task(sharing.run(ground), name=f"sharing {self.digest}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _opened(self) -> None:
        """Settle the place, with the first bytes."""
        if self.intake.has_place:
            return
        async with self._opening:
            if not self.intake.has_place:
                await self.intake.open(self._store, self.size)
                self._begin()

    def _begin(self) -> None:
        """Whoever reads may be answered: the place for the bytes can fail no more than a disk does
        later."""
        if not self._is_begun:
            self._is_begun = True
            self._on_begun()
            self.progress.tell()

    def _begin_shared(self, size: int) -> bool:
        """May others bring parts of it? Then it has ``size`` bytes, until the upstream says
        something else."""
        if self.intake.window is not None:
            return False
        is_promise = self.size is None
        try:
            self._settle_size(size)
        except SizeMismatch:  # manifests do not agree, or what was taken over: the upstream decides
            return False
        self._is_promise = is_promise
        return True

    def doubt_size(self, size: int) -> None:
        """Another manifest says ``size``: if only one has said anything so far, the upstream has to
        decide, and nobody else may bring parts until then."""
        if self._is_promise and size != self.size and self.received < (self.size or 0):
            self._is_promise, self.size = False, None
            self._spread.go_alone()

    def _moved(self) -> None:
        """Somebody brings something no more, or more than before."""
        self.progress.went_ahead()
        if self._sharing is not None:
            self._sharing.wrote()

    # -- whose it is -----------------------------------------------------------------------

    def join(self, client: str) -> None:
        """``client`` waits for it, too."""
        self.ticket.join(client)
        self._spread.join(client)
        self.classify()

    def leave(self, client: str) -> None:
        """``client`` does not wait any more."""
        self.ticket.leave(client)
        self._spread.leave(client)

    @property
    def has_begun(self) -> bool:
        """May a client have its 200, though perhaps no byte?"""
        return self._is_begun or self._crowd.has_answered

    @property
    def _is_complete(self) -> bool:
        return self.size is not None and self.received == self.size and self.intake.has_place

    async def _failed(self, source: Source, error: UpstreamError) -> None:
        """Find another way, after a pause; raises ``error`` if there is none."""
        now = self._settings.clock()
        match self.sources.judge(source, error, now, has_begun=self.has_begun):
            case Verdict.TRY_AGAIN:
                await self._pause(source, error)
                return
            case Verdict.REFUSED:
                self.sources.drop(source)
                self._spread.drop(source)
                self._crowd.refuse(source, error)
                self.intake.reader_moved()
                self.progress.tell()
                if self.sources:
                    return
        raise error

    async def _pause(self, source: Source, error: PullError) -> None:
        upstream, tries = source.key[0], self.sources.tries(source)
        self.ticket.retry = error.retried_as
        if self.received:
            self._metrics.upstream_resumes.labels(upstream).inc()
            self.ticket.urgent = True  # from the head of its class (D8)
        self._log.info(
            "fill_resumes", digest=str(self.digest), at=self.received, tries=tries, cause=str(error)
        )
        other = self.sources.next()
        if other.key[0] == upstream or self.sources.tries(other):
            await asyncio.sleep(self._settings.pause_after(tries, error))

    # -- one turn --------------------------------------------------------------------------

    async def _turn(self, source: Source, segment: Segment) -> None:
        length = await self.intake.room() or self._length(source, segment)
        async with self._recall.turn(), source.open(segment.at, length, self.ticket) as body:
            self._recall.answered()
            if body.total is not None:
                self.doubt_size(body.total)
                self._settle_size(body.total)
                self._is_promise = False
            self.sources.prove(source)
            self._begin()
            await self._spread.begun(source, segment, body, length)
            whole = await self._carry(segment, body)
            await self._opened()  # of an empty blob as well
            body.learn()
        if self.size is None and self._is_end(source, whole=whole):
            self._settle_size(self.received)

    def _length(self, source: Source, segment: Segment) -> int:
        if segment.stop is not None:
            return segment.stop - segment.at
        size = self._crowd.promise if self.size is None else self.size
        return self._spread.first_length(source, segment.at, size)

    async def _carry_segment(self, segment: Segment, body: TurnBody) -> bool:
        return await self._carry(segment, body, leads=False)

    async def _carry(self, segment: Segment, body: TurnBody, *, leads: bool = True) -> bool:
        """Take in the turn's bytes; true when its body came to its end."""

        async def take(came: list[Chunk]) -> None:
            chunks = self._spread.trim(segment, came)
            count = sum(map(len, chunks))
            with self._pace.taking(count) if leads else nullcontext():
                await self._put(segment, chunks, count, body if leads else None)
            if may_gather(segment, self.received, count):
                await asyncio.sleep(WHILES * self._settings.gather)

        with self._pace.body() if leads else nullcontext():
            return await pump(
                body, take, lambda: segment.is_cut or self.intake.is_stuck or body.is_overdue
            )

    async def _put(
        self, segment: Segment, chunks: list[Chunk], count: int, lead: TurnBody | None = None
    ) -> None:
        """Put ``count`` bytes where the segment is; let readers have what is complete with them.
        If they are next, and of the ``lead``'s body, what has come since follows them."""
        total = segment.at + count
        if self.size is not None and total > self.size:
            raise SizeMismatch(self.size, total)
        if self.size is None:
            self._expect(total)
        is_first = lead is not None and segment.at == self.received == 0
        if is_first and total != self.size:
            await self._show(chunks[0])
        await self._opened()
        if lead is not None and segment.at == self.received:
            await self._take(segment, chunks, lead, total)
        else:
            await self.intake.put(segment.at, chunks)
            self._spread.wrote(segment, count)
        self._spread.close_up()
        if self.size is None:  # perhaps only since it was doubted meanwhile
            self._expect(max(total, self.received))
        self._publish(now=is_first)
        self._moved()

    async def _take(
        self, segment: Segment, chunks: list[Chunk], body: TurnBody, total: int
    ) -> None:
        def went_on(count: int) -> bool:
            self._pace.more(count)
            self._spread.wrote(segment, self.received - segment.at)
            self._publish(now=False)
            self._moved()
            is_in_the_way = self._spread.is_helped or self._spread.is_elsewhere(segment)
            return self.size is not None and not is_in_the_way and not body.is_overdue

        more, stop = None, self.size if segment.stop is None else segment.stop
        if stop is not None and not self._spread.is_helped:
            segment.in_hand = stop  # the haul may get there before it hears of a shorter one
            more = Haul(body, stop - total, went_on).more
        try:
            await self.intake.take(chunks, wait=not body.is_part, more=more)
        finally:
            body.settle()
            self._spread.wrote(segment, self.received - segment.at)
            segment.in_hand = segment.at
        _ = self._spread.trim(segment, [])  # a haul may have ended where another should have begun

    async def _show(self, chunk: Chunk) -> None:
        """Let readers have the first bytes before there is a place for them: the ways to threads,
        which settle it, write and hash, are most of what a client would wait for here."""
        self.intake.show(chunk)
        self._publish(now=True)
        await asyncio.sleep(0)  # let them go first

    def _count_segment(self, source: Source, outcome: str) -> None:
        self._metrics.upstream_segments.labels(source.key[0], outcome).inc()

    def _is_end(self, source: Source, *, whole: bool) -> bool:
        """Nobody named the size, and a turn has ended, at the end of its body if it came
        ``whole``: is that the end of the blob? One that is cut may have just brought the last."""
        return (whole and not source.ranged) or self.intake.verifier.matches()

    def _settle_size(self, size: int) -> None:
        """Raises ``SizeMismatch`` when it contradicts what is settled, or everybody's promise."""
        if self.size is None:
            self._crowd.settle(size)
            self.size = size
            self.classify()
        elif size != self.size:
            raise SizeMismatch(self.size, size)

    def _expect(self, received: int) -> None:
        """So many bytes have come without a size. Raises ``SizeMismatch``, see ``Crowd``."""
        self._crowd.expect(received)
        self._expected = max(self._expected, received)

    def classify(self) -> None:
        """Stand in the class that the size gives, or what somebody was promised."""
        if self._crowd:
            size = self._crowd.promise if self.size is None else self.size
            self.ticket.move(class_for_blob(size))

    def _publish(self, now: bool) -> None:
        """Let readers have what has come, but for what may complete the blob (D10)."""
        ready = self.intake.end
        if self.size is None:
            self.progress.reach(min(ready, self._expected) - 1, now=now)
        elif ready < self.size:
            self.progress.reach(ready, now=now)

    def _disk_full(self, error: Exception) -> None:
        self._log.warning("fill_without_disk", digest=str(self.digest), cause=str(error))
        self._spread.go_alone()
        self._on_full()

    def __repr__(self) -> str:
        return f"<Fill {self.digest} {self.received}/{self.size}>"
