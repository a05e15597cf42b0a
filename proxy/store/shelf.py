"""Where ledger, disk and index meet: room is promised, blobs are entered, and removed.

The ledger decides and this acts. What the ledger says holds from that moment on: a victim is gone
for every reader before its file is. Files follow in a thread, and a name can change hands in the
meantime (a victim is fetched again while its file is still being removed), so every change of what
is under a name is made with that name held, and looks at the ledger first:

    evict A: ledger drops A  ........................  hold A: A is in the ledger again -> leave it
    fill A:                   hold A: rename, ledger adds A

Rows follow files: entered after the rename, deleted after the unlink. A crash between leaves one
of the cases that recovery.py lists. An index that fails costs memory of the past and no pull, so
its failures are counted and logged and go no further.
"""

import asyncio
import contextlib
import errno
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import StoreFailed
from proxy.store.blobs import NoRoom, Staging, StoreFull
from proxy.store.counted import remove_count
from proxy.store.durability import Durability, note_proved, settle
from proxy.store.eviction import Entry, Ledger
from proxy.store.files import Disk, Layout, StagingFile, hash_file, store_file
from proxy.store.index import Index, IndexFailed
from proxy.store.kept import KeptFiles
from proxy.store.marks import Marks
from proxy.store.remains import Remains, reopen, staging_name
from proxy.store.work import Threads, finish

T = TypeVar("T")

# Files of fills that another process has left wait so long for somebody who goes on, in seconds.
_REMAINS_LIFE = 60.0
# Bytes of them that are hashed at once.
_LOT = 8 << 20
# So many blobs without a file are dropped in one turn of the loop.
_LOST_AT_ONCE = 500


class Shelf:
    """Everything that changes which blobs are held."""

    def __init__(
        self,
        *,
        layout: Layout,
        ledger: Ledger,
        index: Index,
        threads: Threads,
        disk: Disk,
        min_free: int,
        durability: Durability,
        metrics: Metrics,
        log: Logger,
        wall: Callable[[], float],
    ) -> None:
        self.layout = layout
        self.ledger = ledger
        self.index = index
        self.threads = threads
        self.fills: set[Staging] = set()
        self.types: dict[Digest, str] = {}  # media types of the manifests that are held
        self.unverified: set[Digest] = set()  # in the ledger, but not to be served yet
        self.held: Marks[Digest] = Marks()  # for whoever relies on a blob being there
        self.kept = KeptFiles()  # of blobs in the ledger
        #: Told of blobs that are not held any more, at once and when file and row have gone.
        self.on_gone: Callable[[Sequence[Digest]], None] = lambda _: None
        self._remains: dict[Digest, Remains] = {}  # files of dead fills, until somebody goes on
        self._sweeping: asyncio.TimerHandle | None = None
        self._leaving: set[Digest] = set()  # evicted, but their files are still there
        self._noting: list[set[Digest]] = []  # of what is given up, as long as somebody looks
        self.is_closing = False
        self.hands_over = False  # another process goes on with the fills that are under way
        self._disk = disk
        self._min_free = min_free
        self._durability = durability
        self._metrics = metrics
        self._log = log
        self._wall = wall
        self._tasks: set[asyncio.Task[None]] = set()
        self._names: weakref.WeakValueDictionary[Digest, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )

    def now(self) -> int:
        """Microseconds since the epoch."""
        return int(self._wall() * 1_000_000)

    # Room

    async def reserve(self, size: int) -> None:
        """Promise room for `size` bytes, evicting for it. Raises NoRoom, promising nothing."""
        await self._promise(size, self._known(await self.threads.quick(self._free)))

    async def _promise(self, size: int, free: int | None) -> None:
        """The same, on a disk that has just said how many bytes are free, if it has."""
        # No await between that and the promise: two fills must not count the same room.
        unwritten = sum(max(0, fill.reserved - fill.mark - fill.ahead) for fill in self.fills)
        spare = None if free is None else free - self._min_free - unwritten
        victims = self.ledger.admit(size, spare)
        if victims is None:
            raise NoRoom(f"no room for {size} bytes: {self.ledger}, {free} bytes free on disk")
        try:
            await self.evict(victims, "room")
        except BaseException:
            self.ledger.release(size)
            raise

    async def make_room(self, fill: Staging, upto: int) -> None:
        """Let a fill of unknown size grow. Raises NoRoom."""
        more = upto - fill.reserved
        if more > 0:
            await self.reserve(more)
            fill.reserved = upto

    async def reclaim(self, count: int) -> bool:
        """Evict about `count` bytes because the disk is full; whether there was anything."""
        victims = self.ledger.shed(count)
        await self.evict(victims, "disk_full")
        return bool(victims)

    def _free(self) -> int | OSError:
        # In a thread.
        try:
            return self._disk.free(self.layout.root)
        except OSError as error:
            return error

    def _known(self, free: int | OSError) -> int | None:
        if isinstance(free, OSError):
            self.failed("free", free)
            return None
        return free

    # Fills

    async def begin(self, digest: Digest, size: int | None) -> Staging:
        """A new staging file with room promised for `size` bytes. Raises NoRoom."""
        promised = size or 0
        path = self.layout.staging / staging_name(digest, size)
        make = partial(StagingFile.create, path, self._durability)
        try:
            # Both in one hop to a thread: who asked waits for its first byte meanwhile.
            free, file = await self.off_loop(
                lambda: (self._free(), make()), lambda made: self._scrap(made[1])
            )
        except OSError as error:  # there may be room for it once something has been evicted
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.kept.close()  # these can be spared first
            await self.reserve(promised)
            return await self._fill(digest, size, promised, make)
        fill = self._enter(digest, size, 0, file)
        try:
            await self._promise(promised, self._known(free))
        except BaseException:
            self._end(fill)
            # Not behind slow work: who asked has somewhere else to put its bytes.
            refused = await self.off_loop(partial(self._scrapped, file))
            if refused is not None:
                self.failed("unlink", refused)
            raise
        fill.reserved = promised
        return fill

    async def _fill(
        self, digest: Digest, size: int | None, promised: int, make: Callable[[], StagingFile]
    ) -> Staging:
        """A fill in the file that `make` opens. Raises NoRoom, and gives the room back then."""
        try:
            file = await self.off_loop(make, self._scrap)
        except OSError as error:
            self.ledger.release(promised)
            self.failed("create", error)
            raise NoRoom(f"cannot make a staging file: {error.strerror}") from error
        except BaseException:
            self.ledger.release(promised)
            raise
        return self._enter(digest, size, promised, file)

    def _enter(self, digest: Digest, size: int | None, promised: int, file: StagingFile) -> Staging:
        """In the turn of the loop in which the file is there, so that `settle` misses none."""
        fill = Staging(digest=digest, size=size, file=file, shelf=self, disk=self._disk)
        fill.reserved = promised
        self.fills.add(fill)
        return fill

    def expect(self, remains: dict[Digest, Remains]) -> None:
        """Keep what fills have left for a while: somebody may go on with it."""
        self._remains = remains
        if remains:
            loop = asyncio.get_running_loop()
            self._sweeping = loop.call_later(_REMAINS_LIFE, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        _ = self.spawn(self._drop_remains())

    async def go_on(self, digest: Digest) -> Staging | None:
        """The fill that another process has left, with what it had brought; None: there is none."""
        remains = self._remains.pop(digest, None)
        if remains is None:
            return None
        promised = remains.length if remains.size is None else remains.size
        try:
            await self.reserve(promised)
        except BaseException:
            self._remains[digest] = remains
            raise
        make = partial(reopen, remains)
        fill = await self._fill(digest, remains.size, promised, make)
        try:
            while fill.mark < remains.length and not self.is_closing:
                await fill.advance(min(remains.length, fill.mark + _LOT))
            if fill.mark < remains.length or (fill.mark == fill.size and not fill.verified()):
                raise StoreFull("what was left is not the blob")
        except StoreFailed as error:
            await fill.discard()
            raise StoreFull(str(error)) from error
        except BaseException:
            await fill.discard()
            raise
        return fill

    async def _drop_remains(self) -> None:
        """Nobody went on with these."""
        left, self._remains = self._remains, {}
        for remains in left.values():
            await self._unlink_staging(remains.path)
        self._metrics.recovered.inc(len(left))

    def _scrapped(self, file: StagingFile) -> OSError | None:
        # In a thread.
        file.close()
        try:
            self._disk.unlink(file.path)
        except OSError as error:  # the next start removes it
            return error
        return None

    def _scrap(self, file: StagingFile) -> None:
        file.close()
        _ = self.spawn(self._unlink_staging(file.path))

    async def keep(self, fill: Staging) -> None:
        """Give a fill's file its name and enter the blob. Raises StoreFailed."""
        digest = fill.digest
        target = self.layout.blob(digest)
        async with self._hold(digest):
            self.kept.drop([digest])  # while the old file has a name: its last close costs little
            try:
                steps = partial(store_file, self._disk, fill.file, target, self._durability)
                late = await self.threads.slow(steps)
            except OSError as error:
                self.failed("commit", error)
                raise StoreFailed("the cache could not store the blob") from error
            if late is not None:
                self.failed("sync_directory", late)
            # No await until the ledger agrees with the disk.
            self._end(fill)
            self.unverified.discard(digest)
            entry = self.ledger.add(digest, fill.mark, self.now())
            await self.record(self.index.put_blob(str(digest), entry.size, entry.used))

    async def drop(self, fill: Staging) -> None:
        """Remove a fill's file, unless it is handed over, and give its room back."""
        is_whole = fill.mark == fill.size  # and yet it is dropped: it is not the blob
        if not (self.hands_over and fill.mark) or is_whole:
            await self._unlink_staging(fill.file.path)
        self._end(fill)

    def _end(self, fill: Staging) -> None:
        self.fills.discard(fill)
        self.ledger.release(fill.reserved)

    async def _unlink_staging(self, path: Path) -> None:
        try:
            await self.threads.slow(partial(self._disk.unlink, path))
            await self.threads.slow(partial(remove_count, path))  # only now: it says what is in it
        except OSError as error:  # the next start removes it
            self.failed("unlink", error)

    @property
    def is_crowded(self) -> bool:
        """Are all threads for short calls taken?"""
        return self.threads.is_crowded

    async def off_loop(self, call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Run a short call in a thread; a cancellation is raised after it has ended."""
        return await self.threads.quick(call, undo)

    # Removal

    async def evict(self, victims: Sequence[Digest], reason: str) -> None:
        """Remove the files and rows of blobs that have left the ledger."""
        if not victims:
            return
        self._forget(victims)
        self._leaving.update(victims)
        self._metrics.evictions.labels(reason).inc(len(victims))
        await finish(self.spawn(self._remove(victims)))

    async def _remove(self, victims: Iterable[Digest]) -> None:
        gone: list[Digest] = []
        for digest in victims:
            async with self._hold(digest):
                if digest not in self.ledger and await self._unlink_blob(digest):
                    gone.append(digest)
            self._leaving.discard(digest)
        # What was stored anew since has a row that is on its way, or newer than this.
        await self._drop_rows([digest for digest in gone if digest not in self.ledger])

    async def _unlink_blob(self, digest: Digest) -> bool:
        try:
            await self.threads.slow(partial(self._disk.unlink, self.layout.blob(digest)))
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.failed("unlink", error)  # its row stays: the next start counts it again
                return False
        return True

    async def _drop_rows(self, digests: Sequence[Digest]) -> None:
        await self.record(self.index.drop_blobs(map(str, digests)))
        self.on_gone(digests)

    async def lose(self, missing: Sequence[tuple[Digest, Entry]]) -> None:
        """Drop blobs whose files were not there when somebody looked.

        Each with the entry that it had then: one that was stored anew since has another, and a
        file. Rows are dropped in the same step, so before the row of any later fill is written.
        """
        lost = 0
        for at in range(0, len(missing), _LOST_AT_ONCE):
            lot = missing[at : at + _LOST_AT_ONCE]
            gone = [digest for digest, entry in lot if self.ledger.get(digest) is entry]
            if gone:
                for digest in gone:
                    self.ledger.remove(digest)
                self._forget(gone)
                await self._drop_rows(gone)
                lost += len(gone)
        if lost:
            self._log.warning("stored blobs have no file", blobs=lost)

    def _forget(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            self.types.pop(digest, None)
            self.unverified.discard(digest)
            self.held.withdraw(digest)
        self.kept.drop(digests)
        for noted in self._noting:
            noted.update(digests)
        self.on_gone(digests)

    @contextlib.contextmanager
    def noting_gone(self) -> Iterator[set[Digest]]:
        """Until the block ends, the digests whose files are there though their blobs are given up,
        or were: whoever lists the directory meanwhile may take them for blobs nobody knows."""
        noted = set(self._leaving)
        self._noting.append(noted)
        try:
            yield noted
        finally:
            self._noting.remove(noted)

    async def examine(self, digest: Digest, is_right: Callable[[], bool], why: str) -> None:
        """Look again at a blob that somebody could not use, and drop it if it really is bad.

        Again, and with the name held: it may have been stored anew in the meantime. `is_right`
        runs in a thread; an OSError other than "no such file" leaves the blob as it is.
        """
        async with self._hold(digest):
            try:
                if digest not in self.ledger or await self.threads.slow(is_right):
                    return
            except FileNotFoundError:
                pass
            except OSError as error:
                self.failed("read", error)
                return
            self.ledger.remove(digest)
            self._forget([digest])
            self._log.warning("stored blob dropped", digest=str(digest), reason=why)
            if await self._unlink_blob(digest):
                await self._drop_rows([digest])

    async def adopt(self, digest: Digest) -> bool:
        """Hash a file that has no row, or may have lost bytes: enter it if it is what its name
        says, else remove it. Returns whether nothing about it is in doubt any more."""
        path = self.layout.blob(digest)
        check = partial(hash_file, path, digest, lambda: self.is_closing)
        async with self._hold(digest):
            if digest not in self.unverified:
                return True
            try:
                is_right = await self.threads.slow(check)
                if is_right:
                    await self.threads.slow(partial(settle, path))
            except FileNotFoundError:  # evicted, or removed by hand, since it was seen
                self.ledger.remove(digest)
                self._forget([digest])
                await self._drop_rows([digest])
                return True
            except OSError as error:
                self.failed("adopt", error)
                return False
            entry = self.ledger.get(digest)
            if is_right is None or entry is None:  # closing, or evicted in the meantime
                return entry is None
            self.unverified.discard(digest)
            if is_right:
                await self.record(self.index.put_blob(str(digest), entry.size, entry.used))
                return True
            self._metrics.digest_mismatch.labels("store").inc()
            self._log.warning("file is not what its name says", digest=str(digest))
            self.ledger.remove(digest)
            self._forget([digest])
            if await self._unlink_blob(digest):
                await self._drop_rows([digest])
                return True
            return False

    async def note_proved(self, boot: str | None) -> None:
        """Nothing is in doubt any more, until the machine starts anew."""
        try:
            await self.threads.slow(partial(note_proved, self.layout.boot, boot))
        except OSError as error:  # then the next start doubts as much as this one
            self.failed("boot", error)

    # Small parts

    def pinned(self, digest: Digest) -> Callable[[], None]:
        """Pin a digest; the result, called once, unpins it."""
        self.ledger.pin(digest)
        return partial(self.ledger.unpin, digest)

    def failed(self, operation: str, error: OSError) -> None:
        """Count and log what the disk refused."""
        name = errno.errorcode.get(error.errno or 0, "unknown")
        self._metrics.store_errors.labels(operation, name).inc()
        self._log.warning("store operation failed", op=operation, errno=name, error=str(error))

    async def record(self, job: Coroutine[object, object, T]) -> T | None:
        """Run a job of the index; None when the index could not do it."""
        try:
            return await job
        except IndexFailed as error:
            self._metrics.store_errors.labels("index", "sqlite").inc()
            self._log.warning("index operation failed", error=str(error))
            return None

    def spawn(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        """Run work that outlives its caller; `settle` waits for it."""
        task = asyncio.create_task(work, name="store")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self) -> None:
        """Drop all fills, keep no file open, and wait for everything that is under way."""
        self.kept.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        if not self.hands_over:
            await self._drop_remains()
        while self.fills or self._tasks or self.threads.running:
            for fill in list(self.fills):
                await fill.discard()
            if pending := {*self._tasks, *self.threads.running}:
                await asyncio.wait(pending)

    def _hold(self, digest: Digest) -> asyncio.Lock:
        lock = self._names.get(digest)
        if lock is None:
            lock = self._names[digest] = asyncio.Lock()
        return lock
