"""Many connections that stay, in a process of its own: idle ones, and readers that hardly read.

`python -m benchmarks.holding` reads one line of JSON (an `Errand`) from standard input, opens the
connections, says what became of them as one line of JSON, and holds them until its input ends. A
reader takes 4 KiB a second through a small receive buffer, so that what waits for it waits in the
server and in the server's half of the kernel.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.parts import LOOPBACK, PROJECT, PartFailed, trusting

RECEIVE_BUFFER = 16 * 1024
SIP = 4096
PATIENCE = 60.0  # seconds for one answer's head


@dataclass(frozen=True, slots=True)
class Errand:
    """So many connections to 127.0.0.1:`port`, each asking for `path` once.

    `whole`: the answer is read to its end and the connection stays idle; else it is read slowly.
    """

    port: int
    path: str
    connections: int
    whole: bool
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """Connections that got a 200, and the others."""

    open: int
    refused: int


@contextlib.contextmanager
def holding(errand: Errand) -> Iterator[Held]:
    """Holds the connections while the block runs. Raises PartFailed."""
    with subprocess.Popen(
        (sys.executable, "-m", "benchmarks.holding"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(errand)) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
            if not said:
                raise PartFailed("the process that holds connections went away")
            yield Held(**json.loads(said))
        except BaseException:
            process.kill()
            raise
        process.stdin.close()


def dial(errand: Errand, number: int, context: ssl.SSLContext | None) -> socket.socket:
    """One connection that has sent its request. Raises OSError."""
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.settimeout(PATIENCE)
        sock.bind((f"127.3.{number // 250}.{1 + number % 250}", 0))
        sock.connect((LOOPBACK, errand.port))
        if context is not None:
            sock = context.wrap_socket(sock)
        host = f"{LOOPBACK}:{errand.port}"
        sock.sendall(f"GET {errand.path} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n\r\n".encode())
    except BaseException:
        sock.close()
        raise
    return sock


def is_served(sock: socket.socket, *, whole: bool) -> bool:
    """Reads an answer's head, and the rest where the whole is wanted. Raises OSError."""
    said = b""
    while b"\r\n\r\n" not in said:
        data = sock.recv(1024)
        if not data:
            return False
        said += data
    head, _, rest = said.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return False
    if whole:
        lines = (line.lower().split(b":") for line in head.split(b"\r\n")[1:])
        length = next((int(line[1]) for line in lines if line[0] == b"content-length"), 0)
        while len(rest) < length and (data := sock.recv(4096)):
            rest += data
    return True


def open_all(errand: Errand) -> tuple[list[socket.socket], Held]:
    """All connections that are served: first all requests, then all answers."""
    context = trusting() if errand.tls else None
    dialled, served = [], []
    for number in range(errand.connections):
        with contextlib.suppress(OSError):
            dialled.append(dial(errand, number, context))
    for sock in dialled:
        try:
            is_open = is_served(sock, whole=errand.whole)
        except OSError:
            is_open = False
        if is_open:
            served.append(sock)
        else:
            sock.close()
    return served, Held(len(served), errand.connections - len(served))


def sip(sock: socket.socket) -> None:
    """A little of what is there, if anything is."""
    with contextlib.suppress(OSError):  # nothing there, for TLS as well; or closed: seen elsewhere
        sock.recv(SIP)


def main() -> None:
    """Speaks with the process that started it over standard input and output."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    errand = Errand(**json.loads(sys.stdin.readline()))
    served, held = open_all(errand)
    for sock in served:
        sock.setblocking(False)
    print(json.dumps(asdict(held)), flush=True)
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        if not errand.whole:
            for sock in served:
                sip(sock)


if __name__ == "__main__":
    main()
