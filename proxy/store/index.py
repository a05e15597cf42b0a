"""What the files cannot say: links, tags, media types, children, last use, tasks. SQLite, one
thread.

Theory of operation. One connection lives on one thread of its own. Whoever wants something adds a
job to a list on the event loop; while the thread works on one batch, the next one gathers, so the
busier the index the larger its transactions and nobody waits for a timer. A batch is one
transaction, its jobs run in the order in which they were added, and readers among them see what
was written before them. Every write is an upsert or a delete: nothing is looked up first, so there
is no interleaving in which two writers both find nothing.

A batch that fails is rolled back and its jobs are run again one by one, so that a job that cannot
work fails alone. A job whose waiter was cancelled runs all the same.

Crash: WAL with synchronous=NORMAL is consistent after a kill and after a power cut; a power cut may
lose the last transactions. That is no harm, because the index never holds the only copy of
bytes: files without a row are hashed and adopted, rows without a file are dropped, links are proved
again by the upstream. For the same reason an index that SQLite calls corrupt is moved aside and
begun anew.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar, cast

from proxy.store.work import end_threads, finish

T = TypeVar("T")
Row = tuple[str, int, int]
Work = Callable[[sqlite3.Connection], object]

# user_version is the number of these that have been applied. Published ones never change; a new
# version of the schema is one more tuple at the end.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # used: microseconds since the epoch
        """CREATE TABLE blob (
            digest TEXT PRIMARY KEY, size INTEGER NOT NULL, used INTEGER NOT NULL
        ) WITHOUT ROWID""",
        # children: digests with a space between, only ever read as a whole
        """CREATE TABLE manifest (
            digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, children TEXT NOT NULL
        ) WITHOUT ROWID""",
        # seen: seconds since the epoch
        """CREATE TABLE link (
            upstream TEXT NOT NULL, repository TEXT NOT NULL, digest TEXT NOT NULL,
            size INTEGER, seen REAL NOT NULL,
            PRIMARY KEY (upstream, repository, digest)
        ) WITHOUT ROWID""",
        """CREATE TABLE tag (
            upstream TEXT NOT NULL, repository TEXT NOT NULL, tag TEXT NOT NULL,
            digest TEXT NOT NULL, checked_at REAL NOT NULL,
            PRIMARY KEY (upstream, repository, tag)
        ) WITHOUT ROWID""",
    ),
    (
        # What was learned of an origin: how many connections it stands, the least number at which
        # it broke (if it did), and when that was known, in seconds since the epoch.
        """CREATE TABLE cap (
            origin TEXT PRIMARY KEY, value INTEGER NOT NULL, ceiling INTEGER, learned REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
    (
        # number: the order in which tasks came. document: JSON, only ever read as a whole
        """CREATE TABLE task (
            id TEXT PRIMARY KEY, number INTEGER NOT NULL, document TEXT NOT NULL
        ) WITHOUT ROWID""",
    ),
)

_ALL_BLOBS = "SELECT digest, size, used FROM blob ORDER BY used"
_ALL_MANIFESTS = "SELECT digest, media_type, children FROM manifest"


class IndexFailed(Exception):
    """SQLite could not do it (disk full, I/O error, corrupt); the index goes on."""


class IndexUnusable(Exception):
    """The index cannot be opened: written by a newer version, or the system refuses."""


@dataclass(frozen=True, slots=True)
class Contents:
    """All blobs, from the oldest use to the youngest, and all manifests."""

    blobs: Sequence[Row]  # digest, size in bytes, last use in microseconds
    manifests: Sequence[tuple[str, str, str]]  # digest, media type, children


@dataclass(slots=True)
class _Job:
    work: Work
    done: "asyncio.Future[object]"
    result: object = None
    error: Exception | None = None


@dataclass(slots=True)
class Index:
    """The SQLite index. Belongs to one event loop; `open` makes one, `close` ends it."""

    path: Path
    was_lost: bool  # the old one was corrupt and now lies beside, as `<name>.corrupt`
    _connection: sqlite3.Connection
    _thread: ThreadPoolExecutor
    _waiting: list[_Job] = field(default_factory=list)
    _runner: "asyncio.Task[None] | None" = None
    _closed: bool = False

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> Self:
        """Open or make the index.

        Raises IndexUnusable for an index of a newer version and for what the system refuses.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="pullpool-index")
        opening = asyncio.get_running_loop().run_in_executor(thread, _open, path, migrations)
        try:
            connection, was_lost = await finish(opening, lambda got: got[0].close())
        except BaseException:
            await end_threads(thread)
            raise
        return cls(path, was_lost, connection, thread)

    async def close(self) -> None:
        """Finish what was asked for, then close file and thread; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        while self._runner is not None:
            await asyncio.shield(self._runner)
        loop = asyncio.get_running_loop()
        await finish(loop.run_in_executor(self._thread, self._connection.close))
        await end_threads(self._thread)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._waiting)} waiting"
        return f"<Index {self.path.name} {state}>"

    # Jobs

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on the index's thread, in order, inside a transaction.

        Raises IndexFailed. A caller that is cancelled only stops waiting.
        """
        if self._closed:
            raise IndexFailed("the index is closed")
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._runner is None:
            self._runner = asyncio.create_task(self._drain(), name="index")
        return cast(T, await job.done)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await loop.run_in_executor(self._thread, _run_batch, self._connection, batch)
                for job in batch:
                    _settle(job)
        finally:
            self._runner = None

    async def _many(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        given = list(rows)
        if given:
            await self.run(lambda connection: connection.executemany(statement, given))

    # Blobs and manifests

    async def load(self) -> Contents:
        """Everything that is held in memory while the store is open."""
        return await self.run(_read)

    async def put_blob(self, digest: str, size: int, used: int) -> None:
        await self._many(
            "INSERT INTO blob VALUES (?, ?, ?) ON CONFLICT (digest) "
            "DO UPDATE SET size = excluded.size, used = max(used, excluded.used)",
            [(digest, size, used)],
        )

    async def touch(self, used: Iterable[tuple[int, str]]) -> None:
        """Write back times of use; a blob that has gone in the meantime stays gone."""
        await self._many("UPDATE blob SET used = ? WHERE digest = ?", used)

    async def drop_blobs(self, digests: Iterable[str]) -> None:
        """Drop blobs and what is known of them as manifests. Links and tags stay true."""
        rows = [(digest,) for digest in digests]

        def drop(connection: sqlite3.Connection) -> None:
            connection.executemany("DELETE FROM blob WHERE digest = ?", rows)
            connection.executemany("DELETE FROM manifest WHERE digest = ?", rows)

        if rows:
            await self.run(drop)

    async def put_manifest(self, digest: str, media_type: str, children: Iterable[str]) -> None:
        await self._many(
            "INSERT INTO manifest VALUES (?, ?, ?) ON CONFLICT (digest) "
            "DO UPDATE SET media_type = excluded.media_type, children = excluded.children",
            [(digest, media_type, " ".join(children))],
        )

    # Links: this repository of this upstream has this digest

    async def link(
        self,
        upstream: str,
        repository: str,
        digests: Iterable[tuple[str, int | None]],
        seen: float,
    ) -> None:
        """A size once known is not forgotten by a later link that does not know it."""
        await self._many(
            "INSERT INTO link VALUES (?, ?, ?, ?, ?) ON CONFLICT (upstream, repository, digest) "
            "DO UPDATE SET size = coalesce(excluded.size, size), seen = excluded.seen",
            [(upstream, repository, digest, size, seen) for digest, size in digests],
        )

    async def linked(self, upstream: str, repository: str, digest: str) -> tuple[int | None] | None:
        """A row with the size, which may be unknown; None when there is no link."""

        def find(connection: sqlite3.Connection) -> tuple[int | None] | None:
            row: tuple[int | None] | None = connection.execute(
                "SELECT size FROM link WHERE upstream = ? AND repository = ? AND digest = ?",
                (upstream, repository, digest),
            ).fetchone()
            return row

        return await self.run(find)

    async def linking(self, digest: str) -> frozenset[str]:
        """The upstreams with a link to it. Looks through all links, which took this thread 12 to
        18 ms for a hundred thousand of them: who asks often remembers."""

        def find(connection: sqlite3.Connection) -> frozenset[str]:
            query = "SELECT DISTINCT upstream FROM link WHERE digest = ?"
            return frozenset(row[0] for row in connection.execute(query, (digest,)))

        return await self.run(find)

    async def linked_blobs(self, upstreams: Sequence[str], most: int) -> list[str]:
        """Blobs that one of these upstreams has, from the youngest use to the oldest."""

        def find(connection: sqlite3.Connection) -> list[str]:
            names = ", ".join("?" * len(upstreams))
            query = (
                "SELECT digest FROM blob WHERE digest IN"
                f" (SELECT digest FROM link WHERE upstream IN ({names}))"
                " ORDER BY used DESC LIMIT ?"
            )
            return [row[0] for row in connection.execute(query, (*upstreams, most))]

        return await self.run(find)

    async def unlink(self, upstream: str, repository: str, digest: str) -> None:
        await self._many(
            "DELETE FROM link WHERE upstream = ? AND repository = ? AND digest = ?",
            [(upstream, repository, digest)],
        )

    async def prune_links(self, seen_before: float) -> None:
        """Drop links that nobody proved for long and whose bytes are not held."""
        await self._many(
            "DELETE FROM link WHERE seen < ? AND digest NOT IN (SELECT digest FROM blob)",
            [(seen_before,)],
        )

    # Tags

    async def put_tag(
        self, upstream: str, repository: str, tag: str, digest: str, checked_at: float
    ) -> None:
        await self._many(
            "INSERT INTO tag VALUES (?, ?, ?, ?, ?) ON CONFLICT (upstream, repository, tag) "
            "DO UPDATE SET digest = excluded.digest, checked_at = excluded.checked_at",
            [(upstream, repository, tag, digest, checked_at)],
        )

    async def tag(self, upstream: str, repository: str, tag: str) -> tuple[str, float] | None:
        """Digest, and when the upstream was last asked in seconds since the epoch."""

        def find(connection: sqlite3.Connection) -> tuple[str, float] | None:
            row: tuple[str, float] | None = connection.execute(
                "SELECT digest, checked_at FROM tag "
                "WHERE upstream = ? AND repository = ? AND tag = ?",
                (upstream, repository, tag),
            ).fetchone()
            return row

        return await self.run(find)

    async def drop_tag(self, upstream: str, repository: str, tag: str) -> None:
        await self._many(
            "DELETE FROM tag WHERE upstream = ? AND repository = ? AND tag = ?",
            [(upstream, repository, tag)],
        )

    # Caps: what was learned of each origin

    async def put_cap(self, origin: str, value: int, ceiling: int | None, learned: float) -> None:
        """`learned` in seconds since the epoch."""
        await self._many(
            "INSERT INTO cap VALUES (?, ?, ?, ?) ON CONFLICT (origin) DO UPDATE SET "
            "value = excluded.value, ceiling = excluded.ceiling, learned = excluded.learned",
            [(origin, value, ceiling, learned)],
        )

    async def caps(self) -> list[tuple[str, int, int | None, float]]:
        """Origin, cap, ceiling, and when that was learned."""

        def find(connection: sqlite3.Connection) -> list[tuple[str, int, int | None, float]]:
            query = "SELECT origin, value, ceiling, learned FROM cap"
            return connection.execute(query).fetchall()

        return await self.run(find)

    # Tasks

    async def put_task(self, task: str, number: int, document: str) -> None:
        await self._many(
            "INSERT INTO task VALUES (?, ?, ?) ON CONFLICT (id) "
            "DO UPDATE SET number = excluded.number, document = excluded.document",
            [(task, number, document)],
        )

    async def drop_tasks(self, tasks: Iterable[str]) -> None:
        await self._many("DELETE FROM task WHERE id = ?", [(task,) for task in tasks])

    async def tasks(self) -> list[tuple[str, int, str]]:
        """All tasks, in the order in which they came."""

        def find(connection: sqlite3.Connection) -> list[tuple[str, int, str]]:
            query = "SELECT id, number, document FROM task ORDER BY number, id"
            return connection.execute(query).fetchall()

        return await self.run(find)


# On the index's thread


def _run_batch(connection: sqlite3.Connection, batch: Sequence[_Job]) -> None:
    if _run_together(connection, batch) or len(batch) == 1:
        return
    for job in batch:
        _run_together(connection, [job])


def _run_together(connection: sqlite3.Connection, batch: Sequence[_Job]) -> bool:
    """One transaction for all; on failure every job of it carries the error."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        for job in batch:
            job.result, job.error = job.work(connection), None
        connection.execute("COMMIT")
    except Exception as error:  # a job that is wrong must not end the thread's work
        for job in batch:
            job.error = error
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        return False
    return True


def _settle(job: _Job) -> None:
    if job.done.done():  # its waiter was cancelled
        return
    if job.error is None:
        job.done.set_result(job.result)
    elif isinstance(job.error, sqlite3.Error):
        failure = IndexFailed(f"{type(job.error).__name__}: {job.error}")
        failure.__cause__ = job.error
        job.done.set_exception(failure)
    else:
        job.done.set_exception(job.error)


def _open(path: Path, migrations: Sequence[Sequence[str]]) -> tuple[sqlite3.Connection, bool]:
    try:
        try:
            return _connect(path, migrations), False
        except sqlite3.DatabaseError as error:
            if not _is_lost(error):
                raise
            _move_aside(path)
            return _connect(path, migrations), True
    except (sqlite3.Error, OSError) as error:
        raise IndexUnusable(f"{path.name}: {error}") from error


def _is_lost(error: sqlite3.DatabaseError) -> bool:
    """Whether the contents are at fault; a full disk or missing rights would not get better."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    # SQLITE_ERROR: no such table, or another table of that name. It is not our index.
    # The low byte is the primary code.
    return code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _connect(path: Path, migrations: Sequence[Sequence[str]]) -> sqlite3.Connection:
    # check_same_thread: opened and used on the one thread, but collected anywhere.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _migrate(connection, path, migrations)
        _check(connection)
        return connection
    except BaseException:
        connection.close()
        raise


def _migrate(
    connection: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]]
) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise IndexUnusable(
            f"{path.name} has schema version {version}, this program knows up to "
            f"{len(migrations)}: run the newer program, or remove {path.name} (no bytes are lost)"
        )
    if version == len(migrations):
        return
    # DDL and user_version are transactional: a crash leaves the old version whole.
    connection.execute("BEGIN IMMEDIATE")
    for statements in migrations[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(migrations)}")
    connection.execute("COMMIT")


def _check(connection: sqlite3.Connection) -> None:
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    for query in (_ALL_BLOBS, _ALL_MANIFESTS):
        connection.execute(f"{query} LIMIT 0")


def _read(connection: sqlite3.Connection) -> Contents:
    return Contents(
        blobs=connection.execute(_ALL_BLOBS).fetchall(),
        manifests=connection.execute(_ALL_MANIFESTS).fetchall(),
    )


def _move_aside(path: Path) -> None:
    """Keep the corrupt index for whoever wants to look; the log files belong to it."""
    path.replace(path.with_name(path.name + ".corrupt"))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
