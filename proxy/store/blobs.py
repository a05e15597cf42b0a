"""Bytes on disk: how a fill is written, how it gets its name, and what readers hold.

Theory of operation. A fill writes into a staging file of its own, which is never shared. Its life:

    filling --append*--> filling --commit--> stored
       |                    |
       +------discard-------+--------------> dropped

* append: pwrite at the mark, then hash, then move the mark, in one hop to a thread. A write that
  fails leaves mark and hash where they were; what it wrote beyond the mark is overwritten by the
  next one, so nothing is hashed twice. A haul does so with piece after piece in the same hop.
* put: pwrite beyond the mark, where another part of the blob came first (D9). It counts for nothing
  until `advance` has read it back, hashed it and moved the mark over it. Between mark and put the
  file has holes, which read as zeros: that is why nobody may read beyond the mark who was not told
  that a put is there, and why the mark is noted for the next process (counted.py).
* commit: fsync the file, rename it to blobs/<algorithm>/<2 hex>/<hex>, fsync the directory, enter
  it. The fsync comes before the rename, so nothing carries a final name whose bytes are not on
  the disk: after a kill or a power cut a blob is whole or absent. A file whose fsync failed is
  never tried again (the kernel may have dropped the very pages that failed). Less durability
  leaves out the second fsync, or both; then the file carries a mark (durability.py).
* discard: unlink. A process that dies before it leaves its staging files to the next start,
  which removes them, or goes on with them (recovery.py).

Append, haul, put, advance, commit and discard of one fill exclude one another. Cancelled, each one
first ends the step that a thread is doing, so that the mark always says what is written and hashed,
and a commit that has begun goes to its end. A haul ends as soon as its `more` gives nothing.

Readers lease: an open descriptor with a pin against eviction. It stays readable whatever happens to
the name.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Coroutine, Sequence
from enum import StrEnum
from types import TracebackType
from typing import BinaryIO, Protocol, Self, TypeVar

from proxy.oci.digest import Chunk, Digest, Verifier
from proxy.oci.errors import StoreFailed
from proxy.store.counted import STEP, write_count
from proxy.store.files import Disk, StagingFile, write_at
from proxy.store.work import finish

T = TypeVar("T")

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Bytes that are read again at once to be hashed, into the same memory each time: a fresh buffer is
#: cleared first, which takes 0.02 to 0.08 s of CPU a gigabyte.
READ_STEP = 512 << 10


class StoreFull(Exception):
    """The disk did not take the bytes. They go to the readers, but not into the store."""


class NoRoom(StoreFull):
    """The store has no room for a blob of this size, even after evicting all it may."""


class FileLease:
    """An open file that will not be evicted while this is open.

    `size` in bytes: of a stored blob its whole size; of a fill the bytes that were written and
    hashed when the lease was taken (the fill's mark says how far it has come since). Read with
    pread or sendfile and an offset of your own: leases of one fill share a file position. Close
    it on the event loop, after whatever reads the descriptor has ended.
    """

    __slots__ = ("_release", "file", "size")

    def __init__(self, file: BinaryIO, size: int, release: Callable[[], None]) -> None:
        self.file = file
        self.size = size
        self._release: Callable[[], None] | None = release

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        """Give file and pin back; a second call does nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            self.file.close()
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FileLease {'closed' if self._release is None else self.size}>"


class _State(StrEnum):
    FILLING = "filling"
    BROKEN = "broken"  # a commit failed: only discard is left
    STORED = "stored"
    DROPPED = "dropped"


class Shelf(Protocol):
    """What a fill asks of the store that it belongs to."""

    async def make_room(self, fill: "Staging", upto: int) -> None:
        """Room for the fill's first `upto` bytes. Raises NoRoom."""

    async def reclaim(self, count: int) -> bool:
        """The disk is full: evict about `count` bytes; whether anything went."""

    @property
    def is_crowded(self) -> bool:
        """Are all threads taken? Then others wait for this one. May be asked in a thread."""

    async def off_loop(self, call: Callable[[], T]) -> T:
        """Run `call` in a thread; a cancellation is raised after it has ended."""

    async def keep(self, fill: "Staging") -> None:
        """Give the file its name and enter the blob. Raises StoreFailed."""

    async def drop(self, fill: "Staging") -> None:
        """Remove the staging file and give its room back. Never fails."""

    def spawn(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        """Run work that goes to its end whatever becomes of its caller."""

    def pinned(self, digest: Digest) -> Callable[[], None]:
        """Pin a digest; call the result once to unpin."""

    def failed(self, operation: str, error: OSError) -> None:
        """Count and log what the disk refused."""


class Staging:
    """One fill: a file that grows, the hash of what is in it, and the room it was promised.

    `size` is the expected size in bytes or None; `mark` counts the bytes that are written and
    hashed, and only ever grows; `ahead` counts those that are written beyond it; `reserved` is the
    room the store has promised so far.
    """

    def __init__(
        self, *, digest: Digest, size: int | None, file: StagingFile, shelf: Shelf, disk: Disk
    ) -> None:
        self.digest = digest
        self.size = size
        self.mark = 0
        self.ahead = 0
        self.reserved = size or 0
        self.verifier: Verifier = digest.verifier()
        self.file = file
        self._shelf = shelf
        self._disk = disk
        self._turn = asyncio.Lock()
        self._state = _State.FILLING
        self._noted: int | None = None  # the mark that the next process would read, if it is noted

    def __repr__(self) -> str:
        size = "?" if self.size is None else self.size
        return f"<Staging {self.digest.hex[:12]} {self.mark}/{size} {self._state}>"

    @property
    def is_open(self) -> bool:
        """Whether the file is still this fill's own: neither stored nor dropped."""
        return self._state in (_State.FILLING, _State.BROKEN)

    async def append(self, chunks: Sequence[Chunk]) -> None:
        """Write and hash the next bytes.

        Raises StoreFull when they cannot be written; then none of them counts and the mark is
        where it was. Cancelled, either all of them count or none: the mark tells.
        """
        await self.haul(list(chunks), lambda: b"")

    async def haul(self, chunks: list[Chunk], more: Callable[[], Chunk]) -> None:
        """The same, and in the same hop to a thread whatever `more` gives there, piece by piece,
        until it gives nothing or the threads are all taken. Nothing more where the room is used up
        that was promised: a fill of unknown size has it for these chunks alone, and a blob may be
        larger than was said.

        What counts is taken out of `chunks`; a piece that cannot be written is left there.
        """
        async with self._turn:
            self._require(_State.FILLING)
            count = sum(map(len, chunks))
            await self._shelf.make_room(self, self.mark + count)
            # What is evicted, if the disk is full, is room for the piece that failed and no more.
            await self._written(
                lambda: self._write_all(chunks, more),
                chunks,
                again=lambda: self._write_all(chunks, lambda: b""),
            )

    async def put(self, position: int, chunks: Sequence[Chunk]) -> None:
        """Write bytes beyond the mark; they count when `advance` gets there.

        Raises StoreFull when they cannot be written. Cancelled, they may be there or not.
        """
        async with self._turn:
            self._require(_State.FILLING)
            if position < self.mark:  # would change what was hashed
                raise ValueError(f"{self!r} was given byte {position} again")
            count = sum(map(len, chunks))
            await self._shelf.make_room(self, position + count)
            await self._written(lambda: self._put(position, chunks), chunks)
            self.ahead += count

    async def advance(self, upto: int) -> None:
        """Hash what was put between the mark and `upto`, all of it, and move the mark there.

        Raises StoreFailed when the disk does not give it back. Cancelled, the mark tells.
        """
        async with self._turn:
            self._require(_State.FILLING)
            before = self.mark
            try:
                await self._shelf.off_loop(lambda: self._hash(upto))
            except OSError as error:
                self._shelf.failed("read", error)
                raise StoreFailed("the cache could not read what it wrote") from error
            finally:
                self.ahead = max(0, self.ahead - (self.mark - before))

    def forget_ahead(self) -> None:
        """What was put beyond the mark will be written again."""
        self.ahead = 0

    async def _written(
        self,
        write: Callable[[], None],
        chunks: Sequence[Chunk],
        again: Callable[[], None] | None = None,
    ) -> None:
        """Write `chunks`; `again` if the disk was full and there is room for what is left."""
        try:
            await self._shelf.off_loop(write)
        except OSError as error:
            self._shelf.failed("write", error)
            # Others share the disk, so it can be full while the ledger sees room.
            is_full = error.errno in DISK_FULL
            if not (is_full and await self._shelf.reclaim(sum(map(len, chunks)))):
                raise StoreFull(f"cannot write: {error.strerror}") from error
            await self._written_again(again or write)

    async def _written_again(self, write: Callable[[], None]) -> None:
        try:
            await self._shelf.off_loop(write)
        except OSError as error:
            self._shelf.failed("write", error)
            raise StoreFull(f"cannot write: {error.strerror}") from error

    def _write_all(self, chunks: list[Chunk], more: Callable[[], Chunk]) -> None:
        # In a thread.
        while chunks:
            self._write(chunks)
            chunks.clear()
            if self.mark >= self.reserved or self._shelf.is_crowded:
                return
            if data := more():
                chunks.append(data)

    def _write(self, chunks: Sequence[Chunk]) -> None:
        # In a thread. The hash and the mark move only when every byte is in the file.
        write_at(self._disk.write, self.file.writer, chunks, self.mark)
        for chunk in chunks:
            self.verifier.update(chunk)
        self.mark += sum(map(len, chunks))
        self._note_mark()

    def _put(self, position: int, chunks: Sequence[Chunk]) -> None:
        # In a thread. From here on the file's length does not say what is in it.
        if self._noted is None:
            write_count(self.file.path, self.mark)
            self._noted = self.mark
        write_at(self._disk.write, self.file.writer, chunks, position)

    def _hash(self, upto: int) -> None:
        # In a thread; the mark moves with the hash.
        buffer = memoryview(bytearray(READ_STEP))
        while (left := upto - self.mark) > 0:
            count = os.preadv(self.file.reader, [buffer[:left]], self.mark)
            if count <= 0:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            self.verifier.update(buffer[:count])
            self.mark += count
        self._note_mark()

    def _note_mark(self) -> None:
        # In a thread.
        if self._noted is not None and self.mark >= self._noted + STEP:
            with contextlib.suppress(OSError):  # what is noted may say too little
                write_count(self.file.path, self.mark)
                self._noted = self.mark

    def lease(self) -> FileLease:
        """Open the growing file for one more reader, who must not read beyond the mark.

        The lease outlives commit and discard; raises StoreFailed when one of them has been.
        """
        if not self.is_open:
            raise StoreFailed("the fill has ended")
        file = open(os.dup(self.file.reader), "rb", buffering=0)  # noqa: SIM115 -- leased out
        return FileLease(file, self.mark, self._shelf.pinned(self.digest))

    def verified(self) -> bool:
        """Whether what is in the file is the blob: size and digest."""
        return self.size in (None, self.mark) and self.verifier.matches()

    async def commit(self) -> None:
        """Store the blob under its name; a second call does nothing.

        Raises StoreFailed when it is not verified or the disk refuses; then call `discard`.
        Cancelled, it still goes to its end, and the cancellation is raised after that.
        """
        async with self._turn:
            if self._state is _State.STORED:
                return
            self._require(_State.FILLING)
            if not self.verified():
                raise StoreFailed(f"{self.digest} is not complete or not right")
            await finish(self._shelf.spawn(self._store()))

    async def _store(self) -> None:
        self._state = _State.BROKEN  # until it is known to have worked
        await self._shelf.keep(self)
        self._state = _State.STORED
        self._buffer = None
        self.file.close()

    async def discard(self) -> None:
        """Remove the file and give its room back; does nothing after a commit or a discard."""
        async with self._turn:
            if self.is_open:
                await finish(self._shelf.spawn(self._drop()))

    async def _drop(self) -> None:
        self._state = _State.DROPPED
        self._buffer = None
        self.file.close()
        await self._shelf.drop(self)

    def _require(self, state: _State) -> None:
        if self._state is not state:
            raise StoreFailed(f"the fill of {self.digest} is {self._state}")
