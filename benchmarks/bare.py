"""How little a hit can cost on this loop: `python -m benchmarks.bare PORT UPSTREAM_PORT LOG N`.

Whatever it is asked for it fetches once from the upstream. Then all requests get that: uvloop and
aiofastnet call a protocol, which writes prepared bytes and notes a line as long as pullpool's. It
parses nothing, asks nothing, counts nothing; only the request's id and the time are new in each
answer and line. So what it takes is the loop's and the kernel's, and what pullpool takes beyond it
is pullpool's. Not a cache: a gauge for one. N processes serve, each with a listening socket of its
own, as the workers of pullpool have; so it shows as well what a second process of this loop costs.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import TextIO, cast

import aiofastnet
import uvloop

from benchmarks.parts import LOOPBACK
from benchmarks.parts import request as ask

_LINE = (
    '{"request_id": "', '", "client": "127.0.0.1", "method": "GET", "path": "%s", "status": 200, '
    '"bytes": %d, "cache": "hit", "ms": 0.0, "agent": "-", "first_byte_ms": 0.0, '
    '"upstream": "registry.example.com", "repository": "bench/manifests", "queue_ms": 0.0, '
    '"event": "request", "level": "info", "timestamp": "%s.', 'Z"}\n',
)  # fmt: skip


class Answer:
    """What everybody gets: the pieces of the answer and of its line around what is new in each."""

    def __init__(self, upstream: int, request: bytes) -> None:
        path = request.split(b" ", 2)[1].decode()
        got = ask(upstream, path)
        body, digest = got.body, got.headers["docker-content-digest"]
        headers = (
            "HTTP/1.1 200 OK",
            "Docker-Distribution-Api-Version: registry/2.0",
            "Server: bare",
            "X-Request-Id: @",
            "X-Pullpool-Cache: hit",
            "Server-Timing: queue;dur=0.0, upstream;dur=0.0",
            f"Docker-Content-Digest: {digest}",
            f'ETag: "{digest}"',
            f"Content-Type: {got.headers['content-type']}",
            f"Content-Length: {len(body)}",
            f"Date: {formatdate(usegmt=True)}",
        )
        head = "\r\n".join((*headers, "", "")).encode()
        before, _, after = head.partition(b"@")
        self.pieces = before, after + body
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        self.line = _LINE[0], _LINE[1] % (path, len(body), stamp), _LINE[2]


class Bare(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._write: Callable[[bytes], None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write

    def data_received(self, data: bytes) -> None:
        self._server.answer(data, self._write)


class Server:
    """All connections, their answer and the log."""

    def __init__(self, upstream: int, log: TextIO) -> None:
        self._upstream = upstream
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._answer: Answer | None = None
        self._number = time.time_ns()
        self._lines: list[str] = []

    def answer(self, data: bytes, write: Callable[[bytes], None]) -> None:
        if self._answer is None:
            self._answer = Answer(self._upstream, data)
        if not self._lines:
            self._loop.call_soon(self._flush)
        self._number += 1
        name = f"{self._number:016x}"
        before, after = self._answer.pieces
        write(b"".join((before, name.encode(), after)))
        start, middle, end = self._answer.line
        self._lines.append(f"{start}{name}{middle}{time.time_ns() % 1_000_000:06d}{end}")

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        self._log.write("".join(lines))
        self._log.flush()


def listening(port: int, number: int) -> list[socket.socket]:
    """Sockets of one port, among which the kernel spreads the connections."""
    made = [socket.socket() for _ in range(number)]
    for each in made:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.bind((LOOPBACK, port))
    for each in made:
        each.listen(4096)
    return made


async def serve(own: socket.socket, upstream: int, log: Path, parent: int) -> None:
    """Until it is ended, or the process does that has the other end of this pipe."""
    with log.open("a") as out:
        bare = Server(upstream, out)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Bare(bare), sock=own)
        loop.add_reader(parent, os._exit, 0)  # its lines are written by then
        await server.serve_forever()


def main(port: int, upstream: int, log: Path, processes: int) -> None:
    """Serves in so many processes; the first is this one."""
    sockets = listening(port, processes)
    parent, child = os.pipe()
    own = sockets[0]
    for other in sockets[1:]:
        if os.fork() == 0:
            os.close(child)
            own = other
            break
    for other in sockets:
        if other is not own:
            other.close()
    factory = aiofastnet.loop_factory(uvloop.new_event_loop)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(own, upstream, log, parent))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
