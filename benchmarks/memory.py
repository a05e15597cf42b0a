"""What it takes to serve many who hardly read: memory a reader, a connection, and for a huge blob.

`python -m benchmarks memory` holds, one after another: 5,000 slow readers of one blob, 500 of them
over TLS, and 10,000 connections that do nothing after a first request. Then pullpool alone carries
a blob of 20 GiB through a cache that may hold 2 GiB, from the bundled registry, which makes the
bytes as it sends them. Memory is RSS of all processes of the subject; the kernel's part is what
/proc/net/sockstat says of the whole machine, the clients' small buffers included.
"""

from __future__ import annotations

import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import carried
from benchmarks.board import Board, Played, count, kibibytes, mebibytes, play_in_turn
from benchmarks.holding import Errand, holding
from benchmarks.load import Want
from benchmarks.parts import KIB, MIB, Certificate, make_certificate, resident_bytes
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import NGINX, PULLPOOL, Front, Place, Subject
from benchmarks.warm import fetch

CAP = 16
SPARE_FILES = 1000  # descriptors that are for other things than the connections

ABOUT = """\
Held one after another: slow readers of one held blob (4 KiB a second each), slow readers over TLS,
and connections that do nothing after a first request. Memory is RSS of all the subject's processes,
what came on top of the time before; kernel memory is that of all sockets of the machine, the
clients' small buffers included. Then a blob that is ten times the cache's limit, made as it is
sent, passes through pullpool.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Readers, those over TLS, idle connections; bytes of the blob they read; seconds each group
    is held before it is looked at."""

    readers: int
    tls_readers: int
    idle: int
    blob: int
    held: float


FULL, FAST = Size(5_000, 500, 10_000, 64 * MIB, 3.0), Size(100, 20, 200, 8 * MIB, 0.5)

MEASURES = (
    mebibytes("base", "at rest"),
    kibibytes("reader", "a slow reader"),
    kibibytes("reader_kernel", "kernel, a reader"),
    kibibytes("tls_reader", "a slow TLS reader"),
    kibibytes("idle", "an idle connection"),
    count("refused", "refused"),
)


def within_limits(size: Size) -> Size:
    """As many as this machine's limit of open files lets a process hold: a server of files has two
    for each reader."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(1, most - SPARE_FILES)
    readers, idle = min(size.readers, room // 2), min(size.idle, room)
    return Size(readers, min(size.tls_readers, readers), idle, size.blob, size.held)


def kernel_bytes() -> int:
    """Memory that the kernel has in TCP sockets, all of the machine's."""
    found = re.search(r"^TCP:.* mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    return int(found[1]) * os.sysconf("SC_PAGE_SIZE") if found else 0


@dataclass(frozen=True, slots=True)
class Grown:
    """What a group took: bytes for each in the subject and in the kernel; how many were refused."""

    each: float
    kernel: float
    refused: int


def grown(front: Front, errand: Errand, held: float) -> Grown:
    """Holds a group and looks. Raises PartFailed."""
    assert front.part is not None
    before, kernel = resident_bytes(front.part.pid), kernel_bytes()
    with holding(errand) as group:
        time.sleep(held)
        each = (resident_bytes(front.part.pid) - before) / errand.connections
        taken = (kernel_bytes() - kernel) / errand.connections
        front.part.check()
    return Grown(each, taken, group.refused)


def play(
    subject: Subject,
    directory: Path,
    upstream: int,
    want: Want,
    size: Size,
    certificate: Certificate,
) -> Played:
    """Each group on a subject that has just started, so that none finds what another left."""
    values: dict[str, float] = {"refused": 0}
    configuration = ""
    for name, path, connections, whole in (
        ("reader", want.path, size.readers, False),
        ("tls_reader", want.path, size.tls_readers, False),
        ("idle", "/v2/", size.idle, True),
    ):
        tls = name == "tls_reader"
        (directory / name).mkdir()
        place = Place(upstream, CAP, directory / name, certificate if tls else None)
        with subject.start(place) as front:
            assert front.part is not None
            values.setdefault("base", resident_bytes(front.part.pid))
            fetch(front, want, tls=tls)
            errand = Errand(front.port, path, connections, whole, tls)
            found = grown(front, errand, size.held)
            values[name] = found.each
            values["refused"] += found.refused
            if name == "reader":
                values["reader_kernel"] = found.kernel
                configuration = front.configuration
    return Played(values, configuration)


def measure(options: Options) -> Findings:
    """Holds the groups on each subject, then carries the huge blob. Raises PartFailed."""
    size = within_limits(FAST if options.fast else FULL)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        (Path(name) / "upstream").mkdir()
        certificate = make_certificate(Path(name))
        with static_registry(Path(name) / "upstream") as (upstream, shelf):
            want = shelf.blob("bench/memory", size.blob)
            board = play_in_turn(
                "memory",
                (NGINX, PULLPOOL),
                options,
                lambda subject, directory: play(
                    subject, directory, upstream.port, want, size, certificate
                ),
                rounds=1,
            )
    load = carried.play(options)
    title = (
        f"memory: {size.readers:,} slow readers of {size.blob / MIB:g} MiB, {size.tls_readers:,} "
        f"over TLS, {size.idle:,} idle connections"
    )
    return Findings(
        about=ABOUT,
        sheets=(board.sheet(title, MEASURES), *carried.sheets(load)),
        promises=(*_promises(board), *carried.promises(load)),
        configurations={"the upstream": upstream.configuration, **board.configurations()},
        figures={"groups": board.figures(), "carried": [load.figures()] if load else []},
        charts=(
            board.chart("memory-reader", "Memory of a slow reader", MEASURES[1], better="less"),
            board.chart("memory-idle", "Memory of an idle connection", MEASURES[4], better="less"),
        ),
    )


def _promises(board: Board) -> Iterator[Promise]:
    base, reader, _, tls_reader, idle, refused = MEASURES
    yield from board.bound(base, "RSS at rest", 90 * MIB)
    yield from board.bound(reader, "a slow reader", 32 * KIB)
    yield from board.bound(tls_reader, "a slow TLS reader", 350 * KIB)
    yield from board.bound(idle, "an idle connection", 24 * KIB)
    yield from board.bound(refused, "connections refused", 0)
