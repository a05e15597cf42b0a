"""The store as a process sees it that does not lead: what is held, to be read and never changed.

The leader alone writes, and its order makes reading safe without a word between the processes: a
file has its name only when it is whole and on the disk, and its row is written after that. So a row
and a file of the row's size are a blob; whatever else there is (no row yet, no file any more) is
"not held", which the leader is asked about. What was seen once is remembered: content does not
change, a file that has been evicted fails to open, and links are never taken back while they are
in use.

A descriptor that is open keeps its bytes whatever the leader does to the name. That is all that a
reader here needs, so it holds no pin: an evicted blob's room comes back when the last one is done.
"""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from cachetools import LRUCache

from proxy.oci.digest import Digest
from proxy.store.blobs import FileLease, Layout, open_blob, read_blob
from proxy.store.store import Link
from proxy.store.work import Threads, end_threads, finish

# Rows that are remembered; about 300 bytes each.
_LINKS = 65_536
_BLOBS = 65_536


class Reading:
    """A cache directory that somebody else writes. Belongs to one event loop."""

    def __init__(self, directory: Path, connection: sqlite3.Connection, thread: ThreadPoolExecutor):
        """For `open`."""
        self._layout = Layout(directory)
        self._connection = connection
        self._thread = thread
        self._threads = Threads()
        self._links: LRUCache[tuple[str, str, Digest], Link] = LRUCache(_LINKS)
        self._sizes: LRUCache[Digest, int] = LRUCache(_BLOBS)
        self._closed = False

    @classmethod
    async def open(cls, directory: Path) -> Reading:
        """Read the index that is there. Raises sqlite3.Error."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="pullpool-reading")
        path = Layout(directory).index
        opening = asyncio.get_running_loop().run_in_executor(thread, partial(_open, path))
        try:
            connection = await finish(opening, lambda got: got.close())
        except BaseException:
            await end_threads(thread)
            raise
        return cls(directory, connection, thread)

    async def close(self) -> None:
        """Let everything go; leases stay their readers'. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        await finish(loop.run_in_executor(self._thread, self._connection.close))
        await end_threads(self._thread)
        await self._threads.close()

    async def linked(self, upstream: str, repository: str, digest: Digest) -> Link | None:
        """The repository's link, if it has one; None says nothing about the contrary."""
        key = (upstream, repository, digest)
        known = self._links.get(key)
        if known is None:
            query = "SELECT size FROM link WHERE upstream = ? AND repository = ? AND digest = ?"
            row = await self._row(query, (upstream, repository, str(digest)))
            if row is None:
                return None
            known = self._links[key] = Link(row[0])
        return known

    async def lease(self, digest: Digest) -> FileLease | None:
        """Open a blob; None when it is not held, as far as can be seen from here."""
        size = await self._size(digest)
        if size is None or self._closed:
            return None
        path = self._layout.blob(digest)
        try:
            file = await self._threads.quick(partial(open_blob, path, size), _close)
        except OSError:
            file = None
        if file is None:
            self._sizes.pop(digest, None)
            return None
        return FileLease(file, size, lambda: None)

    async def manifest(self, digest: Digest) -> tuple[bytes, str] | None:
        """A manifest's bytes and media type, checked against the digest; None: not held."""
        row = await self._row("SELECT media_type FROM manifest WHERE digest = ?", (str(digest),))
        if row is None or await self._size(digest) is None or self._closed:
            return None
        path = self._layout.blob(digest)
        try:
            data = await self._threads.quick(partial(read_blob, path, digest))
        except OSError:
            data = None
        if data is None:
            self._sizes.pop(digest, None)
            return None
        return data, str(row[0])

    async def _size(self, digest: Digest) -> int | None:
        size = self._sizes.get(digest)
        if size is None:
            row = await self._row("SELECT size FROM blob WHERE digest = ?", (str(digest),))
            if row is None:
                return None
            size = self._sizes[digest] = int(row[0])
        return size

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
