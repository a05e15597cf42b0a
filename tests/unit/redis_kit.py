"""Real Redis servers for tests: plain, TLS with ACL, replicated under a Sentinel, as a Cluster.

Each server is a process with a directory and a port of its own, that its block ends; nothing is
ever saved to disk. Waiting is done by asking the server again until it says what is expected.

A Cluster takes seconds to start, since its servers wait before they serve. Tests that only put keys
into one share it (``apart``, and the fixtures in tests/conftest.py), and begin by flushing it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import trustme
from redis.asyncio.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import RedisError

from benchmarks.parts import LOOPBACK, free_port

PROGRAM = "redis-server"
needs_redis = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="needs redis-server")
ASK_AGAIN = 0.02  # seconds between two looks at a server that is not yet where it should be
ADMIN, ADMIN_PASSWORD = "admin", "kit's own"
USER, PASSWORD = "pullpool", "p@ss word"
# What a node needs in its directory, and no more: see README, "ACL".
RULES = "~pp:* +@all -@admin -@dangerous +info"
# And of Sentinels, who know other users: see docs/fleet.md.
SENTINEL_USER, SENTINEL_PASSWORD = "watcher", "of the Sentinels"
SENTINEL_RULES = "+client|setname +sentinel|get-master-addr-by-name"
SENTINEL_ACL = f'user {SENTINEL_USER} on ">{SENTINEL_PASSWORD}" {SENTINEL_RULES}'

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Papers:
    """PEM files: an authority, a server's certificate for 127.0.0.1 and a client's."""

    ca_file: Path
    cert_file: Path
    key_file: Path
    client_cert_file: Path
    client_key_file: Path

    @classmethod
    def issue(cls, directory: Path) -> Self:
        authority = trustme.CA()
        server, client = authority.issue_cert(LOOPBACK), authority.issue_cert("node.example.com")
        papers = cls(
            *(
                directory / name
                for name in ("ca.pem", "server.pem", "server.key", "node.pem", "node.key")
            )
        )
        authority.cert_pem.write_to_path(papers.ca_file)
        for certificate, cert_file, key_file in (
            (server, papers.cert_file, papers.key_file),
            (client, papers.client_cert_file, papers.client_key_file),
        ):
            certificate.cert_chain_pems[0].write_to_path(cert_file)
            certificate.private_key_pem.write_to_path(key_file)
        return papers


async def until(asked: Callable[[], Awaitable[bool]]) -> None:
    """Ask until the answer is yes; a server that cannot be asked has not said yes."""
    while True:
        with contextlib.suppress(RedisError, OSError, AssertionError):
            if await asked():
                return
        await asyncio.sleep(ASK_AGAIN)


class Server:
    """One redis-server (or Sentinel): started, paused, ended, and asked on a socket of its own."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        papers: Papers | None = None,
        sentinel: bool = False,
        password: str = "",
    ) -> None:
        self.port = free_port()
        self.papers = papers
        self._password = password  # of the default user, where there are no papers
        self._options = options
        self._sentinel = sentinel
        self._directory = directory / f"redis-{self.port}"
        self._process: Process | None = None

    def __repr__(self) -> str:
        pid = self._process.pid if self._process else None
        return f"<Server {self.address} pid={pid}>"

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'rediss' if self.papers else 'redis'}://{self.address}/0"

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        await asyncio.to_thread(self._prepare)
        self._process = await asyncio.create_subprocess_exec(
            PROGRAM,
            str(self._directory / "redis.conf"),
            *(["--sentinel"] if self._sentinel else []),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        await until(self._answers)

    def _prepare(self) -> None:
        self._directory.mkdir(exist_ok=True)
        file = self._directory / "redis.conf"
        if self._sentinel and file.exists():
            return  # it keeps what it knows there
        lines = [f"bind {LOOPBACK}", f"dir {self._directory}", f"logfile {self._directory}/log"]
        if self.papers:
            lines += ["port 0", f"tls-port {self.port}", *self._tls_lines(self.papers)]
        else:
            lines.append(f"port {self.port}")
        if self._password:
            lines.append(f'requirepass "{self._password}"')
        if not self._sentinel:
            lines += ['save ""', "appendonly no", "repl-diskless-sync-delay 0"]
        file.write_text("\n".join([*lines, *self._options, ""]))

    def _tls_lines(self, papers: Papers) -> list[str]:
        return [
            f"tls-ca-cert-file {papers.ca_file}",
            f"tls-cert-file {papers.cert_file}",
            f"tls-key-file {papers.key_file}",
            "tls-auth-clients yes",
            "user default off",
            f'user {ADMIN} on ">{ADMIN_PASSWORD}" ~* &* +@all',
            SENTINEL_ACL if self._sentinel else f'user {USER} on ">{PASSWORD}" {RULES}',
        ]

    async def _answers(self) -> bool:
        assert self._process is not None
        if self._process.returncode is not None:
            log = self._directory / "log"
            text = await asyncio.to_thread(log.read_text) if log.exists() else "no log"
            raise RuntimeError(f"{PROGRAM} ended with {self._process.returncode}: {text[-800:]}")
        return bool(await self.ask("PING") == b"PONG")

    def _connection(self) -> Connection:
        plain: dict[str, Any] = {"host": LOOPBACK, "port": self.port, "protocol": 2}
        if not self.papers:
            return Connection(**plain, password=self._password or None)
        return SSLConnection(
            **plain,
            username=ADMIN,
            password=ADMIN_PASSWORD,
            ssl_ca_certs=str(self.papers.ca_file),
            ssl_certfile=str(self.papers.client_cert_file),
            ssl_keyfile=str(self.papers.client_key_file),
        )

    async def ask(self, *words: str | bytes | int) -> Any:
        """Say one command on a connection of its own, and return the answer."""
        connection = self._connection()
        if isinstance(connection, SSLConnection):
            await asyncio.to_thread(connection.ssl_context.get)  # reads files
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis has it so
            await connection.send_command(*words)
            return await connection.read_response()
        except (ConnectionResetError, ssl.SSLError) as error:
            raise NotConnected(str(error)) from error
        finally:
            await connection.disconnect(nowait=True)

    async def info(self, section: str, name: str) -> str:
        """One field of INFO."""
        for line in (await self.ask("INFO", section)).decode().splitlines():
            field, _, value = line.partition(":")
            if field == name:
                return str(value)
        raise KeyError(name)

    async def calls(self, *commands: str) -> int:
        """How many of these commands it has executed since it started."""
        text = (await self.ask("INFO", "commandstats")).decode()
        counts = {
            name.removeprefix("cmdstat_"): int(rest.split("calls=")[1].split(",")[0])
            for name, _, rest in (line.partition(":") for line in text.splitlines())
            if rest
        }
        return sum(counts.get(command.lower(), 0) for command in commands)

    async def flush(self) -> None:
        """Forget every key and every script."""
        await self.ask("FLUSHALL", "SYNC")
        await self.ask("SCRIPT", "FLUSH", "SYNC")

    def pause(self) -> None:
        """Stop it in its tracks: its sockets stay open and say nothing."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    async def kill(self) -> None:
        """End it at once, paused or not."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        if process is not None:
            await process.wait()

    async def restart(self) -> None:
        """End it, with all it knows, and start another one on the same port."""
        await self.kill()
        await self.start()


@contextlib.contextmanager
def apart(started: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
    """What these servers are, for tests on other loops than their start, or on none."""
    with asyncio.Runner() as runner:

        async def enter() -> T:
            return await started.__aenter__()

        async def leave() -> None:
            await started.__aexit__(None, None, None)

        entered = runner.run(enter())
        try:
            yield entered
        finally:
            runner.run(leave())


@contextlib.asynccontextmanager
async def redis_server(directory: Path, *options: str) -> AsyncIterator[Server]:
    """A plain server; each of `options` is a line of its configuration."""
    async with _started(Server(directory, *options)) as server:
        yield server


@contextlib.asynccontextmanager
async def redis_with_tls(directory: Path) -> AsyncIterator[Server]:
    """A server that speaks TLS only, wants certificates of its clients (`papers`), and knows the
    user `USER` with `PASSWORD`, who may do what a node must."""
    papers = await asyncio.to_thread(Papers.issue, directory)
    async with _started(Server(directory, papers=papers)) as server:
        yield server


@contextlib.asynccontextmanager
async def _started(server: Server) -> AsyncIterator[Server]:
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


@dataclass(frozen=True, slots=True)
class Replicated:
    """A primary and its replica, and the Sentinel that decides which of the two is which."""

    SERVICE = "fleet"

    servers: tuple[Server, Server]
    sentinel: Server

    @property
    def url(self) -> str:
        scheme = "rediss" if self.sentinel.papers else "redis"
        return f"{scheme}+sentinel://{self.sentinel.address}/{self.SERVICE}/0"

    async def primary(self) -> Server:
        """Which one the Sentinel names now."""
        found = await self.sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.SERVICE)
        return next(server for server in self.servers if server.port == int(found[1]))

    async def fail_over(self) -> Server:
        """Have the Sentinel make the replica the primary; returns that one."""
        former = await self.primary()

        async def moved() -> bool:
            with contextlib.suppress(RedisError):  # one is under way, or the replica is not known
                await self.sentinel.ask("SENTINEL", "FAILOVER", self.SERVICE)
            return await self.primary() is not former

        await until(moved)
        return await self.settled()

    async def settled(self) -> Server:
        """Wait until who is named the primary says so itself."""

        async def agreed() -> bool:
            return bool((await (await self.primary()).ask("ROLE"))[0] == b"master")

        await until(agreed)
        return await self.primary()


@contextlib.asynccontextmanager
async def redis_with_sentinel(
    directory: Path, *options: str, patience: int = 1000, password: str = ""
) -> AsyncIterator[Replicated]:
    """Two servers, and a Sentinel that gives up a silent primary after `patience` milliseconds.

    `options` and `password` are the Sentinel's: lines of its configuration, and its requirepass.
    """
    async with contextlib.AsyncExitStack() as stack:
        primary = await stack.enter_async_context(redis_server(directory))
        follows = f"replicaof {LOOPBACK} {primary.port}"
        replica = await stack.enter_async_context(redis_server(directory, follows))

        async def in_step() -> bool:
            return bool(await replica.info("replication", "master_link_status") == "up")

        await until(in_step)
        service = Replicated.SERVICE
        sentinel = Server(
            directory,
            f"sentinel monitor {service} {LOOPBACK} {primary.port} 1",
            f"sentinel down-after-milliseconds {service} {patience}",
            f"sentinel failover-timeout {service} 2000",
            *options,
            sentinel=True,
            password=password,
        )
        await stack.enter_async_context(_started(sentinel))

        async def known() -> bool:
            return bool(await sentinel.ask("SENTINEL", "REPLICAS", service))

        await until(known)
        yield Replicated((primary, replica), sentinel)


@contextlib.asynccontextmanager
async def redis_with_sentinel_and_tls(directory: Path) -> AsyncIterator[Replicated]:
    """A primary alone and its Sentinel, both as in ``redis_with_tls``, but that the Sentinel knows
    ``SENTINEL_USER`` instead."""
    papers = await asyncio.to_thread(Papers.issue, directory)
    async with _started(Server(directory, papers=papers)) as primary:
        service = Replicated.SERVICE
        sentinel = Server(
            directory,
            "tls-replication yes",  # it speaks TLS to the primary, too
            f"sentinel monitor {service} {LOOPBACK} {primary.port} 1",
            f"sentinel auth-user {service} {ADMIN}",
            f'sentinel auth-pass {service} "{ADMIN_PASSWORD}"',
            papers=papers,
            sentinel=True,
        )
        async with _started(sentinel):
            yield Replicated((primary, primary), sentinel)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Three primaries that share the hash slots evenly."""

    servers: tuple[Server, Server, Server]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(server.address for server in self.servers)}"

    async def holder(self, key: str) -> Server:
        """Which one holds `key` now."""
        asked = self.servers[0]
        slot = await asked.ask("CLUSTER", "KEYSLOT", key)
        for first, last, owner, *_ in await asked.ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(one for one in self.servers if one.port == owner[1])
        raise LookupError(f"nobody holds slot {slot}")

    async def move(self, key: str, to: Server) -> None:
        """Give the slot of `key` to another one; what was in it is gone."""
        slot = await to.ask("CLUSTER", "KEYSLOT", key)
        former = await self.holder(key)
        for found in await former.ask("CLUSTER", "GETKEYSINSLOT", slot, 1000):
            await former.ask("DEL", found)
        name = await to.ask("CLUSTER", "MYID")
        for server in (to, former, *self.servers):
            await server.ask("CLUSTER", "SETSLOT", slot, "NODE", name)

    async def flush(self) -> None:
        """Forget every key and every script."""
        for server in self.servers:
            await server.flush()


@contextlib.asynccontextmanager
async def redis_cluster(directory: Path) -> AsyncIterator[Cluster]:
    async with contextlib.AsyncExitStack() as stack:
        one, two, three = [
            await stack.enter_async_context(
                _started(
                    Server(
                        directory,
                        "cluster-enabled yes",
                        f"cluster-port {free_port()}",
                        "cluster-node-timeout 5000",
                    )
                )
            )
            for _ in range(3)
        ]
        shares = ((0, 5460), (5461, 10922), (10923, 16383))
        for number, (server, (first, last)) in enumerate(
            zip((one, two, three), shares, strict=True), start=1
        ):
            await server.ask("CLUSTER", "SET-CONFIG-EPOCH", number)
            await server.ask("CLUSTER", "ADDSLOTSRANGE", first, last)

        async def met() -> bool:
            """Each knows the others? A handshake that fails is forgotten, so they meet again."""
            for server in (one, two, three):
                for other in (one, two, three):
                    bus = await other.ask("CONFIG", "GET", "cluster-port")
                    await server.ask("CLUSTER", "MEET", LOOPBACK, other.port, bus[1])
            await asyncio.sleep(0.5)
            nodes = [await server.ask("CLUSTER", "NODES") for server in (one, two, three)]
            return all(
                text.count(b" connected") == len(shares) and b"handshake" not in text
                for text in nodes
            )

        await until(met)

        async def whole() -> bool:
            for server in (one, two, three):
                state = (await server.ask("CLUSTER", "INFO")).decode()
                if "cluster_state:ok" not in state or "cluster_slots_ok:16384" not in state:
                    return False
                if len(await server.ask("CLUSTER", "SLOTS")) != len(shares):
                    return False
            return True

        await until(whole)
        yield Cluster((one, two, three))


class Cable:
    """A TCP relay to one server that can be cut: then nothing passes, and nobody hears why.

    New connections are taken and left in silence, as with packets that are dropped on their way.
    """

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._towards = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._taken, LOOPBACK, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    async def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.CancelledError, ExceptionGroup):
            await self._relay(reader, writer)  # either end may close at any time

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        try:
            await self._whole.wait()
            back, there = await asyncio.open_connection(LOOPBACK, self._towards)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, there))
                group.create_task(self._pass(back, writer))
        finally:
            for one in (writer, there):
                if one is not None:
                    one.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._whole.wait()
            writer.write(data)
            await writer.drain()
        raise EOFError  # ends the other direction too
