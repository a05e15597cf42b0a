"""Blobs that are held: how many bytes a second, and what a gigabyte and a request cost.

`python -m benchmarks warm` lets each subject fetch a large and a small blob from a registry of
files and then has wrk ask for them: the large one over 8 connections, plain and over TLS, the small
one over 64. CPU is that of the subject with all its processes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.board import (
    GIGABYTE,
    Board,
    Played,
    count,
    cpu_per_gigabyte,
    megabytes,
    micros,
    per_second,
    play_in_turn,
)
from benchmarks.images import MANIFEST_TYPE
from benchmarks.load import Want
from benchmarks.parts import (
    KIB,
    MIB,
    Certificate,
    PartFailed,
    cpu_seconds,
    make_certificate,
    settled,
)
from benchmarks.parts import request as ask
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import CACHES, Front, Place, Subject
from benchmarks.wrk import Load, wrk

CAP = 16
LARGE_CONNECTIONS, SMALL_CONNECTIONS = 8, 64

ABOUT = """\
Each subject holds a large and a small blob; wrk asks for the large one over 8 connections, plain
and over TLS, and for the small one over 64. CPU is that of the subject with all its processes, from
/proc; wrk and the subject share the cores. Access logs are written (varnish keeps its own in
memory, and speaks no TLS).
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the two blobs, and seconds that each is asked for."""

    large: int
    small: int
    lasting: float


FULL, FAST = Size(64 * MIB, 4 * KIB, 3.0), Size(2 * MIB, 4 * KIB, 1.0)

LARGE = (
    megabytes("plain", "plain"),
    cpu_per_gigabyte("plain_cpu", "CPU"),
    megabytes("tls", "TLS"),
    cpu_per_gigabyte("tls_cpu", "CPU, TLS"),
)
SMALL = (
    micros("small_cpu", "CPU a request"),
    per_second("small", "rate"),
    count("failed", "failed"),
)


def fetch(front: Front, want: Want, *, tls: bool = False) -> None:
    """Has a subject fetch something, and sees that it is right. Raises PartFailed."""
    answer = ask(front.port, want.path, headers={"Accept": f"{MANIFEST_TYPE}, */*"}, tls=tls)
    digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
    if answer.status != 200 or digest != want.digest:
        raise PartFailed(f"{want.path}: expected 200 and the digest, got {answer.status}, {digest}")


def load(
    front: Front, want: Want, connections: int, lasting: float, *, tls: bool = False
) -> tuple[Load, float]:
    """What wrk did, and the CPU seconds that it cost the subject. Raises PartFailed."""
    assert front.part is not None
    fetch(front, want, tls=tls)
    before = settled(front.part)  # it may still be storing
    done = wrk(front.port, want.path, connections=connections, lasting=lasting, tls=tls)
    front.part.check()
    return done, cpu_seconds(front.part.pid) - before


def play(
    subject: Subject,
    directory: Path,
    upstream: int,
    wants: tuple[Want, Want],
    size: Size,
    certificate: Certificate,
) -> Played:
    """All loads on one subject: plain first, then a new one with TLS."""
    large, small = wants
    values: dict[str, float] = {}
    (directory / "plain").mkdir()
    place = Place(upstream, CAP, directory / "plain", access_log=True)
    with subject.start(place) as front:
        done, cpu = load(front, large, LARGE_CONNECTIONS, size.lasting)
        values["plain"] = done.size / done.seconds
        values["plain_cpu"] = cpu / done.size * GIGABYTE
        failed = done.failed
        done, cpu = load(front, small, SMALL_CONNECTIONS, size.lasting)
        values["small"] = done.requests / done.seconds
        values["small_cpu"] = cpu / done.requests
        values["failed"] = failed + done.failed
        configuration = front.configuration
    if subject.speaks_tls:
        (directory / "tls").mkdir()
        place = Place(upstream, CAP, directory / "tls", certificate, access_log=True)
        with subject.start(place) as front:
            done, cpu = load(front, large, LARGE_CONNECTIONS, size.lasting, tls=True)
            values["tls"] = done.size / done.seconds
            values["tls_cpu"] = cpu / done.size * GIGABYTE
            values["failed"] += done.failed
    return Played(values, configuration)


def measure(options: Options) -> Findings:
    """Loads each subject in turn. Raises PartFailed."""
    size = FAST if options.fast else FULL
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        (Path(name) / "upstream").mkdir()
        certificate = make_certificate(Path(name))
        with static_registry(Path(name) / "upstream") as (upstream, shelf):
            wants = shelf.blob("bench/warm", size.large), shelf.blob("bench/warm", size.small)
            board = play_in_turn(
                "warm",
                CACHES,
                options,
                lambda subject, directory: play(
                    subject, directory, upstream.port, wants, size, certificate
                ),
            )
    large = f"{size.large / MIB:g} MiB over {LARGE_CONNECTIONS} connections"
    small = f"{size.small / KIB:g} KiB over {SMALL_CONNECTIONS} connections"
    return Findings(
        about=ABOUT,
        sheets=(board.sheet(f"warm: {large}", LARGE), board.sheet(f"warm: {small}", SMALL)),
        promises=tuple(_promises(board)),
        configurations={"the upstream": upstream.configuration, **board.configurations()},
        figures=board.figures(),
        charts=(
            board.chart("warm-rate", f"Held blobs, {large}", LARGE[0], better="more"),
            board.chart("warm-cpu", f"CPU a gigabyte, {large}", LARGE[1], better="less"),
            board.chart("warm-tls", f"Held blobs over TLS, {large}", LARGE[2], better="more"),
        ),
    )


def _promises(board: Board) -> Iterator[Promise]:
    yield from board.promise("CPU per GB", "plain_cpu", "≤", 1.15)
    yield from board.promise("bytes a second", "plain", "≥", 0.95)
    yield from board.promise("bytes a second over TLS", "tls", "≥", 1.0)
    yield from board.promise("CPU for 4 KiB", "small_cpu", "≤", 3.0)
    yield from board.bound(SMALL[2], "requests that failed", 0)
