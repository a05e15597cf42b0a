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
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Chunk, Digest
from proxy.oci.errors import PullError, SizeMismatch, UpstreamError, UpstreamUnavailable
from proxy.pull.intake import Intake
from proxy.pull.progress import Progress
from proxy.pull.pump import pump
from proxy.pull.reader import Crowd
from proxy.pull.sources import Key, Source, Sources, TurnBody, Verdict
from proxy.pull.window import WindowBudget
from proxy.store.store import Store
from proxy.upstream.turns import Ticket, TurnClass, class_for_blob

#: Bytes of a window (D14): half of it is one turn, the other half lets readers differ.
WINDOW_BYTES = 16 << 20
#: A reader this far ahead of the mark takes turns of its own.
FAR = 16 << 20
#: How long, in seconds, a turn without Range is held for readers that do not move (D14).
PATIENCE = 30.0
#: The longest pause that a Retry-After may ask for inside a flight, in seconds.
MAX_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class FlightSettings:
    """What a flight may do: sizes in bytes; ``patience`` in seconds; ``pause`` gives the seconds to
    wait before try ``n`` (1, 2, …); ``clock`` is monotonic."""

    on_abandon: str = "finish"
    window_bytes: int = WINDOW_BYTES
    far: int = FAR
    patience: float = PATIENCE
    pause: Callable[[int], float] = lambda n: random.uniform(0, min(5.0, 0.1 * 2 ** min(n, 16)))
    clock: Callable[[], float] = time.monotonic

    def pause_after(self, tries: int, error: PullError) -> float:
        """Seconds to wait after failure number ``tries``: what was asked for, or our own."""
        return max(min(error.retry_after or 0.0, MAX_PAUSE), self.pause(tries))


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
        on_full: Callable[[], None],
        image: Key | None = None,
    ) -> None:
        """``on_full`` is called when a window takes the place of the file. ``image`` is the
        repository whose turns it takes."""
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
        self._crowd = crowd
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._on_full = on_full

    @property
    def received(self) -> int:
        """Bytes taken in, whether or not readers may have them yet."""
        return self.intake.received

    async def run(self, store: Store, on_begun: Callable[[], None]) -> None:
        """Take turns until every byte is in. Calls ``on_begun`` once the place is settled.

        Raises ``PullError`` when no source is left that is worth another try.
        """
        while not self._is_complete:
            before, source = self.received, self.sources.next()
            try:
                await self._turn(source, store, on_begun)
                if self.received == before and not self._is_complete:
                    raise UpstreamUnavailable(f"{source.key[0]}: an answer without a byte")
                self.sources.went_on()
                self.ticket.urgent = False
                self.ticket.retry = ""
            except UpstreamError as error:
                if self.received > before:
                    self.sources.went_on()
                await self._failed(source, error)
        await self.intake.drain()

    @property
    def has_begun(self) -> bool:
        """May a client have its 200, though perhaps no byte?"""
        return self.intake.has_place or self._crowd.has_answered

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

    async def _turn(self, source: Source, store: Store, on_begun: Callable[[], None]) -> None:
        length = await self.intake.room() or source.turn_bytes
        async with source.open(self.received, length, self.ticket) as body:
            if body.total is not None:
                self._settle_size(body.total)
            self.sources.prove(source)
            if not self.intake.has_place:
                await self.intake.open(store, self.size)
                on_begun()
                self.progress.tell()
            whole = await self._pump(source, body)
            body.learn()
        if whole and self.size is None and self._is_end(source):
            self._settle_size(self.received)

    async def _pump(self, source: Source, body: TurnBody) -> bool:
        """Take in the turn's bytes; true when its body came to its end."""
        wait = not source.ranged

        async def take(chunks: list[Chunk]) -> None:
            total = self.received + sum(map(len, chunks))
            if self.size is not None and total > self.size:
                raise SizeMismatch(self.size, total)
            if self.size is None:
                self._crowd.expect(total)
            await self.intake.take(chunks, wait=wait)
            self._publish(now=False)

        return await pump(body, take, lambda: self.intake.is_stuck or body.is_overdue)

    def _is_end(self, source: Source) -> bool:
        """Nobody named the size, and a turn's body has ended: is that the end of the blob?"""
        return not source.ranged or self.intake.verifier.matches()

    def _settle_size(self, size: int) -> None:
        """Raises ``SizeMismatch`` when it contradicts what is settled, or everybody's promise."""
        if self.size is None:
            self._crowd.settle(size)
            self.size = size
            self.classify()
        elif size != self.size:
            raise SizeMismatch(self.size, size)

    def classify(self) -> None:
        """Stand in the class that the size gives, or what somebody was promised."""
        if self._crowd:
            size = self._crowd.promise if self.size is None else self.size
            self.ticket.move(class_for_blob(size))

    def _publish(self, now: bool) -> None:
        """Let readers have what has come, but for what may complete the blob (D10)."""
        ready = self.intake.end
        if self.size is None:
            self.progress.reach(ready - 1, now=now)
        elif ready < self.size:
            self.progress.reach(ready, now=now)

    def _disk_full(self, error: Exception) -> None:
        self._log.warning("fill_without_disk", digest=str(self.digest), cause=str(error))
        self._on_full()

    def __repr__(self) -> str:
        return f"<Fill {self.digest} {self.received}/{self.size}>"
