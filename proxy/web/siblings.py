"""What the workers of one supervisor know together: their metrics, and whether all are ready.

They share the admin listener, so whichever accepts a request speaks for all. Each listens on a Unix
socket of its own in a private directory of the supervisor, and is asked there by the others. That
was chosen over prometheus_client's multiprocess mode because most gauges here are read from live
objects at scrape time, which that mode cannot do, and because it is one variable of the environment
for a whole process.

The counts of a worker that has died stay in the sum: each writes down what it last told, and the
next one in its place adds that to what its predecessors have told. Only what a worker has counted
since it was last asked dies with it. A worker that does not answer counts with what it last told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import aiohttp
from aiohttp import web

from proxy.observe.merge import counts_only, merged
from proxy.store.work import finish

#: Seconds that a sibling may take to answer.
PATIENCE = 2.0
#: Seconds until a listener that could not accept tries again.
ACCEPT_PAUSE = 0.1

Own = Callable[[], Awaitable[bytes]]


class Place(Protocol):
    """Which worker this is, ``number`` of ``of``, and their common directory."""

    @property
    def number(self) -> int: ...

    @property
    def of(self) -> int: ...

    @property
    def directory(self) -> Path: ...


class Siblings:
    """One worker and the others, while its block lasts."""

    def __init__(self, place: Place, *, metrics: Own, is_ready: Callable[[], bool]) -> None:
        """``metrics`` gives this process's exposition."""
        self._directory = place.directory
        self._number = place.number
        self._of = place.of
        self._metrics = metrics
        self._is_ready = is_ready
        self._told = place.directory / f"{place.number}.told"
        self._telling = asyncio.Lock()  # else two that ask would write the same file at once
        self._runner: web.AppRunner | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Siblings:
        """Answer the others. Raises ``OSError``."""
        sock = await finish(
            asyncio.get_running_loop().run_in_executor(None, self._inherit), socket.socket.close
        )
        sock.setblocking(False)
        app = web.Application()
        app.add_routes([web.get("/metrics", self._tell), web.get("/readyz", self._ready)])
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        self._listener = sock
        self._accepting = asyncio.create_task(self._accept(sock), name="siblings")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._accepting is not None and self._runner is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            await self._runner.cleanup()
        if self._listener is not None:
            self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        """Not by a server of the loop: it would look at the socket's path, which blocks."""
        loop = asyncio.get_running_loop()
        while self._runner is not None and self._runner.server is not None:
            try:
                sock, _ = await loop.sock_accept(listener)
                await loop.connect_accepted_socket(self._runner.server, sock)
            except OSError:  # no descriptor is left, say
                await asyncio.sleep(ACCEPT_PAUSE)

    async def metrics(self) -> bytes:
        """The exposition of all."""
        found = await asyncio.gather(*(self._told_by(number) for number in range(self._of)))
        texts = [text for texts in found for text in texts]
        return await asyncio.to_thread(merged, texts)

    async def are_ready(self) -> bool:
        """Do all serve?"""
        answers = await asyncio.gather(
            *(self._asked(number, "/readyz") for number in range(self._of))
        )
        return all(answer is not None for answer in answers)

    async def _told_by(self, number: int) -> list[str]:
        """What a worker says, and what is left of those before it."""
        text = await self._asked(number, "/metrics")
        return await asyncio.to_thread(self._with_the_dead, number, text)

    async def _asked(self, number: int, path: str) -> str | None:
        connector = aiohttp.UnixConnector(self._socket(number))
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get(f"http://worker{path}") as answer,
            ):
                return await answer.text() if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def _tell(self, _request: web.Request) -> web.Response:
        async with self._telling:
            text = await self._metrics()
            loop = asyncio.get_running_loop()
            await finish(loop.run_in_executor(None, self._write_down, text.decode()))
        return web.Response(body=text)

    async def _ready(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self._is_ready() else 503)

    def _socket(self, number: int) -> str:
        return str(self._directory / f"{number}.sock")

    # -- in a thread -----------------------------------------------------------------------

    def _inherit(self) -> socket.socket:
        """Take the place of a dead one: what it told last goes to what the earlier ones did.
        Returns a socket where it listened."""
        heirloom = self._directory / f"{self._number}.dead"
        texts = [text for file in (heirloom, self._told) if (text := _text(file)) is not None]
        if texts:
            _replace(heirloom, counts_only(texts))
        with contextlib.suppress(FileNotFoundError):
            self._told.unlink()
        path = self._socket(self._number)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            sock.listen()
        except BaseException:
            sock.close()
            raise
        return sock

    def _write_down(self, text: str) -> None:
        _replace(self._told, counts_only([text]))

    def _with_the_dead(self, number: int, text: str | None) -> list[str]:
        if text is None:
            text = _text(self._directory / f"{number}.told")
        texts = (_text(self._directory / f"{number}.dead"), text)
        return [one for one in texts if one is not None]

    def __repr__(self) -> str:
        return f"<Siblings: {self._number} of {self._of}>"


def _text(file: Path) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def _replace(file: Path, text: bytes) -> None:
    new = file.with_suffix(f"{file.suffix}.new")
    new.write_bytes(text)
    new.replace(file)
