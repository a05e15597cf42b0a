"""One connection to one Redis server, and what is known of the server at its other end.

redis-py brings the protocol, the handshake and TLS. Its pools, its retries and its ideas of a
Cluster or a Sentinel stay unused: who asks again, and when, is decided in one place here
(``directory.py``), and which process answers has to be known of each connection.

A connection is used by one call at a time. It ends at once (``abort``): a server that is paused
answers no polite goodbye either, least of all that of TLS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError

from proxy.fleet.place import Address

#: The oldest server that is spoken to: scripts read keys that they make themselves, and ask INFO
#: for two sections at once.
MIN_VERSION = (7, 0)


@dataclass(frozen=True, slots=True)
class Login:
    """The ACL user (empty: the default one) and the password that a server wants."""

    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"Login({self.username!r})"


async def nobody() -> Login | None:
    """Whom to log in as where no user is asked for."""
    return None


@dataclass(frozen=True, slots=True)
class Access:
    """How servers are reached. ``login`` is asked before every connection, so that a password may
    change; so are the PEM files read. Sentinels have users of their own: ``sentinel_login``. Times
    are in seconds."""

    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    login: Callable[[], Awaitable[Login | None]] = nobody
    sentinel_login: Callable[[], Awaitable[Login | None]] = nobody
    client_name: str = "pullpool"
    connect_timeout: float = 2.0
    answer_timeout: float = 2.0

    def __repr__(self) -> str:
        return f"<Access {'with' if self.tls else 'without'} TLS>"


class Link:
    """A connection that is made. ``run_id`` is the id of the process at its other end."""

    def __init__(self, address: Address, connection: Connection, transport: Any) -> None:
        self.address = address
        self.run_id = ""
        self.is_primary = False
        self.idle_since = 0.0
        self._connection = connection
        self._transport = transport

    def __repr__(self) -> str:
        state = "open" if self._connection.is_connected else "closed"
        return f"<Link {self.address} {state} run_id={self.run_id[:8]}>"

    @classmethod
    async def open(cls, address: Address, access: Access, *, database: int = 0) -> Link:
        """Dial and log in. Raises RedisError or OSError."""
        login = await access.login()
        transports: list[asyncio.WriteTransport] = []

        async def handshake(connection: Connection) -> None:
            assert connection._writer is not None
            transports.append(connection._writer.transport)
            try:
                await connection.on_connect()
            except BaseException:
                transports[0].abort()
                raise

        connection = _connection(address, access, login, database, handshake)
        if isinstance(connection, SSLConnection):
            await asyncio.to_thread(connection.ssl_context.get)  # reads the PEM files
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis has it so
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return cls(address, connection, transports[0])

    async def inspect(self) -> None:
        """Learn who answers. Raises RedisError when it is too old."""
        text = (await self.call("INFO", "server", "replication")).decode(errors="replace")
        pairs = (line.partition(":") for line in text.splitlines())
        found = {name: value.strip() for name, _, value in pairs}
        version = found.get("redis_version", "")
        if _version(version) < MIN_VERSION:
            raise ConnectionLost(
                f"{self.address} is version {version or 'unknown'}:"
                f" the directory needs Redis or Valkey {'.'.join(map(str, MIN_VERSION))} or newer"
            )
        self.run_id = found.get("run_id", "")
        self.is_primary = found.get("role") == "master"

    async def call(self, *words: str | bytes | int | float, patience: float | None = None) -> Any:
        """Say one command and return the answer; ``patience``: seconds that it may take from here
        on, if not as long as before.

        Raises ResponseError for what the server refuses; any other error, a cancellation too, has
        closed the connection.
        """
        if patience is not None:  # an argument of read_response would make a late answer None
            self._connection.socket_timeout = patience
        try:
            await self._connection.send_command(*words)
            return await self._connection.read_response()
        except (OSError, EOFError) as error:
            raise ConnectionLost(str(error)) from error

    async def is_stale(self) -> bool:
        """Has it been closed from the other side, or is there an answer that nobody asked for?"""
        if not self._connection.is_connected or self._transport.is_closing():
            return True
        try:
            return bool(await self._connection.can_read())
        except (RedisError, OSError):
            return True

    async def close(self) -> None:
        self._transport.abort()
        await self._connection.disconnect(nowait=True)


def _connection(
    address: Address,
    access: Access,
    login: Login | None,
    database: int,
    handshake: Callable[[Connection], Awaitable[None]],
) -> Connection:
    arguments: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "db": database,
        "protocol": 2,
        "client_name": access.client_name,
        "driver_info": None,
        "socket_connect_timeout": access.connect_timeout,
        "socket_timeout": access.answer_timeout,
        "redis_connect_func": handshake,
    }
    if login is not None:
        arguments |= {"username": login.username or None, "password": login.password or None}
    if not access.tls:
        return Connection(**arguments)
    for name, file in (
        ("ssl_ca_certs", access.ca_file),
        ("ssl_certfile", access.cert_file),
        ("ssl_keyfile", access.key_file),
    ):
        arguments[name] = None if file is None else str(file)
    return SSLConnection(**arguments)


def _version(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)
