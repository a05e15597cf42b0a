"""Where a fill's bytes go: a staging file, or a window in memory when the disk has no room (D14).

Into the file they may also go out of order, by several turns at once (D9): what is ``put`` beyond
the bytes ``received`` counts once ``advance`` has hashed it. A window has no place for that, so it
is opened only by ``take``, which the fill's own turn alone calls: a further one may be cancelled at
any point, and what a window was given would be lost with it.

The file comes first. When it cannot be made, or stops growing in the middle, the bytes from there
on go through a ``Window``; what is in the file stays there for the readers until the flight ends,
but nothing is kept.

A window moves at the pace of the fastest reader that still needs more. Bytes that have come and
been hashed but have no room yet are its *backlog*. A fill never waits for readers while it holds a
slot, as long as its source is ranged: its turn is cut when there is a backlog, and the next turn
begins when half the window is free, which is as much as it asks for. At a source without Range
every cut would cost the whole body again, so there the fill waits inside its turn, until

* nobody is left who can come closer without a turn of his own (who may need this very slot), or
* no reader has moved for ``patience`` seconds.

That nothing waits for itself: a fill waits for a reader only if that reader wants bytes beyond the
mark; such a reader is either served from file or window by its client alone, or catches up by turns
of its own while the fill holds no slot, or waits at the mark, and then half the window is free.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from proxy.oci.digest import Chunk, Digest, Verifier
from proxy.oci.errors import StoreFailed
from proxy.pull.reader import Crowd, FileSpan, Piece
from proxy.pull.window import Window, WindowBudget
from proxy.store.blobs import FileLease, Staging, StoreFull
from proxy.store.store import Store
from proxy.store.work import finish

#: Bytes that readers may have of a blob before any of it is in the file: as many as a client takes
#: at once, and few, since a copy of them waits for each one that does not.
FIRST_BYTES = 32 << 10


class Intake:
    """One fill's place. Only the fill task calls what is async here; readers call ``piece``.

    ``progress`` is called when a window holds more for readers, with true when they have to be told
    now because the fill is about to wait for them; ``on_full`` once, with the cause, before a
    window takes the file's place.
    """

    def __init__(
        self,
        digest: Digest,
        *,
        windows: WindowBudget,
        patience: float,
        crowd: Crowd,
        progress: Callable[[bool], None],
        on_full: Callable[[Exception], None],
    ) -> None:
        self.verifier: Verifier = digest.verifier()
        self.window: Window | None = None
        self._digest = digest
        self._windows = windows
        self._patience = patience
        self._crowd = crowd
        self._progress = progress
        self._on_full = on_full
        self._staging: Staging | None = None
        self._lease: FileLease | None = None
        self._backlog: deque[memoryview] = deque()
        self._first = b""  # what readers may have while it is on its way into the file
        self._moved = asyncio.Event()
        self._is_released = False

    # -- what readers see ------------------------------------------------------------------

    @property
    def has_place(self) -> bool:
        return self._staging is not None or self.window is not None

    @property
    def has_file(self) -> bool:
        """Is there a file, which takes all that comes?"""
        return self._staging is not None and self.window is None

    @property
    def received(self) -> int:
        """Bytes taken in and hashed."""
        return self.verifier.count

    @property
    def end(self) -> int:
        """Bytes that are in the file or have been in the window; at first, those shown before."""
        end = self.window.end if self.window is not None else self._filed
        return max(end, len(self._first))

    @property
    def _filed(self) -> int:
        return self._staging.mark if self._staging is not None and self._lease is not None else 0

    def piece(self, position: int, limit: int) -> Piece | None:
        """Bytes from ``position`` on, at most to ``limit``; None when they are gone."""
        filed = self._filed
        if self._lease is not None and position < filed:
            return FileSpan(self._lease, position, min(limit, filed))
        if self.window is not None and self.window.start <= position < self.window.end:
            return self.window.piece(position)[: limit - position]
        return self._first[position:limit] or None

    def piece_ahead(self, position: int, limit: int) -> Piece | None:
        """Bytes that were ``put`` at ``position``, up to ``limit``: not hashed, and to be read only
        by who knows that they are there."""
        if self._lease is None or self.window is not None or position >= limit:
            return None
        return FileSpan(self._lease, position, limit)

    def lend(self) -> FileLease:
        """The file for one more, who reads what he knows to be there. Raises ``StoreFailed``."""
        if self._staging is None:
            raise StoreFailed("there is no file")
        return self._staging.lease()

    def has_lost(self, position: int) -> bool:
        """Did the window give up the byte at ``position``?"""
        kept = max(self._filed, len(self._first))
        return self.window is not None and kept <= position < self.window.start

    def reader_moved(self) -> None:
        """A reader came, went on or left: a fill that waits for readers looks again."""
        self._moved.set()

    # -- the fill --------------------------------------------------------------------------

    async def open(self, store: Store, size: int | None) -> None:
        """Settle the place for a blob of ``size`` bytes. Raises ``StoreFailed``."""
        try:
            self._staging = await store.create(self._digest, size)
            self.verifier = self._staging.verifier
            # One lease serves all readers: nobody uses its position, and descriptors are scarce.
            self._lease = self._staging.lease()
        except (StoreFull, OSError) as error:
            self._open_window(error)

    async def go_on(self, store: Store) -> int | None:
        """Take over what a process before has brought of it. Returns the size, if that was known;
        there is a place then, and bytes ``received``, or else there was nothing."""
        try:
            staging = await store.go_on(self._digest)
            if staging is None:
                return None
            self._staging = staging
            self.verifier = staging.verifier
            self._lease = staging.lease()
        except (StoreFull, OSError):
            await self.begin_anew()
            return None
        return staging.size

    async def begin_anew(self) -> None:
        """What was taken over is of no use: drop it."""
        self.release()
        await self.discard()
        self._staging, self.verifier = None, self._digest.verifier()

    def _open_window(self, error: Exception) -> None:
        self._on_full(error)
        self.window = Window(self.received, self._windows.take())

    def show(self, chunk: Chunk) -> None:
        """Let readers have the first of these bytes, which are ``take``n next or never. They stay
        until they are in the file; where a window takes its place, to the end."""
        self._first = bytes(chunk[:FIRST_BYTES])

    async def take(
        self, chunks: Sequence[Chunk], *, wait: bool, more: Callable[[], Chunk] | None = None
    ) -> None:
        """Take in the next bytes. With ``wait`` the turn had better not be cut, and the readers are
        waited for here; else what they leave no room for is left over. Of a blob of known size the
        file also takes what ``more`` gives in its thread. Raises ``StoreFailed``."""
        if self.window is None and self._staging is not None:
            left = list(chunks)
            try:
                await self._staging.haul(left, more or _nothing)
                self._first = b""
                return
            except StoreFull as error:
                self._open_window(error)
                chunks = left
        # The chunks are borrowed: the thread is done with them when this ends, and none is kept.
        await finish(asyncio.get_running_loop().run_in_executor(None, self._hash, chunks))
        self._backlog.extend(memoryview(bytes(chunk)) for chunk in chunks)
        self._shift()
        while wait and self._backlog and self._crowd.can_go_on():
            if not await self._readers_move(self._patience):
                return
            self._shift()

    async def put(self, position: int, chunks: Sequence[Chunk]) -> None:
        """Write bytes into the file, where nobody else does. Raises ``StoreFull`` when they have no
        place there, and ``StoreFailed``."""
        if self.window is not None or self._staging is None:
            raise StoreFull("there is no file any more")
        if position == self.received:
            await self._staging.append(chunks)
        else:
            await self._staging.put(position, chunks)

    async def advance(self, upto: int) -> None:
        """Hash what was ``put`` before ``upto``: all of it is there. Raises ``StoreFailed``."""
        if self.window is None and self._staging is not None:
            await self._staging.advance(upto)

    def forget_ahead(self) -> None:
        """What was ``put`` and not hashed will come again."""
        if self._staging is not None:
            self._staging.forget_ahead()

    def _hash(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self.verifier.update(chunk)

    @property
    def is_stuck(self) -> bool:
        """Are there bytes that the readers have not left room for?"""
        return bool(self._backlog)

    async def room(self) -> int | None:
        """Wait for room for a turn, which may bring so many bytes; None: as many as you like."""
        if self.window is None:
            return None
        await self.drain()
        while self._free() < self.window.capacity // 2:
            _ = await self._readers_move()
        return self.window.capacity // 2

    async def drain(self) -> None:
        """Wait until the backlog is in the window."""
        self._shift()
        while self._backlog:
            _ = await self._readers_move()
            self._shift()

    def _free(self) -> int:
        """Bytes that may be appended before the fastest reader falls out."""
        if self.window is None:
            return 0
        fastest = self._crowd.fastest()
        return 0 if fastest is None else fastest + self.window.capacity - self.window.end

    def _shift(self) -> None:
        """Move as much of the backlog into the window as there is room for."""
        free = self._free() if self._backlog else 0
        while self.window is not None and self._backlog and free > 0:
            data = self._backlog.popleft()
            if len(data) > free:
                self._backlog.appendleft(data[free:])
                data = data[:free]
            self.window.append(bytes(data))
            free -= len(data)
            self._progress(False)

    async def _readers_move(self, patience: float | None = None) -> bool:
        """Wait until a reader has moved; false after ``patience`` seconds without one."""
        self._progress(True)
        self._moved.clear()
        try:
            async with asyncio.timeout(patience):
                return await self._moved.wait()
        except TimeoutError:
            return False

    # -- the end ---------------------------------------------------------------------------

    async def commit(self) -> bool:
        """Keep the blob, if all of it is in the file. Raises ``StoreFailed``."""
        if self._staging is None or self.window is not None:
            return False
        await self._staging.commit()
        return True

    async def discard(self) -> None:
        """Drop the staging file unless it was kept. Goes to its end when it is cancelled."""
        if self._staging is not None:
            await finish(asyncio.ensure_future(self._staging.discard()))

    def release(self) -> None:
        """Nobody reads any more: give file and window back. Idempotent."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()
        if self.window is not None and not self._is_released:
            self._is_released = True
            self._windows.give(self.window.capacity)
            self.window.clear()
            self._backlog.clear()

    def __repr__(self) -> str:
        place = self.window or self._staging or "no place yet"
        return f"<Intake {self.received} bytes, {place!r}>"


def _nothing() -> Chunk:
    return b""
