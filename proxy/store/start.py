"""The start of a store: the directory is taken, what is held is read from the index, and what the
files say otherwise is put right.

Before anybody is served: the lock, the files that dead fills have left, the index, the ledger; and
the look at the directory (recovery.py) where the rows do not say enough. Afterwards, in the
background: the look, if it has not been before; what has no file is dropped; and files that the
index does not know, or that may have lost bytes, are hashed and only then served.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.store.durability import Durability, was_proved_in
from proxy.store.eviction import Ledger
from proxy.store.files import Layout
from proxy.store.index import Index, IndexFailed, IndexUnusable
from proxy.store.lock import CacheDirUnusable, DirectoryLock
from proxy.store.recovery import Look, Memory, look, make_directories, prepare, remember
from proxy.store.remains import Remains
from proxy.store.shelf import Shelf
from proxy.store.work import Threads

# A link of which nobody has heard for so long, and whose bytes are gone, is proved anew by the
# upstream; seconds.
_LINK_LIFE = 30 * 86_400


@dataclass(frozen=True, slots=True)
class Taken:
    """A directory that is this process's, and what was found in it."""

    layout: Layout
    threads: Threads
    index: Index
    memory: Memory
    boot: str | None  # which one this is
    doubts: bool  # files may have lost bytes with an earlier boot
    unfinished: int  # fills that the process before has left
    remains: Mapping[Digest, Remains]  # those of them that can be gone on with


@contextmanager
def unusable(directory: Path) -> Iterator[None]:
    """Whatever the disk or the index refuses is CacheDirUnusable."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CacheDirUnusable(directory, f"{error.strerror}{where}") from error
    except (IndexUnusable, IndexFailed) as error:
        raise CacheDirUnusable(directory, str(error)) from error


async def take(
    layout: Layout, undo: AsyncExitStack, boot: Callable[[], str | None], *, resume: bool
) -> Taken:
    """Lock the directory, and read its index. `undo` gets what gives all of it back.

    Raises CacheDirBusy, OSError, IndexUnusable, IndexFailed.
    """
    threads = Threads()
    undo.push_async_callback(threads.close)
    await threads.slow(partial(make_directories, layout))
    lock = await threads.slow(partial(DirectoryLock.acquire, layout.lock), DirectoryLock.release)
    undo.callback(lock.release)
    unfinished, remains = await threads.slow(partial(prepare, layout, resume=resume))
    index = await Index.open(layout.index)
    undo.push_async_callback(index.close)
    contents = await index.load()
    running = await threads.slow(boot)
    proved = await threads.slow(partial(was_proved_in, layout.boot, running))
    memory = await threads.slow(partial(remember, contents))
    return Taken(layout, threads, index, memory, running, not proved, unfinished, remains)


async def restore(shelf: Shelf, taken: Taken) -> Look | None:
    """Enter what is held, and what fills may go on with; the look, if it had to be before that.

    Raises OSError.
    """
    await taken.threads.slow(partial(_fill_ledger, shelf, taken.memory))
    shelf.expect(dict(taken.remains))
    if taken.doubts or not taken.memory.entries:
        return await _look(shelf, taken)
    return None


def _fill_ledger(shelf: Shelf, memory: Memory) -> None:
    # In a thread, before anybody else has the shelf: it takes a while with many blobs.
    shelf.ledger.restore(memory.entries)
    for digest, (media_type, children) in memory.manifests.items():
        shelf.types[digest] = media_type
        shelf.ledger.set_children(digest, children)


async def _look(shelf: Shelf, taken: Taken) -> Look | None:
    """Look at the directory, and serve nothing that is in doubt; None when the store closes."""
    held = shelf.ledger.entries()
    looking = partial(
        look, taken.layout, held, doubts=taken.doubts, stopped=lambda: shelf.is_closing
    )
    with shelf.noting_gone() as gone:
        found = await taken.threads.slow(looking)
        if found is None:
            return None
        found = replace(found, unknown=[each for each in found.unknown if each[0] not in gone])
        shelf.unverified.update(found.doubtful)
        shelf.unverified.update(shelf.ledger.insert(found.unknown))
    return found


def report(
    taken: Taken,
    ledger: Ledger,
    unverified: int,
    durability: Durability,
    metrics: Metrics,
    log: Logger,
) -> None:
    """Count and log what was found."""
    directory = str(taken.layout.root)
    metrics.recovered.inc(taken.unfinished)
    if taken.index.was_lost:
        log.warning("index was corrupt and is rebuilt from the files", directory=directory)
    log.info(
        "store opened",
        directory=directory,
        blobs=len(ledger),
        bytes=ledger.held,
        durability=durability.value,
        unfinished=taken.unfinished,
        resumable=len(taken.remains),
        unverified=unverified,
    )


class Recovery:
    """What of a start goes on while blobs are served: the look at the directory, if it was not
    taken yet, after a pause of so many seconds, for it would only hold up whatever else starts;
    and what comes of it. Belongs to the loop on which it is made."""

    def __init__(self, shelf: Shelf, taken: Taken, found: Look | None, pause: float) -> None:
        self._shelf = shelf
        self._taken = taken
        self._rested = asyncio.Event()
        self._resting = asyncio.get_running_loop().call_later(pause, self._rested.set)
        self._task = asyncio.create_task(self._recover(found), name="store recovery")

    async def ended(self) -> None:
        """Wait until files and rows agree, and all that is in doubt has been judged."""
        await asyncio.wait([self._task])

    async def hurry(self) -> None:
        """The store is closing: wait for no more than what is under way."""
        self._resting.cancel()
        self._rested.set()
        await self.ended()

    async def _recover(self, found: Look | None) -> None:
        shelf, index = self._shelf, self._taken.index
        await shelf.record(index.drop_blobs(self._taken.memory.strange))
        try:
            if found is None:
                await self._rested.wait()
                found = await _look(shelf, self._taken)
        except OSError as error:
            shelf.failed("look", error)
        if found is not None:
            await shelf.lose(found.missing)  # first: what has no file is to make no room
        await shelf.evict(shelf.ledger.shrink(), "room")
        await shelf.record(index.prune_links(shelf.now() / 1_000_000 - _LINK_LIFE))
        if found is not None:
            await self._judge(found)

    async def _judge(self, found: Look) -> None:
        is_settled = True
        for digest in (*found.doubtful, *(each[0] for each in reversed(found.unknown))):
            if self._shelf.is_closing:
                return
            is_settled &= await self._shelf.adopt(digest)
        if is_settled:
            await self._shelf.note_proved(self._taken.boot)

    def __repr__(self) -> str:
        state = "ended" if self._task.done() else "looking" if self._rested.is_set() else "resting"
        return f"<Recovery {state}>"
