"""The store: bytes by digest in files, everything else in an index, one object to ask.

What is held is known from memory alone: `size_of` is a lookup, and a request that finds nothing
costs no system call. The parts: blobs.py writes what is filled, by the steps of files.py,
eviction.py decides what has to go, shelf.py carries that out, index.py remembers across restarts,
start.py opens all of it, recovery.py compares files and index then, lock.py keeps other processes
out.

Nothing here decides who may have a blob: links say which repositories have it, and whoever serves
asks for them.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from cachetools import LRUCache

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics, StoreState
from proxy.oci.digest import Digest
from proxy.oci.errors import DigestMismatch, StoreFailed
from proxy.oci.manifest import Manifest
from proxy.store.blobs import FileLease, NoRoom, Staging, StoreFull
from proxy.store.durability import Durability, boot_id
from proxy.store.eviction import Ledger
from proxy.store.files import Disk, Layout, open_blob, read_blob
from proxy.store.hints import LinkHints
from proxy.store.lock import CacheDirBusy, CacheDirError, CacheDirUnusable
from proxy.store.marks import Mark, Marks
from proxy.store.shelf import Shelf
from proxy.store.start import Recovery, report, restore, take, unusable
from proxy.store.work import finish

__all__ = [
    "CacheDirBusy",
    "CacheDirError",
    "CacheDirUnusable",
    "CapRow",
    "Disk",
    "FileLease",
    "Link",
    "NoRoom",
    "Staging",
    "Store",
    "StoreFull",
    "TagRow",
]

# About 300 bytes each.
_LINKS_IN_MEMORY = 16_384
# Times of use are worth little: a crash loses this much of them, in seconds.
_WRITE_BACK = 5.0


@dataclass(frozen=True, slots=True)
class Link:
    """A repository has a blob; its size in bytes, where a descriptor or the upstream told it."""

    size: int | None


@dataclass(frozen=True, slots=True)
class TagRow:
    """What a tag stood for when the upstream was last asked; seconds since the epoch."""

    digest: Digest
    checked_at: float


LinkKey = tuple[str, str, Digest]  # upstream, repository, digest


@dataclass(frozen=True, slots=True)
class CapRow:
    """What was learned of an origin, and how many seconds ago."""

    value: int
    ceiling: int | None
    age: float


class Store:
    """All bytes and all that is known of them. Belongs to one event loop and one directory."""

    def __init__(self, shelf: Shelf, recovery: Recovery, resources: AsyncExitStack) -> None:
        """For `open`, which is the way to get one."""
        self._shelf = shelf
        self._ledger = shelf.ledger
        self._index = shelf.index
        self._threads = shelf.threads
        self._resources = resources
        self._loop = asyncio.get_running_loop()
        self._links: LRUCache[LinkKey, Link] = LRUCache(_LINKS_IN_MEMORY)
        self._unlinks = 0
        self._linked: Marks[LinkKey] = Marks()
        self._hints = LinkHints()
        self._on_unlinked: Callable[[LinkKey], None] = lambda _: None
        self._used: dict[Digest, int] = {}
        self._writing_back: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._recovery = recovery

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        max_size: int,
        min_free: int = 0,
        high_water: float = 0.95,
        low_water: float = 0.85,
        durability: Durability = Durability.FULL,
        boot: Callable[[], str | None] = boot_id,
        metrics: Metrics,
        log: Logger,
        wall: Callable[[], float] = time.time,
        disk: Disk | None = None,
        resume: bool = False,
        pause: float = 0.0,
    ) -> "Store":
        """Take the directory, which is made if missing, and know what is in it.

        `max_size` and `min_free` are bytes, the water marks parts of `max_size`. With `resume`
        unfinished fills of the process before can be gone on with. `boot` says which boot this is.
        A look at the directory that is not needed at once comes after `pause` seconds.
        Raises CacheDirBusy when another process holds it, CacheDirUnusable when it cannot be
        written or belongs to a newer version.
        """
        ledger = Ledger(max_size=max_size, high_water=high_water, low_water=low_water)
        with unusable(directory):
            async with AsyncExitStack() as undo:
                taken = await take(Layout(directory), undo, boot, resume=resume)
                shelf = Shelf(
                    layout=taken.layout,
                    ledger=ledger,
                    index=taken.index,
                    threads=taken.threads,
                    disk=disk or Disk(),
                    min_free=min_free,
                    durability=durability,
                    metrics=metrics,
                    log=log,
                    wall=wall,
                )
                found = await restore(shelf, taken)
                store = cls(shelf, Recovery(shelf, taken, found, pause), undo.pop_all())
                _ = shelf.spawn(store._hints.learn(taken.index, lambda: shelf.is_closing))
        report(taken, ledger, len(shelf.unverified), durability, metrics, log)
        return store

    async def close(self) -> None:
        """Drop unfinished fills, write back what is known, and let everything go.

        Leases that readers still hold stay theirs. A second call waits for the first.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="store close")
        await finish(self._closing)

    async def _close(self) -> None:
        self._shelf.is_closing = True
        if self._writing_back is not None:
            self._writing_back.cancel()
        await self._recovery.hurry()
        await self._shelf.settle()
        await self._write_back()
        await self._resources.aclose()

    async def recovered(self) -> None:
        """Wait until files and rows agree, and every file without a row has been judged."""
        await self._recovery.ended()

    def tell(
        self,
        *,
        gone: Callable[[Sequence[Digest]], None],
        unlinked: Callable[[LinkKey], None],
    ) -> None:
        """Call these when blobs are held no more, or a repository's link is taken back: at once,
        and again when nobody finds them in the directory any more."""
        self._shelf.on_gone, self._on_unlinked = gone, unlinked

    def __repr__(self) -> str:
        state = " closed" if self._shelf.is_closing else ""
        return f"<Store{state} {self._ledger} {len(self._shelf.fills)} fills>"

    def state(self) -> StoreState:
        """Bytes and blobs held, and the bytes that may be."""
        blobs = len(self._ledger) - len(self._shelf.unverified)
        ledger = self._ledger
        return StoreState(ledger.held, ledger.max_size, blobs, spare=ledger.spare)

    # Blobs

    def size_of(self, digest: Digest) -> int | None:
        """The size in bytes of a blob that is held, from memory; None when it is not."""
        entry = self._ledger.get(digest)
        if entry is None or digest in self._shelf.unverified:
            return None
        return entry.size

    def held(self, digest: Digest) -> Mark | None:
        """A mark that holds for as long as the blob is held; None when it is not."""
        return None if self.size_of(digest) is None else self._shelf.held.of(digest)

    def none_gone(self) -> Mark:
        """A mark that holds until any blob is held no more."""
        return self._shelf.held.all()

    async def lease(self, digest: Digest) -> FileLease | None:
        """Open a blob and keep it from eviction; None when it is not held.

        A blob whose file has vanished or has another size is dropped; one that the disk cannot
        open is reported and counts as not held this time.
        """
        size = self.size_of(digest)
        if size is None:
            return None
        self._require_open()
        path = self._shelf.layout.blob(digest)
        unpin = self._shelf.pinned(digest)  # before the first await: from here on it stays
        file: BinaryIO | None = self._shelf.kept.lend(digest, size)
        if file is not None:
            return FileLease(file, size, unpin)
        try:
            file = await self._threads.quick(partial(open_blob, path, size), _close_file)
        except FileNotFoundError:
            file = None
        except OSError as error:
            unpin()
            self._shelf.failed("open", error)
            return None
        except BaseException:
            unpin()
            raise
        if file is None:
            unpin()
            await self._shelf.examine(
                digest, lambda: path.stat().st_size == size, "file missing or of another size"
            )
            return None
        if self.size_of(digest) is not None and not self._shelf.is_closing:
            self._shelf.kept.keep(digest, file)
        return FileLease(file, size, unpin)

    async def read(self, digest: Digest) -> bytes | None:
        """All bytes of a small blob, checked against the digest; None when it is not held."""
        if self.size_of(digest) is None:
            return None
        self._require_open()
        path = self._shelf.layout.blob(digest)
        unpin = self._shelf.pinned(digest)
        try:
            data = await self._threads.quick(partial(read_blob, path, digest))
        except FileNotFoundError:
            data = None
        except OSError as error:
            self._shelf.failed("read", error)
            return None
        finally:
            unpin()
        if data is None:
            await self._shelf.examine(
                digest, lambda: read_blob(path, digest) is not None, "content is not the digest's"
            )
        return data

    async def create(self, digest: Digest, size: int | None) -> Staging:
        """Begin a fill; `size` in bytes or None. End it by `commit` or `discard`.

        Raises NoRoom when the blob does not fit, even after evicting all that may go.
        """
        self._require_open()
        return await self._shelf.begin(digest, size)

    async def go_on(self, digest: Digest) -> Staging | None:
        """The fill that the process before has left unfinished, with what it had brought, hashed;
        None when there is none. End it as one of `create`. Raises StoreFull when it is no use."""
        self._require_open()
        return await self._shelf.go_on(digest)

    def hand_over(self) -> None:
        """From here on, leave unfinished fills to the process that takes the directory next."""
        self._shelf.hands_over = True

    async def put(self, digest: Digest, data: bytes) -> None:
        """Store a small blob. Raises DigestMismatch, NoRoom, StoreFull, StoreFailed."""
        if self.size_of(digest) == len(data):
            self.touch(digest)
            return
        fill = await self.create(digest, len(data))
        try:
            await fill.append([data])
            if not fill.verified():
                raise DigestMismatch(digest, fill.verifier.actual())
            await fill.commit()
        except BaseException:
            await fill.discard()
            raise

    def touch(self, digest: Digest) -> None:
        """A use: the blob, and with a manifest all that it names, becomes the youngest."""
        self._used.update(self._ledger.touch(digest, self._shelf.now()))
        if self._used and self._writing_back is None and not self._shelf.is_closing:
            self._writing_back = self._loop.call_later(_WRITE_BACK, self._start_write_back)

    def _start_write_back(self) -> None:
        self._writing_back = None
        _ = self._shelf.spawn(self._write_back())

    async def _write_back(self) -> None:
        used, self._used = self._used, {}
        rows = [(when, str(digest)) for digest, when in used.items()]
        await self._shelf.record(self._index.touch(rows))

    # Manifests

    async def put_manifest(self, manifest: Manifest) -> None:
        """Store a manifest's bytes, its media type, and what it names. Raises as `put` does."""
        digest = manifest.digest
        await self.put(digest, manifest.raw)
        children = tuple(child.digest for child in manifest.children)
        if digest not in self._ledger or self._shelf.types.get(digest) == manifest.media_type:
            return  # evicted at once, or known already: the children follow from type and bytes
        self._shelf.types[digest] = manifest.media_type
        self._ledger.set_children(digest, children)
        await self._shelf.record(
            self._index.put_manifest(str(digest), manifest.media_type, map(str, children))
        )

    async def manifest_type(self, digest: Digest) -> str | None:
        """The media type of a manifest that is held; None when it is not, or not as one."""
        return self._shelf.types.get(digest)

    # Links

    async def link(
        self, upstream: str, repository: str, digests: Iterable[tuple[Digest, int | None]]
    ) -> None:
        """Note that a repository has these digests, with their sizes in bytes where known."""
        rows: list[tuple[str, int | None]] = []
        for digest, size in digests:
            key = (upstream, repository, digest)
            known = self._links.get(key)
            if size is not None or known is None:
                self._links[key] = Link(size)
            rows.append((str(digest), size))
            self._hints.add(digest.hex)
        seen = self._shelf.now() / 1_000_000
        await self._shelf.record(self._index.link(upstream, repository, rows, seen))

    def link_in_memory(
        self, upstream: str, repository: str, digest: Digest
    ) -> tuple[bool, Link | None]:
        """Whether ``linked`` needs no look into the index, and what it gives then."""
        known = self._links.get((upstream, repository, digest))
        return known is not None or self._hints.exclude(digest), known

    async def linked(self, upstream: str, repository: str, digest: Digest) -> Link | None:
        """Whether this repository is known to have it; None says nothing about the contrary."""
        is_known, known = self.link_in_memory(upstream, repository, digest)
        if is_known:
            return known
        key = (upstream, repository, digest)
        before = self._unlinks
        row = await self._shelf.record(self._index.linked(upstream, repository, str(digest)))
        if row is None:
            return None
        link = Link(row[0])
        if before == self._unlinks:  # else the row may have been deleted after it was read
            self._links.setdefault(key, link)
        return link

    async def upstreams_of(self, digest: Digest) -> frozenset[str]:
        """The upstreams with a repository that is known to have it; none when the index fails."""
        found = await self._shelf.record(self._index.linking(str(digest)))
        return found or frozenset()

    async def blobs_of(self, upstreams: Collection[str], most: int) -> list[Digest]:
        """The blobs last used of those that these upstreams are known to have, youngest first; none
        when the index fails. Some may not be held any more."""
        found = await self._shelf.record(self._index.linked_blobs(sorted(upstreams), most))
        return [Digest.parse(digest) for digest in found or ()]

    def known_link(self, upstream: str, repository: str, digest: Digest) -> Mark | None:
        """A mark that holds for as long as this repository is known to have it; None when that
        is not known from memory alone."""
        key = (upstream, repository, digest)
        return None if self._links.get(key) is None else self._linked.of(key)

    async def unlink(self, upstream: str, repository: str, digest: Digest) -> None:
        """Forget that this repository has it: the upstream says no."""
        key = (upstream, repository, digest)
        self._unlinks += 1
        self._links.pop(key, None)
        self._linked.withdraw(key)
        self._on_unlinked(key)
        await self._shelf.record(self._index.unlink(upstream, repository, str(digest)))
        self._on_unlinked(key)

    # Tags

    async def put_tag(
        self, upstream: str, repository: str, tag: str, digest: Digest, checked_at: float
    ) -> None:
        """Note what a tag stands for; `checked_at` in seconds since the epoch."""
        await self._shelf.record(
            self._index.put_tag(upstream, repository, tag, str(digest), checked_at)
        )

    async def tag(self, upstream: str, repository: str, tag: str) -> TagRow | None:
        """What a tag stood for when it was last checked."""
        row = await self._shelf.record(self._index.tag(upstream, repository, tag))
        return None if row is None else TagRow(Digest.parse(row[0]), row[1])

    async def drop_tag(self, upstream: str, repository: str, tag: str) -> None:
        """Forget a tag: the upstream does not have it."""
        await self._shelf.record(self._index.drop_tag(upstream, repository, tag))

    # Caps

    async def put_cap(self, origin: str, value: int, ceiling: int | None) -> None:
        """Note how many connections an origin stands, and the least number at which it broke."""
        now = self._shelf.now() / 1_000_000
        await self._shelf.record(self._index.put_cap(origin, value, ceiling, now))

    async def caps(self) -> dict[str, CapRow]:
        """What was noted, by origin."""
        now = self._shelf.now() / 1_000_000
        rows = await self._shelf.record(self._index.caps()) or []
        return {
            origin: CapRow(value, ceiling, now - learned)
            for origin, value, ceiling, learned in rows
        }

    # Tasks

    async def put_task(self, task: str, number: int, document: str) -> None:
        """Note a task; `number` is its place in their order."""
        await self._shelf.record(self._index.put_task(task, number, document))

    async def drop_tasks(self, tasks: Iterable[str]) -> None:
        """Forget tasks."""
        await self._shelf.record(self._index.drop_tasks(tasks))

    async def tasks(self) -> list[tuple[str, int, str]]:
        """Id, number and document of every task, in the order in which they came."""
        return await self._shelf.record(self._index.tasks()) or []

    def _require_open(self) -> None:
        if self._shelf.is_closing:
            raise StoreFailed("the store is closed")


def _close_file(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()
