"""Many pullpools, each in a network and with a line of its own: what the fleet is measured by.

The upstream is the bundled registry on a line that carries as much as one node's; each node's own
client runs in the node's net, where nothing is shaped. Whoever measures sees all of them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from benchmarks.load import Plan, Report, Want
from benchmarks.nets import Net, Network
from benchmarks.parts import LOOPBACK, PROJECT, Part, PartFailed, running, until
from benchmarks.setups import fill

PORT, ADMIN, PEER = 5050, 5051, 5052
UPSTREAM_BYTES = "pullpool_upstream_bytes_total{"
SECRET = "the benchmark's own secret of the fleet"
#: Of what a line carries, what is left beside the heads of packets: who runs a node sets its uplink
#: to no more, or bulk queues up before everything else.
PAYLOAD = 0.95


def ask(url: str, *, post: bool = False) -> Any:
    """A question to a part in its net; the JSON of its answer. Raises OSError."""
    with urlopen(url, b"" if post else None, timeout=30) as answer:
        said = answer.read()
    return json.loads(said) if said.startswith((b"{", b"[")) else None


@dataclass(frozen=True, slots=True)
class Registry:
    """The upstream: where it is, what a client of its one image wants, bytes of all of it."""

    net: Net
    want: Want
    other: Want  # of an image that nobody measures
    size: int
    control: str

    @property
    def url(self) -> str:
        return f"http://{self.net.address}:{PORT}"

    def begin(self) -> None:
        ask(f"{self.control}/_reset", post=True)

    def counted(self) -> dict[str, Any]:
        found: dict[str, Any] = ask(f"{self.control}/_counters")
        return found


@contextlib.contextmanager
def registry(
    net: Net, directory: Path, *, layers: int, layer_size: int, limit: int
) -> Iterator[Registry]:
    """The bundled registry with one image; allows `limit` sockets. Raises PartFailed."""
    command = (
        *(sys.executable, "-m", "proxy.testing", "registry", "--host", net.address),
        *("--port", str(PORT), f"--limit={limit}"),
        *("--images=2", f"--layers={layers}", f"--layer-size={layer_size}"),
    )
    with running("upstream", net.inside(command), directory) as part:
        said = announced(part)
        image, other = said["images"]
        size = image["size"] + sum(blob["size"] for blob in image["blobs"])
        yield Registry(net, _want(image), _want(other), size, said["control"])


def _want(image: Mapping[str, Any]) -> Want:
    return Want("manifest", image["name"], image["tag"], image["digest"], image["size"])


def announced(part: Part) -> dict[str, Any]:
    """The line of JSON that the registry writes when it listens."""

    def line() -> str:
        lines = part.output.read_text().split("\n")[:-1]
        return next((one for one in lines if one.startswith("{")), "")

    def has_spoken() -> bool:
        part.check()
        return bool(line())

    until(has_spoken, "the bundled registry")
    said: dict[str, Any] = json.loads(line())
    return said


@dataclass(slots=True)
class Node:
    """A pullpool in its net."""

    number: int
    net: Net
    part: Part
    killed: bool = False

    def kill(self) -> None:
        """Ends it at once, as a machine that loses its power does."""
        self.killed = True
        self.part.process.kill()
        self.part.process.wait()

    @property
    def is_ready(self) -> bool:
        try:
            ask(f"http://{self.net.address}:{ADMIN}/readyz")
        except OSError:
            return False
        return True

    @property
    def of_upstream(self) -> float:
        """Bytes that it has from the upstream."""
        with urlopen(f"http://{self.net.address}:{ADMIN}/metrics", timeout=30) as answer:
            rows = answer.read().decode().splitlines()
        return sum(float(row.split()[-1]) for row in rows if row.startswith(UPSTREAM_BYTES))

    def wake(self, other: Want) -> None:
        """Pulls a manifest that nobody measures: a new directory grants nothing at first."""
        until(lambda: self._has(other.path), f"a pull through node {self.number}")

    def _has(self, path: str) -> bool:
        try:
            ask(f"http://{self.net.address}:{PORT}{path}")
        except OSError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Line:
    """How a node is connected: bytes a second each way, the cap on its upstream, whom it takes for
    the upstream (a URL), and the fleet's directory (a URL, "": no fleet)."""

    rate: int
    cap: int
    upstream: str
    directory: str = ""


@contextlib.contextmanager
def node(number: int, net: Net, line: Line, directory: Path) -> Iterator[Node]:
    """Starts one; it is not ready yet."""
    own = directory / f"node-{number}"
    own.mkdir(parents=True)
    fleet = ""
    if line.directory:
        fleet = fill(
            "fleet.toml",
            directory=line.directory,
            address=net.address,
            port=PEER,
            node=f"node-{number}",
            secret=SECRET,
            rate=int(PAYLOAD * line.rate),
        )
    text = fill(
        "node.toml",
        port=PORT,
        admin=f"{net.address}:{ADMIN}",
        cache=own / "cache",
        upstream=line.upstream,
        cap=line.cap,
        fleet=fleet,
    )
    config = own / "pullpool.toml"
    config.write_text(text)
    command = (sys.executable, "-m", "proxy", "serve", "--config", str(config))
    with running("pullpool", net.inside(command), own) as part:
        yield Node(number, net, part)


@contextlib.contextmanager
def nodes(nets: Sequence[Net], lines: Sequence[Line], directory: Path) -> Iterator[Sequence[Node]]:
    """All of them, ready. Raises PartFailed."""
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(node(number, net, line, directory))
            for number, (net, line) in enumerate(zip(nets, lines, strict=True))
        ]
        for each in found:
            until(lambda each=each: each.is_ready, f"node {each.number}", patience=300)  # type: ignore[misc]  # a default binds it
        yield found


@dataclass(slots=True)
class Client:
    """One node's client: `benchmarks.load` in the node's net."""

    node: Node
    process: subprocess.Popen[str]
    began: float = 0.0
    _thread: threading.Thread | None = field(default=None, init=False)
    _said: str = field(default="", init=False)

    def go(self) -> None:
        assert self.process.stdin is not None
        self.began = time.monotonic()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self._thread = threading.Thread(target=self._listen, name=f"client {self.node.number}")
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self._said = self.process.stdout.read()

    def wait(self) -> Report:
        assert self._thread is not None
        self._thread.join()
        self.process.wait()
        if not self._said:
            raise PartFailed(f"the client of node {self.node.number} said nothing")
        return Report.load(self._said)


@contextlib.contextmanager
def clients(found: Sequence[Node], want: Want) -> Iterator[Sequence[Client]]:
    """A client for each node, ready to go; each hashes what it gets. Raises PartFailed."""
    plan = Plan(LOOPBACK, PORT, (want,), verify=True).dump()
    with contextlib.ExitStack() as stack:
        made = []
        for each in found:
            process = subprocess.Popen(
                each.net.inside((sys.executable, "-m", "benchmarks.load")),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=PROJECT,
            )
            stack.callback(_end, process)
            assert process.stdin is not None
            process.stdin.write(plan + "\n")
            process.stdin.flush()
            made.append(Client(each, process))
        for client in made:
            assert client.process.stdout is not None
            if client.process.stdout.readline() != "ready\n":
                raise PartFailed(f"the client of node {client.node.number} did not start")
        yield made


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


@contextlib.contextmanager
def redis(network: Network, directory: Path) -> Iterator[Net]:
    """The fleet's directory, on a line without a limit. Raises PartFailed."""
    net = network.join(None)
    command = (
        *("redis-server", "--bind", net.address, "--port", "6379", "--save", ""),
        *("--appendonly", "no", "--protected-mode", "no", "--dir", str(directory)),
    )
    with running("redis", net.inside(command), directory) as part:
        until(lambda: _answers(net), "redis-server to answer")
        part.check()
        yield net


def _answers(net: Net) -> bool:
    done = subprocess.run(
        ("redis-cli", "-h", net.address, "ping"), capture_output=True, text=True, check=False
    )
    return done.stdout.strip() == "PONG"


def operations(net: Net) -> int:
    """Commands that the directory has processed so far, those inside scripts left out."""
    done = subprocess.run(
        ("redis-cli", "-h", net.address, "info", "commandstats"),
        capture_output=True,
        text=True,
        check=True,
    )
    calls = 0
    for row in done.stdout.splitlines():
        if row.startswith(("cmdstat_evalsha:", "cmdstat_eval:")):
            calls += int(row.partition("calls=")[2].partition(",")[0])
    return calls
