"""The leader of two workers is killed while it fills a blob that streams through the other one.

A part of the scenario `workers`. Which worker a connection is at is asked of the kernel: it goes to
either, by a hash of its addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.board import Board, Measure, Played, Values, count, play_in_turn, seconds
from benchmarks.images import MANIFEST_TYPE
from benchmarks.load import Want
from benchmarks.parts import (
    LOOPBACK,
    MIB,
    TIMES,
    Background,
    PartFailed,
    processes,
    request,
    until,
)
from benchmarks.scenario import Options, Promise, Sheet
from benchmarks.subjects import Front, Place, Subject
from benchmarks.upstreams import FakeUpstream, Tally, fake_registry

#: Connections to the upstream: over one a fill comes in order, over several it does not (D9).
CONNECTIONS = (1, 8)
DIALS = 100  # each goes to the leader by one half
PATIENCE = 60.0  # seconds without a byte
LOOK = 0.01  # seconds between two looks at what the upstream has sent
READ_SIZE = 256 * 1024
#: The part of the blob that the upstream has sent when the leader is killed.
PART = 4


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the blob, and bytes a second of all connections to the upstream together."""

    blob: int
    rate: int


FULL, FAST = Size(128 * MIB, 32 * MIB), Size(16 * MIB, 4 * MIB)

MEASURES = (
    seconds("leads", "leads", ratio=False),
    seconds("goes_on", "goes on", ratio=False),
    seconds("whole", "whole", ratio=False),
    Measure("upstream", "upstream / blob bytes", TIMES, ratio=False),
    count("refused", "beyond the limit"),
    count("failed", "failed"),
)


#: How many lines about what the log has when another worker leads and both serve again.
AWAITED = {"leads": 2, "serving": 3, "fill_taken_over": 1}


@dataclass(frozen=True, slots=True)
class Log:
    """The log of a service, in JSON. Its moments, like all here, are those of the wall clock, which
    is the only one that a log tells."""

    path: Path

    def about(self, event: str) -> list[Mapping[str, Any]]:
        """The lines about it that are complete."""
        lines = self.path.read_text(errors="replace").split("\n")[:-1]
        found = (json.loads(line) for line in lines if line.startswith("{"))
        return [line for line in found if line["event"] == event]

    def moment(self, event: str) -> float:
        """When it was there as often as is awaited."""
        text = self.about(event)[AWAITED[event] - 1]["timestamp"]
        return datetime.fromisoformat(text).timestamp()

    @property
    def is_whole(self) -> bool:
        return all(len(self.about(event)) >= number for event, number in AWAITED.items())


@dataclass(slots=True)
class Death(Background):
    """Kills the leader once the upstream has sent so many bytes while its block lasts."""

    leader: int
    upstream: FakeUpstream
    enough: int
    moment: float | None = None

    def _work(self) -> None:
        while self.upstream.tally().size < self.enough:
            if self._end.wait(LOOK):
                return
        self.moment = time.time()
        os.kill(self.leader, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a client got, and after each read the moment and the bytes that it had by then."""

    digest: str
    progress: Sequence[tuple[float, int]]

    @property
    def size(self) -> int:
        return self.progress[-1][1] if self.progress else 0

    def had_by(self, moment: float) -> int:
        """Bytes by then."""
        return max((had for when, had in self.progress if when <= moment), default=0)

    def had_more_than(self, size: int) -> float:
        """The moment at which it had. Raises StopIteration when it never did."""
        return next(when for when, had in self.progress if had > size)


def pull(connection: http.client.HTTPConnection, path: str) -> Pulled:
    """Pulls until no more comes: an end that is too early or a break shows in size and digest."""
    hasher, progress, size = hashlib.sha256(), [], 0
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path, headers={"Accept": "*/*"})
        answer = connection.getresponse()
        while data := answer.read1(READ_SIZE):
            size += len(data)
            hasher.update(data)
            progress.append((time.time(), size))
    return Pulled(f"sha256:{hasher.hexdigest()}", progress)


def holder(connection: http.client.HTTPConnection, pid: int) -> int | None:
    """Which process of a tree has accepted a connection; None when nobody has yet."""
    ours, theirs = connection.sock.getsockname()[1], connection.sock.getpeername()[1]
    ends = b":%04X" % theirs, b":%04X" % ours
    for line in Path("/proc/net/tcp").read_bytes().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(ends[0]) and fields[2].endswith(ends[1]):
            link = f"socket:[{fields[9].decode()}]"
            return next((each for each in processes(pid) if link in _open_files(each)), None)
    return None


def _open_files(pid: int) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield str(entry.readlink())


@contextlib.contextmanager
def connected(front: Front, leader: int) -> Iterator[http.client.HTTPConnection]:
    """A connection that a worker has accepted that does not lead. Raises PartFailed, OSError."""
    assert front.part is not None
    for _ in range(DIALS):
        connection = http.client.HTTPConnection(LOOPBACK, front.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/v2/")
            connection.getresponse().read()
            if connection.sock and holder(connection, front.part.pid) not in (None, leader):
                yield connection
                return
    raise PartFailed(f"none of {DIALS} connections went to a worker that follows")


def layer(port: int, image: Want) -> Want:
    """The layer of an image, whose manifest the service has then."""
    body = request(port, image.path, headers={"Accept": MANIFEST_TYPE}).body
    (found,) = json.loads(body)["layers"]
    return Want("blob", image.repository, found["digest"], found["digest"], found["size"])


def play_subject(subject: Subject, directory: Path, upstream: FakeUpstream, cap: int) -> Played:
    """Kills the leader once. Raises PartFailed."""
    with subject.start(Place(upstream.port, cap, directory, access_log=True)) as front:
        assert front.part is not None
        want = layer(front.port, upstream.pulls[0])
        leader = int((directory / "cache" / "LOCK").read_text())
        upstream.settle()
        upstream.begin()
        with (
            connected(front, leader) as connection,
            Death(leader, upstream, want.size // PART) as death,
        ):
            pulled = pull(connection, want.path)
        front.part.check()
        if death.moment is None:
            raise PartFailed(f"{pulled.size} bytes came, and the leader was never killed")
        if (pulled.size, pulled.digest) != (want.size, want.digest):
            return Played({"failed": 1}, front.configuration)
        log = Log(front.part.output)
        until(lambda: log.is_whole, "another leader, and a worker in place of the dead one")
        upstream.settle()
        values = figures_of(death.moment, log, pulled, upstream.tally())
        return Played(values, front.configuration)


def figures_of(killed: float, log: Log, pulled: Pulled, tally: Tally) -> Values:
    """The numbers of a round in which everything came."""
    (taken,) = log.about("fill_taken_over")
    # What the dead one had published may still have been on its way, and be more than what counts.
    old = max(taken["at"], pulled.had_by(log.moment("fill_taken_over")))
    return {
        "leads": log.moment("leads") - killed,
        "goes_on": pulled.had_more_than(old) - killed,
        "whole": log.moment("serving") - killed,
        "upstream": tally.size / pulled.size,
        "refused": tally.refused,
        "failed": 0,
    }


@dataclass(frozen=True, slots=True)
class Scene:
    """All rounds before an upstream that allows so many connections, and how it was set up."""

    cap: int
    size: Size
    board: Board
    upstream: str


def play(subject: Subject, options: Options) -> list[Scene]:
    """Kills the leader in each round; nothing when the subject is not to be measured.

    Raises PartFailed.
    """
    if options.only and subject.name not in options.only:
        return []
    size = FAST if options.fast else FULL
    return [_play(subject, options, size, cap) for cap in CONNECTIONS]


def _play(subject: Subject, options: Options, size: Size, cap: int) -> Scene:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        fake_registry(
            Path(name),
            images=1,
            layers=1,
            layer_size=size.blob,
            limit=cap,
            rate=size.rate // cap,
        ) as upstream,
    ):
        board = play_in_turn(
            f"takeover ({cap})",
            (subject,),
            options,
            lambda each, directory: play_subject(each, directory, upstream, cap),
        )
    return Scene(cap, size, board, upstream.configuration)


def sheet(scene: Scene) -> Sheet:
    size, cap = scene.size, scene.cap
    return scene.board.sheet(
        f"workers: the leader killed at 1/{PART} of {size.blob / MIB:g} MiB, cap {cap},"
        f" {size.rate / cap / MIB:g} MiB/s for each connection",
        MEASURES,
    )


def promises(scene: Scene) -> Iterator[Promise]:
    """Another one leads soon and goes on, and the client never knows; in the worst round.

    Of a blob that came in several parts at once only what has no gap before it counts for the next
    leader, so how much comes again depends on where its parts stood: that is shown, not promised.
    """
    leads, goes_on, _, upstream, refused, failed = MEASURES
    in_order = [(upstream, "bytes of the upstream", 1.1)] if scene.cap == 1 else []
    for measure, what, most in (
        (leads, "a killed leader is replaced", 2.0),
        (goes_on, "what it filled goes on", 2.0),
        *in_order,
        (refused, "requests beyond the upstream's limit", 0),
        (failed, "pulls that failed", 0),
    ):
        yield from scene.board.bound(measure, f"takeover, cap {scene.cap}: {what}", most)
