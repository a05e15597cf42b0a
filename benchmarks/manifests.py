"""Manifests that are held, by digest: what a request costs and how many a second there are.

`python -m benchmarks manifests` has wrk ask over 64 connections, with access logs on everywhere:
once in the same bytes each time, as the nodes of a cluster do, and once with a header in each that
no other has, so that nothing can be gained by remembering heads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.board import Board, Played, count, micros, milliseconds, per_second, play_in_turn
from benchmarks.images import make_image
from benchmarks.load import Want
from benchmarks.parts import KIB, cpu_seconds, settled
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import (
    NGINX,
    PULLPOOL,
    REGISTRY,
    Front,
    Place,
    Subject,
    bare,
    two_workers,
)
from benchmarks.warm import fetch
from benchmarks.wrk import wrk

CAP = 16
TWO = Subject("pullpool-2", "pullpool, two workers", "", two_workers)
BARE = Subject("bare", "a bare protocol on the same loop", "", bare)
BARE_TWO = Subject("bare-2", "the same, two processes", "", partial(bare, processes=2))
CONNECTIONS = 64

ABOUT = """\
Each subject holds a manifest, for which wrk asks by digest over 64 connections, with access logs on
everywhere: in the same bytes each time, and with a header in each request that no other has. CPU is
that of the subject with all its processes; wrk has one thread and shares the cores with them. nginx
has two processes, pullpool one, and where it says so two. The bare protocol is no cache: it writes
prepared bytes and the same log on pullpool's loop, and does nothing else (`benchmarks/bare.py`).
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers that the manifest names, and seconds of each load."""

    layers: int
    lasting: float


FULL, FAST = Size(8, 4.0), Size(8, 1.0)

REPEATED = (
    micros("cpu", "CPU a request"),
    per_second("rate", "rate"),
    milliseconds("p99", "p99"),
)
UNIQUE = (
    micros("unique_cpu", "CPU a request"),
    per_second("unique_rate", "rate"),
    milliseconds("unique_p99", "p99"),
    count("failed", "failed"),
)


def load(front: Front, want: Want, lasting: float, *, unique: bool) -> dict[str, float]:
    """One load's numbers. Raises PartFailed."""
    assert front.part is not None
    before = settled(front.part)
    done = wrk(front.port, want.path, connections=CONNECTIONS, lasting=lasting, unique=unique)
    front.part.check()
    return {
        "cpu": (cpu_seconds(front.part.pid) - before) / max(1, done.requests),
        "rate": done.requests / done.seconds,
        "p99": done.p99,
        "failed": done.failed,
    }


def play(subject: Subject, directory: Path, upstream: int, want: Want, size: Size) -> Played:
    """Both loads on one subject."""
    with subject.start(Place(upstream, CAP, directory, access_log=True)) as front:
        fetch(front, want)
        repeated = load(front, want, size.lasting, unique=False)
        unique = load(front, want, size.lasting, unique=True)
        failed = repeated["failed"] + unique["failed"]
        values = {f"unique_{key}": value for key, value in unique.items()}
        return Played({**repeated, **values, "failed": failed}, front.configuration)


def measure(options: Options) -> Findings:
    """Loads each subject in turn. Raises PartFailed."""
    size = FAST if options.fast else FULL
    image = make_image("bench/manifests", layers=size.layers, layer_size=KIB)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        static_registry(Path(name)) as (upstream, shelf),
    ):
        want = shelf.image(image)
        board = play_in_turn(
            "manifests",
            (REGISTRY, NGINX, PULLPOOL, TWO, BARE, BARE_TWO),
            options,
            lambda subject, directory: play(subject, directory, upstream.port, want, size),
        )
    what = f"manifest of {want.size:,} bytes over {CONNECTIONS} connections"
    return Findings(
        about=ABOUT,
        sheets=(
            board.sheet(f"manifests: {what}", REPEATED),
            board.sheet("manifests: a header in each request that no other has", UNIQUE),
        ),
        promises=tuple(_promises(board)),
        configurations={"the upstream": upstream.configuration, **board.configurations()},
        figures=board.figures(),
        charts=(
            board.chart("manifests-cpu", f"CPU a request, {what}", REPEATED[0], better="less"),
            board.chart("manifests-rate", f"Requests a second, {what}", REPEATED[1], better="more"),
        ),
    )


def _promises(board: Board) -> Iterator[Promise]:
    yield from board.promise("CPU a request", "cpu", "≤", 0.9)
    yield from board.promise("CPU a request, unique headers", "unique_cpu", "≤", 1.1)
    yield from board.promise("rate", "rate", "≥", 1.0)
    words = "rate with as many processes"
    yield from board.promise(words, "rate", "≥", 1.0, subject=TWO.name)
    yield from board.promise("rate", "rate", "≥", 80, rival="registry")
    yield from board.bound(UNIQUE[-1], "requests that failed", 0)
