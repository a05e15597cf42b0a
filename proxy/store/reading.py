"""The store as a process sees it that does not lead: what is held, to be read and never changed.

The leader alone writes, and its order makes reading safe without a word between the processes: a
file has its name only when it is whole, and its row is written after that. So a row and a file of
the row's size are a blob; whatever else there is (no row yet, no file any more, a file that may
have lost bytes with its machine and is not proved yet) is "not held", which the leader is asked
about.

What was seen is remembered, and marked for those who rely on it (marks.py), until the leader says
that it has gone: at once, and again when file and row have gone (``forget``, ``unlink``). What was
being read when that word came is not remembered, so nothing that is taken back stays. Without a
leader who would say so (``lose``) nothing is remembered: row and file are looked at each time.

A descriptor that is open keeps its bytes whatever the leader does to the name. That is all that a
reader here needs, so it holds no pin: an evicted blob's room comes back when the last one is done.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from cachetools import LRUCache

from proxy.oci.digest import Digest
from proxy.store.blobs import FileLease
from proxy.store.durability import boot_id, is_marked, was_proved_in
from proxy.store.files import Layout, open_blob, read_blob
from proxy.store.kept import KeptFiles
from proxy.store.marks import Mark, Marks
from proxy.store.store import Link, LinkKey
from proxy.store.work import Threads, end_threads, finish

# Rows that are remembered; about 300 bytes each.
_LINKS = 65_536
_BLOBS = 65_536


class Reading:
    """A cache directory that somebody else writes. Belongs to one event loop."""

    def __init__(
        self,
        directory: Path,
        connection: sqlite3.Connection,
        thread: ThreadPoolExecutor,
        boot: Callable[[], str | None],
    ) -> None:
        """For `open`."""
        self._layout = Layout(directory)
        self._connection = connection
        self._thread = thread
        self._threads = Threads()
        self._boot = boot
        self._is_proved = False  # what may have lost bytes is right
        self._links: LRUCache[LinkKey, Link] = LRUCache(_LINKS)
        self._sizes: LRUCache[Digest, int] = LRUCache(_BLOBS)  # of blobs that could be opened
        self._held: Marks[Digest] = Marks()
        self._linked: Marks[LinkKey] = Marks()
        self._kept = KeptFiles()  # of blobs whose size is remembered
        self._changes = 0  # how often something was taken back
        self._is_told = True
        self._closed = False

    @classmethod
    async def open(cls, directory: Path, *, boot: Callable[[], str | None] = boot_id) -> Reading:
        """Read the index that is there; ``boot`` says which boot this is. Raises sqlite3.Error."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="pullpool-reading")
        path = Layout(directory).index
        opening = asyncio.get_running_loop().run_in_executor(thread, partial(_open, path))
        try:
            connection = await finish(opening, lambda got: got.close())
        except BaseException:
            await end_threads(thread)
            raise
        return cls(directory, connection, thread, boot)

    async def close(self) -> None:
        """Let everything go; leases stay their readers'. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.lose()
        loop = asyncio.get_running_loop()
        await finish(loop.run_in_executor(self._thread, self._connection.close))
        await end_threads(self._thread)
        await self._threads.close()

    # -- what was seen, and taken back ---------------------------------------------------

    def forget(self, digests: Iterable[Digest]) -> None:
        """These are held no more."""
        self._changes += 1
        for digest in digests:
            self._sizes.pop(digest, None)
            self._held.withdraw(digest)
            self._kept.drop([digest])

    def unlink(self, key: LinkKey) -> None:
        """This repository is not known to have it any more."""
        self._changes += 1
        self._links.pop(key, None)
        self._linked.withdraw(key)

    def lose(self) -> None:
        """Nobody takes anything back from now on: everything is looked for each time."""
        self._changes += 1
        self._is_told = False
        self._links.clear()
        self._sizes.clear()
        self._held.clear()
        self._linked.clear()
        self._kept.close()

    def _is_current(self, before: int) -> bool:
        """May it be remembered what was read when there had been so many changes?"""
        return self._is_told and before == self._changes

    def size_of(self, digest: Digest) -> int | None:
        """The size in bytes of a blob that is known to be held, from memory."""
        return self._sizes.get(digest)

    def held(self, digest: Digest) -> Mark | None:
        """A mark that holds for as long as the blob is known to be held."""
        return None if self._sizes.get(digest) is None else self._held.of(digest)

    def known_link(self, upstream: str, repository: str, digest: Digest) -> Mark | None:
        """A mark that holds for as long as the repository is known to have it, from memory."""
        key = (upstream, repository, digest)
        return None if self._links.get(key) is None else self._linked.of(key)

    # -- looking -----------------------------------------------------------------------------

    async def linked(self, upstream: str, repository: str, digest: Digest) -> Link | None:
        """The repository's link, if it has one; None says nothing about the contrary."""
        key = (upstream, repository, digest)
        known, before = self._links.get(key), self._changes
        if known is None:
            query = "SELECT size FROM link WHERE upstream = ? AND repository = ? AND digest = ?"
            row = await self._row(query, (upstream, repository, str(digest)))
            if row is None:
                return None
            known = Link(row[0])
            if self._is_current(before):
                self._links[key] = known
        return known

    async def size(self, digest: Digest) -> int | None:
        """The size in bytes that a blob has if it is held."""
        known = self._sizes.get(digest)
        if known is None:
            row = await self._row("SELECT size FROM blob WHERE digest = ?", (str(digest),))
            return None if row is None else int(row[0])
        return known

    async def lease(self, digest: Digest) -> FileLease | None:
        """Open a blob; None when it is not held, as far as can be seen from here."""
        before, size = self._changes, await self.size(digest)
        if size is None or self._closed:
            return None
        file: BinaryIO | None = self._kept.lend(digest, size)
        if file is not None:
            return FileLease(file, size, lambda: None)
        path = self._layout.blob(digest)
        try:
            file = await self._threads.quick(partial(self._opened, path, size), _close)
        except OSError:
            file = None
        if file is None:
            self.forget([digest])
            return None
        if self._is_current(before):
            self._sizes[digest] = size
            self._kept.keep(digest, file)
        return FileLease(file, size, lambda: None)

    async def read(self, digest: Digest) -> bytes | None:
        """All bytes of a small blob, checked against the digest; None: not held."""
        before, size = self._changes, await self.size(digest)
        if size is None or self._closed:
            return None
        path = self._layout.blob(digest)
        try:
            data = await self._threads.quick(partial(read_blob, path, digest))
        except OSError:
            data = None
        if data is None:
            self.forget([digest])
        elif self._is_current(before):
            self._sizes[digest] = len(data)
        return data

    async def manifest(self, digest: Digest) -> tuple[bytes, str] | None:
        """A manifest's bytes and media type; None: not held."""
        row = await self._row("SELECT media_type FROM manifest WHERE digest = ?", (str(digest),))
        data = None if row is None else await self.read(digest)
        return None if row is None or data is None else (data, str(row[0]))

    def _opened(self, path: Path, size: int) -> BinaryIO | None:
        # In a thread.
        file = open_blob(path, size)
        if file is not None and is_marked(os.fstat(file.fileno()).st_mode):
            self._is_proved = self._is_proved or was_proved_in(self._layout.boot, self._boot())
            if not self._is_proved:
                file.close()
                return None
        return file

    async def _row(self, query: str, values: tuple[str, ...]) -> tuple[Any, ...] | None:
        """The first row; None when there is none, or the index cannot be read."""
        if self._closed:
            return None

        def find() -> tuple[Any, ...] | None:
            row: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
            return row

        loop = asyncio.get_running_loop()
        try:
            return await finish(loop.run_in_executor(self._thread, find))
        except sqlite3.Error:  # being replaced, say: the leader knows
            return None

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sizes)} blobs seen"
        return f"<Reading {self._layout.root.name} {state}>"


def _open(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("SELECT count(*) FROM (SELECT 1 FROM blob LIMIT 1)").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _close(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()
