"""The bench's parts: processes with their own ports and directories, HTTP probes, kernel counters.

Every scenario starts what it measures itself and ends it by process id, so that a run leaves
nothing behind and two runs on one machine do not meet. Nothing here knows what is being compared.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import platform
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Self

KIB = 1024
MIB = 1024 * 1024
TIMES = "\N{MULTIPLICATION SIGN}"
PROJECT = Path(__file__).resolve().parents[1]
LOOPBACK = "127.0.0.1"
# Each process takes ports of a block of its own, unless another's id is a multiple of 60 away.
FIRST_PORT, PORT_BLOCKS, PORT_BLOCK = 20_000, 60, 200
_port_turns = itertools.count(random.SystemRandom().randrange(PORT_BLOCK))
PRIMED_BYTES = 700 * MIB
QUIET_LOOKS, QUIET_STEP = 3, 0.1  # seconds
IDLE_CPU = 0.02  # CPU seconds in one step that a program may take that has nothing to do
# States of /proc/net/tcp (include/net/tcp_states.h) in which our side still holds the socket:
# established, being dialled, and closed by the other side only.
OPEN_STATES = frozenset({b"01", b"02", b"08"})


class PartFailed(Exception):
    """A part did not start, or went away while it was needed; carries the end of its output."""


def shown(text: str, directory: Path) -> str:
    """A configuration as a reader wants it: without the places of this run."""
    return text.replace(str(directory), "DIRECTORY").replace(sys.executable, "python").strip()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on.

    Taken from below the range that the kernel hands to outgoing connections, so that none of those
    can slip in between this answer and the listener that was asked for; nor can one whose port is
    chosen here too, before this or in another process, and is not bound yet.
    """
    start = FIRST_PORT + os.getpid() % PORT_BLOCKS * PORT_BLOCK
    while True:
        port = start + next(_port_turns) % PORT_BLOCK
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


def is_listening(port: int) -> bool:
    """Does anybody take connections on this port of the loopback interface?"""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


@dataclass(slots=True)
class Part:
    """A running program: its name, its process and the file that takes its output."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def check(self) -> None:
        """Raises PartFailed when the program has ended."""
        if not self.is_running:
            raise PartFailed(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        return self.output.read_text(errors="replace")[-2000:]

    def stop(self, patience: float = 15.0) -> None:
        """Asks it to end; after `patience` seconds insists, children included (its own session)."""
        if self.is_running:
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _import_path() -> dict[str, str]:
    """Has `python -m` find the packages of this tree, unless PYTHONPATH names others before."""
    path = filter(None, (os.environ.get("PYTHONPATH", ""), str(PROJECT)))
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Part]:
    """Runs `command` with its output in `directory` until the block ends."""
    output = directory / f"{name}.out"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_import_path(), **(environment or {})},
            cwd=PROJECT,
            start_new_session=True,
        )
    part = Part(name, process, output)
    try:
        yield part
    finally:
        part.stop()


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a certificate for 127.0.0.1 that nobody vouches for, and of its key."""

    cert: Path
    key: Path


def make_certificate(directory: Path) -> Certificate:
    """Makes one by openssl, of a kind that authorities give out. Raises PartFailed."""
    made = Certificate(directory / "cert.pem", directory / "key.pem")
    command = (
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{LOOPBACK}"),
        *("-keyout", str(made.key), "-out", str(made.cert)),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PartFailed(f"openssl made no certificate:\n{done.stderr}")
    return made


def trusting() -> ssl.SSLContext:
    """A client's context that takes any certificate: what is measured here is on this machine."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: status, headers with lower-case names, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def request(
    port: int,
    path: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    tls: bool = False,
) -> Reply:
    """One HTTP exchange with 127.0.0.1:`port` on a connection of its own. Raises OSError."""
    connection = (
        http.client.HTTPSConnection(LOOPBACK, port, timeout=60, context=trusting())
        if tls
        else http.client.HTTPConnection(LOOPBACK, port, timeout=60)
    )
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, names, answer.read())
    except http.client.HTTPException as error:
        raise OSError(f"{method} {path}: {error!r}") from error
    finally:
        connection.close()


def until(condition: Callable[[], bool], what: str, *, patience: float = 60.0) -> None:
    """Polls every 20 ms until `condition` holds; raises PartFailed after `patience` seconds."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise PartFailed(f"still waiting for {what} after {patience:.0f} s")
        time.sleep(0.02)


def await_http(
    part: Part, port: int, path: str, *, ready: Callable[[int], bool], tls: bool = False
) -> None:
    """Waits until `path` on `port` answers with a status that `ready` accepts."""

    def has_settled() -> bool:
        try:
            return not part.is_running or ready(request(port, path, tls=tls).status)
        except OSError:
            return False

    try:
        until(has_settled, f"{part.name} to answer {path}")
    except PartFailed as error:
        raise PartFailed(f"{error}\n{part.tail()}") from error
    part.check()


def processes(pid: int) -> list[int]:
    """A process and all its descendants; none when it is gone."""
    found = [pid]
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return []
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (thread / "children").read_text().split():
                found += processes(int(child))
    return found


def resident_bytes(pid: int) -> int:
    """VmRSS of a process and all its descendants, in bytes (shared pages count once for each)."""
    return sum(map(_resident, processes(pid)))


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its descendants so far, those it has waited for included.

    In ticks of the kernel, usually 10 ms, whose sum is the scheduler's own exact one.
    """
    return sum(map(_ticks, processes(pid))) / os.sysconf("SC_CLK_TCK")


def settled(part: Part) -> float:
    """Waits until a program does nothing any more; its CPU seconds by then. Raises PartFailed."""
    before, quiet = cpu_seconds(part.pid), 0
    while quiet < QUIET_LOOKS:
        time.sleep(QUIET_STEP)
        part.check()
        now = cpu_seconds(part.pid)
        quiet = quiet + 1 if now - before <= IDLE_CPU else 0
        before = now
    return before


def _ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The name, in brackets, may hold anything; utime, stime, cutime and cstime are fields 14 to 17.
    return sum(map(int, stat.rpartition(")")[2].split()[11:15]))


def open_sockets(table: bytes, port: int) -> int:
    """Sockets of a /proc/net/tcp table that lead to `port`, not yet closed by whoever dialled."""
    wanted = b":%04X" % port
    count = 0
    for line in table.splitlines()[1:]:
        fields = line.split(None, 4)
        count += fields[2].endswith(wanted) and fields[3] in OPEN_STATES
    return count


@dataclass(slots=True, kw_only=True)
class Background:
    """Works in a thread of its own while its block lasts; ``_end`` says that it is over."""

    _end: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._work, name=type(self).__name__)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        raise NotImplementedError


@dataclass(slots=True)
class SocketSampler(Background):
    """Watches how many sockets lead to a port, from a thread of its own, while its block runs.

    One look costs about 5 ms of a core (the kernel walks its whole connection hash), so rounds that
    are timed look seldom and a round that is not looks all the time.
    """

    port: int
    interval: float
    peak: int = 0
    looks: int = 0

    def _work(self) -> None:
        table = Path("/proc/net/tcp")
        while not self._end.wait(self.interval):
            self.peak = max(self.peak, open_sockets(table.read_bytes(), self.port))
            self.looks += 1


def prime_pages(directory: Path, size: int = PRIMED_BYTES) -> None:
    """Writes `size` bytes and unlinks them.

    A virtual machine hands free pages back to its host; whoever touches them first pays several
    times the price of the write. Done before every round, so that nobody's round pays it.
    """
    chunk = os.urandom(MIB) * 4
    path = directory / f"primer-{time.monotonic_ns()}"  # truncating an old one takes time, too
    with path.open("xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        for _ in range(size // len(chunk)):
            file.write(chunk)
    path.unlink()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that the blocks that stop processes run to their end."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_line(command: Sequence[str]) -> str:
    """The first line that a program says, on either stream; "-" when it is not installed."""
    if shutil.which(command[0]) is None:
        return "-"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    return said[0] if said else "-"


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def environment() -> dict[str, str]:
    """What a figure needs beside it to mean anything: machine, versions, date, load before."""
    nginx = _first_line(["nginx", "-v"])
    registry = _first_line(["docker-registry", "--version"])
    varnish = _first_line(["varnishd", "-V"])
    containerd = _first_line(["containerd", "--version"]).removeprefix("containerd ")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": f"{os.cpu_count()} {TIMES} {_processor()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pullpool": _package("pullpool"),
        "aiohttp": _package("aiohttp"),
        "uvloop": _package("uvloop"),
        "nginx": nginx.rpartition("/")[2],
        "docker-registry": registry.split()[-1],
        "varnish": varnish.removeprefix("varnishd (varnish-").partition(" ")[0],
        "containerd": containerd.partition(" ")[2].partition(" ")[0] or "-",
        "wrk": _first_line(["wrk", "-v"]).removeprefix("wrk ").partition(" ")[0],
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
    }
