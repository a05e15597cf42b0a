"""The start of a store: the directory is taken, files and index are compared, and what differs is
put right.

Before anybody is served: the lock, the files that dead fills have left, the index, the plan
(recovery.py), the ledger. All of that is as fast as listing the directory. Afterwards, in the
background: what the plan says is to be dropped is dropped, and files that the index does not know,
or that may have lost bytes, are hashed and only then served.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
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
from proxy.store.recovery import Plan, make_directories, prepare, reconcile, scan
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
    plan: Plan
    boot: str | None  # which one this is
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
    """Lock the directory, open its index, and compare. `undo` gets what gives all of it back.

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
    plan = await threads.slow(lambda: reconcile(contents, scan(layout), doubts=not proved))
    return Taken(layout, threads, index, plan, running, unfinished, remains)


async def restore(shelf: Shelf, taken: Taken) -> None:
    """Enter what is held, and what fills may go on with."""
    await taken.threads.slow(partial(_fill_ledger, shelf, taken.plan))
    shelf.expect(dict(taken.remains))


def _fill_ledger(shelf: Shelf, plan: Plan) -> None:
    # In a thread, before anybody else has the shelf: it takes a while with many blobs.
    shelf.ledger.restore(plan.entries)
    for digest, (media_type, children) in plan.manifests.items():
        shelf.types[digest] = media_type
        shelf.ledger.set_children(digest, children)
    shelf.unverified.update(plan.unverified)


def report(
    taken: Taken, ledger: Ledger, durability: Durability, metrics: Metrics, log: Logger
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
        unverified=len(taken.plan.unverified),
        lost=len(taken.plan.missing),
    )


async def recover(shelf: Shelf, taken: Taken) -> None:
    """Carry out what the comparison of files and rows has found; see recovery.py."""
    plan, ledger, index = taken.plan, shelf.ledger, taken.index
    await shelf.record(index.drop_blobs(plan.missing))
    wrong = [digest for digest in plan.wrong if digest not in ledger]
    await shelf.evict(wrong, "wrong_size")
    await shelf.evict(ledger.shrink(), "room")
    await shelf.record(index.prune_links(shelf.now() / 1_000_000 - _LINK_LIFE))
    is_settled = True
    for digest in plan.unverified:
        if shelf.is_closing:
            return
        is_settled &= await shelf.adopt(digest)
    if is_settled:
        await shelf.note_proved(taken.boot)
